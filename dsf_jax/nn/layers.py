"""Factor pairs in the place of the layers of a model; `macko_jax.nn.pairs` says what they are."""

from macko_jax.nn.flax_linen import packed_kernels as factorized_kernels
from macko_jax.nn.flax_nnx import become_pair
from macko_jax.nn.pairs import FactorizedKernel, FactorPair, why_no_pair

__all__ = ["FactorPair", "FactorizedKernel", "become_pair", "factorized_kernels", "why_no_pair"]
