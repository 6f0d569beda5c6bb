"""`spmv`, the matrix-vector product: validation, dtype promotion, leading axes."""

import jax
import jax.numpy as jnp

from macko_jax.format.sharded import Matrix, ShardedMatrix
from macko_jax.ops import dispatch, primitive, sharded
from macko_jax.ops.fused import fused_spmv


def spmv(matrix: Matrix, x, *, implementation: str | None = None) -> jax.Array:
    """Sparse matrix times vector: y[..., r] = sum_c A[r, c] x[..., c].

    Linear in x and in `matrix.values`, and differentiable in both to any order; slots that are
    padding get no gradient. 8-bit values are constants; their `matrix.scales` are differentiable.
    Works under jit, vmap (over x, over stacked matrices, over both), grad, checkpoint, scan and
    shard_map. Sums are in float32, or in float64 when that is the result's type.

    Args:
      matrix: [rows, cols], from `compress`, or from `shard`, whose result is split by rows, or
        added up over the devices, see `ShardedMatrix`.
      x: [..., cols], any real type.
      implementation: "xla", "mosaic_gpu" (CUDA), or None for the one that `dispatch` prefers for
        the platform that the product is lowered for. A named one never falls back to another.

    Returns:
      [..., rows], in the type that `jnp.matmul` would give for the values' and x's types.

    Raises:
      TypeError: not a MackoMatrix, or a complex x.
      ValueError: shapes do not fit, or an unknown implementation.
      NotImplementedError: when lowered, the named implementation cannot serve.

    References:
      arXiv 2511.13061, section 4.
    """
    if not isinstance(matrix, Matrix):
        raise TypeError(
            f"spmv takes a MackoMatrix, got {type(matrix).__name__}; pack with "
            "macko_jax.compress(weight)"
        )
    dispatch.check_name(implementation)
    x = _real(x)
    rows, cols = matrix.shape
    if x.ndim == 0 or x.shape[-1] != cols:
        raise ValueError(
            f"spmv of a [{rows}, {cols}] matrix takes x of shape [..., {cols}], got "
            f"{list(x.shape)}; for x [..., {cols}, n] use matrix @ x"
        )
    _check_single(matrix)
    if matrix.scales is not None and implementation is None:
        # The primitive is linear in the values and knows no scales: another kernel would multiply
        # by them, where that of a fused product does it as it goes, for one vector.
        return fused_spmv(matrix, x)
    if isinstance(matrix, ShardedMatrix):
        return sharded.multiply(matrix, x, implementation)
    return primitive.multiply(matrix, x, implementation)


def matmul(matrix: Matrix, x) -> jax.Array:
    """The product `matrix @ x`, shaped as by `jnp.matmul`: x [cols] or [..., cols, n]."""
    x = jnp.asarray(x)
    if x.ndim < 2:
        return spmv(matrix, x)
    if x.shape[-2] != matrix.shape[1]:
        raise ValueError(
            f"a [{matrix.shape[0]}, {matrix.shape[1]}] matrix @ x takes x of shape "
            f"[{matrix.shape[1]}] or [..., {matrix.shape[1]}, n], got {list(x.shape)}; for vectors "
            "along the last axis use macko_jax.spmv(matrix, x)"
        )
    return jnp.swapaxes(spmv(matrix, jnp.swapaxes(x, -1, -2)), -1, -2)


def matmul_from_left(x, matrix: Matrix) -> jax.Array:
    """The product `x @ matrix`, the transposed one: x [..., rows] gives [..., cols]."""
    x = _real(x)
    rows, cols = matrix.shape
    if x.ndim == 0 or x.shape[-1] != rows:
        raise ValueError(
            f"x @ a [{rows}, {cols}] matrix takes x of shape [..., {rows}], got {list(x.shape)}; "
            "for vectors [..., cols] use macko_jax.spmv(matrix, x)"
        )
    _check_single(matrix)
    if isinstance(matrix, ShardedMatrix):
        return sharded.multiply_transposed(matrix, x)
    return primitive.multiply_transposed(matrix, x)


def _real(x) -> jax.Array:
    """x as an array; refuses complex ones."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"spmv takes a real x, got {x.dtype}; multiply x.real and x.imag one by one"
        )
    return x


def _check_single(matrix: Matrix) -> None:
    if matrix.values.ndim != 1 + isinstance(matrix, ShardedMatrix):
        raise ValueError(
            f"this {type(matrix).__name__} is a stack, its values have shape "
            f"{list(matrix.values.shape)}; use jax.vmap(macko_jax.spmv) or jax.lax.scan over it"
        )
