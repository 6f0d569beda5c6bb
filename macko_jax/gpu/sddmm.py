"""The lane program of the gradient by the values: y[row] x[column] for every stored slot.

It is a sampled dense-dense matrix product (SDDMM). It walks the chunks as the product does, and
writes as many bytes as a read of the values takes. It reads them only where they tell which slots
are padding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from macko_jax.format.layout import GROUP, Layout, Positions
from macko_jax.gpu import device, gather, row_walk
from macko_jax.gpu.kernel import Problem, problem_of
from macko_jax.gpu.staging import Share
from macko_jax.lanes import mosaic
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import Lanes


@dataclasses.dataclass(frozen=True)
class Plan(gather.GatherPlan):
    """How one gradient is computed.

    Attributes:
      masked: whether slots get zero where the array `values` is zero.
    """

    masked: bool = False

    @property
    def y(self) -> Share:
        """The block's share of all vectors y."""
        return Share(
            rows=self.layout.shape[0],
            blocks=self.settings.blocks,
            count=self.settings.vectors,
            batch=self.problem.known_batch,
        )

    @property
    def shared_slots(self) -> int:
        return self.x.slots + self.y.slots


def why_not(problem: Problem) -> str | None:
    """None if the kernel serves the problem, or the reason why it does not."""
    if _fitting(problem) is None:
        return f"{problem.known_batch} vectors do not fit in one pass"
    return None


def plan(problem: Problem) -> Plan:
    """The plan of a gradient, of all vectors in one pass.

    Raises:
      ValueError: there is none; see `why_not`.
    """
    if (found := _fitting(problem)) is None:
        raise ValueError(why_not(problem))
    return found


def _fitting(problem: Problem) -> Plan | None:
    settings = gather.settle(problem)
    if settings is None or problem.known_batch > settings.vectors:
        return None
    fitting = Plan(problem, settings)
    return fitting if 4 * fitting.shared_slots <= device.shared_bytes() else None


def program(ops: Lanes, plan: Plan) -> None:
    """Computes gradient [stored] from the arrays codes, row_offsets, starts, x, y, values.

    Groups beyond the last row are spare capacity and get zeros.
    """
    layout, settings, x, y = plan.layout, plan.settings, plan.x, plan.y
    dtype, end, threads = plan.problem.dtype, layout.shape[1] * x.scale, settings.warps * WARP
    walk = row_walk.RowWalk(
        ops,
        layout,
        dtype,
        block=ops.block(),
        blocks=settings.blocks,
        warps=settings.warps,
        ahead=settings.ahead,
        scale=x.scale,
        two_copies=settings.two_copies,
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
            zeros = _zeros(group.values, dtype)
            products = [ops.select(zero, ops.real(0), p) for zero, p in zip(zeros, products)]
        _store_group(ops, group.index, products, dtype, group.live)
        return state

    def clear(group):
        _store_group(ops, group, [ops.real(0)] * GROUP, dtype, group < groups)
        return group + settings.blocks * threads

    first, groups = ops.integer(0), layout.stored // GROUP
    x.begin(ops, "x", first, threads)
    y.begin(ops, "y", walk, first_vector=first, first_slot=x.slots, threads=threads)
    started = walk.start()
    x.finish()
    y.finish()
    ops.barrier()
    walk.run(started, lambda: (), outer, lambda row, state: None)
    spare = ops.load_integer("row_offsets", ops.integer(layout.shape[0]))
    ops.loop(lambda group: group < groups, clear, spare + ops.block() * threads + ops.thread())


def _zeros(words, dtype) -> list:
    """Tells which of a group's values are zero, of either sign."""
    magnitudes = (0x7FFFFFFF,) if jnp.dtype(dtype).itemsize == 4 else (0x7FFF, 0x7FFF0000)
    return [(word & bits) == 0 for word in words for bits in magnitudes]


def _store_group(ops: Lanes, index, reals, dtype, where) -> None:
    """Writes the eight gradients of a group, 16 bytes at a time."""
    if jnp.dtype(dtype).itemsize == 4:
        words = [ops.as_word(real) for real in reals]
    else:
        words = [ops.pack(a, b, dtype) for a, b in zip(reals[::2], reals[1::2])]
    stores = len(words) // 4
    for i in range(stores):
        ops.store_words("gradient", index * stores + i, words[4 * i : 4 * i + 4], where)


def run(plan: Plan, *operands) -> jax.Array:
    """The gradient by a given plan, of codes, row_offsets, starts, x, y and, if masked, values."""
    names = *Positions._fields, "x", "y", *["values"] * plan.masked, "gradient"
    return mosaic.run(
        "macko_sddmm",
        lambda ops: program(ops, plan),
        names,
        operands,
        jax.ShapeDtypeStruct((plan.layout.stored,), plan.problem.dtype),
        blocks=plan.settings.blocks,
        warps=plan.settings.warps,
        shared_slots=plan.shared_slots,
    )


def sddmm(layout: Layout, positions: Positions, x, y, pattern, *, out_dtype) -> jax.Array:
    """The gradient by the values, on the GPU; see `reference.sddmm`.

    A gradient and its pattern have one type.
    """
    masked = pattern.ndim > 0
    chosen = plan(problem_of("sddmm", layout, x, y, out_dtype))
    chosen = dataclasses.replace(chosen, masked=masked)
    return run(chosen, *positions, x, y, *[pattern] * masked)
