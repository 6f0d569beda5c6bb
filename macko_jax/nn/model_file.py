"""Files of compressed models: what `pack` and `substitute` gave, loaded by `macko_jax` alone.

`describe` and `abstract_model` are for checkpoints that another library writes, such as Orbax.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from macko_jax.io import checkpoint
from macko_jax.io.checkpoint import load, save
from macko_jax.nn import flax_nnx
from macko_jax.nn.frameworks import describe_other


def save_model(path: str | os.PathLike, model: Any) -> None:
    """Save a packed or factorized Flax model to one file.

        macko_jax.save_model("model.safetensors", packed)

    The file says what each layer has become: a kernel that is one packed matrix, or a stack of
    them, or the two factors of a pair, each dense or packed.

    Args:
        path: the file; an existing one is replaced, never by half a file.
        model: an NNX model, or a linen module's variables, as `dsf_jax.compress_model`,
            `dsf_jax.pack`, `flax_nnx.substitute` or `flax_linen.substitute` gave them.

    Raises:
        TypeError: if the model is neither, or holds something that `save` cannot store.
        FileNotFoundError: if the directory of `path` does not exist.
    """
    if isinstance(model, nnx.Module):
        model = flax_nnx.to_pure_dict(model)
    elif not isinstance(model, Mapping):
        raise TypeError(
            "save_model takes a flax.nnx.Module or the variables of a linen module, "
            f"{describe_other(model)}; save stores other trees of arrays"
        )
    save(path, model)


def load_model(
    path: str | os.PathLike,
    make_model: Callable[[], nnx.Module] | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Load a model that `save_model` wrote.

        model = macko_jax.load_model("model.safetensors", lambda: MyModel(rngs=nnx.Rngs(0)))
        variables = macko_jax.load_model("linen.safetensors")

    Nothing but the code of the dense model is needed, and no dense kernel is ever held: the model
    is made abstractly, and each layer becomes what the file says that it is.

    Args:
        path: the file.
        make_model: makes the dense NNX model, with the configuration that it had when it was
            compressed; None for the variables of a linen module.
        mesh: where matrices in shards go, see `macko_jax.load`; None: they come back whole.

    Returns:
        The NNX model, or linen variables for `flax_linen.apply`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or does not fit the model: the message names each layer
            that does not, what it needs and what the file has.
        TypeError: if `make_model` makes no NNX model.
    """
    tree = load(path, mesh)
    if make_model is None:
        if not isinstance(tree, Mapping) or "params" not in tree:
            raise ValueError(
                f"{path} does not hold the variables of a linen module, which have 'params'; for "
                "an NNX model give make_model, a function that makes the dense model"
            )
        return tree

    try:
        return flax_nnx.from_pure_dict(_abstract_dense(make_model), tree)
    except ValueError as error:
        raise ValueError(f"Cannot load {path}: {error}") from error


def describe(model: nnx.Module) -> dict:
    """What each layer of a packed or factorized NNX model has become, ready for JSON.

    Args:
        model: as for `save_model`; no array is read.

    Returns:
        Dicts, lists and strings, for `abstract_model`.
    """
    return checkpoint.describe(flax_nnx.to_pure_dict(model))


def abstract_model(make_model: Callable[[], nnx.Module], description: dict) -> nnx.Module:
    """A packed or factorized NNX model without its numbers, for libraries that restore them.

        description = macko_jax.flax_nnx.describe(packed)  # saved beside nnx.state(packed)

        abstract = macko_jax.flax_nnx.abstract_model(make_model, description)
        nnx.update(abstract, restored)  # a state that was restored into nnx.state(abstract)

    Args:
        make_model: makes the dense model, with the configuration that it had when it was
            compressed.
        description: what `describe` gave, also after it has been through JSON.

    Returns:
        The model, with `jax.ShapeDtypeStruct` in the place of every array.

    Raises:
        ValueError: if the description makes no sense, or does not fit the model: the message names
            each layer that does not, what it needs and what the description has.
        TypeError: if `make_model` makes no NNX model.
    """
    return flax_nnx.from_pure_dict(_abstract_dense(make_model), checkpoint.abstract(description))


def _abstract_dense(make_model: Callable[[], nnx.Module]) -> nnx.Module:
    """The dense model with `jax.ShapeDtypeStruct` in the place of every array."""

    def make_checked() -> nnx.Module:
        model = make_model()
        if not isinstance(model, nnx.Module):
            raise TypeError(
                f"make_model must make a flax.nnx.Module, it made a {type(model).__name__}; the "
                "variables of a linen module are loaded without it"
            )
        return model

    return nnx.eval_shape(make_checked)
