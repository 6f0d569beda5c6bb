"""Prunes or factorizes a Llama-family checkpoint block by block, and writes it packed.

    python -m examples.compress_llm --checkpoint=DIR --out=PACKED --density=0.5 --calibration=FILE
    python -m examples.compress_llm --checkpoint=DIR --out=PACKED --method=dsf --target_bytes=90MB \
        --values=int8 --rule="layers/0/.* skip" --rule=".*/mlp/down density=0.6"
    python -m examples.compress_llm --checkpoint=PRUNED --out=PACKED --method=given

Memory holds one block at a time, so the checkpoint may be larger than it. A run that was killed
goes on where it was when the same command is given again. PACKED serves examples.generate,
examples.evaluate and examples.benchmarks.benchmark_decode as DIR does; its report.json says what
became of each layer. --method=given packs a checkpoint that somebody else has pruned, as it is.
"""

import dataclasses
import pathlib
import resource

import jax
import jax.numpy as jnp
from absl import flags

import dsf_jax
from dsf_jax.solvers.methods import METHODS
from examples import cli
from examples.llama import compression, texts
from examples.llama.recipe import GIVEN, BlockRefinement
from macko_jax.format.codes import ENCODINGS
from macko_jax.format.quantization import NAMES

flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parent / "llama" / "checkpoint"),
    "Hugging Face directory of the dense model.",
)
flags.DEFINE_string("out", None, "Required: directory of the packed model.", required=True)
flags.DEFINE_enum(
    "method", "wanda", [*METHODS, GIVEN], "How to compress; 'given' packs the zeros that are there."
)
flags.DEFINE_float("density", 0.5, "Share of weights that stay, in (0, 1].")
flags.register_validator(
    "density", lambda share: 0 < share <= 1, message="the share of weights that stay is in (0, 1]"
)
flags.DEFINE_string(
    "target_bytes",
    None,
    "Size of the packed model in the place of --density: bytes, or with a unit, as in 90MB.",
)
flags.DEFINE_enum(
    "budget",
    "uniform",
    ["uniform", "sensitivity"],
    "Whether each layer keeps --density, or layers that suffer more keep more, which takes a "
    "second pass through the model.",
)
flags.DEFINE_multi_string(
    "rule",
    [],
    "What is done otherwise: a regular expression of layers' paths, such as layers/3/mlp/down, "
    "then skip, or density=NUMBER and method=NAME, with spaces between; repeatable, and the first "
    "that matches applies.",
)
flags.DEFINE_string("pattern", None, "N:M pattern of the pruning methods, such as 2:4.")
flags.DEFINE_string(
    "dsf_options", "{}", "JSON object of options of `dsf`, such as '{\"refine_rounds\": 60}'."
)
flags.DEFINE_enum(
    "values", None, [*NAMES], "Store values in 8 bits; by default in the checkpoint's type."
)
flags.DEFINE_multi_string(
    "calibration",
    [],
    "Text file to calibrate on, in UTF-8; or 'self' for text that the dense model writes, kept in "
    "the directory of the packed model; repeatable; by default modules of Python's library for a "
    "byte-level model, and topics of its help for others.",
)
flags.DEFINE_bool(
    "whole_blocks",
    False,
    "Calibrate the layers of a block together, so that --devices share them; else each is "
    "calibrated on what the compressed ones before it give.",
)
flags.DEFINE_enum(
    "refine", None, ["block"], "Train each block towards the dense one once its layers are solved."
)
flags.DEFINE_integer(
    "refine_steps", BlockRefinement.steps, "Steps of it, a batch of windows each.", lower_bound=1
)
flags.DEFINE_float("refine_rate", BlockRefinement.rate, "Its learning rate.", lower_bound=0)
flags.DEFINE_integer("windows", 128, "Windows to calibrate on, of each text.", lower_bound=1)
flags.DEFINE_integer(
    "length",
    None,
    "Tokens of a window; by default the model's positions, at most 2048.",
    lower_bound=1,
)
flags.DEFINE_integer("batch", 4, "Windows at a time.", lower_bound=1)
flags.DEFINE_integer(
    "devices", 1, "Devices over which layers are spread; 0 for all there are.", lower_bound=0
)
flags.DEFINE_enum(
    "encoding",
    None,
    list(ENCODINGS),
    "Encoding of the packed matrices; by default the fastest for the device at hand.",
)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "What activations are computed in."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compressed to what; the flags of the same names say what each is."""

    checkpoint: str
    out: str
    method: str
    density: float
    target_bytes: str | None
    budget: str
    rule: tuple[str, ...]
    pattern: str | None
    dsf_options: str
    values: str | None
    calibration: tuple[str, ...]
    whole_blocks: bool
    refine: str | None
    refine_steps: int
    refine_rate: float
    windows: int
    length: int | None
    batch: int
    devices: int
    encoding: str | None
    dtype: str

    def recipe(self):
        """The fields of a `Recipe`."""
        return {
            "method": self.method,
            "density": self.density,
            "target_bytes": self.target_bytes and cli.read_size(self.target_bytes),
            "budget": self.budget,
            "rules": tuple(map(cli.read_rule, self.rule)),
            "pattern": self.pattern,
            "dsf_options": cli.read_options(self.dsf_options),
            "values": self.values,
            "whole_blocks": self.whole_blocks,
            "refine": self.refine and BlockRefinement(self.refine_steps, self.refine_rate),
            "encoding": self.encoding,
        }

    def solvers(self):
        """The devices over which layers are spread."""
        here = jax.local_devices()
        if self.devices > len(here):
            raise ValueError(f"--devices={self.devices}, and there are {len(here)}")
        return here[: self.devices or None]


def read_windows(settings):
    """The calibration windows, [N, T]; None where nothing is calibrated."""
    if settings.method == GIVEN:
        return None
    return texts.read_windows(
        settings.calibration, settings.checkpoint, settings.out, settings.windows, settings.length
    )


def peak_memory():
    """A line on the largest amounts of memory held so far."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    on_device = f", of the device {device / 1e9:.2f} GB" if device else ""
    return f"peak memory of the process {host / 1e9:.2f} GB{on_device}"


def describe(settings, windows):
    """A line on what is about to be done."""
    if windows is None:
        return f"packing {settings.checkpoint} as it is"
    size = f"density {settings.density:g}"
    if settings.target_bytes:
        size = f"to {settings.target_bytes}"
    return (
        f"{settings.method}, {size}, on {jax.devices()[0].device_kind}, calibrated on "
        f"{windows.shape[0]} windows of {windows.shape[1]} tokens"
    )


def main(_):
    settings = cli.settings(Settings)
    recipe, devices = settings.recipe(), settings.solvers()
    windows = read_windows(settings)
    print(describe(settings, windows), flush=True)
    report = compression.compress_checkpoint(
        settings.checkpoint,
        settings.out,
        windows,
        dtype=jnp.dtype(settings.dtype),
        batch=settings.batch,
        devices=devices,
        callback=dsf_jax.print_progress,
        **recipe,
    )
    print(report)
    size = sum(path.stat().st_size for path in pathlib.Path(settings.out).glob("packed-*"))
    print(f"packed model: {settings.out}, {size / 1e6:.1f} MB; {peak_memory()}")


if __name__ == "__main__":
    cli.run(main)
