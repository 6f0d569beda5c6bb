"""How many non-zeros a matrix, or each factor of a pair, may have."""

import math


def count_nonzeros(density: float, shape: tuple[int, int]) -> int:
    """Non-zeros that `density` allows a matrix of `shape`: rounded down, never one over."""
    return min(math.floor(density * (shape[0] * shape[1])), shape[0] * shape[1])
