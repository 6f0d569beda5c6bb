"""Masked least squares: solvers for one matrix of limited non-zeros, jitted, in lax loops."""

import jax
import jax.numpy as jnp
from jax import lax


def refit_rows(rhs, gram, mask, start, steps: int):
    """Refits the unmasked entries of every row by conjugate gradients.

    Minimises tr(X S X^T) - 2 tr(X C^T) over X zero outside `mask`. The rows are independent
    problems, so each has its own step size; the diagonal of S preconditions.

    Args:
      rhs: C, float32 `[rows, cols]`.
      gram: S, positive semi-definite, float32 `[cols, cols]`.
      mask: Boolean `[rows, cols]`.
      start: Where to start, float32 `[rows, cols]`, zero outside the mask.
      steps: Conjugate-gradient steps.

    Returns:
      X, float32 `[rows, cols]`.
    """
    diagonal = jnp.diagonal(gram)
    inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0) * mask

    def ratio(a, b):
        # A row that has converged, or has no entries, takes no further step.
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)[:, None]

    def step(_, state):
        x, residual, direction, size = state
        image = (direction @ gram) * mask
        length = ratio(size, jnp.sum(direction * image, axis=1))
        x, residual = x + length * direction, residual - length * image
        descent = inverse * residual
        new_size = jnp.sum(residual * descent, axis=1)
        return x, residual, descent + ratio(new_size, size) * direction, new_size

    residual = (rhs - start @ gram) * mask
    direction = inverse * residual
    state = (start, residual, direction, jnp.sum(residual * direction, axis=1))
    return lax.fori_loop(0, steps, step, state)[0]
