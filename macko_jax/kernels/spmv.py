"""The lane program of the matrix-vector product.

One block runs on every multiprocessor and keeps x in shared memory as float32; see `strips.py` for
how the lanes share the matrix.

The budget: at 4.3 TB/s an H200's multiprocessor gets about 17 bytes a clock, 6.6 elements of 2.5
bytes, and can issue 128 lane instructions and 32 shared words in that clock. The gather of x from
random banks takes about 3.6 turns for 32 lanes, so shared memory is nearly as tight as DRAM.
"""
import dataclasses

import jax
import jax.numpy as jnp

from macko_jax.kernels import config, lanes, strips
from macko_jax.kernels.lanes import WARP
from macko_jax.layout import words_per_row

X_AHEAD = 8  # elements of x per thread and vector that are in flight while x is staged


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about one product that is known when it is compiled."""
    matrix: strips.Matrix
    batch: int
    settings: config.Settings

    @property
    def passes(self) -> int:
        """How often the matrix is read: each time for `settings.vectors` vectors."""
        return -(-self.batch // self.settings.vectors)

    @property
    def blocks(self) -> int:
        """Of the grid: `settings.blocks` for every pass."""
        return self.settings.blocks * self.passes

    @property
    def shared_slots(self) -> int:
        if not self.settings.stage_x:
            return 1
        return (self.matrix.shape[1] + self.matrix.slack) * self.settings.vectors


def program(ops, plan: Plan) -> None:
    """Computes y = x A^T on the arrays values, codes, row_offsets, starts, x [batch, cols], y.

    Sums are in float32 in a fixed order, so that results are equal from run to run.
    """
    matrix, settings, vectors = plan.matrix, plan.settings, plan.settings.vectors
    rows, cols = matrix.shape
    threads = settings.warps * WARP
    slots = cols + matrix.slack

    thread, block, first_vector = ops.thread(), ops.block(), ops.integer(0)
    for i in range(1, plan.passes):
        later = block >= settings.blocks
        block = ops.select(later, block - settings.blocks, block)
        first_vector = ops.select(later, ops.integer(i * vectors), first_vector)
    walk = strips.Walk(
        ops, matrix, block=block, blocks=settings.blocks, warps=settings.warps,
        unroll=settings.unroll,
        scale=4 * vectors if settings.stage_x else 1)  # columns as byte offsets in shared memory

    def read_x(first_slot):
        """Issues a thread's loads of x for `X_AHEAD` rounds: [(slot, vector, value)]."""
        out = []
        for i in range(min(X_AHEAD, -(-slots // threads))):
            slot = first_slot + i * threads
            for k in range(vectors):
                vector = first_vector + k
                inside = (slot < cols) & (vector < plan.batch)
                out.append((slot, k, ops.load_real("x", vector * cols + slot, inside)))
        return out

    def write_x(loaded):
        for slot, k, value in loaded:
            index = slot * vectors + k
            ops.store_shared(index, value, index < plan.shared_slots)

    def stage_rest_of_x():
        def copy(slot):
            write_x(read_x(slot))
            return slot + X_AHEAD * threads

        ops.loop(lambda slot: slot < slots, copy, thread + X_AHEAD * threads)

    def x_at(column):
        if settings.stage_x:
            return ops.load_shared(column, vectors)
        return [ops.load_real("x", (first_vector + k) * cols + column,
                              (column < cols) & (first_vector + k < plan.batch))
                for k in range(vectors)]

    def multiply(sums, group):
        for column, weight in zip(group.columns, strips.unpack(ops, group.values, matrix.dtype)):
            sums = [ops.fma(weight, x, total) for x, total in zip(x_at(column), sums)]
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
    x_head = read_x(thread) if settings.stage_x else []
    started = walk.start()
    write_x(x_head)
    if settings.stage_x:
        stage_rest_of_x()
    ops.barrier()
    walk.run(started, lambda: [ops.real(0)] * vectors, multiply, finish)


def why_not(problem) -> str | None:
    """None if the kernel serves the `dispatch.Problem`, or the reason why it does not."""
    floats = ("float16", "bfloat16", "float32")
    if problem.product != "spmv":
        return f"there is no kernel for {problem.product}"
    for dtype in (*problem.dtypes, problem.out_dtype):
        if jnp.dtype(dtype).name not in floats:
            return f"the kernel takes {', '.join(floats)}, not {jnp.dtype(dtype).name}"
    if problem.stored == 0 or 0 in problem.shape or problem.batch == 0:
        return "the matrix or the batch is empty"
    rows, cols = problem.shape
    if max(rows * words_per_row(cols), problem.batch * max(rows, cols), problem.stored) >= 2**31:
        return "the arrays are too large for 32-bit indices"
    return None


def rather_not(problem) -> str | None:
    """None if the kernel is the fastest way, or the reason why a dense decode is faster."""
    if problem.batch > config.BREAK_EVEN_BATCH:
        return (f"{problem.batch} vectors are more than {config.BREAK_EVEN_BATCH}: "
                "decoding the matrix once and a dense product are faster")
    return None


def spmv(values, x, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype):
    """y = x A^T, [batch, cols] -> [batch, rows], on the GPU; the signature of `reference.spmv`."""
    matrix = strips.Matrix(shape, encoding, lanes, stored, values.dtype)
    plan = Plan(matrix, x.shape[0], config.choose(matrix, x.shape[0]))
    return run(plan, out_dtype, values, codes, row_offsets, starts, x)


def run(plan: Plan, out_dtype, *operands):
    """The product by a given plan, of the arrays values, codes, row_offsets, starts and x."""
    return lanes.run(
        lambda ops: program(ops, plan), ("values", "codes", "row_offsets", "starts", "x", "y"),
        operands, jax.ShapeDtypeStruct((plan.batch, plan.matrix.shape[0]), out_dtype),
        blocks=plan.blocks, warps=plan.settings.warps, shared_slots=plan.shared_slots)
