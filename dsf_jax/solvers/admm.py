"""Masked least squares for one matrix of limited non-zeros, by ADMM and by conjugate gradients.

Both factors of W ~ A B are solved in the same form. The unknown is a matrix X `[rows, inner]`: A
itself, or B^T. Given the other factor it minimises

    sum_i  c_i x_i S x_i^T - 2 x_i f_i^T      (x_i: row i of X)

over matrices with at most k non-zeros. S `[inner, inner]` is the Gram matrix of what X is
multiplied with, F the correlation with the target, and c the curvature of each row: all ones for
A, whose rows are independent; for B^T the eigenvalues of the inputs' Gram matrix R, in whose
eigenbasis (the `rotation` P) its rows become independent too.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dsf_jax.solvers.masks import top_k_mask


class Schedule(NamedTuple):
    """How one factor is improved once; the integers are static, the rest may be traced.

    Attributes:
      rho: Penalty.
      ridge: Added to the unit diagonal of the normalised S.
      steps: Solves and projections.
      mask_steps: How many of them, from the first, choose the mask anew.
      cg_steps: Conjugate-gradient steps of each solve; 0 solves by Cholesky decomposition.
      rho_first: Penalty of the first solve, for Cholesky only; None means `rho`. Near zero it
        forgets where the factor was.
    """

    rho: jax.Array | float
    ridge: float
    steps: int
    mask_steps: int
    cg_steps: int = 0
    rho_first: jax.Array | float | None = None


def improve_factor(
    sparse: jax.Array,
    dual: jax.Array,
    residual: jax.Array,
    gram: jax.Array,
    nonzeros: ArrayLike,
    schedule: Schedule,
    curvature: jax.Array | None = None,
    rotation: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Improves one factor by ADMM steps, the other one fixed.

    Each step solves x_i (c_i S + (rho + ridge) I) = f_i + rho (z_i - u_i), lets Z be X + U on the
    mask of its largest entries, and adds X - Z to U. S is first scaled to a unit diagonal, so that
    rho and the mask do not depend on how scale is shared between the factors.

    What is solved for is X - Z_0, the change from where the factor stands. F itself is dominated by
    the few largest eigenvalues of the inputs' Gram matrix, which grow with the layer: rounded to
    TF32, it would drown the small ones. The residual that is left of it has none of that.

    Args:
      sparse: Z_0, float32 `[rows, inner]`.
      dual: U, likewise.
      residual: E, float32 `[rows, inner]`, that gives what remains of F: f_i - c_i z_i S = c_i e_i.
      gram: S, float32 `[inner, inner]`.
      nonzeros: k, the most non-zeros of Z; an integer, may be traced.
      schedule: A `Schedule`. With no mask step the mask is that of `sparse`.
      curvature: c, float32 `[rows]`; None means ones, the only case for Cholesky.
      rotation: P, float32 `[rows, rows]`, orthogonal; None where `curvature` is.

    Returns:
      New Z and U.
    """
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    alive = scale > 1e-8
    inverse = jnp.where(alive, 1 / jnp.where(alive, scale, 1), 0)
    gram = gram * inverse * inverse[:, None]
    residual, sparse, dual = residual * inverse, sparse * scale, dual * scale
    curvature = jnp.ones(sparse.shape[0]) if curvature is None else curvature

    def into_basis(x):
        return x if rotation is None else rotation.T @ x

    def out_of_basis(x):
        return x if rotation is None else rotation @ x

    origin = sparse
    residual = curvature[:, None] * into_basis(residual) - schedule.ridge * into_basis(origin)
    solve = _row_solver(gram, curvature, residual, schedule)

    def step(i, state):
        change, sparse, dual, mask = state
        change = solve(i, into_basis(sparse - dual - origin), change)
        moved = origin + out_of_basis(change) + dual
        if schedule.mask_steps:
            mask = lax.cond(
                i < schedule.mask_steps, lambda: top_k_mask(jnp.abs(moved), nonzeros), lambda: mask
            )
        sparse = jnp.where(mask, moved, 0)
        return change, sparse, moved - sparse, mask

    state = (jnp.zeros_like(sparse), sparse, dual, sparse != 0)
    _, sparse, dual, _ = lax.fori_loop(0, schedule.steps, step, state)
    return sparse * inverse, dual * inverse


def _row_solver(
    gram: jax.Array, curvature: jax.Array, residual: jax.Array, schedule: Schedule
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """How the rows of one factor are solved for: `solve(i, pull, start)`.

    Step i solves x_i (c_i S + (rho + ridge) I) = e_i + rho p_i, where e is `residual` and p is
    `pull`; `start` is the first guess of conjugate gradients.
    """

    def by_conjugate_gradients(i, pull, start):
        del i
        shift = schedule.rho + schedule.ridge
        target = residual + schedule.rho * pull
        return solve_rows(gram, curvature, shift, target, start, schedule.cg_steps)

    if schedule.cg_steps:
        return by_conjugate_gradients
    first = [] if schedule.rho_first is None else [schedule.rho_first]
    penalties = jnp.asarray([*first, schedule.rho], jnp.float32)
    # A loop over the shifts, so that the inverse is compiled once.
    inverses = lax.map(lambda p: _shifted_inverse(gram, p + schedule.ridge), penalties)

    def by_cholesky(i, pull, start):
        del start
        i = jnp.minimum(i, len(penalties) - 1)
        return (residual + penalties[i] * pull) @ inverses[i]

    return by_cholesky


def _shifted_inverse(gram: jax.Array, shift: ArrayLike) -> jax.Array:
    """(S + shift I)^-1 of a positive semi-definite S."""
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    half = _triangular_inverse(jnp.linalg.cholesky(gram + shift * identity))
    return half.T @ half


def _triangular_inverse(lower: jax.Array, block: int = 256) -> jax.Array:
    """Inverse of a lower triangular matrix, nearly all of it matrix products.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], from diagonal blocks of at most `block`
    rows upwards, all blocks of one size at once. On a GPU a triangular solve with the identity
    takes several times as long.
    """
    size = lower.shape[0]
    levels = max(0, math.ceil(math.log2(size / block)))
    width = -(-size // 2**levels)
    padding = width * 2**levels - size
    lower = jnp.pad(lower, (0, padding)) + jnp.diag(jnp.arange(size + padding) >= size)

    def blocks_below(width, offset):
        """Blocks (2 i + offset, 2 i) of `width` rows, or the diagonal ones for no offset."""
        count = lower.shape[0] // width
        grid = lower.reshape(count, width, count, width)
        rows = jnp.arange(count) if offset == 0 else jnp.arange(1, count, 2)
        return grid[rows, :, rows - offset, :]

    diagonal = blocks_below(width, 0)
    identity = jnp.broadcast_to(jnp.eye(width, dtype=lower.dtype), diagonal.shape)
    inverse = lax.linalg.triangular_solve(diagonal, identity, left_side=True, lower=True)
    for _ in range(levels):
        first, second = inverse[0::2], inverse[1::2]
        corner = -second @ (blocks_below(inverse.shape[1], 1) @ first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=2)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=2)], axis=1)
    return inverse[0, :size, :size]


def solve_rows(
    gram: jax.Array,
    curvature: jax.Array,
    shift: ArrayLike,
    target: jax.Array,
    start: jax.Array,
    steps: int,
) -> jax.Array:
    """Solves x_i (c_i S + shift I) = f_i for all rows i by conjugate gradients.

    Every row has its own step size, so rows of small curvature converge at once and do not wait
    for, nor hold up, the others.

    Args:
      gram: S, positive semi-definite, float32 `[inner, inner]`.
      curvature: c, float32 `[rows]`, not negative.
      shift: A positive scalar.
      target: F, float32 `[rows, inner]`.
      start: First guess, float32 `[rows, inner]`.
      steps: Number of steps.

    Returns:
      X, float32 `[rows, inner]`.
    """

    def apply(x):
        return curvature[:, None] * (x @ gram) + shift * x

    return _conjugate_gradients(apply, target - apply(start), start, lambda r: r, steps)


def refit_rows(
    target: jax.Array, gram: jax.Array, mask: jax.Array, start: jax.Array, steps: int
) -> jax.Array:
    """Refits the unmasked entries of X, all rows having curvature one, by conjugate gradients.

    Args:
      target: F, float32 `[rows, inner]`.
      gram: S, positive semi-definite, float32 `[inner, inner]`.
      mask: Boolean `[rows, inner]`.
      start: Where to start, float32 `[rows, inner]`, zero outside the mask.
      steps: Number of steps; the diagonal of S preconditions.

    Returns:
      X, float32 `[rows, inner]`, zero outside the mask.
    """
    inverse = _masked_inverse(jnp.broadcast_to(jnp.diagonal(gram), mask.shape), mask)

    def apply(x):
        return (x @ gram) * mask

    residual = (target - start @ gram) * mask
    return _conjugate_gradients(apply, residual, start, lambda r: inverse * r, steps)


def refit_coupled(
    target: jax.Array,
    left_gram: jax.Array,
    gram: jax.Array,
    mask: jax.Array,
    start: jax.Array,
    steps: int,
) -> jax.Array:
    """Refits the unmasked entries of X to R X S = F, whose rows are coupled through R.

    Args:
      target: F, float32 `[rows, inner]`.
      left_gram: R, positive semi-definite, float32 `[rows, rows]`.
      gram: S, positive semi-definite, float32 `[inner, inner]`.
      mask: Boolean `[rows, inner]`.
      start: Where to start, float32 `[rows, inner]`, zero outside the mask.
      steps: Number of steps; the diagonals of R and S precondition.

    Returns:
      X, float32 `[rows, inner]`, zero outside the mask.
    """
    diagonal = jnp.diagonal(left_gram)[:, None] * jnp.diagonal(gram)
    inverse = _masked_inverse(diagonal, mask)

    def apply(x):
        return (left_gram @ (x @ gram)) * mask

    residual = (target - left_gram @ (start @ gram)) * mask
    return _conjugate_gradients(apply, residual, start, lambda r: inverse * r, steps, axis=None)


def _masked_inverse(diagonal: jax.Array, mask: jax.Array) -> jax.Array:
    usable = mask & (diagonal > 0)
    return jnp.where(usable, 1 / jnp.where(usable, diagonal, 1), 0)


def _conjugate_gradients(
    apply: Callable[[jax.Array], jax.Array],
    residual: jax.Array,
    start: jax.Array,
    precondition: Callable[[jax.Array], jax.Array],
    steps: int,
    axis: int | None = 1,
) -> jax.Array:
    """Conjugate gradients with one step size per row (`axis=1`) or one for all (`axis=None`)."""

    def dot(a, b):
        return jnp.sum(a * b, axis=axis, keepdims=True)

    def ratio(a, b):
        # What has converged, or is masked throughout, takes no further step.
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    def step(_, state):
        x, residual, direction, size = state
        image = apply(direction)
        length = ratio(size, dot(direction, image))
        x, residual = x + length * direction, residual - length * image
        descent = precondition(residual)
        new_size = dot(residual, descent)
        return x, residual, descent + ratio(new_size, size) * direction, new_size

    direction = precondition(residual)
    state = (start, residual, direction, dot(residual, direction))
    return lax.fori_loop(0, steps, step, state)[0]
