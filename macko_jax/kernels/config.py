"""How a product is laid out on a device: a rule of shape and batch."""
import dataclasses
import functools

import jax

from macko_jax.layout import GROUP

WARPGROUP = 4  # warps; `lanes.WARPGROUP`, without its imports
BREAK_EVEN_BATCH = 32  # vectors; with more, a dense decode and product are faster
SHARED_BYTES = 220 * 1024  # of a Hopper multiprocessor's 227 KiB; the rest is the kernel's own


@dataclasses.dataclass(frozen=True)
class Settings:
    """Layout of one product on the device.

    Attributes:
      blocks: thread blocks that share the rows; one for each multiprocessor.
      warps: warps of a block, a multiple of 4.
      unroll: groups of eight elements that a lane loads ahead.
      vectors: vectors (1, 2 or 4) that are multiplied in one pass over the matrix.
      stage_x: whether x is kept in shared memory, or gathered from global memory.
    """
    blocks: int
    warps: int
    unroll: int
    vectors: int
    stage_x: bool

    def __post_init__(self):
        if self.warps % WARPGROUP or not 0 < self.warps <= 32:
            raise ValueError(f"warps must be a multiple of {WARPGROUP} up to 32, got {self.warps}")
        if self.vectors not in (1, 2, 4):
            raise ValueError(f"vectors must be 1, 2 or 4, got {self.vectors}")
        if self.blocks < 1 or self.unroll < 1:
            raise ValueError(f"blocks and unroll must be positive, got {self}")


@functools.cache
def multiprocessors() -> int:
    """Of the first GPU here; of an H200 where there is none (the count only affects speed)."""
    gpus = [d for d in jax.local_devices() if d.platform == "gpu"]
    return getattr(gpus[0], "core_count", 132) if gpus else 132


def choose(matrix, batch: int) -> Settings:
    """The settings for a product of a `strips.Matrix` with `batch` vectors."""
    rows, cols = matrix.shape
    vectors = next(v for v in (4, 2, 1) if v == 1 or (v <= batch and _fits(cols, v)))
    blocks = min(multiprocessors(), rows)
    tasks = -(-rows // blocks) * matrix.lanes // 32  # of a block's warps
    groups_per_lane = matrix.stored / GROUP / rows / matrix.lanes
    return Settings(
        blocks=blocks, warps=_warps(tasks), unroll=2 if groups_per_lane > 2.5 else 1,
        vectors=vectors, stage_x=_fits(cols, vectors))


def _fits(cols: int, vectors: int) -> bool:
    return (cols + 64) * vectors * 4 <= SHARED_BYTES


def _warps(tasks: int) -> int:
    """As many warps as can be had with the fewest idle in the last round of tasks."""
    if tasks <= 32:
        return min(32, max(WARPGROUP, -(-tasks // WARPGROUP) * WARPGROUP))
    return max((32, 28, 24), key=lambda w: (tasks / (-(-tasks // w) * w) > 0.97, w))
