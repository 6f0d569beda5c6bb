"""Flax linen models on MACKO matrices: an unmodified module applies with packed kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax

from macko_jax.format.factors import FactorizedKernel
from macko_jax.format.matrix import MackoMatrix, decompress
from macko_jax.format.sharded import Matrix, ShardedMatrix
from macko_jax.nn.einsum import Contraction, why_no_contraction, why_no_einsum
from macko_jax.nn.frameworks import describe_other
from macko_jax.nn.linear import as_tuple
from macko_jax.nn.projection import KernelAxes, pack_pair, pack_weights, project, report_packed
from macko_jax.nn.report import (
    LayerReport,
    PackedLayerReport,
    PackingReport,
    is_matrix,
    report_as_it_is,
    why_no_kernel,
)
from macko_jax.nn.rules import Rule, Rules, assign_rules, layer_path

# Collections that hold no parameters.
STATE = ("batch_stats", "cache", "intermediates")

_RUN = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)  # the layers that run on packed kernels


def substitute(
    module: nn.Module,
    variables: dict,
    *args,
    rules: Rules = None,
    convolutions: bool = False,
    **kwargs,
) -> tuple[dict, PackingReport]:
    """Put MACKO matrices in the place of the sparse kernels of a module's variables.

        packed, report = macko_jax.flax_linen.substitute(model, variables, x)
        y = macko_jax.flax_linen.apply(model, packed, x)

    The module is traced once, with abstract values, to see which parameters are kernels of
    `nn.Dense`, `nn.DenseGeneral`, and of each `nn.Einsum` that is a plain contraction, such as
    "BTD,DNH->BTNH"; layers that this call does not reach stay dense. Scanned and vmapped layers,
    whose kernels have leading axes, are packed as stacks, and of a `FactorizedKernel` both factors
    are packed.

    Args:
        module: a linen module; it is not changed.
        variables: its variables, {"params": ..., ...}, with concrete arrays; not changed. Axis
            metadata such as `nn.Partitioned` is dropped.
        *args: example arguments of `module.apply`; arrays may be `jax.ShapeDtypeStruct`.
        rules: the `Rule`s, or regular expressions, that say which layers are packed and how; the
            first one that matches the whole path of a layer applies. None packs every layer
            below the break-even density.
        convolutions: whether the kernels of `nn.Conv` are packed as well, which saves memory and no
            time.
        **kwargs: further arguments of `module.apply`, such as `method` and `rngs`.

    Returns:
        Variables with a MackoMatrix [out, in] in the place of each packed kernel, which share no
        array with the old ones; and the report.

    Raises:
        TypeError: if `module` is no linen module.
        ValueError: if a rule matches no layer, or `variables` are none.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a flax.linen.Module, {describe_other(module)}")
    check_variables(variables)
    variables = nn.meta.unbox(variables)
    calls = _trace_calls(module, variables, args, kwargs)
    return _pack(variables, lambda path, _: calls.get(path, _UNREACHED), rules, convolutions)


def pack_variables(variables: dict, rules: Rules = None) -> tuple[dict, PackingReport]:
    """`substitute` without the module: factors, and kernels that have two axes.

    A kernel of two axes is taken for that of a Dense, [in, out]. Of others it is not known which
    axes are summed, so they stay, and the report says so.

    Args:
        variables: variables of a linen module; not changed.
        rules: as for `substitute`.

    Returns:
        New variables, and the report.

    Raises:
        TypeError, ValueError: if `variables` are none.
    """
    check_variables(variables)
    return _pack(nn.meta.unbox(variables), lambda _, kernel: _guess_call(kernel), rules, True)


def check_variables(variables: Any) -> None:
    """Raises an error where something is given in the place of a linen module's variables."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"expected the variables of a linen module, {{'params': ...}}, "
            f"{describe_other(variables)}"
        )
    if "params" not in variables:
        raise ValueError(
            "the variables of a linen module have 'params'; these have "
            f"{', '.join(map(repr, variables)) or 'nothing'}. Give {{'params': params}}; the "
            "parameters of Haiku are not read"
        )


def _pack(
    variables: dict, describe: Callable[[tuple, Any], _Call], rules: Rules, convolutions: bool
) -> tuple[dict, PackingReport]:
    """Pack variables, where `describe(path, kernel)` says what is known of a layer's call."""
    flat = traverse_util.flatten_dict(variables)
    kernels = {
        path[1:-1]: kernel
        for path, kernel in flat.items()
        if path[0] == "params" and path[-1] == "kernel"
    }
    assigned = assign_rules(rules, map("/".join, kernels))
    new, reports = {path: _copy(leaf) for path, leaf in flat.items()}, []
    for path, kernel in kernels.items():
        name = "/".join(path)
        packed, report = _pack_kernel(
            kernel, describe(path, kernel), assigned[name], name, convolutions
        )
        reports.append(report)
        if packed is not None:
            new["params", *path, "kernel"] = packed
    listed = {("params", *path, "kernel") for path in kernels}
    rest = {path: leaf for path, leaf in flat.items() if path not in listed}
    others = _report_others(rest)
    total = sum(getattr(leaf, "nbytes", 0) for leaf in rest.values())
    other_bytes = total - sum(entry.bytes_before for entry in others)
    packed = traverse_util.unflatten_dict(new)
    return packed, PackingReport(tuple(reports), other_bytes, others)


def _report_others(leaves: dict[tuple, Any]) -> tuple[LayerReport, ...]:
    """What to report of the matrices among leaves of variables that are no kernels, by path."""
    return tuple(
        report_as_it_is(
            layer_path(path[1:] if path[0] == "params" else path),
            "parameter",
            leaf,
            why_no_kernel(path[-1], "an nn.Dense, DenseGeneral, Einsum or Conv"),
        )
        for path, leaf in leaves.items()
        if is_matrix(path[-1], leaf) and path[0] not in STATE
    )


def _pack_kernel(
    kernel: Any, call: _Call, rule: Rule | None, path: str, convolutions: bool
) -> tuple[MackoMatrix | FactorizedKernel | None, PackedLayerReport]:
    """One kernel packed, None where it stays as it is; and what to report."""
    if isinstance(kernel, Matrix):
        return None, report_packed([kernel], path, call.kind)
    if isinstance(kernel, FactorizedKernel):
        left, right = kernel.matrices
        if isinstance(left, Matrix) or isinstance(right, Matrix):
            return None, report_packed(kernel.matrices, path, call.kind)
        left, right, report = pack_pair(left, right, rule, path, call.kind)
        packed = FactorizedKernel(
            kernel.left if left is None else left, kernel.right if right is None else right
        )
        return packed if left is not None or right is not None else None, report
    stacked = kernel.ndim - len(call.kernel_shape)
    unsupported = call.unsupported
    if call.is_conv and not convolutions:
        unsupported = "a packed convolution saves memory but no time; convolutions=True packs it"
    if not unsupported and kernel.shape[stacked:] != call.kernel_shape:
        unsupported = (
            f"its kernel {kernel.shape} does not end in {call.kernel_shape}; only "
            "leading axes can be stacked"
        )
    weights = KernelAxes(call.contracted, max(stacked, 0), call.order).matrices(kernel)
    return pack_weights(weights, rule, path, call.kind, unsupported)


def apply(module: nn.Module, variables: dict, *args, **kwargs) -> Any:
    """`module.apply` for variables with packed kernels.

    Each `nn.Dense`, `nn.DenseGeneral` and `nn.Einsum` whose kernel is a MackoMatrix or a
    FactorizedKernel multiplies by it, with the layer's own dtypes and bias, and each such `nn.Conv`
    convolves with the densified matrix; all else runs as it is. Works under jit, grad, vmap and
    inside nn.scan, nn.remat and nn.vmap. Equals `with packed_kernels(): module.apply(...)`.

    Args:
        module: the linen module.
        variables: what `substitute`, `combine` or `macko_jax.load_model` gave.
        *args: arguments of `module.apply`.
        **kwargs: further arguments of `module.apply`.

    Returns:
        What `module.apply` returns.
    """
    with packed_kernels():
        return module.apply(variables, *args, **kwargs)


def packed_kernels():
    """Context in which linen's layers run on packed and factorized kernels; nothing is patched.

    with macko_jax.flax_linen.packed_kernels():
        y = module.apply(variables, x)
    """
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
    """What is known of one layer with a kernel.

    Attributes:
        kind: name of the layer's class.
        kernel_shape: of its kernel in one layer, without the axes of a stack.
        contracted: number of the kernel's axes that are summed.
        unsupported: why the kernel cannot be packed, None if it can.
        is_conv: whether the layer is a convolution.
        order: the kernel's axes with the summed ones first; None where they are.
    """

    kind: str
    kernel_shape: tuple[int, ...]
    contracted: int
    unsupported: str | None = None
    is_conv: bool = False
    order: tuple[int, ...] | None = None


_UNREACHED = _Call("?", (0, 0), 1, "the example call of the module does not reach it")


def _guess_call(kernel: Any) -> _Call:
    """What a kernel alone tells of its layer."""
    if not isinstance(kernel, jax.Array | np.ndarray):
        return _Call(type(kernel).__name__, (), 1)
    if kernel.ndim == 2:
        return _Call("Dense", kernel.shape, 1)
    return _Call(
        "?",
        kernel.shape,
        max(kernel.ndim - 1, 1),
        f"of its kernel {kernel.shape} it is not known which axes are summed; give the module and "
        "example inputs as well",
    )


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

    with nn.intercept_methods(record), packed_kernels():
        jax.eval_shape(call, variables, traced)
    return calls


def _describe_call(layer: nn.Module) -> _Call:
    shape = getattr(layer.get_variable("params", "kernel"), "shape", ())
    name = type(layer).__name__
    if isinstance(layer, nn.Einsum):
        unsupported = _why_no_einsum(layer)
        if why_no_contraction(layer.einsum_str):
            return _Call(name, shape, 1, unsupported)
        found = Contraction.of(layer.einsum_str)
        return _Call(name, shape, len(found.summed), unsupported, order=found.order)
    base = next((kind for kind in _RUN if isinstance(layer, kind)), None)
    if base is None:
        return _Call(name, shape, 1, f"{name} is no nn.Dense, DenseGeneral, Einsum or Conv")
    unsupported = None
    if type(layer).__call__ is not base.__call__:
        unsupported = f"{name} has a __call__ of its own"
    elif base is nn.Conv:
        if layer.mask is not None:
            unsupported = "it has a mask of its own"
        contracted = len(as_tuple(layer.kernel_size)) + 1
        return _Call(name, shape, contracted, unsupported, is_conv=True)
    elif base is nn.DenseGeneral and layer.batch_dims:
        unsupported = "it has batch dimensions"
    elif layer.dot_general_cls or layer.dot_general not in (None, lax.dot_general):
        unsupported = "it has a dot_general of its own"
    contracted = np.size(layer.axis) if base is nn.DenseGeneral else 1
    return _Call(name, shape, contracted, unsupported)


def _why_no_einsum(layer: nn.Einsum) -> str | None:
    """Why an Einsum does not run on a packed kernel; None if it does."""
    reason = why_no_einsum(layer)
    if reason is None and Contraction.of(layer.einsum_str).order == (1, 0):
        # `pack_variables` takes a kernel of two axes for [in, out]: a square one would run wrongly.
        return f"its kernel {layer.shape} is [out, in]; of two axes only [in, out] is packed"
    return reason


def _run_packed(next_function: Callable, args, kwargs, context):
    """Method interceptor: a layer with a packed or factorized kernel multiplies by it."""
    layer = context.module
    if (
        context.method_name != "__call__"
        or layer.scope is None
        or not layer.has_variable("params", "kernel")
    ):
        return next_function(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, Matrix | FactorizedKernel):
        return next_function(*args, **kwargs)
    if reason := _why_not_run(layer, kernel):
        path = "/".join(layer.scope.path)
        raise TypeError(
            f"{path!r} is a {type(layer).__name__} with a packed kernel; {reason}. Leave it dense "
            f"with Rule({path!r}, skip=True)"
        )
    bias = nn.meta.unbox(layer.get_variable("params", "bias")) if layer.use_bias else None
    if isinstance(layer, nn.Einsum):
        return _run_einsum(layer, kernel, bias, *args, **kwargs)
    if isinstance(kernel, Matrix):
        return _multiply(layer, kernel, *args, **kwargs, bias=bias, features=layer.features)
    left, right = kernel.matrices
    hidden = _multiply(layer, right, *args, **kwargs, bias=None, features=right.shape[0])
    if kernel.groups > 1:
        return _multiply_groups(layer, left, hidden, bias, kernel.groups)
    return _project(layer, left, hidden, bias, -1, layer.features)


def _why_not_run(layer: nn.Module, kernel: Matrix | FactorizedKernel) -> str | None:
    """Why a layer does not run on such a kernel; None if it does."""
    base = next((kind for kind in _RUN if isinstance(layer, kind)), None)
    if base is None:
        return "only nn.Dense, DenseGeneral, Einsum and Conv run on one"
    if type(layer).__call__ is not base.__call__:
        return "it has a __call__ of its own, which would not be run"
    matrices = kernel.matrices if isinstance(kernel, FactorizedKernel) else (kernel,)
    in_shards = any(isinstance(matrix, ShardedMatrix) for matrix in matrices)
    if in_shards and isinstance(layer, nn.Conv):
        return "an nn.Conv does not run on one in shards; load it without a mesh"
    if not isinstance(layer, nn.Einsum):
        return None
    return _why_no_einsum(layer) if isinstance(kernel, Matrix) else why_no_einsum(layer)


def _run_einsum(layer, kernel: Any, bias, inputs, einsum_str=None):
    """An Einsum with a matrix, or with two factors, in the place of its kernel."""
    if einsum_str is not None:
        raise TypeError(f"an Einsum with a packed kernel takes no einsum_str, got {einsum_str!r}")
    options = {
        "promote": lambda arrays: layer.promote_dtype(*arrays, dtype=layer.dtype),
        "precision": layer.precision,
    }
    whole = Contraction.of(layer.einsum_str)
    if isinstance(kernel, Matrix):
        return whole.apply(kernel, inputs, bias, kernel_shape=layer.shape, **options)
    right, left = whole.pair(layer.shape, kernel.inner)
    first, second = reversed(kernel.matrices)
    hidden = right.contraction.apply(
        first, inputs, None, kernel_shape=right.kernel_shape, **options
    )
    return left.contraction.apply(second, hidden, bias, kernel_shape=left.kernel_shape, **options)


def _multiply(layer, matrix, inputs, *, bias, features):
    """The layer's product, or convolution, with a matrix [out, in] in the place of its kernel."""
    if not isinstance(layer, nn.Conv):
        return _project(layer, matrix, inputs, bias, getattr(layer, "axis", -1), features)
    kernel = _dense(matrix).T.reshape(*as_tuple(layer.kernel_size), -1, features)
    parameters = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    options = {"features": features, "use_bias": bias is not None}
    return layer.clone(**options, parent=None, name=None).apply({"params": parameters}, inputs)


def _multiply_groups(layer, left, hidden, bias, groups):
    """A grouped convolution's left factor [out, k], of which each group has its rows."""
    hidden, left, bias = layer.promote_dtype(hidden, _dense(left), bias, dtype=layer.dtype)
    left = left.reshape(groups, -1, left.shape[-1])
    hidden = hidden.reshape(*hidden.shape[:-1], groups, -1)
    output = jnp.einsum("...gk,gok->...go", hidden, left, precision=layer.precision)
    output = output.reshape(*output.shape[:-2], layer.features)
    return output if bias is None else output + bias


def _project(layer, matrix, inputs, bias, axis, features):
    return project(
        matrix,
        inputs,
        bias,
        axis=axis,
        out_features=features,
        promote=lambda arrays: layer.promote_dtype(*arrays, dtype=layer.dtype),
        precision=layer.precision,
    )


def _dense(matrix: MackoMatrix | jax.Array) -> jax.Array:
    return decompress(matrix) if isinstance(matrix, MackoMatrix) else matrix


def _copy(node: Any) -> Any:
    """A leaf of the variables, or a packed or factorized kernel, with arrays of its own."""
    return jax.tree.map(
        lambda leaf: leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf, node
    )
