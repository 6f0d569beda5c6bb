"""The packer: the same steps run eagerly by NumPy on the host, and jitted by JAX on a device.

Which columns are stored is worked out on words of 32 columns: a bit for every element, and for
every explicit zero that a gap too long for a delta takes. The zeros that fill up a row's last
group stand in the columns after the last element, so that groups are simply eight bits each, in
order. The indices of these bits then give the values, deltas and first columns.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from macko_jax.format import two_bank
from macko_jax.format.choose import CPU, choose_encoding, choose_lanes, is_for_cpu
from macko_jax.format.codes import DELTA_BITS, code_parts, join_nibbles, join_parts
from macko_jax.format.layout import (
    BANKS,
    GROUP,
    MAX_STORED,
    WARP,
    WORD,
    column_order,
    group_rows,
    is_zero,
    lane_chunks,
    reorder,
    repeat,
    start_dtype,
    words_per_row,
)

TURNS = 1 << 11  # so many have their banks chosen together by NumPy, and stay in a cache
Capacity = int | Callable[[int], int] | None  # groups to have room for; see `matrix.compress`


def pack(
    weight,
    encoding: str | None,
    lanes: int | None,
    capacity: Capacity,
    on_device: bool | None = None,
):
    """Packs `weight` [rows, cols]: NumPy arrays on the host, JAX arrays where they lie.

    Args:
      weight: float16, bfloat16, float32, or 8-bit values.
      encoding, lanes: None chooses, see `choose`.
      capacity: groups to have room for, see `matrix.compress`.
      on_device: whether JAX packs, and not NumPy; None lets the place of the weight decide.

    Returns:
      (values, codes, row_offsets, starts), encoding, lanes; see `matrix.MackoMatrix`.
    """
    if on_device is None:
        on_device = isinstance(weight, jax.Array) and _on_accelerator(weight)
    weight = jnp.asarray(weight) if on_device else np.ascontiguousarray(weight)
    run = _jitted if on_device else _eagerly
    elements = run(find, weight)

    @functools.cache
    def stored(encoding):
        return run(with_zeros, elements, encoding=encoding)

    @functools.cache
    def count(encoding):
        return int(run(_count_groups, stored(encoding)).sum())

    if encoding in (None, CPU[0]) and is_for_cpu():
        encoding, lanes = CPU[0], lanes or CPU[1]
    encoding = encoding or choose_encoding(weight.shape, weight.dtype, count)
    groups = count(encoding)
    capacity = _check_capacity(groups, capacity, encoding)
    lanes = lanes or choose_lanes(weight.shape[0], groups)
    if on_device:
        # The program is compiled for a rounded size and its results are cut, since every matrix has
        # another number of groups; for one at least, because gathers need a source.
        step = 1 << max(0, capacity.bit_length() - 5)
        groups = max(1, -(-capacity // step)) * step
    values, codes, offsets, starts = run(
        _fill, weight, stored(encoding), encoding=encoding, lanes=lanes, groups=groups
    )
    if encoding != "bitmask":
        codes = join_parts(tuple(_resize(part, capacity) for part in codes), encoding)
    return (_resize(values, GROUP * capacity), codes, offsets, starts), encoding, lanes


def _check_capacity(groups: int, capacity: Capacity, encoding: str) -> int:
    """The capacity to pack with, or an error."""
    most = MAX_STORED // GROUP
    if callable(capacity):  # it may ask for more than fits, where what is needed fits
        capacity = min(capacity(groups), max(groups, most))
    elif capacity is None:
        capacity = groups
    if capacity < groups:
        raise ValueError(
            f"capacity={capacity} groups of 8 is too small: this matrix takes {groups} in the "
            f"encoding {encoding!r}; pass at least that"
        )
    if capacity > most:
        raise ValueError(
            f"the matrix would store {GROUP * capacity} elements; at most {MAX_STORED} fit "
            "32-bit offsets. Split it by rows"
        )
    return capacity


def find(weight):
    """Words [rows, width] uint32: bit b of word w is set where column 32 w + b is not zero."""
    xp, width = weight.__array_namespace__(), words_per_row(weight.shape[1])
    bits = xp.packbits(~is_zero(weight), axis=1, bitorder="little")
    return xp.pad(bits, ((0, 0), (0, 4 * width - bits.shape[1]))).view(np.uint32)


def with_zeros(words, *, encoding: str):
    """The words of `find` with bits for the explicit zeros that the deltas of an encoding need.

    Those are every `step`-th zero after an element or the row's start, up to an element. `step` is
    a power of two, so that these columns have the remainder of the element's.
    """
    if encoding not in DELTA_BITS:
        return words
    xp, step = words.__array_namespace__(), 2 ** DELTA_BITS[encoding]
    end = _ends(words)
    last = _running_maximum(end)[:, :-1]  # the column after the last element in earlier words
    last = xp.pad(last, ((0, 0), (1, 0)))
    every = np.uint32(sum(1 << b for b in range(0, WORD, step)))
    # Before the word's first element, in columns of the remainder of last - 1.
    before = every << ((last - 1) & (step - 1)).astype(np.uint32) & ~words & (words - np.uint32(1))
    zeros, shift = ~words, 1  # which become runs of `step` zeros that end at a bit
    while shift < step:
        zeros = zeros & zeros << shift
        shift *= 2
    within = words
    for _ in range(WORD // step - 1):
        within = within | within << step & zeros
    # Zeros after the row's last element are not stored.
    final = end.max(axis=1, keepdims=True, initial=0) - 1
    more = np.arange(words.shape[1]) < final // WORD
    return (before | within) & xp.where(more, np.uint32(0xFFFFFFFF), _smear(words))


def _count_slots(words):
    """Number of slots that each row takes without padding, [rows] int32."""
    xp = words.__array_namespace__()
    return xp.sum(xp.bitwise_count(words), axis=1, dtype=np.int32)


def _count_groups(words):
    """Number of groups of each row, [rows] int32."""
    return -(-_count_slots(words) // GROUP)


def _fill(weight, words, *, encoding: str, lanes: int, groups: int):
    """Values, parts of codes (the words of a "bitmask"), row_offsets and starts.

    Args:
      weight: [rows, cols].
      words: what is stored, from `with_zeros`.
      groups: how many there is room for.
    """
    xp, (rows, cols), slots = weight.__array_namespace__(), weight.shape, GROUP * groups
    count = _count_groups(words)
    offsets = xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(count, dtype=np.int32)])
    row = group_rows(offsets, groups)
    order = column_order(offsets, row, lanes)
    padded = _with_padding(words)
    pitch = WORD * padded.shape[1]  # columns of a row, with those for padding
    row_begin = pitch * xp.arange(rows)

    slot = _indices_of_bits(padded, slots)
    values = _read(weight, slot, row, pitch)
    values = xp.where(values << 1 == 0, values.dtype.type(0), values)  # -0.0 is not stored either
    values = reorder(values.reshape(groups, GROUP), order, lanes).reshape(-1).view(weight.dtype)

    # The column after each group is where the next one may start.
    end = xp.concatenate([xp.zeros(1, slot.dtype), slot[GROUP - 1 :: GROUP] + 1])
    chunk = lane_chunks(count, lanes)
    start = xp.where(chunk > 0, end[offsets[:-1, None] + chunk] - row_begin[:, None], 0)
    starts = xp.where(chunk < count[:, None], start, cols).astype(start_dtype(cols))
    if encoding == "bitmask":
        return values, words.reshape(-1), offsets, starts

    # Deltas are less than 256, so that columns modulo 256 do.
    column = slot.astype(np.uint8)
    before = xp.concatenate([xp.zeros(1, np.uint8), column])  # one more, where empty rows write to
    first = xp.where(count > 0, GROUP * offsets[:-1], slots)
    before = _put(before, first, (row_begin - 1).astype(np.uint8))
    delta = (column - before[:-1] - np.uint8(1)).reshape(groups, GROUP)
    parts = tuple(reorder(part, order, lanes) for part in code_parts(delta, encoding))
    if encoding == "two_bank":
        bank = reorder(two_bank.banks(column).reshape(groups, GROUP), order, lanes)
        parts = (parts[0] | _chosen_banks(bank, offsets[:-1], count, lanes),)
    return values, tuple(xp.where(row < rows, part, 0) for part in parts), offsets, starts


def _with_padding(words):
    """Words [rows, width + 1], with bits for the zeros that fill up a row's last group."""
    xp = words.__array_namespace__()
    fill = (np.uint32(1) << (-_count_slots(words) % GROUP).astype(np.uint32)) - np.uint32(1)
    end = _ends(words).max(axis=1, initial=0)  # the column after the last element
    word, bit = (end // WORD)[:, None], (end % WORD).astype(np.uint32)
    at = np.arange(words.shape[1] + 1)
    low, high = fill << bit, fill >> np.uint32(1) >> np.uint32(WORD - 1) - bit
    padding = xp.where(at == word, low[:, None], 0) | xp.where(at == word + 1, high[:, None], 0)
    return xp.pad(words, ((0, 0), (0, 1))) | padding.astype(np.uint32)


def _ends(words):
    """The column after the last bit that is set in each word, 0 where none is, int32."""
    xp = words.__array_namespace__()
    length = xp.bitwise_count(_smear(words)).astype(np.int32)
    column = WORD * np.arange(words.shape[1], dtype=np.int32)
    return xp.where(length > 0, column + length, 0)


def _smear(words):
    """Words with all bits set up to the highest one."""
    for shift in (1, 2, 4, 8, 16):
        words = words | words >> shift
    return words


def _chosen_banks(bank, begin, count, lanes: int):
    """The bits of codes that say which copies of x are read, uint32 [groups]; see `two_bank`.

    Args:
      bank: [groups, 8] uint8, of copy 0 of every element, in memory order.
      begin, count: [rows], the first group of each row, and its number of groups.
    """
    xp, groups = bank.__array_namespace__(), bank.shape[0]
    turns = two_bank.turns(begin, count, lanes, groups)
    bank = xp.concatenate([bank, xp.full((1, GROUP), BANKS, np.uint8)])  # of no group
    chosen, lane = xp.zeros(groups + 1, np.uint32), xp.arange(WARP, dtype=np.uint32)
    together = TURNS if isinstance(bank, np.ndarray) else max(1, turns.shape[1])
    for i in range(0, turns.shape[1], together):
        visited = turns[:, i : i + together]
        banks = bank[visited]
        taken = (xp.zeros(banks.shape[1:], np.uint32),) * 3
        taken, copy = _scan(two_bank.choose, taken, (lane, banks))
        _, copy = _scan(two_bank.choose, taken, (lane, banks, copy))
        chosen = _put(chosen, visited, join_nibbles(copy.astype(np.uint8)) << 3)
    return chosen[:groups]


# Where NumPy and JAX differ.


def _eagerly(function, *arrays, **static):
    return function(*arrays, **static)


def _jitted(function, *arrays, **static):
    return _compiled(function, tuple(static))(*arrays, **static)


@functools.cache
def _compiled(function, static: tuple[str, ...]):
    return jax.jit(function, static_argnames=static)


def _on_accelerator(weight: jax.Array) -> bool:
    return all(device.platform != "cpu" for device in weight.devices())


def _indices_of_bits(words, size: int):
    """Index of every bit that is set, [size], counted from the first word's lowest bit.

    JAX counts modulo 2**32, and gives anything beyond the last bit; NumPy has `size` bits.
    """
    if isinstance(words, np.ndarray):
        return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(bool))
    words = words.reshape(-1)
    count = lax.population_count(words).astype(jnp.int32)
    word = repeat(jnp.arange(words.size, dtype=jnp.int32), count, size)
    rank = jnp.arange(size, dtype=jnp.int32) - (jnp.cumsum(count) - count)[word]
    word, bits = WORD * word, words[word]
    for half in (16, 8, 4, 2, 1):  # halves the bits among which the one of this rank is
        lower = lax.population_count(bits & np.uint32((1 << half) - 1)).astype(jnp.int32)
        above = rank >= lower
        rank = jnp.where(above, rank - lower, rank)
        bits = jnp.where(above, bits >> half, bits)
        word = jnp.where(above, word + half, word)
    return word


def _read(weight, slot, row, pitch: int):
    """The weights at indices of padded rows as unsigned integers, zero where there is no weight."""
    bits, cols = weight.view(f"uint{8 * weight.dtype.itemsize}"), weight.shape[1]
    if isinstance(bits, np.ndarray):
        return np.pad(bits, ((0, 0), (0, pitch - cols))).reshape(-1)[slot]
    column = slot.reshape(-1, GROUP) - pitch * row[:, None]
    return bits.at[row[:, None], column].get(mode="fill", fill_value=0).reshape(-1)


def _put(array, index, values):
    """`array` with `values` at `index`, which NumPy writes into it."""
    if not isinstance(array, np.ndarray):
        return array.at[index].set(values)
    array[index] = values
    return array


def _resize(array, size: int):
    """The first `size` entries, or all of them and zeros."""
    if array.shape[0] >= size:
        return array[:size]
    return array.__array_namespace__().pad(array, (0, size - array.shape[0]))


def _running_maximum(array):
    """The maximum of each row up to each column."""
    if isinstance(array, np.ndarray):
        return np.maximum.accumulate(array, axis=1)
    return lax.cummax(array, axis=1)


def _scan(step, carry, turns: tuple):
    """As `lax.scan`."""
    if not isinstance(turns[0], np.ndarray):
        return lax.scan(step, carry, turns)
    results = []
    for turn in zip(*turns, strict=True):
        carry, result = step(carry, turn)
        results.append(result)
    return carry, np.stack(results)
