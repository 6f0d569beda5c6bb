"""To and from the layout of the paper's torch package `macko_spmv`, in NumPy.

Row by row in column order, each stored element is a value and a 4-bit delta, the number of zeros
skipped since the row's previous stored element. A gap of 16 zeros and more stores an explicit zero
with delta 15 in every 16th place. Two deltas share a byte, the earlier in the low nibble; values
and deltas are filled up to a multiple of eight elements at the end of the matrix.
"""

import numpy as np

from macko_jax.format.codes import DELTA_BITS
from macko_jax.format.layout import GROUP, is_zero
from macko_jax.format.matrix import DTYPES, MackoMatrix, compress, decompress
from macko_jax.format.pack import find, with_zeros

BITS = DELTA_BITS["delta4"]
MAX_DELTA = 2**BITS - 1


def to_macko_spmv(matrix: MackoMatrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """The matrix in the paper's layout.

    Args:
      matrix: a packed matrix. Values that have become zero are dropped.

    Returns:
      values: [n] of the matrix's type, n the number of stored elements rounded up to 8;
      deltas: [n / 2] uint8; row_indices: [rows + 1] int32, each row's first stored element;
      rows; cols.

    References:
      arXiv 2511.13061, section 3.
    """
    dense = np.asarray(decompress(matrix))
    words = with_zeros(find(dense), encoding="delta4")
    row, column = np.nonzero(np.unpackbits(words.view(np.uint8), axis=1, bitorder="little"))
    row_indices = np.searchsorted(row, np.arange(dense.shape[0] + 1)).astype(np.int32)
    stored, size = row.size, -(-row.size // GROUP) * GROUP
    values, deltas = np.zeros(size, dense.dtype), np.zeros(size, np.uint8)
    found = dense[row, column]
    values[:stored] = np.where(is_zero(found), np.zeros_like(found), found)
    first = np.diff(row, prepend=-1) > 0
    deltas[:stored] = np.where(first, column, np.diff(column, prepend=0) - 1)
    return values, deltas[0::2] | deltas[1::2] << BITS, row_indices, *matrix.shape


def from_macko_spmv(values, deltas, row_indices, rows: int, cols: int, **options) -> MackoMatrix:
    """A matrix from the paper's layout.

    Streams that store more zeros than they need are read as well; stored zeros are dropped.

    Args:
      values: [n] float16, bfloat16 or float32.
      deltas: [n / 2] uint8.
      row_indices: [rows + 1] integers.
      rows: number of rows.
      cols: number of columns.
      **options: for `compress`.

    Returns:
      The packed matrix.

    Raises:
      TypeError: an array has the wrong type.
      ValueError: the arrays do not fit each other, or deltas run past the columns.
    """
    values, deltas, row_indices = map(np.asarray, (values, deltas, row_indices))
    if values.dtype not in DTYPES:
        raise TypeError(f"values must be {', '.join(d.name for d in DTYPES)}, got {values.dtype}")
    if deltas.dtype != np.uint8:
        raise TypeError(f"deltas must be uint8, two 4-bit deltas a byte, got {deltas.dtype}")
    if row_indices.dtype.kind not in "iu":
        raise TypeError(f"row_indices must be integers, got {row_indices.dtype}")
    if rows < 0 or cols < 0:
        raise ValueError(f"rows and cols must not be negative, got {rows} and {cols}")
    if values.ndim != 1 or deltas.shape != (-(-values.size // 2),):
        raise ValueError(
            "values and deltas must be [n] and [n / 2] (two deltas a byte), got shapes "
            f"{list(values.shape)} and {list(deltas.shape)}"
        )
    if row_indices.shape != (rows + 1,):
        raise ValueError(
            f"row_indices must be [rows + 1] = [{rows + 1}], got shape {list(row_indices.shape)}"
        )
    row_indices = row_indices.astype(np.int64)
    count, stored = np.diff(row_indices), int(row_indices[-1])
    if row_indices[0] != 0 or (count < 0).any() or stored > values.size:
        raise ValueError(
            f"row_indices must rise from 0 to at most {values.size}, the number of values; they go "
            f"from {row_indices[0]} to {stored}, with {int((count < 0).sum())} decreasing steps"
        )
    if values[stored:].any():
        raise ValueError(f"there are non-zero values after element {stored}, where row_indices end")

    delta = np.stack([deltas & MAX_DELTA, deltas >> BITS], axis=1).reshape(-1)[:stored]
    passed = np.concatenate([[0], np.cumsum(delta + np.int64(1))])
    row = np.repeat(np.arange(rows), count)
    column = passed[1:] - passed[row_indices[row]] - 1
    if (wrong := column >= cols).any():
        element = int(wrong.argmax())
        raise ValueError(
            f"the deltas of row {row[element]} run to column {column[element]}, past the last of "
            f"{cols} columns"
        )
    dense = np.zeros((rows, cols), values.dtype)
    dense[row, column] = values[:stored]
    return compress(dense, **options)
