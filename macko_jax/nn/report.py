"""Reports of what became of each layer of a model, as a table, JSON or CSV.

`Report` and `LayerReport` are what all reports have in common. `PackingReport` is the one of
packing; `dsf_jax.Report`, of pruning and factorization, derives from the same base.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

NUMBERS = frozenset(["density", "before", "after", "inner", "non-zeros", "error", "time"])


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        path: where the layer is in the model.
        kind: what the layer is, such as the name of its class.
        shape: [out, in] of its matrix, with leading axes for a stack or for groups.
        nonzeros: non-zeros that were kept; of two factors, those of both.
        bytes_before: bytes of the kernel in the dense model that the user had.
        bytes_after: bytes of what stands in its place.
        note: what else there is to say, such as why the layer stays as it is.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    nonzeros: int
    bytes_before: int
    bytes_after: int
    note: str = ""

    @property
    def density(self) -> float:
        """Non-zeros that were kept over the size of the dense matrix."""
        return self.nonzeros / max(math.prod(self.shape), 1)

    def to_dict(self) -> dict:
        """The attributes and the density, by name."""
        return dataclasses.asdict(self) | {"density": self.density}

    @classmethod
    def from_dict(cls, record: Mapping) -> Self:
        """What `to_dict` was made of, also after it has been through JSON.

        Raises:
            KeyError: if an attribute is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        known: dict[str, Any] = {name: record[name] for name in names}
        known["shape"] = tuple(known["shape"])
        return cls(**known)

    def cells(self) -> dict[str, str]:
        """The layer's row of the table, by the names of the columns."""
        return {
            "path": self.path or "(the model)",
            "kind": self.kind,
            "matrix": format_shape(self.shape),
            "density": f"{self.density:.3f}",
            "before": format_bytes(self.bytes_before),
            "after": format_bytes(self.bytes_after),
            "note": self.note,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each layer of a model; `print(report)` shows it as a table.

    Attributes:
        layers: one entry for each layer, in the order of the model.
        other_bytes: bytes of everything else in the model.
    """

    layers: tuple[LayerReport, ...]
    other_bytes: int = 0

    @property
    def nonzeros(self) -> int:
        """Non-zeros kept in all layers."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def density(self) -> float:
        """Non-zeros kept over the dense size of all layers."""
        return self.nonzeros / max(sum(math.prod(layer.shape) for layer in self.layers), 1)

    @property
    def bytes_before(self) -> int:
        """Bytes of the whole dense model that the user had."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the whole model now."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict:
        """The report as nested dicts and lists, ready for JSON."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {
            "layers": [layer.to_dict() for layer in self.layers],
            "nonzeros": self.nonzeros,
            "density": self.density,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self) -> str:
        """The layers as CSV, a line for each below a line of names; shapes as "rows x cols"."""
        rows = [layer.to_dict() | {"shape": format_shape(layer.shape)} for layer in self.layers]
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return text.getvalue()

    def totals(self) -> list[dict[str, str]]:
        """The rows below the layers, by the names of the columns."""
        other = format_bytes(self.other_bytes)
        return [
            {"path": "everything else", "before": other, "after": other},
            {
                "path": "total",
                "before": format_bytes(self.bytes_before),
                "after": format_bytes(self.bytes_after),
                "note": self.summary(),
            },
        ]

    def summary(self) -> str:
        """The totals in a few words."""
        share = self.bytes_after / max(self.bytes_before, 1)
        return f"{len(self.layers)} layers, {share:.0%} of the bytes"

    def __str__(self) -> str:
        return format_table([layer.cells() for layer in self.layers], self.totals())


@dataclasses.dataclass(frozen=True)
class PackedLayerReport(LayerReport):
    """What became of one layer that could be packed.

    Attributes:
        encoding: how the positions of the packed kernel are stored; None if the layer stays dense,
            and `note` says why.
    """

    encoding: str | None = None


@dataclasses.dataclass(frozen=True)
class PackingReport(Report):
    """Which layers of a model were packed, and why the others were not."""

    layers: tuple[PackedLayerReport, ...]

    @property
    def packed(self) -> tuple[PackedLayerReport, ...]:
        """The layers that were packed."""
        return tuple(layer for layer in self.layers if layer.encoding is not None)

    @property
    def skipped(self) -> dict[str, str]:
        """By the path of each layer that stays dense, the reason."""
        return {layer.path: layer.note for layer in self.layers if layer.encoding is None}

    def summary(self) -> str:
        """The totals in a few words."""
        share = self.bytes_after / max(self.bytes_before, 1)
        return f"{len(self.packed)} of {len(self.layers)} layers packed, {share:.0%} of the bytes"


def format_table(rows: Sequence[Mapping[str, str]], totals: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells as a table with the totals below a line; the last column may be ragged.

    Args:
        rows: cells by the names of the columns, which are in the order of their first mention.
        totals: the same; cells may be missing.
    """
    names = list(dict.fromkeys(name for row in (*rows, *totals) for name in row))
    header = {name: "" if name == "note" else name for name in names}
    cells = [[row.get(name, "") for name in names] for row in (header, *rows, *totals)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    if "note" in names:
        widths[names.index("note")] = 0
    lines = [
        "  ".join(
            cell.rjust(width) if name in NUMBERS else cell.ljust(width)
            for name, cell, width in zip(names, row, widths)
        ).rstrip()
        for row in cells
    ]
    rule = "-" * max(map(len, lines))
    body = 1 + len(rows)
    return "\n".join([lines[0], rule, *lines[1:body], rule, *lines[body:]])


def format_shape(shape: Sequence[int]) -> str:
    """A shape as in "512 x 2048": rows x cols, after the axes of a stack or of groups."""
    return " x ".join(map(str, shape))


def format_bytes(count: int) -> str:
    """A number of bytes in decimal units, as in "4.19 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
