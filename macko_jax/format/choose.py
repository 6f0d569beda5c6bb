"""Which encoding and how many lanes a matrix gets when its caller names none.

The rules are fitted to an H200, each with the record under docs/results that it comes from, and
take the number of SMs and the shared memory of the card that is packed for; see `cards`. On a CPU,
unless a card is named, what is packed is meant for it and gets `CPU`. A choice only affects speed
and size: every encoding runs on every platform, and `load` packs a bitmask anew on a GPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from macko_jax.format import cards, two_bank
from macko_jax.format.codes import code_bytes
from macko_jax.format.layout import GROUP, LANES, WARP

# The fastest on CPUs, for one vector and for many: 4096 x 4096 float32 at 0.5 takes 2.2 times as
# long in "delta4" for one vector, and 3.4 times for 64 (spmv_cpu.json).
CPU = ("bitmask", 1)  # encoding and lanes
# "delta5" is not looked at from this density on. It is the faster one up to the given share of the
# bytes of "delta4", which is below a density of 0.12 (tuning_h200.json).
SPARSE = 0.15
DELTA5_WORTH = 0.94
# How many times the bytes of "delta4" a "two_bank" of values of 1 and of 2 bytes may have and be as
# fast: from densities of 0.3 and 0.4 on (spmv_h200_8bit_choice.json, spmv_h200_choice.json). With
# values of 4 bytes the two are equally fast, and "delta4" is never larger.
TWO_BANK_WORTH = {1: 1.06, 2: 1.02}
# So many columns of x fit twice into the shared memory of an H200; where a GPU has less of it, no
# more than fit beside so many bytes of slack.
TWO_BANK_COLS = 18_000
TWO_BANK_SLACK = 1024


def is_for_cpu() -> bool:
    """Whether what is packed here is meant for a CPU."""
    return jax.default_backend() == "cpu" and not (cards.named() or cards.live())


def choose_encoding(shape, dtype, count_groups: Callable[[str], int]) -> str:
    """The encoding that is the fastest on a GPU, judged by bytes.

    Args:
      shape: (rows, cols).
      dtype: type of the values.
      count_groups: tells how many groups of eight slots an encoding stores.

    Returns:
      "delta5" where long gaps are so many that it saves more time by its bytes than it takes by its
      instructions; "two_bank" where gaps too long for its 3-bit deltas are few and x fits twice;
      "delta4" otherwise.
    """
    rows, cols = shape
    value_bytes = jnp.dtype(dtype).itemsize

    def bytes_of(encoding):
        return count_groups(encoding) * (GROUP * value_bytes + code_bytes(encoding))

    if GROUP * count_groups("bitmask") < SPARSE * rows * cols:
        return "delta5" if bytes_of("delta5") <= DELTA5_WORTH * bytes_of("delta4") else "delta4"
    if value_bytes not in TWO_BANK_WORTH or cols > _most_two_bank_cols():
        return "delta4"
    most = TWO_BANK_WORTH[value_bytes] * bytes_of("delta4")
    return "two_bank" if bytes_of("two_bank") <= most else "delta4"


def _most_two_bank_cols() -> int:
    room = cards.here().plan_bytes - TWO_BANK_SLACK
    return min(TWO_BANK_COLS, room // (4 * two_bank.WORDS))


def choose_lanes(rows: int, groups: int) -> int:
    """Number of lanes that share a row, the fastest one by what an H200 takes (lanes_h200.json).

    The end of a row takes a warp as long as several groups of its lanes. So lanes are as few as
    keep half of an SM's warps busy; but lane chunks are no longer than 14 groups, or 8 where only
    half of the warps are busy, and no shorter than two.
    """
    mean = groups // max(rows, 1)
    share = -(-rows // cards.here().multiprocessors)
    lanes = WARP
    for lanes in (8, 16, 32):
        warps = share * lanes // WARP
        if warps >= 16 and mean <= lanes * (14 if warps > 16 else 8):
            break
    return max(n for n in LANES if n == 1 or n <= min(lanes, mean // 2))


def shared_capacity(groups: int) -> int:
    """A capacity of at most 1/256 more groups, the same for matrices of nearly as many.

    The layers of a model that are pruned alike then have arrays of equal shapes and share compiled
    kernels, which for a large model are minutes of compilation.
    """
    step = 1 << max(0, groups.bit_length() - 9)
    return -(-groups // step) * step
