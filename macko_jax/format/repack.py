"""Packing matrices anew: in another layout, or in shards, with the same values bit for bit."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from macko_jax.format import cards
from macko_jax.format.choose import shared_capacity
from macko_jax.format.matrix import WORTH_COMPILING, MackoMatrix, dense_values
from macko_jax.format.pack import Capacity, pack


def kept_encoding(encoding: str) -> str | None:
    """The encoding that a matrix keeps here, or None where a faster one is chosen.

    A bitmask was packed for a CPU, and has no kernels on a GPU.
    """
    return None if encoding == "bitmask" and cards.live() is not None else encoding


def for_here(matrix: MackoMatrix) -> MackoMatrix:
    """The matrix or stack of them, packed anew where it does not keep its encoding here."""
    if kept_encoding(matrix.encoding):
        return matrix
    dense = dense_values(matrix)
    stack, shape = dense.shape[:-2], dense.shape[-2:]
    pieces = dense.reshape(-1, *shape)
    if pieces[0].size < WORTH_COMPILING:
        pieces = np.asarray(pieces)
    packed, encoding, lanes = pack_alike(list(pieces), None, None, None)
    arrays = [jnp.stack([jnp.asarray(array) for array in arrays]) for arrays in zip(*packed)]
    arrays = [array.reshape(*stack, *array.shape[1:]) for array in arrays]
    values, codes, row_offsets, starts = arrays
    return MackoMatrix(
        values, codes, row_offsets, starts, matrix.shape, encoding, lanes, matrix.scales
    )


def pack_alike(
    pieces: Sequence, encoding: str | None, lanes: int | None, capacity: Capacity
) -> tuple[list, str, int]:
    """The arrays of each packed matrix, of equal shapes; the encoding and the lanes.

    The first decides on these where they are None.
    """
    packed = []
    for piece in pieces:
        arrays, encoding, lanes = pack(
            piece, encoding, lanes, shared_capacity if capacity is None else capacity
        )
        packed.append(arrays)
    most = max(values.shape[0] for values, *_ in packed) // 8
    for i, (piece, (values, *_)) in enumerate(zip(pieces, packed)):
        if values.shape[0] < 8 * most:
            packed[i], *_ = pack(piece, encoding, lanes, most)
    assert encoding is not None and lanes is not None
    return packed, encoding, lanes
