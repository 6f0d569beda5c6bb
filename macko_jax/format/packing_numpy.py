"""Packing on the host with NumPy, without a Python loop over rows or elements."""

import functools
from typing import NamedTuple

import numpy as np

from macko_jax.format import two_bank
from macko_jax.format.layout import (
    BANKS,
    DELTA_BITS,
    GROUP,
    WARP,
    code_parts,
    join_parts,
    lane_chunks,
    logical_group,
    start_dtype,
    words_per_row,
)

TURNS = 1 << 11  # for which copies are chosen together; what is known of them stays in a cache


class Padding(NamedTuple):
    """The explicit zeros that a size of deltas needs.

    Attributes:
      index: the elements whose gap is too long for a delta.
      row: of each of these.
      zeros: how many explicit zeros stand before each of these.
      count: [rows] elements and explicit zeros of each row.
    """

    index: np.ndarray
    row: np.ndarray
    zeros: np.ndarray
    count: np.ndarray


class Elements:
    """The non-zero elements of a matrix in row-major order; every pass over them is made once.

    Attributes:
      shape: of the matrix.
      mask: [rows, cols] bool, True where an element is neither +0.0 nor -0.0.
      count: [rows] number of elements in each row.
      begin: [rows] index of each row's first element.
    """

    def __init__(self, weight: np.ndarray):
        self.shape, self._padding = weight.shape, {}
        # By bits, which is as fast for 16-bit floats as for 32: the shift drops the sign.
        self.mask = (weight.view(f"u{weight.dtype.itemsize}") << 1) != 0
        self.count = np.count_nonzero(self.mask, axis=1)
        self.begin = np.cumsum(self.count) - self.count

    @functools.cached_property
    def position(self) -> np.ndarray:
        """Index of each element in the flattened matrix."""
        return np.flatnonzero(self.mask)

    @functools.cached_property
    def gap(self) -> np.ndarray:
        """Zeros skipped before each element, since the previous one or the row's start, int32."""
        gap = np.zeros(self.position.size, np.int32)
        np.subtract(self.position[1:], self.position[:-1], out=gap[1:], casting="unsafe")
        gap -= 1
        filled = np.flatnonzero(self.count)
        first = self.begin[filled]
        gap[first] = self.position[first] - filled * self.shape[1]
        return gap

    def padding(self, bits: int) -> Padding:
        """The explicit zeros that deltas of `bits` need."""
        if bits not in self._padding:
            index = np.flatnonzero(self.gap >= 2**bits)
            row, zeros = self.position[index] // self.shape[1], self.gap[index] >> bits
            count = self.count.copy()
            np.add.at(count, row, zeros)
            self._padding[bits] = Padding(index, row, zeros, count)
        return self._padding[bits]

    def padded_count(self, bits: int) -> np.ndarray:
        """[rows] number of elements and of explicit zeros for deltas of `bits` in each row."""
        return self.padding(bits).count

    def place(self, row_begin: np.ndarray, size: int, bits: int) -> np.ndarray:
        """Where elements go among `size` slots with deltas, True there; explicit zeros False.

        `row_begin` has the first slot of each row, [rows].
        """
        index, row, zeros, count = self.padding(bits)
        placed = _filled(row_begin, count, size)
        total = np.cumsum(zeros)
        row_zeros = count - self.count
        before = np.cumsum(row_zeros) - row_zeros
        slot = row_begin[row] + index - self.begin[row] + total - before[row]
        placed[np.repeat(slot - total, zeros) + np.arange(zeros.sum())] = False
        return placed


def find(weight: np.ndarray) -> Elements:
    return Elements(np.ascontiguousarray(weight))


def group_counts(elements: Elements, encoding: str) -> np.ndarray:
    """Number of groups in each row, [rows]."""
    bits = DELTA_BITS.get(encoding)
    return -(-(elements.count if bits is None else elements.padded_count(bits)) // GROUP)


def count_groups(elements: Elements, encoding: str) -> int:
    return int(group_counts(elements, encoding).sum())


def fill(weight: np.ndarray, elements: Elements, encoding: str, lanes: int, capacity: int):
    """values, codes, row_offsets and starts, with room for `capacity` groups."""
    rows, cols = elements.shape
    count = group_counts(elements, encoding)
    offsets = np.concatenate([[0], np.cumsum(count)])
    begin, groups = offsets[:-1], int(offsets[-1])

    # Where a row's groups go: memory group -> group in column order.
    order = np.arange(capacity)
    if lanes > 1:
        row_begin, row_count = np.repeat(begin, count), np.repeat(count, count)
        order[:groups] = row_begin + logical_group(order[:groups] - row_begin, row_count, lanes)

    values = np.zeros(GROUP * capacity, weight.dtype)
    chunk = lane_chunks(count, lanes)
    if encoding == "bitmask":
        values[_filled(GROUP * begin, elements.count, values.size)] = weight[elements.mask]
        codes = np.zeros((rows, 4 * words_per_row(cols)), np.uint8)
        codes[:, : -(-cols // 8)] = np.packbits(elements.mask, axis=1, bitorder="little")
        codes = codes.view("<u4").reshape(-1)
        # A chunk starts after the last element of the chunks before it.
        before = elements.begin[:, None] + GROUP * chunk - 1
        inside = (chunk > 0) & (chunk < count[:, None])
        start = np.zeros_like(chunk)
        start[inside] = elements.position[before[inside]] % cols + 1
    else:
        values, delta = fill_deltas(
            weight, elements, GROUP * begin, values.size, DELTA_BITS[encoding]
        )
        delta = delta.reshape(-1, GROUP)
        parts = code_parts(delta, encoding, join_deltas)
        advance = np.cumsum(delta.sum(axis=1, dtype=np.int64) + GROUP)
        column = np.concatenate([[0], advance])  # columns that all groups before have passed
        start = column[begin[:, None] + chunk] - column[begin][:, None]
        parts = tuple(part[order] for part in parts)
        if encoding == "two_bank":
            base = column[:groups] - np.repeat(column[begin], count)
            bank = two_bank.banks(base, delta[:groups])[order[:groups]]
            parts[0][:groups] |= choices(bank, begin, count, lanes)
        codes = join_parts(parts, encoding)

    starts = np.where(chunk < count[:, None], start, cols).astype(start_dtype(cols))
    values = values.reshape(-1, GROUP)[order].reshape(-1)
    return values, codes, offsets.astype(np.int32), starts


def fill_deltas(
    weight: np.ndarray, elements: Elements, row_begin: np.ndarray, size: int, bits: int
):
    """Values and deltas of `size` slots, where the slots of each row begin at `row_begin`."""
    placed = elements.place(row_begin, size, bits)
    values = np.zeros(size, weight.dtype)
    values[placed] = weight[elements.mask]
    most = 2**bits - 1
    delta = _filled(row_begin, elements.padded_count(bits), size) * np.uint8(most)
    delta[placed] = elements.gap & most
    return values, delta


def choices(bank: np.ndarray, begin: np.ndarray, count: np.ndarray, lanes: int) -> np.ndarray:
    """Which copies of x are read, as bits of the codes, uint32 [groups]; see `two_bank.choose`.

    Args:
      bank: [groups, 8] of copy 0 of every element, in memory order.
      begin, count: [rows] the first group of each row, and its number of groups.
    """
    groups = bank.shape[0]
    bank = np.concatenate([bank, np.full((1, GROUP), BANKS, np.uint8)])
    chosen = np.zeros(bank.shape, bool)
    visits = two_bank.turns(begin, count, lanes, groups)
    for first in range(0, visits.shape[1], TURNS):
        visited = visits[:, first : first + TURNS]
        banks, made = bank[visited].astype(np.uint32), [None] * WARP
        taken = (np.zeros((visited.shape[1], GROUP), np.uint32),) * 3
        for lane in list(range(WARP)) * 2:
            made[lane], taken = two_bank.choose(banks[lane], np.uint32(lane), taken, made[lane])
        chosen[visited] = made
    return join_deltas(chosen[:groups].view(np.uint8), 4) << 3


def pack_nibbles(delta: np.ndarray) -> np.ndarray:
    """Two 4-bit deltas a byte, the earlier in the low nibble."""
    return delta[0::2] | (delta[1::2] << 4)


def join_deltas(delta: np.ndarray, bits: int) -> np.ndarray:
    """As `layout.join_deltas`, in passes over bytes; for 1, 3 and 4 bits."""
    if bits == 1:
        return np.packbits(delta, axis=-1, bitorder="little")[..., 0].astype(np.uint32)
    words = pack_nibbles(delta.reshape(-1)).view("<u4")
    if bits == 4:
        return words
    parts = [
        (words >> np.uint32(4 * j) & np.uint32(2**bits - 1)) << np.uint32(bits * j)
        for j in range(GROUP)
    ]
    return functools.reduce(np.bitwise_or, parts)


def _filled(begin: np.ndarray, count: np.ndarray, size: int) -> np.ndarray:
    """True for the first `count` of the slots that follow each row's first, [size] bool."""
    edges = np.zeros(size + 1, np.int8)
    np.add.at(edges, begin, 1)
    np.subtract.at(edges, begin + count, 1)
    return np.cumsum(edges[:-1], dtype=np.int8).view(bool)
