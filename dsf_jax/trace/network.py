"""A Flax model as a flat list of leaves and a function of them, for NNX and linen alike."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.errors import InvalidRngError

from macko_jax.format.factors import FactorizedKernel
from macko_jax.nn.flax_linen import STATE as linen_state
from macko_jax.nn.flax_linen import check_variables
from macko_jax.nn.flax_nnx import STATE as nnx_state
from macko_jax.nn.flax_nnx import become_pair
from macko_jax.nn.frameworks import describe_other
from macko_jax.nn.rules import layer_path

Role = Literal["parameter", "state", "other"]

# A linen layer may have a pair of factors already, in the place of its kernel.
FACTORS = tuple(field.name for field in dataclasses.fields(FactorizedKernel))


@dataclasses.dataclass
class Network:
    """A model taken apart.

    Attributes:
      paths: Path of each leaf, such as ("layers", "0", "mlp", "down", "kernel").
      leaves: The arrays.
      roles: What each leaf is: a parameter, state (a statistic, cache or random state), or other.
      apply: `apply(leaves, batch)` is the forward pass, in evaluation mode.
      substitute: `substitute(leaves, factors)` is a new model (linen: variables) with other arrays,
        and with pairs of factors (left, right) in the place of some kernels, by index of leaf.
      modules: Flax modules by path; linen's are known once `apply` has been traced.
      form: Networks of equal form have the same `apply`, if their forward passes are the same.
    """

    paths: list[tuple[str, ...]]
    leaves: list[jax.Array]
    roles: list[Role]
    apply: Callable[[Sequence[jax.Array], Any], list]
    substitute: Callable[[Sequence[jax.Array], Mapping[int, tuple[jax.Array, jax.Array]]], Any]
    modules: dict[str, Any]
    form: Hashable

    def module_path(self, leaf: int) -> str:
        """Path of the module whose kernel or embedding a leaf is; of other leaves their own."""
        return layer_path(self.paths[leaf])


def read_network(
    model: nnx.Module | nn.Module,
    variables: Any = None,
    forward: Callable | None = None,
    rngs: Any = None,
) -> Network:
    """Takes a Flax model apart.

    Args:
      model: An `nnx.Module`, or a linen module together with `variables`.
      variables: The linen module's variables.
      forward: `forward(model, batch)` runs the forward pass; the default is `model(batch)`,
        `model(*batch)` for a tuple and `model(**batch)` for a dict. For linen, `model` is the
        bound module.
      rngs: Random keys that a linen module draws from, by name.

    Returns:
      The `Network`.

    Raises:
      TypeError: The model is neither an NNX nor a linen module.
      ValueError: A linen module without variables, or an NNX model with some or with keys.
    """
    forward = forward or call
    if isinstance(model, nnx.Module):
        for name, given in (("variables", variables), ("rngs", rngs)):
            if given is not None:
                raise ValueError(f"{name} belong to a linen module; an nnx.Module holds its own")
        return _read_nnx(model, forward)
    if isinstance(model, nn.Module):
        if variables is None:
            raise ValueError("give a linen module's variables as well: variables={'params': ...}")
        check_variables(variables)
        return _read_linen(model, variables, forward, rngs)
    raise TypeError(f"expected a flax.nnx.Module or a flax.linen.Module, {describe_other(model)}")


def call(model: Any, batch: Any) -> Any:
    """The forward pass of a model where none is given."""
    if isinstance(batch, tuple):
        return model(*batch)
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch)


def _read_nnx(model: nnx.Module, forward: Callable) -> Network:
    graph, *states = nnx.split(model, nnx.Param, nnx_state, ...)
    with_paths, tree = jax.tree_util.tree_flatten_with_path(tuple(states))
    paths = [_names(path[1:]) for path, _ in with_paths]
    roles = [get_args(Role)[path[0].idx] for path, _ in with_paths]

    def rebuild(leaves):
        return nnx.merge(graph, *jax.tree.unflatten(tree, leaves))

    def apply(leaves, batch):
        copy = rebuild(leaves)  # new modules: neither eval() nor the pass touches the model
        copy.eval()
        return _arrays(forward(copy, batch))

    def substitute(leaves, factors):
        new = rebuild(leaves)
        modules = _modules(new)
        for leaf, (left, right) in factors.items():
            become_pair(modules["/".join(paths[leaf][:-1])], left, right)
        return new

    return Network(
        paths,
        [leaf for _, leaf in with_paths],
        roles,
        apply,
        substitute,
        _modules(model),
        (graph, tree),
    )


def _modules(model: nnx.Module) -> dict[str, Any]:
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _read_linen(module: nn.Module, variables: Any, forward: Callable, rngs: Any) -> Network:
    with_paths, tree = jax.tree_util.tree_flatten_with_path(variables)
    paths = [_names(path) for path, _ in with_paths]
    modules = {}

    def record(next_function, args, kwargs, context):
        path = "/".join(context.module.path)
        if path not in modules:
            modules[path] = context.module.clone(parent=None)
        return next_function(*args, **kwargs)

    def apply(leaves, batch):
        bound = module.bind(jax.tree.unflatten(tree, leaves), rngs=rngs)
        try:
            with nn.intercept_methods(record):
                return _arrays(forward(bound, batch))
        except InvalidRngError as error:
            error.add_note(
                "Give the keys that the module draws from: rngs={'NAME': jax.random.key(0)}"
            )
            raise

    def substitute(leaves, factors):
        leaves = list(leaves)
        for leaf, (left, right) in factors.items():
            dtype = leaves[leaf].dtype
            leaves[leaf] = FactorizedKernel(left.astype(dtype), right.astype(dtype))
        return _without_boxes_of_pairs(jax.tree.unflatten(tree, leaves))

    return Network(
        [path[1:] for path in paths],
        [leaf for _, leaf in with_paths],
        [_linen_role(path[0]) for path in paths],
        apply,
        substitute,
        modules,
        (module, tree, id(rngs)),
    )


def _without_boxes_of_pairs(variables: Any) -> Any:
    """Variables whose pairs of factors are in no box: its axis names are those of one kernel."""

    def is_box(node: Any) -> bool:
        return isinstance(node, nn.meta.AxisMetadata)

    def open_pair(node: Any) -> Any:
        held = getattr(node, "value", None) if is_box(node) else None
        return held if isinstance(held, FactorizedKernel) else node

    return jax.tree.map(open_pair, variables, is_leaf=is_box)


def _linen_role(collection: str) -> Role:
    if collection == "params":
        return "parameter"
    return "state" if collection in linen_state else "other"


def _names(path: tuple) -> tuple[str, ...]:
    """Key path to names. A last attribute key is a Variable's or a box's own and names nothing,
    unless it is that of a factor of a pair."""
    if isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name not in FACTORS:
        path = path[:-1]
    return tuple(str(_key(key)) for key in path)


def _key(key: Any) -> Any:
    for kind in ("key", "idx", "name"):
        if hasattr(key, kind):
            return getattr(key, kind)
    return key


def _arrays(tree: Any) -> list:
    """The array leaves of a forward pass's result; the rest does not matter here."""
    return [x for x in jax.tree.leaves(tree) if isinstance(x, (jax.Array, np.ndarray))]
