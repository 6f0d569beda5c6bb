"""Where groups lie in memory: slots, lane chunks, orders, row offsets.

A matrix is stored as (values, codes, row_offsets, starts), see `format.MackoMatrix`. A *slot* is
one element of `values`; eight slots make a *group*; every row begins on a group boundary.
*Logical* order is column order within the row. *Memory* order cuts a row's groups into `lanes`
contiguous chunks and interleaves them, so that neighbouring GPU lanes read neighbouring groups.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 8  # slots per group: 16 bytes of 16-bit values, 32 bits of 4-bit deltas
WORD = 32  # columns per bitmask word
MAX_COLS = 2**26  # keeps the arithmetic of `memory_group` exact
MAX_STORED = np.iinfo(np.int32).max  # slots, counted by 32-bit offsets
LANES = (1, 2, 4, 8, 16, 32)  # that may share a row
WARP = BANKS = 32  # lanes, and banks of the shared memory from which they gather x


@dataclasses.dataclass(frozen=True)
class Layout:
    """The description of a matrix that a program is compiled for; see `matrix.MackoMatrix`.

    Attributes:
      shape: (rows, cols).
      encoding: how `codes` tell positions.
      lanes: number of lanes that share a row.
      stored: number of slots.
    """

    shape: tuple[int, int]
    encoding: str
    lanes: int
    stored: int


class Positions(NamedTuple):
    """The arrays that say where the values of a matrix sit; see `matrix.MackoMatrix`."""

    codes: Any
    row_offsets: Any
    starts: Any


def words_per_row(cols: int) -> int:
    """Number of 32-bit words of one row's bitmask."""
    return -(-cols // WORD)


def start_dtype(cols: int) -> np.dtype:
    """Integer type of the lanes' first columns."""
    return np.dtype(np.uint16 if cols <= np.iinfo(np.uint16).max else np.uint32)


def is_zero(values):
    """True for +0.0 and -0.0 alone; by bits, since a device may compare subnormals as zeros."""
    return values.view(f"uint{8 * values.dtype.itemsize}") << 1 == 0


def masked(values: jax.Array, pattern: jax.Array) -> jax.Array:
    """The values where the pattern is not zero, and zero elsewhere; all of them if it is a scalar.

    (XLA of jax 0.11 crashes where an empty array goes into a loop inside `shard_map`.)
    """
    return jnp.where(is_zero(pattern), jnp.zeros_like(values), values) if pattern.ndim else values


def lane_chunks(count, lanes: int):
    """First group of each lane's chunk in column order, [rows, lanes], for rows of `count` groups.

    Works on NumPy and JAX integer arrays. A chunk is empty where its first group is `count`.
    """
    lane = np.arange(lanes, dtype=np.int32)
    minimum = count.__array_namespace__().minimum
    return lane * (count // lanes)[:, None] + minimum(lane, (count % lanes)[:, None])


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


def memory_group(logical, count, lanes: int):
    """The inverse of `logical_group`: index in memory of the row's group at `logical`.

    Divides in float32, which has vector instructions. Half a group keeps the quotient away from
    integers, since a GPU's division errs by some 2**-22: it is exact below 2**20 groups a row.
    """
    if lanes == 1:
        return logical
    q, rem = count // lanes, count % lanes
    longer = rem * (q + 1)  # groups in the chunks that hold one more
    in_longer = logical < longer
    within = jnp.where(in_longer, logical, logical - longer)
    size = jnp.maximum(jnp.where(in_longer, q + 1, q), 1)
    quotient = (within.astype(jnp.float32) + 0.5) / size.astype(jnp.float32)
    chunk = jnp.floor(quotient).astype(jnp.int32)
    step = within - chunk * size
    return step * lanes + jnp.where(in_longer, chunk, chunk + rem)


def repeat(array, counts, total: int) -> Any:
    """Repeats entries as often as `counts` says, to `total` of them; only JAX has to be told."""
    if isinstance(counts, np.ndarray):
        return np.repeat(array, counts)
    return jnp.repeat(array, counts, total_repeat_length=total)


def group_rows(row_offsets, groups: int) -> Any:
    """Row of every group, [groups] int32; groups beyond row_offsets[-1] get `rows`."""
    xp, rows = row_offsets.__array_namespace__(), row_offsets.shape[0] - 1
    counts = xp.diff(row_offsets, append=xp.asarray([groups], row_offsets.dtype))
    return repeat(xp.arange(rows + 1, dtype=np.int32), counts, groups)


def _order(rule, row_offsets, row, lanes: int) -> Any:
    xp = row.__array_namespace__()
    index = xp.arange(row.shape[0], dtype=np.int32)
    if lanes == 1:
        return index
    begin = xp.take(row_offsets, row, mode="clip")
    end = xp.take(row_offsets, row + 1, mode="clip")
    ordered = begin + rule(index - begin, end - begin, lanes)
    return xp.where(index < row_offsets[-1], ordered, index)  # spare capacity stays in place


def column_order(row_offsets, row, lanes: int) -> Any:
    """For every group in memory order, its index in logical order, [groups] int32."""
    return _order(logical_group, row_offsets, row, lanes)


def memory_order(row_offsets: jax.Array, row: jax.Array, lanes: int) -> jax.Array:
    """For every group in logical order, its index in memory order, [groups] int32."""
    return _order(memory_group, row_offsets, row, lanes)


def reorder(groups, order, lanes: int) -> Any:
    """`groups[order]` along the leading axis; with one lane every order is the identity."""
    if lanes == 1:
        return groups
    if isinstance(groups, np.ndarray):
        return groups[order]
    return groups.at[order].get(mode="promise_in_bounds", unique_indices=True)
