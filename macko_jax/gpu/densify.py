"""The lane program that writes a matrix out densely, for products with many vectors.

Values of 8 bits become those of the vectors' type, which represents them exactly.

A warp scatters the elements of a row into a buffer of its own in shared memory, then writes the
row out 16 bytes at a time, so that global memory sees whole sectors only.
"""

import dataclasses

import jax
import jax.numpy as jnp

from macko_jax.format.layout import Layout, Positions
from macko_jax.gpu import occupancy, row_walk, tuning
from macko_jax.gpu.kernel import Problem
from macko_jax.lanes import mosaic
from macko_jax.lanes.vocabulary import Lanes

COPIED = 16  # bytes that a lane moves at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one matrix is written out, in the problem's `out_dtype`.

    Attributes:
      blocks: thread blocks that share the rows.
      warps: warps of a block that work.
      rows_per_warp: rows that a warp works on at a time.
    """

    problem: Problem
    blocks: int
    warps: int
    rows_per_warp: int

    @property
    def layout(self) -> Layout:
        return self.problem.layout

    @property
    def shared_slots(self) -> int:
        return self.warps * self.rows_per_warp * buffer_bytes(self.problem) // 4


def buffer_bytes(problem: Problem) -> int:
    """Bytes of one row with its slack, in whole multiples of `COPIED`."""
    size = (problem.layout.shape[1] + row_walk.SLACK) * jnp.dtype(problem.out_dtype).itemsize
    return -(-size // COPIED) * COPIED


def why_not(problem: Problem) -> str | None:
    """None if the kernel serves the problem, or the reason why it does not."""
    rows, cols = problem.layout.shape
    if _fitting(problem) is None:
        return f"shared memory has no room for a row of {cols} columns"
    if rows * cols * jnp.dtype(problem.out_dtype).itemsize >= 2**32:
        return "the dense matrix is too large for 32-bit addresses"
    return None


def plan(problem: Problem) -> Plan:
    """The plan with as many warps as shared memory has row buffers for.

    Raises:
      ValueError: there is none; see `why_not`.
    """
    if (found := _fitting(problem)) is None:
        raise ValueError(why_not(problem))
    return found


def _fitting(problem: Problem) -> Plan | None:
    fitting = occupancy.row_buffers(
        problem.layout, buffer_bytes(problem), most=tuning.DENSIFY_WARPS
    )
    return fitting and Plan(problem, occupancy.row_blocks(problem.layout.shape[0]), *fitting)


def program(ops: Lanes, plan: Plan) -> None:
    """Writes y [rows, cols] from the arrays values, codes, row_offsets, starts."""
    layout, dtype, dense_dtype = plan.layout, plan.problem.dtype, plan.problem.out_dtype
    size = jnp.dtype(dense_dtype).itemsize
    row_bytes, bytes_each = layout.shape[1] * size, buffer_bytes(plan.problem)
    walk = row_walk.RowWalk(
        ops,
        layout,
        dtype,
        block=ops.block(),
        blocks=plan.blocks,
        warps=plan.warps,
        ahead=tuning.prefetch_distance_of_few(plan.warps),
        scale=size,
        rows_per_warp=plan.rows_per_warp,
        together=tuning.DENSIFY_TOGETHER,
        spread=True,
    )
    buffer, mine = walk.buffer * bytes_each, walk.busy
    zeros = [ops.integer(0)] * (COPIED // 4)

    def each_copied(visit):
        """Calls visit(byte offset in the row) for the lane's parts of its row buffer."""

        def step(offset):
            visit(offset)
            return offset + layout.lanes * COPIED

        ops.loop(lambda offset: mine & (offset < bytes_each), step, walk.lane * COPIED)

    def clear(offset):
        ops.store_shared_words(buffer + offset, zeros, mine)

    def scatter(state, groups):
        for group in groups:
            words = row_walk.convert(ops, group.values, dtype, dense_dtype)
            elements = row_walk.halves(words) if size == 2 else words
            for column, bits in zip(group.columns, elements):
                if size == 2:
                    ops.store_shared_half(buffer + column, bits, group.live)
                else:
                    ops.store_shared_words(buffer + column, [bits], group.live)
        return state

    def write(row, state):
        del state
        inside = row < walk.end_row

        def move(offset):
            words = ops.load_shared_words(buffer + offset, COPIED // 4)
            _store(ops, row, offset, row_bytes, words, inside)
            clear(offset)

        ops.warp_barrier()
        each_copied(move)
        ops.warp_barrier()

    started = walk.start()
    each_copied(clear)
    ops.warp_barrier()
    walk.run(started, lambda: (), scatter, write)


def _store(ops: Lanes, row, offset, row_bytes: int, words, where) -> None:
    """Stores those of the words that lie in the row, in the largest units that stay aligned."""
    if row_bytes % COPIED == 0:
        ops.store_words("y", (row * row_bytes + offset) >> 4, words, where & (offset < row_bytes))
    elif row_bytes % 4 == 0:
        for i, word in enumerate(words):
            inside = where & (offset + 4 * i < row_bytes)
            ops.store_words("y", (row * row_bytes + offset + 4 * i) >> 2, [word], inside)
    else:
        for i, half in enumerate(row_walk.halves(words)):
            inside = where & (offset + 2 * i < row_bytes)
            ops.store_half("y", (row * row_bytes + offset + 2 * i) >> 1, half, inside)


def run(plan: Plan, *operands) -> jax.Array:
    """The dense matrix by a given plan, of the arrays values, codes, row_offsets and starts."""
    return mosaic.run(
        "macko_densify",
        lambda ops: program(ops, plan),
        ("values", *Positions._fields, "y"),
        operands,
        jax.ShapeDtypeStruct(plan.layout.shape, plan.problem.out_dtype),
        blocks=plan.blocks,
        warps=occupancy.block_warps(plan.warps),
        shared_slots=plan.shared_slots,
    )


def problem_for(layout: Layout, dtype, dense_dtype) -> Problem:
    """The problem of a matrix with values of `dtype`, written out in `dense_dtype`."""
    return Problem("densify", "cuda", layout, 1, (jnp.dtype(dtype),), jnp.dtype(dense_dtype))


def densify(layout: Layout, values, positions: Positions, *, dtype) -> jax.Array:
    """The dense matrix [rows, cols] of a type, on the GPU."""
    return run(plan(problem_for(layout, values.dtype, dtype)), values, *positions)
