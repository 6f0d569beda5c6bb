"""Packing on the host with NumPy, without a Python loop over rows or elements."""
import functools

import numpy as np

from macko_jax.layout import (
    GROUP, MAX_DELTA, lane_chunks, logical_group, start_dtype, words_per_row)


class Elements:
    """The non-zero elements of a matrix in row-major order; every pass over them is made once.

    Attributes:
      shape: of the matrix.
      mask: [rows, cols] bool, True where an element is neither +0.0 nor -0.0.
      count: [rows] number of elements in each row.
      begin: [rows] index of each row's first element.
    """

    def __init__(self, weight: np.ndarray):
        self.shape = weight.shape
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
        """Zeros skipped before each element, since the previous one or the row's start."""
        gap = np.diff(self.position, prepend=-1) - 1
        filled = np.flatnonzero(self.count)
        first = self.begin[filled]
        gap[first] = self.position[first] - filled * self.shape[1]
        return gap

    @functools.cached_property
    def pads(self) -> np.ndarray:
        """Explicit zeros that 4-bit deltas need before each element, summed up to it; 0 in front."""
        return np.concatenate([[0], np.cumsum(self.gap >> 4)])

    @functools.cached_property
    def padded_count(self) -> np.ndarray:
        """[rows] number of elements and explicit zeros in each row."""
        return self.count + self.pads[self.begin + self.count] - self.pads[self.begin]


def find(weight: np.ndarray) -> Elements:
    return Elements(np.ascontiguousarray(weight))


def group_counts(elements: Elements, encoding: str) -> np.ndarray:
    """Number of groups in each row, [rows]."""
    return -(-(elements.count if encoding == "bitmask" else elements.padded_count) // GROUP)


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
        values[:GROUP * groups][_filled(elements.count, offsets)] = weight[elements.mask]
        codes = np.zeros((rows, 4 * words_per_row(cols)), np.uint8)
        codes[:, :-(-cols // 8)] = np.packbits(elements.mask, axis=1, bitorder="little")
        codes = codes.view("<u4").reshape(-1)
        # A chunk starts after the last element of the chunks before it.
        before = elements.begin[:, None] + GROUP * chunk - 1
        inside = (chunk > 0) & (chunk < count[:, None])
        start = np.zeros_like(chunk)
        start[inside] = elements.position[before[inside]] % cols + 1
    else:
        shift = GROUP * begin - elements.begin - elements.pads[elements.begin]
        slot = np.arange(elements.position.size) + elements.pads[1:]
        slot += np.repeat(shift, elements.count)
        values[slot] = weight.reshape(-1)[elements.position]
        delta = np.zeros(GROUP * capacity, np.uint8)
        delta[:GROUP * groups][_filled(elements.padded_count, offsets)] = MAX_DELTA
        delta[slot] = elements.gap & MAX_DELTA
        codes = pack_nibbles(delta).view("<u4")
        advance = np.cumsum(delta.reshape(-1, GROUP).sum(axis=1, dtype=np.int64) + GROUP)
        column = np.concatenate([[0], advance])  # columns that all groups before have passed
        inside = chunk < count[:, None]
        start = column[begin[:, None] + chunk] - column[begin][:, None]
        codes = codes[order]

    starts = np.where(chunk < count[:, None], start, cols).astype(start_dtype(cols))
    values = values.reshape(-1, GROUP)[order].reshape(-1)
    return values, codes, offsets.astype(np.int32), starts


def pack_nibbles(delta: np.ndarray) -> np.ndarray:
    """Two 4-bit deltas a byte, the earlier in the low nibble."""
    return delta[0::2] | (delta[1::2] << 4)


def _filled(count: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """True for the first `count` slots of each row, False for those that fill up its last group."""
    filled = np.ones(GROUP * offsets[-1], bool)
    tail = (GROUP * offsets[:-1] + count)[:, None] + np.arange(GROUP - 1)
    filled[tail[tail < GROUP * offsets[1:, None]]] = False
    return filled
