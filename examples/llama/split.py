"""A model taken apart into arrays and the structure around them, as jitted functions take it."""

import dataclasses
import functools

import jax
from flax import nnx

from examples.llama.config import Config


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What modules are but their arrays, as jitted functions tell their arguments apart.

    Every call of such a function asks for the hash, which for a graph of modules takes
    milliseconds; here it is computed once.
    """

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef

    def __eq__(self, other):
        return self is other or (
            isinstance(other, Structure) and self.graph == other.graph and self.tree == other.tree
        )

    @functools.cached_property
    def _hash(self):
        return hash((self.graph, self.tree))

    def __hash__(self):
        return self._hash


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure"]
)
@dataclasses.dataclass(frozen=True)
class SplitModules:
    """Modules taken apart, as an argument of jitted functions."""

    structure: Structure
    arrays: tuple

    @classmethod
    def of(cls, modules):
        """Takes a module apart, or a list or tuple of some."""
        graph, state = nnx.split(modules)
        arrays, tree = jax.tree.flatten(state)
        return cls(Structure(graph, tree), tuple(arrays))

    def build(self):
        """Puts the modules together again."""
        return nnx.merge(self.structure.graph, jax.tree.unflatten(self.structure.tree, self.arrays))


LAYERS_A_CALL = 4  # of a prefill; preparing a call takes the host some 0.6 to 1.2 ms


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ends", "layers"], meta_fields=["config"]
)
@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model taken apart, once, since that takes milliseconds.

    Attributes:
      config: the model's shape.
      ends: embedding, last norm and head.
      layers: every `LAYERS_A_CALL` of the layers, of one structure where they are alike.
    """

    config: Config
    ends: SplitModules
    layers: tuple[SplitModules, ...]

    @classmethod
    def of(cls, model):
        """Takes a `Llama` apart."""
        blocks, layers, known = list(model.layers), [], {}
        for first in range(0, len(blocks), LAYERS_A_CALL):
            piece = SplitModules.of(blocks[first : first + LAYERS_A_CALL])
            structure = known.setdefault(piece.structure, piece.structure)
            layers.append(dataclasses.replace(piece, structure=structure))
        ends = SplitModules.of((model.embed, model.norm, model.head))
        return cls(model.config, ends, tuple(layers))
