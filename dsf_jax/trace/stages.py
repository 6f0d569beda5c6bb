"""A forward pass in stages: which layers can be worked on together, and running it piecewise."""

import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.trace.dataflow import Dataflow
from dsf_jax.trace.jaxprs import Device


class Stages(NamedTuple):
    """The order in which layers are worked on.

    Attributes:
      members: For each stage the indices of its layers. They read inputs that none of them can
        change, except within a block that was asked for (or a layer applied more than once).
      of_value: For each value, how many stages must be done before it is final; views have 0.
    """

    members: list[list[int]]
    of_value: list[int]


def order_layers(
    flow: Dataflow, layers: Sequence[int], blocks: Sequence[Sequence[int]] = ()
) -> Stages:
    """Sorts layers into stages by what their inputs depend on.

    The set of layers whose weights reach a value is followed through the whole pass, so that a
    layer comes as early as its inputs are final: q, k and v, or a shortcut beside a convolution,
    are one stage, with no list of names.

    Args:
      flow: The traced pass.
      layers: Indices of the layers that will change.
      blocks: Indices to be kept together in one stage, even where one feeds another.

    Returns:
      The `Stages`.
    """
    bit = {layer: 1 << i for i, layer in enumerate(layers)}
    reach = _reach(flow, bit)
    unit = {layer: layer for layer in layers}
    for block in blocks:
        for layer in block:
            unit[layer] = unit[block[0]]
    before = {layer: 0 for layer in layers}
    for layer in layers:
        for use in flow.layers[layer].uses:
            before[layer] |= reach[use.activation]
    level = _levels(layers, unit, before, bit)
    members: list[list[int]] = [[] for _ in range(max(level.values(), default=0))]
    for layer in layers:
        members[level[layer] - 1].append(layer)
    bits = [(bit[layer], level[layer]) for layer in layers]

    @functools.cache
    def final(mask: int) -> int:
        return max((at for b, at in bits if mask & b), default=0)

    return Stages(members, [final(mask) for mask in reach])


def _reach(flow: Dataflow, bit: Mapping[int, int]) -> list[int]:
    """For each value of a pass, the set of layers (as bits) whose weights reach it."""
    source, leaf_bits = {}, {}
    for layer in bit:
        record = flow.layers[layer]
        leaf_bits[record.leaf] = leaf_bits.get(record.leaf, 0) | bit[layer]
        for output in (*(use.output for use in record.uses), *record.lookups):
            source[output] = source.get(output, 0) | bit[layer]
    accounted = flow.views.keys() | {
        output
        for layer in flow.layers
        for output in (*(use.output for use in layer.uses), *layer.lookups)
    }
    reach = [0] * len(flow.shapes)
    for op in flow.ops:
        mask = 0
        for name in op.inputs:
            mask |= reach[name]
            # A parameter used outside its layers (a norm of it, say) is followed all the same.
            if name in flow.views and not accounted.issuperset(op.outputs):
                mask |= leaf_bits.get(flow.views[name].leaf, 0)
        for name in op.outputs:
            reach[name] = mask | source.get(name, 0)
    return reach


def _levels(
    layers: Sequence[int], unit: dict[int, int], before: Mapping[int, int], bit: Mapping[int, int]
) -> dict[int, int]:
    """Longest path to each layer, counted in units; units that feed each other become one."""
    while True:
        members: dict[int, list[int]] = {}
        for layer in layers:
            members.setdefault(unit[layer], []).append(layer)
        own = {u: sum(bit[layer] for layer in own_layers) for u, own_layers in members.items()}
        needs: dict[int, set[int]] = {}
        for u, own_layers in members.items():
            mask = functools.reduce(operator.or_, (before[layer] for layer in own_layers), 0)
            needs[u] = {v for v in members if v != u and mask & own[v]}
        level, waiting = {}, dict(needs)
        while waiting:
            ready = [u for u, need in waiting.items() if all(v in level for v in need)]
            if not ready:
                break
            for u in ready:
                level[u] = 1 + max((level[v] for v in waiting.pop(u)), default=0)
        if not waiting:
            return {layer: level[unit[layer]] for layer in layers}
        first, second = _cycle_edge(waiting, level)
        for layer in layers:
            if unit[layer] == second:
                unit[layer] = first


def _cycle_edge(waiting: Mapping[int, set[int]], level: Mapping[int, int]) -> tuple[int, int]:
    """Two units of a cycle: follow unmet needs until a unit comes round again."""
    seen, u = [], next(iter(waiting))
    while u not in seen:
        seen.append(u)
        u = next(v for v in waiting[u] if v not in level)
    return u, seen[-1]


class Segment:
    """A part of a pass, from given values to wanted ones, compiled.

    Segments whose lowered programs read the same (the blocks of a transformer) share one
    compiled executable.

    Args:
      flow: The pass.
      sources: Names of the values given.
      targets: Names of the values wanted.
      finish: Applied to the tuple of wanted values inside the program; default: nothing.
    """

    _executables: ClassVar[dict[tuple, Any]] = {}

    def __init__(
        self,
        flow: Dataflow,
        sources: Iterable[int],
        targets: Iterable[int],
        finish: Callable[[tuple], Any] = lambda values: values,
    ):
        given, needed, ops = set(sources), set(targets), []
        for op in reversed(flow.ops):
            if any(name in needed and name not in given for name in op.outputs):
                ops.append(op)
                needed.update(op.inputs)
        self.ops = ops[::-1]
        self.sources = sorted(needed & given)
        self.leaves = [i for i, name in enumerate(flow.leaves) if name in needed]
        self.constants = sorted(needed & flow.constants.keys())
        self.flow, self.targets, self.finish = flow, tuple(targets), finish
        self.compiled: dict[Device, Any] = {}

    def _run(self, given: list, leaves: list, constants: list) -> Any:
        values = dict(zip(self.sources, given)) | dict(zip(self.constants, constants))
        values |= {self.flow.leaves[i]: leaf for i, leaf in zip(self.leaves, leaves)}
        for op in self.ops:
            outputs = op.run(*(values[name] for name in op.inputs))
            for name, output in zip(op.outputs, outputs):
                values.setdefault(name, output)  # what was given stays, should its op run again
        return self.finish(tuple(values[name] for name in self.targets))

    def __call__(
        self, given: Mapping[int, jax.Array], leaves: Sequence[jax.Array], device: Device
    ) -> Any:
        """Runs it on `device` with the values named in `given` and the model's leaves."""
        arguments = jax.device_put(
            (
                [given[name] for name in self.sources],
                [leaves[i] for i in self.leaves],
                [self.flow.constants[name] for name in self.constants],
            ),
            device,
        )
        if device not in self.compiled:
            self.compiled[device] = self._compile(arguments, device)
        return self.compiled[device](*arguments)

    def _compile(self, arguments: tuple, device: Device) -> Any:
        lowered = jax.jit(self._run).lower(*arguments)
        text = hashlib.sha256(lowered.as_text().encode()).digest()
        key = (text, device, jax.tree.structure(lowered.out_info))
        if key not in self._executables:
            self._executables[key] = lowered.compile(COMPILER_OPTIONS)
        return self._executables[key]
