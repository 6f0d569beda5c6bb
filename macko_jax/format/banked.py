"""The encoding "banked": every GPU lane owns the columns of one shared-memory bank.

Lane l of 32 owns the columns c with c mod 32 = l, its *places* are c // 32. Its elements of a row
lie in groups of eight, with eight 3-bit deltas each: the number of the lane's places skipped before
an element. Gaps of 8 places and more store an explicit zero in every eighth, and zeros with delta 0
fill up the last group. Step t of a row holds the t-th group of every lane that has one, in the
order of lanes.

A word of x for every column of 32 lanes then lies in 32 banks of shared memory: a gather takes one
turn, where lanes of contiguous columns ("delta4") take 3.6.
"""

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax.format.layout import GROUP, deltas, split_parts

LANES = 32
BITS = 3
MAX_DELTA = 2**BITS - 1


def places(cols: int) -> int:
    """Number of columns that a lane owns, of one row."""
    return -(-cols // LANES)


def most_groups(cols: int) -> int:
    """Bound of a lane's groups in one row: no two elements share a place."""
    return -(-places(cols) // GROUP)


def count_dtype(cols: int) -> np.dtype:
    """Integer type of the lanes' numbers of groups."""
    return np.min_scalar_type(most_groups(cols))


def lane_major(counts: np.ndarray) -> np.ndarray:
    """For every group in memory order, its index when lane follows lane, [groups]; NumPy."""
    counts = counts.astype(np.int64)
    begin = (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape)
    step = np.arange(counts.max(initial=0))[:, None]
    # Memory order is that of (row, step, lane).
    return (begin[:, None, :] + step)[step < counts[:, None, :]]


def step_positions(counts: jax.Array, row_offsets: jax.Array, steps: int, groups: int) -> jax.Array:
    """Memory index of group (row, step, lane), [rows, steps, 32]; `groups` where there is none.

    Args:
      counts: [rows, 32] groups of each lane.
      row_offsets: [rows + 1].
    """
    live = jnp.arange(steps)[:, None] < counts[:, None, :].astype(jnp.int32)
    size = jnp.sum(live, axis=2, dtype=jnp.int32)
    begin = row_offsets[:-1, None] + jnp.cumsum(size, axis=1) - size
    rank = jnp.cumsum(live, axis=2, dtype=jnp.int32) - live
    return jnp.where(live, begin[:, :, None] + rank, groups)


def slot_columns(codes, row_offsets, counts, *, cols: int) -> jax.Array:
    """Column of every slot in memory order, [groups, 8] int32; `cols` and more for no element."""
    [words] = split_parts(codes, "banked")
    groups, steps = words.shape[0], most_groups(cols)
    if groups == 0:
        return jnp.zeros((0, GROUP), jnp.int32)
    at = step_positions(counts, row_offsets, steps, groups)
    delta = deltas(words.at[at].get(mode="fill", fill_value=0), BITS).astype(jnp.int32)
    within = jnp.cumsum(delta + 1, axis=3)
    passed = jnp.cumsum(within[..., -1], axis=1) - within[..., -1]
    place = passed[..., None] + within - 1
    column = LANES * place + jnp.arange(LANES, dtype=jnp.int32)[:, None]
    empty = jnp.full((groups, GROUP), cols, jnp.int32)
    return empty.at[at].set(column, mode="drop", unique_indices=True)
