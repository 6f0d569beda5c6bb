"""The arithmetic of the device layout on raw arrays: lane order, slot positions, dense decode.

A matrix is stored as (values, codes, row_offsets, starts), see `format.MackoMatrix`. A *slot* is
one element of `values`; eight slots make a *group*; every row begins on a group boundary.
*Logical* order is column order within the row. *Memory* order cuts a row's groups into `lanes`
contiguous chunks and interleaves them, so that neighbouring GPU lanes read neighbouring groups.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GROUP = 8  # slots per group: 16 bytes of 16-bit values, 32 bits of 4-bit deltas
WORD = 32  # columns per bitmask word
DELTA_BITS = {"delta4": 4, "delta3": 3}  # of an element; a longer gap takes an explicit zero
CODE_BYTES = 3  # of a group of 3-bit deltas: two in a first plane, one in a second


def words_per_row(cols: int) -> int:
    """Number of 32-bit words of one row's bitmask."""
    return -(-cols // WORD)


def start_dtype(cols: int) -> np.dtype:
    """Integer type of the lanes' first columns."""
    return np.dtype(np.uint16 if cols <= np.iinfo(np.uint16).max else np.uint32)


def is_zero(values: jax.Array) -> jax.Array:
    """True for +0.0 and -0.0 alone; by bits, since a device may compare subnormals as zeros."""
    bits = lax.bitcast_convert_type(values, f"uint{8 * values.dtype.itemsize}")
    return bits << 1 == 0


def masked(values: jax.Array, pattern: jax.Array) -> jax.Array:
    """The values where the pattern is not zero, and zero elsewhere; all of them if it is empty."""
    return jnp.where(is_zero(pattern), jnp.zeros_like(values), values) if pattern.size else values


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


def group_rows(row_offsets: jax.Array, groups: int) -> jax.Array:
    """Row of every group, [groups] int32; groups beyond row_offsets[-1] get `rows`."""
    rows = row_offsets.shape[0] - 1
    counts = jnp.diff(row_offsets, append=groups)
    return jnp.repeat(jnp.arange(rows + 1, dtype=jnp.int32), counts, total_repeat_length=groups)


def _order(rule, row_offsets: jax.Array, row: jax.Array, lanes: int) -> jax.Array:
    index = jnp.arange(row.shape[0], dtype=jnp.int32)
    if lanes == 1:
        return index
    begin = row_offsets.at[row].get(mode="clip")
    end = row_offsets.at[row + 1].get(mode="clip")
    ordered = begin + rule(index - begin, end - begin, lanes)
    return jnp.where(index < row_offsets[-1], ordered, index)  # spare capacity stays in place


def column_order(row_offsets: jax.Array, row: jax.Array, lanes: int) -> jax.Array:
    """For every group in memory order, its index in logical order, [groups] int32."""
    return _order(logical_group, row_offsets, row, lanes)


def memory_order(row_offsets: jax.Array, row: jax.Array, lanes: int) -> jax.Array:
    """For every group in logical order, its index in memory order, [groups] int32."""
    return _order(memory_group, row_offsets, row, lanes)


def reorder(groups: jax.Array, order: jax.Array, lanes: int) -> jax.Array:
    """`groups[order]` along the leading axis; with one lane every order is the identity."""
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


def split_codes(words, capacity: int):
    """uint8 [3 * capacity] from 24-bit codes uint32 [capacity]: low 16 bits, then high 8.

    Lanes then load whole units. Works on NumPy and JAX arrays, as all here of such codes.
    """
    xp = words.__array_namespace__()
    low = xp.stack([words & 0xFF, (words >> 8) & 0xFF], axis=-1).reshape(2 * capacity)
    return xp.concatenate([low, words >> 16]).astype(np.uint8)


def join_codes(codes):
    """The inverse of `split_codes`."""
    xp, groups = codes.__array_namespace__(), codes.shape[0] // CODE_BYTES
    codes = codes.astype(np.uint32)
    low = codes[:2 * groups].reshape(groups, 2)
    return low[:, 0] | (low[:, 1] << xp.uint32(8)) | (codes[2 * groups:] << xp.uint32(16))


def deltas(words, bits: int):
    """[..., 8] the deltas of codes, whose first is in the lowest bits."""
    xp = words.__array_namespace__()
    return (words[..., None] >> xp.arange(0, bits * GROUP, bits, dtype=np.uint32)) & (2**bits - 1)


def join_deltas(delta, bits: int):
    """The inverse of `deltas`, uint32."""
    xp = delta.__array_namespace__()
    shifts = xp.arange(0, bits * GROUP, bits, dtype=np.uint32)
    return (delta.astype(np.uint32) << shifts).sum(axis=-1, dtype=np.uint32)


def nibbles(codes, encoding: str):
    """The deltas of a matrix as codes of "delta4", uint32 [groups], whatever bits they have."""
    return codes if encoding == "delta4" else _respace(join_codes(codes), DELTA_BITS[encoding], 4)


def from_nibbles(codes, encoding: str):
    """The inverse of `nibbles`."""
    if encoding == "delta4":
        return codes
    return split_codes(_respace(codes, 4, DELTA_BITS[encoding]), codes.shape[0])


def _respace(words, bits: int, new_bits: int):
    """Codes of deltas of `bits` as codes of `new_bits`; what does not fit is cut off."""
    mask = np.uint32(2**min(bits, new_bits) - 1)
    parts = [((words >> np.uint32(bits * j)) & mask) << np.uint32(new_bits * j)
             for j in range(GROUP)]
    return functools.reduce(lambda a, b: a | b, parts)


def delta_prefixes(codes: jax.Array) -> list[jax.Array]:
    """Columns from a group's start to each of its eight slots, eight arrays like `codes`, int32.

    Eight prefix sums at once: adjacent nibbles are paired into bytes, and one multiplication by
    0x01010101 sums the bytes below each byte; the deltas add up to 120, so no byte overflows.
    """
    even, odd = _delta_bytes(codes)
    sums = [((odd if j % 2 else even) >> (8 * (j // 2))) & 0xFF for j in range(GROUP)]
    return [s.astype(np.int32) + j for j, s in enumerate(sums)]


def delta_totals(codes) -> jax.Array:
    """Columns that each group of delta4 codes passes, [groups] int32, for NumPy and JAX arrays."""
    return (_delta_bytes(codes)[1] >> 24).astype(np.int32) + GROUP


def _delta_bytes(codes):
    """Words whose bytes are the sums of deltas up to elements 0, 2, 4, 6 and 1, 3, 5, 7."""
    low, high = codes & 0x0F0F0F0F, (codes >> 4) & 0x0F0F0F0F
    odd = (low + high) * np.uint32(0x01010101)
    return odd - high, odd


def delta_bases(codes: jax.Array, row_offsets: jax.Array, row: jax.Array) -> jax.Array:
    """Column from which each group of delta4 codes in logical order counts, [groups] int32."""
    advance = delta_totals(codes)
    # Wraps for matrices of more than 2**31 positions; differences inside a row are still right.
    before = jnp.cumsum(advance) - advance
    return before - before.at[row_offsets.at[row].get(mode="clip")].get(mode="clip")
