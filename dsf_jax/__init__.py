"""Double Sparse Factorization and pruning of Flax models, on JAX."""

from dsf_jax.calibration import gram_matrices
from dsf_jax.factorize import Factorization, Options, factorize, factorize_stack
from dsf_jax.finetune import keep_sparsity
from dsf_jax.layers import FactorizedKernel, FactorPair, factorized_kernels
from dsf_jax.pipeline import Compressed, compress_model
from dsf_jax.problem import relative_output_error
from dsf_jax.pruners import prune
from dsf_jax.report import LayerReport, Progress, Report, print_progress
from dsf_jax.rules import Rule

__all__ = [
    "Compressed",
    "FactorPair",
    "Factorization",
    "FactorizedKernel",
    "LayerReport",
    "Options",
    "Progress",
    "Report",
    "Rule",
    "compress_model",
    "factorize",
    "factorize_stack",
    "factorized_kernels",
    "gram_matrices",
    "keep_sparsity",
    "print_progress",
    "prune",
    "relative_output_error",
]
