"""Every tuned number of the kernels, and the rules that are fitted to measurements.

They were found on an H200 and only affect speed. Each names the record under docs/results that it
comes from; tests/test_tuning.py compares the rules with their records.
The numbers of packing are in macko_jax/format/choose.py.
"""

import math

from macko_jax.format.layout import GROUP, Layout

# Blocks and warps.
MOST_WARPS = 32  # of a block, the only one on its SM
# The sums of 8 vectors leave the 64 registers of a lane of 32 warps no room to load ahead
# (spmv_h200_batches.json).
WARPS_FOR_8_VECTORS = 16
DENSIFY_WARPS = 16  # more are slower (tuning_h200.json, "decode")

# Vectors of a pass, by the bytes of their elements (spmv_h200_batches.json).
VECTORS = {2: 8, 4: 4}

# Loads in flight.
SHORT_CHUNK, LONG_CHUNK = 2.5, 8.5  # groups of a lane in a row, see `prefetch_distance`
# Of an SM's warps together, for each lane, where few warps fit (tuning_h200.json, "groups in
# flight").
GROUPS_IN_FLIGHT = 48
MOST_AHEAD = 12  # groups, which take up to 108 of the 255 registers that a lane can have
# Of a thread and vector while x is staged (tuning_h200.json, "elements of x").
ELEMENTS_IN_FLIGHT = 8
# The same of so many vectors that are read by pairs (tuning_h200.json, "pairs of columns of x").
PAIRS_IN_FLIGHT = {2: 4, 4: 4, 8: 12}

# Groups that a lane visits at a time, so that one hides the latencies of another
# (spmv_h200_transposed.json, tuning_h200.json).
TRANSPOSED_TOGETHER = 4
DENSIFY_TOGETHER = 2

# A pass over a matrix costs (vectors + PASS) * (density + start), and to densify it and multiply
# `densify` in the same unit, whatever the density and the vectors. So (start, densify) are fitted
# to what an H200 takes for both (passes_or_densify_h200.json).
PASS = 5
COSTS = {
    "spmv": {16: (0.13, 15.1), 32: (0.3, 40)},
    "spmv_transposed": {16: (0.6, 14.5), 32: (0.6, 8.5)},
}


def passes_are_faster(
    product: str, layout: Layout, bits: int, batch: int, vectors: int, idle: float = 1
) -> bool:
    """True if passes over the matrix take less time than to densify it and a dense product.

    Args:
      product: "spmv" or "spmv_transposed".
      bits: of the elements that the dense product would take, 16 or 32.
      batch, vectors: the number of vectors, and of those of one pass.
      idle: how many times as long it may take to densify, because few warps have room to.
    """
    passes = -(-batch // vectors)
    start, densify = COSTS[product][bits]
    densify *= idle
    cost = passes * (vectors + PASS) * (layout.stored / math.prod(layout.shape) + start)
    return passes == 1 or cost <= densify


def prefetch_distance(layout: Layout, itemsize: int, vectors: int, several: bool) -> int:
    """Groups that a lane loads ahead (tuning_h200.json, "groups that a lane loads ahead").

    Two or, of 8-bit values, whose groups have half the bytes, three; one for short rows. Where
    warps work on several rows one after the other, it is one more if that leaves no more lanes
    idle at a row's end.

    Args:
      itemsize: bytes of a value.
      vectors: how many are multiplied in a pass.
      several: whether warps work on several rows one after the other.
    """
    chunk = layout.stored / GROUP / layout.shape[0] / layout.lanes  # groups
    if chunk <= SHORT_CHUNK:
        return 1
    if vectors > 1:
        return 2
    long, small = chunk > LONG_CHUNK, itemsize == 1
    least = 3 if small and (several or long) else 2
    most = least + 1 if several and (long or not small) else least
    return min(range(least, most + 1), key=lambda n: (-(-chunk // n) * n, -n))


def prefetch_distance_of_few(warps: int) -> int:
    """Groups that each lane of so few warps loads ahead, to keep enough of them in flight.

    No more than the registers of a lane have room for.
    """
    return min(max(2, GROUPS_IN_FLIGHT // warps), MOST_AHEAD)
