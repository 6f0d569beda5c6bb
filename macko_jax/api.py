"""`spmv`, the matrix-vector product: validation, dtype promotion, leading axes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax import dispatch, layout, primitive
from macko_jax.format import MackoMatrix


def spmv(matrix: MackoMatrix, x, *, implementation: str | None = None) -> jax.Array:
    """Sparse matrix times vector: y[..., r] = sum_c A[r, c] x[..., c]."""
    if not isinstance(matrix, MackoMatrix):
        raise TypeError(
            f"spmv takes a MackoMatrix, got {type(matrix).__name__}; pack with "
            "macko_jax.compress(weight)")
    dispatch.check_name(implementation)
    x = jnp.asarray(x)
    rows, cols = matrix.shape
    if x.ndim == 0 or x.shape[-1] != cols:
        raise ValueError(
            f"spmv of a [{rows}, {cols}] matrix takes x of shape [..., {cols}], got "
            f"{list(x.shape)}")
    return _spmv(matrix, x, implementation)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _spmv(matrix, x, implementation):
    out_dtype = jnp.promote_types(matrix.dtype, x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(out_dtype)
    values = matrix.values
    if matrix.encoding == "delta4":
        # Padding in delta4 is known by its value zero; it must stay zero, so it gets no gradient.
        # The select has equal branches and is compiled away.
        values = jnp.where(layout.is_zero(values), jax.lax.stop_gradient(values), values)
    y = primitive.contract(
        "y", {"values": values, "x": x.reshape(-1, x.shape[-1])},
        (matrix.codes, matrix.row_offsets, matrix.starts),
        shape=matrix.shape, encoding=matrix.encoding, lanes=matrix.lanes,
        stored=matrix.stored, out_dtype=out_dtype, implementation=implementation)
    return y.reshape(*x.shape[:-1], matrix.shape[0])


def _matmul(matrix: MackoMatrix, x) -> jax.Array:
    """`matrix @ x` with the shapes of `jnp.matmul`: x [cols] or [..., cols, n]."""
    x = jnp.asarray(x)
    if x.ndim < 2:
        return spmv(matrix, x)
    return jnp.swapaxes(spmv(matrix, jnp.swapaxes(x, -1, -2)), -1, -2)


MackoMatrix.__matmul__ = _matmul  # here, because format.py knows nothing of products
