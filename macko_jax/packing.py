"""Packing a dense matrix into the arrays of a `format.MackoMatrix`, on the host with NumPy."""
import numpy as np

from macko_jax.layout import GROUP, MAX_DELTA, WORD, logical_group, words_per_row


def start_dtype(cols: int):
    """Integer type of the lanes' first columns."""
    return np.dtype(np.uint16 if cols <= np.iinfo(np.uint16).max else np.uint32)


def nonzero_mask(weight: np.ndarray) -> np.ndarray:
    """True where an element is not +0.0 or -0.0, by bits: as fast for 16-bit floats as for 32."""
    bits = weight.view(f"u{weight.dtype.itemsize}")
    return (bits << 1) != 0


def pack(weight: np.ndarray, choose):
    """Packs `weight` [rows, cols] in NumPy.

    Args:
      weight: float16, bfloat16 or float32.
      choose: called with the numbers of groups that bitmask and delta4 would take; returns
        (encoding, lanes).

    Returns:
      values, codes, row_offsets, starts, encoding, lanes.
    """
    rows, cols = weight.shape
    mask = nonzero_mask(weight)
    position = np.flatnonzero(mask)
    nnz = np.count_nonzero(mask, axis=1)
    row_first = np.cumsum(nnz) - nnz  # index in `position` of each row's first element
    # Zeros skipped before each element, since the previous one or the row's start.
    gap = np.diff(position, prepend=-1) - 1
    filled = np.flatnonzero(nnz)
    gap[row_first[filled]] = position[row_first[filled]] - filled * cols
    pads = gap >> 4  # explicit zeros before each element in delta4
    pads_total = np.concatenate([[0], np.cumsum(pads)])
    row_pads = pads_total[row_first + nnz] - pads_total[row_first]

    bitmask_groups, delta4_groups = -(-nnz // GROUP), -(-(nnz + row_pads) // GROUP)
    encoding, lanes = choose(int(bitmask_groups.sum()), int(delta4_groups.sum()))
    count = bitmask_groups if encoding == "bitmask" else delta4_groups
    row_offsets = np.concatenate([[0], np.cumsum(count)])
    groups = int(row_offsets[-1])
    if GROUP * groups > np.iinfo(np.int32).max:
        raise ValueError(f"the matrix would store {GROUP * groups} elements; at most 2**31 - 1 fit")

    # Slot of each element in logical order.
    slot = np.arange(position.size) + np.repeat(GROUP * row_offsets[:-1] - row_first, nnz)
    if encoding == "delta4":
        before = pads_total[1:] - np.repeat(pads_total[row_first], nnz)
        slot += before
        gap &= MAX_DELTA
    values = np.zeros(GROUP * groups, weight.dtype)
    values[slot] = weight.reshape(-1)[position]

    if encoding == "bitmask":
        padded = np.zeros((rows, 4 * words_per_row(cols)), np.uint8)
        packed = np.packbits(mask, axis=1, bitorder="little")
        padded[:, :packed.shape[1]] = packed
        codes = padded.view("<u4").reshape(-1)
    else:
        stored = nnz + row_pads
        local = np.arange(GROUP * groups) - np.repeat(GROUP * row_offsets[:-1], GROUP * count)
        delta = np.where(local < np.repeat(stored, GROUP * count), MAX_DELTA, 0).astype(np.uint32)
        delta[slot] = gap
        nibble = np.arange(GROUP, dtype=np.uint32) * 4
        codes = np.bitwise_or.reduce(delta.reshape(groups, GROUP) << nibble, axis=1)

    # Start of a lane's chunk: the column after the last element before it. Its first slot is an
    # element, or an explicit zero j slots before the next element, at 16 columns a slot.
    lane = np.arange(lanes)
    chunk = lane * (count // lanes)[:, None] + np.minimum(lane, (count % lanes)[:, None])
    first = GROUP * (row_offsets[:-1, None] + chunk)
    element = np.searchsorted(slot, first)
    inside = chunk < count[:, None]
    if position.size:
        at = np.minimum(element, position.size - 1)
        start = position[at] % cols - gap[at] - (MAX_DELTA + 1) * (slot[at] - first)
    else:
        start = np.zeros_like(first)
    starts = np.where(inside, start, cols).astype(start_dtype(cols))

    local = np.arange(groups) - np.repeat(row_offsets[:-1], count)
    order = np.repeat(row_offsets[:-1], count) + logical_group(
        local, np.repeat(count, count), lanes)
    values = values.reshape(groups, GROUP)[order].reshape(-1)
    if encoding == "delta4":
        codes = codes[order]
    return values, codes, row_offsets.astype(np.int32), starts, encoding, lanes
