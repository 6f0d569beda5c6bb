"""Model directories, dense or packed: where callers read and write them, whatever they hold."""

import math

import jax
import jax.numpy as jnp

import macko_jax
import macko_jax.flax_nnx
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
from macko_jax.format.choose import layout_here

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
    "stored_dtype",
]


def load_any(directory, *, dtype=jnp.float32, param_dtype=None, values=None):
    """`load_packed` where the directory holds a packed model, else `load`.

    With `values` ("int8" or "float8_e4m3fn"), matrices have their values in 8 bits, those of a
    dense model where enough of a layer's weights are zero. They are rounded as they are:
    examples.compress_llm does better, which knows what layers see.
    """
    if is_packed(directory):
        return load_packed(directory, dtype=dtype, values=values)
    model = load(directory, dtype=dtype, param_dtype=param_dtype)
    if values is None:
        return model
    rule = macko_jax.Rule("layers/.*", dtype=values, **layout_here())
    return macko_jax.flax_nnx.substitute(model, rule)[0]


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
