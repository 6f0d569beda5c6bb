"""The lane program of the transposed product, the gradient by x.

A warp adds y[row] times its row into float32 columns of its own in shared memory. The chunks of a
row do not overlap, so no two lanes meet in a column, and sums are in a fixed order. At the end the
columns of a block's warps are added up; one row a block goes to memory.

The budget: an element costs a shared load and a store at random banks, 3.6 cycles each for 32
lanes, so shared memory limits it to 4.2 elements a clock, 1.6 times the time of the forward
product.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from macko_jax.format.layout import GROUP, Layout, Positions
from macko_jax.gpu import occupancy, row_walk, tuning
from macko_jax.gpu.kernel import Problem, problem_of
from macko_jax.gpu.staging import Share, deal_blocks
from macko_jax.lanes import mosaic
from macko_jax.lanes.mosaic import WARP, WARPGROUP
from macko_jax.lanes.vocabulary import Lanes


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one product is computed.

    Attributes:
      share: the number of blocks that share the rows.
      warps: warps of a block that work.
      rows_per_warp: rows that a warp works on at a time.
      vectors: how many are multiplied in one pass.
    """

    problem: Problem
    share: int
    warps: int
    rows_per_warp: int
    vectors: ClassVar[int] = 1

    @property
    def layout(self) -> Layout:
        return self.problem.layout

    @property
    def blocks(self) -> int:
        """Blocks of the grid: `share` for every vector."""
        return self.share * self.problem.known_batch

    @property
    def y(self) -> Share:
        """The block's share of y."""
        rows, batch = self.layout.shape[0], self.problem.known_batch
        return Share(rows=rows, blocks=self.share, count=1, batch=batch)

    @property
    def buffers(self) -> int:
        """Rows of columns that a block adds into: one for each row that its warps are at."""
        return self.warps * self.rows_per_warp

    @property
    def columns(self) -> int:
        """Columns of such a row."""
        return self.layout.shape[1] + row_walk.SLACK

    @property
    def shared_slots(self) -> int:
        return self.buffers * self.columns + self.y.slots


def why_not(problem: Problem) -> str | None:
    """None if the kernel serves the problem, or the reason why it does not."""
    if _fitting(problem) is None:
        return f"shared memory has no room for {problem.layout.shape[1]} sums"
    return None


def plan(problem: Problem) -> Plan:
    """The plan of a product, with as many sums as shared memory has room for.

    Raises:
      ValueError: there is none; see `why_not`.
    """
    if (found := _fitting(problem)) is None:
        raise ValueError(why_not(problem))
    return found


def _fitting(problem: Problem) -> Plan | None:
    share = occupancy.row_blocks(problem.layout.shape[0])
    empty = Plan(problem, share, 0, 0)
    fitting = occupancy.row_buffers(problem.layout, 4 * empty.columns, 4 * empty.shared_slots)
    return fitting and Plan(problem, share, *fitting)


def program(ops: Lanes, plan: Plan) -> None:
    """Computes partial sums x [batch, share, cols] of x = y A from values, ..., y [batch, rows]."""
    dtype, cols = plan.problem.dtype, plan.layout.shape[1]
    threads = occupancy.block_warps(plan.warps) * WARP
    thread = ops.thread()
    block, vector = deal_blocks(ops, plan.problem.known_batch, 1)
    walk = row_walk.RowWalk(
        ops,
        plan.layout,
        dtype,
        block=block,
        blocks=plan.share,
        warps=plan.warps,
        ahead=tuning.prefetch_distance_of_few(plan.warps),
        scale=4,
        rows_per_warp=plan.rows_per_warp,
        together=tuning.TRANSPOSED_TOGETHER,
    )
    first_column = ops.select(walk.busy, walk.buffer, ops.integer(0)) * (4 * plan.columns)
    y, sums_end = plan.y, plan.buffers * plan.columns
    added_together = min(plan.buffers, WARPGROUP)

    def each(count, visit):
        def step(index):
            visit(index)
            return index + threads

        ops.loop(lambda index: index < count, step, thread)

    nothing = [ops.real(0)] * GROUP

    def load(columns):
        return [ops.load_shared(first_column + column, 1)[0] for column in columns]

    def add(state, groups):
        # Columns of a row are distinct, so that all loads may come before the stores. A lane that
        # has no such group must not read: it would name columns that another lane is adding to.
        [element] = y.at(groups[0].row, groups[0].live)
        sums = [
            ops.branch(group.live, functools.partial(load, group.columns), nothing)
            for group in groups
        ]
        for group, totals in zip(groups, sums):
            weights = row_walk.unpack(ops, group.values, dtype)
            for column, weight, total in zip(group.columns, weights, totals):
                total = ops.fma(weight, element, total)
                ops.store_shared_words(first_column + column, [ops.as_word(total)], group.live)
        return state

    def end_row(row, state):
        del row, state
        ops.warp_barrier()  # columns have other lanes in the next row

    def reduce(index):
        def add_some(carried):
            slot, total = carried
            for i in range(added_together):
                total = total + ops.load_shared((slot + i * plan.columns) * 4, 1)[0]
            return slot + added_together * plan.columns, total

        _, total = ops.loop(lambda carried: carried[0] < sums_end, add_some, (index, ops.real(0)))
        at = (vector * plan.share + block) * cols + index
        ops.store_real("x", at, total, index < cols)

    y.begin(ops, "y", walk, first_vector=vector, first_slot=sums_end, threads=threads)
    started = walk.start()
    y.finish()
    each(sums_end, lambda index: ops.store_shared(index, ops.real(0), index < sums_end))
    ops.barrier()
    walk.run(started, lambda: (), add, end_row)
    ops.barrier()
    each(cols, reduce)


def run(plan: Plan, *operands) -> jax.Array:
    """Partial sums [batch, share, cols] from values, codes, row_offsets, starts and y."""
    shape = plan.problem.known_batch, plan.share, plan.layout.shape[1]
    return mosaic.run(
        "macko_spmv_transposed",
        lambda ops: program(ops, plan),
        ("values", *Positions._fields, "y", "x"),
        operands,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        blocks=plan.blocks,
        warps=occupancy.block_warps(plan.warps),
        shared_slots=plan.shared_slots,
    )


def spmv_transposed(layout: Layout, values, positions: Positions, y, *, out_dtype) -> jax.Array:
    """x = y A, [batch, rows] -> [batch, cols], on the GPU; see `reference.spmv_transposed`."""
    problem = problem_of("spmv_transposed", layout, values, y, out_dtype)
    return run(plan(problem), values, *positions, y).sum(1).astype(out_dtype)
