"""Where every slot of a matrix sits, and the dense matrix, in plain XLA."""

import jax
import jax.numpy as jnp

from macko_jax.format.codes import bit_ranks, delta_bases, delta_prefixes, split_parts
from macko_jax.format.layout import (
    GROUP,
    Layout,
    Positions,
    column_order,
    group_rows,
    is_zero,
    memory_order,
    reorder,
)


def slot_positions(layout: Layout, positions: Positions):
    """Row, column and validity of every slot, in memory order.

    A valid slot has a position in the matrix. In "bitmask" the slots that fill up a row's last
    group are not valid. In the others such slots look like elements and hold the value
    zero; only those that run past the last column are known from the codes alone.

    Returns:
      row, column: [stored] int32, in range for every slot; valid: [stored] bool.
    """
    codes, row_offsets, _ = positions
    (rows, cols), lanes, stored = layout.shape, layout.lanes, layout.stored
    groups = stored // GROUP
    row = group_rows(row_offsets, groups)
    if layout.encoding == "bitmask":
        rank, is_stored = bit_ranks(codes, layout.shape)
        slot = jnp.where(is_stored, GROUP * row_offsets[:-1, None] + rank, stored)
        column = (
            jnp.full(stored, cols, jnp.int32)
            .at[slot]
            .set(jnp.arange(cols, dtype=jnp.int32), mode="drop", unique_indices=True)
        )
        column = column.reshape(groups, GROUP)
    else:
        order = memory_order(row_offsets, row, lanes)
        parts = split_parts(codes, layout.encoding)
        logical = tuple(reorder(part, order, lanes) for part in parts)
        column = jnp.stack(delta_prefixes(logical, layout.encoding), axis=1)
        column += delta_bases(logical, layout.encoding, row_offsets, row)[:, None]
    column = reorder(column, column_order(row_offsets, row, lanes), lanes)
    valid = (column < cols) & (row < rows)[:, None]
    column = jnp.where(valid, column, 0)
    row = jnp.broadcast_to(jnp.minimum(row, rows - 1)[:, None], column.shape)
    return row.reshape(-1), column.reshape(-1), valid.reshape(-1)


def densify(layout: Layout, values, positions: Positions) -> jax.Array:
    """The matrix as a dense array [rows, cols] of the values' dtype.

    Slots that are padding get no gradient, as in products: where an encoding has deltas, those that
    hold zero.
    """
    shape, lanes = layout.shape, layout.lanes
    if layout.stored == 0 or 0 in shape:
        return jnp.zeros(shape, values.dtype)
    if layout.encoding == "bitmask":
        codes, row_offsets, _ = positions
        groups = layout.stored // GROUP
        order = memory_order(row_offsets, group_rows(row_offsets, groups), lanes)
        logical = reorder(values.reshape(groups, GROUP), order, lanes)
        rank, is_stored = bit_ranks(codes, shape)
        slot = GROUP * row_offsets[:-1, None] + rank
        return jnp.where(is_stored, logical.reshape(-1).at[slot].get(mode="clip"), 0)
    row, column, valid = slot_positions(layout, positions)
    # Zeros are left out by their row: a selection of values would flush subnormals on CPUs.
    row = jnp.where(valid & ~is_zero(values), row, shape[0])
    dense = jnp.zeros(shape, values.dtype)
    return dense.at[row, column].set(values, mode="drop", unique_indices=True)
