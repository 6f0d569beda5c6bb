"""Draws the figures of the documentation from records.

    python -m examples.benchmarks.plot_results --kind=spmv --record=runs/spmv.json --out=spmv.png

Kinds, and who writes their records:

- spmv: speed-up over dense against density, a line per shape; examples.benchmarks.benchmark_spmv.
- decode: tokens a second and memory by density; examples.benchmarks.benchmark_decode.
- methods: quality lost against stored bytes, a line per method;
  examples.benchmarks.compare_methods.
- errors: relative output error by layer; report.json of examples.compress_llm, or what
  `to_dict` of a report of `dsf_jax.compress_model` gives, as JSON.
- refine: loss by step, and the error of blocks before and after; report.json of
  examples.refine_llm or compress_llm, what `to_dict` of a report of `dsf_jax.refine` gives, or a
  record of examples.benchmarks.compare_refinement.

Several records of one kind are joined: measurements of one device, or layers of one model.
"""

import collections
import dataclasses
import json
import pathlib
import re

from absl import flags

from examples import cli
from examples.benchmarks.record_fields import read_record
from macko_jax.io.atomic import replacing

GREY = "0.45"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is drawn; the flags of the same names say what each is."""

    kind: str
    record: tuple[str, ...]
    implementation: str
    out: str


def only(records, field):
    """The one value that a field has in all records."""
    values = {json.dumps(record[field]) for record in records}
    if len(values) > 1:
        raise ValueError(
            f"records of several {field}s, {', '.join(sorted(values))}; draw each on its own"
        )
    return json.loads(values.pop())


def annotate(axes, text, place, offset=(0, 5), **options):
    """Writes a label `offset` points from a place of the axes."""
    options = {"fontsize": "x-small", "ha": "center", "va": "bottom"} | options
    axes.annotate(text, place, xytext=offset, textcoords="offset points", **options)


def draw_spmv(records, implementation, pyplot):
    """Speed-up over dense against density, a line per shape."""
    lines = collections.defaultdict(dict)
    dtypes = set()
    for r in (r for record in records for r in record["records"]):
        if r["implementation"] == implementation and r["batch"] == 1 and "speedup" in r:
            lines[r["rows"], r["cols"], r["dtype"]][r["density"]] = r["speedup"]
            dtypes.add(r["dtype"])
    if not lines:
        raise ValueError(
            f"the records have no speed-up of {implementation!r} for one vector; run "
            "benchmark_spmv with --implementation=macko --implementation=dense"
        )
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    # The lines in the order in which they begin, so that the legend reads as the figure does.
    for (rows, cols, dtype), points in sorted(
        lines.items(), key=lambda line: -line[1][min(line[1])]
    ):
        label = f"{rows} x {cols}" + (f", {dtype}" if len(dtypes) > 1 else "")
        points = sorted(points.items())
        axes.plot(*zip(*points), marker="o", markersize=4, linewidth=1.4, label=label)
    densities = sorted({density for points in lines.values() for density in points})
    for density in densities:
        found = [points[density] for points in lines.values() if density in points]
        least, most = (f"{value:.2f}" for value in (min(found), max(found)))
        text = least if least == most else f"{least} to {most}"
        annotate(axes, text, (density, max(found)), (5, 3), ha="left")
    axes.axhline(1, color="black", linewidth=1)
    axes.plot(1, 1, marker="s", color="black", clip_on=False)
    annotate(axes, "dense", (1, 1), (2, 5), ha="right")
    axes.set(
        xlabel="density (share of weights that are stored)",
        ylabel="speed-up over the faster dense product",
        xlim=(0, 1.02),
        ylim=(0, None),
        xticks=[0, *densities, 1],
        title=f"MACKO SpMV, {', '.join(sorted(dtypes))}, {only(records, 'device')}",
    )
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", title="rows x cols", frameon=False)
    return figure


def draw_decode(records, pyplot):
    """Tokens a second and memory, a bar per density."""
    results = sorted(
        (result for record in records for result in record["results"]), key=lambda r: r["density"]
    )
    device, dtype = only(records, "device"), only(records, "dtype")
    name = (only(records, "config") or {"name": "checkpoints"})["name"]
    names = ["dense" if r["density"] == 1 else f"{r['density']:g}" for r in results]
    dense = next((r for r in results if r["density"] == 1), None)
    colors = [GREY if r is dense else "C0" for r in results]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    values = [r["tokens_per_second"] for r in results]
    speed.bar(names, values, width=0.6, color=colors)
    for i, value in enumerate(values):
        times = f"\n{value / dense['tokens_per_second']:.2f} x" if dense else ""
        annotate(speed, f"{value:.0f}{times}", (i, value), (0, 2), fontsize="small")
    weights = [r["weight_bytes"] / 1e9 for r in results]
    peaks = [(r["peak_bytes"] or r["weight_bytes"]) / 1e9 for r in results]
    memory.bar(names, weights, width=0.6, color=colors)
    rest = [peak - held for peak, held in zip(peaks, weights)]
    memory.bar(
        names, rest, width=0.6, bottom=weights, color="0.8", label="KV cache and temporaries"
    )
    for i, (held, peak) in enumerate(zip(weights, peaks)):
        annotate(memory, f"{peak:.1f}", (i, peak), (0, 2), fontsize="small")
        annotate(memory, f"{held:.1f}", (i, held / 2), (0, 0), color="white", fontsize="small")
    memory.legend(fontsize="small", frameon=False, loc="upper left")
    for axes, label, top in ((speed, "tokens a second", values), (memory, "GB at the peak", peaks)):
        axes.set(xlabel="density", ylabel=label, ylim=(0, 1.2 * max(top)))
        axes.spines[["top", "right"]].set_visible(False)
    prompt, batch = only(records, "prompt"), only(records, "batch")
    figure.suptitle(
        f"Decoding with the shape of {name}, {dtype}, {device}; batch {batch}, "
        f"prompt of {prompt} tokens",
        fontsize="medium",
    )
    return figure


def draw_methods(records, pyplot):
    """Bits per byte lost against stored megabytes, a line per method and type of values."""
    dense = only(records, "dense")
    rows = [row for record in records for row in record["rows"]]
    figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    lines = collections.defaultdict(list)
    for row in rows:
        lines[row["method"], row.get("values", "stored")].append(row)
    for i, ((method, values), of_line) in enumerate(lines.items()):
        found = [
            (row["bytes"] / 1e6, row["bits_per_byte"] - dense["bits_per_byte"], row)
            for row in of_line
        ]
        sizes, lost, kept = zip(
            *sorted((point for point in found if point[1] > 0), key=lambda p: p[0])
        )
        label = method if values == "stored" else f"{method}, {values}"
        (line,) = axes.plot(sizes, lost, marker="o", markersize=4, label=label)
        # Neighbouring lines have their labels on opposite sides.
        sides = [((3, 2), "left", "bottom"), ((-3, -2), "right", "top")]
        for x, y, row in zip(sizes, lost, kept):
            left = i % 2 and x < dense["bytes"] / 1e6
            offset, align, height = sides[1 if left else 0]
            asked = f"{row['bits']} bits" if "bits" in row else f"{row['asked_density']:g}"
            color = line.get_color()
            annotate(axes, asked, (x, y), offset, ha=align, va=height, fontsize=6.5, color=color)
    axes.axvline(dense["bytes"] / 1e6, color=GREY, linewidth=1)
    axes.set(
        xlabel="stored megabytes of the whole model",
        yscale="log",
        ylabel=f"bits per byte lost, of {dense['bits_per_byte']:.3f}",
        title=f"{only(records, 'settings')['checkpoint']}; numbers: density, or bits of a weight",
    )
    annotate(
        axes,
        f"dense, {dense['bytes'] / 1e6:.1f} MB",
        (dense["bytes"] / 1e6, axes.get_ylim()[1]),
        (-4, -4),
        ha="right",
        va="top",
        color=GREY,
        fontsize="small",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False, loc="lower left")
    return figure


def draw_errors(records, pyplot):
    """Relative output error of each layer: against the number of its block, a line per kind."""
    kinds = collections.defaultdict(list)
    for i, layer in enumerate(layer for record in records for layer in record["layers"]):
        numbered = re.fullmatch(r"(?:.*/)?(\d+)/(.*)", layer["path"])
        block, kind = (int(numbered[1]), numbered[2]) if numbered else (i, layer["path"])
        kinds[kind].append((block, layer["error"]))
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, points in kinds.items():
        axes.plot(*zip(*sorted(points)), marker="o", markersize=4, linewidth=1.4, label=kind)
    blocks = sorted({block for points in kinds.values() for block, _ in points})
    methods = sorted({layer["method"] for record in records for layer in record["layers"]})
    density = ", ".join(f"{record['density']:.2g}" for record in records)
    axes.set(
        xlabel="block",
        yscale="log",
        ylabel="relative output error",
        xticks=blocks if len(blocks) <= 16 else blocks[:: len(blocks) // 8],
        title=f"{', '.join(methods)} at density {density}",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    return figure


def draw_refine(records, pyplot):
    """Loss by step; and where blocks were refined, the error of each before and after."""
    runs = [run for record in records for run in _refinements(record)]
    blocks = [run for run in runs if run["blocks"]]
    wholes = [run for run in runs if not run["blocks"]]
    count = bool(blocks) + bool(wholes)
    figure, panels = pyplot.subplots(
        1, count, figsize=(6 * count, 4.2), layout="constrained", squeeze=False
    )
    panels = list(panels[0])
    names = dict.fromkeys(run["name"] for run in runs)
    color_of = {name: f"C{i % 10}" for i, name in enumerate(names)}  # the same in both panels
    if wholes:
        axes = panels.pop(0)
        for run in wholes:
            steps = [run["every"] * (i + 1) for i in range(len(run["losses"]))]
            style = {"label": run["name"], "color": color_of[run["name"]]}
            axes.plot(steps, run["losses"], linewidth=1, **style)
            if run["held_out"]:
                style = {"marker": "o", "markersize": 4, "linestyle": "--"}
                axes.plot(*zip(*run["held_out"]), color=color_of[run["name"]], **style)
        label = "loss; dashed: held out" if any(run["held_out"] for run in wholes) else "loss"
        axes.set(xlabel="step", ylabel=label, yscale="log")
        axes.legend(fontsize="small", frameon=False)
    if blocks:
        axes = panels.pop(0)
        for run in blocks:
            before, after = (
                [block[name] for block in run["blocks"]] for name in ("before", "after")
            )
            color = color_of[run["name"]]
            axes.plot(range(len(after)), after, marker=".", label=run["name"], color=color)
            axes.plot(range(len(before)), before, color=color, linestyle="--")
        axes.set(
            xlabel="block", ylabel="relative error of its output; dashed: before", yscale="log"
        )
        axes.legend(fontsize="small", frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _refinements(record):
    """The refinements of a record, each with a name, losses or blocks, and what is held out."""
    common = {"every": 1, "losses": [], "held_out": [], "blocks": []}
    if "rows" in record:
        for row in record["rows"]:
            if row["stage"] != "layers":
                name = f"{row['method']} {row['density']:g}"
                every = row.get("steps_of_a_loss") or 1
                found = {key: row[key] for key in ("losses", "blocks") if row.get(key)}
                yield common | {"name": name, "every": every} | found
        return
    settings = record.get("settings") or {}
    name = pathlib.Path(settings.get("checkpoint") or "model").name
    if "refined" in record:
        blocks = [record["refined"][key] for key in sorted(record["refined"], key=int)]
        yield common | {"name": name, "blocks": blocks}
    else:
        found = {key: record[key] for key in ("losses", "held_out", "blocks") if record.get(key)}
        yield common | {"name": name} | found


KINDS = {
    "decode": draw_decode,
    "methods": draw_methods,
    "errors": draw_errors,
    "refine": draw_refine,
    "spmv": draw_spmv,
}
flags.DEFINE_enum("kind", "spmv", list(KINDS), "Which figure to draw.")
flags.DEFINE_multi_string("record", ["runs/spmv.json"], "Record to draw; repeatable.")
flags.DEFINE_string("implementation", "macko", "Whose speed-up --kind=spmv draws.")
flags.DEFINE_string("out", "runs/figure.png", "File of the figure; its ending says the format.")


def main(_):
    settings = cli.settings(Settings)
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("matplotlib is missing: pip install 'macko-dsf-jax[plots]'") from error
    matplotlib.use("agg")
    records = [read_record(path, settings.kind) for path in settings.record]
    options = [settings.implementation] if settings.kind == "spmv" else []
    try:
        figure = KINDS[settings.kind](records, *options, pyplot)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{', '.join(settings.record)}: nothing to draw: {error}") from error
    with replacing(settings.out) as temporary:
        figure.savefig(temporary, dpi=150, format=pathlib.Path(settings.out).suffix[1:] or "png")
    print(f"written: {settings.out}")


if __name__ == "__main__":
    cli.run(main)
