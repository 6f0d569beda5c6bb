"""Compressed models on MACKO matrices.

    pair = dsf_jax.compress_model(model, batches, method="dsf", density=0.5).model
    packed, report = dsf_jax.pack(pair)

Both factors of a pair, the kernels of pruned linear layers and einsums, and those of convolutions
become MACKO matrices. All that a packed model needs to run, to be saved and to be loaded is in
`macko_jax`.
"""

import dataclasses
from typing import Any

from flax import linen as nn
from flax import nnx

from macko_jax.nn import flax_linen, flax_nnx
from macko_jax.nn.conv import MackoConv
from macko_jax.nn.flax_linen import packed_kernels
from macko_jax.nn.report import PackingReport
from macko_jax.nn.rules import Rule, Rules

__all__ = ["MackoConv", "pack", "pack_linen", "packed_kernels"]


def pack(
    model: Any,
    values: str | None = None,
    rules: Rules = None,
    *,
    module: nn.Module | None = None,
    inputs: tuple = (),
) -> tuple[Any, PackingReport]:
    """Packs a pruned or factorized Flax model into MACKO matrices.

    Linear layers, einsums that are plain contractions, convolutions, pairs of factors, and stacks
    of them are packed wherever fewer than 0.8 of a matrix's entries are non-zero.

    Args:
      model: An NNX model, or a linen module's variables; left as it is.
      values: "int8" or "float8_e4m3fn" to store values in 8 bits, with a scale for every row; None
        keeps their type. A rule that names a dtype of its own keeps it.
      rules: `macko_jax.Rule`s, or regular expressions, that say which layers are packed and how; a
        pair of factors is one layer with one path.
      module: The linen module. With it every Dense, DenseGeneral and Conv is packed, and every
        Einsum that is a plain contraction; without it factors, and kernels of two axes, which are
        taken for those of Dense layers.
      inputs: Example arguments of the linen module's call; arrays may be `jax.ShapeDtypeStruct`.

    Returns:
      A new model (linen: variables, for `macko_jax.flax_linen.apply`), and the report of every
      parameter matrix: bytes of the dense model and of this one, why it was left dense.

    Raises:
      ValueError: A rule matches no layer.
      TypeError: `values` is no name of a type.
    """
    if values is not None:
        if not isinstance(values, str):
            raise TypeError(
                f"values must be None or the name of a dtype, got {values!r}; give rules as rules="
            )
        rules = _with_values(values, rules)
    if isinstance(model, nnx.Module):
        return flax_nnx.substitute(model, rules, convolutions=True)
    if module is None:
        return flax_linen.pack_variables(model, rules)
    return flax_linen.substitute(module, model, *inputs, rules=rules, convolutions=True)


def _with_values(values: str, rules: Rules) -> list[Rule]:
    """The rules, where those without a dtype of their own take `values`."""
    if rules is None:
        return [Rule(dtype=values)]
    rules = [rules] if isinstance(rules, str | Rule) else rules
    rules = [Rule(rule) if isinstance(rule, str) else rule for rule in rules]
    return [rule if rule.dtype else dataclasses.replace(rule, dtype=values) for rule in rules]


def pack_linen(variables: dict) -> dict:
    """`pack` of linen variables, without the report."""
    return pack(variables)[0]
