"""Packing on a device: a jitted pass that counts, then one that fills arrays of static sizes.

Everything but the values is worked out on the bitmask, 32 columns a word, so that prefix sums run
over a thirty-second of the matrix.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from macko_jax import layout
from macko_jax.layout import GROUP, MAX_DELTA, WORD


class Elements(NamedTuple):
    """Where the non-zero elements are.

    Attributes:
      words: [rows, width] uint32, bit b of word w is set where column 32 w + b is not zero.
      gap: [rows, width] int32, zeros before each word's first element, since the row's previous one.
      far: [rows, width] int32, 1 where 16 zeros and more lie between two elements of a word.
      count: int32, groups of the whole matrix by encoding, [bitmask, delta4].
    """
    words: jax.Array
    gap: jax.Array
    far: jax.Array
    count: jax.Array


@jax.jit
def find(weight: jax.Array) -> Elements:
    rows, cols = weight.shape
    width = layout.words_per_row(cols)
    mask = jnp.pad(~layout.is_zero(weight), ((0, 0), (0, WORD * width - cols))).reshape(rows, width, WORD)
    bit = jnp.arange(WORD, dtype=jnp.uint32)
    words = jnp.sum(jnp.where(mask, jnp.uint32(1) << bit, 0), axis=-1, dtype=jnp.uint32)

    column = WORD * jnp.arange(width, dtype=jnp.int32)
    first = column + _trailing_zeros(words)
    last = jnp.where(words != 0, column + WORD - 1 - lax.clz(words).astype(jnp.int32), -1)
    previous = lax.cummax(last, axis=1)
    previous = jnp.pad(previous[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    gap = jnp.where(words != 0, first - previous - 1, 0)
    elements = Elements(words, gap, (_long_gap(words) != 0).astype(jnp.int32), None)
    count = [jnp.sum(-(-_slots(elements, e).sum(axis=1) // GROUP)) for e in ("bitmask", "delta4")]
    return elements._replace(count=jnp.stack(count))


def count_groups(elements: Elements, encoding: str) -> int:
    return int(elements.count[("bitmask", "delta4").index(encoding)])


def fill(weight: jax.Array, elements: Elements, encoding: str, lanes: int, capacity: int):
    """values, codes, row_offsets and starts, with room for `capacity` groups.

    The expensive program is compiled for a rounded size and cut to `capacity`, since every matrix
    has another number of groups.
    """
    step = 1 << max(0, capacity.bit_length() - 5)
    groups = max(1, -(-capacity // step)) * step  # at least one: gathers need a source
    values, codes, offsets, starts = _fill(
        weight, elements, encoding=encoding, lanes=lanes, groups=groups)
    if groups > capacity:
        values = values[:GROUP * capacity]
        codes = codes[:capacity] if encoding == "delta4" else codes
    return values, codes, offsets, starts


@functools.partial(jax.jit, static_argnames=("encoding", "lanes", "groups"))
def _fill(weight, elements: Elements, *, encoding: str, lanes: int, groups: int):
    (rows, cols), words = weight.shape, elements.words
    slots = _slots(elements, encoding)
    in_row = jnp.sum(slots, axis=1)
    count = -(-in_row // GROUP)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count)])
    before = GROUP * offsets[:-1, None] + jnp.cumsum(slots, axis=1) - slots

    # Slot in column order of every element, one past the end where there is none.
    bit = jnp.arange(WORD, dtype=jnp.uint32)
    lower = words[:, :, None] & ((jnp.uint32(1) << bit) - 1)
    slot = before[:, :, None] + lax.population_count(lower).astype(jnp.int32)
    if encoding == "delta4":
        behind_gap = bit.astype(jnp.int32) > _trailing_zeros(_long_gap(words))[:, :, None]
        slot += (elements.gap >> 4)[:, :, None] + elements.far[:, :, None] * behind_gap
    present = (words[:, :, None] >> bit) & 1 == 1
    slot = jnp.where(present, slot, GROUP * groups).reshape(rows, -1)[:, :cols]

    def scatter(initial, index, updates):
        return initial.at[index].set(updates, mode="drop", unique_indices=True)

    values = scatter(jnp.zeros(GROUP * groups, weight.dtype), slot, weight)
    row = layout.group_rows(offsets, groups)
    chunk = layout.lane_chunks(count, lanes)
    if encoding == "bitmask":
        codes = words.reshape(-1)
        # The column after each full group's last element is where the next group may start.
        column = jnp.broadcast_to(jnp.arange(cols, dtype=jnp.int32), (rows, cols))
        ends = jnp.where(slot % GROUP == GROUP - 1, slot // GROUP, groups)
        ends = scatter(jnp.zeros(groups, jnp.int32), ends, column + 1)
        start = ends.at[offsets[:-1, None] + chunk - 1].get(mode="fill", fill_value=0)
        start = jnp.where(chunk > 0, start, 0)
    else:
        local = jnp.arange(GROUP * groups, dtype=jnp.int32).reshape(groups, GROUP)
        local -= GROUP * offsets.at[row].get(mode="clip")[:, None]
        used = local < in_row.at[row].get(mode="fill", fill_value=0)[:, None]
        gap = bit.astype(jnp.int32) - (WORD - lax.clz(lower).astype(jnp.int32))
        gap = jnp.where(lower == 0, elements.gap[:, :, None], gap)
        gap = (gap & MAX_DELTA).astype(jnp.uint8).reshape(rows, -1)[:, :cols]
        delta = jnp.where(used, jnp.uint8(MAX_DELTA), jnp.uint8(0)).reshape(-1)
        delta = scatter(delta, slot, gap).reshape(groups, GROUP).astype(jnp.uint32)
        nibble = 4 * jnp.arange(GROUP, dtype=jnp.uint32)
        codes = jnp.sum(delta << nibble, axis=1, dtype=jnp.uint32)
        base = layout.delta_bases(codes, offsets, row)
        start = base.at[offsets[:-1, None] + chunk].get(mode="clip")

    order = layout.column_order(offsets, row, lanes)
    values = layout.reorder(values.reshape(groups, GROUP), order, lanes).reshape(-1)
    codes = layout.reorder(codes, order, lanes) if encoding == "delta4" else codes
    starts = jnp.where(chunk < count[:, None], start, cols).astype(layout.start_dtype(cols))
    return values, codes, offsets, starts


def _slots(elements: Elements, encoding: str) -> jax.Array:
    """Number of slots that each word's elements take, [rows, width] int32."""
    slots = lax.population_count(elements.words).astype(jnp.int32)
    return slots if encoding == "bitmask" else slots + (elements.gap >> 4) + elements.far


def _trailing_zeros(words: jax.Array) -> jax.Array:
    """Index of the lowest set bit, 32 for none, int32."""
    return lax.population_count(~words & (words - 1)).astype(jnp.int32)


def _long_gap(words: jax.Array) -> jax.Array:
    """Marks the lowest bits of 16 zeros in a row between two set bits; there is at most one gap."""
    between = (words - 1) & ~words  # below the lowest set bit ...
    highest = lax.clz(words)
    above = ~(jnp.uint32(0xFFFFFFFF) >> highest)  # ... and above the highest; both do not count
    zeros = jnp.where(words != 0, ~words & ~between & ~above, 0)
    for shift in (1, 2, 4, 8):  # runs of 2, 4, 8, 16 zeros
        zeros &= zeros >> shift
    return zeros
