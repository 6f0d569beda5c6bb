"""How many non-zeros a matrix, or each factor of a pair, may have, and how wide the pair is."""

import math
from typing import Literal

import numpy as np
from jax.typing import ArrayLike

# Chains of products read vectors by so many elements, see docs/kernel.md.
INNER_MULTIPLE = 8


def count_nonzeros(density: float, shape: tuple[int, int]) -> int:
    """Non-zeros that `density` allows a matrix of `shape`: rounded down, never one over."""
    return min(math.floor(density * (shape[0] * shape[1])), shape[0] * shape[1])


def split_nonzeros(
    nonzeros: int, shape: tuple[int, int], inner: int, split: float | Literal["published"]
) -> tuple[int, int]:
    """Splits a budget between the factors A `[out, inner]` and B `[inner, in]`.

    Args:
      nonzeros: Budget of both together.
      shape: (out, in).
      inner: Inner dimension.
      split: "published": the factor on the smaller side gets 0.16 (square layers) or 0.25 times
        min(out, in)^2, whatever the density, but at most 0.8 of the budget. A number s: it gets s
        times the share that would make both factors equally dense.

    Returns:
      Non-zeros of A and of B.
    """
    rows, cols = shape
    short, long = min(shape), max(shape)
    if split == "published":
        share = (0.16 if rows == cols else 0.25) * short * short
        small = int(min(share, 0.8 * nonzeros))
    else:
        small = int(split * nonzeros * short / (short + long))
    small = min(small, short * inner)
    large = min(nonzeros - small, long * inner)
    return (large, small) if rows >= cols else (small, large)


def choose_width(density: float, shape: tuple[int, int]) -> float:
    """Inner dimension over min(out, in) for a density.

    At equal non-zeros a wider pair is better, but its non-zeros lie further apart and cost more
    index bits each. On square layers 1 + density is near the best at equal stored bytes between
    densities 0.2 and 0.5 (docs/dsf.md has the figures); other shapes get the width at which their
    factors, which would be denser, are just as dense: wider by 2 max(out, in) / (out + in).
    """
    return (1 + density) * 2 * max(shape) / sum(shape)


def plan_pair(
    density: float,
    shape: tuple[int, int],
    *,
    width: float | None,
    split: float | Literal["published"],
) -> tuple[int, int, int]:
    """The inner dimension of a pair A B, and the non-zeros of A and of B.

    Args:
      density: Non-zeros of both factors over out * in.
      shape: (out, in).
      width: Inner dimension over min(out, in); None has it chosen, as a multiple of
        `INNER_MULTIPLE`.
      split: As for `split_nonzeros`.
    """
    if width is None:
        inner = round(choose_width(density, shape) * min(shape) / INNER_MULTIPLE) * INNER_MULTIPLE
    else:
        inner = round(width * min(shape))
    inner = max(min(shape), inner)
    return inner, *split_nonzeros(count_nonzeros(density, shape), shape, inner, split)


def packed_nbytes(factor: ArrayLike, value_bytes: int = 2) -> int:
    """Bytes of a packed sparse matrix: values, index and row offsets.

    The index of each non-zero is a 4-bit delta (zeros skipped since the previous one; 16 positions
    without a non-zero cost a padding element), or the matrix has a bitmask of one bit a position:
    whichever is smaller.

    Args:
      factor: `[rows, cols]`.
      value_bytes: Bytes of a value.

    Returns:
      The number of bytes.
    """
    factor = np.asarray(factor)
    rows, cols = factor.shape
    row, col = np.nonzero(factor)
    first = np.ones(row.size, bool)
    first[1:] = row[1:] != row[:-1]
    previous = np.where(first, -1, np.roll(col, 1))
    stored = row.size + int(np.sum((col - previous - 1) // 16))
    deltas = stored * value_bytes + -(-stored // 2)
    bitmask = row.size * value_bytes + -(-rows * cols // 8)
    return min(deltas, bitmask) + 4 * (rows + 1)
