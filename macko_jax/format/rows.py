"""Rows of a packed matrix, without unpacking it."""

import dataclasses
from typing import Any

import numpy as np

from macko_jax.format.codes import join_parts, split_parts
from macko_jax.format.layout import GROUP, words_per_row


def take_rows(matrix, start: int, stop: int) -> Any:
    """Rows start to stop, exclusive, of one MackoMatrix whose arrays are concrete.

    Every row begins a group, so that these rows are a piece of every array.
    """
    offsets = np.asarray(matrix.row_offsets)[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    if matrix.encoding == "bitmask":
        width = words_per_row(matrix.shape[1])
        codes = matrix.codes[start * width : stop * width]
    else:
        parts = split_parts(matrix.codes, matrix.encoding)
        codes = join_parts(tuple(part[first:last] for part in parts), matrix.encoding)
    return dataclasses.replace(
        matrix,
        values=matrix.values[GROUP * first : GROUP * last],
        codes=codes,
        row_offsets=matrix.row_offsets[start : stop + 1] - first,
        starts=matrix.starts[start:stop],
        scales=None if matrix.scales is None else matrix.scales[start:stop],
        shape=(stop - start, matrix.shape[1]),
    )
