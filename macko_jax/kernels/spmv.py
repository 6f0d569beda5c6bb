"""The lane program of the matrix-vector product.

One block runs on every multiprocessor and keeps x in shared memory; see `strips.py` for how the
lanes share the matrix.

The budget: at 4.3 TB/s an H200's multiprocessor gets about 17 bytes a clock, 6.6 elements of 2.5
bytes, and can issue 128 lane instructions and 32 shared words in that clock. The gather of x from
random banks takes about 3.6 turns for 32 lanes, so shared memory is nearly as tight as DRAM.
"""
import dataclasses

import jax
import jax.numpy as jnp

from macko_jax.kernels import config, lanes, strips, walks
from macko_jax.kernels.lanes import WARP
from macko_jax.kernels.vectors import deal_blocks


@dataclasses.dataclass(frozen=True)
class Plan(config.Plan):
    """How one product is computed."""

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

    Sums are in float32 in a fixed order, so that results are equal from run to run.
    """
    matrix, settings, x = plan.matrix, plan.settings, plan.x
    rows = matrix.shape[0]

    block, first_vector = deal_blocks(ops, settings.blocks, plan.passes, settings.vectors)
    walk = walks.make(
        ops, matrix, block=block, blocks=settings.blocks, warps=settings.warps,
        unroll=settings.unroll, scale=x.scale)

    def multiply(sums, groups):
        [group] = groups
        for column, weight in zip(group.columns, strips.unpack(ops, group.values, matrix.dtype)):
            sums = [ops.fma(weight, element, total) for element, total in zip(x.at(column), sums)]
        return sums

    def finish(row, sums):
        distance = matrix.lanes // 2
        while distance:
            sums = [total + ops.exchange(total, distance) for total in sums]
            distance //= 2
        for k, total in enumerate(sums):
            vector = first_vector + k
            ops.store_real("y", vector * rows + row, total,
                           (walk.part == 0) & (row < walk.end_row) & (vector < plan.batch))

    # All loads that depend on nothing come first: the start of a kernel is a chain of latencies.
    x.begin(ops, "x", first_vector, settings.warps * WARP)
    started = walk.start()
    x.finish()
    ops.barrier()
    walk.run(started, lambda: [ops.real(0)] * settings.vectors, multiply, finish)


def spmv(values, x, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype):
    """y = x A^T, [batch, cols] -> [batch, rows], on the GPU; the signature of `reference.spmv`."""
    matrix = strips.Matrix(shape, encoding, lanes, stored, values.dtype)
    plan = Plan(matrix, x.dtype, x.shape[0], config.choose(matrix, x.dtype, x.shape[0]))
    return run(plan, out_dtype, values, codes, row_offsets, starts, x)


def run(plan: Plan, out_dtype, *operands):
    """The product by a given plan, of the arrays values, codes, row_offsets, starts and x."""
    return lanes.run(
        lambda ops: program(ops, plan), ("values", "codes", "row_offsets", "starts", "x", "y"),
        operands, jax.ShapeDtypeStruct((plan.batch, plan.matrix.shape[0]), out_dtype),
        blocks=plan.blocks, warps=plan.settings.warps, shared_slots=plan.x.slots)
