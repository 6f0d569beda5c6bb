"""The solution of one layer's problem: two sparse factors, or one sparse matrix."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax.solvers.budget import packed_nbytes
from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.problem import Problem, layer_prefix


@dataclasses.dataclass(frozen=True)
class Factorization:
    """Two sparse factors in the place of one weight matrix, W ~ A B, or one sparse matrix.

    Attributes:
      left: A, float32 `[out, inner]`; without a `right`, the sparse matrix `[out, in]` itself.
      right: B, float32 `[inner, in]`; None where one matrix at the same budget was better, or was
        what was asked for.
      method: "dsf" for a pair, else the pruning method.
      relative_error: Relative output error on the problem's Gram matrix.
      alternatives: Relative output error of every candidate compared, by method.
      note: What a user should know of the problem; None where there is nothing to say.
    """

    left: jax.Array
    right: jax.Array | None
    method: str
    relative_error: float
    alternatives: Mapping[str, float]
    note: str | None = None

    def product(self) -> jax.Array:
        """The dense matrix that stands for W, float32 `[out, in]`."""
        if self.right is None:
            return self.left
        return _product(self.left, self.right)

    @property
    def kind(self) -> str:
        """The former way to say whether there is a `right`; it goes with the next version."""
        warnings.warn("ask whether `right` is None, not for `kind`", DeprecationWarning, 2)
        return "single" if self.right is None else "pair"

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        """The matrices that have to be stored: two, or one."""
        return (self.left,) if self.right is None else (self.left, self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    @property
    def inner(self) -> int | None:
        """Inner dimension of the pair; None for one matrix."""
        return None if self.right is None else self.right.shape[0]

    @property
    def nnz(self) -> int:
        """Non-zeros stored."""
        return sum(int(jnp.count_nonzero(factor)) for factor in self.factors)

    @property
    def density(self) -> float:
        """Non-zeros over out * in."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed factors with 16-bit values; see `budget.packed_nbytes`."""
        return sum(packed_nbytes(factor) for factor in self.factors)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")


def best_solution(
    problem: Problem, candidates: Mapping[str, tuple[jax.Array, jax.Array | None]]
) -> Factorization:
    """The candidate of least relative output error.

    Args:
      problem: What the candidates solve.
      candidates: For each method its matrices, `(left, right)` or `(matrix, None)`.

    Returns:
      The best candidate, with the errors of all as `alternatives`.

    Raises:
      FloatingPointError: Every candidate holds NaN.
    """
    found = {
        method: Factorization(left, right, method, np.nan, {})
        for method, (left, right) in candidates.items()
    }
    errors = {method: problem.error(solution.product()) for method, solution in found.items()}
    # A candidate that failed numerically has a NaN error and is not chosen.
    best = min(errors, key=lambda method: np.nan_to_num(errors[method], nan=np.inf))
    if np.isnan(errors[best]):
        raise FloatingPointError(
            f"{layer_prefix(problem.name)}{' and '.join(candidates)} came to NaN; look at the size "
            f"of its weights and of its Gram matrix, or choose another method"
        )
    note = problem.note(found[best].factors[-1])
    return dataclasses.replace(
        found[best], relative_error=errors[best], alternatives=errors, note=note
    )
