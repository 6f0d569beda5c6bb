"""The lane program of the transposed product, the gradient by x.

A warp adds y[row] times its row into float32 columns of its own in shared memory. The strips of a
row do not overlap, so no two lanes meet in a column, and sums are in a fixed order. At the end the
columns of a block's warps are added up; one row a block goes to memory.

The budget: an element costs a shared load and a store at random banks, 3.6 turns each for 32 lanes,
so shared memory limits it to 4.2 elements a clock, 1.6 times the time of the forward product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from macko_jax.format.layout import GROUP
from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import tuning as config
from macko_jax.gpu.staging import Share, deal_blocks
from macko_jax.lanes import mosaic as lanes
from macko_jax.lanes.mosaic import WARP, WARPGROUP

TOGETHER = 4  # groups that a lane visits at a time; most of their time is the latency of a sum


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one product is computed."""

    matrix: strips.Matrix
    batch: int
    share: int  # blocks that share the rows
    warps: int
    rows_per_warp: int

    @property
    def blocks(self) -> int:
        """Of the grid: `share` for every vector."""
        return self.share * self.batch

    @property
    def y(self) -> Share:
        return Share(rows=self.matrix.shape[0], blocks=self.share, count=1, batch=self.batch)

    @property
    def buffers(self) -> int:
        """Rows of columns that a block adds into: one for each row that its warps are at."""
        return self.warps * self.rows_per_warp

    @property
    def columns(self) -> int:
        return self.matrix.shape[1] + strips.SLACK

    @property
    def shared_slots(self) -> int:
        return self.buffers * self.columns + self.y.slots


def plan(matrix: strips.Matrix, batch: int) -> Plan | None:
    """With as many sums as shared memory has room for; None if for less than four rows."""
    share = config.row_blocks(matrix.shape[0])
    none = Plan(matrix, batch, share, 0, 0)
    fitting = config.row_buffers(matrix, 4 * none.columns, 4 * none.shared_slots)
    return fitting and dataclasses.replace(none, warps=fitting[0], rows_per_warp=fitting[1])


def program(ops, plan: Plan) -> None:
    """Computes partial sums x [batch, share, cols] of x = y A from values, ..., y [batch, rows]."""
    matrix = plan.matrix
    cols = matrix.shape[1]
    threads = plan.warps * WARP
    thread = ops.thread()
    block, vector = deal_blocks(ops, plan.batch, 1)
    walk = strips.RowWalk(
        ops,
        matrix,
        block=block,
        blocks=plan.share,
        warps=plan.warps,
        unroll=config.unroll(plan.warps),
        scale=4,
        rows_per_warp=plan.rows_per_warp,
        together=TOGETHER,
    )
    columns = ops.select(walk.busy, walk.buffer, ops.integer(0)) * (4 * plan.columns)
    y, sums_end = plan.y, plan.buffers * plan.columns

    def each(count, visit):
        def step(index):
            visit(index)
            return index + threads

        ops.loop(lambda index: index < count, step, thread)

    nothing = [ops.real(0)] * GROUP

    def load(places):
        return [ops.load_shared(columns + column, 1)[0] for column in places]

    def add(state, groups):
        # Columns of a row are distinct, so that all loads may come before the stores. A lane that
        # has no such group must not read: it would name columns that another lane is adding to.
        [element] = y.at(groups[0].row, groups[0].live)
        sums = [
            ops.branch(group.live, functools.partial(load, group.columns), nothing)
            for group in groups
        ]
        for group, totals in zip(groups, sums):
            weights = strips.unpack(ops, group.values, matrix.dtype)
            for column, weight, total in zip(group.columns, weights, totals):
                total = ops.fma(weight, element, total)
                ops.store_shared_words(columns + column, [ops.as_word(total)], group.live)
        return state

    def end_row(row, state):
        del row, state
        ops.warp_barrier()  # columns have other lanes in the next row

    def reduce(index):
        def add_some(carried):
            place, total = carried
            for i in range(WARPGROUP):
                total = total + ops.load_shared((place + i * plan.columns) * 4, 1)[0]
            return place + WARPGROUP * plan.columns, total

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


def why_not(matrix: strips.Matrix, batch: int) -> str | None:
    """None if the kernel serves, or the reason why it does not."""
    if plan(matrix, batch) is None:
        return f"shared memory has no room for four times {matrix.shape[1]} sums"
    return None


def spmv_transposed(
    values, y, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype
):
    """x = y A, [batch, rows] -> [batch, cols], on the GPU; as `reference.spmv_transposed`."""
    matrix = strips.Matrix(shape, encoding, lanes, stored, values.dtype)
    partial = run(plan(matrix, y.shape[0]), values, codes, row_offsets, starts, y)
    return partial.sum(1).astype(out_dtype)


def run(plan: Plan, *operands):
    """Partial sums [batch, share, cols] from values, codes, row_offsets, starts and y."""
    shape = plan.batch, plan.share, plan.matrix.shape[1]
    return lanes.run(
        "macko_spmv_transposed",
        lambda ops: program(ops, plan),
        ("values", "codes", "row_offsets", "starts", "y", "x"),
        operands,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        blocks=plan.blocks,
        warps=plan.warps,
        shared_slots=plan.shared_slots,
    )
