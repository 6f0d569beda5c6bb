"""MACKO: a sparse matrix format and its matrix-vector product, for JAX (arXiv 2511.13061)."""
from macko_jax.api import spmv
from macko_jax.format import MackoMatrix, compress, decompress

__all__ = ["MackoMatrix", "compress", "decompress", "spmv"]
