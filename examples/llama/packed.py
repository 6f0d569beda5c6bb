"""Packed model directories: one file that `macko_jax.save` writes for each part, and config.json.

config.json comes last and so marks a whole model.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

import macko_jax
import macko_jax.flax_nnx
from examples.files import regular_file
from examples.llama import parallel
from examples.llama.hub_config import config_to_json, load_config
from examples.llama.weights import abstract_model, dtype_of
from examples.records import write_json
from macko_jax.format.choose import shared_capacity


def part_file(directory, name):
    """File of a part of a packed model: "embed", "norm", "head" or the number of a block."""
    name = f"{int(name):05d}" if str(name).isdigit() else name
    return pathlib.Path(directory) / f"packed-{name}.safetensors"


def part_names(config):
    ends = ("embed", "norm") if config.tie_word_embeddings else ("embed", "norm", "head")
    return (*ends, *range(config.num_hidden_layers))


def is_packed(directory):
    """Whether a directory holds a packed model."""
    return part_file(directory, "embed").is_file()


def save_packed(directory, model):
    """Writes a model with packed layers.

    Args:
      directory: made if missing.
      model: a `Llama` after `dsf_jax.pack` or `macko_jax.flax_nnx.substitute`.

    Returns:
      Size in bytes of the files of weights.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    tree = macko_jax.flax_nnx.to_pure_dict(model)
    files = []
    for name in part_names(model.config):
        files.append(part_file(directory, name))
        macko_jax.save(files[-1], tree["layers"][name] if isinstance(name, int) else tree[name])
    write_json(directory / "config.json", config_to_json(model.config))
    return sum(file.stat().st_size for file in files)


def load_packed(directory, *, dtype=jnp.float32, unpack=False, values=None, mesh=None):
    """Reads a packed model; parameters keep the dtype in which they are stored.

    Args:
      directory: what `save_packed` or examples.compress_llm wrote.
      dtype: what the model computes in.
      unpack: give the pruned dense model instead, every matrix decompressed.
      values: "int8" or "float8_e4m3fn" to round the values of matrices that are stored in 16 or 32
        bits; None keeps them.
      mesh: the devices that share the model, see parallel.py; None for the default one.

    Raises:
      FileNotFoundError: a part or config.json is missing.
      ValueError: a part is damaged or does not fit config.json.
    """
    if not (pathlib.Path(directory) / "config.json").is_file():
        raise FileNotFoundError(
            f"the packed model in {directory} is not finished: it has no config.json yet; give the "
            "command that packs it again, and it goes on"
        )
    config = load_config(directory)
    names = part_names(config)
    missing = [
        part_file(directory, name).name
        for name in names
        if not part_file(directory, name).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing[:8])}; run what packed it to its end"
        )
    param_dtype = dtype_of(part_file(directory, "embed"), "embedding")
    model = abstract_model(config, dtype=dtype, param_dtype=param_dtype)
    for name in names:
        if isinstance(name, int):
            put, abstract = model.layers.__setitem__, model.layers[name]
        else:
            put, abstract = functools.partial(setattr, model), getattr(model, name)
        rounded = values if isinstance(name, int) else None
        put(name, _load_part(directory, name, abstract, unpack, rounded, config, mesh))
    return model if mesh is None else parallel.spread(model, mesh)


def load_block(directory, index, abstract_block, *, unpack=False):
    """One block of a packed model, on an abstract block of its configuration."""
    return _load_part(directory, index, abstract_block, unpack)


def _load_part(directory, name, abstract, unpack, values=None, config=None, mesh=None):
    """A part of a packed model, on an abstract part of its configuration."""
    path = regular_file(part_file(directory, name))
    stored = macko_jax.load(path)
    if values is not None:
        stored = with_values(stored, values)
    try:
        tree = decompressed(stored) if unpack else stored
        if mesh is not None:
            prefix = ("layers", name) if isinstance(name, int) else (name,)
            tree = parallel.place(tree, prefix, config, mesh)
        return macko_jax.flax_nnx.from_pure_dict(abstract, tree)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the part that the config.json beside it describes ({error}); pack the "
            "model again"
        ) from error


def decompressed(tree):
    """Nested dicts with a Flax kernel [in, out] in the place of each MackoMatrix [out, in]."""
    return jax.tree.map(
        lambda leaf: macko_jax.decompress(leaf).T if is_matrix(leaf) else leaf,
        tree,
        is_leaf=is_matrix,
    )


def with_values(tree, values):
    """Nested dicts in which each MackoMatrix of 16- or 32-bit values has them rounded to 8 bits."""

    def rounded(leaf):
        if not is_matrix(leaf) or leaf.scales is not None:
            return leaf
        return macko_jax.compress(
            macko_jax.decompress(leaf),
            dtype=values,
            encoding=leaf.encoding,
            lanes=leaf.lanes,
            capacity=shared_capacity,
        )

    return jax.tree.map(rounded, tree, is_leaf=is_matrix)


def is_matrix(leaf):
    return isinstance(leaf, macko_jax.MackoMatrix)
