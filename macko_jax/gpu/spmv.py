"""The lane program of the matrix-vector product, or of a few vectors in a pass over the matrix.

One block runs on every SM and keeps x in shared memory; see `row_walk` for how the lanes share the
matrix.

The budget: at 4.3 TB/s an H200's SM gets about 17 bytes a clock, 6.6 elements of 2.5 bytes, and can
issue 128 lane instructions and 32 shared words in that clock. The gather of x from random banks
takes about 3.6 cycles for 32 lanes, so shared memory is nearly as tight as DRAM.
"""

import dataclasses
import functools

import jax

from macko_jax.format.layout import Layout, Positions
from macko_jax.gpu import device, gather, row_walk
from macko_jax.gpu.kernel import Problem, problem_of
from macko_jax.gpu.staging import Share, deal_blocks
from macko_jax.lanes import mosaic
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import Lanes, sum_over_lanes


@dataclasses.dataclass(frozen=True)
class Plan(gather.GatherPlan):
    """How one product is computed, with what its problem's fusion says before and after it."""

    @property
    def added(self) -> Share:
        """The block's share of what is added."""
        return Share(
            rows=self.layout.shape[0],
            blocks=self.settings.blocks,
            count=1,
            batch=1,
            together=WARP // self.layout.lanes,
        )

    @property
    def shared_slots(self) -> int:
        """Slots of x, a sum of squares for each warp, and the share of what is added."""
        fusion = self.problem.fusion
        squares = self.settings.warps if fusion.eps is not None else 0
        return self.x.slots + squares + (self.added.slots if fusion.add else 0)

    @property
    def passes(self) -> int:
        """How often the matrix is read: each time for `settings.vectors` vectors."""
        return -(-self.problem.known_batch // self.settings.vectors)

    @property
    def blocks(self) -> int:
        """Blocks of the grid: `settings.blocks` for every pass."""
        return self.settings.blocks * self.passes


def why_not(problem: Problem) -> str | None:
    """None if the kernel serves the problem, or the reason why it does not."""
    if _fitting(problem) is None:
        return f"x of {problem.layout.shape[1]} columns does not fit into shared memory"
    return None


def plan(problem: Problem) -> Plan:
    """The plan of a product by as many vectors in a pass as shared memory has room for.

    Raises:
      ValueError: there is none; see `why_not`.
    """
    if (found := _fitting(problem)) is None:
        raise ValueError(why_not(problem))
    return found


def _fitting(problem: Problem) -> Plan | None:
    # Without the second copy of x, if there is no room for it beside what is fused.
    settings = gather.settle(problem)
    if settings is None:
        return None
    for two_copies in (settings.two_copies, False):
        found = Plan(problem, dataclasses.replace(settings, two_copies=two_copies))
        if 4 * found.shared_slots <= device.shared_bytes():
            return found
    return None


def program(ops: Lanes, plan: Plan) -> None:
    """Computes y = x A^T on the arrays values, codes, row_offsets, starts, x [batch, cols], y.

    With what the problem's fusion says before and after, on its arrays.

    Sums are in float32 in a fixed order, so that results are equal from run to run.
    """
    layout, settings, x = plan.layout, plan.settings, plan.x
    fusion, added, dtype = plan.problem.fusion, plan.added, plan.problem.dtype
    rows, threads = layout.shape[0], settings.warps * WARP

    block, first_vector = deal_blocks(ops, plan.passes, settings.vectors)
    walk = row_walk.RowWalk(
        ops,
        layout,
        dtype,
        block=block,
        blocks=settings.blocks,
        warps=settings.warps,
        ahead=settings.ahead,
        scale=x.scale,
        two_copies=settings.two_copies,
        spread=True,
    )

    def finish(row, sums):
        inside = row < walk.end_row
        row_scale = ops.load_real("row_scales", row, inside) if fusion.scaled else None
        for number, total in enumerate(sum_over_lanes(ops, sums, layout.lanes)):
            vector = first_vector + number
            if row_scale is not None:
                total = total * row_scale
            if inverse is not None:
                total = total * inverse
            if fusion.add:
                total = total + added.at(row, inside)[number]
            mine = (walk.lane == 0) & inside & (vector < plan.problem.known_batch)
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
    inverse = None
    if fusion.eps is not None:
        inverse = inverse_norm(ops, x.slots, settings.warps, layout.shape[1], fusion.eps)
    zeros = [ops.real(0)] * settings.vectors
    walk.run(started, lambda: zeros, functools.partial(multiply, ops, dtype, x), finish)


def multiply(ops: Lanes, dtype, x, sums: list, groups: list) -> list:
    """The sums over a row, of each vector, with one more group of values of `dtype` in them."""
    [group] = groups
    for column, weight in zip(group.columns, row_walk.unpack(ops, group.values, dtype)):
        sums = [ops.fma(weight, element, total) for element, total in zip(x.at(column), sums)]
    return sums


def share_squares(ops: Lanes, squares: list, first_slot: int) -> None:
    """Writes a warp's sum of squares to shared memory, one slot a warp."""
    [total] = sum_over_lanes(ops, squares, WARP)
    ops.store_shared((ops.thread() >> 5) + first_slot, total, (ops.thread() & (WARP - 1)) == 0)


def inverse_norm(ops: Lanes, first_slot: int, warps: int, length: int, eps: float):
    """1 / sqrt(mean(x^2) + eps) from the warps' sums, in every lane."""
    lane = ops.thread() & (WARP - 1)
    index = ops.select(lane < warps, lane, ops.integer(0))
    [mine] = ops.load_shared((index + first_slot) * 4, 1)
    [total] = sum_over_lanes(ops, [ops.select(lane < warps, mine, ops.real(0))], WARP)
    return ops.reciprocal_sqrt(ops.fma(total, ops.real(1 / length), ops.real(eps)))


def run(plan: Plan, *operands) -> jax.Array:
    """The product by a given plan, of values, codes, row_offsets, starts, x and what is around."""
    problem = plan.problem
    names = "values", *Positions._fields, "x", *problem.fusion.operands, "y"
    return mosaic.run(
        "macko_spmv",
        lambda ops: program(ops, plan),
        names,
        operands,
        jax.ShapeDtypeStruct((problem.known_batch, plan.layout.shape[0]), problem.out_dtype),
        blocks=plan.blocks,
        warps=plan.settings.warps,
        shared_slots=plan.shared_slots,
    )


def spmv(layout: Layout, values, positions: Positions, x, *, out_dtype) -> jax.Array:
    """y = x A^T, [batch, cols] -> [batch, rows], on the GPU; see `reference.spmv`."""
    problem = problem_of("spmv", layout, values, x, out_dtype)
    return run(plan(problem), values, *positions, x)
