"""The blocks of a model: which they are, what they are called with, and each as a model."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from dsf_jax.refinement.settings import Settings
from dsf_jax.refinement.student import choose_trained
from dsf_jax.refinement.watching import Call, Watcher, taken_apart, with_pairs
from dsf_jax.trace.batches import Batch
from dsf_jax.trace.network import Network, read_network
from macko_jax.nn.report import Report


def find(sources: Any, batch: Batch, settings: Settings) -> list[str]:
    """The paths of the blocks, in the order in which the model calls them.

    Without an expression these are the members of a list, such as layers/0, layers/1 and so on (in
    linen layers_0), that are of one class; of several lists the one with most compressed entries.

    Args:
      sources: The models; its `student(forward)` takes the compressed one apart.
      batch: One batch, by which the model is traced.
      settings: What was asked for.

    Raises:
      ValueError: There are none, or blocks are called several times or within each other.
    """
    calls: dict[str, list[Call]] = {}

    def watched(model: Any, batch: Any) -> Any:
        output, found = Watcher(sources.forward, lambda path: True)(model, batch)
        calls.update(found)
        return output

    network = sources.student(watched)
    _trace(network, batch)
    if settings.blocks is not None:
        paths = [path for path in calls if re.fullmatch(settings.blocks, path)]
    else:
        paths = _longest_list(network, calls, batch, settings)
    if not paths:
        known = "\n  ".join(calls) or "(none)"
        raise ValueError(
            f"no blocks found (blocks={settings.blocks!r}): they are modules that the model calls, "
            f"and there are\n  {known}\nGive an expression, or hand each block to refine_block"
        )
    for path in paths:
        if len(calls[path]) > 1:
            raise ValueError(f"block {path!r} is called {len(calls[path])} times in one pass")
        inside = [other for other in paths if other.startswith(f"{path}/")]
        if inside:
            raise ValueError(f"blocks {path!r} and {inside[0]!r} lie within each other; choose one")
    return paths


def _trace(network: Network, batch: Batch) -> Any:
    def apply(leaves: Any, arrays: Any) -> list:
        return network.apply(leaves, batch.fill(arrays))

    return jax.eval_shape(apply, network.leaves, batch.arrays)


def _longest_list(
    network: Network, calls: dict[str, list[Call]], batch: Batch, settings: Settings
) -> list[str]:
    student = choose_trained(network, batch, settings.layers, settings.train)
    sizes = {
        name: network.leaves[index].size
        for index, name, layers in zip(student.trained, student.names, student.matrices)
        if layers
    }
    lists: dict[tuple[str, type], list[str]] = {}
    for path, found in calls.items():
        stem = re.fullmatch(r"(.*?)\d+", path)
        if stem is not None:
            lists.setdefault((stem[1], found[0].kind), []).append(path)

    def size(paths: list[str]) -> tuple[int, int]:
        inside = [s for n, s in sizes.items() if any(n.startswith(f"{p}/") for p in paths)]
        return sum(inside), -len(paths[0])

    candidates = [paths for paths in lists.values() if len(paths) > 1 and size(paths)[0]]
    return max(candidates, key=size, default=[])


class Capture:
    """What the blocks of a model are called with and what they give, batch by batch.

    One program gives both for all blocks of a batch, and is compiled once for a shape.

    Args:
      take_apart: `take_apart(forward)` is the model's `Network` with that forward pass.
      forward: The model's.
      paths: Of the blocks.
      batch: One batch, by which the model is traced.
    """

    def __init__(
        self,
        take_apart: Callable,
        forward: Callable[[Any, Any], Any],
        paths: Sequence[str],
        batch: Batch,
    ):
        self.paths = list(paths)
        self.apart: dict[str, Batch] = {}
        watcher = Watcher(forward, lambda path: path in self.paths)

        def captured(model: Any, batch: Any) -> list:
            _, calls = watcher(model, batch)
            given = []
            for path in self.paths:
                if path not in calls:
                    raise ValueError(f"block {path!r} is not called by the model")
                self.apart[path] = taken_apart(calls[path][0], path)
                given += [calls[path][0].result, *self.apart[path].arrays]
            return given

        self.network: Network = take_apart(captured)
        self.programs: dict[Any, tuple] = {}
        _trace(self.network, batch)  # after which linen's modules are known

    def _run(self, leaves: Sequence[Any], batch: Batch) -> tuple[list, dict[str, Batch]]:
        if batch.form not in self.programs:
            program = jax.jit(lambda leaves, arrays: self.network.apply(leaves, batch.fill(arrays)))
            program = program.lower(leaves, batch.arrays).compile()
            apart = {  # tracers do not outlive their trace
                path: dataclasses.replace(taken, arrays=[None] * len(taken.arrays))
                for path, taken in self.apart.items()
            }
            self.programs[batch.form] = program, apart
        program, apart = self.programs[batch.form]
        return program(leaves, batch.arrays), apart

    def inputs(self, leaves: Sequence[Any], batches: Sequence[Batch], path: str) -> list[Batch]:
        """What a block is called with for each batch, with the leaves that are given."""
        found = []
        for batch in batches:
            given, apart = self._run(leaves, batch)
            first = self._first(apart, path) + 1
            arrays = given[first : first + len(apart[path].arrays)]
            found.append(
                dataclasses.replace(apart[path], arrays=arrays, token_weights=batch.token_weights)
            )
        return found

    def results(self, leaves: Sequence[Any], batches: Sequence[Batch], path: str) -> list[Any]:
        """What a block gives for each batch."""
        found = []
        for batch in batches:
            given, apart = self._run(leaves, batch)
            found.append(given[self._first(apart, path)])
        return found

    def _first(self, apart: dict[str, Batch], path: str) -> int:
        before = self.paths[: self.paths.index(path)]
        return sum(1 + len(apart[other].arrays) for other in before)

    def block(self, leaves: Sequence[Any], path: str) -> Network:
        """A block with these leaves, as a model of its own that is called with (args, kwargs)."""
        model: Any = self.network.substitute(leaves, {})
        names = path.split("/")
        if isinstance(model, nnx.Module):
            for name in names:
                found: Any = model
                model = found[int(name)] if name.isdigit() else getattr(found, name)
            return read_network(model, None, with_pairs(_call_with))
        # Without its name, so that blocks that are alike are equal.
        module = self.network.modules[path].clone(name=None)
        own = {}
        for collection, tree in model.items():
            for name in names:
                tree = tree.get(name, {}) if hasattr(tree, "get") else {}
            if tree:
                own[collection] = tree
        return read_network(module, own, with_pairs(_call_with))


def _call_with(module: Any, inputs: tuple) -> Any:
    args, kwargs = inputs
    return module(*args, **kwargs)


def put(
    whole: Network, leaves: Sequence[Any], path: str, block: Network, new: Sequence[Any]
) -> list[Any]:
    """The leaves of a whole model with those of one of its blocks."""
    prefix = tuple(path.split("/"))
    own = dict(zip(block.paths, new))
    return [
        own.get(names[len(prefix) :], leaf) if names[: len(prefix)] == prefix else leaf
        for names, leaf in zip(whole.paths, leaves)
    ]


def layers_of(asked: Any, path: str) -> Any:
    """What `layers=` asks for within a block, whose layers' paths are without the block's."""
    if not isinstance(asked, Report):
        if asked is None:
            return None
        raise ValueError(
            "layers= takes the report of compress_model, or None, where blocks are refined; for "
            "other choices hand each block to refine_block"
        )
    prefix = f"{path}/"
    return dataclasses.replace(
        asked,
        layers=tuple(
            dataclasses.replace(layer, path=layer.path.removeprefix(prefix))
            for layer in asked.layers
            if layer.path.startswith(prefix)
        ),
    )


def directory(settings: Settings, path: str) -> Any:
    """Where the checkpoints of a block go; None for none."""
    if settings.work_dir is None:
        return None
    return pathlib.Path(os.fspath(settings.work_dir)) / path.replace("/", ".")
