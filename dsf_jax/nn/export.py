"""Compressed models on MACKO matrices: the only file here that imports `macko_jax`.

    pair = dsf_jax.compress_model(model, batches, method="dsf", density=0.5).model
    packed, report = dsf_jax.export.pack(pair)

Both factors of a pair, the kernels of pruned linear layers, and those of convolutions become MACKO
matrices. For linen variables there is `pack_linen`, applied inside `packed_kernels()`.
"""

import contextlib
import dataclasses
import functools
import re

import jax
from flax import linen as nn
from flax import nnx

import macko_jax
from dsf_jax.nn.layers import FactorizedKernel, as_tuple
from macko_jax.format.choose import shared_capacity
from macko_jax.nn import flax_linen, flax_nnx
from macko_jax.nn.projection import pack_kernel, project
from macko_jax.nn.report import PackingReport
from macko_jax.nn.rules import Rules, assign_rules


class MackoConv(nnx.Module):
    """A convolution whose kernel is held as a MACKO matrix `[out, window * in]`.

    A convolution multiplies the same kernel with the patches of every position, far above the
    number of vectors where a sparse product pays; so the kernel is decoded where it is used, and
    only memory is saved.

    Args:
      conv: The `nnx.Conv` that it replaces.
      matrix: The packed kernel.
    """

    def __init__(self, conv: nnx.Conv, matrix: macko_jax.MackoMatrix):
        self.kernel_shape = conv.kernel.get_value().shape
        self.kernel = flax_nnx.MackoLinear(
            matrix, in_features=matrix.shape[1], out_features=matrix.shape[0]
        )
        self.bias = nnx.data(conv.bias)
        # All that a convolution is but its arrays: strides, padding, dtypes, groups.
        self.graph, _ = nnx.split(_without_arrays(conv))

    def __call__(self, inputs, out_sharding=None):
        matrix = macko_jax.decompress(self.kernel.matrix)
        conv = nnx.merge(self.graph, nnx.State({}))
        conv.kernel = nnx.Param(matrix.T.reshape(self.kernel_shape))
        conv.bias = self.bias
        return conv(inputs, out_sharding=out_sharding)


def _without_arrays(conv):
    bare = nnx.clone(conv)
    bare.kernel = nnx.data(None)
    bare.bias = nnx.data(None)
    return bare


def pack(model: nnx.Module, rules: Rules = None) -> tuple[nnx.Module, PackingReport]:
    """Packs the linear layers and convolutions of an NNX model into MACKO matrices.

    Args:
      model: Any NNX model; left as it is.
      rules: As for `macko_jax.flax_nnx.substitute`; they may name convolutions as well. A factor
        pair at `path` is the two layers `path/right` and `path/left`.

    Returns:
      A new model, and the report of every layer: bytes before and after, why one was left dense.
    """
    convs = _modules(model, nnx.Conv)
    linears = _modules(model, (nnx.Linear, nnx.LinearGeneral, nnx.Einsum))
    assigned = assign_rules(rules, [*linears, *convs])
    exact = [
        dataclasses.replace(assigned[path], path=re.escape(path))
        for path in linears
        if assigned[path] is not None
    ]
    model, report = flax_nnx.substitute(model, exact)
    layers, other_bytes = list(report.layers), report.other_bytes
    for path, conv in _modules(model, nnx.Conv).items():
        kernel = conv.kernel.get_value()
        reason = None
        if type(conv).__call__ is not nnx.Conv.__call__:
            reason = "it has a __call__ of its own"
        if kernel.ndim != len(conv.kernel_size) + 2:
            reason = "a stack of convolutions has no packed form"
        matrix, entry = pack_kernel(
            kernel, kernel.ndim - 1, 0, assigned[path], path, type(conv).__name__, reason
        )
        layers.append(entry)
        other_bytes -= entry.bytes_before
        if matrix is not None:
            packed = MackoConv(conv, matrix)
            vars(conv).clear()
            vars(conv).update(vars(packed))
            conv.__class__ = MackoConv
    return model, PackingReport(tuple(layers), other_bytes)


def _modules(model, kinds):
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, kinds)
    }


def pack_linen(variables: dict) -> dict:
    """Packs the factors in linen variables, `FactorizedKernel`s, into MACKO matrices.

    Kernels that are no pairs stay; `macko_jax.flax_linen.substitute` packs those.

    Args:
      variables: Variables of a linen module, as `compress_model` gives them.

    Returns:
      New variables, to be applied inside `packed_kernels()`.

    Raises:
      ValueError: A pair that is stacked or grouped.
    """

    def convert(path, leaf):
        if not isinstance(leaf, FactorizedKernel):
            return leaf
        if leaf.left.ndim != 3 or leaf.left.shape[0] != 1:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: factors of stacked or grouped layers "
                f"{leaf.left.shape} have no packed linen form; keep them as FactorizedKernel"
            )
        left, right = (
            macko_jax.compress(factor[0], capacity=shared_capacity)
            for factor in (leaf.left, leaf.right)
        )
        return FactorizedKernel(left, right)

    return jax.tree_util.tree_map_with_path(
        convert, variables, is_leaf=lambda leaf: isinstance(leaf, FactorizedKernel)
    )


@contextlib.contextmanager
def packed_kernels():
    """Context in which linen layers run on packed factors and on other packed kernels."""
    with flax_linen.packed_kernels(), nn.intercept_methods(_run_packed_pair):
        yield


def _run_packed_pair(next_function, args, kwargs, context):
    layer = context.module
    if context.method_name != "__call__" or not isinstance(
        layer, (nn.Dense, nn.DenseGeneral, nn.Conv)
    ):
        return next_function(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, FactorizedKernel):
        return next_function(*args, **kwargs)
    (inputs,) = args
    inner = kernel.right.shape[0]
    promote = functools.partial(_promote, layer)
    if isinstance(layer, nn.Conv):
        right = macko_jax.decompress(kernel.right).T
        right = right.reshape(*as_tuple(layer.kernel_size), -1, inner)
        conv = layer.clone(features=inner, use_bias=False, parent=None, name=None)
        hidden = conv.apply({"params": {"kernel": right}}, inputs)
    else:
        axis = getattr(layer, "axis", -1)
        hidden = project(kernel.right, inputs, None, axis=axis, out_features=inner, promote=promote)
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    return project(kernel.left, hidden, bias, axis=-1, out_features=layer.features, promote=promote)


def _promote(layer, arrays):
    return layer.promote_dtype(*arrays, dtype=layer.dtype)
