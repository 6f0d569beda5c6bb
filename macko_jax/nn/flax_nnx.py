"""Flax NNX models on MACKO matrices: substitution of linear layers, and packed checkpoints."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax import lax

from macko_jax.format.matrix import MackoMatrix
from macko_jax.nn.projection import matrix_shape, pack_kernel, project
from macko_jax.nn.report import PackingReport
from macko_jax.nn.rules import Rules, assign_rules
from macko_jax.ops.fused import Step, fused_chain, in_turn

Model = TypeVar("Model")
Layer = nnx.Linear | nnx.LinearGeneral | nnx.Einsum

INDEX_NAMES = ("codes", "row_offsets", "starts")
ARRAY_NAMES = ("values", *INDEX_NAMES, "scales")


class MackoIndex(nnx.Variable):
    """Integers, and 8-bit values, of a MackoLinear; no gradient and no optimizer touches them."""


class MackoLinear(nnx.Module):
    """A linear layer whose kernel is a MACKO matrix.

    It computes y = x W^T + b as the `nnx.Linear` or `nnx.LinearGeneral` that it replaces, with the
    same promotion of dtypes; sums are accumulated in float32 whatever the layer's `precision`.
    `values` is an `nnx.Param`: `nnx.grad` differentiates it and `nnx.Optimizer` updates it, and
    since there is no entry for a zero, the pattern of non-zeros stays as it is. 8-bit values are
    fixed, and their `scales` are the `nnx.Param`. The other arrays are `MackoIndex` variables. In a
    vmapped or scanned stack all of them have the stack's leading axes, so a `nnx.StateAxes` that
    names `nnx.Param` has to name `MackoIndex` as well.

    Args:
        matrix: [out, in], the product of the output by the product of the input features.
        bias: [*out_features], an `nnx.Param` that the layer takes over, or None.
        in_features: int, or a tuple for several contracted axes.
        out_features: int, or a tuple for several output axes.
        axis: the contracted axes of the input.
        dtype: dtype of the computation, None to promote that of input, values and bias.
        promote_dtype: as in `nnx.Linear`.
    """

    def __init__(
        self,
        matrix: MackoMatrix,
        bias: nnx.Param | None = None,
        *,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        axis: int | tuple[int, ...] = -1,
        dtype: Any = None,
        promote_dtype=nnx.nn.dtypes.promote_dtype,
    ):
        expected = (math.prod(_as_tuple(out_features)), math.prod(_as_tuple(in_features)))
        if matrix.shape != expected:
            raise ValueError(
                f"The matrix has shape {matrix.shape}; a layer from {in_features} to "
                f"{out_features} features needs [out, in] = {expected}"
            )
        scaled = matrix.scales is not None
        self.values = (MackoIndex if scaled else nnx.Param)(matrix.values)
        self.scales = nnx.data(nnx.Param(matrix.scales) if scaled else None)
        self.codes = MackoIndex(matrix.codes)
        self.row_offsets = MackoIndex(matrix.row_offsets)
        self.starts = MackoIndex(matrix.starts)
        self.bias = nnx.data(bias)
        self.shape = matrix.shape
        self.encoding = matrix.encoding
        self.lanes = matrix.lanes
        self.in_features = in_features
        self.out_features = out_features
        self.axis = axis
        self.dtype = dtype
        self.promote_dtype = promote_dtype

    @property
    def matrix(self) -> MackoMatrix:
        """The kernel's transpose, [out, in]."""
        return MackoMatrix(
            self.values[...],
            *(getattr(self, name)[...] for name in INDEX_NAMES),
            shape=self.shape,
            encoding=self.encoding,
            lanes=self.lanes,
            scales=None if self.scales is None else self.scales[...],
        )

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Multiply by the kernel and add the bias.

        Args:
            inputs: array whose axes `axis` hold the input features, by default the last one.
            out_sharding: only None; accepted for the sake of callers written for `nnx.Linear`.

        Returns:
            [*other axes of inputs, *out_features].
        """
        if out_sharding is not None:
            raise ValueError(
                f"out_sharding={out_sharding} was given to a packed layer, which supports None "
                "only; leave this layer dense with a rule, Rule(path, skip=True)"
            )
        return self.fused(inputs)

    def fused(
        self,
        inputs: jax.Array,
        *,
        norm: tuple[jax.Array, float] | None = None,
        gated: bool = False,
        add: jax.Array | None = None,
    ) -> jax.Array:
        """add + what the layer makes of f(inputs); on a GPU one kernel, where there is one token.

        Args:
            inputs: as the layer takes them; where `gated`, twice as wide.
            norm: (scale, eps), f divides by the root mean square and multiplies by the scale.
            gated: f(gate, x) = silu(gate) * x, of the two halves of the inputs.
            add: of the shape of the result, such as the residual stream.

        Returns:
            [*other axes of inputs, *out_features]; see `macko_jax.experimental.fused_spmv`.
        """
        return project(
            self.matrix,
            inputs,
            None if self.bias is None else self.bias[...],
            axis=self.axis,
            out_features=self.out_features,
            promote=lambda arrays: self.promote_dtype(arrays, dtype=self.dtype),
            norm=norm,
            gated=gated,
            add=add,
        )


def chain(
    x: jax.Array, steps: Sequence[Step], *, blank: jax.Array | None = None
) -> list[jax.Array]:
    """Layers of which each takes the result of the one before; see `experimental.fused_chain`.

    Two chains at once on one GPU can wait for each other for ever: `macko_jax.experimental`.

    Layers of another type than x, that contract other axes than the last, or that add something to
    a bias, make it a kernel for each layer.

    Args:
        x: the first layer's inputs.
        steps: `macko_jax.experimental.Step`s of `MackoLinear`s.
        blank: see `macko_jax.experimental.fused_chain`.

    Returns:
        The results of the steps that are `kept`, and of the last.
    """
    products = [_matrix_step(step, x.dtype) for step in steps]
    if None not in products:
        return fused_chain(x, products, blank=blank)
    return in_turn(
        x,
        steps,
        lambda x, step: step.linear.fused(x, norm=step.norm, gated=step.gated, add=step.add),
    )


def _matrix_step(step: Step, dtype) -> Step | None:
    """The step with its layer's matrix, for inputs of a dtype; None if the layer is more."""
    layer = step.linear
    kind = layer.matrix.dtype
    alike = jnp.dtype(dtype) == kind == jnp.dtype(layer.dtype or dtype)
    simple = isinstance(layer.in_features, int) and isinstance(layer.out_features, int)
    if not (alike and simple and layer.axis in (-1, (-1,))):
        return None
    if layer.bias is not None:
        if step.add is not None or layer.bias.dtype != kind:
            return None
        step = step._replace(add=layer.bias[...])
    return step._replace(linear=layer.matrix)


def substitute(model: Model, rules: Rules = None) -> tuple[Model, PackingReport]:
    """Put a `MackoLinear` in the place of each sparse linear layer of a model.

    `nnx.Linear` and `nnx.LinearGeneral` are packed wherever they are: as attributes, in lists,
    dicts, tuples and Sequential, in vmapped or scanned stacks (kernels with leading axes), shared
    between several parents (and then shared again), or as the model itself. The report names the
    layers that stay dense and why: one that no rule matches, whose density is at least the
    rule's `max_density`, or that does something MackoLinear does not (a subclass with a
    `__call__` of its own, batch axes, a custom `dot_general`, `nnx.Einsum`).

    Args:
        model: any NNX model, or a pytree of modules, with concrete arrays. It is left as it is.
        rules: the `Rule`s, or regular expressions, that say which layers are packed and how; the
            first one that matches the whole path of a layer applies. None packs every layer
            below the break-even density.

    Returns:
        A copy of the model that shares no variable and no array with it, and the report.

    Raises:
        ValueError: if a rule matches no layer, or if the model is abstract.
    """
    # The copy's variables are new, its arrays are still the old ones: no dense kernel is copied.
    model = nnx.clone(model)
    layers = {_join(path): layer for path, layer in _linear_layers(model)}
    assigned = assign_rules(rules, layers)
    reports, accounted, fresh = [], set(), set()
    for path, layer in layers.items():
        kernel = layer.kernel.get_value()
        if isinstance(kernel, jax.ShapeDtypeStruct):
            raise ValueError(
                f"The kernel of {path!r} is abstract; substitute packs concrete arrays. To load a "
                "packed checkpoint into an abstract model use from_pure_dict"
            )
        matrix, report = pack_kernel(
            kernel,
            *_kernel_axes(layer),
            assigned[path],
            path,
            type(layer).__name__,
            unsupported=_why_unsupported(layer),
        )
        reports.append(report)
        if matrix is None:
            accounted.add(id(kernel))
        else:
            fresh.update(map(id, jax.tree.leaves(matrix)))
            _become_packed(layer, matrix)

    state = nnx.state(model)
    other = [a for a in jax.tree.leaves(state) if id(a) not in accounted | fresh]
    nnx.update(model, jax.tree.map(lambda a: a if id(a) in fresh else _copy(a), state))
    return model, PackingReport(tuple(reports), sum(getattr(a, "nbytes", 0) for a in other))


def to_pure_dict(model: Any) -> dict:
    """The state of a model as nested dicts, packed kernels as MackoMatrix leaves.

    A packed layer has its kernel under the same name, "kernel", as the dense layer, as one
    MackoMatrix [out, in]. This is what `macko_jax.save` takes and `from_pure_dict` reads.

    Args:
        model: an NNX model.

    Returns:
        Nested dicts with string and integer keys; leaves are arrays and MackoMatrix.
    """
    tree = nnx.to_pure_dict(nnx.state(model))
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, MackoLinear):
            node = functools.reduce(operator.getitem, path, tree)
            for name in ARRAY_NAMES:
                node.pop(name, None)
            node["kernel"] = layer.matrix
    return tree


def from_pure_dict(abstract_model: Model, tree: dict) -> Model:
    """Build a model from what `to_pure_dict` gave, without ever holding a dense kernel.

        abstract = nnx.eval_shape(lambda: MyModel(rngs=nnx.Rngs(0)))
        model = macko_jax.flax_nnx.from_pure_dict(abstract, macko_jax.load(path))

    Args:
        abstract_model: the dense model as `nnx.eval_shape` gives it, which is left as it is. Its
            linear layers become `MackoLinear` where the tree has a MackoMatrix as their "kernel".
        tree: nested dicts with the arrays of all its variables.

    Returns:
        The model with the arrays of the tree.

    Raises:
        ValueError: if the tree lacks variables or has a surplus of them, or if a shape, a dtype or
            the kind of a layer does not fit; the message names all of them.
    """
    model = nnx.clone(abstract_model)
    given = traverse_util.flatten_dict(tree)
    problems = []
    for path, layer in list(_linear_layers(model)):
        matrix = given.get((*path, "kernel"))
        if not isinstance(matrix, MackoMatrix):
            continue
        expected = matrix_shape(layer.kernel.get_value(), *_kernel_axes(layer))
        found = (*matrix.row_offsets.shape[:-1], *matrix.shape)
        if reason := _why_unsupported(layer):
            problems.append(f"{_join(path)}/kernel: is packed, but {reason}")
        elif found != expected:
            problems.append(
                f"{_join(path)}/kernel: the matrix [out, in] has shape {found}, the "
                f"model needs {expected}"
            )
        else:
            _become_packed(layer, matrix)

    wanted = traverse_util.flatten_dict(to_pure_dict(model))
    problems += [f"{_join(path)}: missing in the tree" for path in wanted.keys() - given.keys()]
    problems += [f"{_join(path)}: not in the model" for path in given.keys() - wanted.keys()]
    dense = {}
    for path in wanted.keys() & given.keys():
        if isinstance(wanted[path], MackoMatrix):
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


def _linear_layers(model: Any) -> Iterator[tuple[tuple, Layer]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Layer):
            yield path, module


def _kernel_axes(layer: Layer) -> tuple[int, int]:
    """How many axes of the layer's kernel are contracted, and how many belong to a stack."""
    if isinstance(layer, nnx.LinearGeneral):
        contracted, outputs = len(layer.in_features), len(layer.out_features)
    else:
        contracted, outputs = 1, 1
    return contracted, max(layer.kernel.get_value().ndim - contracted - outputs, 0)


def _why_unsupported(layer: Layer) -> str | None:
    """Why MackoLinear cannot stand for the layer, None if it can."""
    if isinstance(layer, nnx.Einsum):
        return "Einsum has no packed form"
    base = nnx.LinearGeneral if isinstance(layer, nnx.LinearGeneral) else nnx.Linear
    if type(layer).__call__ is not base.__call__:
        return f"{type(layer).__name__} has a __call__ of its own"
    if getattr(layer, "batch_axis", None):
        return "it has batch axes"
    if getattr(layer, "dot_general_cls", None) or layer.dot_general not in (None, lax.dot_general):
        return "it has a dot_general of its own"
    if layer.preferred_element_type is not None:
        return "it sets preferred_element_type"
    features = (*_as_tuple(layer.in_features), *_as_tuple(layer.out_features))
    shape = layer.kernel.get_value().shape
    if shape[-len(features) :] != features:
        return f"its kernel {shape} does not end in {features}; only leading axes can be stacked"
    return None


def _become_packed(layer: Layer, matrix: MackoMatrix) -> None:
    """Turn a layer into a MackoLinear in place.

    A new object would have to be put into every parent; the same object stays where it is, also
    in a tuple, in a cycle and where several parents share it.
    """
    packed = MackoLinear(
        matrix,
        layer.bias,
        in_features=layer.in_features,
        out_features=layer.out_features,
        axis=getattr(layer, "axis", -1),
        dtype=layer.dtype,
        promote_dtype=layer.promote_dtype,
    )
    vars(layer).clear()
    vars(layer).update(vars(packed))
    layer.__class__ = MackoLinear


def _copy(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _describe(leaf: Any) -> str:
    if isinstance(leaf, MackoMatrix):
        return f"a packed matrix {leaf.shape}"
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)


def _as_tuple(features: int | tuple[int, ...]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


def _join(path: tuple) -> str:
    return "/".join(map(str, path))
