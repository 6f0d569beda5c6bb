"""MACKO: a sparse matrix format and its matrix-vector product, for JAX (arXiv 2511.13061)."""

import importlib

import jax

from macko_jax.compatibility import check_jax

check_jax(jax.__version__)

from macko_jax.api import spmv  # noqa: E402  (after the check, so that it is seen if an import fails)
from macko_jax.checkpoint import load, save  # noqa: E402
from macko_jax.format import MackoMatrix, compress, decompress, validate  # noqa: E402
from macko_jax.fused import Step, fused_chain, fused_spmv  # noqa: E402
from macko_jax.interop import from_macko_spmv, to_macko_spmv  # noqa: E402
from macko_jax.rules import Rule  # noqa: E402

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


def __getattr__(name: str):
    # Flax is imported only where it is used.
    if name in ("flax_linen", "flax_nnx"):
        return importlib.import_module(f"macko_jax.{name}")
    raise AttributeError(f"module 'macko_jax' has no attribute {name!r}")
