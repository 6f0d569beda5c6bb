"""Double Sparse Factorization and pruning of Flax models, on JAX."""

from dsf_jax.factorize import Factorization, Options, factorize, factorize_stack
from dsf_jax.problem import relative_output_error
from dsf_jax.pruners import prune

__all__ = [
    "Factorization",
    "Options",
    "factorize",
    "factorize_stack",
    "prune",
    "relative_output_error",
]
