"""Packing on a device: a jitted pass that counts, then one that fills arrays of static sizes.

Everything but the values is worked out on the bitmask, 32 columns a word, so that prefix sums run
over a thirty-second of the matrix.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from macko_jax.format import layout, two_bank
from macko_jax.format.layout import GROUP, WORD


@jax.jit
def find(weight: jax.Array) -> jax.Array:
    """Words [rows, width] uint32: bit b of word w is set where column 32 w + b is not zero."""
    rows, cols = weight.shape
    width = layout.words_per_row(cols)
    mask = jnp.pad(~layout.is_zero(weight), ((0, 0), (0, WORD * width - cols))).reshape(
        rows, width, WORD
    )
    bit = jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.sum(jnp.where(mask, jnp.uint32(1) << bit, 0), axis=-1, dtype=jnp.uint32)


def count_groups(elements: jax.Array, encoding: str) -> int:
    """Groups of the whole matrix, of what `find` found."""
    return int(_count_groups(elements, encoding))


@functools.partial(jax.jit, static_argnames="encoding")
def _count_groups(elements: jax.Array, encoding: str) -> jax.Array:
    return jnp.sum(-(-_slots(_stored(elements, encoding)).sum(axis=1) // GROUP))


def fill(weight: jax.Array, elements: jax.Array, encoding: str, lanes: int, capacity: int):
    """values, codes, row_offsets and starts, with room for `capacity` groups.

    The expensive program is compiled for a rounded size and cut to `capacity`, since every matrix
    has another number of groups.
    """
    step = 1 << max(0, capacity.bit_length() - 5)
    groups = max(1, -(-capacity // step)) * step  # at least one: gathers need a source
    values, codes, offsets, starts = _fill(
        weight, elements, encoding=encoding, lanes=lanes, groups=groups
    )
    if encoding != "bitmask":
        codes = layout.join_planes(
            tuple(plane[: plane.size // groups * capacity] for plane in codes)
        )
    return values[: GROUP * capacity], codes, offsets, starts


@functools.partial(jax.jit, static_argnames=("encoding", "lanes", "groups"))
def _fill(weight, elements: jax.Array, *, encoding: str, lanes: int, groups: int):
    """As `fill`, but the planes of codes of deltas apart."""
    (rows, cols), words = weight.shape, _stored(elements, encoding)
    slots = _slots(words)
    in_row = jnp.sum(slots, axis=1)
    count = -(-in_row // GROUP)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count)])
    before = GROUP * offsets[:-1, None] + jnp.cumsum(slots, axis=1) - slots

    # Slot in column order of every element, one past the end where there is none.
    bit = jnp.arange(WORD, dtype=jnp.uint32)
    lower = words[:, :, None] & ((jnp.uint32(1) << bit) - 1)
    slot = before[:, :, None] + lax.population_count(lower).astype(jnp.int32)
    present = (words[:, :, None] >> bit) & 1 == 1
    slot = jnp.where(present, slot, GROUP * groups).reshape(rows, -1)[:, :cols]

    def scatter(initial, index, updates):
        return initial.at[index].set(updates, mode="drop", unique_indices=True)

    values = scatter(
        jnp.zeros(GROUP * groups, weight.dtype), slot, jnp.where(layout.is_zero(weight), 0, weight)
    )
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
        gap = bit.astype(jnp.int32) - (WORD - lax.clz(lower).astype(jnp.int32))
        first = WORD * jnp.arange(words.shape[1], dtype=jnp.int32) - _last_before(words) - 1
        gap = jnp.where(lower == 0, first[:, :, None] + bit.astype(jnp.int32), gap)
        gap = gap.astype(jnp.uint8).reshape(rows, -1)[:, :cols]
        delta = scatter(jnp.zeros(GROUP * groups, jnp.uint8), slot, gap).reshape(groups, GROUP)
        parts = layout.code_parts(delta, encoding)
        base = layout.delta_bases(parts, encoding, offsets, row)
        start = base.at[offsets[:-1, None] + chunk].get(mode="clip")

    order = layout.column_order(offsets, row, lanes)
    values = layout.reorder(values.reshape(groups, GROUP), order, lanes).reshape(-1)
    if encoding != "bitmask":
        parts = tuple(layout.reorder(part, order, lanes) for part in parts)
        if encoding == "two_bank":
            bank = layout.reorder(two_bank.banks(base, delta), order, lanes)
            parts = (parts[0] | _choices(bank, offsets[:-1], count, lanes),)
        codes = layout.code_planes(parts, encoding)
    starts = jnp.where(chunk < count[:, None], start, cols).astype(layout.start_dtype(cols))
    return values, codes, offsets, starts


def _choices(bank: jax.Array, begin: jax.Array, count: jax.Array, lanes: int) -> jax.Array:
    """As `packing_numpy.choices`."""
    groups, rows = bank.shape[0], begin.shape[0]
    visits = two_bank.turns(
        begin, count, lanes, groups, total_repeat_length=two_bank.most_turns(rows, groups, lanes)
    )

    def visit(taken, turn):
        lane, banks, before = turn
        chosen, taken = two_bank.choose(banks.astype(jnp.uint32), lane, taken, before)
        return taken, chosen

    lane = jnp.arange(layout.WARP, dtype=jnp.uint32)
    banks = bank.at[visits].get(mode="fill", fill_value=layout.BANKS)
    nothing = (jnp.zeros((visits.shape[1], GROUP), jnp.uint32),) * 3
    taken, chosen = lax.scan(visit, nothing, (lane, banks, None))
    _, chosen = lax.scan(visit, taken, (lane, banks, chosen))
    choices = layout.join_deltas(chosen, 4) << 3
    return jnp.zeros(groups, jnp.uint32).at[visits].set(choices, mode="drop", unique_indices=True)


def _stored(elements: jax.Array, encoding: str) -> jax.Array:
    """Words with a bit for every column that takes a slot: the elements, and explicit zeros."""
    bits = layout.DELTA_BITS.get(encoding)
    return elements if bits is None else _with_zeros(elements, 2**bits)


def _slots(words: jax.Array) -> jax.Array:
    """Number of slots of each word's columns, [rows, width] int32."""
    return lax.population_count(words).astype(jnp.int32)


def _last_before(words: jax.Array) -> jax.Array:
    """The last column of the row with its bit set before each word, -1 for none, int32."""
    column = WORD * jnp.arange(words.shape[1], dtype=jnp.int32)
    last = jnp.where(words != 0, column + WORD - 1 - lax.clz(words).astype(jnp.int32), -1)
    return jnp.pad(lax.cummax(last, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _with_zeros(words: jax.Array, step: int) -> jax.Array:
    """With a bit for every `step`-th zero after an element or the row's start, up to an element.

    `step` is a power of two, so these columns have the remainder of the element's.
    """
    every = jnp.uint32(sum(1 << b for b in range(0, WORD, step)))
    remainder = (_last_before(words) & (step - 1)).astype(jnp.uint32)
    before = (every << remainder) & ~words & (words - 1)  # the word's first element
    zeros, shift = ~words, 1  # runs of them that end at a bit
    while shift < step:
        zeros &= zeros << shift
        shift *= 2
    within = words
    for _ in range(WORD // step - 1):
        within |= (within << step) & zeros
    filled = (words != 0).astype(jnp.int8)
    more = lax.cummax(filled, axis=1, reverse=True)[:, 1:]  # elements in later words
    more = jnp.pad(more, ((0, 0), (0, 1))) > 0
    inside = jnp.where(words != 0, jnp.uint32(0xFFFFFFFF) >> lax.clz(words), 0)
    return (before | within) & jnp.where(more, jnp.uint32(0xFFFFFFFF), inside)
