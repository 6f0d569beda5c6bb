"""A Flax layer's kernel as a MACKO matrix: packing it, and multiplying by it as the layer does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax.format import quantization
from macko_jax.format.choose import shared_capacity
from macko_jax.format.matrix import MackoMatrix, compress
from macko_jax.nn.report import PackedLayerReport
from macko_jax.nn.rules import VALUE_DTYPES, Rule
from macko_jax.ops.fused import fused_spmv


def pack_kernel(
    kernel: jax.Array,
    contracted: int,
    stacked: int,
    rule: Rule | None,
    path: str,
    kind: str,
    unsupported: str | None = None,
) -> tuple[MackoMatrix | None, PackedLayerReport]:
    """Pack the kernel of one layer, or say why it stays dense.

    Args:
        kernel: [*stack, *in, *out] float array, as Flax holds it.
        contracted: number of axes in `in`.
        stacked: number of axes in `stack`, which hold the layers of a vmapped or scanned stack.
        rule: the rule that applies to the layer, None if there is none.
        path: path of the layer.
        kind: name of the layer's class.
        unsupported: why the layer cannot be packed whatever the rule says, None if it can.

    Returns:
        The matrix, [out, in], its arrays with the leading axes `stack`, or None if the layer is
        skipped; and what to report.
    """
    keeps = rule is None or rule.dtype is None or rule.dtype in quantization.NAMES
    dtype = jnp.dtype(kernel.dtype if keeps else rule.dtype)
    rounded = jnp.asarray(kernel, dtype)
    shape = matrix_shape(kernel, contracted, stacked)
    nonzeros = int(jnp.count_nonzero(rounded))
    report = PackedLayerReport(path, kind, shape, nonzeros, kernel.nbytes, kernel.nbytes)

    def skip(reason: str) -> tuple[None, PackedLayerReport]:
        return None, dataclasses.replace(report, note=reason)

    if rule is None:
        return skip("no rule matches its path")
    if rule.skip:
        return skip(f"rule {rule.path!r} says so")
    if unsupported:
        return skip(unsupported)
    if kernel.size == 0:
        return skip("its kernel is empty")
    if dtype.name not in VALUE_DTYPES:
        return skip(
            f"values of {dtype} are not packed; a rule can set dtype to {', '.join(VALUE_DTYPES)}"
        )
    if rule.max_density < 1 and report.density >= rule.max_density:
        return skip(f"from density {rule.max_density:g} on dense is faster")

    *stack, rows, cols = shape
    weights = rounded.reshape(*stack, cols, rows).swapaxes(-1, -2)
    matrix = (
        _pack_stack(weights, rule)
        if stack
        else compress(
            weights,
            dtype=rule.dtype,
            encoding=rule.encoding,
            lanes=rule.lanes,
            capacity=shared_capacity,
        )
    )
    return matrix, dataclasses.replace(
        report, bytes_after=matrix.nbytes, encoding=matrix.encoding, note=matrix.encoding
    )


def matrix_shape(kernel: jax.Array, contracted: int, stacked: int) -> tuple[int, ...]:
    """The shape [*stack, out, in] of the matrix, or matrices, that a kernel packs into."""
    shape = kernel.shape
    inputs, outputs = shape[stacked : stacked + contracted], shape[stacked + contracted :]
    return (*shape[:stacked], math.prod(outputs), math.prod(inputs))


def _pack_stack(weights: jax.Array, rule: Rule) -> MackoMatrix:
    """Pack [*stack, out, in] with one encoding and equal capacity, as vmap and scan need it."""
    stack = weights.shape[:-2]
    weights = weights.reshape(-1, *weights.shape[-2:])
    # The longest matrix decides for all of them how positions are stored.
    longest = weights[jnp.argmax(jnp.count_nonzero(weights, axis=(1, 2)))]
    choice = compress(longest, dtype=rule.dtype, encoding=rule.encoding, lanes=rule.lanes)
    options = {"dtype": rule.dtype, "encoding": choice.encoding, "lanes": choice.lanes}
    groups = max(compress(w, **options).stored for w in weights) // 8
    matrices = [compress(w, capacity=groups, **options) for w in weights]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *matrices)
    return jax.tree.map(lambda array: array.reshape(*stack, *array.shape[1:]), stacked)


def project(
    matrix: MackoMatrix,
    inputs: jax.Array,
    bias: jax.Array | None,
    *,
    axis: int | Sequence[int],
    out_features: int | Sequence[int],
    promote: Callable,
    norm: tuple[jax.Array, float] | None = None,
    gated: bool = False,
    add: jax.Array | None = None,
) -> jax.Array:
    """Multiply as Flax's Linear, LinearGeneral, Dense and DenseGeneral do: y = x W^T + b.

    Args:
        matrix: [out, in], where in and out are products of the layer's features.
        inputs: array whose axes `axis` hold the input features.
        bias: [*out_features] or None.
        axis: the contracted axes of `inputs`.
        out_features: the layer's output features, which become the last axes of the result.
        promote: takes the tuple (inputs, values, bias) to the dtype of the computation; of a matrix
            with 8-bit values, their scales in the place of the values.
        norm: (scale, eps) of a norm of the promoted inputs, as in `fused_spmv`.
        gated: whether the inputs, twice as wide, hold a gate.
        add: of the shape of the result, or None.

    Returns:
        [*remaining axes of inputs, *out_features], in the dtype of the computation.
    """
    inputs = jnp.asarray(inputs)
    axis, out_features = np.atleast_1d(axis), np.atleast_1d(out_features)
    axis = sorted(int(a) % inputs.ndim for a in axis)
    x = jnp.moveaxis(inputs, axis, range(-len(axis), 0))
    kept = x.ndim - len(axis)
    x = x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))

    name = "values" if matrix.scales is None else "scales"
    stored = getattr(matrix, name)
    x, promoted, bias = promote((x, stored, bias))
    # Stored values narrower than the computation are widened by the product itself, exactly and
    # without a wide copy in memory.
    if jnp.promote_types(stored.dtype, promoted.dtype) != promoted.dtype:
        matrix = dataclasses.replace(matrix, **{name: promoted})
    if add is None:
        add, bias = bias, None
    if add is not None:
        add = add.reshape(*add.shape[: add.ndim - len(out_features)], matrix.shape[0])
    y = fused_spmv(matrix, x, norm=norm, gated=gated, add=add)
    y = y.reshape(*y.shape[:-1], *map(int, out_features))
    return y if bias is None else y + bias
