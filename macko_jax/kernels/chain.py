"""The lane program of a chain of products: each takes the result of the one before.

All blocks run at once, one on each multiprocessor, and every block owns a share of the rows of every
matrix. A product needs the whole result of the one before, so blocks have to meet between them.
They meet in the data: results go to the array `exchange`, which is all `BLANK` at first, and a block
reads a vector again until no element of it is missing. So a meeting costs a write and a read of the
L2 cache, and no barrier, counter or start of a kernel; meanwhile the first loads of the next matrix
are under way. (Compare the protocol "LL" of NCCL, which sends a flag with every word.)
"""
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from macko_jax.kernels import config, lanes, spmv, strips, walks
from macko_jax.kernels.lanes import WARP
from macko_jax.kernels.vectors import PIECE, Share, Vectors

WARPS = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """One product of a chain: y = add + A f(x).

    Attributes:
      added: which earlier step's result is added; None if it is an operand, or if `fusion` says that
        nothing is.
    """
    matrix: strips.Matrix
    fusion: spmv.Fusion
    added: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a chain is computed.

    Attributes:
      dtype: of x and of all results, a 16-bit type.
      blocks: all of them, which must run at once.
    """
    steps: tuple[Step, ...]
    dtype: object
    blocks: int

    def x(self, i: int) -> Vectors:
        """The vector that step i gathers from."""
        return Vectors(
            self.dtype, length=self.steps[i].matrix.shape[1], slack=self.steps[i].matrix.slack,
            count=1, batch=1, staged=True, before=self.steps[i].fusion.before,
            first_slot=self._slots[i][0])

    def added(self, i: int) -> Share:
        """What the block adds to its results of step i."""
        return Share(rows=self.steps[i].matrix.shape[0], blocks=self.blocks, count=1, batch=1)

    def squares_slot(self, i: int) -> int:
        return self._slots[i][1]

    def added_slot(self, i: int) -> int:
        return self._slots[i][2]

    @property
    def shared_slots(self) -> int:
        return self._slots[-1][0]

    @functools.cached_property
    def _slots(self) -> list[tuple]:
        """For each step: the first slots of x, of sums of squares and of what is added; the end."""
        sizes = []
        for step in self.steps:
            share = -(-step.matrix.shape[0] // self.blocks)
            sizes.append((step.matrix.shape[1] + step.matrix.slack,
                          WARPS * (step.fusion.eps is not None), share * step.fusion.add))
        ends = [0, *itertools.accumulate(-(-size // 4) * 4 for size in itertools.chain(*sizes))]
        return [tuple(ends[3 * i:3 * i + 3]) for i in range(len(self.steps) + 1)]

    def first(self, i: int) -> int:
        """Index of the first element of step i's result in the array `exchange`."""
        return sum(step.matrix.shape[0] for step in self.steps[:i])

    @property
    def exchanged(self) -> int:
        """Elements of the array `exchange`."""
        return self.first(len(self.steps) - 1)

    @property
    def names(self) -> list[str]:
        """Of the operands."""
        out = []
        for i, step in enumerate(self.steps):
            extras = [name for name in step.fusion.names if name != "add" or step.added is None]
            out += [f"{name}{i}" for name in ("values", "codes", "row_offsets", "starts", *extras)]
        return ["x", *out]


def program(ops, plan: Plan) -> None:
    """Computes y, the last step's result, on the arrays of `plan.names`, exchange and y."""
    threads = WARPS * WARP
    for i, (step, x) in enumerate((s, plan.x(i)) for i, s in enumerate(plan.steps)):
        matrix, fusion = step.matrix, step.fusion
        walk = walks.make(
            ops, matrix, block=ops.block(), blocks=plan.blocks, warps=WARPS,
            unroll=config.groups_ahead(matrix), scale=x.scale, suffix=str(i))
        if i == 0:
            x.begin(ops, "x", ops.integer(0), threads, scale="scale0")
        started = walk.start()
        if fusion.add:
            added = plan.added(i)
            source = (dict(name=f"add{i}") if step.added is None else
                      dict(name="exchange", first=plan.first(step.added), dtype=plan.dtype))
            added.stage(ops, walk=walk, first_vector=ops.integer(0),
                        first_slot=plan.added_slot(i), threads=threads, **source)
        squares = x.finish() if i == 0 else x.receive(
            ops, "exchange", plan.first(i - 1), f"scale{i}", threads)
        if fusion.eps is not None:
            spmv.share_squares(ops, squares, plan.squares_slot(i))
        ops.barrier()
        inverse = None
        if fusion.eps is not None:
            inverse = spmv.inverse_norm(
                ops, plan.squares_slot(i), WARPS, matrix.shape[1], fusion.eps)

        def finish(row, sums, i=i, step=step, walk=walk, inverse=inverse):
            [total] = lanes.sum_over_lanes(ops, sums, step.matrix.lanes)
            inside = row < walk.end_row
            if inverse is not None:
                total = total * inverse
            if step.fusion.add:
                total = total + added.at(row, inside)[0]
            mine = (walk.part == 0) & inside
            if i == len(plan.steps) - 1:
                ops.store_real("y", row, total, mine)
            else:
                ops.publish("exchange", row + plan.first(i), total, plan.dtype, mine)

        walk.run(started, lambda: [ops.real(0)],
                 functools.partial(spmv.multiply, ops, matrix, x), finish)


def why_not(plan: Plan) -> str | None:
    """None if the kernel computes the chain, or the reason why it does not."""
    if jnp.dtype(plan.dtype).itemsize != 2:
        return f"the vectors are {jnp.dtype(plan.dtype).name}, not of a 16-bit type"
    for i, step in enumerate(plan.steps):
        rows, cols = step.matrix.shape
        if rows < plan.blocks:
            return f"a matrix of {rows} rows has too few for {plan.blocks} blocks"
        if rows % PIECE or cols % PIECE:
            return f"a {rows} x {cols} matrix has not whole pieces of {PIECE} rows and columns"
    if 4 * plan.shared_slots > config.SHARED_BYTES:
        return "shared memory has no room for the vectors of all steps"
    return None


def run(plan: Plan, exchange, *operands):
    """The last step's result, [rows]; operands as `plan.names`."""
    rows = plan.steps[-1].matrix.shape[0]
    y, _ = lanes.run(
        lambda ops: program(ops, plan), [*plan.names, "exchange", "y"], operands,
        jax.ShapeDtypeStruct((rows,), plan.dtype), blocks=plan.blocks, warps=WARPS,
        shared_slots=plan.shared_slots, changed=[exchange])
    return y
