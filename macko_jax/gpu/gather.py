"""How a product that gathers from x is laid out on the device: `spmv` and `sddmm`."""

import dataclasses

from macko_jax.format.layout import Layout
from macko_jax.gpu import device, occupancy, tuning
from macko_jax.gpu.kernel import Problem
from macko_jax.gpu.staging import Vectors
from macko_jax.lanes.mosaic import WARPGROUP


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be varied without a change of the result.

    Attributes:
      blocks: thread blocks that share the rows; one for each SM.
      warps: warps of a block, a multiple of 4.
      ahead: the prefetch distance, groups of eight elements that a lane loads ahead.
      vectors: how many (1, 2, 4 or 8) are multiplied in one pass over the matrix.
      two_copies: whether x lies in shared memory twice, see `format.two_bank`.
      narrow: whether a 16-bit x lies there as it is, and not as float32.
    """

    blocks: int
    warps: int
    ahead: int
    vectors: int
    two_copies: bool = False
    narrow: bool = False

    def __post_init__(self):
        if self.warps % WARPGROUP or not 0 < self.warps <= tuning.MOST_WARPS:
            raise ValueError(
                f"warps must be a multiple of {WARPGROUP} up to {tuning.MOST_WARPS}, got "
                f"{self.warps}"
            )
        if self.vectors not in (1, 2, 4, 8):
            raise ValueError(f"vectors must be 1, 2, 4 or 8, got {self.vectors}")
        if self.blocks < 1 or self.ahead < 1:
            raise ValueError(f"blocks and ahead must be positive, got {self}")


@dataclasses.dataclass(frozen=True)
class GatherPlan:
    """A product that gathers from vectors x in shared memory, as it is compiled."""

    problem: Problem
    settings: Settings

    @property
    def layout(self) -> Layout:
        return self.problem.layout

    @property
    def warps(self) -> int:
        """Warps of a block, all of which work."""
        return self.settings.warps

    @property
    def vectors(self) -> int:
        """How many are multiplied in one pass."""
        return self.settings.vectors

    @property
    def x(self) -> Vectors:
        """The vectors of a pass, in shared memory."""
        return Vectors(
            self.problem.x_dtype,
            length=self.layout.shape[1],
            count=self.settings.vectors,
            batch=self.problem.known_batch,
            before=self.problem.fusion.before,
            two_copies=self.settings.two_copies,
            narrow=self.settings.narrow,
        )


def settle(problem: Problem) -> Settings | None:
    """The settings for a product; None where shared memory has no room for one vector."""
    layout, x_dtype = problem.layout, problem.x_dtype
    vectors = min(tuning.VECTORS[x_dtype.itemsize], 1 << (problem.known_batch - 1).bit_length())
    while vectors > 1 and not _fits(problem, vectors):
        vectors //= 2
    narrow = not _fits(problem, vectors)
    if narrow and (x_dtype.itemsize != 2 or problem.fusion.before or not _fits(problem, 1, True)):
        return None
    blocks = occupancy.row_blocks(layout.shape[0])
    most = tuning.WARPS_FOR_8_VECTORS if vectors >= 8 else tuning.MOST_WARPS
    one_word = vectors * x_dtype.itemsize <= 4
    return Settings(
        blocks=blocks,
        warps=min(occupancy.busy_warps(layout, blocks), most),
        ahead=occupancy.prefetch_distance(layout, problem.dtype, blocks, vectors),
        vectors=vectors,
        two_copies=layout.encoding == "two_bank"
        and one_word
        and _fits(problem, vectors, two_copies=True),
        narrow=narrow,
    )


def _fits(problem: Problem, vectors: int, narrow: bool = False, two_copies: bool = False) -> bool:
    settings = Settings(
        blocks=1, warps=4, ahead=1, vectors=vectors, two_copies=two_copies, narrow=narrow
    )
    return 4 * GatherPlan(problem, settings).x.slots <= device.shared_bytes()
