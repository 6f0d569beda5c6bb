"""The lane program that writes a matrix out densely, for products with many vectors.

Values of 8 bits become those of the vectors' type, which represents them exactly.

A warp scatters the elements of a row into a buffer of its own in shared memory, then writes the
row out in 16-byte pieces, so that global memory sees whole sectors only.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import tuning as config
from macko_jax.lanes import mosaic as lanes

PIECE = 16  # bytes that a lane moves at a time
TOGETHER = 2  # groups that a lane visits at a time
WARPS = 16  # at most; more are slower


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one matrix is decoded."""

    matrix: strips.Matrix
    dtype: Any  # of the dense matrix
    blocks: int
    warps: int
    rows_per_warp: int

    @property
    def shared_slots(self) -> int:
        return self.warps * self.rows_per_warp * buffer_bytes(self.matrix, self.dtype) // 4


def buffer_bytes(matrix: strips.Matrix, dtype) -> int:
    """Of one row with its slack, in whole pieces."""
    size = (matrix.shape[1] + strips.SLACK) * jnp.dtype(dtype).itemsize
    return -(-size // PIECE) * PIECE


def plan(matrix: strips.Matrix, dtype) -> Plan | None:
    """With `WARPS`, or as many as shared memory has row buffers for; None if for less than four."""
    fitting = config.row_buffers(matrix, buffer_bytes(matrix, dtype), most=WARPS)
    return fitting and Plan(matrix, dtype, config.row_blocks(matrix.shape[0]), *fitting)


def program(ops, plan: Plan) -> None:
    """Writes y [rows, cols] from the arrays values, codes, row_offsets, starts."""
    matrix, size = plan.matrix, jnp.dtype(plan.dtype).itemsize
    row_bytes = matrix.shape[1] * size
    walk = strips.RowWalk(
        ops,
        matrix,
        block=ops.block(),
        blocks=plan.blocks,
        warps=plan.warps,
        unroll=config.unroll(plan.warps),
        scale=size,
        rows_per_warp=plan.rows_per_warp,
        together=TOGETHER,
        spread=True,
    )
    bytes_each, part = buffer_bytes(matrix, plan.dtype), walk.part
    buffer, mine = walk.buffer * bytes_each, walk.busy
    zeros = [ops.integer(0)] * (PIECE // 4)

    def pieces(visit):
        """Calls visit(byte offset in the row) for the lane's pieces of its row buffer."""

        def step(offset):
            visit(offset)
            return offset + matrix.lanes * PIECE

        ops.loop(lambda offset: mine & (offset < bytes_each), step, part * PIECE)

    def clear(offset):
        ops.store_shared_words(buffer + offset, zeros, mine)

    def scatter(state, groups):
        for group in groups:
            words = strips.convert(ops, group.values, matrix.dtype, plan.dtype)
            elements = strips.halves(words) if size == 2 else words
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
            words = ops.load_shared_words(buffer + offset, PIECE // 4)
            _store_piece(ops, row, offset, row_bytes, words, inside)
            clear(offset)

        ops.warp_barrier()
        pieces(move)
        ops.warp_barrier()

    started = walk.start()
    pieces(clear)
    ops.warp_barrier()
    walk.run(started, lambda: (), scatter, write)


def _store_piece(ops, row, offset, row_bytes: int, words, where) -> None:
    """Stores the part of a piece that lies in the row, in the largest units that stay aligned."""
    if row_bytes % PIECE == 0:
        ops.store_words("y", (row * row_bytes + offset) >> 4, words, where & (offset < row_bytes))
    elif row_bytes % 4 == 0:
        for i, word in enumerate(words):
            inside = where & (offset + 4 * i < row_bytes)
            ops.store_words("y", (row * row_bytes + offset + 4 * i) >> 2, [word], inside)
    else:
        for i, half in enumerate(strips.halves(words)):
            inside = where & (offset + 2 * i < row_bytes)
            ops.store_half("y", (row * row_bytes + offset + 2 * i) >> 1, half, inside)


def why_not(matrix: strips.Matrix, dtype) -> str | None:
    """None if the kernel decodes the matrix to a type, or the reason why it does not."""
    rows, cols = matrix.shape
    if plan(matrix, dtype) is None:
        return f"shared memory has no room for four rows of {cols} columns"
    if rows * cols * jnp.dtype(dtype).itemsize >= 2**32:
        return "the dense matrix is too large for 32-bit addresses"
    return None


def decode(values, codes, row_offsets, starts, *, shape, encoding, lanes, stored, dtype=None):
    """The dense matrix [rows, cols] of a type, by default the values', on the GPU."""
    matrix = strips.Matrix(shape, encoding, lanes, stored, values.dtype)
    return run(plan(matrix, dtype or values.dtype), values, codes, row_offsets, starts)


def run(plan: Plan, *operands):
    """The dense matrix by a given plan, of the arrays values, codes, row_offsets and starts."""
    return lanes.run(
        "macko_decode",
        lambda ops: program(ops, plan),
        ("values", "codes", "row_offsets", "starts", "y"),
        operands,
        jax.ShapeDtypeStruct(plan.matrix.shape, plan.dtype),
        blocks=plan.blocks,
        warps=plan.warps,
        shared_slots=plan.shared_slots,
    )
