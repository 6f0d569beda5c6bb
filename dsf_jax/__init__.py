"""Double Sparse Factorization and pruning of Flax models, on JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from dsf_jax.nn.finetune import keep_sparsity
from dsf_jax.pipeline.report import LayerReport, Progress, Report, print_progress
from dsf_jax.pipeline.rules import Rule
from dsf_jax.pipeline.run import Compressed, compress_model
from dsf_jax.pipeline.settings import Calibration, Execution
from dsf_jax.refinement.report import BlockReport, RefineProgress, RefineReport
from dsf_jax.refinement.run import Refined, refine, refine_block
from dsf_jax.solvers.factorize import Options, factorize, factorize_stack
from dsf_jax.solvers.problem import relative_output_error
from dsf_jax.solvers.pruners import prune
from dsf_jax.solvers.solution import Factorization
from dsf_jax.trace.calibration import gram_matrices
from macko_jax._version import __version__ as __version__
from macko_jax.format.factors import FactorizedKernel
from macko_jax.nn.flax_linen import packed_kernels as factorized_kernels
from macko_jax.nn.pairs import FactorPair

__all__ = [
    "BlockReport",
    "Calibration",
    "Compressed",
    "Execution",
    "FactorPair",
    "Factorization",
    "FactorizedKernel",
    "LayerReport",
    "Options",
    "Progress",
    "RefineProgress",
    "RefineReport",
    "Refined",
    "Report",
    "Rule",
    "compress_model",
    "export",
    "factorize",
    "factorize_stack",
    "factorized_kernels",
    "gram_matrices",
    "keep_sparsity",
    "pack",
    "print_progress",
    "prune",
    "refine",
    "refine_block",
    "relative_output_error",
]


if TYPE_CHECKING:
    from dsf_jax.nn import export
    from dsf_jax.nn.export import pack


def __getattr__(name: str) -> Any:
    # Packing is imported only where it is used.
    if name == "export":
        return importlib.import_module("dsf_jax.nn.export")
    if name == "pack":
        return importlib.import_module("dsf_jax.nn.export").pack
    raise AttributeError(f"module 'dsf_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
