"""How a matrix is packed: which encoding, how many lanes, and where the work is done."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax.format import layout, packing_jax, packing_numpy
from macko_jax.format.layout import WARP

ENCODINGS = ("bitmask", "delta4", "delta5", "two_bank")
LANES = (1, 2, 4, 8, 16, 32)
MULTIPROCESSORS = 132  # of an H200
SPARSE = 0.15  # share of non-zeros from which on "delta5" need not be looked at
WORTH = 0.94  # of the bytes of "delta4", at which "delta5" is as fast
# Times the bytes of "delta4", at which "two_bank" is as fast with values of 1 and of 2 bytes, and how
# many columns x may have to lie twice in an H200's shared memory.
TWO_BANK_WORTH = {1: 1.06, 2: 1.02}
TWO_BANK_COLS = 18_000
MAX_STORED = np.iinfo(np.int32).max
MAX_COLS = 2**26  # keeps the arithmetic of `layout.memory_group` exact
Capacity = int | Callable[[int], int] | None  # groups to have room for; see `format.compress`


def choose_encoding(shape, dtype, count_groups: Callable[[str], int]) -> str:
    """The default encoding; `count_groups` tells how many groups of eight one would store.

    For 8-bit and 16-bit values "delta4": the GPU kernel decodes it twice as fast as a bitmask,
    which more than pays for up to a tenth more bytes. Where few gaps are too long for "two_bank",
    that is faster still, if x has room twice. Where so many gaps are long that "delta5" saves more
    time by its bytes than it takes by its instructions, "delta5" (docs/kernel.md). For float32,
    where indices weigh half as much, "bitmask" or "delta4", whichever has fewer bytes.
    """
    rows, cols = shape
    value_bytes = layout.GROUP * jnp.dtype(dtype).itemsize
    groups = count_groups("bitmask")

    def bytes_of(encoding):
        return count_groups(encoding) * (value_bytes + layout.code_bytes(encoding))

    if jnp.dtype(dtype).itemsize <= 2:
        sparse = layout.GROUP * groups < SPARSE * rows * cols
        if sparse:
            return "delta5" if bytes_of("delta5") <= WORTH * bytes_of("delta4") else "delta4"
        most = TWO_BANK_WORTH[jnp.dtype(dtype).itemsize] * bytes_of("delta4")
        return "two_bank" if cols <= TWO_BANK_COLS and bytes_of("two_bank") <= most else "delta4"
    bitmask = groups * value_bytes + 4 * rows * layout.words_per_row(cols)
    # Explicit zeros only add to delta4, so they need no counting where it has lost already.
    without_zeros = groups * (value_bytes + layout.code_bytes("delta4"))
    return "bitmask" if bitmask <= without_zeros or bitmask <= bytes_of("delta4") else "delta4"


def choose_lanes(rows: int, groups: int) -> int:
    """Lanes that share a row, by what is fastest on an H200; elsewhere it only affects speed.

    The end of a row takes a warp as long as several groups of its lanes. So lanes are as few as
    keep half of a multiprocessor's warps busy; but strips are no longer than 14 groups, or 8 where
    only half of the warps are busy, and no shorter than two (docs/results/lanes_h200.json).
    """
    mean = groups // max(rows, 1)
    share = -(-rows // MULTIPROCESSORS)
    for lanes in (8, 16, 32):
        warps = share * lanes // WARP
        if warps >= 16 and mean <= lanes * (14 if warps > 16 else 8):
            break
    return max(n for n in LANES if n == 1 or n <= min(lanes, mean // 2))


def shared_capacity(groups: int) -> int:
    """At most 1/256 more groups, so that matrices of nearly as many have arrays of equal shapes.

    Layers of a model that are pruned alike then share compiled kernels, which for a large model
    are minutes of compilation.
    """
    step = 1 << max(0, groups.bit_length() - 9)
    return -(-groups // step) * step


def pack(
    weight,
    encoding: str | None,
    lanes: int | None,
    capacity: Capacity,
    on_device: bool | None = None,
):
    """Packs `weight` [rows, cols]: NumPy arrays on the host, JAX arrays where they lie.

    `on_device` asks for the way of the one or the other; None is that of where the weight lies.

    Returns:
      (values, codes, row_offsets, starts), encoding, lanes; see `format.MackoMatrix`.
    """
    if on_device is None:
        on_device = isinstance(weight, jax.Array) and _on_accelerator(weight)
    weight = weight if on_device else np.asarray(weight)
    steps = packing_jax if on_device else packing_numpy
    elements = steps.find(weight)
    count_groups = functools.cache(functools.partial(steps.count_groups, elements))
    encoding = encoding or choose_encoding(weight.shape, weight.dtype, count_groups)
    groups = count_groups(encoding)
    capacity = _check_capacity(groups, capacity, encoding)
    lanes = lanes or choose_lanes(weight.shape[0], groups)
    return steps.fill(weight, elements, encoding, lanes, capacity), encoding, lanes


def _check_capacity(groups: int, capacity: Capacity, encoding: str) -> int:
    """The capacity to pack with, or an error."""
    most = MAX_STORED // layout.GROUP
    if callable(capacity):  # it may ask for more than fits, where what is needed fits
        capacity = min(capacity(groups), max(groups, most))
    elif capacity is None:
        capacity = groups
    if capacity < groups:
        raise ValueError(
            f"capacity={capacity} groups of 8 is too small: this matrix takes {groups} in the "
            f"encoding {encoding!r}; pass at least that"
        )
    if capacity > most:
        raise ValueError(
            f"the matrix would store {layout.GROUP * capacity} elements; at most {MAX_STORED} fit "
            "32-bit offsets. Split it by rows"
        )
    return capacity


def _on_accelerator(weight: jax.Array) -> bool:
    return all(device.platform != "cpu" for device in weight.devices())
