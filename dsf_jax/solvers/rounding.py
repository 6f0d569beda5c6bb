"""Solutions of one layer for 8-bit values: rounded, and the second factor refitted to the first.

A matrix with 8-bit values has a scale for every row; `macko_jax.format.quantization` rounds to
them. Rounding V to V' changes the outputs by

    tr((V' - V) S (V' - V)^T)

where S is G, the Gram matrix of the inputs, damped. Rounding each entry to the nearest value looks
at the diagonal of S alone, so from there it is made smaller by coordinate descent: entry after
entry of a row takes the value of the type that is best while the others stay (QuantEase, arXiv
2309.01885). The largest entry of a row stays, since it sets the row's scale.

Of a pair W ~ A B first B is rounded to the nearest values, B'. The output error of A B' is then
larger than it need be, since A was fitted to B. On its fixed mask M, A is fitted anew,

    A* = argmin tr((W - X B') G (W - X B')^T)   over X that are zero outside M,

a least-squares problem for each row of X by itself, whose matrix is S = B' G B'^T, restricted to
the row's mask:  (x_i S)_M = (w_i G B'^T)_M.  It is solved by conjugate gradients from A, which is
near already. So only A*'s own rounding is left, which goes as above, with this S.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax.solvers.admm import refit_rows
from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.problem import Problem, normalize
from dsf_jax.solvers.solution import Factorization
from macko_jax.format import quantization

DAMPING = 0.01  # of the Gram matrix, as in the "quality" factorization
REFIT_STEPS = 10  # of conjugate gradients
SWEEPS = 3  # of coordinate descent over all columns
BLOCK = 128  # columns whose changes reach the others together


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
      problem: What the solution solves; its Gram matrix says which roundings matter.
      solution: One matrix, or a pair.
      values: "int8" or "float8_e4m3fn".
      held: Type of the model's weights, and so of the scales: float16, bfloat16 or float32.

    Returns:
      The solution with rounded matrices, and its relative output error.
    """
    if solution.right is None:
        left = _round_single(problem.weight, problem.gram, solution.left, values, held)
        right = None
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
def _round_single(
    weight: jax.Array, gram: jax.Array, matrix: jax.Array, values: str, held: np.dtype
) -> jax.Array:
    """V' `[out, in]`, float32."""
    with jax.default_matmul_precision("highest"):
        problem = normalize(weight, gram, DAMPING)
        seen = problem.gram * problem.scale * problem.scale[:, None]
        return round_rows(matrix, seen, values, held)


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
        return round_rows(left, seen @ correlation, values, held), right


def round_rows(matrix: jax.Array, gram: jax.Array, values: str, held: np.dtype) -> jax.Array:
    """X' near X, in values of 8 bits, with a small tr((X' - X) S (X' - X)^T).

    Args:
      matrix: X, float32 `[rows, inner]`; what is zero in it stays zero.
      gram: S, positive semi-definite, float32 `[inner, inner]`.
      values, held: as of `round_solution`.

    Returns:
      X' as products have it, float32; `quantize` takes it in the type `held`.
    """
    nearest, scales = quantization.settled(matrix.astype(held), values)
    unit = jnp.where(scales > 0, scales, 1).astype(jnp.float32)[:, None]
    start = nearest.astype(jnp.float32)
    free = (matrix != 0) & (jnp.abs(start) < quantization.LARGEST[jnp.dtype(values)])
    # In units of the scales, in whole blocks of columns.
    pad = -gram.shape[0] % BLOCK
    gram = jnp.pad(gram, ((0, pad), (0, pad)))
    diagonal = jnp.maximum(jnp.diagonal(gram), jnp.finfo(jnp.float32).tiny)
    start, target, free = (jnp.pad(a, ((0, 0), (0, pad))) for a in (start, matrix / unit, free))

    def visit_block(i, state):
        """Lets the columns of a block change one by one; the others then see all changes."""
        current, gradient = state  # gradient = (X' - X) S
        of_block = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=i * BLOCK, slice_size=BLOCK, axis=-1
        )
        gram_rows = jax.lax.dynamic_slice_in_dim(gram, i * BLOCK, BLOCK)
        block_gram, block_diagonal = of_block(gram_rows), of_block(diagonal)
        block_free, before = of_block(free), of_block(current)

        def visit(j, state):
            block, gradient = state
            best = block[:, j] - gradient[:, j] / block_diagonal[j]
            best = quantization.nearest_value(best, values).astype(jnp.float32)
            new = jnp.where(block_free[:, j], best, block[:, j])
            change = (new - block[:, j])[:, None]
            return block.at[:, j].set(new), gradient + change * block_gram[j]

        after, _ = jax.lax.fori_loop(0, BLOCK, visit, (before, of_block(gradient)))
        current = jax.lax.dynamic_update_slice_in_dim(current, after, i * BLOCK, axis=1)
        return current, gradient + (after - before) @ gram_rows

    blocks = gram.shape[0] // BLOCK
    sweep = lambda _, state: jax.lax.fori_loop(0, blocks, visit_block, state)
    found, _ = jax.lax.fori_loop(0, SWEEPS, sweep, (start, (start - target) @ gram))
    return found[:, : matrix.shape[1]] * unit
