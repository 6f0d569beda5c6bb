"""Model directories, dense or packed: where callers read and write them, whatever they hold."""

import math

import jax
import jax.numpy as jnp

import macko_jax
import macko_jax.flax_nnx
from examples.llama import parallel
from examples.llama.hub_config import config_from_json, config_to_json, load_config
from examples.llama.packed import (
    is_matrix,
    is_packed,
    load_block,
    load_packed,
    part_file,
    save_packed,
)
from examples.llama.weights import (
    INDEX,
    Checkpoint,
    abstract_model,
    block_tensors,
    dtype_of,
    load,
    save,
)

__all__ = [
    "INDEX",
    "Checkpoint",
    "abstract_model",
    "config_from_json",
    "config_to_json",
    "density",
    "is_packed",
    "load",
    "load_any",
    "load_block",
    "load_config",
    "load_packed",
    "part_file",
    "save",
    "save_packed",
    "share",
    "stored_dtype",
]


def load_any(directory, *, dtype=jnp.float32, param_dtype=None, values=None, tensor_parallel=1):
    """`load_packed` where the directory holds a packed model, else `load`.

    With `values` ("int8" or "float8_e4m3fn"), matrices have their values in 8 bits, those of a
    dense model where enough of a layer's weights are zero. They are rounded as they are:
    examples.compress_llm does better, which knows what layers see. With `tensor_parallel` the model
    is shared out to so many devices, see parallel.py.
    """
    mesh = None
    if tensor_parallel > 1:
        mesh = parallel.make_mesh(tensor_parallel, load_config(directory))
    if is_packed(directory):
        return load_packed(directory, dtype=dtype, values=values, mesh=mesh)
    if values is None:
        return load(directory, dtype=dtype, param_dtype=param_dtype, mesh=mesh)
    model = load(directory, dtype=dtype, param_dtype=param_dtype)
    rule = macko_jax.Rule("layers/.*", dtype=values)
    model = macko_jax.flax_nnx.substitute(model, rule)[0]
    return model if mesh is None else share(model, mesh)


def share(model, mesh):
    """A model, dense or with packed layers, shared out to the devices of a mesh."""
    abstract = abstract_model(
        model.config, dtype=model.dtype, param_dtype=model.embed.embedding.dtype
    )
    tree = parallel.place(macko_jax.flax_nnx.to_pure_dict(model), (), model.config, mesh)
    return parallel.spread(macko_jax.flax_nnx.from_pure_dict(abstract, tree), mesh)


def stored_dtype(directory):
    """The dtype of a dense or packed model's weights, from its embedding."""
    if is_packed(directory):
        return dtype_of(part_file(directory, "embed"), "embedding")
    return Checkpoint(directory).dtype()


def density(directory):
    """Non-zeros over all weights of the decoder's linear layers; 1 for a dense model."""
    if not is_packed(directory):
        return 1.0
    config = load_config(directory)
    shapes = [shape for joined in block_tensors(config).values() for shape in joined.values()]
    size = config.num_hidden_layers * sum(math.prod(s) for s in shapes if len(s) > 1)
    nonzeros = 0
    for i in range(config.num_hidden_layers):
        stored = jax.tree.leaves(macko_jax.load(part_file(directory, i)), is_leaf=is_matrix)
        nonzeros += sum(
            leaf.nnz if is_matrix(leaf) else leaf.size if leaf.ndim > 1 else 0 for leaf in stored
        )
    return nonzeros / size
