"""The products of a MACKO matrix in plain XLA: correct on every platform, the oracle of tests.

Every function takes a layout and raw arrays, as the kernels do. `stored` values make the matrix
A [rows, cols]; vectors come in batches, one a row. Accumulation is in float32, or in float64 when
that is the result's type.
"""

import jax
import jax.numpy as jnp

from macko_jax.format import unpack
from macko_jax.format.layout import Layout, Positions, masked


def accumulator(out_dtype) -> jnp.dtype:
    """The type in which products are summed."""
    return jnp.dtype(jnp.float64 if out_dtype == jnp.float64 else jnp.float32)


def spmv(layout: Layout, values, positions: Positions, x, *, out_dtype) -> jax.Array:
    """y = x A^T, [batch, cols] -> [batch, rows]."""
    return _matmul("kc,rc->kr", x, unpack.densify(layout, values, positions), out_dtype)


def spmv_transposed(layout: Layout, values, positions: Positions, y, *, out_dtype) -> jax.Array:
    """x = y A, [batch, rows] -> [batch, cols]."""
    return _matmul("kr,rc->kc", y, unpack.densify(layout, values, positions), out_dtype)


def sddmm(layout: Layout, positions: Positions, x, y, pattern, *, out_dtype) -> jax.Array:
    """v[s] = sum_k y[k, row(s)] x[k, column(s)], the derivative by the values.

    [batch, cols], [batch, rows] -> [stored]. It is 0 where no element is, as where `pattern` is
    zero.
    """
    row, column, valid = unpack.slot_positions(layout, positions)
    dense = _matmul("kr,kc->rc", y, x, accumulator(out_dtype))
    if 0 in layout.shape:
        return jnp.zeros(layout.stored, out_dtype)
    return masked(jnp.where(valid, dense[row, column], 0).astype(out_dtype), pattern)


def _matmul(subscripts, a, b, out_dtype) -> jax.Array:
    acc = accumulator(out_dtype)
    product = jnp.einsum(subscripts, a.astype(acc), b.astype(acc), precision="highest")
    return product.astype(out_dtype)
