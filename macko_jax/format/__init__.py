"""The matrix and its bytes."""

from macko_jax.format.matrix import MackoMatrix, compress, decompress, validate

__all__ = ["MackoMatrix", "compress", "decompress", "validate"]
