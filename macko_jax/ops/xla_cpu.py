"""The products of a MACKO matrix in XLA as CPUs like them.

XLA's CPU backend vectorizes a gather when the fastest axis of the result is long and the index of
each element is simple arithmetic, and every fresh large buffer costs page faults. So bitmasks are
decoded in blocks of rows that stay in the cache, with the 32 bits of a word on a slow axis, and
deltas are read as eight arrays, one for each slot of a group.
"""

import jax
import jax.numpy as jnp
from jax import lax

from macko_jax.format import layout
from macko_jax.format.codes import DELTA_BITS, delta_bases, delta_prefixes, split_parts
from macko_jax.ops import reference

BLOCK = 2**20  # matrix elements decoded at a time
FEW = 8  # up to so many vectors, slots with deltas are gathered; more go through a dense decode


def spmv(values, x, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype):
    """y = x A^T, [batch, cols] -> [batch, rows].

    Peak temporary memory, beyond the result: one 32-bit integer a bitmask word and a group, and
    4 MB (bitmask); or 16 bytes a group up to 8 vectors, a dense matrix beyond (deltas).
    """
    acc = reference.accumulator(out_dtype)
    batch, rows = x.shape[0], shape[0]
    if stored == 0 or batch == 0 or 0 in shape:
        return jnp.zeros((batch, rows), out_dtype)
    if encoding == "bitmask":
        vectors = _by_bit(x.astype(acc)).T

        def product(block):
            return _decode(values, *block, lanes).astype(acc) @ vectors

        y = lax.map(product, _blocks(codes, row_offsets, shape))
        return y.reshape(-1, batch)[:rows].T.astype(out_dtype)
    if encoding in DELTA_BITS and batch <= FEW:
        return _gather_slots(
            values, x.astype(acc), split_parts(codes, encoding), encoding, row_offsets, rows, lanes
        ).astype(out_dtype)
    return reference.spmv(
        values,
        x,
        codes,
        row_offsets,
        starts,
        shape=shape,
        encoding=encoding,
        lanes=lanes,
        stored=stored,
        out_dtype=out_dtype,
    )


def spmv_transposed(
    values, y, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype
):
    """x = y A, [batch, rows] -> [batch, cols]. Peak temporary memory as `spmv` of a large batch."""
    acc = reference.accumulator(out_dtype)
    batch, (rows, cols) = y.shape[0], shape
    if encoding != "bitmask" or stored == 0 or batch == 0 or 0 in shape:
        return reference.spmv_transposed(
            values,
            y,
            codes,
            row_offsets,
            starts,
            shape=shape,
            encoding=encoding,
            lanes=lanes,
            stored=stored,
            out_dtype=out_dtype,
        )
    matrix = _blocks(codes, row_offsets, shape)
    blocks, height, width = matrix[0].shape
    vectors = jnp.pad(y.astype(acc), ((0, 0), (0, blocks * height - rows)))
    vectors = vectors.reshape(batch, blocks, height).swapaxes(0, 1)

    def add(total, block):
        matrix, vectors = block
        return total + vectors @ _decode(values, *matrix, lanes).astype(acc), None

    zero = jnp.zeros_like(vectors, shape=(batch, layout.WORD * width))
    total, _ = lax.scan(add, zero, (matrix, vectors))
    total = total.reshape(batch, layout.WORD, width).swapaxes(1, 2).reshape(batch, -1)
    return total[:, :cols].astype(out_dtype)


def _by_bit(x: jax.Array) -> jax.Array:
    """Reorders columns [batch, cols] to bit-major order, as `_decode` has them."""
    batch, cols = x.shape
    width = layout.words_per_row(cols)
    x = jnp.pad(x, ((0, 0), (0, layout.WORD * width - cols)))
    return x.reshape(batch, width, layout.WORD).swapaxes(1, 2).reshape(batch, -1)


def _blocks(codes, row_offsets, shape) -> tuple[jax.Array, ...]:
    """What `_decode` takes, in blocks of rows.

    Returns:
      words: [blocks, height, width] the bitmask; ranks: alike, the index in its row of each word's
      first element; begin, count: [blocks, height, 1] each row's first group and number of groups.
    """
    rows, cols = shape
    width = layout.words_per_row(cols)
    words = codes.reshape(rows, width)
    count = lax.population_count(words).astype(jnp.int32)
    ranks = jnp.cumsum(count, axis=1) - count
    height = min(rows, max(1, BLOCK // (layout.WORD * width)))
    blocks = -(-rows // height)

    def cut(a):
        return jnp.pad(a, ((0, blocks * height - rows), (0, 0))).reshape(blocks, height, -1)

    return cut(words), cut(ranks), cut(row_offsets[:-1, None]), cut(jnp.diff(row_offsets)[:, None])


def _decode(values, words, ranks, begin, count, lanes: int) -> jax.Array:
    """Dense rows [height, 32 * width] in bit-major column order."""
    height, width = words.shape
    longest = layout.WORD // layout.GROUP * width
    group = begin + layout.memory_group(jnp.arange(longest, dtype=jnp.int32), count, lanes)
    address = lax.optimization_barrier(layout.GROUP * group).reshape(-1)
    table = longest * jnp.arange(height, dtype=jnp.int32)[:, None, None]

    bit = jnp.arange(layout.WORD, dtype=jnp.uint32)[None, :, None]
    words, ranks = words[:, None, :], ranks[:, None, :]
    below = (jnp.uint32(1) << bit) - 1
    rank = ranks + lax.population_count(words & below).astype(jnp.int32)
    # The slot of an absent element may be one past the end; XLA's gather clamps it.
    slot = address.at[table + (rank >> 3)].get(mode="promise_in_bounds") + (rank & 7)
    dense = jnp.where((words >> bit) & 1 == 1, values.at[slot].get(mode="promise_in_bounds"), 0)
    # Apart from the matrix product, else XLA fuses the two into a loop without vector instructions.
    return lax.optimization_barrier(dense).reshape(height, -1)


def _gather_slots(
    values, x, parts: tuple, encoding: str, row_offsets, rows: int, lanes: int
) -> jax.Array:
    """The product of slots with deltas and few vectors [batch, cols] -> [batch, rows]."""
    groups = parts[0].shape[0]
    row = layout.group_rows(row_offsets, groups)
    order = layout.memory_order(row_offsets, row, lanes)
    logical = tuple(layout.reorder(part, order, lanes) for part in parts)
    base = delta_bases(logical, encoding, row_offsets, row)
    base = layout.reorder(base, layout.column_order(row_offsets, row, lanes), lanes)
    base = lax.optimization_barrier(base)
    columns = [base + prefix for prefix in delta_prefixes(parts, encoding)]
    slots = values.reshape(groups, layout.GROUP)

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
