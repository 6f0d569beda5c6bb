"""The encoding "two_bank": 3-bit deltas, and a bit that says which of two copies of x is read.

The lanes of a warp gather 32 elements of x at a time from the 32 banks of shared memory, and the
gather takes as many passes as the fullest bank has elements: 3.5 for random columns. Here every
column lies in two banks, and each element says from which one it is read, the emptier one where
that can be. This is the power of two choices; it takes 2.1 passes. A code is eight nibbles, as in
"delta4": the lower three bits are a delta, and the highest one is the *bank bit*.

A column takes three words of shared memory, an odd number, so that columns are spread over all
banks. Copy 0 is the first of them; copy 1 is the second for even lanes of a warp, and the third for
odd ones: of pairs of neighbours alone, many would lie side by side. Banks are chosen for the
32 / lanes consecutive rows that a warp works on together. The bits only affect speed.

References:
  Azar, Broder, Karlin and Upfal, Balanced Allocations, SIAM J. Comput. 29 (1999).
"""

import numpy as np

from macko_jax.format.layout import BANKS, WARP, repeat

WORDS = 3  # of shared memory for a column
BANK_BITS = 0x01010101  # of a code shifted by 3 (7): those of elements 0, 2, 4, 6 (1, 3, 5, 7)


def _distance(lane):
    """The way from copy 0 to copy 1, in words and in banks."""
    return (lane & 1) + 1


def reader(ops):
    """The function from columns to addresses of x, for the registers of a kernel's lanes.

    It takes the columns of elements 0, 2, 4, 6 and of 1, 3, 5, 7 as the bytes of two words, each at
    most 56, and the code, and gives addresses in words of shared memory in the same way.
    """
    left = _distance(ops.thread()) - 1  # what a bank bit of 1 has to be shifted by
    bank_bits = ops.integer(BANK_BITS) << left
    shifts = [ops.integer(highest) - left for highest in (3, 7)]

    def addresses(even, odd, code):
        return [
            columns * WORDS + ((code >> shift) & bank_bits)
            for columns, shift in zip((even, odd), shifts)
        ]

    return addresses


def banks(column):
    """The bank of copy 0 of columns, which may be modulo 256, uint8; NumPy and JAX arrays."""
    return column * np.uint8(WORDS) % np.uint8(BANKS)


def turns(begin, count, lanes: int, groups: int):
    """The groups that the lanes of a warp read at the same time, turn after turn.

    Args:
      begin, count: [rows] the first group in memory of each row, and its number of groups; NumPy or
        JAX arrays.
      groups: how many there is room for.

    Returns:
      group: [32, turns] the group of each lane, `groups` where it has none. JAX has as many turns
      as there can be at most.
    """
    xp, rows = begin.__array_namespace__(), begin.shape[0]
    together = WARP // lanes  # rows
    pad = -rows % together
    begin, count = (xp.pad(a, (0, pad)).reshape(-1, together) for a in (begin, count))
    steps = -(-count.max(axis=1) // lanes)
    which = repeat(xp.arange(steps.shape[0]), steps, groups // lanes + rows)
    step = xp.arange(which.shape[0]) - (xp.cumsum(steps) - steps)[which]
    slot = xp.arange(WARP)[:, None]
    local = step * lanes + slot % lanes
    row = which, slot // lanes
    return xp.where(local < count[row], begin[row] + local, groups)


def choose(taken, lane_banks_before):
    """Chooses copies for one lane's group in every turn, each the one whose bank is less full.

    When the lanes have chosen one after the other, a gather takes 2.3 passes. When all choose anew,
    and now take the other copy where both banks are equally full, that moves elements which bar the
    way of later ones: 2.07 passes, where 2 is the best.

    Args:
      taken: three words of bits [turns, 8], of the banks from which at least one, two and three
        elements are read in this turn by the lanes that have chosen.
      lane_banks_before: the lane of the warp, uint32; the banks of copy 0, uint8 [turns, 8], beyond
        `BANKS` where the lane has no group; and, where it is to choose anew, what it has chosen.

    Returns:
      the new `taken`; whether copy 1 is read, bool [turns, 8].
    """
    lane, bank, *before = lane_banks_before
    xp, bank = bank.__array_namespace__(), bank.astype(np.uint32)
    distance, there = _distance(lane), bank < BANKS
    copy_0 = xp.where(there, np.uint32(1) << bank % BANKS, np.uint32(0))
    copy_1 = _rotate(copy_0, distance)
    one, two, three = taken
    if before:
        was = xp.where(before[0], copy_1, copy_0)
        one, two, three = one & ~(was & ~two), two & ~(was & ~three), three & ~was
    likes, back = (copy_1, distance) if before else (copy_0, BANKS - distance)
    fuller = [level & ~_rotate(level, back) for level in (one, two, three)]  # than the other's
    leaves = (fuller[0] | fuller[1] | fuller[2]) & likes != 0
    chosen = ~leaves & there if before else leaves
    read = xp.where(chosen, copy_1, copy_0)
    return (one | read, two | one & read, three | two & read), chosen


def _rotate(bits, count):
    """Rotates words to the left by `count` bits."""
    return bits << count | bits >> BANKS - count
