"""Factor pairs as Flax layers: y = A (B x) in place of y = W x.

In NNX a factorized layer is a `FactorPair` of two layers, dense with zeros or packed. In linen the
module stays as it is, and its `kernel` is a `FactorizedKernel`, which runs inside
`flax_linen.packed_kernels()`.
"""

import functools
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from macko_jax.nn.absent import AbsentKernel
from macko_jax.nn.einsum import Contraction, why_no_einsum
from macko_jax.nn.linear import as_tuple


class FactorPair(nnx.Module):
    """y = left(right(x)): two layers in place of one.

    Args:
        right: maps the input to the inner dimension, without bias.
        left: maps the inner dimension to the output, with the bias of the layer replaced.
        kernel_shape: of the kernel that they stand for, without the axes of a stack; None where
            none is known.
    """

    right: Any
    left: Any

    def __init__(
        self, right: nnx.Module, left: nnx.Module, kernel_shape: tuple[int, ...] | None = None
    ):
        self.right = right
        self.left = left
        self.kernel_shape = kernel_shape

    @property
    def kernel(self) -> AbsentKernel:
        """The shape and dtype of the kernel that was here; there are no numbers to read."""
        message = (
            "a FactorPair has no 'kernel': its two layers, `right` and then `left`, stand for it. "
            "To keep the layer whole, compress the model with a Rule of its path and skip=True, or "
            "with method='admm'"
        )
        if self.kernel_shape is None:
            raise AttributeError(message)
        return AbsentKernel(self.kernel_shape, self.left.kernel.dtype, message)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Apply the two layers.

        Args:
            inputs: as the layer replaced takes them.
            out_sharding: only None; accepted for the sake of callers written for `nnx.Linear`.
        """
        if out_sharding is not None:
            raise ValueError("a FactorPair takes no out_sharding; shard its result instead")
        return self.left(self.right(inputs))


def why_no_pair(layer) -> str | None:
    """Why a pair of factors cannot stand for a Flax layer; None if it can."""
    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv)
    kinds += (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)
    base = next((kind for kind in kinds if isinstance(layer, kind)), None)
    name = type(layer).__name__
    if layer is None:
        return "its parameter belongs to no Flax layer"
    if base is None:
        return f"{name} has no form with two factors"
    if type(layer).__call__ is not base.__call__:
        return f"{name} has a __call__ of its own"
    if isinstance(layer, nnx.Einsum | nn.Einsum):
        return why_no_einsum(layer)
    if getattr(layer, "batch_axis", None) or getattr(layer, "batch_dims", None):
        return f"{name} with batch axes has no form with two factors"
    if getattr(layer, "mask", None) is not None:
        return f"{name} with a mask of its own has no form with two factors"
    return None


def abstract_pair(
    layer: nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv, inner: int
) -> FactorPair:
    """The pair that can stand for an NNX layer, with shapes in the place of its kernels.

    Args:
        layer: an `nnx.Linear`, `LinearGeneral`, `Einsum` or `Conv`, concrete or abstract, or a
            stack of them.
        inner: the inner dimension k, for a grouped convolution that of each group.

    Returns:
        A `FactorPair` with the layer's own bias. An Einsum becomes two. A convolution becomes one
        to k channels with the layer's geometry, then one with window 1, which is a Linear unless
        there are groups.
    """
    # Built abstractly: no kernel is drawn only to be replaced.
    pair = nnx.eval_shape(functools.partial(_new_pair, layer, inner))
    kernel = layer.kernel.get_value()
    if isinstance(layer, nnx.Einsum):
        own = len(layer.kernel_shape)
    else:
        own = pair.right.kernel.get_value().ndim - 1 + len(as_tuple(layer.out_features))
    stack, pair.kernel_shape = kernel.shape[: kernel.ndim - own], kernel.shape[kernel.ndim - own :]
    for factor in (pair.right, pair.left):
        shape = factor.kernel.get_value().shape
        factor.kernel = nnx.Param(jax.ShapeDtypeStruct((*stack, *shape), kernel.dtype))
    pair.left.bias = layer.bias
    return pair


def _new_pair(layer, inner):
    names = ("dtype", "param_dtype", "precision", "promote_dtype")
    shared = {name: getattr(layer, name) for name in names}
    if isinstance(layer, nnx.Einsum):
        right, left = Contraction.of(layer.einsum_str).pair(layer.kernel_shape, inner)
        shared["rngs"] = nnx.Rngs(0)
        return FactorPair(
            nnx.Einsum(str(right.contraction), right.kernel_shape, **shared),
            nnx.Einsum(str(left.contraction), left.kernel_shape, layer.bias_shape, **shared),
        )
    right_options = shared | {"use_bias": False, "rngs": nnx.Rngs(0)}
    left_options = shared | {"use_bias": layer.bias is not None, "rngs": nnx.Rngs(0)}
    if isinstance(layer, nnx.LinearGeneral):
        return FactorPair(
            nnx.LinearGeneral(layer.in_features, inner, axis=layer.axis, **right_options),
            nnx.LinearGeneral(inner, layer.out_features, **left_options),
        )
    if isinstance(layer, nnx.Linear):
        return FactorPair(
            nnx.Linear(layer.in_features, inner, **right_options),
            nnx.Linear(inner, layer.out_features, **left_options),
        )
    groups = layer.feature_group_count
    right = nnx.Conv(
        layer.in_features,
        groups * inner,
        layer.kernel_size,
        layer.strides,
        padding=layer.padding,
        input_dilation=layer.input_dilation,
        kernel_dilation=layer.kernel_dilation,
        feature_group_count=groups,
        **right_options,
    )
    if groups == 1:
        return FactorPair(right, nnx.Linear(inner, layer.out_features, **left_options))
    window = (1,) * len(layer.kernel_size)
    return FactorPair(
        right,
        nnx.Conv(
            groups * inner, layer.out_features, window, feature_group_count=groups, **left_options
        ),
    )
