"""The arithmetic of the device layout on raw arrays: lane order, slot positions, dense decode.

A matrix is stored as (values, codes, row_offsets, starts), see `format.MackoMatrix`. A *slot* is
one element of `values`; eight slots make a *group*; every row begins on a group boundary.
*Logical* order is column order within the row. *Memory* order cuts a row's groups into `lanes`
contiguous chunks and interleaves them, so that neighbouring GPU lanes read neighbouring groups.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GROUP = 8  # slots per group: 16 bytes of 16-bit values, 32 bits of 4-bit deltas
WORD = 32  # columns per bitmask word
WARP = BANKS = 32  # lanes, and banks of the shared memory from which they gather x
# Of the encodings with deltas in column order; a longer gap takes an explicit zero.
DELTA_BITS = {"delta4": 4, "delta5": 5, "two_bank": 3}
EVEN_FIRST = np.r_[0:GROUP:2, 1:GROUP:2]  # elements of a group


class Plane(NamedTuple):
    """A piece of the array `codes` that has a unit of memory for every group, which a lane loads.

    Attributes:
      size: bytes of a unit.
      before: bytes of a group in the planes before it.
      part: which of the code's parts (see `code_parts`) a unit belongs to.
      shift: the place of its lowest bit in that part.
    """

    size: int
    before: int = 0
    part: int = 0
    shift: int = 0


ONE_WORD = (Plane(4),)
PLANES = {
    "delta4": ONE_WORD,
    "two_bank": ONE_WORD,
    "delta5": (Plane(4), Plane(1, before=4, part=1)),
}


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


def _bytes(words, size: int):
    """The low `size` bytes of each word, uint8 [size * words]."""
    xp = words.__array_namespace__()
    return xp.stack([words >> (8 * i) for i in range(size)], axis=-1).reshape(-1).astype(np.uint8)


def _from_bytes(codes, size: int):
    """The inverse of `_bytes`."""
    parts = codes.reshape(-1, size).astype(np.uint32)
    return functools.reduce(lambda a, b: a | b, [parts[:, i] << (8 * i) for i in range(size)])


def deltas(words, bits: int):
    """[..., 8] the deltas of codes, whose first is in the lowest bits."""
    xp = words.__array_namespace__()
    return (words[..., None] >> xp.arange(0, bits * GROUP, bits, dtype=np.uint32)) & (2**bits - 1)


def join_deltas(delta, bits: int):
    """The inverse of `deltas`, uint32."""
    xp = delta.__array_namespace__()
    shifts = xp.arange(0, bits * GROUP, bits, dtype=np.uint32)
    return (delta.astype(np.uint32) << shifts).sum(axis=-1, dtype=np.uint32)


def code_parts(delta, encoding: str, join=join_deltas) -> tuple:
    """The codes of deltas [groups, 8], in parts uint32 [groups], which can be put in another order.

    Works on NumPy and JAX arrays, as all here of codes. 5-bit deltas are low nibbles, as in
    "delta4", and a byte of their highest bits. In "two_bank" they are in nibbles, without choices.
    """
    if PLANES[encoding] == ONE_WORD:
        return (join(delta, 4),)
    return join(delta & 15, 4), join(delta[..., EVEN_FIRST] >> 4, 1)


def code_planes(parts: tuple, encoding: str) -> tuple:
    """The planes of the parts of all codes: bytes, or words if there is one of whole words."""
    if PLANES[encoding] == ONE_WORD:
        return parts
    return tuple(_bytes(parts[plane.part] >> plane.shift, plane.size) for plane in PLANES[encoding])


def join_planes(planes: tuple):
    """The array `codes`, in which they lie one after the other."""
    return planes[0] if len(planes) == 1 else planes[0].__array_namespace__().concatenate(planes)


def join_parts(parts: tuple, encoding: str):
    """The array `codes` from the parts of all codes."""
    return join_planes(code_planes(parts, encoding))


def split_parts(codes, encoding: str) -> tuple:
    """The inverse of `join_parts`."""
    if PLANES[encoding] == ONE_WORD:
        return (codes,)
    groups = codes.shape[0] // code_bytes(encoding)
    return join_units(
        [
            _from_bytes(
                codes[plane.before * groups : (plane.before + plane.size) * groups], plane.size
            )
            for plane in PLANES[encoding]
        ],
        encoding,
    )


def join_units(units: list, encoding: str) -> tuple:
    """The parts of codes from their units in all planes; arrays, or registers of a kernel."""
    parts = {}
    for unit, plane in zip(units, PLANES[encoding], strict=True):
        unit = unit << plane.shift if plane.shift else unit
        parts[plane.part] = parts[plane.part] | unit if plane.part in parts else unit
    return tuple(parts.values())


def code_bytes(encoding: str) -> int:
    """Bytes of a group's code."""
    return sum(plane.size for plane in PLANES[encoding])


# Words whose bytes hold the deltas of elements 0, 2, 4, 6 and 1, 3, 5, 7, from the parts of a code;
# for arrays, and for registers of a kernel.


def spread_4_bits(code):
    return code & 0x0F0F0F0F, (code >> 4) & 0x0F0F0F0F


def spread_3_of_4_bits(code):
    return code & 0x07070707, (code >> 4) & 0x07070707


def spread_5_bits(nibbles, highest):
    low, high = spread_4_bits(nibbles)
    # Times this constant, bit i of four stands at 8 i + 4 among others, and no two at one place.
    return (
        low | (((highest & 0xF) * 0x02040810) & 0x10101010),
        high | (((highest >> 4) * 0x02040810) & 0x10101010),
    )


SPREAD = {"delta4": spread_4_bits, "delta5": spread_5_bits, "two_bank": spread_3_of_4_bits}


def prefix_bytes(parts: tuple, encoding: str):
    """Words whose bytes are the sums of deltas up to elements 0, 2, 4, 6 and 1, 3, 5, 7.

    From the parts of codes; arrays, or registers of a kernel. Adjacent deltas are added up in
    bytes, and one multiplication by 0x01010101 sums the bytes below each byte; eight deltas of up
    to 31 add up to 248, so no byte overflows.
    """
    low, high = SPREAD[encoding](*parts)
    odd = (low + high) * np.uint32(0x01010101)
    return odd - high, odd


def delta_prefixes(parts: tuple, encoding: str) -> list[jax.Array]:
    """Columns from a group's start to each of its eight slots: eight int32 arrays."""
    even, odd = prefix_bytes(parts, encoding)
    sums = [((odd if j % 2 else even) >> (8 * (j // 2))) & 0xFF for j in range(GROUP)]
    return [s.astype(np.int32) + j for j, s in enumerate(sums)]


def delta_totals(parts: tuple, encoding: str):
    """Columns that each group passes, [groups] int32, for NumPy and JAX arrays."""
    return (prefix_bytes(parts, encoding)[1] >> 24).astype(np.int32) + GROUP


def delta_bases(parts: tuple, encoding: str, row_offsets: jax.Array, row: jax.Array) -> jax.Array:
    """Column from which each group in logical order counts, [groups] int32."""
    advance = delta_totals(parts, encoding)
    # Wraps for matrices of more than 2**31 positions; differences inside a row are still right.
    before = jnp.cumsum(advance) - advance
    return before - before.at[row_offsets.at[row].get(mode="clip")].get(mode="clip")
