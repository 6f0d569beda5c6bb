"""Masks with an exact number of non-zeros.

A mask is a boolean array; ties between equal scores go to the earlier position in row-major order,
so the same scores give the same mask on every device. Nothing is sorted: the k-th largest score is
found two bits at a time on the bit patterns of the floats, counting at every step how many scores
reach each candidate: 16 passes over the scores, without memory beyond them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def _largest(accepts: Callable[[jax.Array], jax.Array], bits: int) -> jax.Array:
    """Largest integer of `bits` bits, made even, that `accepts`, a predicate true up to a limit.

    Two bits a pass: the three counts of a pass read the scores once.
    """
    passes = -(-bits // 2)

    def set_bits(i, value):
        shift = (2 * (passes - 1 - i)).astype(jnp.uint32)
        accepted = [accepts(value | (jnp.uint32(digit) << shift)) for digit in (1, 2, 3)]
        return value | (sum(a.astype(jnp.uint32) for a in accepted) << shift)

    return lax.fori_loop(0, passes, set_bits, jnp.uint32(0))


def top_k_mask(scores: jax.Array, k: ArrayLike) -> jax.Array:
    """Marks the `k` entries of largest score, ties to the earlier position.

    Args:
      scores: Non-negative scores of any shape; compared as float32. Not NaN.
      k: Entries to keep, an integer in [0, scores.size]; may be traced.

    Returns:
      Boolean mask of the shape of `scores` with exactly `k` true entries.
    """
    k = jnp.asarray(k, jnp.int32)
    # The bit patterns of non-negative floats are ordered as the floats are; -0.0 loses its sign.
    patterns = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    patterns &= jnp.uint32(0x7FFFFFFF)
    threshold = _largest(lambda t: jnp.sum(patterns >= t, dtype=jnp.int32) >= k, bits=31)
    above, tied = patterns > threshold, patterns == threshold
    wanted = k - jnp.sum(above, dtype=jnp.int32)

    def keep_earliest():
        position = lax.iota(jnp.uint32, scores.size).reshape(scores.shape)
        end = _largest(
            lambda p: jnp.sum(tied & (position < p), dtype=jnp.int32) <= wanted,
            bits=scores.size.bit_length(),
        )
        return above | (tied & (position < end))

    # Mostly the k-th score is the only one of its value, and nothing is left to decide.
    enough = jnp.sum(tied, dtype=jnp.int32) == wanted
    return lax.cond(enough, lambda: above | tied, keep_earliest)


def row_top_k_mask(scores: jax.Array, k: ArrayLike) -> jax.Array:
    """Marks `k` entries spread evenly over the rows, the best of each row.

    Every row keeps ``k // rows`` entries; what is left of the budget goes, one entry each, to the
    rows whose next entry scores highest.

    Args:
      scores: Non-negative scores `[rows, cols]`.
      k: Entries to keep in total, in [0, rows * cols]; may be traced.

    Returns:
      Boolean mask `[rows, cols]` with exactly `k` true entries.
    """
    rows = scores.shape[0]
    each = jnp.asarray(k, jnp.int32) // rows
    mask = jax.vmap(top_k_mask, (0, None))(scores, each)
    best_left = jnp.max(jnp.where(mask, 0.0, scores), axis=1)
    extra = top_k_mask(best_left, jnp.asarray(k, jnp.int32) - each * rows)
    return jax.vmap(top_k_mask)(scores, each + extra)


def n_m_mask(scores: jax.Array, n: int, m: int) -> jax.Array:
    """Marks the best `n` of every `m` neighbours along a row (N:M sparsity).

    Args:
      scores: Non-negative scores `[rows, cols]`, `cols` a multiple of `m`.
      n: How many of m neighbours are kept.
      m: How many neighbours share them.

    Returns:
      Boolean mask `[rows, cols]` with exactly ``rows * cols * n / m`` true entries.
    """
    rows, cols = scores.shape
    neighbours = scores.reshape(rows, cols // m, m)
    mine, other = neighbours[..., :, None], neighbours[..., None, :]
    earlier = jnp.tril(jnp.ones((m, m), bool), -1)
    rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=-1)
    return (rank < n).reshape(rows, cols)
