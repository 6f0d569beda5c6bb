"""Flax linen models on MACKO matrices: an unmodified module applies with packed kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax

from macko_jax.format.matrix import MackoMatrix
from macko_jax.nn.projection import pack_kernel, project
from macko_jax.nn.report import PackingReport
from macko_jax.nn.rules import Rules, assign_rules


def substitute(
    module: nn.Module, variables: dict, *args, rules: Rules = None, **kwargs
) -> tuple[dict, PackingReport]:
    """Put MACKO matrices in the place of the sparse kernels of a module's variables.

        packed, report = macko_jax.flax_linen.substitute(model, variables, x)
        y = macko_jax.flax_linen.apply(model, packed, x)

    The module is traced once, with abstract values, to see which parameters are kernels of
    `nn.Dense` and `nn.DenseGeneral`; layers that this call does not reach stay dense. Scanned and
    vmapped layers, whose kernels have leading axes, are packed as stacks.

    Args:
        module: a linen module; it is not changed.
        variables: its variables, {"params": ..., ...}, with concrete arrays; not changed. Axis
            metadata such as `nn.Partitioned` is dropped.
        *args: example arguments of `module.apply`; arrays may be `jax.ShapeDtypeStruct`.
        rules: the `Rule`s, or regular expressions, that say which layers are packed and how; the
            first one that matches the whole path of a layer applies. None packs every layer
            below the break-even density.
        **kwargs: further arguments of `module.apply`, such as `method` and `rngs`.

    Returns:
        Variables with a MackoMatrix [out, in] in the place of each packed kernel, which share no
        array with the old ones; and the report.

    Raises:
        ValueError: if a rule matches no layer.
    """
    flat = traverse_util.flatten_dict(nn.meta.unbox(variables))
    kernels = {
        path[1:-1]: kernel
        for path, kernel in flat.items()
        if path[0] == "params" and path[-1] == "kernel"
    }
    calls = _trace_calls(module, nn.meta.unbox(variables), args, kwargs)
    layers = {
        "/".join(path): (path, calls.get(path, _UNREACHED))
        for path in kernels
        if path not in calls or calls[path].is_linear
    }
    assigned = assign_rules(rules, layers)
    reports, packed = [], {}
    for name, (path, call) in layers.items():
        kernel = kernels[path]
        stacked = kernel.ndim - len(call.kernel_shape)
        unsupported = call.unsupported
        if not unsupported and kernel.shape[stacked:] != call.kernel_shape:
            unsupported = (
                f"its kernel {kernel.shape} does not end in {call.kernel_shape}; only "
                "leading axes can be stacked"
            )
        matrix, report = pack_kernel(
            kernel, call.contracted, stacked, assigned[name], name, call.layer, unsupported
        )
        reports.append(report)
        if matrix is not None:
            packed["params", *path, "kernel"] = matrix

    listed = {("params", *path, "kernel") for path, _ in layers.values()}
    other_bytes = sum(
        getattr(leaf, "nbytes", 0) for path, leaf in flat.items() if path not in listed
    )
    new = {path: packed[path] if path in packed else _copy(leaf) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(new), PackingReport(tuple(reports), other_bytes)


def apply(module: nn.Module, variables: dict, *args, **kwargs) -> Any:
    """`module.apply` for variables with packed kernels.

    Each `nn.Dense` and `nn.DenseGeneral` whose kernel is a MackoMatrix multiplies by it, with the
    layer's own dtypes and bias; all else runs as it is. Works under jit, grad, vmap and inside
    nn.scan, nn.remat and nn.vmap. Equals `with packed_kernels(): module.apply(...)`.

    Args:
        module: the linen module.
        variables: what `substitute` or `combine` gave.
        *args: arguments of `module.apply`.
        **kwargs: further arguments of `module.apply`.

    Returns:
        What `module.apply` returns.
    """
    with packed_kernels():
        return module.apply(variables, *args, **kwargs)


def packed_kernels():
    """Context in which linen's dense layers run on packed kernels; nothing is patched."""
    return nn.intercept_methods(_run_packed)


def partition(tree: Any) -> tuple[Any, Any]:
    """Split a pytree into the leaves that are trained and all others, for `jax.grad` and optax.

        trainable, fixed = partition(variables["params"])
        grads = jax.grad(lambda t: loss(combine(t, fixed)))(trainable)

    Args:
        tree: any pytree, such as packed parameters.

    Returns:
        Two trees of the same structure: one with the floating-point leaves of 16 bits and more,
        which of a packed kernel are its values, or the scales of 8-bit values, and one with the
        other leaves; None stands for the rest.
    """

    def is_trained(leaf) -> bool:
        dtype = jnp.result_type(leaf)
        return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1

    return (
        jax.tree.map(lambda leaf: leaf if is_trained(leaf) else None, tree),
        jax.tree.map(lambda leaf: None if is_trained(leaf) else leaf, tree),
    )


def combine(trainable: Any, fixed: Any) -> Any:
    """Put together what `partition` split.

    Args:
        trainable: a tree with None in the place of fixed leaves.
        fixed: a tree of that structure with None in the place of trained leaves.

    Returns:
        The whole tree.
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, fixed, is_leaf=lambda leaf: leaf is None
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the tracing of a module saw of one layer with a kernel."""

    layer: str
    kernel_shape: tuple[int, ...]
    contracted: int
    is_linear: bool
    unsupported: str | None


_UNREACHED = _Call("?", (0, 0), 1, True, "the example call of the module does not reach it")


def _trace_calls(module: nn.Module, variables: dict, args: tuple, kwargs: dict) -> dict:
    """Trace `module.apply` and give the `_Call` of each layer with a kernel, by its path."""
    calls = {}

    def record(next_function: Callable, args, kwargs, context):
        layer = context.module
        if context.method_name == "__call__" and layer.has_variable("params", "kernel"):
            calls[layer.scope.path] = _describe_call(layer)
        return next_function(*args, **kwargs)

    # Arrays are traced; flags such as train=False have to stay Python values.
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = {
        index: leaf
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    }

    def call(variables, traced):
        merged = [traced.get(index, leaf) for index, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, merged)
        module.apply(variables, *args, **{"mutable": True, **kwargs})

    with nn.intercept_methods(record):
        jax.eval_shape(call, variables, traced)
    return calls


def _describe_call(layer: nn.Module) -> _Call:
    shape = layer.get_variable("params", "kernel").shape
    name = type(layer).__name__
    if isinstance(layer, nn.Einsum):
        return _Call(name, shape, 1, True, "Einsum has no packed form")
    if not isinstance(layer, nn.Dense | nn.DenseGeneral):
        return _Call(name, shape, 1, False, f"{name} is not a dense layer")
    general = isinstance(layer, nn.DenseGeneral)
    base = nn.DenseGeneral if general else nn.Dense
    unsupported = None
    if type(layer).__call__ is not base.__call__:
        unsupported = f"{name} has a __call__ of its own"
    elif general and layer.batch_dims:
        unsupported = "it has batch dimensions"
    elif layer.dot_general_cls or layer.dot_general not in (None, lax.dot_general):
        unsupported = "it has a dot_general of its own"
    return _Call(name, shape, np.size(layer.axis) if general else 1, True, unsupported)


def _run_packed(next_function: Callable, args, kwargs, context):
    """Method interceptor: a dense layer with a packed kernel multiplies by it."""
    layer = context.module
    if context.method_name != "__call__" or not isinstance(layer, nn.Dense | nn.DenseGeneral):
        return next_function(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, MackoMatrix):
        return next_function(*args, **kwargs)
    return project(
        kernel,
        *args,
        **kwargs,
        bias=layer.get_variable("params", "bias") if layer.use_bias else None,
        axis=getattr(layer, "axis", -1),
        out_features=layer.features,
        promote=lambda arrays: layer.promote_dtype(*arrays, dtype=layer.dtype),
    )


def _copy(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf
