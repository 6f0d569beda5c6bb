"""Which layers of a model are compressed, and how each of them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsf_jax.solvers.problem import check_density
from dsf_jax.trace.dataflow import Layer
from macko_jax.nn.rules import PathRule

# What models call their last layer, where it makes no logits of a vocabulary.
HEAD = r"(.*/)?(lm_head|head|output|output_layer|logits|classifier|unembed)"

# What every library that trains adapters of low rank calls them.
ADAPTER = re.compile(r"(.*[/_])?lora([/_].*)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Rule(PathRule):
    """How the layers whose path matches a regular expression are compressed.

    Args:
      path: Regular expression that has to match the whole path of a layer, whose parts are joined
        by "/", as in `layers/0/attention/qkv`.
      skip: Leave the layers as they are.
      density: Kept non-zeros over out * in; None takes that of the call.
      method: A name in `METHODS`; None takes that of the call.
      options: Further keyword arguments of the method; None takes those of the call, of which a
        rule with another method takes what that method knows.

    Raises:
      ValueError: An invalid regular expression or density.
    """

    density: float | None = None
    method: str | None = None
    options: Mapping[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.density is not None:
            check_density(self.density, self.path)


Rules = str | Rule | Sequence[str | Rule]


def match_rules(rules: Rules, paths: Iterable[str]) -> dict[str, Rule | None]:
    """Gives each path the first rule that matches it, None where there is none.

    A string stands for a `Rule` with that path, which asks for a layer that is skipped otherwise.

    Raises:
      TypeError: A rule is neither a string nor a `Rule`.
      ValueError: A rule matches no path: most likely a misspelt one.
    """
    return Rule.assign(rules, paths)


def default_skip(layer: Layer, layers: Sequence[Layer]) -> str | None:
    """Why a layer is left alone unless a rule asks for it; None where it is not.

    Args:
      layer: The layer.
      layers: All layers of the model.
    """
    if layer.kind == "embedding":
        return "an embedding, tied to the head" if layer.uses else "an embedding"
    if layer.gives_output:
        vocabularies = {other.rows for other in layers if other.kind == "embedding"}
        if layer.rows in vocabularies or re.fullmatch(HEAD, layer.path):
            return "the output head"
    if ADAPTER.fullmatch(layer.path):
        return "an adapter of low rank (LoRA)"
    if layer.groups > 1 and layer.rows == 1:
        return "a depthwise convolution"
    return None
