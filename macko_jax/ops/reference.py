"""The three products of a MACKO matrix in plain XLA: correct on every platform, the oracle of tests.

Every function takes raw arrays and static metadata, as the kernels do. `stored` values make the
matrix A [rows, cols]; vectors come in batches, one a row. Accumulation is in float32, or in float64
when that is the result's type.
"""

import jax
import jax.numpy as jnp

from macko_jax.format import layout
from macko_jax.format import unpack as positions


def accumulator(out_dtype) -> jnp.dtype:
    """The type in which products are summed."""
    return jnp.promote_types(out_dtype, jnp.float32)


def spmv(values, x, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype):
    """y = x A^T, [batch, cols] -> [batch, rows]."""
    del stored
    dense = positions.decode_dense(
        values, codes, row_offsets, starts, shape=shape, encoding=encoding, lanes=lanes
    )
    return _matmul("kc,rc->kr", x, dense, out_dtype)


def spmv_transposed(
    values, y, codes, row_offsets, starts, *, shape, encoding, lanes, stored, out_dtype
):
    """x = y A, [batch, rows] -> [batch, cols]."""
    del stored
    dense = positions.decode_dense(
        values, codes, row_offsets, starts, shape=shape, encoding=encoding, lanes=lanes
    )
    return _matmul("kr,rc->kc", y, dense, out_dtype)


def spmv_values(
    x, y, codes, row_offsets, starts, pattern, *, shape, encoding, lanes, stored, out_dtype
):
    """v[s] = sum_k y[k, row(s)] x[k, column(s)], the derivative by the values; 0 where no element is.

    [batch, cols], [batch, rows] -> [stored]; slots where `pattern` is zero are no elements, either.
    """
    row, column, valid = positions.slot_positions(
        codes, row_offsets, starts, stored=stored, shape=shape, encoding=encoding, lanes=lanes
    )
    dense = _matmul("kr,kc->rc", y, x, accumulator(out_dtype))
    if 0 in shape:
        return jnp.zeros(stored, out_dtype)
    return layout.masked(jnp.where(valid, dense[row, column], 0).astype(out_dtype), pattern)


def _matmul(subscripts, a, b, out_dtype) -> jax.Array:
    acc = accumulator(out_dtype)
    return jnp.einsum(subscripts, a.astype(acc), b.astype(acc), precision="highest").astype(
        out_dtype
    )
