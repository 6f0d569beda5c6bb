"""MACKO: a sparse matrix format and its matrix-vector product, for JAX (arXiv 2511.13061)."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from macko_jax import _compatibility  # noqa: F401 (first: it warns before an import fails)
from macko_jax._version import __version__ as __version__
from macko_jax.format.matrix import MackoMatrix, compress, decompress, validate
from macko_jax.format.sharded import ShardedMatrix, shard
from macko_jax.io import exported
from macko_jax.io.checkpoint import load, save
from macko_jax.io.macko_spmv import from_macko_spmv, to_macko_spmv
from macko_jax.nn.rules import Rule
from macko_jax.ops.api import spmv
from macko_jax.ops.explain import Explanation, explain

exported.register()

__all__ = [
    "Explanation",
    "MackoMatrix",
    "Rule",
    "ShardedMatrix",
    "compress",
    "decompress",
    "experimental",
    "explain",
    "flax_linen",
    "flax_nnx",
    "from_macko_spmv",
    "load",
    "load_model",
    "save",
    "save_model",
    "shard",
    "spmv",
    "to_macko_spmv",
    "validate",
]

if TYPE_CHECKING:
    from macko_jax import experimental, flax_linen, flax_nnx
    from macko_jax.nn.model_file import load_model, save_model


_MOVED = ("Step", "fused_chain", "fused_spmv")  # to macko_jax.experimental


def __getattr__(name: str) -> Any:
    # Flax is imported only where it is used.
    if name in ("experimental", "flax_linen", "flax_nnx"):
        return importlib.import_module(f"macko_jax.{name}")
    if name in ("load_model", "save_model"):
        return getattr(importlib.import_module("macko_jax.nn.model_file"), name)
    if name in _MOVED:
        warnings.warn(
            f"macko_jax.{name} is now macko_jax.experimental.{name}; the old name goes in the next "
            "version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module("macko_jax.experimental"), name)
    raise AttributeError(f"module 'macko_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
