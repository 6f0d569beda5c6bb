"""Reading and writing Hugging Face model directories: config.json and safetensors.

The byte-level model of this repository is stored in the same layout as published Llama-family
checkpoints, so there is one loader. Stored weights are [out, in]; Flax kernels are [in, out], and
`qkv` and `gate_up` join matrices that are stored apart.
"""

import contextlib
import functools
import json
import os
import pathlib

import dsf_jax
from flax import nnx
import jax.numpy as jnp
import macko_jax
import macko_jax.flax_nnx
import numpy as np
import safetensors
import safetensors.numpy

from examples.llama import model as llama

# Parameter of a block -> the stored tensors that it joins, below "model.layers.N.".
_BLOCK_TENSORS = {
    "attention_norm.scale": ("input_layernorm.weight",),
    "attention.qkv.kernel": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "attention.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attention.query_norm.scale": ("self_attn.q_norm.weight",),
    "attention.key_norm.scale": ("self_attn.k_norm.weight",),
    "attention.out.kernel": ("self_attn.o_proj.weight",),
    "mlp_norm.scale": ("post_attention_layernorm.weight",),
    "mlp.gate_up.kernel": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.kernel": ("mlp.down_proj.weight",),
}
_OTHER_TENSORS = {
    "embed.embedding": ("model.embed_tokens.weight",),
    "norm.scale": ("model.norm.weight",),
    "head.kernel": ("lm_head.weight",),
}


def stored_names(path):
    """Names of the stored tensors that a parameter joins, from its path in the model."""
    if path[0] == "layers":
        prefix = f"model.layers.{path[1]}."
        return tuple(prefix + name for name in _BLOCK_TENSORS[".".join(path[2:])])
    return _OTHER_TENSORS[".".join(path)]


def _sizes(config, path, shape):
    """Output sizes of the tensors that a parameter joins."""
    if "qkv" in path:
        query, rest = config.num_attention_heads, config.num_key_value_heads
        return [heads * config.head_dim for heads in (query, rest, rest)]
    if "gate_up" in path:
        return [config.intermediate_size] * 2
    return [shape[-1] if path[-1] == "kernel" else shape[0]]


def _parameters(model):
    """(path of strings, Param) of every parameter."""
    state = nnx.state(model, nnx.Param)
    return [(tuple(map(str, path)), param) for path, param in nnx.to_flat_state(state)]


def save(directory, model, dtype, extra=None):
    """Writes config.json and model.safetensors, each under a temporary name first.

    Args:
      directory: made if missing.
      model: a dense `Llama`.
      dtype: of the stored weights.
      extra: further fields for config.json.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, param in _parameters(model):
        array = np.asarray(param[...]).astype(dtype)
        if path[-1] == "kernel":
            array = array.T
        cuts = np.cumsum(_sizes(model.config, path, param.shape))[:-1]
        for name, part in zip(stored_names(path), np.split(array, cuts)):
            tensors[name] = np.ascontiguousarray(part)
    with _replacing(directory / "model.safetensors") as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    described = config_to_json(model.config) | {"torch_dtype": jnp.dtype(dtype).name}
    with _replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(described | (extra or {}), indent=2) + "\n")


def load(directory, *, dtype=jnp.float32, param_dtype=None):
    """Reads a model directory.

    Args:
      directory: holds config.json and one or more safetensors files.
      dtype: what the model computes in.
      param_dtype: what it holds its parameters in; by default `dtype`.

    Returns:
      A dense `Llama` on the default device.

    Raises:
      FileNotFoundError: config.json or the tensors are missing.
      ValueError: an unknown architecture, or missing, surplus or misshapen tensors, by name.
    """
    directory = pathlib.Path(directory)
    param_dtype = param_dtype or dtype
    model = abstract_model(load_config(directory), dtype=dtype, param_dtype=param_dtype)
    config = model.config
    parameters = _parameters(model)
    with _Tensors(directory) as tensors:
        wanted = [name for path, _ in parameters for name in stored_names(path)]
        tensors.check_names(wanted, config)
        for path, param in parameters:
            turn = path[-1] == "kernel"
            sizes = _sizes(config, path, param.shape)
            rest = param.shape[:-1] if turn else param.shape[1:]
            parts = [
                tensors.read(name, (size, *rest)) for name, size in zip(stored_names(path), sizes)
            ]
            joined = jnp.asarray(np.concatenate(parts) if len(parts) > 1 else parts[0], param_dtype)
            param.set_value(joined.T if turn else joined)
    return model


PACKED = "packed.safetensors"


def load_any(directory, *, dtype=jnp.float32, param_dtype=None):
    """`load_packed` where the directory holds a packed model, else `load`."""
    if (pathlib.Path(directory) / PACKED).is_file():
        return load_packed(directory, dtype=dtype)
    return load(directory, dtype=dtype, param_dtype=param_dtype)


def save_packed(directory, model):
    """Writes a model with packed layers: config.json and one file that `macko_jax.save` writes.

    Args:
      directory: made if missing.
      model: a `Llama` after `dsf_jax.export.pack` or `macko_jax.flax_nnx.substitute`.

    Returns:
      Size in bytes of the weights' file.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    macko_jax.save(directory / PACKED, macko_jax.flax_nnx.to_pure_dict(model))
    with _replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(config_to_json(model.config), indent=2) + "\n")
    return (directory / PACKED).stat().st_size


def load_packed(directory, *, dtype=jnp.float32):
    """Reads what `save_packed` wrote; parameters keep the dtype in which they are stored.

    Args:
      directory: holds config.json and packed.safetensors.
      dtype: what the model computes in.
    """
    directory = pathlib.Path(directory)
    tree = macko_jax.load(directory / PACKED)
    param_dtype = tree["embed"]["embedding"].dtype
    abstract = abstract_model(load_config(directory), dtype=dtype, param_dtype=param_dtype)
    for block, stored in zip(abstract.layers, tree["layers"].values()):
        for module, name in ((block.attention, "attention"), (block.mlp, "mlp")):
            for layer, arrays in stored[name].items():
                if "left" in arrays:
                    setattr(module, layer, _abstract_pair(getattr(module, layer), arrays))
    return macko_jax.flax_nnx.from_pure_dict(abstract, tree)


def _abstract_pair(linear, arrays):
    """The factor pair that stands in the place of a linear layer."""
    inner = arrays["right"]["kernel"].shape[0]

    def make():
        layer = functools.partial(
            nnx.Linear, dtype=linear.dtype, param_dtype=linear.param_dtype, rngs=nnx.Rngs(0)
        )
        return dsf_jax.FactorPair(
            layer(linear.in_features, inner, use_bias=False),
            layer(inner, linear.out_features, use_bias=linear.bias is not None),
        )

    return nnx.eval_shape(make)


def abstract_model(config, *, dtype, param_dtype):
    """A `Llama` with shapes in the place of arrays."""
    return nnx.eval_shape(
        lambda: llama.Llama(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )


class _Tensors:
    """The tensors of all safetensors files of a directory, read one at a time."""

    def __init__(self, directory):
        self.directory = directory
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"{directory} holds no .safetensors file; convert the checkpoint to safetensors"
            )
        self.files = [safetensors.safe_open(path, framework="np") for path in paths]
        self.owner = {name: file for file in self.files for name in file.keys()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.files:
            file.__exit__(None, None, None)

    def check_names(self, wanted, config):
        """Refuses a set of names that is not exactly the model's."""
        # Buffers of older exports, and the head of a model that uses its embedding as head.
        ignored = {name for name in self.owner if name.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            ignored.add("lm_head.weight")
        missing = sorted(set(wanted) - set(self.owner))
        surplus = sorted(set(self.owner) - set(wanted) - ignored)
        problems = [
            f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            for what, names in (("missing", missing), ("surplus", surplus))
            if names
        ]
        if problems:
            raise ValueError(
                f"the tensors of {self.directory} are not those that its config.json describes; "
                + "; ".join(problems)
            )

    def read(self, name, shape):
        """One tensor as a NumPy array of the expected shape."""
        array = self.owner[name].get_tensor(name)
        if array.shape != shape:
            raise ValueError(
                f"{name} in {self.directory} has shape {array.shape}; config.json asks for {shape}"
            )
        return array


# config.json.

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def load_config(directory):
    """`Config` of a model directory."""
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a Hugging Face model directory")
    return config_from_json(json.loads(path.read_text()))


def config_from_json(described):
    """`Config` from the fields of a config.json.

    Raises:
      ValueError: an architecture or an option that the model does not have.
    """
    kind = described.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported; known: {', '.join(_MODEL_TYPES)}")
    for field, allowed in (("hidden_act", "silu"), ("mlp_bias", False)):
        if described.get(field, allowed) != allowed:
            raise ValueError(f"{field}={described[field]!r} is not supported; only {allowed!r} is")
    if described.get("attention_bias", False):
        raise ValueError("attention_bias=True is not supported: the output projection has no bias")
    required = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    if absent := [field for field in required if field not in described]:
        raise ValueError(f"config.json lacks {', '.join(absent)}")
    layers, heads = described["num_hidden_layers"], described["num_attention_heads"]
    # Newer files gather the rotary fields in rope_parameters.
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    theta = rope.get("rope_theta", described.get("rope_theta", 10000.0))
    return llama.Config(
        vocab_size=described["vocab_size"],
        hidden_size=described["hidden_size"],
        intermediate_size=described["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=described.get("num_key_value_heads") or heads,
        head_dim=described.get("head_dim") or described["hidden_size"] // heads,
        max_position_embeddings=described["max_position_embeddings"],
        rms_norm_eps=described["rms_norm_eps"],
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope, described["max_position_embeddings"]),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_word_embeddings=described.get("tie_word_embeddings", False),
        sliding_windows=_sliding_windows(described, kind, layers),
    )


def _rope_scaling(rope, max_position_embeddings):
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return llama.RopeScaling("linear", rope["factor"])
    if kind == "llama3":
        return llama.RopeScaling(
            "llama3",
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope.get("original_max_position_embeddings", max_position_embeddings),
        )
    raise ValueError(f"rope type {kind!r} is not supported; known: default, linear, llama3")


def _sliding_windows(described, kind, layers):
    """One window a layer, or None where every layer sees everything."""
    window = described.get("sliding_window")
    if window is None or (kind != "mistral" and not described.get("use_sliding_window", False)):
        return None
    if kind == "mistral":
        return (window,) * layers
    types = described.get("layer_types")
    if types is None:  # the first max_window_layers layers see everything
        full = described.get("max_window_layers", layers)
        return tuple(None if i < full else window for i in range(layers))
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def config_to_json(config):
    """Fields of a config.json that describe `config`."""
    if config.qk_norm or config.qkv_bias or config.sliding_windows:
        raise NotImplementedError("only plain Llama configurations are written")
    scaling = config.rope_scaling
    rope = {"rope_type": scaling.kind} if scaling else None
    if scaling:
        fields = ["factor"]
        if scaling.kind == "llama3":
            fields += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        rope |= {field: getattr(scaling, field) for field in fields}
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    )  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_scaling": rope,
    } | {field: getattr(config, field) for field in same}


@contextlib.contextmanager
def _replacing(path):
    """A temporary path beside `path`, renamed to it on success and removed on failure."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
