"""Reports of what became of each parameter matrix of a model, as a table, JSON or CSV.

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
from typing import Any, Self, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

NUMBERS = frozenset(["density", "before", "after", "inner", "non-zeros", "error", "time"])

VECTORS = frozenset(["bias", "scale"])  # what Flax calls them, whatever their axes


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer, or of a parameter that is no layer's kernel.

    Attributes:
        path: where the layer is in the model.
        kind: what the layer is, such as the name of its class.
        shape: [out, in] of its matrix, with leading axes for a stack or for groups; of a parameter
            that is no layer's kernel its own shape.
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
            ValueError: if one is not of its type, or no number that a report has.
        """
        types = get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        known: dict[str, Any] = {name: record[name] for name in names}
        for name in names:
            if not _is_of(types[name], known[name]):
                raise ValueError(f"{name} of a layer cannot be {str(known[name])[:60]!r}")
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
    """What became of each parameter matrix of a model; `print(report)` shows it as a table.

    Attributes:
        layers: one entry for each layer, in the order of the model.
        other_bytes: bytes of what is no matrix: biases, norms, statistics.
        others: one entry for each other parameter with two axes or more, which stays as it is; its
            `note` says why.
    """

    layers: tuple[LayerReport, ...]
    other_bytes: int = 0
    others: tuple[LayerReport, ...] = ()

    @property
    def matrices(self) -> tuple[LayerReport, ...]:
        """Every parameter matrix: the layers and the others."""
        return (*self.layers, *self.others)

    @property
    def dense(self) -> tuple[LayerReport, ...]:
        """The matrices that stay as they are."""
        return self.others

    @property
    def skipped(self) -> dict[str, str]:
        """By the path of each matrix that stays as it is, the reason."""
        return {entry.path: entry.note for entry in self.dense}

    @property
    def nonzeros(self) -> int:
        """Non-zeros kept in all layers."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def density(self) -> float:
        """Non-zeros kept over the dense size of all layers."""
        return self.nonzeros / max(_entries(self.layers), 1)

    @property
    def model_density(self) -> float:
        """Non-zeros over the dense size of all matrices, also of those that stay as they are."""
        nonzeros = sum(entry.nonzeros for entry in self.matrices)
        return nonzeros / max(_entries(self.matrices), 1)

    @property
    def dense_share(self) -> float:
        """The share of the matrices' entries that is in those which stay as they are."""
        return _entries(self.dense) / max(_entries(self.matrices), 1)

    @property
    def bytes_before(self) -> int:
        """Bytes of the whole dense model that the user had."""
        return self.other_bytes + sum(entry.bytes_before for entry in self.matrices)

    @property
    def bytes_after(self) -> int:
        """Bytes of the whole model now."""
        return self.other_bytes + sum(entry.bytes_after for entry in self.matrices)

    @property
    def ratio(self) -> float:
        """Bytes now over those of the dense model."""
        return self.bytes_after / max(self.bytes_before, 1)

    def to_dict(self) -> dict:
        """The report as nested dicts and lists, ready for JSON."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        totals = ("nonzeros", "density", "model_density", "dense_share", "skipped")
        totals += ("bytes_before", "bytes_after", "ratio")
        return own | {
            "layers": [layer.to_dict() for layer in self.layers],
            "others": [entry.to_dict() for entry in self.others],
            **{name: getattr(self, name) for name in totals},
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self) -> str:
        """The matrices as CSV, a line for each below a line of names; shapes as "rows x cols".

        The last line has the bytes of everything else, so that non-zeros and bytes add up to the
        totals.
        """
        rows = [entry.to_dict() | {"shape": format_shape(entry.shape)} for entry in self.matrices]
        rest = {"path": "everything else", "nonzeros": 0}
        rest |= dict.fromkeys(("bytes_before", "bytes_after"), self.other_bytes)
        text = io.StringIO()
        names = dict.fromkeys(name for row in (*rows, rest) for name in row)
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, rest])
        return text.getvalue()

    def rows(self) -> list[dict[str, str]]:
        """The rows of the table, one for each matrix, by the names of the columns."""
        return [entry.cells() for entry in self.matrices]

    def totals(self) -> list[dict[str, str]]:
        """The rows below the matrices, by the names of the columns."""
        other = format_bytes(self.other_bytes)
        return [
            {"path": "everything else", "before": other, "after": other},
            {
                "path": "total",
                "density": f"{self.model_density:.3f}",
                "before": format_bytes(self.bytes_before),
                "after": format_bytes(self.bytes_after),
                "note": self.summary(),
            },
        ]

    def summary(self) -> str:
        """The totals in a few words."""
        return (
            f"{self.ratio:.0%} of the bytes of the dense model, {self.dense_share:.0%} of the "
            "parameters stay dense"
        )

    def __str__(self) -> str:
        return format_table(self.rows(), self.totals())


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value from JSON may be that of an attribute of this type."""
    if kind == tuple[int, ...]:
        return isinstance(value, list | tuple) and all(_is_of(int, size) for size in value)
    if kind is float:
        return type(value) in (int, float) and 0 <= value < 1e30  # no NaN, and sums are finite
    return type(value) in (get_args(kind) or (kind,)) and not (type(value) is int and value < 0)


def _entries(matrices: Sequence[LayerReport]) -> int:
    """The dense size of some matrices."""
    return sum(math.prod(entry.shape) for entry in matrices)


def report_as_it_is(
    path: str, kind: str, array: jax.Array | np.ndarray, reason: str
) -> LayerReport:
    """What to report of a parameter that stays as it is."""
    nonzeros = int(jnp.count_nonzero(array))
    return LayerReport(path, kind, array.shape, nonzeros, array.nbytes, array.nbytes, reason)


def why_no_kernel(name: object, kinds: str) -> str:
    """Why a parameter of that name is not packed: it is no kernel of a layer of these kinds."""
    return "an embedding" if name == "embedding" else f"no kernel of {kinds}"


def is_matrix(name: object, array: Any) -> bool:
    """Whether a parameter of that name is one of real or complex numbers with two axes or more.

    What Flax calls a bias or a scale is none: it has the axes of a layer's output, or of a stack.
    """
    shape, dtype = getattr(array, "shape", ()), getattr(array, "dtype", jnp.dtype(bool))
    return len(shape) > 1 and name not in VECTORS and jnp.issubdtype(dtype, jnp.inexact)


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
    def dense(self) -> tuple[LayerReport, ...]:
        """The layers that were not packed, and the other matrices."""
        return (*(layer for layer in self.layers if layer.encoding is None), *self.others)

    @property
    def packed(self) -> tuple[PackedLayerReport, ...]:
        """The layers that were packed."""
        return tuple(layer for layer in self.layers if layer.encoding is not None)

    def summary(self) -> str:
        """The totals in a few words."""
        return f"{len(self.packed)} of {len(self.layers)} layers packed, {super().summary()}"


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
    rule = "-" * min(max(map(len, lines)), 100)  # a note may be longer
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
