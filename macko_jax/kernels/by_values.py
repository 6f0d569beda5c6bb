"""The lane program of the gradient by the values: y[row] x[column] for every stored slot.

It walks the strips as the product does, but reads no values; it writes as many bytes as a read of
them would take.
"""
import dataclasses

import jax
import jax.numpy as jnp

from macko_jax.kernels import config, lanes, strips, walks
from macko_jax.kernels.lanes import WARP
from macko_jax.kernels.vectors import Share
from macko_jax.layout import GROUP


@dataclasses.dataclass(frozen=True)
class Plan(config.Plan):
    """How one gradient is computed."""

    @property
    def y(self) -> Share:
        return Share(rows=self.matrix.shape[0], blocks=self.settings.blocks,
                     count=self.settings.vectors, batch=self.batch)

    @property
    def shared_slots(self) -> int:
        return self.x.slots + self.y.slots


def program(ops, plan: Plan) -> None:
    """Computes values [stored] from the arrays codes, row_offsets, starts, x, y.

    Groups beyond the last row are spare capacity and get zeros.
    """
    matrix, settings, x, y = plan.matrix, plan.settings, plan.x, plan.y
    end, threads = matrix.shape[1] * x.scale, settings.warps * WARP
    walk = walks.make(
        ops, matrix, block=ops.block(), blocks=settings.blocks, warps=settings.warps,
        unroll=settings.unroll, scale=x.scale, read_values=False)

    def outer(state, groups):
        [group] = groups
        elements, products = y.at(group.row, group.live), []
        for column in group.columns:
            total = ops.real(0)
            for a, b in zip(elements, x.at(column)):
                total = ops.fma(a, b, total)
            products.append(ops.select(column < end, total, ops.real(0)))
        _store_group(ops, group.index, products, matrix.dtype, group.live)
        return state

    def clear(group):
        _store_group(ops, group, [ops.real(0)] * GROUP, matrix.dtype, group < groups)
        return group + settings.blocks * threads

    first, groups = ops.integer(0), matrix.stored // GROUP
    x.begin(ops, "x", first, threads)
    started = walk.start()
    y.stage(ops, "y", walk, first_vector=first, first_slot=x.slots, threads=threads)
    x.finish()
    ops.barrier()
    walk.run(started, lambda: (), outer, lambda row, state: None)
    spare = ops.load_integer("row_offsets", ops.integer(matrix.shape[0]))
    ops.loop(lambda group: group < groups, clear, spare + ops.block() * threads + ops.thread())


def _store_group(ops, index, reals, dtype, where) -> None:
    """Writes the eight values of a group."""
    if jnp.dtype(dtype).itemsize == 4:
        words = [ops.as_word(real) for real in reals]
    else:
        words = [ops.pack(a, b, dtype) for a, b in zip(reals[::2], reals[1::2])]
    pieces = len(words) // 4
    for i in range(pieces):
        ops.store_words("values", index * pieces + i, words[4 * i:4 * i + 4], where)


def plan(matrix: strips.Matrix, x_dtype, batch: int) -> Plan | None:
    """The plan of a gradient; None if so many vectors do not fit in one pass."""
    fitting = Plan(matrix, x_dtype, batch, config.choose(matrix, x_dtype, batch))
    if fitting.settings.vectors < batch or 4 * fitting.shared_slots > config.SHARED_BYTES:
        return None
    return fitting


def why_not(matrix: strips.Matrix, x_dtype, batch: int) -> str | None:
    """None if the kernel serves, or the reason why it does not."""
    if plan(matrix, x_dtype, batch) is None:
        return f"{batch} vectors do not fit in one pass"
    return None


def spmv_values(x, y, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype):
    """[batch, cols], [batch, rows] -> [stored], on the GPU; as `reference.spmv_values`."""
    matrix = strips.Matrix(shape, encoding, lanes, stored, jnp.dtype(out_dtype))
    return run(plan(matrix, x.dtype, x.shape[0]), codes, row_offsets, starts, x, y)


def run(plan: Plan, *operands):
    """The gradient by a given plan, of the arrays codes, row_offsets, starts, x and y."""
    return lanes.run(
        lambda ops: program(ops, plan), ("codes", "row_offsets", "starts", "x", "y", "values"),
        operands, jax.ShapeDtypeStruct((plan.matrix.stored,), plan.matrix.dtype),
        blocks=plan.settings.blocks, warps=plan.settings.warps, shared_slots=plan.shared_slots)
