"""Gram matrices of the inputs of a Flax model's layers, streamed over calibration batches.

G = sum x x^T over every input vector x of a layer: the second moment that decides how much an
error in the layer's weights costs at its output. The model is not edited, and each batch's Gram
matrices are computed inside the compiled forward pass, where its activations live and die.
"""

import functools
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.problem import is_finite
from dsf_jax.trace.batches import Batch, TokenWeights, Weighing, read_batches
from dsf_jax.trace.dataflow import Dataflow, Layer, Use, trace
from dsf_jax.trace.jaxprs import Device
from dsf_jax.trace.network import Network, read_network
from dsf_jax.trace.retention import values_to_keep
from dsf_jax.trace.stages import Segment, Stages


def gram_matrices(
    model: nnx.Module | nn.Module,
    batches: Iterable[Any],
    *,
    variables: Any = None,
    rngs: Any = None,
    forward: Callable | None = None,
    token_weights: TokenWeights = None,
    layers: str = ".*",
) -> dict[str, jax.Array]:
    """Gram matrices of the inputs of a model's layers.

    Covers every product of an activation with a parameter: `nnx.Linear`, `LinearGeneral`,
    `Einsum`, `Conv` (its im2col patches, ordered [window, channel]), `MultiHeadAttention`, the
    linen layers `Dense`, `DenseGeneral`, `Einsum`, `Conv`, and products that a model writes
    itself. Layers stacked for a scan are seen slice by slice, as "path[i]".

    Args:
      model: An `nnx.Module`, run in evaluation mode, or a linen module with `variables`.
      batches: Inputs, as for `compress_model`; the pass is compiled once per shape.
      variables: Variables of a linen module.
      rngs: Random keys of a linen module that draws numbers, by name.
      forward: `forward(model, batch)`; default `model(batch)`, `model(*batch)` for a tuple,
        `model(**batch)` for a dict.
      token_weights: Where each batch has the weights of its tokens, as for `compress_model`: G is
        then sum w x x^T.
      layers: Regular expression for whole module paths; the default takes all.

    Returns:
      For each module path, float32 `[in, in]`; `[groups, in, in]` for grouped convolutions and
      stacks of experts.

    Raises:
      TypeError: The model is neither an NNX nor a linen module.
      ValueError: There are no batches, no layer matches, token weights fit no layer, or an
        activation is NaN or infinite.
    """
    network = read_network(model, variables, forward, rngs)
    dense = CalibrationPass(network, read_batches(batches, token_weights))
    paths = [layer.path for layer in dense.layers if layer.uses]
    chosen = [path for path in paths if re.fullmatch(layers, path)]
    if not chosen:
        raise ValueError(f"no layer matches {layers!r}; the paths are\n  " + "\n  ".join(paths))
    grams = dense.grams(chosen, network.leaves)
    return {path: gram[0] if len(gram) == 1 else gram for path, gram in grams.items()}


class CalibrationPass:
    """The forward pass of a model over its calibration batches, which can be halted.

    The pass of each batch is halted before a stage of layers, whose Gram matrices are then
    computed from the values at hand, and continued with new weights: every operation runs once,
    however many stages there are. What is kept between is what later operations still read, or the
    smaller values that light operations make it of (`retention`), which run again.

    Args:
      network: The model.
      batches: Pytrees of arrays and of what stays fixed, or what `read_batches` made of them.
      keep: Where values wait between stages: "device", "host", or "nowhere" to start every stage
        from the batch itself, which takes one pass per stage.
      devices: Batches are dealt out to these in turn; Gram matrices are added up in the order of
        the batches on the first, so that the result does not depend on their number.

    Attributes:
      layers: The model's layers, in order of first application.
      notes: As in `Dataflow`.
      remarks: For each layer in whose inputs the tokens' weights do not tell tokens apart, by its
        path, what counts there.
    """

    def __init__(
        self,
        network: Network,
        batches: Sequence[Any],
        keep: str = "device",
        devices: Sequence[Device] = (),
    ):
        self.network, self.keep = network, keep
        self.devices = list(devices or jax.devices()[:1])
        read = read_batches(batches)
        self.shapes = [batch.form for batch in read]
        self.flows: dict[Hashable, Dataflow] = {}
        for shape, batch in zip(self.shapes, read):
            if shape not in self.flows:
                self.flows[shape] = trace(network, batch)
        first, *others = self.flows.values()
        self.layers: list[Layer] = first.layers
        self.notes = first.notes
        paths = [layer.path for layer in first.layers]
        for flow in others:
            if [layer.path for layer in flow.layers] != paths:
                raise ValueError("batches of different shapes go through different layers")
        self.index = {path: i for i, path in enumerate(paths)}
        self.remarks = _remarks_on_weights(first)
        self.values = [self._start(self.flows[batch.form], batch) for batch in read]
        self.stages: Mapping[Hashable, Stages] = {}

    def _start(self, flow: Dataflow, batch: Batch) -> dict[int, Any]:
        """The values from which the pass of a batch starts, by name."""
        values = dict(zip(flow.batch, self._held(batch.arrays)))
        if flow.token_weights is not None:
            values |= {flow.token_weights: batch.token_weights}
        return values

    def layer(self, path: str) -> Layer:
        """The layer of that path."""
        return self.layers[self.index[path]]

    def start(self, stages: Mapping[Hashable, Stages]) -> None:
        """Takes the stages by which `advance` goes on: for each key of `flows` its own."""
        self.stages = stages

    def grams(self, paths: Sequence[str], leaves: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """Gram matrices `[groups, in, in]` of layers, from the values reached so far.

        Args:
          paths: Layers with at least one use.
          leaves: The model's leaves as they now are.

        Returns:
          For each path its matrices, float32.

        Raises:
          ValueError: A Gram matrix holds NaN or infinity.
        """
        ends = self._ends(paths, _gram)

        def of_batch(i: int, device: Device) -> list[jax.Array]:
            return self._run(ends[self.shapes[i]].segment, i, leaves, device)

        total = self._sum(of_batch)
        position = ends[self.shapes[0]].position
        for path in paths:
            if not is_finite(total[position[path]]):
                raise ValueError(
                    f"layer {path!r}: its inputs on the calibration batches are NaN, infinite, or "
                    "so large that their squares overflow float32; check the batches and the "
                    "layers before it"
                )
        return {path: total[position[path]] for path in paths}

    def cross_grams(
        self, paths: Sequence[str], leaves: Sequence[jax.Array], dense: "CalibrationPass"
    ) -> dict[str, jax.Array]:
        """Products sum x y^T of layers' inputs x in the dense model with their present ones y.

        Args:
          paths: Layers with at least one use.
          leaves: The model's leaves as they now are.
          dense: The same batches, halted at the same place, with the leaves never changed.

        Returns:
          For each path float32 `[groups, in, in]`.
        """
        ours, theirs = self._ends(paths, tuple), dense._ends(paths, tuple)

        def of_batch(i: int, device: Device) -> list[jax.Array]:
            shape = self.shapes[i]
            return _cross(
                dense._run(theirs[shape].segment, i, self.network.leaves, device),
                self._run(ours[shape].segment, i, leaves, device),
            )

        total = self._sum(of_batch)
        position = ours[self.shapes[0]].position
        return {path: total[position[path]] for path in paths}

    def advance(self, stage: int, leaves: Sequence[jax.Array]) -> None:
        """Continues every batch with the model's leaves as they now are, up to a stage.

        Args:
          stage: How many stages are done.
          leaves: The leaves, with the solutions of those stages.
        """
        if self.keep == "nowhere":
            return
        segments = {}
        for i, shape in enumerate(self.shapes):
            values = self.values[i]
            if shape not in segments:
                wanted = values_to_keep(self.flows[shape], self.stages[shape], stage)
                segments[shape] = (
                    Segment(self.flows[shape], values, sorted(wanted - values.keys())),
                    wanted & values.keys(),
                )
            segment, carried = segments[shape]
            new = self._run(segment, i, leaves, self.devices[i % len(self.devices)])
            kept = {name: values[name] for name in carried}
            self.values[i] = kept | dict(zip(segment.targets, self._held(list(new))))

    def _ends(
        self, paths: Sequence[str], combine: Callable[[Iterable[jax.Array]], Any]
    ) -> dict[Hashable, "_End"]:
        """For batches of each shape, how the pass goes on to the inputs of layers."""
        ends = {}
        for values, shape in zip(self.values, self.shapes):
            if shape not in ends:
                flow = self.flows[shape]
                layers = [flow.layers[self.index[path]] for path in paths]
                ends[shape] = _end_in_inputs(flow, values, layers, combine)
        return ends

    def _run(
        self, segment: Segment, batch: int, leaves: Sequence[jax.Array], device: Device
    ) -> Any:
        return segment(self.values[batch], leaves, device)

    def _sum(self, of_batch: Callable[[int, Device], list[jax.Array]]) -> list[jax.Array]:
        """Adds up what each batch gives, in their order, on the first device."""
        total: list[jax.Array] = []
        for i in range(len(self.shapes)):
            given = of_batch(i, self.devices[i % len(self.devices)])
            given = jax.device_put(given, self.devices[0])
            total = _add(total, given) if total else given
        return total

    def _held(self, arrays: list[jax.Array]) -> list[Any]:
        return jax.device_get(arrays) if self.keep == "host" else arrays


class _End(NamedTuple):
    """A segment that ends in layers' inputs, and the position of each layer's among them."""

    segment: Segment
    position: dict[str, int]


def _end_in_inputs(
    flow: Dataflow,
    sources: Iterable[int],
    layers: Iterable[Layer],
    combine: Callable[[Iterable[jax.Array]], Any],
) -> _End:
    """Builds the end of a pass that gives, for each layer, `combine` of its inputs.

    Layers that read the same value in the same way share one entry: `combine` of the rows
    `[groups, n, in]` of each use. Where tokens have weights w, rows are scaled by w^(1/2), so that
    their products x y^T have the weight w.
    """
    layers, uses = list(layers), {}
    for layer in layers:
        uses.setdefault(tuple(use.key for use in layer.uses), layer.uses)
    position = {key: i for i, key in enumerate(uses)}
    named = {use.activation for group in uses.values() for use in group}
    targets = sorted(named if flow.token_weights is None else {*named, flow.token_weights})
    slots = {name: i for i, name in enumerate(targets)}

    def finish(values: tuple) -> list[Any]:
        weights = None if flow.token_weights is None else values[slots[flow.token_weights]]

        def rows(use: Use) -> jax.Array:
            found = use.rows(values[slots[use.activation]])
            return found if weights is None else _weigh(found, weights, use)

        return [combine(map(rows, group)) for group in uses.values()]

    by_path = {layer.path: position[tuple(use.key for use in layer.uses)] for layer in layers}
    return _End(Segment(flow, sources, targets, finish), by_path)


def _weigh(rows: jax.Array, weights: jax.Array, use: Use) -> jax.Array:
    """Rows `[groups, n, in]` times the roots of their weights; those of weight 0 are 0."""
    weights = Weighing.of(weights.shape, use.free).spread(weights)[:, None]
    # A token that attends to nothing may have NaN, which a product with 0 would not remove.
    return jnp.where(weights > 0, rows.astype(jnp.float32) * jnp.sqrt(weights), 0)


def _remarks_on_weights(flow: Dataflow) -> dict[str, str]:
    """What to say, by path, of layers whose inputs the tokens' weights do not tell apart.

    Raises:
      ValueError: The weights fit no layer at all.
    """
    if flow.token_weights is None:
        return {}
    tokens, remarks, fits = flow.shapes[flow.token_weights].shape, {}, False
    used = [layer for layer in flow.layers if layer.uses]
    for layer in used:
        every = [Weighing.of(tokens, use.free) for use in layer.uses]
        said = dict.fromkeys(filter(None, (weighing.remark(tokens) for weighing in every)))
        fits |= any(weighing.axes for weighing in every)
        if said:
            remarks[layer.path] = "; ".join(said)
    if used and not fits:
        layer = used[0]
        raise ValueError(
            f"token_weights of shape {tokens} fit no layer: they are the leading axes of a layer's "
            f"inputs, [*tokens, ...]; those of {layer.path!r} are {layer.uses[0].free}"
        )
    return remarks


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """sum x y^T over vectors `[groups, n, in]`, float32 `[groups, in, in]`."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum("gni,gnj->gij", x, y, precision=jax.lax.Precision.HIGHEST)


def _gram(rows: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, (_product(x, x) for x in rows))


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _cross(dense: list, present: list) -> list:
    return [sum(_product(x, y) for x, y in zip(*pair)) for pair in zip(dense, present)]


@jax.jit
def _add(total: list, grams: list) -> list:
    return [a + b for a, b in zip(total, grams)]
