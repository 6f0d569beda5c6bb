"""A traced forward pass as one flat list of operations, and the layers found in it.

A layer, here, is a product of an activation with a matrix that is a view (slice, transpose,
reshape, cast) of one parameter: Linear, Dense, DenseGeneral, Einsum, attention projections,
convolutions, expert stacks, and whatever a user writes with `jnp.einsum` on a parameter. Reading
layers off the trace needs no hook in the model, and shows exactly which layer's weights can
change which other layer's inputs; `stages` runs the pass in pieces along those lines.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax.trace import jaxprs
from dsf_jax.trace.batches import Batch
from dsf_jax.trace.im2col import Convolution, matmul_matrix
from dsf_jax.trace.network import Network
from macko_jax.nn.report import is_matrix

# A scan over stacked layers is unrolled, so that each slice of the stack is a layer of its own.
MAX_UNROLL = 256

# What an operation does to a parameter whose product is then not followed.
OBSTACLES = {
    "concatenate": "joined with other arrays",
    "gather": "gathered: its entries are picked by an index",
    "dynamic_slice": "gathered: a slice is picked by an index",
    "mul": "scaled or masked",
    "div": "scaled or masked",
    "add": "added to something",
    "sub": "added to something",
    "pad": "padded",
    "broadcast_in_dim": "repeated",
    "ragged_dot": "multiplied in groups (ragged_dot)",
    "ragged_dot_general": "multiplied in groups (ragged_dot)",
}


class Op(NamedTuple):
    """One operation on values, which have integers for names.

    Attributes:
      kind: Name of the primitive, or "index" and "stack" of an unrolled scan.
      run: `run(*values)` gives the list of its outputs.
      inputs: Names of the values that it reads.
      outputs: Names of the values that it gives.
    """

    kind: str
    run: Callable[..., list[jax.Array]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class View(NamedTuple):
    """A value that is a rearranged part of a parameter.

    Attributes:
      leaf: Index of the parameter among the model's leaves.
      steps: How the part is cut out and turned: each a key, equal for equal steps, and a function.
    """

    leaf: int
    steps: tuple[tuple[str, Callable[[Any], Any]], ...] = ()

    def then(self, key: str, run: Callable[[Any], Any]) -> "View":
        """The view of this view that one more step gives."""
        return View(self.leaf, (*self.steps, (key, run)))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the steps: equal keys of one leaf mean equal views."""
        return tuple(key for key, _ in self.steps)

    def read(self, leaf: Any) -> Any:
        """The value, from the parameter."""
        for _, run in self.steps:
            leaf = run(leaf)
        return leaf


class Use(NamedTuple):
    """One place where a layer is applied.

    Attributes:
      activation: Name of the value the layer reads.
      rows: Turns that value into the matrix's input vectors, `[groups, n, in]`.
      key: Hashable description of `rows`: equal keys mean equal Gram matrices.
      output: Name of the product.
      free: Sizes of the axes of those vectors, whose product is n.
    """

    activation: int
    rows: Callable
    key: tuple
    output: int
    free: tuple[int, ...]


@dataclasses.dataclass
class Layer:
    """A parameter, or slice of a stacked one, seen as `groups` matrices `[out, in]`.

    Attributes:
      path: Module path, such as "layers/0/attention/qkv"; "[i]" is appended for slice i of
        parameters stacked for a scan.
      leaf: Index of the parameter among the model's leaves.
      kind: "linear", "conv" or "embedding".
      groups: Groups of a grouped convolution, or experts of a stack; 1 for other layers.
      rows: Outputs of each matrix.
      cols: Inputs of each matrix.
      view: The matrices `[groups, out, in]` as a view of the parameter.
      uses: Where it is applied, in order; an embedding may have none (look-ups only).
      lookups: Names of values looked up in it (embeddings).
      gives_output: Whether an output of the model is what this layer alone makes, up to operations
        without a product: the layer is a head.
    """

    path: str
    leaf: int
    kind: str
    groups: int
    rows: int
    cols: int
    view: View
    uses: list[Use] = dataclasses.field(default_factory=list)
    lookups: list[int] = dataclasses.field(default_factory=list)
    gives_output: bool = False

    @property
    def size(self) -> int:
        """Entries of its matrices."""
        return self.groups * self.rows * self.cols

    @property
    def stack(self) -> tuple[int, ...]:
        """Which slice of a stacked parameter it is; () where the parameter is not stacked."""
        return tuple(int(key[1:-1]) for key in self.view.keys if key.startswith("["))

    def read(self, leaf: jax.Array) -> jax.Array:
        """The matrices `[groups, out, in]` held by the parameter."""
        return self.view.read(leaf)

    def write(self, leaf: jax.Array, matrices: jax.Array) -> jax.Array:
        """The parameter with its matrices replaced; entries outside the view stay."""
        # A view picks entries, each once, so that its transpose puts them back.
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        put = jax.linear_transpose(self.view.read, shape)
        (inside,) = put(jnp.ones(matrices.shape, leaf.dtype))
        (new,) = put(matrices.astype(leaf.dtype))
        return jnp.where(inside > 0, new, leaf)


@dataclasses.dataclass
class Dataflow:
    """A forward pass: operations in order, with the layers among them.

    Attributes:
      ops: Operations in a valid order.
      batch: Names of the batch's arrays.
      token_weights: Name of the weights of the batch's tokens; None where all count alike.
      leaves: Names of the model's leaves.
      constants: Arrays that the trace closed over, by name.
      shapes: Shape and dtype of every value, by name.
      layers: The layers, in order of first application.
      views: Values that are views of a parameter, recomputed wherever they are needed.
      notes: For each parameter with two axes or more that has no layer: the reason.
    """

    ops: list[Op] = dataclasses.field(default_factory=list)
    batch: list[int] = dataclasses.field(default_factory=list)
    token_weights: int | None = None
    leaves: list[int] = dataclasses.field(default_factory=list)
    constants: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    shapes: list[jax.ShapeDtypeStruct] = dataclasses.field(default_factory=list)
    layers: list[Layer] = dataclasses.field(default_factory=list)
    views: dict[int, View] = dataclasses.field(default_factory=dict)
    notes: dict[int, str] = dataclasses.field(default_factory=dict)

    def add_token_weights(self, weights: Any) -> None:
        """Names the weights of the batch's tokens, which no operation of the pass reads."""
        self.token_weights = len(self.shapes)
        self.shapes.append(jax.ShapeDtypeStruct(weights.shape, weights.dtype))


def trace(network: Network, batch: Any) -> Dataflow:
    """Traces the forward pass of a network on a batch and finds its layers.

    Args:
      network: The model.
      batch: A pytree of arrays and of what stays fixed, or a `Batch`; of arrays only shapes and
        dtypes matter.

    Returns:
      The `Dataflow`.
    """
    batch = batch if isinstance(batch, Batch) else Batch.of(batch)

    def apply(leaves, arrays):
        return network.apply(leaves, batch.fill(arrays))

    closed = jax.make_jaxpr(apply)(network.leaves, batch.arrays)
    flow = _Tracer(network, closed, len(network.leaves)).flow
    if batch.token_weights is not None:
        flow.add_token_weights(batch.token_weights)
    return flow


def _why_unfit(parameter: jax.ShapeDtypeStruct) -> str | None:
    """Why a parameter is no matrix that a method could solve; None if it is one."""
    if not jnp.issubdtype(parameter.dtype, jnp.floating):
        return f"{parameter.dtype} numbers; only real ones are compressed"
    return "empty" if 0 in parameter.shape else None


class _Tracer:
    """Flattens a program into a `Dataflow`."""

    def __init__(self, network: Network, closed: Any, leaves: int):
        self.flow = Dataflow()
        self.network = network
        self.found: dict[tuple, Layer] = {}
        self.obstacles: dict[int, str] = {}
        names = [self.name(v.aval) for v in closed.jaxpr.invars]
        self.flow.leaves, self.flow.batch = names[:leaves], names[leaves:]
        for i, name in enumerate(self.flow.leaves):
            if network.roles[i] == "parameter" and _why_unfit(self.flow.shapes[name]) is None:
                self.flow.views[name] = View(i)
        constants = [self.constant(c) for c in closed.consts]
        outputs = self.flatten(closed.jaxpr, constants, names)
        self.settle_overlaps()
        self.find_heads(outputs)
        self.explain_rest()

    def name(self, aval: Any) -> int:
        self.flow.shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(self.flow.shapes) - 1

    def constant(self, value: Any) -> int:
        value = jnp.asarray(value)
        name = self.name(value)
        self.flow.constants[name] = value
        return name

    def op(
        self, kind: str, run: Callable, inputs: Sequence[int], avals: Iterable
    ) -> tuple[int, ...]:
        outputs = tuple(self.name(aval) for aval in avals)
        self.flow.ops.append(Op(kind, run, tuple(inputs), outputs))
        return outputs

    def flatten(self, jaxpr: Any, constants: Sequence[int], arguments: Sequence[int]) -> list[int]:
        """Adds the operations of `jaxpr` applied to named values; returns its outputs' names."""
        names = dict(zip(jaxpr.constvars, constants)) | dict(zip(jaxpr.invars, arguments))

        def read(atom):
            return self.constant(atom.val) if isinstance(atom, jaxprs.Literal) else names[atom]

        for eqn in jaxpr.eqns:
            kind, inputs = eqn.primitive.name, [read(atom) for atom in eqn.invars]
            inner = jaxprs.called_program(eqn)
            if inner is not None:
                outputs = self.call(inner, inputs)
            elif kind == "scan" and self.is_layer_stack(eqn, inputs):
                outputs = self.unroll(eqn, inputs)
            else:
                outputs = self.apply(eqn, inputs)
            names.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def call(self, inner: Any, inputs: Sequence[int]) -> list[int]:
        jaxpr = getattr(inner, "jaxpr", inner)  # closed or not
        return self.flatten(jaxpr, [self.constant(c) for c in getattr(inner, "consts", ())], inputs)

    def apply(self, eqn: Any, inputs: list[int]) -> tuple[int, ...]:
        run = functools.partial(jaxprs.bind, eqn)
        kind, views = eqn.primitive.name, self.flow.views
        outputs = self.op(kind, run, inputs, [v.aval for v in eqn.outvars])
        view = views.get(inputs[0]) if inputs else None
        if kind in jaxprs.PRODUCTS:
            self.add_product(eqn, inputs, outputs[0])
        elif kind == "gather" and view and len(self.flow.shapes[inputs[0]].shape) == 2:
            self.add_lookup(inputs[0], outputs[0])
        elif view and kind in jaxprs.CASTS:
            views[outputs[0]] = view
        elif view and kind in jaxprs.VIEWS and jaxprs.picks_entries(eqn):
            key = f"{kind}{sorted(eqn.params.items(), key=lambda item: item[0])}"
            for i, output in enumerate(outputs):
                views[output] = view.then(f"{key}#{i}", lambda x, i=i: run(x)[i])
        elif jaxprs.programs(eqn):
            self.note_hidden(eqn, inputs)
        else:
            for name in inputs:
                if name in views:
                    self.obstacles.setdefault(views[name].leaf, kind)
        return outputs

    def note_hidden(self, eqn: Any, inputs: Iterable[int]) -> None:
        for name in inputs:
            view = self.flow.views.get(name)
            if view and len(self.flow.shapes[name].shape) > 1:
                self.flow.notes.setdefault(
                    view.leaf, f"used inside a {eqn.primitive.name}, which cannot be looked into"
                )

    def is_layer_stack(self, eqn: Any, inputs: Iterable[int]) -> bool:
        matrices = [
            name
            for name in inputs
            if name in self.flow.views and len(self.flow.shapes[name].shape) > 1
        ]
        return (
            bool(matrices)
            and eqn.params["length"] <= MAX_UNROLL
            and jaxprs.holds_product(eqn.params["jaxpr"])
        )

    def unroll(self, eqn: Any, inputs: list[int]) -> list[int]:
        params = eqn.params
        consts, carries = jaxprs.scan_layout(params)
        fixed, carry = inputs[:consts], list(inputs[consts : consts + carries])
        stacked = inputs[consts + carries :]
        steps = range(params["length"])
        collected = {}
        for step in reversed(steps) if params["reverse"] else steps:
            slices = [self.index(name, step) for name in stacked]
            outputs = self.call(params["jaxpr"], [*fixed, *carry, *slices])
            carry, collected[step] = list(outputs[:carries]), outputs[carries:]
        results = list(carry)
        for i, var in enumerate(eqn.outvars[carries:]):
            parts = [collected[step][i] for step in steps]
            results += self.op("stack", lambda *parts: [jnp.stack(parts)], parts, [var.aval])
        return results

    def index(self, name: int, step: int) -> int:
        shape = self.flow.shapes[name]
        aval = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
        (output,) = self.op("index", lambda x: [x[step]], [name], [aval])
        view = self.flow.views.get(name)
        if view:
            self.flow.views[output] = view.then(f"[{step}]", lambda x: x[step])
        return output

    def add_product(self, eqn: Any, inputs: list[int], output: int) -> None:
        views = [self.flow.views.get(name) for name in inputs]
        parameters = [view for view in views if view is not None]
        if len(parameters) != 1:
            for view in parameters:
                self.flow.notes.setdefault(view.leaf, "multiplied with another parameter")
            return
        (view,) = parameters
        side = views.index(view)
        activation = inputs[1 - side]
        shape = self.flow.shapes[activation].shape
        if eqn.primitive.name == "dot_general":
            kind = "linear"
            contract, batch = eqn.params["dimension_numbers"]
            # In the kernel's order, whichever order the product names its dimensions in.
            pairs = sorted(zip(contract[side], contract[1 - side]))
            kernel_dims = (tuple(k for k, _ in pairs), tuple(batch[side]))
            input_dims = (tuple(x for _, x in pairs), tuple(batch[1 - side]))
            matrix = functools.partial(matmul_matrix, dims=kernel_dims)
            rows = functools.partial(matmul_matrix, dims=input_dims)
            key = (activation, "linear", input_dims)
            summed = (*input_dims[0], *input_dims[1])
            free = tuple(size for axis, size in enumerate(shape) if axis not in summed)
            layout = f"matmul{kernel_dims}"
        else:
            kind = "conv"
            geometry = Convolution.of(eqn, self.flow.shapes[inputs[1]].shape)
            if side == 0 or eqn.params["batch_group_count"] != 1:
                self.flow.notes.setdefault(view.leaf, "the input of a convolution, not its kernel")
                return
            matrix, rows = geometry.matrix, geometry.rows
            key = (activation, "conv", geometry)
            free = geometry.free(shape)
            layout = f"conv{geometry.kernel_spec, geometry.groups}"
        layer = self.layer(view.then(layout, matrix), kind)
        if layer is not None:
            layer.uses.append(Use(activation, rows, key, output, free))

    def add_lookup(self, name: int, output: int) -> None:
        view = self.flow.views[name].then("matmul((1,), ())", lambda x: x[None])
        layer = self.layer(view, "embedding")
        if layer is not None:
            layer.kind = "embedding"
            layer.lookups.append(output)

    def layer(self, view: View, kind: str) -> Layer | None:
        """The layer of a view of a parameter; None where it is no matrix."""
        key = (view.leaf, view.keys)
        if key not in self.found:
            leaf = self.flow.shapes[self.flow.leaves[view.leaf]]
            if len(leaf.shape) < 2:
                return None
            groups, rows, cols = jax.eval_shape(view.read, leaf).shape
            if cols < 2:
                self.flow.notes.setdefault(view.leaf, "too small: its matrix has one input")
                return None
            layer = Layer("", view.leaf, kind, groups, rows, cols, view)
            stack = "".join(f"[{i}]" for i in layer.stack)
            layer.path = self.network.module_path(view.leaf) + stack
            self.found[key] = layer
            self.flow.layers.append(layer)
        return self.found[key]

    def settle_overlaps(self) -> None:
        """Names the parts of a parameter that is used in pieces, drops clashing views of one."""
        by_leaf = {}
        for layer in self.flow.layers:
            by_leaf.setdefault((layer.leaf, layer.path), []).append(layer)
        dropped = set()
        for (leaf, path), layers in by_leaf.items():
            if len(layers) == 1:
                continue
            shape = self.flow.shapes[self.flow.leaves[leaf]].shape
            positions = np.arange(math.prod(shape)).reshape(shape)
            parts = [np.asarray(layer.read(positions)).ravel() for layer in layers]
            if len(np.unique(np.concatenate(parts))) < sum(part.size for part in parts):
                dropped.update(id(layer) for layer in layers)
                self.flow.notes[leaf] = (
                    "an embedding, tied to the head"
                    if any(layer.kind == "embedding" for layer in layers)
                    else "used in several ways (as a matrix and as its transpose?)"
                )
            else:
                for i, layer in enumerate(layers):
                    layer.path = f"{path}#{i}"
        self.flow.layers = [layer for layer in self.flow.layers if id(layer) not in dropped]

    def find_heads(self, outputs: Iterable[int]) -> None:
        """Marks the layers that make an output of the model alone."""
        layers = {use.output: layer for layer in self.flow.layers for use in layer.uses}
        operations = {name: op for op in self.flow.ops for name in op.outputs}
        looked_up = {name for layer in self.flow.layers for name in layer.lookups}
        for output in set(outputs):
            makers: dict[int, Layer | None] = {}
            pending, seen = [output], set()
            while pending:
                name = pending.pop()
                op = operations.get(name)
                if name in seen or name in self.flow.views or op is None:
                    continue
                seen.add(name)
                if name in layers:
                    makers[id(layers[name])] = layers[name]
                elif name in looked_up or op.kind in jaxprs.PRODUCTS or op.kind in jaxprs.LOOPS:
                    makers[name] = None  # made by something that is no layer
                else:
                    pending += op.inputs
            if len(makers) == 1 and (head := next(iter(makers.values()))) is not None:
                head.gives_output = True

    def explain_rest(self) -> None:
        """Notes why each parameter with two axes or more that has no layer has none."""
        with_layers = {layer.leaf for layer in self.flow.layers}
        for leaf, name in enumerate(self.flow.leaves):
            shape, role = self.flow.shapes[name], self.network.roles[leaf]
            matrix = is_matrix(self.network.paths[leaf][-1], shape)
            if leaf in with_layers or not matrix or role == "state":
                continue
            if role == "other":
                reason = "no parameter: an nnx.Variable that is no nnx.Param, or not in 'params'"
            elif reason := _why_unfit(shape):
                pass
            elif leaf in self.obstacles:
                kind = self.obstacles[leaf]
                what = OBSTACLES.get(kind, f"an operand of {kind!r}")
                reason = f"{what} before any product, or in place of one"
            else:
                reason = "not reached by the forward pass"
            self.flow.notes.setdefault(leaf, reason)
