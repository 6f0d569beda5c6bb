"""Factor pairs as Flax layers: y = A (B x) in place of y = W x.

In NNX a compressed layer becomes a `FactorPair` of two ordinary Flax layers with dense-with-zeros
kernels, ready to be trained with fixed masks. In linen the module stays as it is; its `kernel`
becomes a `FactorizedKernel`, which runs inside `factorized_kernels()`. `export.pack` turns the
factors of either into MACKO matrices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class FactorPair(nnx.Module):
    """y = left(right(x)): two layers in place of one.

    Args:
      right: Maps the input to the inner dimension, without bias.
      left: Maps the inner dimension to the output, with the bias of the layer replaced.
    """

    def __init__(self, right: nnx.Module, left: nnx.Module):
        self.right = right
        self.left = left

    def __call__(self, inputs, out_sharding=None):
        if out_sharding is not None:
            raise ValueError("a FactorPair takes no out_sharding; shard its result instead")
        return self.left(self.right(inputs))


def why_no_pair(layer) -> str | None:
    """Why a pair of factors cannot stand for a Flax layer; None if it can."""
    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nn.Dense, nn.DenseGeneral, nn.Conv)
    base = next((kind for kind in kinds if isinstance(layer, kind)), None)
    name = type(layer).__name__
    if layer is None:
        return "its parameter belongs to no Flax layer"
    if base is None:
        return f"{name} has no form with two factors"
    if type(layer).__call__ is not base.__call__:
        return f"{name} has a __call__ of its own"
    if getattr(layer, "batch_axis", None) or getattr(layer, "batch_dims", None):
        return f"{name} with batch axes has no form with two factors"
    if getattr(layer, "mask", None) is not None:
        return f"{name} with a mask of its own has no form with two factors"
    return None


def become_pair(layer: nnx.Module, left: jax.Array, right: jax.Array):
    """Turns an NNX layer into a `FactorPair` in place, wherever and however often it is held.

    Args:
      layer: `nnx.Linear`, `LinearGeneral` or `Conv`.
      left: A, `[*stack, groups, out / groups, k]`; leading axes where layers are stacked.
      right: B, `[*stack, groups, k, in]`.
    """
    stack, (groups, _, inner) = left.shape[:-3], left.shape[-3:]
    kernel = layer.kernel.get_value()
    # Built abstractly: no kernel is drawn only to be replaced.
    pair = nnx.eval_shape(functools.partial(_new_pair, layer, groups, inner))
    inputs = kernel.shape[len(stack) : kernel.ndim - len(as_tuple(layer.out_features))]
    window = (1,) * (len(inputs) - 1) if groups > 1 else ()
    right = right.reshape(*stack, groups * inner, -1).swapaxes(-1, -2)
    left = left.reshape(*stack, -1, inner).swapaxes(-1, -2)
    right = right.reshape(*stack, *inputs, groups * inner)
    left = left.reshape(*stack, *window, inner, *as_tuple(layer.out_features))
    pair.right.kernel = nnx.Param(right.astype(kernel.dtype))
    pair.left.kernel = nnx.Param(left.astype(kernel.dtype))
    pair.left.bias = layer.bias
    vars(layer).clear()
    vars(layer).update(vars(pair))
    layer.__class__ = FactorPair


def _new_pair(layer, groups, inner):
    names = ("dtype", "param_dtype", "precision", "promote_dtype")
    shared = {name: getattr(layer, name) for name in names}
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
    # To k channels with the layer's own geometry, then a convolution of window 1, which is a
    # Linear unless it has groups.
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


def as_tuple(features):
    return (features,) if isinstance(features, int) else tuple(features)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class FactorizedKernel:
    """Two factors in the place of a linen layer's `kernel`.

    Attributes:
      left: A, `[groups, out / groups, k]`; leading axes where layers are stacked.
      right: B, `[groups, k, in]`.
    """

    left: jax.Array
    right: jax.Array


def factorized_kernels():
    """Context in which linen layers run on factorized kernels; the module is not changed.

    with dsf_jax.factorized_kernels():
        y = module.apply(variables, x)
    """
    return nn.intercept_methods(_run_factorized)


def _run_factorized(next_function, args, kwargs, context):
    layer = context.module
    if context.method_name != "__call__" or not isinstance(
        layer, (nn.Dense, nn.DenseGeneral, nn.Conv)
    ):
        return next_function(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, FactorizedKernel):
        return next_function(*args, **kwargs)
    (inputs,) = args
    groups, rows, inner = kernel.left.shape
    right = kernel.right.reshape(groups * inner, -1).T
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    if isinstance(layer, nn.Conv):
        window = as_tuple(layer.kernel_size)
        right = right.reshape(*window, -1, groups * inner)
        conv = layer.clone(features=groups * inner, use_bias=False, parent=None, name=None)
        hidden = conv.apply({"params": {"kernel": right}}, inputs)
    else:
        axes = sorted(a % inputs.ndim for a in as_tuple(getattr(layer, "axis", -1)))
        flat = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
        flat = flat.reshape(*flat.shape[: inputs.ndim - len(axes)], right.shape[0])
        flat, right = layer.promote_dtype(flat, right, dtype=layer.dtype)
        hidden = jnp.matmul(flat, right, precision=layer.precision)
    hidden, left, bias = layer.promote_dtype(hidden, kernel.left, bias, dtype=layer.dtype)
    hidden = hidden.reshape(*hidden.shape[:-1], groups, inner)
    output = jnp.einsum("...gk,gok->...go", hidden, left, precision=layer.precision)
    output = output.reshape(*output.shape[:-2], *as_tuple(layer.features))
    return output if bias is None else output + bias
