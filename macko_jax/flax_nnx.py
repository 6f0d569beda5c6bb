"""Flax NNX models on MACKO matrices."""

from macko_jax.nn.conv import MackoConv
from macko_jax.nn.einsum import MackoEinsum
from macko_jax.nn.flax_nnx import from_pure_dict, substitute, to_pure_dict
from macko_jax.nn.linear import MackoIndex, MackoLinear, chain
from macko_jax.nn.model_file import abstract_model, describe
from macko_jax.nn.pairs import FactorPair

__all__ = [
    "FactorPair",
    "MackoConv",
    "MackoEinsum",
    "MackoIndex",
    "MackoLinear",
    "abstract_model",
    "chain",
    "describe",
    "from_pure_dict",
    "substitute",
    "to_pure_dict",
]
