"""Which layers of a model are compressed, and how each of them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsf_jax.solvers.problem import check_density

# The last product of a classifier or language model by the names that models give it.
HEAD = r"(.*/)?(lm_head|head|output|output_layer|logits|classifier|unembed)"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the layers whose path matches a regular expression.

    Args:
      path: Regular expression that has to match the whole path of a layer, whose parts are joined
        by "/", as in `layers/0/attention/qkv`.
      skip: Leave the layers as they are.
      density: Kept non-zeros over out * in; None takes that of the call.
      method: A name in `METHODS`; None takes that of the call.
      options: Further keyword arguments of the method; None takes those of the call.

    Raises:
      ValueError: An invalid regular expression or density.
    """

    path: str
    skip: bool = False
    density: float | None = None
    method: str | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"rule path {self.path!r} is no valid regular expression: {error}"
            ) from error
        if self.density is not None:
            check_density(self.density, self.path)


def match_rules(rules: Sequence[Rule], paths: Iterable[str]) -> dict[str, Rule | None]:
    """Gives each path the first rule that matches it, None where there is none.

    Raises:
      TypeError: A rule is not a `Rule`.
      ValueError: A rule matches no path: most likely a misspelt one.
    """
    paths = list(paths)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"a rule must be a dsf_jax.Rule, got {rule!r}")
        if not any(re.fullmatch(rule.path, path) for path in paths):
            raise ValueError(
                f"rule {rule.path!r} matches no layer; a rule must match a whole path, and the "
                f"paths of this model are\n  " + "\n  ".join(paths)
            )
    return {
        path: next((rule for rule in rules if re.fullmatch(rule.path, path)), None)
        for path in paths
    }


def default_skip(layer) -> str | None:
    """Why a layer is left alone unless a rule asks for it; None where it is not."""
    if layer.kind == "embedding":
        return "an embedding"
    if re.fullmatch(HEAD, layer.path):
        return "the output head"
    if layer.groups > 1 and layer.rows == 1:
        return "a depthwise convolution"
    return None
