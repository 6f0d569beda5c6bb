"""Where every slot of a matrix sits, and the dense matrix, in plain XLA."""

import jax
import jax.numpy as jnp

from macko_jax.format import layout
from macko_jax.format.codes import bit_ranks, delta_bases, delta_prefixes, split_parts
from macko_jax.format.layout import GROUP


def slot_positions(codes, row_offsets, starts, *, stored: int, shape, encoding: str, lanes: int):
    """Row, column and validity of every slot, in memory order.

    A valid slot has a position in the matrix. In "bitmask" the slots that fill up a row's last
    group are not valid. In the others such slots look like elements and hold the value
    zero; only those that run past the last column are known from the codes alone.

    Returns:
      row, column: [stored] int32, in range for every slot; valid: [stored] bool.
    """
    rows, cols = shape
    groups = stored // GROUP
    row = layout.group_rows(row_offsets, groups)
    if encoding == "bitmask":
        rank, is_stored = bit_ranks(codes, shape)
        slot = jnp.where(is_stored, GROUP * row_offsets[:-1, None] + rank, stored)
        column = (
            jnp.full(stored, cols, jnp.int32)
            .at[slot]
            .set(jnp.arange(cols, dtype=jnp.int32), mode="drop", unique_indices=True)
        )
        column = column.reshape(groups, GROUP)
    else:
        order = layout.memory_order(row_offsets, row, lanes)
        logical = tuple(layout.reorder(part, order, lanes) for part in split_parts(codes, encoding))
        column = jnp.stack(delta_prefixes(logical, encoding), axis=1)
        column += delta_bases(logical, encoding, row_offsets, row)[:, None]
    column = layout.reorder(column, layout.column_order(row_offsets, row, lanes), lanes)
    valid = (column < cols) & (row < rows)[:, None]
    column = jnp.where(valid, column, 0)
    row = jnp.broadcast_to(jnp.minimum(row, rows - 1)[:, None], column.shape)
    return row.reshape(-1), column.reshape(-1), valid.reshape(-1)


def decode_dense(
    values, codes, row_offsets, starts, *, shape, encoding: str, lanes: int
) -> jax.Array:
    """The matrix as a dense array [rows, cols] of the values' dtype.

    Slots that are padding get no gradient, as in products: where an encoding has deltas, those that
    hold zero.
    """
    stored = values.shape[0]
    if stored == 0 or 0 in shape:
        return jnp.zeros(shape, values.dtype)
    if encoding == "bitmask":
        groups = stored // GROUP
        order = layout.memory_order(row_offsets, layout.group_rows(row_offsets, groups), lanes)
        logical = layout.reorder(values.reshape(groups, GROUP), order, lanes)
        rank, is_stored = bit_ranks(codes, shape)
        slot = GROUP * row_offsets[:-1, None] + rank
        return jnp.where(is_stored, logical.reshape(-1).at[slot].get(mode="clip"), 0)
    row, column, valid = slot_positions(
        codes, row_offsets, starts, stored=stored, shape=shape, encoding=encoding, lanes=lanes
    )
    row, elements = jnp.where(valid, row, shape[0]), layout.masked(values, values)
    dense = jnp.zeros(shape, values.dtype)
    return dense.at[row, column].set(elements, mode="drop", unique_indices=True)
