"""A Flax layer's kernel as a MACKO matrix: packing it, and multiplying by it as the layer does."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax.format import quantization
from macko_jax.format.choose import is_for_cpu, shared_capacity
from macko_jax.format.matrix import MackoMatrix, compress
from macko_jax.format.sharded import Matrix
from macko_jax.nn.report import PackedLayerReport
from macko_jax.nn.rules import VALUE_DTYPES, Rule
from macko_jax.ops.fused import fused_spmv


class KernelAxes(NamedTuple):
    """What the axes of a Flax kernel are.

    Attributes:
        contracted: number of axes that are summed with the input.
        stacked: number of leading axes that hold the layers of a vmapped or scanned stack.
        order: the axes of one layer with the summed ones first; None where they are.
    """

    contracted: int
    stacked: int
    order: tuple[int, ...] | None = None

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape [*stack, out, in] of what a kernel of this shape packs into."""
        shape = [shape[axis] for axis in self._permutation(len(shape))]
        first_output = self.stacked + self.contracted
        inputs, outputs = shape[self.stacked : first_output], shape[first_output:]
        return (*shape[: self.stacked], math.prod(outputs), math.prod(inputs))

    def matrices(self, kernel: jax.Array) -> jax.Array:
        """A kernel as matrices [*stack, out, in]."""
        *stack, rows, cols = self.matrix_shape(kernel.shape)
        kernel = jnp.asarray(kernel)
        if self.order is not None:
            kernel = kernel.transpose(self._permutation(kernel.ndim))
        return kernel.reshape(*stack, cols, rows).swapaxes(-1, -2)

    def _permutation(self, ndim: int) -> tuple[int, ...]:
        """The axes of a kernel in the order [*stack, *in, *out]."""
        order = range(ndim - self.stacked) if self.order is None else self.order
        return (*range(self.stacked), *(self.stacked + axis for axis in order))


def pack_weights(
    weights: jax.Array, rule: Rule | None, path: str, kind: str, unsupported: str | None = None
) -> tuple[MackoMatrix | None, PackedLayerReport]:
    """Pack the weights of one layer, or say why it stays dense.

    Args:
        weights: [*stack, out, in] floats.
        rule: the rule that applies to the layer, None if there is none.
        path: path of the layer.
        kind: name of the layer's class.
        unsupported: why the layer cannot be packed whatever the rule says, None if it can.

    Returns:
        The matrix, [out, in], its arrays with the leading axes `stack`, or None if the layer is
        skipped; and what to report.
    """
    own = None if rule is None or rule.dtype in quantization.NAMES else rule.dtype
    dtype = jnp.dtype(own or weights.dtype)
    rounded = jnp.asarray(weights, dtype)
    nonzeros = int(jnp.count_nonzero(rounded))
    report = PackedLayerReport(path, kind, weights.shape, nonzeros, weights.nbytes, weights.nbytes)
    if rule is None:
        return None, dataclasses.replace(report, note="no rule matches its path")
    reason = unsupported or _why_dense(weights, dtype, report.density, rule)
    if rule.skip:
        reason = f"rule {rule.path!r} says so"
    if reason:
        return None, dataclasses.replace(report, note=reason)
    if is_for_cpu():
        _warn_of_cpu()
    if weights.ndim > 2:
        matrix = _pack_stack(rounded, rule)
    else:
        matrix = compress(
            rounded,
            dtype=rule.dtype,
            encoding=rule.encoding,
            lanes=rule.lanes,
            capacity=shared_capacity,
        )
    return matrix, dataclasses.replace(
        report, bytes_after=matrix.nbytes, encoding=matrix.encoding, note=matrix.encoding
    )


@functools.cache
def _warn_of_cpu() -> None:
    """Says once a process what packing is for, where it is done for a CPU."""
    warnings.warn(
        "packed for a CPU, where products with packed layers are several times slower than dense "
        "ones; they pay on GPUs. There `load` packs this model anew; to pack it for a GPU here, "
        "name one, such as MACKO_JAX_CARD=H200, in the environment",
        stacklevel=2,
    )


def _why_dense(weights, dtype, density: float, rule: Rule) -> str | None:
    """Why weights are better not packed, or cannot be; None if they are."""
    if weights.size == 0:
        return "its kernel is empty"
    if dtype.name not in VALUE_DTYPES:
        allowed = ", ".join(VALUE_DTYPES)
        return f"values of {dtype} are not packed; a rule can set dtype to {allowed}"
    if rule.max_density < 1 and density >= rule.max_density:
        return f"from density {rule.max_density:g} on dense is faster"
    return None


def pack_pair(
    left: jax.Array, right: jax.Array, rule: Rule | None, path: str, kind: str
) -> tuple[MackoMatrix | None, MackoMatrix | None, PackedLayerReport]:
    """Pack the two factors of one layer, each as by `pack_weights`.

    Args:
        left: A, [*stack, out, k].
        right: B, [*stack, groups * k, in].
        rule: the rule that applies to the layer, None if there is none.
        path: path of the layer.
        kind: what to call the layer.

    Returns:
        The two matrices, None for a factor that stays dense; and what to report of both, compared
        with the dense matrix [out, in] that they stand for.
    """
    (first, of_left), (second, of_right) = (
        pack_weights(factor, rule, path, kind) for factor in (left, right)
    )
    shape = (*left.shape[:-1], right.shape[-1])
    notes = of_left.note
    if of_left.note != of_right.note:
        notes = f"left: {of_left.note}, right: {of_right.note}"
    found = dict.fromkeys(filter(None, (of_left.encoding, of_right.encoding)))
    return (
        first,
        second,
        PackedLayerReport(
            path,
            kind,
            shape,
            of_left.nonzeros + of_right.nonzeros,
            math.prod(shape) * left.dtype.itemsize,
            of_left.bytes_after + of_right.bytes_after,
            f"two factors via {left.shape[-1]}, {notes}",
            " and ".join(found) or None,
        ),
    )


def report_packed(
    matrices: Sequence[Matrix | jax.Array], path: str, kind: str
) -> PackedLayerReport:
    """What to report of a layer that was packed before.

    Args:
        matrices: its matrix, or left and right of a pair, [*stack, out, in].
        path: path of the layer.
        kind: what to call the layer.
    """
    first, last = matrices[0], matrices[-1]
    stack = first.stack if isinstance(first, Matrix) else first.shape[:-2]
    shape = (*stack, first.shape[-2], last.shape[-1])
    nonzeros = sum(
        matrix.nnz if isinstance(matrix, Matrix) else int(jnp.count_nonzero(matrix))
        for matrix in matrices
    )
    encodings = [matrix.encoding for matrix in matrices if isinstance(matrix, Matrix)]
    return PackedLayerReport(
        path,
        kind,
        shape,
        nonzeros,
        math.prod(shape) * first.dtype.itemsize,  # of 8-bit values that of their scales
        sum(matrix.nbytes for matrix in matrices),
        "it was packed before",
        " and ".join(dict.fromkeys(encodings)),
    )


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
    matrix: Matrix | jax.Array,
    inputs: jax.Array,
    bias: jax.Array | None,
    *,
    axis: int | Sequence[int],
    out_features: int | Sequence[int],
    promote: Callable,
    precision=None,
    norm: tuple[jax.Array, float] | None = None,
    gated: bool = False,
    add: jax.Array | None = None,
) -> jax.Array:
    """Multiply as Flax's Linear, LinearGeneral, Dense and DenseGeneral do: y = x W^T + b.

    Args:
        matrix: [out, in], packed or dense, where in and out are products of the layer's features.
        inputs: array whose axes `axis` hold the input features.
        bias: [*out_features] or None.
        axis: the contracted axes of `inputs`.
        out_features: the layer's output features, which become the last axes of the result.
        promote: takes the tuple (inputs, values, bias) to the dtype of the computation; of a matrix
            with 8-bit values, their scales in the place of the values.
        precision: of the product with a dense matrix; with a packed one it is float32 throughout.
        norm: (scale, eps) of a norm of the promoted inputs, as in `fused_spmv`.
        gated: whether the inputs, twice as wide, hold a gate. Both are for packed matrices only.
        add: of the shape of the result, or None.

    Returns:
        [*remaining axes of inputs, *out_features], in the dtype of the computation.
    """
    inputs = jnp.asarray(inputs)
    features = tuple(map(int, np.atleast_1d(out_features)))
    axis = sorted(int(a) % inputs.ndim for a in np.atleast_1d(axis))
    x = jnp.moveaxis(inputs, axis, range(-len(axis), 0))
    kept = x.ndim - len(axis)
    x = x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))

    if isinstance(matrix, Matrix):
        name = "values" if matrix.scales is None else "scales"
        stored = getattr(matrix, name)
        x, promoted, bias = promote((x, stored, bias))
        # Stored values narrower than the computation are widened by the product itself, exactly
        # and without a wide copy in memory.
        if jnp.promote_types(stored.dtype, promoted.dtype) != promoted.dtype:
            matrix = dataclasses.replace(matrix, **{name: promoted})
    else:
        x, dense, bias = promote((x, matrix, bias))
        y = jnp.matmul(x, dense.swapaxes(-1, -2), precision=precision)
        y = y.reshape(*y.shape[:-1], *features)
        return y if bias is None else y + bias
    if add is None:
        add, bias = bias, None
    if add is not None:
        add = add.reshape(*add.shape[: add.ndim - len(features)], matrix.shape[0])
    y = fused_spmv(matrix, x, norm=norm, gated=gated, add=add)
    y = y.reshape(*y.shape[:-1], *features)
    return y if bias is None else y + bias
