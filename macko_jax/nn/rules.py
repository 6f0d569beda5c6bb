"""Rules that say what happens to which layers of a model, by the paths of the layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Self

import jax.numpy as jnp

from macko_jax.format import quantization

# From this density on the packed product reads as many bytes as the dense one, or more work is
# spent on them than is saved, so the dense layer is the faster one.
BREAK_EVEN_DENSITY = 0.8

VALUE_DTYPES = ("float16", "bfloat16", "float32")


def layer_path(names: Sequence[object]) -> str:
    """Path of the layer whose kernel or embedding a parameter is; of other parameters their own."""
    own = names[:-1] if names and names[-1] in ("kernel", "embedding") else names
    return "/".join(map(str, own))


@dataclasses.dataclass(frozen=True)
class PathRule:
    """The layers whose path matches a regular expression; what happens to them is in subclasses.

    Args:
        path: regular expression that has to match the whole path of a layer, whose parts are joined
            by "/", as in `layers/0/attention/query`; the path of the model itself is "".
        skip: leave the layers as they are.

    Raises:
        ValueError: for an invalid regular expression.
    """

    path: str = ".*"
    skip: bool = False

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"Rule path {self.path!r} is not a valid regular expression: {error}"
            ) from error

    def matches(self, path: str) -> bool:
        """Whether the rule applies to the layer at a path."""
        return re.fullmatch(self.path, path) is not None

    @classmethod
    def assign(
        cls, rules: str | Self | Sequence[str | Self], paths: Iterable[str]
    ) -> dict[str, Self | None]:
        """Give each path the first rule that matches it.

        Args:
            rules: one rule of this class or several; a string stands for a rule with that path.
            paths: the paths of all layers that rules can name.

        Returns:
            The rule of each path; None where no rule matches.

        Raises:
            TypeError: if a rule is neither a string nor of this class.
            ValueError: if a rule matches no path at all: most likely a misspelt one.
        """
        paths = list(paths)
        rules = [rules] if isinstance(rules, str | PathRule) else list(rules)
        for rule in rules:
            if not isinstance(rule, str | cls):
                package = cls.__module__.partition(".")[0]
                raise TypeError(
                    f"A rule is a {package}.{cls.__name__} or a regular expression, not {rule!r}"
                )
        rules = [cls(rule) if isinstance(rule, str) else rule for rule in rules]
        for rule in rules:
            if not any(map(rule.matches, paths)):
                known = "\n  ".join(map(repr, paths)) or "(the model has none)"
                raise ValueError(
                    f"Rule {rule.path!r} matches no layer. A rule has to match a whole path; "
                    f"the paths of this model are\n  {known}"
                )
        return {path: next((rule for rule in rules if rule.matches(path)), None) for path in paths}


@dataclasses.dataclass(frozen=True)
class Rule(PathRule):
    """How the layers whose path matches a regular expression are packed.

    Args:
        path: regular expression that has to match the whole path of a layer; see `PathRule`.
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

    max_density: float = BREAK_EVEN_DENSITY
    dtype: str | None = None
    encoding: str | None = None
    lanes: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.max_density <= 1.0:
            raise ValueError(
                f"Rule {self.path!r} has max_density={self.max_density}; it is a share of "
                "non-zeros and lies between 0 and 1"
            )
        if self.dtype is not None:
            name = jnp.dtype(self.dtype).name
            allowed = VALUE_DTYPES + quantization.NAMES
            if name not in allowed:
                raise ValueError(
                    f"Rule {self.path!r} has dtype={name}; values are stored as "
                    f"{', '.join(allowed)}, or None to keep the kernel's dtype"
                )
            object.__setattr__(self, "dtype", name)


Rules = str | Rule | Sequence[str | Rule] | None


def assign_rules(rules: Rules, paths: Iterable[str]) -> dict[str, Rule | None]:
    """`Rule.assign`, where None stands for `Rule(".*")`, also in a model without layers."""
    if rules is None:
        return dict.fromkeys(paths, Rule())
    return Rule.assign(rules, paths)
