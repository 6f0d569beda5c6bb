"""A product together with what a transformer's block does before and after it, for decoding.

A decode step multiplies one vector by each matrix, in microseconds. The norm before a projection,
the gate before the last one and the sum with the residual stream after it are tiny, but each costs
the start of a kernel of its own. On CUDA a kernel does them while it stages x and writes y;
everywhere else, and for more than one vector, they are the same operations one after the other.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from macko_jax import dispatch
from macko_jax.api import spmv
from macko_jax.format import MackoMatrix
from macko_jax.primitive import vary_alike


class _Static(NamedTuple):
    """What a fused product is compiled for; `eps` is None where there is no norm."""

    eps: float | None
    gated: bool
    out_dtype: Any
    shape: tuple[int, int]
    encoding: str
    lanes: int


def fused_spmv(
    matrix: MackoMatrix,
    x: jax.Array,
    *,
    norm: tuple[jax.Array, float] | None = None,
    gated: bool = False,
    add: jax.Array | None = None,
) -> jax.Array:
    """add + A f(x): a sparse product with a norm or a gate before, and a sum after it.

    f(x) is x / sqrt(mean(x^2) + eps) * scale (RMSNorm, arXiv 1910.07467) where `norm` is given, and
    silu(x[:cols]) * x[cols:] (SwiGLU, arXiv 2002.05202) where `gated`. One 16-bit or float32 vector
    on CUDA takes one kernel, which computes f and the sum in float32; otherwise f(x) is rounded to
    the type of x, the product to its own, as the separate operations do. Differentiable like
    `spmv`.

    Args:
      matrix: A [rows, cols].
      x: [..., cols], or [..., 2 cols] where `gated`.
      norm: (scale [cols], eps).
      gated: whether x holds a gate and what it lets through.
      add: [..., rows], or any shape that broadcasts to it: a residual stream, or a bias.

    Returns:
      [..., rows] in the type of `spmv(matrix, x)`.

    Raises:
      ValueError: both a norm and a gate, or shapes that do not fit.
    """
    cols = matrix.shape[1]
    if norm is not None and gated:
        raise ValueError("fused_spmv takes a norm or a gate before the product, not both")
    expected = 2 * cols if gated else cols
    if x.ndim == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"fused_spmv of a {list(matrix.shape)} matrix takes x of shape [..., {expected}] "
            f"{'with' if gated else 'without'} a gate, got {list(x.shape)}")
    if norm is not None and norm[0].shape != (cols,):
        raise ValueError(
            f"the norm's scale of a {list(matrix.shape)} matrix has shape [{cols}], got "
            f"{list(norm[0].shape)}")
    if add is not None and (add.shape or (1,))[-1] not in (1, matrix.shape[0]):
        raise ValueError(
            f"what a {list(matrix.shape)} matrix's product is added to, add [..., "
            f"{matrix.shape[0]}], got {list(add.shape)}")
    scale, eps = norm or (None, None)
    out_dtype = jnp.promote_types(matrix.dtype, x.dtype)
    one = math.prod(x.shape[:-1]) == 1 and (norm is not None or gated or add is not None)
    plain = matrix.scales is None and matrix.values.ndim == 1
    whole = add is None or add.size == matrix.shape[0]
    if not (one and plain and whole and jnp.issubdtype(x.dtype, jnp.floating)):
        return _compose(matrix, x, scale, add, eps=eps, gated=gated)
    static = _Static(eps, gated, out_dtype, matrix.shape, matrix.encoding, matrix.lanes)
    extras = {"scale": scale, "add": None if add is None else add.reshape(1, -1)}
    y = _one_vector(
        static, matrix.values, x.reshape(1, expected), matrix.codes, matrix.row_offsets,
        matrix.starts, {name: array for name, array in extras.items() if array is not None})
    return y.reshape(*x.shape[:-1], matrix.shape[0])


def _compose(matrix, x, scale, add, *, eps, gated):
    """The operations one after the other."""
    if eps is not None:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        x = (wide * scale).astype(x.dtype)
    if gated:
        gate, passed = jnp.split(x, 2, axis=-1)
        x = jax.nn.silu(gate) * passed
    y = spmv(matrix, x)
    return y if add is None else (add + y).astype(y.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _one_vector(static, values, x, codes, row_offsets, starts, extras):
    operands = vary_alike(values, x, codes, row_offsets, starts, *extras.values())
    return _fused_p.bind(*operands, static=static, names=tuple(extras))


@_one_vector.defjvp
def _one_vector_jvp(static, primals, tangents):
    def composed(values, x, *rest):
        *structure, extras = rest
        return _from_parts(
            values, x, *structure, *extras.values(), static=static, names=tuple(extras))
    return jax.jvp(composed, primals, tangents)


def _from_parts(values, x, codes, row_offsets, starts, *extras, static, names):
    """`_compose` of the primitive's operands."""
    matrix = MackoMatrix(values, codes, row_offsets, starts, shape=static.shape,
                         encoding=static.encoding, lanes=static.lanes)
    extras = dict(zip(names, extras))
    return _compose(matrix, x, extras.get("scale"), extras.get("add"), eps=static.eps,
                    gated=static.gated)


def _kernel(values, x, codes, row_offsets, starts, *extras, static, names):
    """The same in one kernel, or None where it does not serve."""
    from macko_jax.kernels import products, spmv as kernel, strips  # imports that only GPUs need
    fusion = kernel.Fusion(static.eps, static.gated, "add" in names)
    layout = dict(shape=static.shape, encoding=static.encoding, lanes=static.lanes,
                  stored=values.shape[0])
    problem = dispatch.Problem(
        product="spmv", platform="cuda", batch=1, dtypes=(values.dtype, x.dtype),
        out_dtype=static.out_dtype, **layout)
    matrix = strips.Matrix(**layout, dtype=values.dtype)
    if products.why_not(problem) or kernel.plan_fused(matrix, x.dtype, fusion) is None:
        return None
    extras = dict(zip(names, extras))
    return kernel.fused_spmv(
        values, x, codes, row_offsets, starts, *(extras[name] for name in fusion.names),
        out_dtype=static.out_dtype, fusion=fusion, **layout)


def _on_cuda(*operands, **params):
    y = _kernel(*operands, **params)
    return _from_parts(*operands, **params) if y is None else y


def _batch(operands, dims, **params):
    return jax.vmap(functools.partial(_from_parts, **params), in_axes=dims)(*operands), 0


_fused_p = Primitive("macko_fused_spmv")
_fused_p.def_impl(jax.jit(_fused_p.bind, static_argnames=("static", "names")))
_fused_p.def_abstract_eval(
    lambda values, x, *_, static, **__: x.update(
        shape=(1, static.shape[0]), dtype=static.out_dtype, weak_type=False))
batching.primitive_batchers[_fused_p] = _batch
for _platform, _function in (None, _from_parts), ("cuda", _on_cuda):
    mlir.register_lowering(
        _fused_p, mlir.lower_fun(_function, multiple_results=False), platform=_platform)
