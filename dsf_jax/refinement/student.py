"""What of a compressed model is trained: its leaves, and which of their zeros stay."""

import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax.pipeline.rules import default_skip
from dsf_jax.trace.batches import Batch
from dsf_jax.trace.dataflow import Layer, trace
from dsf_jax.trace.network import Network
from macko_jax.format import quantization
from macko_jax.nn.report import Report

SMALL = ("bias", "scale")  # parameters of biases and norms, stacked or not: they have no pattern


@dataclasses.dataclass(frozen=True)
class Student:
    """The leaves of a model that are trained.

    Attributes:
      trained: Indices of these leaves among the network's.
      names: Their paths, joined by "/".
      sparse: For each, whether its zeros are a pattern that is kept.
      matrices: For each, the compressed layers in it, several where layers are stacked.
    """

    trained: tuple[int, ...]
    names: tuple[str, ...]
    sparse: tuple[bool, ...]
    matrices: tuple[tuple[Layer, ...], ...]

    @property
    def form(self) -> Hashable:
        """Students of equal form, in models of equal form, are trained by the same program."""
        views = tuple(
            tuple((layer.leaf, layer.view.keys) for layer in layers) for layers in self.matrices
        )
        return self.trained, self.sparse, views

    def merge(self, leaves: Sequence[Any], trained: Sequence[Any]) -> list[Any]:
        """All leaves of the network, with those that are trained replaced."""
        merged = list(leaves)
        for index, leaf in zip(self.trained, trained):
            merged[index] = leaf
        return merged

    def rounded(
        self, trained: Sequence[jax.Array], held: Sequence[np.dtype], values: str
    ) -> list[jax.Array]:
        """Leaves with the matrices of compressed layers as 8-bit values and a scale a row."""
        return [
            _on_matrices(
                leaf,
                layers,
                lambda matrix, dtype=dtype: quantization.settle(matrix.astype(dtype), values),
            )
            for leaf, layers, dtype in zip(trained, self.matrices, held)
        ]


def _on_matrices(
    leaf: jax.Array, layers: Sequence[Layer], change: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """A leaf with `change` of each of its layers' matrices, all groups of a layer in one."""
    for layer in layers:
        matrices = layer.read(leaf)
        flat = matrices.reshape(-1, matrices.shape[-1])
        leaf = layer.write(leaf, change(flat).reshape(matrices.shape))
    return leaf


def choose_trained(
    network: Network, batch: Batch, layers: Any, train: str | Sequence[str]
) -> Student:
    """Finds the compressed layers of a model, and what is trained with them.

    Args:
      network: The compressed model.
      batch: One batch, by which its forward pass is traced.
      layers: Which layers are compressed: a report of them, regular expressions of their paths, or
        None for those whose matrix holds an exact zero.
      train: "compressed" trains these layers, biases and the scales of norms; "all" every
        parameter; or regular expressions of the paths of parameters.

    Raises:
      ValueError: No layer is compressed, or an expression matches nothing.
    """
    found = [layer for layer in trace(network, batch).layers if layer.uses]
    compressed = _compressed(network, found, layers)
    by_leaf: dict[int, list[Layer]] = {}
    for layer in compressed:
        if not jnp.any(network.leaves[layer.leaf] != 0):
            continue  # all of it is pruned
        by_leaf.setdefault(layer.leaf, []).append(layer)
    names = ["/".join(path) for path in network.paths]
    chosen = _chosen(network, names, by_leaf, train)
    return Student(
        tuple(chosen),
        tuple(names[i] for i in chosen),
        tuple(_has_pattern(network, i, i in by_leaf) for i in chosen),
        tuple(tuple(by_leaf.get(i, ())) for i in chosen),
    )


def _compressed(network: Network, found: Sequence[Layer], asked: Any) -> list[Layer]:
    known = "\n  ".join(layer.path for layer in found) or "(the model has none)"
    if asked is None:
        compressed = [
            layer
            for layer in found
            if default_skip(layer, found) is None and _zeros(layer.read(network.leaves[layer.leaf]))
        ]
        if not compressed:
            raise ValueError(
                "no layer of the model is compressed: none of its matrices holds an exact zero. "
                f"Say by layers= which layers are to be trained; there are\n  {known}"
            )
        return compressed
    if isinstance(asked, Report):
        paths = [layer.path for layer in asked.layers]
        compressed = [layer for layer in found if _belongs(layer.path, paths)]
        missing = [path for path in paths if not any(_belongs(x.path, [path]) for x in compressed)]
        if missing:
            raise ValueError(
                f"the report has layers that the model has not: {', '.join(missing[:4])}; the "
                f"model's are\n  {known}"
            )
        return compressed
    patterns = [asked] if isinstance(asked, str) else list(asked)
    return [layer for layer in found if _matches(layer.path, patterns, known, found)]


def _belongs(path: str, reported: Sequence[str]) -> bool:
    """Whether a layer is one of a report, or a factor of one of its pairs."""
    return any(path == name or path.startswith(f"{name}/") for name in reported)


def _matches(path: str, patterns: Sequence[str], known: str, found: Sequence[Layer]) -> bool:
    for pattern in patterns:
        if not any(re.fullmatch(pattern, layer.path) for layer in found):
            raise ValueError(f"layers={pattern!r} matches no layer; there are\n  {known}")
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _zeros(matrices: jax.Array) -> bool:
    """Whether some entries are exactly zero, and others are not."""
    nonzeros = int(jnp.count_nonzero(matrices))
    return 0 < nonzeros < matrices.size


def _chosen(
    network: Network, names: Sequence[str], compressed: Any, train: str | Sequence[str]
) -> list[int]:
    floats = [
        i
        for i, leaf in enumerate(network.leaves)
        if network.roles[i] == "parameter" and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if train == "all":
        return floats
    if train == "compressed":
        return [i for i in floats if i in compressed or _is_small(network, i)]
    patterns = list(train)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, names[i]) for i in floats):
            known = "\n  ".join(names[i] for i in floats)
            raise ValueError(f"train={pattern!r} matches no parameter; there are\n  {known}")
    return [i for i in floats if any(re.fullmatch(pattern, names[i]) for pattern in patterns)]


def _is_small(network: Network, leaf: int) -> bool:
    return network.leaves[leaf].ndim < 2 or network.paths[leaf][-1] in SMALL


def _has_pattern(network: Network, leaf: int, compressed: bool) -> bool:
    # A matrix that no product shows (it is gathered, say) may have been pruned by somebody else.
    if compressed:
        return True
    is_table = network.paths[leaf][-1] == "embedding"
    return not is_table and not _is_small(network, leaf) and _zeros(network.leaves[leaf])
