"""Draws speed-up over dense against density, a line per shape, from records of benchmark_spmv.

    python -m examples.benchmarks.plot_results --record=docs/results/spmv_h200.json --out=docs/spmv_h200.png

Several records, of one device, are given one after the other, between commas.
"""

import collections
import json
import pathlib

from absl import app, flags

from examples.records import replacing

RECORDS = flags.DEFINE_list(
    "record", ["runs/spmv.json"], "Written by examples.benchmarks.benchmark_spmv."
)
OUT = flags.DEFINE_string("out", "runs/spmv.png", "The figure.")
IMPLEMENTATION = flags.DEFINE_string("implementation", "macko", "Whose speed-up to draw.")


def main(_):
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit("matplotlib is missing: pip install 'macko-dsf-jax[plots]'") from error
    records = [json.loads(pathlib.Path(path).read_text()) for path in RECORDS.value]
    devices = {record["device"] for record in records}
    if len(devices) > 1:
        raise SystemExit(f"records of several devices, {sorted(devices)}; draw each on its own")
    lines = collections.defaultdict(list)
    for r in (r for record in records for r in record["records"]):
        if r["implementation"] == IMPLEMENTATION.value and r["batch"] == 1 and "speedup" in r:
            lines[r["rows"], r["cols"], r["dtype"]].append((r["density"], r["speedup"]))
    if not lines:
        raise SystemExit(
            f"{', '.join(RECORDS.value)}: no speed-up of {IMPLEMENTATION.value!r} "
            "at batch 1; run benchmark_spmv with --implementations=macko,dense"
        )
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for (rows, cols, dtype), points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points)), marker="o", label=f"{rows} x {cols}, {dtype}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(
        xlabel="density",
        ylabel="speed-up over the faster dense product",
        ylim=(0, None),
        title=f"MACKO SpMV, {records[0]['device']}, jax {records[0]['versions']['jax']}",
    )
    axes.legend(fontsize="small")
    with replacing(OUT.value) as temporary:
        figure.savefig(temporary, dpi=150, format=pathlib.Path(OUT.value).suffix[1:])
    print(f"written: {OUT.value}")


if __name__ == "__main__":
    app.run(main)
