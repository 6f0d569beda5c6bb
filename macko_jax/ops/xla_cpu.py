"""The products of a MACKO matrix in XLA as CPUs like them.

XLA's CPU backend vectorizes a gather when the fastest axis of the result is long and the index of
each element is simple arithmetic, and every fresh large buffer costs page faults. So bitmasks are
decoded in blocks of rows that stay in the cache, with the 32 bits of a word on a slow axis, and
deltas are read as eight arrays, one for each slot of a group. A bitmask of one lane is the fastest
(`format.choose.CPU`): its elements lie in column order, so that an element's rank in its row is its
address.
"""

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from macko_jax.format.codes import DELTA_BITS, delta_bases, delta_prefixes, split_parts
from macko_jax.format.layout import (
    GROUP,
    WORD,
    Layout,
    Positions,
    column_order,
    group_rows,
    memory_group,
    memory_order,
    reorder,
    words_per_row,
)
from macko_jax.ops import reference

BLOCK = 2**20  # matrix elements decoded at a time, 4 MB of float32
FEW = 8  # up to so many vectors, slots with deltas are gathered; more go through a dense decode


def spmv(layout: Layout, values, positions: Positions, x, *, out_dtype) -> jax.Array:
    """y = x A^T, [batch, cols] -> [batch, rows].

    Peak temporary memory, beyond the result: one 32-bit integer a bitmask word and a group, and
    4 MB (bitmask); or 16 bytes a group up to 8 vectors, a dense matrix beyond (deltas).
    """
    acc = reference.accumulator(out_dtype)
    batch, rows = x.shape[0], layout.shape[0]
    codes, row_offsets, _ = positions
    if layout.stored == 0 or batch == 0 or 0 in layout.shape:
        return jnp.zeros((batch, rows), out_dtype)
    if layout.encoding == "bitmask":
        vectors = _by_bit(x.astype(acc)).T

        def product(block):
            dense = _dense_rows(values, *block, lanes=layout.lanes).astype(acc)
            # XLA's product of a matrix and one vector as [cols, 1] has no vector instructions.
            return (dense * vectors.T).sum(1, keepdims=True) if batch == 1 else dense @ vectors

        y = lax.map(product, _blocks(codes, row_offsets, layout.shape))
        return y.reshape(-1, batch)[:rows].T.astype(out_dtype)
    few = not jax.export.is_symbolic_dim(batch) and batch <= FEW
    if layout.encoding in DELTA_BITS and few:
        return _gather_slots(layout, values, positions, x.astype(acc)).astype(out_dtype)
    return reference.spmv(layout, values, positions, x, out_dtype=out_dtype)


def spmv_transposed(layout: Layout, values, positions: Positions, y, *, out_dtype) -> jax.Array:
    """x = y A, [batch, rows] -> [batch, cols]; temporary memory as for `spmv` of a large batch."""
    acc = reference.accumulator(out_dtype)
    batch, (rows, cols) = y.shape[0], layout.shape
    if layout.encoding != "bitmask" or layout.stored == 0 or batch == 0 or 0 in layout.shape:
        return reference.spmv_transposed(layout, values, positions, y, out_dtype=out_dtype)
    matrix = _blocks(positions.codes, positions.row_offsets, layout.shape)
    blocks, height, width = matrix[0].shape
    vectors = jnp.pad(y.astype(acc), ((0, 0), (0, blocks * height - rows)))
    vectors = vectors.reshape(batch, blocks, height).swapaxes(0, 1)

    def add(total, block):
        matrix, vectors = block
        return total + vectors @ _dense_rows(values, *matrix, lanes=layout.lanes).astype(acc), None

    zero = jnp.zeros_like(vectors, shape=(batch, WORD * width))
    total, _ = lax.scan(add, zero, (matrix, vectors))
    total = total.reshape(batch, WORD, width).swapaxes(1, 2).reshape(batch, -1)
    return total[:, :cols].astype(out_dtype)


def _by_bit(x: jax.Array) -> jax.Array:
    """Reorders columns [batch, cols] to bit-major order, as `_dense_rows` has them."""
    batch, cols = x.shape
    width = words_per_row(cols)
    x = jnp.pad(x, ((0, 0), (0, WORD * width - cols)))
    return x.reshape(batch, width, WORD).swapaxes(1, 2).reshape(batch, -1)


def _blocks(codes, row_offsets, shape) -> tuple[jax.Array, ...]:
    """What `_dense_rows` takes, in blocks of rows.

    Returns:
      words: [blocks, height, width] the bitmask; ranks: alike, the index in its row of each word's
      first element; begin, count: [blocks, height, 1] each row's first group and number of groups.
    """
    rows, cols = shape
    width = words_per_row(cols)
    words = codes.reshape(rows, width)
    count = lax.population_count(words).astype(jnp.int32)
    ranks = jnp.cumsum(count, axis=1) - count
    height = min(rows, max(1, BLOCK // (WORD * width)))
    blocks = -(-rows // height)

    def cut(a):
        return jnp.pad(a, ((0, blocks * height - rows), (0, 0))).reshape(blocks, height, -1)

    return cut(words), cut(ranks), cut(row_offsets[:-1, None]), cut(jnp.diff(row_offsets)[:, None])


def _dense_rows(values, words, ranks, begin, count, lanes: int) -> jax.Array:
    """Dense rows [height, 32 * width] in bit-major column order."""
    height, width = words.shape
    bit = jnp.arange(WORD, dtype=jnp.uint32)[None, :, None]
    words, ranks = words[:, None, :], ranks[:, None, :]
    below = (jnp.uint32(1) << bit) - 1
    rank = ranks + lax.population_count(words & below).astype(jnp.int32)
    # The slot of an absent element may be one past the end; XLA's gather clamps it.
    if lanes == 1:
        slot = GROUP * begin[:, :, None] + rank
    else:
        longest = WORD // GROUP * width
        group = begin + memory_group(jnp.arange(longest, dtype=jnp.int32), count, lanes)
        address = lax.optimization_barrier(GROUP * group).reshape(-1)
        table = longest * jnp.arange(height, dtype=jnp.int32)[:, None, None]
        slot = address.at[table + (rank >> 3)].get(mode="promise_in_bounds") + (rank & 7)
    dense = jnp.where((words >> bit) & 1 == 1, values.at[slot].get(mode="promise_in_bounds"), 0)
    # Apart from the matrix product, else XLA fuses the two into a loop without vector instructions.
    return lax.optimization_barrier(dense).reshape(height, -1)


def _gather_slots(layout: Layout, values, positions: Positions, x) -> jax.Array:
    """The product of slots with deltas and few vectors [batch, cols] -> [batch, rows]."""
    rows, lanes, encoding = layout.shape[0], layout.lanes, layout.encoding
    row_offsets, groups = positions.row_offsets, layout.stored // GROUP
    parts = split_parts(positions.codes, encoding)
    row = group_rows(row_offsets, groups)
    order = memory_order(row_offsets, row, lanes)
    logical = tuple(reorder(part, order, lanes) for part in parts)
    base = delta_bases(logical, encoding, row_offsets, row)
    base = reorder(base, column_order(row_offsets, row, lanes), lanes)
    base = lax.optimization_barrier(base)
    columns = [base + prefix for prefix in delta_prefixes(parts, encoding)]
    slots = values.reshape(groups, GROUP)

    def one(x):
        total = 0
        for j, column in enumerate(columns):
            value = slots[:, j].astype(x.dtype)
            product = value * x.at[column].get(mode="clip")
            # Slots that fill up a row run past the last column; their x may be infinite.
            total += jnp.where(column < x.shape[0], product, 0)
        total = lax.optimization_barrier(total)
        return jax.ops.segment_sum(total, row, num_segments=rows + 1, indices_are_sorted=True)

    return lax.map(one, x)[:, :rows]
