"""What became of each matrix of a compressed model: progress lines, a table, JSON, CSV."""

import dataclasses

from macko_jax.nn import report as base
from macko_jax.nn.report import format_bytes, format_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport(base.LayerReport):
    """What became of one layer; the other attributes are those of all reports.

    Attributes:
      kind: "linear", "conv" or "embedding".
      shape: (out, in) of its matrix; (groups, out, in) for grouped convolutions and experts.
      bytes_after: Bytes of the arrays as they are now, dense with zeros; `pack` makes them small.
      method: The method that was used.
      inner: Inner dimension k of a factor pair; None for one matrix.
      error: Relative output error on the calibration inputs that the layer saw.
      seconds: Time to solve it, compilation included; of the first run if it was resumed.
      compile_seconds: What compilation took of it.
      resumed: Whether the result was read back from the work directory.
    """

    method: str
    inner: int | None
    error: float
    seconds: float
    compile_seconds: float = 0.0
    resumed: bool = False

    def cells(self):
        common = super().cells()
        return {
            "path": common["path"],
            "matrix": common["matrix"],
            "method": self.method,
            "density": f"{self.density:.4f}",
            "inner": str(self.inner or "-"),
            "non-zeros": str(self.nonzeros),
            "error": f"{self.error:.2e}",
            "time": format_seconds(self.seconds),
            "note": self.note,
        }


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands after a layer: `index` of `total`, counted from 1.

    `seconds_left` is an estimate from the layers solved so far; None before there is one.
    """

    index: int
    total: int
    layer: LayerReport
    seconds_left: float | None

    def __str__(self):
        layer = self.layer
        left = "" if self.seconds_left is None else f", {format_seconds(self.seconds_left)} left"
        pair = "" if layer.inner is None else f" via {layer.inner}"
        return (
            f"[{self.index}/{self.total}] {layer.path} {format_shape(layer.shape)}{pair}: "
            f"{layer.nonzeros} non-zeros, relative error {layer.error:.2e}, "
            + ("resumed" if layer.resumed else format_seconds(layer.seconds))
            + left
        )


def print_progress(progress: Progress):
    """A callback for `compress_model` that prints one line per layer."""
    print(progress, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(base.Report):
    """What became of a model; `print(report)` shows a table.

    Attributes:
      layers: One entry per compressed layer, in order of the data flow.
      other_bytes: Bytes of what is no matrix: biases, norms, statistics.
      others: One entry for each other layer or parameter matrix, which stays as it is; its `note`
        says why.
      stages: How many times the pass was halted to solve layers.
      seconds: Wall time of the whole run.
    """

    layers: tuple[LayerReport, ...]
    stages: int
    seconds: float

    def rows(self):
        shown = ("path", "matrix", "density", "note")
        others = [entry.cells() for entry in self.others]
        return [
            *(layer.cells() for layer in self.layers),
            *({name: cells[name] for name in shown} for cells in others),
        ]

    def totals(self):
        return [
            {
                "path": f"{len(self.layers)} layers",
                "density": f"{self.density:.4f}",
                "non-zeros": str(self.nonzeros),
                "time": format_seconds(self.seconds),
            },
            {"path": "total", "density": f"{self.model_density:.4f}", "note": self.summary()},
        ]

    def summary(self):
        before, after = map(format_bytes, (self.bytes_before, self.bytes_after))
        return f"{before} before, {after} now with zeros stored: {super().summary()}"


def format_seconds(seconds: float) -> str:
    """A duration as a person reads it: "0.42 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
