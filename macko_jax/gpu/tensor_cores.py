"""Eight or more vectors times a group of eight elements a lane, by the tensor cores.

They multiply in the time that single instructions need to convert. What makes them fit is that
`ldmatrix` gathers: each lane names a row of 16 bytes in shared memory, and the eight vectors at one
column are such a row. So for one element of every lane, at 32 columns, it brings an operand
[vectors, lanes]. The other operand is the weights [lanes, elements], after a way through shared
memory. Their product has the sums of every element's vectors with the weights of every element; of
these the ones of an element with its own weights are used.
"""

from macko_jax.format.layout import GROUP
from macko_jax.gpu.row_walk import convert
from macko_jax.lanes.mosaic import WARP, sum_over_lanes

VECTORS = 8  # of 16 bits, in the 16 bytes of a row
PAIRS = GROUP // 2  # of elements, whose vectors fill the 16 rows of an operand
BUFFER = WARP * GROUP // 2  # words of shared memory that a warp's weights take


def zeros(ops, planes: list) -> list:
    """The sums of a row before its first group."""
    return [[[ops.real(0)] * 4 for _ in range(PAIRS)] for _ in planes]


def multiply(ops, planes: list, first_slot: int, dtype, sums: list, groups: list) -> list:
    """The sums over a row with one more group in them.

    Args:
      planes: `VECTORS` packed vectors in shared memory each.
      first_slot: of shared memory, where each warp has a `BUFFER`.
      dtype: of the weights, that of the vectors or of 8 bits, which that represents exactly.
    """
    [group] = groups
    kind = planes[0].dtype
    words = convert(ops, group.values, dtype, kind)
    place = ops.thread() * 16 + 4 * first_slot
    ops.store_shared_words(place, words, ops.thread() >= 0)
    ops.warp_barrier()
    weights = ops.load_fragments(place)
    ops.warp_barrier()

    def add(x, pair, total):
        first, second = (ops.load_fragments(x.place(group.columns[2 * pair + i])) for i in (0, 1))
        for half in (0, 2):  # of the lanes
            a = first[half], second[half], first[half + 1], second[half + 1]
            total = ops.multiply_add(a, weights[half : half + 2], total, kind)
        return total

    return [
        [add(x, pair, total) for pair, total in enumerate(totals)]
        for x, totals in zip(planes, sums)
    ]


def totals(ops, sums: list) -> list:
    """(a vector's number, its sum over the row, whether the lane writes it) for every plane."""
    lane = ops.thread() & (WARP - 1)
    within, out = lane & 3, []
    for plane, pairs in enumerate(sums):
        mine = ops.real(0)
        for pair, (even, _, _, odd) in enumerate(pairs):
            mine = ops.select(within == pair, even + odd, mine)
        [mine] = sum_over_lanes(ops, [mine], 4)
        out.append(((lane >> 2) + plane * VECTORS, mine, within == 0))
    return out
