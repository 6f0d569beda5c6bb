"""Solutions of one layer for 8-bit values: rounded, and the second factor refitted to the first.

A matrix with 8-bit values has a scale for every row; `macko_jax.format.quantization` rounds to
them. One matrix is rounded, and that is all. Of a pair W ~ A B first B is rounded, to B'. The
output error of A B' is then larger than it need be, since A was fitted to B. On its fixed mask M, A
is fitted anew,

    A* = argmin tr((W - X B') G (W - X B')^T)   over X that are zero outside M,

a least-squares problem for each row of X by itself, whose matrix is S = B' G B'^T, restricted to
the row's mask:  (x_i S)_M = (w_i G B'^T)_M.  It is solved by conjugate gradients from A, which is
near already. Then A* is rounded, to A'. So only A's own rounding is left in the error of A' B'.
"""

import dataclasses
import functools

import jax
import numpy as np

from dsf_jax.solvers.admm import refit_rows
from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.problem import Problem, normalize
from dsf_jax.solvers.solution import Factorization
from macko_jax.format import quantization

DAMPING = 0.01  # of the Gram matrix, as in the "quality" factorization
REFIT_STEPS = 10  # of conjugate gradients


def check_values(values: str | None) -> None:
    """Raises a ValueError unless `values` is None or names a type of 8 bits."""
    if values is not None and values not in quantization.NAMES:
        raise ValueError(
            f"values must be None or one of {', '.join(quantization.NAMES)}, got {values!r}"
        )


def round_solution(
    problem: Problem, solution: Factorization, values: str, held: np.dtype
) -> Factorization:
    """The solution whose matrices `macko_jax.compress(..., dtype=values)` stores as they are.

    Args:
      problem: What the solution solves; its Gram matrix is what a refit looks at.
      solution: One matrix, or a pair.
      values: "int8" or "float8_e4m3fn".
      held: Type of the model's weights, and so of the scales: float16, bfloat16 or float32.

    Returns:
      The solution with rounded matrices, and its relative output error.
    """
    if solution.right is None:
        left, right = _round_single(solution.left, values, held), None
    else:
        left, right = _round_pair(
            problem.weight, problem.gram, solution.left, solution.right, values, held
        )
    rounded = dataclasses.replace(solution, left=left, right=right)
    return dataclasses.replace(rounded, relative_error=problem.error(rounded.product()))


_compile = functools.partial(
    jax.jit,
    static_argnames=("values", "held"),
    compiler_options=COMPILER_OPTIONS | quantization.COMPILER_OPTIONS,
)


@_compile
def _round_single(matrix: jax.Array, values: str, held: np.dtype) -> jax.Array:
    return quantization.settle(matrix.astype(held), values)


@_compile
def _round_pair(
    weight: jax.Array,
    gram: jax.Array,
    left: jax.Array,
    right: jax.Array,
    values: str,
    held: np.dtype,
) -> tuple[jax.Array, jax.Array]:
    """A' `[out, k]` and B' `[k, in]`, float32."""
    with jax.default_matmul_precision("highest"):
        right = quantization.settle(right.astype(held), values)
        problem = normalize(weight, gram, DAMPING)
        # B' D / unit is what the normalised problem has in the place of B', see `problem`.
        seen = right * problem.scale / problem.unit
        correlation = problem.gram @ seen.T
        left = refit_rows(
            problem.weight @ correlation, seen @ correlation, left != 0, left, REFIT_STEPS
        )
        return quantization.settle(left.astype(held), values), right
