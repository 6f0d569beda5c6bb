"""Gram matrices of the inputs of a Flax model's layers, streamed over calibration batches.

G = sum x x^T over every input vector x of a layer: the second moment that decides how much an
error in the layer's weights costs at its output. The model is not edited, and each batch's Gram
matrices are computed inside the compiled forward pass, where its activations live and die.
"""

import re
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from dsf_jax.solvers.problem import is_finite
from dsf_jax.trace.dataflow import Dataflow, Layer, trace
from dsf_jax.trace.network import Network, read_network
from dsf_jax.trace.stages import Segment, Stages


def gram_matrices(
    model, batches: Iterable, *, variables=None, forward: Callable | None = None, layers: str = ".*"
) -> dict[str, jax.Array]:
    """Gram matrices of the inputs of a model's layers.

    Covers every product of an activation with a parameter: `nnx.Linear`, `LinearGeneral`,
    `Einsum`, `Conv` (its im2col patches, ordered [window, channel]), `MultiHeadAttention`, the
    linen layers `Dense`, `DenseGeneral`, `Einsum`, `Conv`, and products that a model writes
    itself. Layers stacked for a scan are seen slice by slice, as "path[i]".

    Args:
      model: An `nnx.Module`, run in evaluation mode, or a linen module with `variables`.
      batches: Inputs, any pytree of arrays each; the pass is compiled once per shape.
      variables: Variables of a linen module.
      forward: `forward(model, batch)`; default `model(batch)`, `model(*batch)` for a tuple,
        `model(**batch)` for a dict.
      layers: Regular expression for whole module paths; the default takes all.

    Returns:
      For each module path, float32 `[in, in]`; `[groups, in, in]` for grouped convolutions and
      stacks of experts.

    Raises:
      ValueError: No batches, no layer that matches, or an activation that is NaN or infinite.
    """
    network = read_network(model, variables, forward)
    calibration = Calibration(network, check_batches(batches))
    paths = [layer.path for layer in calibration.layers if layer.uses]
    chosen = [path for path in paths if re.fullmatch(layers, path)]
    if not chosen:
        raise ValueError(f"no layer matches {layers!r}; the paths are\n  " + "\n  ".join(paths))
    grams = calibration.grams(chosen, network.leaves)
    return {path: gram[0] if len(gram) == 1 else gram for path, gram in grams.items()}


class Calibration:
    """Calibration batches on their way through a model.

    The pass of each batch can be halted before a group of layers, whose Gram matrices are then
    computed from the values at hand, and continued with new weights: every operation runs once,
    however many groups there are. What is kept between is what later operations still read.

    Args:
      network: The model.
      batches: Pytrees of arrays.
      keep: Where values wait between groups: "device", "host", or "nowhere" to start every group
        from the batch itself, which takes one pass per group.
      devices: Batches are dealt out to these in turn; Gram matrices are added up in the order of
        the batches on the first, so that the result does not depend on their number.

    Attributes:
      layers: The model's layers, in order of first application.
      notes: As in `Dataflow`.
    """

    def __init__(
        self,
        network: Network,
        batches: list,
        keep: str = "device",
        devices: Sequence[jax.Device] | None = None,
    ):
        self.network, self.keep = network, keep
        self.devices = list(devices or jax.devices()[:1])
        self.shapes = [_shape(batch) for batch in batches]
        self.flows: dict[object, Dataflow] = {}
        for shape, batch in zip(self.shapes, batches):
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
        self.values = [
            dict(zip(self.flows[shape].batch, self._held(jax.tree.leaves(batch))))
            for shape, batch in zip(self.shapes, batches)
        ]
        self.done = -1  # the stage up to which `values` are final
        self.stages: dict[object, Stages] = {}

    def layer(self, path: str) -> Layer:
        return self.layers[self.index[path]]

    def start(self, stages: dict[object, Stages]):
        """Takes the stages by which `advance` goes on: for each key of `flows` its own."""
        self.stages = stages

    def grams(self, paths: Sequence[str], leaves: list[jax.Array]) -> dict[str, jax.Array]:
        """Gram matrices `[groups, in, in]` of layers, from the values reached so far.

        Args:
          paths: Layers with at least one use.
          leaves: The model's leaves as they now are.

        Raises:
          ValueError: A Gram matrix with NaN or infinity.
        """
        passes = {}
        total = None
        for i, shape in enumerate(self.shapes):
            if shape not in passes:
                flow = self.flows[shape]
                chosen = [flow.layers[self.index[path]] for path in paths]
                passes[shape] = _segment_of_inputs(flow, self.values[i], chosen, _gram)
            segment, position = passes[shape]
            device = self.devices[i % len(self.devices)]
            batch = jax.device_put(segment(self.values[i], leaves, device), self.devices[0])
            total = batch if total is None else _add(total, batch)
        for path in paths:
            if not is_finite(total[position[path]]):
                raise ValueError(
                    f"layer {path!r}: its inputs on the calibration batches are NaN, infinite, or "
                    "so large that their squares overflow float32; check the batches and the "
                    "layers before it"
                )
        return {path: total[position[path]] for path in paths}

    def cross_grams(
        self, paths: Sequence[str], leaves: list[jax.Array], dense: "Calibration"
    ) -> dict[str, jax.Array]:
        """Products sum x y^T of layers' inputs x in the dense model with their present ones y.

        Args:
          paths: Layers with at least one use.
          leaves: The model's leaves as they now are.
          dense: The same batches, halted at the same place, with the leaves never changed.

        Returns:
          For each path float32 `[groups, in, in]`.
        """
        total, passes = None, {}
        for i, shape in enumerate(self.shapes):
            if shape not in passes:
                flow = self.flows[shape]
                chosen = [flow.layers[self.index[path]] for path in paths]
                ours, position = _segment_of_inputs(flow, self.values[i], chosen, tuple)
                theirs, _ = _segment_of_inputs(dense.flows[shape], dense.values[i], chosen, tuple)
                passes[shape] = ours, theirs
            ours, theirs = passes[shape]
            device = self.devices[i % len(self.devices)]
            batch = _cross(
                theirs(dense.values[i], self.network.leaves, device),
                ours(self.values[i], leaves, device),
            )
            batch = jax.device_put(batch, self.devices[0])
            total = batch if total is None else _add(total, batch)
        return {path: total[position[path]] for path in paths}

    def advance(self, stage: int, leaves: list[jax.Array]):
        """Continues every batch with the model's leaves as they now are, through `stage`."""
        if self.keep == "nowhere":
            return
        segments = {}
        for i, shape in enumerate(self.shapes):
            if shape not in segments:
                wanted = _live(self.flows[shape], self.stages[shape], stage)
                carried = wanted & self.values[i].keys()
                computed = sorted(wanted - carried)
                segments[shape] = (
                    carried,
                    computed,
                    Segment(self.flows[shape], self.values[i], computed),
                )
            carried, computed, segment = segments[shape]
            new = segment(self.values[i], leaves, self.devices[i % len(self.devices)])
            kept = {name: self.values[i][name] for name in carried}
            self.values[i] = kept | dict(zip(computed, self._held(list(new))))

    def _held(self, arrays):
        return jax.device_get(arrays) if self.keep == "host" else arrays


def _live(flow: Dataflow, stages: Stages, stage: int) -> set[int]:
    """Values final after `stage` that later operations, or later groups' inputs, still read."""
    live = set()
    for op in flow.ops:
        if stages.of_value[op.outputs[0]] > stage if op.outputs else False:
            live.update(op.inputs)
    for group in stages.groups[stage:]:
        for layer in group:
            live.update(use.activation for use in flow.layers[layer].uses)
    known = flow.views.keys() | flow.constants.keys() | set(flow.leaves)
    return {name for name in live if stages.of_value[name] <= stage and name not in known}


def _segment_of_inputs(flow, sources, layers, combine):
    """A segment that ends in layers' inputs, and the position of each layer's among them.

    Layers that read the same value in the same way share one entry: `combine` of the rows
    `[groups, n, in]` of each use.
    """
    uses = {}
    for layer in layers:
        uses.setdefault(tuple(use.key for use in layer.uses), layer.uses)
    position = {key: i for i, key in enumerate(uses)}
    targets = sorted({use.activation for group in uses.values() for use in group})
    slots = {name: i for i, name in enumerate(targets)}

    def finish(values):
        return [
            combine(use.rows(values[slots[use.activation]]) for use in group)
            for group in uses.values()
        ]

    by_path = {layer.path: position[tuple(use.key for use in layer.uses)] for layer in layers}
    return Segment(flow, sources, targets, finish), by_path


def _product(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum("gni,gnj->gij", x, y, precision=jax.lax.Precision.HIGHEST)


def _gram(rows):
    return sum(_product(x, x) for x in rows)


@jax.jit
def _cross(dense, present):
    return [sum(_product(x, y) for x, y in zip(*pair)) for pair in zip(dense, present)]


@jax.jit
def _add(total, grams):
    return [a + b for a, b in zip(total, grams)]


def check_batches(batches) -> list:
    """The batches as a list, or a ValueError where there are none or one holds no numbers."""
    if isinstance(batches, (dict, str)) or hasattr(batches, "dtype"):
        raise ValueError("batches must be a sequence of batches, got a single one; give [batch]")
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give at least one batch of calibration inputs")
    for i, batch in enumerate(batches):
        leaves = jax.tree.leaves(batch)
        if not leaves or any(getattr(leaf, "size", 0) == 0 for leaf in leaves):
            raise ValueError(f"batch {i} is empty or holds something that is no array: {batch!r}")
    return batches


def _shape(batch):
    """Hashable structure, shapes and dtypes of a batch."""
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
