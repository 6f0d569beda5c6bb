"""Quality against stored bytes of a language model compressed in every way.

    python -m examples.benchmarks.compare_methods --out=docs/results/compare_methods.json

For each density and method, all linear layers of the model are pruned or factorized with the same
Gram matrices and packed into MACKO matrices; the record has the bits per byte on held-out text and
the stored bytes. Pairs of factors cost more index bits than one matrix at equal non-zeros, so that
equal bytes is the fair axis: beside each row stands what DSF loses at that row's bytes. The record is
rewritten after each row, and a run goes on where an earlier one stopped. --record draws records that
are there already, of several runs together:

    python -m examples.benchmarks.compare_methods --record=a.json --record=b.json --figure=methods.png
"""

import csv
import importlib.metadata
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

import dsf_jax
from dsf_jax import export
from dsf_jax.pipeline.solve import METHODS
from examples import stdlib_text
from examples.llama import checkpoint, compression, evaluation
from examples.records import replacing, write_json, write_text

REFERENCE = "dsf"  # whose loss at equal bytes stands beside every row

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parents[1] / "llama" / "checkpoint"),
    "Directory of a byte-level model.",
)
_TEXT = flags.DEFINE_string("text", None, "File to evaluate on; default: held-out modules.")
_CALIBRATION = flags.DEFINE_string("calibration", None, "File to calibrate on; default: modules.")
_METHODS = flags.DEFINE_multi_enum("method", [*METHODS], [*METHODS], "Method; repeat for several.")
_DENSITIES = flags.DEFINE_multi_float(
    "density",
    [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    "Density; repeat for several.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_WINDOWS = flags.DEFINE_integer(
    "windows", 64, "Windows to evaluate, spread over the text; 0 for all of it.", lower_bound=0
)
_CALIBRATION_WINDOWS = flags.DEFINE_integer(
    "calibration_windows", 32, "Windows to calibrate on.", lower_bound=1
)
_RECORD = flags.DEFINE_multi_string("record", [], "Records to draw; nothing is run.")
_OUT = flags.DEFINE_string(
    "out", "runs/compare_methods.json", "The record; a table lies beside it."
)
_FIGURE = flags.DEFINE_string("figure", None, "Where to draw the record, if anywhere.")

BATCH = 8


def load(path):
    """A record, or None where there is none."""
    path = pathlib.Path(path)
    return json.loads(path.read_text()) if path.is_file() else None


def settings():
    return {
        "checkpoint": pathlib.Path(_CHECKPOINT.value).name,
        "text": "a file" if _TEXT.value else "held-out modules",
        "calibration": "a file" if _CALIBRATION.value else "calibration modules",
        "windows": _WINDOWS.value or "all",
        "calibration_windows": _CALIBRATION_WINDOWS.value,
    }


def run_all():
    """Runs what the record lacks; returns it."""
    record = load(_OUT.value)
    if record is not None and record["settings"] != settings():
        raise SystemExit(
            f"{_OUT.value} is of another run, {record['settings']}; give another --out"
        )
    model = checkpoint.load(_CHECKPOINT.value, dtype=jnp.float32, param_dtype=jnp.bfloat16)
    length = model.config.max_position_embeddings
    tokens = stdlib_text.read_tokens(_TEXT.value)
    calibration = stdlib_text.read_tokens(_CALIBRATION.value, stdlib_text.CALIBRATION)
    batches = compression.calibration_batches(
        calibration, length, _CALIBRATION_WINDOWS.value, BATCH
    )

    def bits_per_byte(model):
        return evaluation.bits_per_token(
            model,
            tokens,
            length=length,
            stride=length // 2,
            batch=BATCH,
            limit=_WINDOWS.value or None,
        )

    if record is None:
        record = {
            "command": "python -m examples.benchmarks.compare_methods",
            "settings": settings(),
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
            "dense": {
                "bits_per_byte": bits_per_byte(model),
                "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))),
            },
            "rows": [],
        }
    done = {(row["method"], row["asked_density"]) for row in record["rows"]}
    grams = dsf_jax.gram_matrices(model, batches)
    for density in _DENSITIES.value:
        for method in _METHODS.value:
            if (method, density) in done:
                continue
            began = time.perf_counter()
            new, report = dsf_jax.compress_model(
                model,
                batches[:1],
                method=method,
                density=density,
                calibration="one-pass",
                grams=grams,
            )
            row = {
                "method": method,
                "asked_density": density,
                "density": report.density,
                "nonzeros": report.nonzeros,
                "bits_per_byte": bits_per_byte(new),
                "bytes": export.pack(new)[1].bytes_after,
                "mean_relative_error": float(np.mean([layer.error for layer in report.layers])),
                "single_matrices": sum(layer.inner is None for layer in report.layers),
                "seconds": round(time.perf_counter() - began, 1),
            }
            record["rows"].append(row)
            write_json(_OUT.value, record)
            print(
                f"{method:14} {density:4g}  {row['bits_per_byte']:.4f} bits per byte  "
                f"{row['bytes'] / 1e6:.2f} MB  {row['seconds']:.0f} s",
                flush=True,
            )
    return record


def merge(records):
    """Records of the same settings as one, rows in order of method and density."""
    first = records[0]
    for record in records:
        if record["settings"] != first["settings"]:
            raise SystemExit(f"other settings: {record['settings']} and {first['settings']}")
    rows = {(row["method"], row["asked_density"]): row for r in records for row in r["rows"]}
    order = sorted(rows, key=lambda key: ([*METHODS].index(key[0]), -key[1]))
    return first | {"rows": [rows[key] for key in order]}


def loss_at(rows, nbytes, dense):
    """Bits per byte that a method loses when stored in `nbytes`; None outside of its rows.

    Between two rows the logarithm of the loss is taken to be linear in the bytes.
    """
    sizes, losses = zip(*sorted((row["bytes"], row["bits_per_byte"] - dense) for row in rows))
    if not sizes[0] <= nbytes <= sizes[-1] or min(losses) <= 0:
        return None
    return float(np.exp(np.interp(nbytes, sizes, np.log(losses))))


def add_equal_bytes(record):
    """Puts beside each row what the reference method loses at the same number of bytes."""
    dense = record["dense"]["bits_per_byte"]
    reference = [row for row in record["rows"] if row["method"] == REFERENCE]
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
        "nonzeros",
        "bytes",
        "bits_per_byte",
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


def draw(record, path):
    """Bits per byte lost against stored megabytes, a line per method."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit("matplotlib is missing: pip install 'macko-dsf-jax[plots]'") from error
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    dense = record["dense"]
    for method in dict.fromkeys(row["method"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["method"] == method and row["lost"] > 0]
        axes.plot(
            [row["bytes"] / 1e6 for row in rows],
            [row["lost"] for row in rows],
            marker="o",
            markersize=4,
            label=method,
            linewidth=2.2 if method == REFERENCE else 1.2,
        )
    axes.axvline(dense["bytes"] / 1e6, color="grey", linewidth=1)
    axes.set(
        xlabel="stored megabytes of the whole model (dense: the grey line)",
        yscale="log",
        ylabel=f"bits per byte lost (dense: {dense['bits_per_byte']:.3f})",
        title="Byte-level language model, 8 million parameters, packed",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=pathlib.Path(path).suffix[1:])
    print(f"written: {path}")


def main(_):
    missing = [path for path in _RECORD.value if not pathlib.Path(path).is_file()]
    if missing:
        raise SystemExit(f"no record at {', '.join(missing)}")
    records = [load(path) for path in _RECORD.value] or [run_all()]
    record = add_equal_bytes(merge(records))
    write_json(_OUT.value, record)
    lines = table(record)
    write_text(pathlib.Path(_OUT.value).with_suffix(".csv"), lines)
    print(lines)
    if _FIGURE.value:
        draw(record, _FIGURE.value)


if __name__ == "__main__":
    app.run(main)
