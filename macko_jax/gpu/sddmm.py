"""The lane program of the gradient by the values: y[row] x[column] for every stored slot.

It walks the strips as the product does, and writes as many bytes as a read of the values takes. It
reads them only where they tell which slots are padding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from macko_jax.format.layout import GROUP
from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import tuning as config
from macko_jax.gpu.staging import Share
from macko_jax.lanes import mosaic as lanes
from macko_jax.lanes.mosaic import WARP


@dataclasses.dataclass(frozen=True)
class Plan(config.Plan):
    """How one gradient is computed.

    Attributes:
      masked: whether slots get zero where the array `values` is zero.
    """

    masked: bool = False

    @property
    def y(self) -> Share:
        return Share(
            rows=self.matrix.shape[0],
            blocks=self.settings.blocks,
            count=self.settings.vectors,
            batch=self.batch,
        )

    @property
    def shared_slots(self) -> int:
        return self.x.slots + self.y.slots


def program(ops, plan: Plan) -> None:
    """Computes gradient [stored] from the arrays codes, row_offsets, starts, x, y, values.

    Groups beyond the last row are spare capacity and get zeros.
    """
    matrix, settings, x, y = plan.matrix, plan.settings, plan.x, plan.y
    end, threads = matrix.shape[1] * x.scale, settings.warps * WARP
    walk = strips.RowWalk(
        ops,
        matrix,
        block=ops.block(),
        blocks=settings.blocks,
        warps=settings.warps,
        unroll=settings.unroll,
        scale=x.scale,
        chooses=x.twice,
        read_values=plan.masked,
    )

    def outer(state, groups):
        [group] = groups
        elements, products = y.at(group.row, group.live), []
        for column in group.columns:
            total = ops.real(0)
            for a, b in zip(elements, x.at(column)):
                total = ops.fma(a, b, total)
            products.append(ops.select(column < end, total, ops.real(0)))
        if plan.masked:
            zeros = _zeros(group.values, matrix.dtype)
            products = [ops.select(zero, ops.real(0), p) for zero, p in zip(zeros, products)]
        _store_group(ops, group.index, products, matrix.dtype, group.live)
        return state

    def clear(group):
        _store_group(ops, group, [ops.real(0)] * GROUP, matrix.dtype, group < groups)
        return group + settings.blocks * threads

    first, groups = ops.integer(0), matrix.stored // GROUP
    x.begin(ops, "x", first, threads)
    y.begin(ops, "y", walk, first_vector=first, first_slot=x.slots, threads=threads)
    started = walk.start()
    x.finish()
    y.finish()
    ops.barrier()
    walk.run(started, lambda: (), outer, lambda row, state: None)
    spare = ops.load_integer("row_offsets", ops.integer(matrix.shape[0]))
    ops.loop(lambda group: group < groups, clear, spare + ops.block() * threads + ops.thread())


def _zeros(words, dtype) -> list:
    """Which of a group's values are zero, of either sign."""
    magnitudes = (0x7FFFFFFF,) if jnp.dtype(dtype).itemsize == 4 else (0x7FFF, 0x7FFF0000)
    return [(word & bits) == 0 for word in words for bits in magnitudes]


def _store_group(ops, index, reals, dtype, where) -> None:
    """Writes the eight gradients of a group."""
    if jnp.dtype(dtype).itemsize == 4:
        words = [ops.as_word(real) for real in reals]
    else:
        words = [ops.pack(a, b, dtype) for a, b in zip(reals[::2], reals[1::2])]
    pieces = len(words) // 4
    for i in range(pieces):
        ops.store_words("gradient", index * pieces + i, words[4 * i : 4 * i + 4], where)


def plan(matrix: strips.Matrix, x_dtype, batch: int) -> Plan | None:
    """The plan of a gradient; None if so many vectors do not fit in one pass."""
    settings = config.choose(matrix, x_dtype, batch)
    if settings is None or batch > settings.vectors:
        return None
    fitting = Plan(matrix, x_dtype, batch, settings)
    return fitting if 4 * fitting.shared_slots <= config.shared_bytes() else None


def why_not(matrix: strips.Matrix, x_dtype, batch: int) -> str | None:
    """None if the kernel serves, or the reason why it does not."""
    if plan(matrix, x_dtype, batch) is None:
        return f"{batch} vectors do not fit in one pass"
    return None


def spmv_values(
    x, y, codes, row_offsets, starts, pattern, *, shape, encoding, lanes, stored, out_dtype
):
    """As `reference.spmv_values`, on the GPU; a gradient and its pattern have one type."""
    matrix = strips.Matrix(shape, encoding, lanes, stored, jnp.dtype(out_dtype))
    masked = pattern.size > 0
    chosen = dataclasses.replace(plan(matrix, x.dtype, x.shape[0]), masked=masked)
    return run(chosen, codes, row_offsets, starts, x, y, *[pattern] * masked)


def run(plan: Plan, *operands):
    """The gradient by a given plan, of codes, row_offsets, starts, x, y and, if masked, values."""
    names = "codes", "row_offsets", "starts", "x", "y", *["values"] * plan.masked, "gradient"
    return lanes.run(
        "macko_spmv_values",
        lambda ops: program(ops, plan),
        names,
        operands,
        jax.ShapeDtypeStruct((plan.matrix.stored,), plan.matrix.dtype),
        blocks=plan.settings.blocks,
        warps=plan.settings.warps,
        shared_slots=plan.shared_slots,
    )
