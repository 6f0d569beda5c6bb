"""What became of each layer of a compressed model: progress lines, a table, JSON."""

import dataclasses
import json
import math


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
      path: Module path.
      kind: "linear", "conv" or "embedding".
      shape: (out, in) of its matrix; (groups, out, in) for grouped convolutions and experts.
      method: The method that was used.
      density: Density asked for.
      inner: Inner dimension k of a factor pair; None for one matrix.
      nonzeros: Non-zeros kept, of both factors together.
      error: Relative output error on the calibration inputs that the layer saw.
      seconds: Time to solve it, compilation included; of the first run if it was resumed.
      resumed: Whether the result was read back from the work directory.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    method: str
    density: float
    inner: int | None
    nonzeros: int
    error: float
    seconds: float
    resumed: bool = False


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


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a model; `print(report)` shows a table.

    Attributes:
      layers: One entry per compressed layer, in order of the data flow.
      skipped: For each other layer or parameter matrix, why it stayed as it is.
      groups: How many times the pass was halted to solve layers.
      seconds: Wall time of the whole run.
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    groups: int
    seconds: float

    @property
    def nonzeros(self) -> int:
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def density(self) -> float:
        """Non-zeros kept over the dense size of the compressed layers."""
        return self.nonzeros / sum(math.prod(layer.shape) for layer in self.layers)

    def to_dict(self) -> dict:
        """The report as dicts and lists, ready for JSON."""
        return dataclasses.asdict(self) | {"nonzeros": self.nonzeros, "density": self.density}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self):
        header = ("layer", "matrix", "method", "density", "inner", "non-zeros", "error", "time")
        rows = [
            (
                layer.path,
                format_shape(layer.shape),
                layer.method,
                f"{layer.nonzeros / math.prod(layer.shape):.4f}",
                str(layer.inner or "-"),
                str(layer.nonzeros),
                f"{layer.error:.2e}",
                format_seconds(layer.seconds),
            )
            for layer in self.layers
        ]
        rows.append(
            (
                f"{len(self.layers)} layers",
                "",
                "",
                f"{self.density:.4f}",
                "",
                str(self.nonzeros),
                "",
                format_seconds(self.seconds),
            )
        )
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 2) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in (header, *rows)
        ]
        rule = "-" * max(map(len, lines))
        kept = [f"left as it is: {path} ({why})" for path, why in self.skipped.items()]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *kept])


def format_shape(shape) -> str:
    return " x ".join(map(str, shape))


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
