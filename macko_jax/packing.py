"""How a matrix is packed: which encoding, how many lanes, and where the work is done."""
import jax
import jax.numpy as jnp
import numpy as np

from macko_jax import layout, packing_jax, packing_numpy

ENCODINGS = ("bitmask", "delta4")
LANES = (1, 2, 4, 8, 16, 32)
MAX_STORED = np.iinfo(np.int32).max
MAX_COLS = 2**26  # keeps the arithmetic of `layout.memory_group` exact


def choose_encoding(shape, dtype, bitmask_groups: int, delta4_groups: int) -> str:
    """The default encoding, from the groups of eight that each would store.

    For 8-bit and 16-bit values "delta4": the GPU kernel decodes it twice as fast as a bitmask, which more
    than pays for up to a tenth more bytes (docs/kernel.md). For float32, where indices weigh half
    as much, the one of fewer bytes.
    """
    if jnp.dtype(dtype).itemsize <= 2:
        return "delta4"
    rows, cols = shape
    group_bytes = layout.GROUP * jnp.dtype(dtype).itemsize
    bitmask = bitmask_groups * group_bytes + 4 * rows * layout.words_per_row(cols)
    delta4 = delta4_groups * (group_bytes + 4)
    return "bitmask" if bitmask <= delta4 else "delta4"


def choose_lanes(rows: int, groups: int) -> int:
    """The most lanes that leave each at least two groups of an average row."""
    mean = groups // max(rows, 1)
    return max(lanes for lanes in LANES if lanes == 1 or 2 * lanes <= mean)


def pack(weight, encoding: str | None, lanes: int | None, capacity: int | None):
    """Packs `weight` [rows, cols]: NumPy arrays on the host, JAX arrays where they lie.

    Returns:
      (values, codes, row_offsets, starts), encoding, lanes; see `format.MackoMatrix`.
    """
    steps = packing_jax if isinstance(weight, jax.Array) and _on_accelerator(weight) \
        else packing_numpy
    if steps is packing_numpy:
        weight = np.asarray(weight)
    elements = steps.find(weight)
    bitmask_groups = steps.count_groups(elements, "bitmask")
    if encoding is None:
        # Explicit zeros only add to delta4, so they need no counting where it has lost already.
        encoding = choose_encoding(weight.shape, weight.dtype, bitmask_groups, bitmask_groups)
        if encoding == "delta4":
            encoding = choose_encoding(weight.shape, weight.dtype, bitmask_groups,
                                       steps.count_groups(elements, "delta4"))
    groups = bitmask_groups if encoding == "bitmask" else steps.count_groups(elements, "delta4")
    if capacity is None:
        capacity = groups
    if capacity < groups:
        raise ValueError(
            f"capacity={capacity} groups of 8 is too small: this matrix takes {groups} in the "
            f"encoding {encoding!r}; pass at least that")
    if layout.GROUP * capacity > MAX_STORED:
        raise ValueError(
            f"the matrix would store {layout.GROUP * capacity} elements; at most {MAX_STORED} fit "
            "32-bit offsets. Split it by rows")
    lanes = lanes or choose_lanes(weight.shape[0], groups)
    return steps.fill(weight, elements, encoding, lanes, capacity), encoding, lanes


def _on_accelerator(weight: jax.Array) -> bool:
    return all(device.platform != "cpu" for device in weight.devices())
