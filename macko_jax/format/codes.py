"""The arithmetic of codes, which say at what columns the elements of a group sit.

In the encodings with deltas every group of eight slots has a code: eight deltas, each the number of
columns skipped before its element. A code is kept as one or two integers, its *parts*: a word of
eight nibbles, element 0 in the lowest, and in "delta5" a byte with the fifth bit of every delta.
The array `codes` holds each part as a *bit plane*, that of all groups one after the other. A
"bitmask" has instead a bit for every column, 32 of them a word.

Everything here works on NumPy and on JAX arrays; what decodes a code works on the registers of a
kernel as well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from macko_jax.format.layout import GROUP, WORD, words_per_row

ENCODINGS = ("bitmask", "delta4", "delta5", "two_bank")
# Bits of a delta in the encodings that have them; a longer gap takes explicit zeros.
DELTA_BITS = {"delta4": 4, "delta5": 5, "two_bank": 3}
EVEN_FIRST = np.r_[0:GROUP:2, 1:GROUP:2]  # the order of elements in delta5's byte of fifth bits


class Plane(NamedTuple):
    """A bit plane: the piece of the array `codes` that holds one part of every group's code.

    Attributes:
      size: bytes that the part of one group takes.
      before: bytes that one group takes in the planes before this one.
    """

    size: int
    before: int = 0


ONE_WORD = (Plane(4),)
PLANES = {"delta4": ONE_WORD, "delta5": (Plane(4), Plane(1, before=4)), "two_bank": ONE_WORD}


def code_bytes(encoding: str) -> int:
    """Number of bytes of one group's code."""
    return sum(plane.size for plane in PLANES[encoding])


def join_nibbles(nibbles):
    """Words [...] uint32 of eight 4-bit numbers each, [..., 8] uint8, the first one lowest."""
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(np.uint32)[..., 0]


def code_parts(delta, encoding: str) -> tuple:
    """The parts of codes, each uint32 [groups], from deltas [groups, 8] uint8.

    In "two_bank" the highest bit of each nibble stays zero; it is for the element's bank.
    """
    if PLANES[encoding] == ONE_WORD:
        return (join_nibbles(delta),)
    xp = delta.__array_namespace__()
    fifth = xp.packbits(delta[..., EVEN_FIRST] >> 4, axis=-1, bitorder="little")
    return join_nibbles(delta & 15), fifth[..., 0].astype(np.uint32)


def join_parts(parts: tuple, encoding: str):
    """The array `codes`: the bit planes of all parts one after the other, a single one in words."""
    if PLANES[encoding] == ONE_WORD:
        return parts[0]
    planes = [
        part.astype(f"uint{8 * plane.size}").view(np.uint8)
        for part, plane in zip(parts, PLANES[encoding], strict=True)
    ]
    return planes[0].__array_namespace__().concatenate(planes)


def split_parts(codes, encoding: str) -> tuple:
    """The parts, each uint32 [groups], from the array `codes`."""
    if PLANES[encoding] == ONE_WORD:
        return (codes,)
    groups = codes.shape[0] // code_bytes(encoding)
    return tuple(
        codes[plane.before * groups : (plane.before + plane.size) * groups]
        .view(f"uint{8 * plane.size}")
        .astype(np.uint32)
        for plane in PLANES[encoding]
    )


# The spreads of a code are two words, whose bytes hold the deltas of elements 0, 2, 4, 6 and of
# elements 1, 3, 5, 7.


def _spread_4_bits(code):
    return code & 0x0F0F0F0F, (code >> 4) & 0x0F0F0F0F


def _spread_3_of_4_bits(code):
    return code & 0x07070707, (code >> 4) & 0x07070707


def _spread_5_bits(nibbles, fifth):
    low, high = _spread_4_bits(nibbles)
    # Times this constant, bit i of four stands at 8 i + 4 among others, and no two at one place.
    return (
        low | (((fifth & 0xF) * 0x02040810) & 0x10101010),
        high | (((fifth >> 4) * 0x02040810) & 0x10101010),
    )


SPREAD = {"delta4": _spread_4_bits, "delta5": _spread_5_bits, "two_bank": _spread_3_of_4_bits}


def prefix_bytes(parts: tuple, encoding: str):
    """Two words whose bytes are the sums of deltas up to elements 0, 2, 4, 6 and 1, 3, 5, 7.

    Adjacent deltas are added up in bytes, and one multiplication by 0x01010101 sums the bytes below
    each byte; eight deltas of up to 31 add up to 248, so no byte overflows.
    """
    low, high = SPREAD[encoding](*parts)
    odd = (low + high) * np.uint32(0x01010101)
    return odd - high, odd


def delta_prefixes(parts: tuple, encoding: str) -> list:
    """Columns from a group's start to each of its eight slots: eight int32 arrays."""
    even, odd = prefix_bytes(parts, encoding)
    sums = [((odd if j % 2 else even) >> (8 * (j // 2))) & 0xFF for j in range(GROUP)]
    return [s.astype(np.int32) + j for j, s in enumerate(sums)]


def delta_totals(parts: tuple, encoding: str):
    """Number of columns that each group passes, [groups] int32."""
    return (prefix_bytes(parts, encoding)[1] >> 24).astype(np.int32) + GROUP


def delta_bases(parts: tuple, encoding: str, row_offsets: jax.Array, row: jax.Array) -> jax.Array:
    """Column from which each group counts, [groups] int32, for groups in logical order."""
    advance = delta_totals(parts, encoding)
    # Wraps for matrices of more than 2**31 positions; differences inside a row are still right.
    before = jnp.cumsum(advance) - advance
    return before - before.at[row_offsets.at[row].get(mode="clip")].get(mode="clip")


def bit_ranks(codes: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """How many stored elements a row has before each position, and whether that one is stored.

    Args:
      codes: those of a "bitmask".
      shape: (rows, cols).

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
