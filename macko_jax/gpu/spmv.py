"""The lane program of the matrix-vector product.

One block runs on every multiprocessor and keeps x in shared memory; see `strips.py` for how the
lanes share the matrix.

The budget: at 4.3 TB/s an H200's multiprocessor gets about 17 bytes a clock, 6.6 elements of 2.5
bytes, and can issue 128 lane instructions and 32 shared words in that clock. The gather of x from
random banks takes about 3.6 turns for 32 lanes, so shared memory is nearly as tight as DRAM.
"""

import dataclasses
import functools

import jax

from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import tuning as config
from macko_jax.gpu.staging import Share, deal_blocks
from macko_jax.lanes import mosaic as lanes
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import sum_over_lanes


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What is done before and after a product of one vector: y = add + row_scales * (A f(x)).

    Attributes:
      eps: f(x) = x / sqrt(mean(x^2) + eps) * scale, or None for no norm.
      gated: f(x) = silu(x[:cols]) * x[cols:].
      add: whether `add` is an operand.
      scaled: whether `row_scales`, those of 8-bit values, are an operand.
    """

    eps: float | None = None
    gated: bool = False
    add: bool = False
    scaled: bool = False

    @property
    def before(self) -> str | None:
        """What is done to x; see `vectors.Vectors`."""
        return "norm" if self.eps is not None else "gate" if self.gated else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the operands that come on top."""
        named = {"scale": self.eps is not None, "add": self.add, "row_scales": self.scaled}
        return tuple(name for name, there in named.items() if there)


@dataclasses.dataclass(frozen=True)
class Plan(config.Plan):
    """How one product is computed."""

    fusion: Fusion = Fusion()

    @property
    def before(self) -> str | None:
        return self.fusion.before

    @property
    def added(self) -> Share:
        return Share(
            rows=self.matrix.shape[0],
            blocks=self.settings.blocks,
            count=1,
            batch=1,
            together=WARP // self.matrix.lanes,
        )

    @property
    def shared_slots(self) -> int:
        """x, a sum of squares for each warp, and the share of what is added."""
        squares = self.settings.warps if self.fusion.eps is not None else 0
        return self.x.slots + squares + (self.added.slots if self.fusion.add else 0)

    @property
    def passes(self) -> int:
        """How often the matrix is read: each time for `settings.vectors` vectors."""
        return -(-self.batch // self.settings.vectors)

    @property
    def blocks(self) -> int:
        """Of the grid: `settings.blocks` for every pass."""
        return self.settings.blocks * self.passes


def program(ops, plan: Plan) -> None:
    """Computes y = x A^T on the arrays values, codes, row_offsets, starts, x [batch, cols], y.

    With what `plan.fusion` says before and after, on its arrays.

    Sums are in float32 in a fixed order, so that results are equal from run to run.
    """
    matrix, settings, x = plan.matrix, plan.settings, plan.x
    fusion, added = plan.fusion, plan.added
    rows, threads = matrix.shape[0], settings.warps * WARP

    block, first_vector = deal_blocks(ops, plan.passes, settings.vectors)
    walk = strips.RowWalk(
        ops,
        matrix,
        block=block,
        blocks=settings.blocks,
        warps=settings.warps,
        unroll=settings.unroll,
        scale=x.scale,
        chooses=settings.twice,
        spread=True,
    )

    def finish(row, sums):
        inside = row < walk.end_row
        if fusion.scaled:
            row_scale = ops.load_real("row_scales", row, inside)
        for number, total in enumerate(sum_over_lanes(ops, sums, matrix.lanes)):
            vector = first_vector + number
            if fusion.scaled:
                total = total * row_scale
            if fusion.eps is not None:
                total = total * inverse
            if fusion.add:
                total = total + added.at(row, inside)[number]
            mine = (walk.part == 0) & inside & (vector < plan.batch)
            ops.store_real("y", vector * rows + row, total, mine)

    # All loads that depend on nothing come first: the start of a kernel is a chain of latencies.
    x.begin(ops, "x", first_vector, threads)
    if fusion.add:
        added.begin(
            ops,
            "add",
            walk,
            first_vector=ops.integer(0),
            first_slot=plan.shared_slots - added.slots,
            threads=threads,
        )
    started = walk.start()
    squares = x.finish()
    if fusion.add:
        added.finish()
    if fusion.eps is not None:
        share_squares(ops, squares, x.slots)
    ops.barrier()
    if fusion.eps is not None:
        inverse = inverse_norm(ops, x.slots, settings.warps, matrix.shape[1], fusion.eps)
    zeros = [ops.real(0)] * settings.vectors
    walk.run(started, lambda: zeros, functools.partial(multiply, ops, matrix, x), finish)


def multiply(ops, matrix: strips.Matrix, x, sums: list, groups: list) -> list:
    """The sums over a row, of each vector, with one more group in them."""
    [group] = groups
    for column, weight in zip(group.columns, strips.unpack(ops, group.values, matrix.dtype)):
        sums = [ops.fma(weight, element, total) for element, total in zip(x.at(column), sums)]
    return sums


def share_squares(ops, squares: list, first_slot: int) -> None:
    """Writes a warp's sum of squares to shared memory, one slot a warp."""
    [total] = sum_over_lanes(ops, squares, WARP)
    ops.store_shared((ops.thread() >> 5) + first_slot, total, (ops.thread() & (WARP - 1)) == 0)


def inverse_norm(ops, first_slot: int, warps: int, length: int, eps: float):
    """1 / sqrt(mean(x^2) + eps) from the warps' sums, in every lane."""
    lane = ops.thread() & (WARP - 1)
    index = ops.select(lane < warps, lane, ops.integer(0))
    [mine] = ops.load_shared((index + first_slot) * 4, 1)
    [total] = sum_over_lanes(ops, [ops.select(lane < warps, mine, ops.real(0))], WARP)
    return ops.reciprocal_sqrt(ops.fma(total, ops.real(1 / length), ops.real(eps)))


def spmv(values, x, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype):
    """y = x A^T, [batch, cols] -> [batch, rows], on the GPU; the signature of `reference.spmv`."""
    matrix = strips.Matrix(shape, encoding, lanes, stored, values.dtype)
    plan = choose(matrix, x.dtype, x.shape[0])
    return run(plan, out_dtype, values, codes, row_offsets, starts, x)


def choose(matrix: strips.Matrix, x_dtype, batch: int) -> Plan | None:
    """The plan of a product with `batch` vectors of type `x_dtype`; None if none fits."""
    settings = config.choose(matrix, x_dtype, batch)
    return settings and Plan(matrix, x_dtype, batch, settings)


def why_not(matrix: strips.Matrix, x_dtype) -> str | None:
    """None if the kernel serves, or the reason why it does not."""
    if config.choose(matrix, x_dtype, 1) is None:
        return f"x of {matrix.shape[1]} columns does not fit into shared memory"
    return None


def plan_fused(matrix: strips.Matrix, x_dtype, fusion: Fusion) -> Plan | None:
    """The plan of add + A f(x) for one vector; None where shared memory has no room for it."""
    plan = choose(matrix, x_dtype, 1)
    for twice in (plan.settings.twice, False):
        settings = dataclasses.replace(plan.settings, twice=twice)
        fused = dataclasses.replace(plan, settings=settings, fusion=fusion)
        if 4 * fused.shared_slots <= config.shared_bytes():
            return fused
    return None


def run(plan: Plan, out_dtype, *operands):
    """The product by a given plan, of values, codes, row_offsets, starts, x and what is around."""
    names = "values", "codes", "row_offsets", "starts", "x", *plan.fusion.names, "y"
    return lanes.run(
        "macko_spmv",
        lambda ops: program(ops, plan),
        names,
        operands,
        jax.ShapeDtypeStruct((plan.batch, plan.matrix.shape[0]), out_dtype),
        blocks=plan.blocks,
        warps=plan.settings.warps,
        shared_slots=plan.shared_slots,
    )
