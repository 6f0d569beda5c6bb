"""Flax NNX models on MACKO matrices: substitution of layers, and packed checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

import jax
import numpy as np
from flax import nnx, traverse_util
from jax import lax

from macko_jax.format.factors import join_groups
from macko_jax.format.matrix import MackoMatrix
from macko_jax.format.sharded import Matrix, ShardedMatrix
from macko_jax.nn.conv import MackoConv
from macko_jax.nn.einsum import Contraction, MackoEinsum, why_no_contraction, why_no_einsum
from macko_jax.nn.frameworks import describe_other
from macko_jax.nn.linear import ARRAY_NAMES, MackoLinear, MackoLoRALinear, PackedLayer, as_tuple
from macko_jax.nn.pairs import FactorPair, abstract_pair, why_no_pair
from macko_jax.nn.projection import KernelAxes, pack_pair, pack_weights, report_packed
from macko_jax.nn.report import (
    LayerReport,
    PackedLayerReport,
    PackingReport,
    is_matrix,
    report_as_it_is,
    why_no_kernel,
)
from macko_jax.nn.rules import Rule, Rules, assign_rules, layer_path

Model = TypeVar("Model")
Layer = nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv

# Variables that are no parameters.
STATE = (nnx.BatchStat, nnx.Cache, nnx.Intermediate, nnx.RngState)


def substitute(
    model: Model, rules: Rules = None, *, convolutions: bool = False
) -> tuple[Model, PackingReport]:
    """Put a packed layer in the place of each sparse layer of a model.

    `nnx.Linear` and `nnx.LinearGeneral` become `MackoLinear` (a `LoRALinear` with its adapter
    beside it), and each `nnx.Einsum` that is a plain contraction, such as "BTD,DNH->BTNH", becomes
    `MackoEinsum`; alone or as the factors of a
    `FactorPair`, wherever they are: as attributes, in lists, dicts, tuples and Sequential, in
    vmapped or scanned stacks (kernels with leading axes), shared between several parents (and then
    shared again), or as the model itself. The report names the layers that stay dense and why: one
    that no rule matches, whose density is at least the rule's `max_density`, or that does something
    the packed layer does not (a subclass with a `__call__` of its own, batch axes, a custom
    `dot_general`).

    Args:
        model: any NNX model, or a pytree of modules, with concrete arrays. It is left as it is.
        rules: the `Rule`s, or regular expressions, that say which layers are packed and how; the
            first one that matches the whole path of a layer applies. A pair of factors is one layer
            with one path. None packs every layer below the break-even density.
        convolutions: whether `nnx.Conv` becomes `MackoConv`, which saves memory and no time.

    Returns:
        A copy of the model that shares no variable and no array with it, and the report.

    Raises:
        TypeError: if there is no NNX module in what is given.
        ValueError: if a rule matches no layer, or if the model is abstract.
    """
    if not any(map(_is_module, jax.tree.leaves(model, is_leaf=_is_module))):
        raise TypeError(f"expected a flax.nnx.Module, or a pytree of them, {describe_other(model)}")
    # The copy's variables are new, its arrays are still the old ones: no dense kernel is copied.
    model = nnx.clone(model)
    layers = {_join(path): layer for path, layer in _layers(model)}
    assigned = assign_rules(rules, layers)
    before = jax.tree.leaves(nnx.state(model))
    reports, listed, fresh = [], set(), set()
    for path, layer in layers.items():
        listed.update(id(array) for part in _parts(layer) for array in _kernel_arrays(part))
        if _is_packed(layer):
            reports.append(report_packed(_matrices(layer), path, type(layer).__name__))
            continue
        matrices, report = _pack_layer(layer, assigned[path], path, convolutions)
        fresh.update(map(id, jax.tree.leaves(matrices)))
        reports.append(report)
    others = _report_others(model, list(layers.values()))
    total = sum(getattr(leaf, "nbytes", 0) for leaf in before if id(leaf) not in listed)
    other_bytes = total - sum(entry.bytes_before for entry in others)
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda a: a if id(a) in fresh else _copy(a), state))
    return model, PackingReport(tuple(reports), other_bytes, others)


def _is_module(node: Any) -> bool:
    return isinstance(node, nnx.Module)


def _report_others(model: Any, layers: Sequence[Any]) -> tuple[LayerReport, ...]:
    """What to report of the parameter matrices of a model that belong to no layer."""
    modules = dict(nnx.iter_modules(model))
    parts = {id(part) for layer in layers for part in _parts(layer)}
    others = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(*STATE)))):
        owner, array = modules.get(path[:-1]), variable.get_value()
        is_kernel = isinstance(owner, PackedLayer) or path[-1] == "kernel"
        if is_matrix(path[-1], array) and not (is_kernel and id(owner) in parts):
            kind = "parameter" if owner is None else type(owner).__name__
            reason = why_no_kernel(path[-1], "an nnx.Linear, LinearGeneral, Einsum or Conv")
            others.append(report_as_it_is(layer_path(path), kind, array, reason))
    return tuple(others)


def _layers(model: Any) -> list[tuple[tuple, Any]]:
    """Paths and layers that may be packed, or are, in the order of the model; a pair is one."""
    kinds = (*get_args(Layer), PackedLayer)
    modules = list(nnx.iter_modules(model))
    pairs = [
        module
        for _, module in modules
        if isinstance(module, FactorPair) and all(isinstance(p, kinds) for p in _parts(module))
    ]
    single = {id(pair) for pair in pairs}
    parts = {id(part) for pair in pairs for part in _parts(pair)}
    return [
        (path, module)
        for path, module in modules
        if id(module) in single or (isinstance(module, kinds) and id(module) not in parts)
    ]


def _is_packed(layer: Any) -> bool:
    """Whether a layer, or one of the two of a pair, is packed."""
    return any(isinstance(part, PackedLayer) for part in _parts(layer))


def _kernel_arrays(part: Any) -> list:
    """The arrays of a layer's kernel, which are several where it is packed."""
    names = ARRAY_NAMES if isinstance(part, PackedLayer) else ("kernel",)
    variables = [getattr(part, name) for name in names]
    return [variable.get_value() for variable in variables if variable is not None]


def _matrices(layer: Any) -> list[Matrix | jax.Array]:
    """The matrices [*stack, out, in] of a layer: one, or left and right of a pair."""
    return [
        part.matrix
        if isinstance(part, PackedLayer)
        else _kernel_axes(part).matrices(part.kernel.get_value())
        for part in _parts(layer)
    ]


def _parts(layer: Any) -> list:
    """The layers that a layer consists of: itself, or the two of a pair."""
    return [layer.left, layer.right] if isinstance(layer, FactorPair) else [layer]


def _pack_layer(
    layer: Layer | FactorPair, rule: Rule | None, path: str, convolutions: bool
) -> tuple[list[MackoMatrix | None], PackedLayerReport]:
    """Pack a layer in place, or leave it: the matrices of its parts, and what to report."""
    parts = _parts(layer)
    for part in parts:
        if isinstance(part.kernel.get_value(), jax.ShapeDtypeStruct):
            raise ValueError(
                f"The kernel of {path!r} is abstract; substitute packs concrete arrays. To load a "
                "packed checkpoint into an abstract model use from_pure_dict"
            )
    weights: Any = _matrices(layer)
    if isinstance(layer, FactorPair):
        left, right = weights
        *matrices, report = pack_pair(left, right, rule, path, "FactorPair")
    else:
        reason = _why_unsupported(layer)
        if isinstance(layer, nnx.Conv) and not convolutions:
            reason = "a packed convolution saves memory but no time; convolutions=True packs it"
        matrix, report = pack_weights(weights[0], rule, path, type(layer).__name__, reason)
        matrices = [matrix]
    for part, matrix in zip(parts, matrices):
        if matrix is not None:
            _become_packed(part, matrix)
    return matrices, report


def to_pure_dict(model: Any) -> dict:
    """The state of a model as nested dicts, packed kernels as MackoMatrix leaves.

    A packed layer has its kernel under the same name, "kernel", as the dense layer, as one
    MackoMatrix [out, in]; the two layers of a pair are called "left" and "right". This is what
    `macko_jax.save` takes and `from_pure_dict` reads.

    Args:
        model: an NNX model.

    Returns:
        Nested dicts with string and integer keys; leaves are arrays, MackoMatrix and ShardedMatrix.
    """
    tree = nnx.to_pure_dict(nnx.state(model))
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, PackedLayer):
            node = _node(tree, path)
            for name in ARRAY_NAMES:
                node.pop(name, None)
            node["kernel"] = layer.matrix
    return tree


def from_pure_dict(abstract_model: Model, tree: dict) -> Model:
    """Build a model from what `to_pure_dict` gave, without ever holding a dense kernel.

        abstract = nnx.eval_shape(lambda: MyModel(rngs=nnx.Rngs(0)))
        model = macko_jax.flax_nnx.from_pure_dict(abstract, macko_jax.load(path))

    Each layer becomes what the tree says it is: a packed one where its "kernel" is a MackoMatrix
    or a ShardedMatrix, a `FactorPair` where it has "left" and "right" in the place of a kernel.

    Args:
        abstract_model: the dense model as `nnx.eval_shape` gives it, which is left as it is.
        tree: nested dicts with the arrays of all its variables.

    Returns:
        The model with the arrays of the tree.

    Raises:
        ValueError: if the tree lacks variables or has a surplus of them, or if a shape, a dtype or
            the kind of a layer does not fit; the message names all of them.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"the variables of a model are nested dicts, and this tree is a {type(tree).__name__}"
        )
    model = nnx.clone(abstract_model)
    problems = []
    for path, layer in _layers(model):
        problems += _become_as_stored(layer, path, _node(tree, path))

    given = traverse_util.flatten_dict(tree)
    wanted = traverse_util.flatten_dict(to_pure_dict(model))
    problems += [f"{_join(path)}: missing in the tree" for path in wanted.keys() - given.keys()]
    problems += [f"{_join(path)}: not in the model" for path in given.keys() - wanted.keys()]
    dense = {}
    for path in wanted.keys() & given.keys():
        if isinstance(wanted[path], Matrix):
            continue
        dense[path] = given[path]
        found, expected = map(_describe, (given[path], wanted[path]))
        if found != expected and not any(line.startswith(_join(path)) for line in problems):
            problems.append(f"{_join(path)}: the tree has {found}, the model needs {expected}")
    if problems:
        raise ValueError(
            "The tree does not fit the model; build the model with the configuration that the "
            "tree was saved with:\n  " + "\n  ".join(sorted(problems))
        )
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(dense))
    nnx.update(model, state)
    return model


def _node(tree: Any, path: tuple) -> Any:
    """What a tree has at a path; None where it does not reach."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _become_as_stored(layer: Any, path: tuple, node: Any) -> list[str]:
    """Turn an abstract layer in place into what the tree has for it; what does not fit."""
    if not isinstance(node, Mapping) or _is_packed(layer):
        return []
    if {"left", "right"} <= node.keys() and not isinstance(layer, FactorPair):
        inner = _stored_inner(node["right"], getattr(layer, "feature_group_count", 1))
        reason = why_no_pair(layer)
        if reason or inner is None:
            reason = reason or "right/kernel is no matrix"
            return [f"{_join(path)}: is a pair of factors, but {reason}"]
        become(layer, abstract_pair(layer, inner))
    if isinstance(layer, FactorPair):
        return [
            problem
            for name in ("right", "left")
            for problem in _become_as_stored(getattr(layer, name), (*path, name), node.get(name))
        ]
    matrix = node.get("kernel")
    if not isinstance(matrix, Matrix):
        return []
    place = f"{_join(path)}/kernel"
    reason = _why_unsupported(layer)
    if isinstance(matrix, ShardedMatrix) and isinstance(layer, nnx.Conv):
        reason = reason or "in shards, on which an nnx.Conv does not run; load it without a mesh"
    if reason:
        return [f"{place}: is packed, but {reason}"]
    expected = _kernel_axes(layer).matrix_shape(layer.kernel.get_value().shape)
    found = (*matrix.stack, *matrix.shape)
    if found != expected:
        return [f"{place}: the matrix [out, in] has shape {found}, the model needs {expected}"]
    _become_packed(layer, matrix)
    return []


def _stored_inner(right: Any, groups: int) -> int | None:
    """The inner dimension of a pair, from what the tree has for its right factor."""
    kernel = _node(right, ("kernel",))
    if isinstance(kernel, Matrix):
        return kernel.shape[0] // groups
    return kernel.shape[-1] // groups if getattr(kernel, "ndim", 0) > 1 else None


def _kernel_axes(layer: Any) -> KernelAxes:
    """What the axes of the layer's kernel are."""
    contracted, outputs, order = 1, 1, None
    if isinstance(layer, nnx.LinearGeneral):
        contracted, outputs = len(layer.in_features), len(layer.out_features)
    elif isinstance(layer, nnx.Conv):
        contracted = len(layer.kernel_size) + 1
    elif isinstance(layer, nnx.Einsum) and why_no_contraction(layer.einsum_str) is None:
        found = Contraction.of(layer.einsum_str)
        contracted, outputs, order = len(found.summed), len(found.outputs), found.order
    stacked = max(layer.kernel.get_value().ndim - contracted - outputs, 0)
    return KernelAxes(contracted, stacked, order)


def _why_unsupported(layer: Any) -> str | None:
    """Why a packed layer cannot stand for the layer, None if it can."""
    if isinstance(layer, nnx.Einsum):
        return why_no_einsum(layer) or _why_not_stacked(layer, layer.kernel_shape)
    kinds = (nnx.LinearGeneral, nnx.LoRALinear, nnx.Linear, nnx.Conv)
    base = next(kind for kind in kinds if isinstance(layer, kind))
    if type(layer).__call__ is not base.__call__:
        return f"{type(layer).__name__} has a __call__ of its own"
    if isinstance(layer, nnx.Conv):
        return None if layer.mask is None else "it has a mask of its own"
    if getattr(layer, "batch_axis", None):
        return "it has batch axes"
    if getattr(layer, "dot_general_cls", None) or layer.dot_general not in (None, lax.dot_general):
        return "it has a dot_general of its own"
    if layer.preferred_element_type is not None:
        return "it sets preferred_element_type"
    return _why_not_stacked(layer, (*as_tuple(layer.in_features), *as_tuple(layer.out_features)))


def _why_not_stacked(layer: Any, own: Sequence[int]) -> str | None:
    """Why a kernel is no stack of kernels of the shape `own`, None if it is."""
    shape = layer.kernel.get_value().shape
    if shape[-len(own) :] != tuple(own):
        return f"its kernel {shape} does not end in {tuple(own)}; only leading axes can be stacked"
    return None


def _become_packed(layer: Any, matrix: Any) -> None:
    """Turn a layer into the packed one in place."""
    if isinstance(layer, nnx.Conv):
        become(layer, MackoConv(layer, matrix))
        return
    if isinstance(layer, nnx.Einsum):
        become(layer, MackoEinsum(layer, matrix))
        return
    packed = (MackoLoRALinear if isinstance(layer, nnx.LoRALinear) else MackoLinear)(
        matrix,
        layer.bias,
        in_features=layer.in_features,
        out_features=layer.out_features,
        axis=getattr(layer, "axis", -1),
        dtype=layer.dtype,
        promote_dtype=layer.promote_dtype,
    )
    if isinstance(packed, MackoLoRALinear):
        packed.lora = layer.lora
    become(layer, packed)


def become(module: nnx.Module, other: nnx.Module) -> None:
    """Turn a module in place into another one, whose variables it takes over.

    A new object would have to be put into every parent; the same object stays where it is, also
    in a tuple, in a cycle and where several parents share it.
    """
    vars(module).clear()
    vars(module).update(vars(other))
    module.__class__ = type(other)


def become_pair(layer: Any, left: jax.Array, right: jax.Array) -> None:
    """Turn a layer in place into a `FactorPair`, wherever and however often it is held.

    Args:
        layer: `nnx.Linear`, `LinearGeneral`, `Einsum` or `Conv`, or a stack of them.
        left: A, `[*stack, groups, out / groups, k]`.
        right: B, `[*stack, groups, k, in]`.
    """
    pair = abstract_pair(layer, left.shape[-1])
    for factor, matrix in zip((pair.left, pair.right), map(join_groups, (left, right))):
        wanted = factor.kernel.get_value()
        matrix = matrix.swapaxes(-1, -2).reshape(wanted.shape)
        factor.kernel = nnx.Param(matrix.astype(wanted.dtype))
    become(layer, pair)


def _copy(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Matrix):
        return f"a packed matrix {leaf.shape}"
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)


def _join(path: tuple) -> str:
    return "/".join(map(str, path))
