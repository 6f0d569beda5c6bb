"""Prunes or factorizes a Llama-family checkpoint block by block, and writes it packed.

    python -m examples.compress_llm --checkpoint=DIR --out=PACKED --density=0.5 --calibration=FILE

Memory holds one block at a time, so the checkpoint may be larger than it. A run that was killed
goes on where it was when the same command is given again. PACKED serves examples.generate,
examples.evaluate and examples.benchmarks.benchmark_decode as DIR does; its report.json says what
became of each layer.
"""

import pathlib
import resource

import jax
import jax.numpy as jnp
from absl import flags

import dsf_jax
from dsf_jax.pipeline.solve import METHODS
from examples import cli, stdlib_text
from examples.llama import checkpoint, compression, evaluation
from examples.llama import tokenizer as tokenizers
from macko_jax.format.codes import ENCODINGS

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parent / "llama" / "checkpoint"),
    "Hugging Face directory of the dense model.",
)
OUT = flags.DEFINE_string("out", None, "Required: directory of the packed model.", required=True)
METHOD = flags.DEFINE_enum("method", "wanda", [*METHODS], "How to compress.")
DENSITY = flags.DEFINE_float("density", 0.5, "Share of weights that stay, in (0, 1].")
flags.register_validator(
    "density", lambda share: 0 < share <= 1, message="the share of weights that stay is in (0, 1]"
)
CALIBRATION = flags.DEFINE_string(
    "calibration",
    None,
    "Text file to calibrate on; by default, for a byte-level model, modules of the library.",
)
WINDOWS = flags.DEFINE_integer("windows", 128, "Windows to calibrate on.", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "length",
    None,
    "Tokens of a window; by default the model's positions, at most 2048.",
    lower_bound=1,
)
BATCH = flags.DEFINE_integer("batch", 4, "Windows at a time.", lower_bound=1)
ENCODING = flags.DEFINE_enum(
    "encoding",
    None,
    list(ENCODINGS),
    "Encoding of the packed matrices; by default the fastest for GPUs, or "
    "bitmask where this runs on a CPU.",
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "What activations are computed in."
)


def read_windows():
    """The calibration windows, [N, T]."""
    config = checkpoint.load_config(CHECKPOINT.value)
    length = evaluation.window_length(LENGTH.value, config)
    tokenizer = tokenizers.load_tokenizer(CHECKPOINT.value, config.vocab_size)
    if CALIBRATION.value:
        text = pathlib.Path(CALIBRATION.value).read_text(encoding="utf-8")
    elif config.vocab_size == 256:
        modules = stdlib_text.read_modules(stdlib_text.CALIBRATION)
        text = "\0".join(module.decode() for module in modules.values())
    else:
        raise ValueError("give --calibration=FILE, a text of the kind that the model is meant for")
    return compression.calibration_windows(tokenizer.encode(text), length, WINDOWS.value)


def peak_memory():
    """A line on the largest amounts of memory held so far."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    on_device = f", of the device {device / 1e9:.2f} GB" if device else ""
    return f"peak memory of the process {host / 1e9:.2f} GB{on_device}"


def main(_):
    windows = read_windows()
    print(
        f"{METHOD.value} at density {DENSITY.value:g} on {jax.devices()[0].device_kind}, "
        f"calibrated on {windows.shape[0]} windows of {windows.shape[1]} tokens",
        flush=True,
    )
    # Programs with bitmasks compile several times faster for CPUs; both encodings run everywhere.
    on_cpu = "bitmask" if jax.default_backend() == "cpu" else None
    report = compression.compress_checkpoint(
        CHECKPOINT.value,
        OUT.value,
        windows,
        method=METHOD.value,
        density=DENSITY.value,
        dtype=jnp.dtype(DTYPE.value),
        batch=BATCH.value,
        encoding=ENCODING.value or on_cpu,
        callback=dsf_jax.print_progress,
    )
    print(report)
    size = sum(path.stat().st_size for path in pathlib.Path(OUT.value).glob("packed-*"))
    print(f"packed model: {OUT.value}, {size / 1e6:.1f} MB; {peak_memory()}")


if __name__ == "__main__":
    cli.run(main)
