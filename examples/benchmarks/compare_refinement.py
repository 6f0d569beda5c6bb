"""What each stage of refinement gives a compressed language model, on the text of its kind and not.

    python -m examples.benchmarks.compare_refinement --checkpoint=DIR --method=wanda --density=0.5 \
        --calibration=FILE --calibration=self --text=OTHER --length=1024 --out=runs/refinement.json

Each model is compressed as examples.compress_llm does it, on the first text of --calibration
("layers"); its blocks are refined as examples.refine_llm --stage=block does it ("block"), and the
whole is refined as --stage=model does it, on all texts ("model"). The models stay beside the
record, which has their perplexities on --text and on topics of Python's help, how often they agree
with the dense model, and the seconds of each stage. It is rewritten after each of them, and a run
goes on where an earlier one stopped. --record joins records that are there already, and
examples.benchmarks.plot_results draws the curves:

    python -m examples.benchmarks.compare_refinement --record=a.json --record=b.json
"""

import dataclasses
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

import dsf_jax
from dsf_jax.pipeline.solve import METHODS
from examples import cli, files, stdlib_text
from examples.benchmarks import timing
from examples.benchmarks.record_fields import merge, read_record
from examples.llama import checkpoint, compression, evaluation, refinement, texts
from examples.llama import tokenizer as tokenizers
from examples.records import write_json

STAGES = ("layers", "block", "model")
EVERY = 10  # steps, of which the record has the mean loss

flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parents[1] / "llama" / "checkpoint"),
    "Hugging Face directory of the dense model.",
)
flags.DEFINE_string("text", None, "Text file to evaluate on, beside topics of Python's help.")
flags.DEFINE_multi_string(
    "calibration",
    [],
    "Text file to calibrate on, or 'self' for the dense model's own; repeatable: the first one "
    "serves the layers, and all of them what comes after.",
)
flags.DEFINE_multi_enum("method", ["wanda"], [*METHODS], "How to compress; repeatable.")
flags.DEFINE_multi_float(
    "density", [0.5], "Share of weights that stay; repeatable.", lower_bound=0.0, upper_bound=1.0
)
flags.DEFINE_multi_enum("stage", [*STAGES], [*STAGES], "What is done and evaluated; repeatable.")
flags.DEFINE_integer("windows", 64, "Windows to calibrate on, for the layers.", lower_bound=1)
flags.DEFINE_integer("block_windows", 64, "Windows of each text for blocks.", lower_bound=1)
flags.DEFINE_integer(
    "model_windows", 256, "Windows of each text for the whole model.", lower_bound=1
)
flags.DEFINE_integer(
    "length", None, "Tokens of a window; by default the model's positions, at most 2048."
)
flags.DEFINE_integer("block_batch", 4, "Windows per step of a block.", lower_bound=1)
flags.DEFINE_integer("block_steps", 300, "Steps of each block.", lower_bound=1)
flags.DEFINE_float("block_rate", 3e-4, "Learning rate for blocks.")
flags.DEFINE_integer("batch", 8, "Windows per step of the whole model.", lower_bound=1)
flags.DEFINE_integer("steps", 600, "Steps of the whole model.", lower_bound=1)
flags.DEFINE_float("learning_rate", 3e-4, "Learning rate for the whole model.")
flags.DEFINE_integer(
    "eval_windows", 0, "Windows to evaluate, spread over each text; 0 for all.", lower_bound=0
)
flags.DEFINE_multi_string("record", [], "Record to join with others; nothing is run.")
flags.DEFINE_string("out", "runs/compare_refinement.json", "File of the record.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared; the flags of the same names say what each is."""

    checkpoint: str
    text: str | None
    calibration: tuple[str, ...]
    method: tuple[str, ...]
    density: tuple[float, ...]
    stage: tuple[str, ...]
    windows: int
    block_windows: int
    model_windows: int
    length: int | None
    block_batch: int
    block_steps: int
    block_rate: float
    batch: int
    steps: int
    learning_rate: float
    eval_windows: int
    record: tuple[str, ...]
    out: str

    def directory(self, *names):
        """Where a model is, beside the record."""
        return pathlib.Path(self.out).with_suffix("") / "-".join(map(str, names))

    def described(self):
        """What must be the same in records that are joined, as they have it."""
        return {
            "checkpoint": pathlib.Path(self.checkpoint).name,
            "length": self.length,
            "windows": self.eval_windows or "all",
        }


class Judge:
    """Evaluates models beside the dense one.

    Args:
      settings: what is compared.
    """

    def __init__(self, settings):
        self.dense = checkpoint.load(settings.checkpoint, dtype=jnp.float32)
        config = self.dense.config
        length = evaluation.window_length(settings.length, config)
        tokenizer = tokenizers.load_tokenizer(settings.checkpoint, config.vocab_size)
        read = {"topics": stdlib_text.read_topics(held_out=True)}
        if settings.text is not None:
            text = files.read_text(settings.text)
            read = {"text": text} | read
        self.tokens = {name: np.array(tokenizer.encode(text)) for name, text in read.items()}
        self.options = {
            "length": length,
            "stride": max(1, length - 1),
            "batch": 8,
            "limit": settings.eval_windows or None,
        }

    def __call__(self, directory):
        """What a row says of a packed model; the agreement is that on the first text."""
        model = checkpoint.load_packed(directory, dtype=jnp.float32, unpack=True)
        perplexity, agreements = {}, []
        with jax.default_matmul_precision("highest"):
            for name, tokens in self.tokens.items():
                nats, count, agreement = evaluation.agreement(
                    model, self.dense, tokens, **self.options
                )
                perplexity[name] = math.exp(nats / count)
                agreements.append(agreement)
        return {
            "perplexity": perplexity,
            "agreement": agreements[0],
            "bytes": sum(path.stat().st_size for path in directory.glob("packed-*")),
        }

    def of_dense(self):
        """Perplexities of the dense model by text."""
        with jax.default_matmul_precision("highest"):
            return {
                name: evaluation.perplexity(self.dense, tokens, **self.options)
                for name, tokens in self.tokens.items()
            }


def run_all(settings):
    """Runs what the record lacks; returns it."""
    judge = Judge(settings)
    there = pathlib.Path(settings.out).exists()
    record = read_record(settings.out, "refinement") if there else None
    if record is None:
        record = begin_record(settings, judge)
    elif record["settings"] != settings.described():
        raise ValueError(f"{settings.out} has other settings; give another --out")
    done = {key_of(row) for row in record["rows"]}
    for density in settings.density:
        for method in settings.method:
            before = None
            for stage in (stage for stage in STAGES if stage in settings.stage):
                directory = settings.directory(method, density, stage)
                if (method, density, stage) not in done:
                    began = time.perf_counter()
                    row = {"method": method, "density": density, "stage": stage}
                    row |= make(settings, stage, method, density, before, directory)
                    row |= {"seconds": time.perf_counter() - began} | judge(directory)
                    record["rows"].append(row)
                    write_json(settings.out, record)
                    print(line(row), flush=True)
                before = directory
    return record


def make(settings, stage, method, density, before, directory):
    """Makes the model of a stage from that of the stage before; what a row says of the settings."""
    if stage == "layers":
        windows = read_windows(settings, settings.calibration[:1], settings.windows)
        compression.compress_checkpoint(
            settings.checkpoint, directory, windows, method=method, density=density
        )
        return {"windows": list(windows.shape)}
    if before is None:
        raise ValueError(f"--stage={stage} refines what another stage gives: add --stage=layers")
    whole = stage == "model"
    on_gpu = jax.default_backend() == "gpu"
    training = {
        "steps": settings.steps if whole else settings.block_steps,
        "learning_rate": settings.learning_rate if whole else settings.block_rate,
    }
    count = settings.model_windows if whole else settings.block_windows
    windows = read_windows(settings, settings.calibration, count)
    size = settings.batch if whole else settings.block_batch
    batches = texts.split_steps(windows, size)
    report, _ = refinement.refine_checkpoint(
        before,
        settings.checkpoint,
        directory,
        batches,
        stage=stage,
        dtype=jnp.bfloat16 if whole and on_gpu else jnp.float32,
        text=list(settings.calibration),
        callback=dsf_jax.print_progress,
        **training,
    )
    return training | {"windows": list(windows.shape), "batch": size} | curves(report)


def curves(report):
    """What a row has to draw: the error of each block, or the mean loss of every ten steps."""
    if report.blocks:
        return {"blocks": [{"before": b.before, "after": b.after} for b in report.blocks]}
    losses = [report.losses[i : i + EVERY] for i in range(0, len(report.losses), EVERY)]
    return {"losses": [float(np.mean(part)) for part in losses], "steps_of_a_loss": EVERY}


def read_windows(settings, names, count):
    """Windows of texts; the model's own text is kept beside the models."""
    beside = settings.directory("own")
    beside.mkdir(parents=True, exist_ok=True)
    return texts.read_windows(names, settings.checkpoint, beside, count, settings.length)


def key_of(row):
    """What tells a row from others."""
    return row["method"], row["density"], row["stage"]


def begin_record(settings, judge):
    """A record that has the dense model alone."""
    return {
        "command": "python -m examples.benchmarks.compare_refinement",
        "settings": settings.described(),
        **timing.environment(),
        "dense": {"perplexity": judge.of_dense()},
        "rows": [],
    }


def line(row):
    """A row in short."""
    perplexity = ", ".join(f"{name} {value:.3f}" for name, value in row["perplexity"].items())
    return (
        f"{row['method']:14} {row['density']:4g} {row['stage']:6} {perplexity}, "
        f"{row['agreement']['overlap']:.1%} accepted, {row['seconds']:.0f} s"
    )


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax tells all that it does
    settings = cli.settings(Settings)
    records = [read_record(path, "refinement") for path in settings.record] or [run_all(settings)]
    try:
        record = merge(records, key_of, [*METHODS, *STAGES])
    except ValueError as error:
        raise ValueError(f"{', '.join(settings.record) or settings.out}: {error}") from None
    write_json(settings.out, record)
    print("\n".join(map(line, record["rows"])))


if __name__ == "__main__":
    cli.run(main)
