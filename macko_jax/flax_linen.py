"""Flax linen models on MACKO matrices."""

from macko_jax.nn.flax_linen import apply, combine, packed_kernels, partition, substitute

__all__ = ["apply", "combine", "packed_kernels", "partition", "substitute"]
