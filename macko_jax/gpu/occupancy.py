"""How the rows of a matrix are shared out among blocks and warps: one block on every SM."""

import jax.numpy as jnp

from macko_jax.format.layout import WARP, Layout
from macko_jax.gpu import device, tuning
from macko_jax.lanes.mosaic import WARPGROUP


def row_blocks(rows: int) -> int:
    """Blocks that share so many rows, each with an SM to itself."""
    return min(device.multiprocessors(), rows)


def busy_warps(layout: Layout, blocks: int) -> int:
    """Warps of a block for its share of the rows: as few as take no more rounds than 32 do."""
    each = rounds(layout, blocks) * WARPGROUP
    return -(-_warpfuls(layout, blocks) // each) * WARPGROUP


def rounds(layout: Layout, blocks: int) -> int:
    """How often the most warps of a block get rows to work on, one row after the other."""
    return -(-_warpfuls(layout, blocks) // tuning.MOST_WARPS)


def _warpfuls(layout: Layout, blocks: int) -> int:
    """A block's share of the rows, counted in as many rows as a warp works on at a time."""
    share = -(-layout.shape[0] // blocks)
    return -(-share * layout.lanes // WARP)


def prefetch_distance(layout: Layout, dtype, blocks: int, vectors: int = 1) -> int:
    """Groups that each lane loads ahead in a block, of so many, with all its warps."""
    several = rounds(layout, blocks) > 1
    return tuning.prefetch_distance(layout, jnp.dtype(dtype).itemsize, vectors, several)


def block_warps(warps: int) -> int:
    """Warps of a block of which so many work."""
    return -(-warps // WARPGROUP) * WARPGROUP


def row_buffers(
    layout: Layout, buffer_bytes: int, other_bytes: int = 0, most: int = tuning.MOST_WARPS
) -> tuple[int, int] | None:
    """Working warps, and rows that each works on at a time, where such a row needs a shared buffer.

    No more warps than the rows of a block keep busy, nor than `most`. Fewer than a warpgroup where
    no more buffers fit beside the `other_bytes`, and None where not even one does.
    """
    rows = -(-layout.shape[0] // row_blocks(layout.shape[0]))
    rows_per_warp, room = WARP // layout.lanes, device.shared_bytes() - other_bytes
    while rows_per_warp:
        warps = room // (rows_per_warp * buffer_bytes)
        warps = min(most, warps // WARPGROUP * WARPGROUP)
        if warps * rows_per_warp >= 8 or (warps and rows_per_warp == 1):
            return min(warps, block_warps(-(-rows // rows_per_warp))), rows_per_warp
        rows_per_warp //= 2
    few = room // buffer_bytes
    return (few, 1) if few > 0 else None
