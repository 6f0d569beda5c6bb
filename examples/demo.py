"""Prunes a trained language model, packs it, and shows what is lost and what is gained.

    python -m examples.demo
    python -m examples.demo --method=all --density=0.7 --density=0.4

For each method and density: the layers are pruned on calibration text, packed into MACKO
matrices, checked against the pruned dense model, saved, loaded again, evaluated on held-out text
and timed while they continue a prompt. The result is a table, and a directory with the packed
checkpoints and results.json.
"""

import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

import dsf_jax
from dsf_jax import export
from dsf_jax.pipeline.solve import METHODS
from examples import cli, llama, stdlib_text
from examples.llama import checkpoint, compression, evaluation
from examples.records import write_json
from macko_jax.format.quantization import NAMES

flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parent / "llama" / "checkpoint"),
    "Directory of a byte-level model, as examples.train_lm writes it.",
)
flags.DEFINE_string(
    "text", None, "Text file to evaluate on; by default held-out modules of Python's library."
)
flags.DEFINE_string(
    "calibration", None, "Text file to calibrate on; by default other modules of the library."
)
flags.DEFINE_multi_enum(
    "method", ["magnitude", "wanda"], [*METHODS, "all"], "How to compress; repeatable."
)
flags.DEFINE_multi_float(
    "density",
    [0.5, 0.3],
    "Share of weights that stay; repeatable.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_string("prompt", "def read_lines(path, encoding='utf-8'):\n    ", "Text to continue.")
flags.DEFINE_integer("new_tokens", 80, "Tokens to draw, which are bytes.", lower_bound=1)
flags.DEFINE_float("temperature", 0.3, "0 takes the likeliest token.")
flags.DEFINE_integer("windows", 4, "Windows to calibrate on.", lower_bound=1)
flags.DEFINE_integer(
    "eval_windows", 12, "Windows to evaluate, spread over the text; 0 for all of it.", lower_bound=0
)
flags.DEFINE_string(
    "dsf_options", "{}", "JSON object of options of `dsf`, such as '{\"refine_rounds\": 60}'."
)
flags.DEFINE_enum(
    "values", None, [*NAMES], "Store values in 8 bits; by default in the checkpoint's type."
)
flags.DEFINE_string("out", "runs/demo", "Directory of packed checkpoints and results.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.")

BATCH = 4  # windows per call


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo does; the flags of the same names say what each is."""

    checkpoint: str
    text: str | None
    calibration: str | None
    method: tuple[str, ...]
    density: tuple[float, ...]
    prompt: str
    new_tokens: int
    temperature: float
    windows: int
    eval_windows: int
    dsf_options: str
    values: str | None
    out: str
    seed: int

    def runs(self):
        """(method, density) of each row of the table but the first, which is dense."""
        methods = tuple(METHODS) if "all" in self.method else tuple(dict.fromkeys(self.method))
        return [(method, density) for density in self.density for method in methods]


def show(line, done=True):
    """Prints a line; one that is not done is overwritten by the next, on a terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if done else "", flush=True)
    elif done:
        print(line, flush=True)


class Bench:
    """What every model, dense or packed, is asked to do."""

    def __init__(self, settings, length):
        self.settings, self.length = settings, length
        self.tokens = tokens = stdlib_text.read_tokens(settings.text)
        # The shape that the evaluation compiles for.
        self.sample = evaluation.windows(tokens[: BATCH * length], length, length)[0]

    def logits(self, model):
        """Logits on the beginning of the text."""
        return evaluation.logits(*nnx.split(model), self.sample)

    def bits_per_byte(self, model):
        return evaluation.bits_per_token(
            model,
            self.tokens,
            length=self.length,
            stride=self.length // 2,
            batch=BATCH,
            limit=self.settings.eval_windows or None,
            progress=lambda done, all_: show(f"    evaluated {done} of {all_} windows", done=False),
        )

    def continuation(self, model):
        """Text that follows the prompt, and tokens per second of a second, compiled run."""
        settings = self.settings
        prompt = list(stdlib_text.START + settings.prompt.encode())
        for _ in range(2):
            show("    generating", done=False)
            began = time.perf_counter()
            drawn = list(
                llama.generate(
                    model,
                    [prompt],
                    settings.new_tokens,
                    sampling=llama.Sampling(settings.temperature),
                    seed=settings.seed,
                    chunk=settings.new_tokens,
                )
            )
            seconds = time.perf_counter() - began
        text = bytes(np.concatenate(drawn, axis=1)[0].tolist()).decode(errors="replace")
        return text, settings.new_tokens / seconds


def check_agreement(found, wanted, exact):
    """Stops unless logits agree up to rounding.

    Args:
      found: logits of the packed model.
      wanted: logits of the pruned dense model.
      exact: whether both have the same weights and were computed in float32.

    Returns:
      The largest difference, relative to the largest logit.
    """
    difference = float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())
    allowed = 1e-4 if exact else 0.05
    if not difference <= allowed:
        raise ArithmeticError(
            f"the packed model differs from the pruned dense one by {difference:.2g} of the "
            f"largest logit; rounding explains at most {allowed:g}"
        )
    return difference


def run_method(model, method, density, batches, grams, bench):
    """Prunes, packs, checks, saves, reloads, evaluates and times one model; a row of the table."""

    def report(progress):
        show(f"    pruned {progress.index} of {progress.total} layers", done=False)

    settings = bench.settings
    began = time.perf_counter()
    pruned = dsf_jax.compress_model(
        model,
        batches[:1],
        method=method,
        density=density,
        calibration=dsf_jax.Calibration("one-pass", grams=grams),
        options=cli.read_options(settings.dsf_options) if method == "dsf" else None,
        values=settings.values,
        callback=report,
    )
    pruned_at = time.perf_counter()
    packed, packing = export.pack(pruned.model, settings.values)
    packed_at = time.perf_counter()
    show(
        f"    pruned in {pruned_at - began:.1f} s, packed {len(packing.packed)} of "
        f"{len(packing.layers)} linear layers in {packed_at - pruned_at:.1f} s"
    )
    # Products of 8-bit values and scales are not rounded to bfloat16, as the pruned model's are.
    exact = model.dtype == jnp.float32 and settings.values is None
    difference = check_agreement(bench.logits(packed), bench.logits(pruned.model), exact)

    directory = pathlib.Path(settings.out) / f"{method}-{density:g}"
    size = checkpoint.save_packed(directory, packed)
    loaded = checkpoint.load_packed(directory, dtype=model.dtype)
    same = jax.tree.map(np.array_equal, nnx.state(loaded), nnx.state(packed))
    if not all(jax.tree.leaves(same)):
        raise ArithmeticError(f"{directory} holds other arrays than the model that was saved there")
    show(
        f"    packed and pruned logits agree within {difference:.1e}; saved to "
        f"{directory} ({size / 1e6:.2f} MB) and reloaded"
    )
    bits = bench.bits_per_byte(loaded)
    text, speed = bench.continuation(loaded)
    show(f"    {bits:.4f} bits per byte, {speed:.0f} tokens/s")
    return {
        "method": method,
        "density": pruned.report.density,
        "bits_per_byte": bits,
        "megabytes": packing.bytes_after / 1e6,
        "tokens_per_second": speed,
        "continuation": text,
        "agreement": difference,
        "checkpoint": str(directory),
        "file_megabytes": size / 1e6,
        "seconds": time.perf_counter() - began,
    }


def write_results(settings, rows, length, seconds):
    """Writes results.json, anew after each row."""
    results = {
        "rows": rows,
        "checkpoint": settings.checkpoint,
        "text": settings.text or stdlib_text.HELD_OUT,
        "prompt": settings.prompt,
        "windowing": {
            "length": length,
            "stride": length // 2,
            "windows": settings.eval_windows or "all",
        },
        "calibration_windows": settings.windows,
        "dsf_options": cli.read_options(settings.dsf_options),
        "values": settings.values,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        "date": datetime.date.today().isoformat(),
        "seconds": seconds,
    }
    write_json(pathlib.Path(settings.out) / "results.json", results)


def format_table(rows):
    dense = rows[0]
    header = ("method", "density", "bits per byte", "lost", "MB", "of dense", "tokens/s")
    cells = [
        (
            row["method"],
            f"{row['density']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['bits_per_byte'] - dense['bits_per_byte']:+.4f}",
            f"{row['megabytes']:.2f}",
            f"{row['megabytes'] / dense['megabytes']:.0%}",
            f"{row['tokens_per_second']:.0f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (header, *cells)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def load_model(settings):
    """The dense model, which computes in bfloat16 but for CPUs."""
    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    show(f"loading {settings.checkpoint} on {device.device_kind}, computing in {jnp.dtype(dtype)}")
    model = checkpoint.load(settings.checkpoint, dtype=dtype, param_dtype=jnp.bfloat16)
    if model.config.vocab_size != 256:
        raise ValueError(
            f"{settings.checkpoint} has {model.config.vocab_size} tokens; the demo needs a "
            "byte-level model, of 256"
        )
    return model


def run_dense(model, bench):
    """Evaluates and times the model as it is; the first row of the table."""
    text, speed = bench.continuation(model)
    return {
        "method": "dense",
        "density": 1.0,
        "bits_per_byte": bench.bits_per_byte(model),
        "megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) / 1e6,
        "tokens_per_second": speed,
        "continuation": text,
    }


def show_results(settings, rows, seconds):
    """The continuations, and the table."""
    show("")
    for row in rows:
        show(f"--- {row['method']}, density {row['density']:.2f}, continues the prompt:")
        show(settings.prompt + row["continuation"] + "\n")
    show(format_table(rows))
    windows = f"{settings.eval_windows} windows of" if settings.eval_windows else "all of"
    show(
        f"\nbits per byte on {windows} {settings.text or 'held-out standard library modules'}; "
        f"density of the decoder's linear layers; MB of all weights in bfloat16.\n"
        f"Packed checkpoints and results.json are in {settings.out} ({seconds:.0f} s in all)."
    )


def main(_):
    began = time.perf_counter()
    settings = cli.settings(Settings)
    model = load_model(settings)
    length = model.config.max_position_embeddings
    bench = Bench(settings, length)
    calibration = stdlib_text.read_tokens(settings.calibration, stdlib_text.CALIBRATION)
    batches = compression.calibration_batches(calibration, length, settings.windows, BATCH)
    show(f"calibrating on {settings.windows} windows of {length} bytes", done=False)
    grams = dsf_jax.gram_matrices(model, batches)

    runs = settings.runs()
    show(f"[1/{len(runs) + 1}] dense")
    rows = [run_dense(model, bench)]
    for i, (method, density) in enumerate(runs):
        left = (time.perf_counter() - began) / (i + 1) * (len(runs) - i)
        show(f"[{i + 2}/{len(runs) + 1}] {method}, density {density:g}; about {left:.0f} s left")
        rows.append(run_method(model, method, density, batches, grams, bench))
        write_results(settings, rows, length, time.perf_counter() - began)
    show_results(settings, rows, time.perf_counter() - began)


if __name__ == "__main__":
    cli.run(main)
