"""What is kept of a pass that is halted: as few bytes as the rest can be computed from.

An attention mask is a broadcast of the tokens, or of nothing at all; kept for every batch it would
take more room than all activations. What light operations make of smaller values, or of constants,
is therefore computed again where it is needed.
"""

import math
from collections.abc import Mapping, Set

from dsf_jax.trace.dataflow import Dataflow, Op
from dsf_jax.trace.jaxprs import LIGHT
from dsf_jax.trace.stages import Stages


def values_to_keep(flow: Dataflow, stages: Stages, stage: int) -> set[int]:
    """Values to keep when a pass is halted before a stage.

    Args:
      flow: The pass.
      stages: Its stages.
      stage: How many stages are done.

    Returns:
      Names of values from which, with the model's leaves and the constants, all can be computed
      that later operations, or the inputs of later stages' layers, read.
    """
    live = set() if flow.token_weights is None else {flow.token_weights}
    for op in flow.ops:
        if op.outputs and stages.of_value[op.outputs[0]] > stage:
            live.update(op.inputs)
    for layers in stages.members[stage:]:
        for layer in layers:
            live.update(use.activation for use in flow.layers[layer].uses)
    final = {name for name in live if stages.of_value[name] <= stage}
    free, producers = _free_values(flow), {name: op for op in flow.ops for name in op.outputs}
    return set().union(*(_smallest_sources(flow, name, free, producers) for name in final - free))


def _smallest_sources(
    flow: Dataflow, value: int, free: Set[int], producers: Mapping[int, Op]
) -> Set[int]:
    """The values of fewest bytes that light operations make a value of; itself, if there are none.

    The light operations behind the value are undone one after the other, the last first, so that
    what is left at any time suffices.
    """
    left = {value}
    best, fewest = set(left), _nbytes(flow, value)
    pending = set(left)
    while pending:
        name = max(pending)  # an operation's inputs have lower names than its outputs
        pending.remove(name)
        op = producers.get(name)
        if op is None or op.kind not in LIGHT:
            continue
        sources = set(op.inputs) - free
        left = (left - {name}) | sources
        pending |= sources
        size = sum(_nbytes(flow, source) for source in left)
        if size < fewest:
            best, fewest = set(left), size
    return best


def _free_values(flow: Dataflow) -> set[int]:
    """Values that take no batch to compute, only the model, constants and light operations."""
    free = set(flow.leaves) | flow.constants.keys() | flow.views.keys()
    for op in flow.ops:
        if op.kind in LIGHT and free.issuperset(op.inputs):
            free.update(op.outputs)
    return free


def _nbytes(flow: Dataflow, name: int) -> int:
    shape = flow.shapes[name]
    return math.prod(shape.shape) * shape.dtype.itemsize
