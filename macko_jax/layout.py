"""The arithmetic of the device layout on raw arrays: lane order, slot positions, dense decode.

A matrix is stored as (values, codes, row_offsets, starts), see `format.MackoMatrix`. A *slot* is
one element of `values`; eight slots make a *group*; every row begins on a group boundary.
*Logical* order is column order within the row. *Memory* order cuts a row's groups into `lanes`
contiguous chunks and interleaves them, so that neighbouring GPU lanes read neighbouring groups.
"""
import jax
import jax.numpy as jnp
from jax import lax

GROUP = 8  # slots per group: 16 bytes of 16-bit values, 32 bits of 4-bit deltas
WORD = 32  # columns per bitmask word
MAX_DELTA = 15  # the largest 4-bit delta; a longer gap takes an explicit zero


def words_per_row(cols: int) -> int:
    """Number of 32-bit words of one row's bitmask."""
    return -(-cols // WORD)


def logical_group(local, count, lanes: int):
    """Index in column order of the group at memory index `local` of a row of `count` groups.

    Works on NumPy and JAX integer arrays. With q, rem = divmod(count, lanes), lane l owns q groups,
    and one more when l < rem; memory slot t * lanes + l holds its t-th group. `lanes` is a power of
    two, so no division is needed.
    """
    shift = lanes.bit_length() - 1
    lane, step = local & (lanes - 1), local >> shift
    q, rem = count >> shift, count & (lanes - 1)
    minimum = local.__array_namespace__().minimum
    return lane * q + minimum(lane, rem) + step


def group_rows(row_offsets: jax.Array, groups: int) -> jax.Array:
    """Row of every group, [groups] int32; groups beyond row_offsets[-1] get `rows`."""
    rows = row_offsets.shape[0] - 1
    counts = jnp.diff(row_offsets, append=groups)
    return jnp.repeat(jnp.arange(rows + 1, dtype=jnp.int32), counts, total_repeat_length=groups)


def column_order(row_offsets: jax.Array, row: jax.Array, lanes: int) -> jax.Array:
    """For every group in memory order, its index in logical order, [groups] int32."""
    memory = jnp.arange(row.shape[0], dtype=jnp.int32)
    if lanes == 1:
        return memory
    begin = row_offsets.at[row].get(mode="clip")
    end = row_offsets.at[row + 1].get(mode="clip")
    logical = begin + logical_group(memory - begin, end - begin, lanes)
    return jnp.where(memory < row_offsets[-1], logical, memory)  # spare capacity stays in place


def to_logical(groups: jax.Array, order: jax.Array, lanes: int) -> jax.Array:
    """Reorders an array with a leading group axis from memory order to logical order."""
    if lanes == 1:
        return groups
    memory = jnp.arange(order.shape[0], dtype=jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(memory, unique_indices=True)
    return groups.at[inverse].get(mode="promise_in_bounds", unique_indices=True)


def to_memory(groups: jax.Array, order: jax.Array, lanes: int) -> jax.Array:
    """Reorders an array with a leading group axis from logical order to memory order."""
    if lanes == 1:
        return groups
    return groups.at[order].get(mode="promise_in_bounds", unique_indices=True)


def bit_ranks(codes: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Of every matrix position, how many stored elements its row has before it, and if it is stored.

    Returns:
      rank: [rows, cols] int32; stored: [rows, cols] bool.
    """
    rows, cols = shape
    words = codes.reshape(rows, words_per_row(cols))
    count = lax.population_count(words).astype(jnp.int32)
    before_word = jnp.cumsum(count, axis=1) - count
    bit = jnp.arange(WORD, dtype=jnp.uint32)
    below = (jnp.uint32(1) << bit) - 1
    in_word = lax.population_count(words[:, :, None] & below).astype(jnp.int32)
    rank = before_word[:, :, None] + in_word
    stored = (words[:, :, None] >> bit) & 1 == 1
    return rank.reshape(rows, -1)[:, :cols], stored.reshape(rows, -1)[:, :cols]


def delta_columns(codes: jax.Array, row_offsets: jax.Array, row: jax.Array) -> jax.Array:
    """Column of every slot of delta4 codes in logical order, [groups, 8] int32."""
    nibble = jnp.arange(GROUP, dtype=jnp.uint32) * 4
    advance = ((codes[:, None] >> nibble) & MAX_DELTA).astype(jnp.int32) + 1
    within = jnp.cumsum(advance, axis=1)
    # Wraps for matrices of more than 2**31 positions; differences inside a row are still right.
    after = jnp.cumsum(within[:, -1])
    before = after - within[:, -1]
    row_begin = row_offsets.at[row].get(mode="clip")
    return (before - before.at[row_begin].get(mode="clip"))[:, None] + within - 1


def slot_positions(codes, row_offsets, *, stored: int, shape, encoding: str, lanes: int):
    """Row, column and validity of every slot, in memory order.

    A valid slot has a position in the matrix. In "bitmask" the slots that fill up a row's last
    group are not valid. In "delta4" such slots look like elements and hold the value zero; only
    those that run past the last column are known from the codes alone.

    Returns:
      row, column: [stored] int32, in range for every slot; valid: [stored] bool.
    """
    rows, cols = shape
    groups = stored // GROUP
    row = group_rows(row_offsets, groups)
    order = column_order(row_offsets, row, lanes)
    if encoding == "bitmask":
        rank, is_stored = bit_ranks(codes, shape)
        slot = jnp.where(is_stored, GROUP * row_offsets[:-1, None] + rank, stored)
        column = jnp.full(stored, cols, jnp.int32).at[slot].set(
            jnp.arange(cols, dtype=jnp.int32), mode="drop", unique_indices=True)
        column = column.reshape(groups, GROUP)
    else:
        column = delta_columns(to_logical(codes, order, lanes), row_offsets, row)
    column = to_memory(column, order, lanes)
    valid = (column < cols) & (row < rows)[:, None]
    column = jnp.where(valid, column, 0)
    row = jnp.broadcast_to(jnp.minimum(row, rows - 1)[:, None], column.shape)
    return row.reshape(-1), column.reshape(-1), valid.reshape(-1)


def decode_dense(values, codes, row_offsets, *, shape, encoding: str, lanes: int) -> jax.Array:
    """The matrix as a dense array [rows, cols] of the values' dtype."""
    stored = values.shape[0]
    if stored == 0 or 0 in shape:
        return jnp.zeros(shape, values.dtype)
    if encoding == "bitmask":
        groups = stored // GROUP
        order = column_order(row_offsets, group_rows(row_offsets, groups), lanes)
        logical = to_logical(values.reshape(groups, GROUP), order, lanes).reshape(-1)
        rank, is_stored = bit_ranks(codes, shape)
        slot = GROUP * row_offsets[:-1, None] + rank
        return jnp.where(is_stored, logical.at[slot].get(mode="clip"), jnp.zeros((), values.dtype))
    row, column, valid = slot_positions(
        codes, row_offsets, stored=stored, shape=shape, encoding=encoding, lanes=lanes)
    row = jnp.where(valid, row, shape[0])
    return jnp.zeros(shape, values.dtype).at[row, column].set(
        values, mode="drop", unique_indices=True)
