"""Which layers of a model are packed, and the report of what was done."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from macko_jax.format import quantization

# From this density on the packed product reads as many bytes as the dense one, or more work is
# spent on them than is saved, so the dense layer is the faster one.
BREAK_EVEN_DENSITY = 0.8

VALUE_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the layers whose path matches a regular expression.

    Args:
        path: regular expression that has to match the whole path of a layer, whose parts are joined
            by "/", as in `layers/0/attention/query`; the path of the model itself is "".
        skip: leave the layers dense.
        max_density: leave a layer dense whose share of non-zeros is this or more; 1.0 packs all.
        dtype: dtype in which the values are stored: float16, bfloat16 or float32, or int8 or
            float8_e4m3fn with a scale for every row; None keeps the kernel's. Values that the dtype
            rounds to zero are dropped.
        encoding: how positions are stored, as in `macko_jax.compress`; None chooses.
        lanes: how many GPU lanes share a row, as in `macko_jax.compress`; None chooses.

    Raises:
        ValueError: for an invalid regular expression, density or dtype.
    """

    path: str = ".*"
    skip: bool = False
    max_density: float = BREAK_EVEN_DENSITY
    dtype: str | None = None
    encoding: str | None = None
    lanes: int | None = None

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"Rule path {self.path!r} is not a valid regular expression: {error}"
            ) from error
        if not 0.0 <= self.max_density <= 1.0:
            raise ValueError(
                f"Rule {self.path!r} has max_density={self.max_density}; it is a share of "
                "non-zeros and lies between 0 and 1"
            )
        if self.dtype is not None:
            name = jnp.dtype(self.dtype).name
            if name not in VALUE_DTYPES + quantization.NAMES:
                raise ValueError(
                    f"Rule {self.path!r} has dtype={name}; values are stored as "
                    f"{', '.join(VALUE_DTYPES + quantization.NAMES)}, or None to keep the kernel's dtype"
                )
            object.__setattr__(self, "dtype", name)


Rules = str | Rule | Sequence[str | Rule] | None


def assign_rules(rules: Rules, paths: Iterable[str]) -> dict[str, Rule | None]:
    """Give each path the first rule that matches it.

    Args:
        rules: one rule or several, a string standing for `Rule(path)`; None for `Rule(".*")`.
        paths: the paths of all layers that rules can name.

    Returns:
        The rule of each path; None where no rule matches.

    Raises:
        TypeError: if a rule is neither a string nor a `Rule`.
        ValueError: if a rule matches no path at all.
    """
    paths = list(paths)
    if rules is None:
        return {path: Rule() for path in paths}
    if isinstance(rules, str | Rule):
        rules = [rules]
    for rule in rules:
        if not isinstance(rule, str | Rule):
            raise TypeError(f"A rule is a macko_jax.Rule or a regular expression, not {rule!r}")
    rules = [Rule(rule) if isinstance(rule, str) else rule for rule in rules]
    for rule in rules:
        if not any(re.fullmatch(rule.path, path) for path in paths):
            known = "\n  ".join(repr(path) for path in paths) or "(the model has none)"
            raise ValueError(
                f"Rule {rule.path!r} matches no layer. A rule has to match a whole path; "
                f"the paths of this model are\n  {known}"
            )
    return {
        path: next((rule for rule in rules if re.fullmatch(rule.path, path)), None)
        for path in paths
    }


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        path: where the layer is in the model.
        layer: name of its class.
        shape: shape of its dense kernel, as Flax holds it.
        density: non-zeros of the kernel, in the dtype that its rule asks for, over its size.
        bytes_before: bytes of the dense kernel.
        bytes_after: bytes of what stands in its place.
        encoding: how the positions of a packed kernel are stored; None if the layer was skipped.
        skipped: why the layer stays dense; None if it was packed.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    density: float
    bytes_before: int
    bytes_after: int
    encoding: str | None = None
    skipped: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each layer of a model; `print(report)` shows it as a table.

    Attributes:
        layers: one entry for each layer that could be packed, in the order of the model.
        other_bytes: bytes of everything else in the model: embeddings, norms, biases.
    """

    layers: tuple[LayerReport, ...]
    other_bytes: int

    @property
    def packed(self) -> tuple[LayerReport, ...]:
        """The layers that were packed."""
        return tuple(layer for layer in self.layers if layer.skipped is None)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers that stay dense."""
        return tuple(layer for layer in self.layers if layer.skipped is not None)

    @property
    def bytes_before(self) -> int:
        """Bytes of the whole model before."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the whole model after."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict:
        """The report as nested dicts and lists, ready for JSON."""
        return {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "other_bytes": self.other_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        header = ("path", "layer", "kernel", "density", "before", "after", "")
        rows = [
            (
                layer.path or "(the model)",
                layer.layer,
                " x ".join(map(str, layer.shape)),
                f"{layer.density:.3f}",
                _format_bytes(layer.bytes_before),
                _format_bytes(layer.bytes_after),
                layer.encoding if layer.skipped is None else f"skipped: {layer.skipped}",
            )
            for layer in self.layers
        ]
        other = _format_bytes(self.other_bytes)
        summary = f"{len(self.packed)} of {len(self.layers)} layers packed"
        if self.bytes_before:
            summary += f", {self.bytes_after / self.bytes_before:.0%} of the bytes"
        rows.append(("everything else", "", "", "", other, other, ""))
        rows.append(
            (
                "total",
                "",
                "",
                "",
                _format_bytes(self.bytes_before),
                _format_bytes(self.bytes_after),
                summary,
            )
        )
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        widths[-1] = 0
        numeric = {"density", "before", "after"}
        lines = [
            "  ".join(
                cell.rjust(width) if name in numeric else cell.ljust(width)
                for name, cell, width in zip(header, row, widths)
            ).rstrip()
            for row in (header, *rows)
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def _format_bytes(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
