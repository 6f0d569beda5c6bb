"""MACKO: a sparse matrix format and its matrix-vector product, for JAX (arXiv 2511.13061)."""
import importlib

from macko_jax.api import spmv
from macko_jax.checkpoint import load, save
from macko_jax.format import MackoMatrix, compress, decompress, validate
from macko_jax.interop import from_macko_spmv, to_macko_spmv
from macko_jax.rules import Rule

__all__ = [
    "MackoMatrix", "Rule", "compress", "decompress", "flax_linen", "flax_nnx", "from_macko_spmv",
    "load", "save", "spmv", "to_macko_spmv", "validate",
]


def __getattr__(name: str):
    # Flax is imported only where it is used.
    if name in ("flax_linen", "flax_nnx"):
        return importlib.import_module(f"macko_jax.{name}")
    raise AttributeError(f"module 'macko_jax' has no attribute {name!r}")
