"""Quality against stored bytes of a language model compressed in every way.

    python -m examples.benchmarks.compare_methods --out=runs/compare_methods.json
    python -m examples.benchmarks.compare_methods --checkpoint=DIRECTORY --length=1024 \
        --text=FILE --calibration=FILE --values=stored --values=int8 --bits=4 --density=0.5

For each density and method, all linear layers of the model's blocks are pruned or factorized with
the same Gram matrices and packed into MACKO matrices; the record has the bits per byte of held-out
text, the perplexity per token and the stored bytes. Beside them stands what a user would take
instead, dense weights of few bits, rounded to nearest and by GPTQ (`few_bits`), with the bytes that
they would take. Pairs of factors cost more index bits than one matrix at equal non-zeros, so that
equal bytes is the fair axis: beside each row stands what DSF loses at that row's bytes. The record
is rewritten after each row, and a run goes on where an earlier one stopped. --record joins records
that are there already, of several runs; examples.benchmarks.plot_results draws what comes of it:

    python -m examples.benchmarks.compare_methods --record=a.json --record=b.json
"""

import csv
import dataclasses
import importlib.metadata
import math
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

import dsf_jax
from dsf_jax import export
from dsf_jax.pipeline.solve import METHODS
from examples import cli, files, stdlib_text
from examples.benchmarks.few_bits import FEW_BITS, bits_per_weight
from examples.benchmarks.record_fields import merge, read_record
from examples.llama import checkpoint, compression, evaluation
from examples.llama import tokenizer as tokenizers
from examples.records import write_json, write_text
from macko_jax.format.quantization import NAMES

REFERENCE = "dsf"  # whose loss at equal bytes stands beside every row

flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parents[1] / "llama" / "checkpoint"),
    "Hugging Face directory of a Llama-family model.",
)
flags.DEFINE_string(
    "text", None, "Text file to evaluate on; by default held-out modules of Python's library."
)
flags.DEFINE_string(
    "calibration", None, "Text file to calibrate on; by default other modules of the library."
)
flags.DEFINE_multi_enum("method", [*METHODS], [*METHODS], "How to compress; repeatable.")
flags.DEFINE_multi_float(
    "density",
    [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    "Share of weights that stay; repeatable.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_multi_integer(
    "bits", [], "Bits of dense weights, by rtn and gptq; repeatable.", lower_bound=2, upper_bound=8
)
flags.DEFINE_multi_enum(
    "values",
    ["stored"],
    ["stored", *NAMES],
    "Type of the packed values; stored: the checkpoint's own; repeatable.",
)
flags.DEFINE_integer("windows", 32, "Windows to calibrate on.", lower_bound=1)
flags.DEFINE_integer(
    "length", None, "Tokens of a window; by default the model's positions, at most 2048."
)
flags.DEFINE_integer(
    "eval_windows", 64, "Windows to evaluate, spread over the text; 0 for all of it.", lower_bound=0
)
flags.DEFINE_multi_string("record", [], "Record to join with others; nothing is run.")
flags.DEFINE_string("out", "runs/compare_methods.json", "File of the record; a table is beside it.")

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run compares; the flags of the same names say what each is."""

    checkpoint: str
    text: str | None
    calibration: str | None
    method: tuple[str, ...]
    density: tuple[float, ...]
    bits: tuple[int, ...]
    values: tuple[str, ...]
    windows: int
    length: int | None
    eval_windows: int
    record: tuple[str, ...]
    out: str

    def asked(self):
        """(method, density or bits, type of the values) of every row."""
        return [
            *(
                (method, density, values)
                for density in self.density
                for method in self.method
                for values in self.values
            ),
            *((method, bits, "stored") for bits in self.bits for method in FEW_BITS),
        ]

    def described(self):
        """What must be the same in records that are joined, as they have it."""
        length = {} if self.length is None else {"length": self.length}
        return length | {
            "checkpoint": pathlib.Path(self.checkpoint).name,
            "text": "a file" if self.text else "held-out modules",
            "calibration": "a file" if self.calibration else "calibration modules",
            "windows": self.eval_windows or "all",
            "calibration_windows": self.windows,
        }


def load(path):
    """A record, or None where there is none."""
    return read_record(path, "methods") if pathlib.Path(path).exists() else None


def run_all(settings):
    """Runs what the record lacks; returns it."""
    record = load(settings.out)
    if record is not None and record["settings"] != settings.described():
        raise ValueError(f"{settings.out} has other settings; give another --out")
    model = checkpoint.load(
        settings.checkpoint,
        dtype=jnp.float32,
        param_dtype=checkpoint.stored_dtype(settings.checkpoint),
    )
    length = evaluation.window_length(settings.length, model.config)
    tokens, calibration, bytes_per_token = read_texts(settings, model.config.vocab_size)
    batches = compression.calibration_batches(calibration, length, settings.windows, BATCH)

    def quality(model):
        nats, count = evaluation.total_nats(
            model,
            tokens,
            length=length,
            stride=length // 2,
            batch=BATCH,
            limit=settings.eval_windows or None,
        )
        bits_per_byte = nats / count / math.log(2) / bytes_per_token
        return {"bits_per_byte": bits_per_byte, "perplexity": math.exp(nats / count)}

    if record is None:
        record = begin_record(settings, model, quality(model))
    done = {key_of(row) for row in record["rows"]}
    grams = dsf_jax.gram_matrices(model, batches, layers="layers/.*")
    for method, asked, values in settings.asked():
        if (method, asked, values) in done:
            continue
        began = time.perf_counter()
        if method in FEW_BITS:
            row = round_model(model, method, asked, grams, quality)
        else:
            row = run_method(model, method, asked, values, batches, grams, quality)
        row |= {"seconds": round(time.perf_counter() - began, 1)}
        record["rows"].append(row)
        write_json(settings.out, record)
        print(
            f"{method:14} {asked:4g} {values:8} {row['bits_per_byte']:.4f} bits per byte  "
            f"{row['bytes'] / 1e6:.2f} MB  {row['seconds']:.0f} s",
            flush=True,
        )
    return record


def read_texts(settings, vocab_size):
    """Tokens to evaluate and to calibrate on, and bytes of the former's text for each of them."""
    if vocab_size == 256:
        calibration = stdlib_text.read_tokens(settings.calibration, stdlib_text.CALIBRATION)
        return stdlib_text.read_tokens(settings.text), calibration, 1
    tokenizer = tokenizers.load_tokenizer(settings.checkpoint, vocab_size)
    text, calibration = (
        files.read_text(path) if path else stdlib_text.read_topics(held_out)
        for path, held_out in ((settings.text, True), (settings.calibration, False))
    )
    tokens = tokenizer.encode(text)
    return np.array(tokens), tokenizer.encode(calibration), len(text.encode()) / len(tokens)


def key_of(row):
    """What tells a row from others: its method, the density or the bits, the type of its values."""
    return row["method"], row.get("bits") or row["asked_density"], row.get("values", "stored")


def begin_record(settings, model, quality):
    """A record that has the dense model alone."""
    return {
        "command": "python -m examples.benchmarks.compare_methods",
        "settings": settings.described(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
        "dense": {
            **quality,
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))),
        },
        "rows": [],
    }


def run_method(model, method, density, values, batches, grams, quality):
    """Compresses, evaluates and packs the model; a row of the record."""
    eight_bit = None if values == "stored" else values
    new, report = dsf_jax.compress_model(
        model,
        batches[:1],
        method=method,
        density=density,
        values=eight_bit,
        calibration=dsf_jax.Calibration("one-pass", grams=grams),
    )
    return {
        "method": method,
        "asked_density": density,
        "values": values,
        "density": report.density,
        "nonzeros": report.nonzeros,
        **quality(new),
        "bytes": export.pack(new, values=eight_bit)[1].bytes_after,
        "mean_relative_error": float(np.mean([layer.error for layer in report.layers])),
        "single_matrices": sum(layer.inner is None for layer in report.layers),
    }


def round_model(model, method, bits, grams, quality):
    """Rounds the layers' weights to few bits, and evaluates the model; a row of the record."""
    graph, state = nnx.split(model)
    flat, errors = dict(nnx.to_flat_state(state)), []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for path, gram in grams.items():
        place = next(p for p in flat if "/".join(map(str, p)) == f"{path}/kernel")
        leaf = flat[place]
        weight = leaf.get_value().T.astype(jnp.float32)
        rounded = FEW_BITS[method](weight, gram, bits)
        errors.append(float(dsf_jax.relative_output_error(weight, rounded, gram)))
        size += weight.size * bits_per_weight(bits) / 8 - leaf.get_value().nbytes
        flat[place] = leaf.replace(rounded.T.astype(leaf.get_value().dtype))
    new = nnx.merge(graph, nnx.from_flat_state(flat.items()))
    return {
        "method": method,
        "bits": bits,
        **quality(new),
        "bytes": round(size),
        "mean_relative_error": float(np.mean(errors)),
    }


def loss_at(rows, nbytes, dense):
    """Bits per byte that a method loses when stored in `nbytes`; None outside of its rows.

    Between two rows the logarithm of the loss is taken to be linear in the bytes.
    """
    sizes, losses = zip(*sorted((row["bytes"], row["bits_per_byte"] - dense) for row in rows))
    if not sizes[0] <= nbytes <= sizes[-1] or min(losses) <= 0:
        return None
    return float(np.exp(np.interp(nbytes, sizes, np.log(losses))))


def add_equal_bytes(record):
    """Puts beside each row what the reference method, with stored values, loses at its bytes."""
    dense = record["dense"]["bits_per_byte"]
    reference = [row for row in record["rows"] if key_of(row)[::2] == (REFERENCE, "stored")]
    for row in record["rows"]:
        row["lost"] = row["bits_per_byte"] - dense
        row[f"{REFERENCE}_loses_at_equal_bytes"] = (
            loss_at(reference, row["bytes"], dense) if reference else None
        )
    return record


def table(record):
    """The record's rows as CSV."""
    columns = [
        "method",
        "asked_density",
        "bits",
        "values",
        "nonzeros",
        "bytes",
        "bits_per_byte",
        "perplexity",
        "lost",
        f"{REFERENCE}_loses_at_equal_bytes",
        "mean_relative_error",
    ]
    lines = []
    writer = csv.DictWriter(_Lines(lines), columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in record["rows"]:
        short = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in row.items()
        }
        writer.writerow(short)
    return "".join(lines)


class _Lines:
    """What `csv` writes to."""

    def __init__(self, lines):
        self.write = lines.append


def main(_):
    settings = cli.settings(Settings)
    records = [read_record(path, "methods") for path in settings.record] or [run_all(settings)]
    try:
        record = add_equal_bytes(merge(records, key_of, [*METHODS, *FEW_BITS, "stored", *NAMES]))
    except ValueError as error:
        raise ValueError(f"{', '.join(settings.record) or settings.out}: {error}") from None
    write_json(settings.out, record)
    lines = table(record)
    write_text(pathlib.Path(settings.out).with_suffix(".csv"), lines)
    print(lines)


if __name__ == "__main__":
    cli.run(main)
