"""The encoding "choice": 3-bit deltas, and a bit that says which of two copies of x is read.

The lanes of a warp gather 32 elements of x at a time from the 32 banks of shared memory, where the
fullest bank holds 3.5 of random columns. If every column lies in two banks, and each element says
from which one it is read, that can be 2.4: a choice of two. A code is eight nibbles, as in
"delta4": the lower three bits are a delta, and the highest one is the choice.

A column takes three words of shared memory, an odd number, so that columns are spread over all
banks; copy 0 is the first of them, and copy 1 the second. The choices are made for the 32 / lanes
consecutive rows that a warp works on together. They only affect speed.
"""
import numpy as np

from macko_jax.layout import BANKS, WARP, join_deltas

WORDS = 3  # of shared memory for a column
CHOICES = 0x01010101  # of a code shifted right by 3 (7), those of elements 0, 2, 4, 6 (1, 3, 5, 7)


def copies(even, odd, code):
    """Places of elements 0, 2, 4, 6 and 1, 3, 5, 7 in words of shared memory, the bytes of two words.

    From such words of columns, at most 56; for registers of a kernel.
    """
    return even * WORDS + ((code >> 3) & CHOICES), odd * WORDS + ((code >> 7) & CHOICES)


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


def choose(bank, taken):
    """Chooses copies for one lane's group in every turn, each the one whose bank is less full.

    Args:
      bank: uint32 [turns, 8] of copy 0; beyond `BANKS` where the lane has no group.
      taken: three words of bits [turns, 8], of the banks from which at least one, two and three
        elements are read in this turn by the lanes before.

    Returns:
      the bits of the choices where they stand in a code, uint32 [turns]; the new `taken`.
    """
    xp = bank.__array_namespace__()
    one, two, three = taken
    first = xp.where(bank < BANKS, np.uint32(1) << bank % BANKS, np.uint32(0))
    fuller = (one & ~_next(one)) | (two & ~_next(two)) | (three & ~_next(three))
    second = fuller & first != 0
    chosen = xp.where(second, first << 1 | first >> (BANKS - 1), first)
    taken = one | chosen, two | one & chosen, three | two & chosen
    return join_deltas(second, 4) << 3, taken


def _next(bits):
    """At each bank, the bit of the bank after it."""
    return bits >> 1 | bits << (BANKS - 1)
