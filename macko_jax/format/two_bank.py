"""The encoding "two_bank": 3-bit deltas, and a bit that says which of two copies of x is read.

The lanes of a warp gather 32 elements of x at a time from the 32 banks of shared memory, where the
fullest bank holds 3.5 of random columns. If every column lies in two banks, and each element says
from which one it is read, that can be 2.1: a choice of two. A code is eight nibbles, as in
"delta4": the lower three bits are a delta, and the highest one is the choice.

A column takes three words of shared memory, an odd number, so that columns are spread over all
banks. Copy 0 is the first of them; copy 1 is the second for even lanes of a warp, and the third for
odd ones: of pairs of neighbours alone, many would lie side by side. The choices are made for the
32 / lanes consecutive rows that a warp works on together. They only affect speed.
"""

import numpy as np

from macko_jax.format.layout import BANKS, WARP

WORDS = 3  # of shared memory for a column
CHOICES = 0x01010101  # of a code shifted right by 3 (7), those of elements 0, 2, 4, 6 (1, 3, 5, 7)


def _distance(lane):
    """From copy 0 to copy 1, in words or banks."""
    return (lane & 1) + 1


def reader(ops):
    """The function from columns to places, for the registers of a kernel's lanes.

    It takes the columns of elements 0, 2, 4, 6 and of 1, 3, 5, 7 as the bytes of two words, each at
    most 56, and the code, and gives places in words of shared memory in the same way.
    """
    left = _distance(ops.thread()) - 1  # what a choice of 1 has to be shifted by
    choices = ops.integer(CHOICES) << left
    shifts = [ops.integer(highest) - left for highest in (3, 7)]

    def places(even, odd, code):
        return [
            columns * WORDS + ((code >> shift) & choices)
            for columns, shift in zip((even, odd), shifts)
        ]

    return places


def banks(base, delta):
    """The bank of copy 0 of every element, uint8 [groups, 8]; NumPy and JAX arrays.

    Args:
      base: [groups] the column from which each group counts, in any integer type.
      delta: [groups, 8] columns skipped before each element.
    """
    xp = delta.__array_namespace__()
    passed = xp.cumsum(delta + np.uint8(1), axis=1, dtype=np.uint8)
    column = base.astype(np.uint8)[:, None] + passed - np.uint8(1)  # modulo 256 will do
    return column * np.uint8(WORDS) % np.uint8(BANKS)


def turns(begin, count, lanes: int, groups: int, **total):
    """Which groups a warp visits at the same time.

    Args:
      begin, count: [rows] the first group in memory of each row, and its number of groups.
      total: `total_repeat_length` for JAX arrays, see `most_turns`.

    Returns:
      group: [32, turns] the group of each lane, `groups` where it has none.
    """
    xp, rows = begin.__array_namespace__(), begin.shape[0]
    together = WARP // lanes  # rows
    pad = -rows % together
    begin, count = (xp.pad(a, (0, pad)).reshape(-1, together) for a in (begin, count))
    steps = -(-count.max(axis=1) // lanes)
    which = xp.repeat(xp.arange(steps.shape[0]), steps, **total)
    step = xp.arange(which.shape[0]) - (xp.cumsum(steps) - steps)[which]
    slot = xp.arange(WARP)[:, None]
    local = step * lanes + slot % lanes
    row = which, slot // lanes
    return xp.where(local < count[row], begin[row] + local, groups)


def most_turns(rows: int, groups: int, lanes: int) -> int:
    """A bound of the number of turns."""
    return groups // lanes + rows


def choose(bank, lane, taken, before=None):
    """Chooses copies for one lane's group in every turn, each the one whose bank is less full.

    One lane after the other makes it 2.3 turns a gather. If all choose anew, and now take the other
    copy where both banks are equally full, that moves on elements that bar the way of later ones:
    2.07 turns, where 2 is the best.

    Args:
      bank: uint32 [turns, 8] of copy 0; beyond `BANKS` where the lane has no group.
      lane: uint32, of the warp.
      taken: three words of bits [turns, 8], of the banks from which at least one, two and three
        elements are read in this turn by the lanes that have chosen.
      before: what the lane has chosen, bool [turns, 8], where it is to choose anew.

    Returns:
      whether copy 1 is read, bool [turns, 8]; the new `taken`.
    """
    xp = bank.__array_namespace__()
    anew, there = before is not None, bank < BANKS
    distance = _distance(lane)
    copy_0 = xp.where(there, np.uint32(1) << bank % BANKS, np.uint32(0))
    copy_1 = _turn(copy_0, distance)
    one, two, three = taken
    if anew:
        was = xp.where(before, copy_1, copy_0)
        one, two, three = one & ~(was & ~two), two & ~(was & ~three), three & ~was
    likes, back = (copy_1, distance) if anew else (copy_0, BANKS - distance)
    fuller = [level & ~_turn(level, back) for level in (one, two, three)]  # than the other's
    leaves = (fuller[0] | fuller[1] | fuller[2]) & likes != 0
    chosen = ~leaves & there if anew else leaves
    read = xp.where(chosen, copy_1, copy_0)
    return chosen, (one | read, two | one & read, three | two & read)


def _turn(bits, count):
    """Each bit of words to the place that is `count` higher, modulo 32."""
    return bits << count | bits >> BANKS - count
