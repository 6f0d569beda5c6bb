"""How a product is laid out on a device: a rule of shape and batch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from macko_jax.format.choose import MULTIPROCESSORS
from macko_jax.format.layout import GROUP
from macko_jax.gpu.staging import Vectors
from macko_jax.lanes.mosaic import WARP, WARPGROUP

WARPS_FOR_MANY = 16  # at most, of a block that multiplies 8 vectors in a pass
GROUPS_IN_FLIGHT = 48  # of a multiprocessor's warps together, for each lane
SHORT, LONG = 2.5, 8.5  # groups of a lane in a row, see `groups_ahead`
HOPPER = "9.0"  # the compute capability of an H100 and an H200
HOPPER_SHARED = 227 * 1024  # bytes of a multiprocessor's shared memory that a block can have
KERNELS_OWN = 7 * 1024  # of these, not for what is planned here

# A pass over a matrix costs (vectors + PASS) * (density + start), and a dense decode with a dense
# product `decode` in the same unit, whatever the density and the vectors. So (start, decode) are
# fitted to what an H200 takes for both (docs/results/passes_or_densify_h200.json).
PASS = 5
COSTS = {
    "spmv": {"16 bits": (0.13, 15.1), "32 bits": (0.3, 40)},
    "spmv_transposed": {"16 bits": (0.6, 14.5), "32 bits": (0.6, 8.5)},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Layout of one product on the device.

    Attributes:
      blocks: thread blocks that share the rows; one for each multiprocessor.
      warps: warps of a block, a multiple of 4.
      unroll: groups of eight elements that a lane loads ahead.
      vectors: how many (1, 2, 4 or 8) are multiplied in one pass over the matrix.
      twice: whether x lies in shared memory twice, for an encoding that chooses; see `choice.py`.
    """

    blocks: int
    warps: int
    unroll: int
    vectors: int
    twice: bool = False

    def __post_init__(self):
        if self.warps % WARPGROUP or not 0 < self.warps <= 32:
            raise ValueError(f"warps must be a multiple of {WARPGROUP} up to 32, got {self.warps}")
        if self.vectors not in (1, 2, 4, 8):
            raise ValueError(f"vectors must be 1, 2, 4 or 8, got {self.vectors}")
        if self.blocks < 1 or self.unroll < 1:
            raise ValueError(f"blocks and unroll must be positive, got {self}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a product that gathers from vectors x when it is compiled.

    Attributes:
      matrix: a `strips.Matrix`.
    """

    matrix: object
    x_dtype: object
    batch: int
    settings: Settings

    before = None  # what is done to x first; see `Vectors`

    @property
    def x(self) -> Vectors:
        """The vectors of a pass, in shared memory."""
        return Vectors(
            self.x_dtype,
            length=self.matrix.shape[1],
            count=self.settings.vectors,
            batch=self.batch,
            before=self.before,
            twice=self.settings.twice,
        )


def multiprocessors() -> int:
    """Of the first GPU here; of an H200 where there is none (the count only affects speed)."""
    return _of_gpu("core_count", MULTIPROCESSORS)


def shared_bytes() -> int:
    """Of shared memory that a block can plan with, on the first GPU here or an H200."""
    there = _of_gpu("shared_memory_per_block_optin", HOPPER_SHARED)
    return min(there, HOPPER_SHARED) - KERNELS_OWN


def compute_capability() -> str:
    """Of the first GPU here; of an H200 where there is none."""
    return _of_gpu("compute_capability", HOPPER)


def why_no_kernels() -> str | None:
    """None if the first GPU here runs what Pallas makes for Mosaic GPU, or why it does not."""
    version = compute_capability()
    if int(version.split(".")[0]) < int(HOPPER.split(".")[0]):
        return f"the kernels are for compute capability {HOPPER} and later, not {version}"
    return None


@functools.cache
def _of_gpu(attribute: str, otherwise):
    gpus = [d for d in jax.local_devices() if d.platform == "gpu"]
    return getattr(gpus[0], attribute, otherwise) if gpus else otherwise


def row_blocks(rows: int) -> int:
    """Blocks that share so many rows, each with a multiprocessor to itself."""
    return min(multiprocessors(), rows)


def row_buffers(
    matrix, buffer_bytes: int, other_bytes: int = 0, most: int = 32
) -> tuple[int, int] | None:
    """Warps, and rows that each works on at a time, where every such row needs a shared buffer.

    No more warps than the rows of a block keep busy, nor than `most`. None if not even one row for
    each warp of a warpgroup fits beside the `other_bytes`.
    """
    rows = -(-matrix.shape[0] // row_blocks(matrix.shape[0]))
    rows_per_warp = 32 // matrix.lanes
    while rows_per_warp:
        warps = (shared_bytes() - other_bytes) // (rows_per_warp * buffer_bytes)
        warps = min(most, warps // WARPGROUP * WARPGROUP)
        if warps * rows_per_warp >= 8 or (warps and rows_per_warp == 1):
            busy = -(-rows // rows_per_warp)
            return min(warps, -(-busy // WARPGROUP) * WARPGROUP), rows_per_warp
        rows_per_warp //= 2
    return None


def unroll(warps: int) -> int:
    """Groups that each lane of so few warps loads ahead, to keep enough of them in flight."""
    return max(2, GROUPS_IN_FLIGHT // warps)


def choose(matrix, x_dtype, batch: int) -> Settings | None:
    """The settings for a product of a `strips.Matrix` with `batch` vectors of type `x_dtype`.

    None where shared memory has no room for one of them.
    """
    vectors = min(8 if jnp.dtype(x_dtype).itemsize == 2 else 4, 1 << (batch - 1).bit_length())
    while not _fits(matrix, x_dtype, vectors):
        vectors //= 2
        if not vectors:
            return None
    blocks = row_blocks(matrix.shape[0])
    # The sums of 8 vectors leave the 64 registers of a lane of 32 warps no room to load ahead.
    warps = min(busy_warps(matrix, blocks), WARPS_FOR_MANY if vectors >= 8 else 32)
    return Settings(
        blocks=blocks,
        warps=warps,
        unroll=groups_ahead(matrix, blocks, vectors),
        vectors=vectors,
        twice=_chooses(matrix, x_dtype, vectors),
    )


def by_passes(product: str, matrix, x_dtype, batch: int) -> bool:
    """Whether passes over the matrix are faster than a dense decode and a dense product."""
    vectors = choose(matrix, x_dtype, batch).vectors if product == "spmv" else 1
    passes = -(-batch // vectors)
    start, decode = COSTS[product][_kind(matrix, x_dtype)]
    cost = passes * (vectors + PASS) * (matrix.stored / math.prod(matrix.shape) + start)
    return passes == 1 or cost <= decode


def dense_dtype(dtype, x_dtype):
    """Of a matrix decoded for a product with vectors; they represent values of 8 bits exactly."""
    return jnp.dtype(x_dtype if jnp.dtype(dtype).itemsize == 1 else dtype)


def _kind(matrix, x_dtype) -> str:
    """Of a product in COSTS. Where types differ, the dense product is one of float32."""
    dtype = dense_dtype(matrix.dtype, x_dtype)
    return "16 bits" if dtype.itemsize == 2 and dtype == jnp.dtype(x_dtype) else "32 bits"


def groups_ahead(matrix, blocks: int, vectors: int = 1) -> int:
    """Groups that each lane loads ahead where a block, of so many, has all its warps.

    Two or, of 8-bit values, whose groups have half the bytes, three; one for short rows. Where
    warps work on several rows one after the other, one more if that leaves no more room at a row's
    end.
    """
    groups_per_lane = matrix.stored / GROUP / matrix.shape[0] / matrix.lanes
    if groups_per_lane <= SHORT:
        return 1
    if vectors > 1:
        return 2
    several, long = rounds(matrix, blocks) > 1, groups_per_lane > LONG
    small = jnp.dtype(matrix.dtype).itemsize == 1
    least = 3 if small and (several or long) else 2
    most = least + 1 if several and (long or not small) else least
    return min(range(least, most + 1), key=lambda n: (-(-groups_per_lane // n) * n, -n))


def _chooses(matrix, x_dtype, vectors: int) -> bool:
    """Whether x is to lie in shared memory twice: a word for each column, if there is room."""
    one_word = vectors * jnp.dtype(x_dtype).itemsize <= 4
    return (
        matrix.encoding == "two_bank" and one_word and _fits(matrix, x_dtype, vectors, twice=True)
    )


def _fits(matrix, x_dtype, vectors: int, twice: bool = False) -> bool:
    settings = Settings(blocks=1, warps=4, unroll=1, vectors=vectors, twice=twice)
    return 4 * Plan(matrix, x_dtype, vectors, settings).x.slots <= shared_bytes()


def busy_warps(matrix, blocks: int) -> int:
    """Warps of a block for its share of the rows: as few as take no more rounds than 32 do."""
    return -(-_tasks(matrix, blocks) // (rounds(matrix, blocks) * WARPGROUP)) * WARPGROUP


def rounds(matrix, blocks: int) -> int:
    """How often the 32 warps of a block get rows to work on."""
    return -(-_tasks(matrix, blocks) // 32)


def _tasks(matrix, blocks: int) -> int:
    """Of a block's share of the rows, each as many rows as a warp works on at a time."""
    share = -(-matrix.shape[0] // blocks)
    return -(-share * matrix.lanes // WARP)
