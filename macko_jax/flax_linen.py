"""Flax linen models on MACKO matrices."""

from macko_jax.format.factors import FactorizedKernel
from macko_jax.nn.flax_linen import (
    apply,
    combine,
    pack_variables,
    packed_kernels,
    partition,
    substitute,
)

__all__ = [
    "FactorizedKernel",
    "apply",
    "combine",
    "pack_variables",
    "packed_kernels",
    "partition",
    "substitute",
]
