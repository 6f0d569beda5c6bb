"""MACKO: a sparse matrix format and its matrix-vector product, for JAX (arXiv 2511.13061)."""

import importlib
from typing import TYPE_CHECKING, Any

from macko_jax import _compatibility  # noqa: F401 (first: it warns before an import fails)
from macko_jax._version import __version__ as __version__
from macko_jax.format.matrix import MackoMatrix, compress, decompress, validate
from macko_jax.io.checkpoint import load, save
from macko_jax.io.macko_spmv import from_macko_spmv, to_macko_spmv
from macko_jax.nn.rules import Rule
from macko_jax.ops.api import spmv
from macko_jax.ops.fused import Step, fused_chain, fused_spmv

__all__ = [
    "MackoMatrix",
    "Rule",
    "Step",
    "compress",
    "decompress",
    "flax_linen",
    "flax_nnx",
    "from_macko_spmv",
    "fused_chain",
    "fused_spmv",
    "load",
    "save",
    "spmv",
    "to_macko_spmv",
    "validate",
]

if TYPE_CHECKING:
    from macko_jax import flax_linen, flax_nnx


def __getattr__(name: str) -> Any:
    # Flax is imported only where it is used.
    if name in ("flax_linen", "flax_nnx"):
        return importlib.import_module(f"macko_jax.{name}")
    raise AttributeError(f"module 'macko_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
