"""Reading and writing Hugging Face model directories: config.json and safetensors.

The byte-level model of this repository is stored in the same layout as published Llama-family
checkpoints, so there is one loader. Stored weights are [out, in]; Flax kernels are [in, out], and
`qkv` and `gate_up` join matrices that are stored apart.
"""

import contextlib
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

import dsf_jax
import macko_jax
import macko_jax.flax_nnx
from examples.llama.config import Config, RopeScaling
from examples.llama.model import Llama
from examples.records import replacing, write_json

INDEX = "model.safetensors.index.json"  # names the file of every tensor

# Parameter of a block -> the stored tensors that it joins, below "model.layers.N.".
_BLOCK_TENSORS = {
    "attention_norm.scale": ("input_layernorm.weight",),
    "attention.qkv.kernel": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "attention.qkv.bias": (
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    ),
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
    with replacing(directory / "model.safetensors") as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    (directory / INDEX).unlink(missing_ok=True)  # of a checkpoint that was there
    described = config_to_json(model.config) | {"torch_dtype": jnp.dtype(dtype).name}
    write_json(directory / "config.json", described | (extra or {}))


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
    stored = Checkpoint(directory)
    model = abstract_model(stored.config, dtype=dtype, param_dtype=param_dtype or dtype)
    stored.fill(model)
    return model


class Stored(NamedTuple):
    """Where a tensor is, its shape, and its type as safetensors calls it."""

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A dense model directory, whose tensors are read when they are asked for.

    Files are open only while they are read, so that what was read leaves memory.

    Args:
      directory: holds config.json and one or more safetensors files, or those that its index names.

    Attributes:
      config: the model's `Config`.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.config = load_config(directory)
        self._stored = {}
        for path in self._files():
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    self._add(name, path, file.get_slice(name))
        self._check_tensors()

    def _files(self):
        """The model's files: those that its index names, where it has one."""
        index = self.directory / INDEX
        if index.is_file():
            named = _read_json(index).get("weight_map", {}).values()
            paths = sorted(self.directory / name for name in set(named))
            if absent := [path.name for path in paths if not path.is_file()]:
                raise FileNotFoundError(
                    f"{self.directory} lacks {', '.join(absent)}, which {INDEX} names; fetch the "
                    "whole checkpoint"
                )
        else:
            paths = sorted(self.directory.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"{self.directory} holds no .safetensors file; convert the checkpoint to "
                "safetensors"
            )
        return paths

    def _add(self, name, path, tensor):
        if name in self._stored:
            raise ValueError(
                f"{name} is in both {self._stored[name].path} and {path}; remove the file that is "
                f"not the model's, or name the others in {INDEX}"
            )
        self._stored[name] = Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())

    def fill(self, module, prefix=()):
        """Gives an abstract module its parameters.

        Args:
          module: a `Llama` or a part of one, with shapes in the place of arrays.
          prefix: path of the part in the model, such as ("layers", "3").
        """
        parameters = [((*prefix, *path), param) for path, param in _parameters(module)]
        names = [name for path, _ in parameters for name in stored_names(path)]
        with contextlib.ExitStack() as stack:
            files = {
                path: stack.enter_context(_open(path))
                for path in sorted({self._stored[name].path for name in names})
            }
            for path, param in parameters:
                parts = [
                    files[self._stored[name].path].get_tensor(name) for name in stored_names(path)
                ]
                joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
                joined = jnp.asarray(joined, param.dtype)
                param.set_value(joined.T if path[-1] == "kernel" else joined)

    def dtype(self):
        """Of the stored embedding, and so in practice of every tensor."""
        (name,) = stored_names(("embed", "embedding"))
        return _dtype_of(self._stored[name].path, name)

    def _check_tensors(self):
        """Refuses a set of tensors that is not exactly the model's, before any is read."""
        model = abstract_model(self.config, dtype=jnp.float32, param_dtype=jnp.float32)
        wanted = {}
        for path, param in _parameters(model):
            rest = param.shape[:-1] if path[-1] == "kernel" else param.shape[1:]
            sizes = _sizes(self.config, path, param.shape)
            wanted |= {name: (size, *rest) for name, size in zip(stored_names(path), sizes)}
        # Buffers of older exports, and the head of a model that uses its embedding as head.
        ignored = {name for name in self._stored if name.endswith("rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            ignored.add("lm_head.weight")
        there = [(name, self._stored[name]) for name in sorted(wanted.keys() & self._stored.keys())]
        misshapen = [
            f"{name} of shape {stored.shape} instead of {wanted[name]}"
            for name, stored in there
            if stored.shape != wanted[name]
        ]
        other_types = [
            f"{name} of {stored.dtype}"
            for name, stored in there
            if not stored.dtype.startswith(("F", "BF"))
        ]
        problems = [
            f"{len(found)} {what}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
            for what, found in (
                ("missing", sorted(wanted.keys() - self._stored.keys())),
                ("surplus", sorted(self._stored.keys() - wanted.keys() - ignored)),
                ("misshapen", misshapen),
                ("not of floats", other_types),
            )
            if found
        ]
        if problems:
            raise ValueError(
                f"the tensors of {self.directory} are not those that its config.json describes; "
                + "; ".join(problems)
            )


def _open(path):
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). It was cut off, or only points to "
            "the file (git-lfs); fetch it again"
        ) from error


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error


def _dtype_of(path, name):
    with _open(path) as file:
        return file.get_slice(name)[:1].dtype


def stored_dtype(directory):
    """The dtype of a dense or packed model's weights, from its embedding."""
    if is_packed(directory):
        return _dtype_of(part_file(directory, "embed"), "embedding")
    return Checkpoint(directory).dtype()


# Packed models: one file that `macko_jax.save` writes for each part, and config.json, which comes
# last and so marks a whole model.


def part_file(directory, name):
    """File of a part of a packed model: "embed", "norm", "head" or the number of a block."""
    name = f"{int(name):05d}" if str(name).isdigit() else name
    return pathlib.Path(directory) / f"packed-{name}.safetensors"


def _part_names(config):
    ends = ("embed", "norm") if config.tie_word_embeddings else ("embed", "norm", "head")
    return (*ends, *range(config.num_hidden_layers))


def is_packed(directory):
    """Whether a directory holds a packed model."""
    return part_file(directory, "embed").is_file()


def load_any(directory, *, dtype=jnp.float32, param_dtype=None):
    """`load_packed` where the directory holds a packed model, else `load`."""
    if is_packed(directory):
        return load_packed(directory, dtype=dtype)
    return load(directory, dtype=dtype, param_dtype=param_dtype)


def save_packed(directory, model):
    """Writes a model with packed layers.

    Args:
      directory: made if missing.
      model: a `Llama` after `dsf_jax.export.pack` or `macko_jax.flax_nnx.substitute`.

    Returns:
      Size in bytes of the files of weights.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    tree = macko_jax.flax_nnx.to_pure_dict(model)
    files = []
    for name in _part_names(model.config):
        files.append(part_file(directory, name))
        macko_jax.save(files[-1], tree["layers"][name] if isinstance(name, int) else tree[name])
    write_json(directory / "config.json", config_to_json(model.config))
    return sum(file.stat().st_size for file in files)


def load_packed(directory, *, dtype=jnp.float32, unpack=False):
    """Reads a packed model; parameters keep the dtype in which they are stored.

    Args:
      directory: what `save_packed` or examples.compress_llm wrote.
      dtype: what the model computes in.
      unpack: give the pruned dense model instead, every matrix decompressed.

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
    names = _part_names(config)
    missing = [
        part_file(directory, name).name
        for name in names
        if not part_file(directory, name).is_file()
    ]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing[:8])}; run what packed it to its end"
        )
    parts = {name: macko_jax.load(part_file(directory, name)) for name in names}
    tree = {name: part for name, part in parts.items() if isinstance(name, str)}
    tree["layers"] = {name: part for name, part in parts.items() if isinstance(name, int)}
    param_dtype = tree["embed"]["embedding"].dtype
    abstract = abstract_model(config, dtype=dtype, param_dtype=param_dtype)
    for block, stored in zip(abstract.layers, tree["layers"].values()):
        _expect_pairs(block, stored)
    return macko_jax.flax_nnx.from_pure_dict(abstract, decompressed(tree) if unpack else tree)


def load_block(directory, index, abstract_block, *, unpack=False):
    """One block of a packed model, on an abstract block of its configuration."""
    stored = macko_jax.load(part_file(directory, index))
    block = nnx.clone(abstract_block)
    _expect_pairs(block, stored)
    return macko_jax.flax_nnx.from_pure_dict(block, decompressed(stored) if unpack else stored)


def density(directory):
    """Non-zeros over all weights of the decoder's linear layers; 1 for a dense model."""
    if not is_packed(directory):
        return 1.0
    nonzeros = size = 0
    config = load_config(directory)
    model = abstract_model(config, dtype=jnp.float32, param_dtype=jnp.float32)
    for i, block in enumerate(model.layers):
        size += sum(p.size for path, p in _parameters(block) if path[-1] == "kernel")
        stored = jax.tree.leaves(macko_jax.load(part_file(directory, i)), is_leaf=_is_matrix)
        nonzeros += sum(
            leaf.nnz if _is_matrix(leaf) else leaf.size if leaf.ndim > 1 else 0 for leaf in stored
        )
    return nonzeros / size


def decompressed(tree):
    """Nested dicts with a Flax kernel [in, out] in the place of each MackoMatrix [out, in]."""
    return jax.tree.map(
        lambda leaf: macko_jax.decompress(leaf).T if _is_matrix(leaf) else leaf,
        tree,
        is_leaf=_is_matrix,
    )


def _is_matrix(leaf):
    return isinstance(leaf, macko_jax.MackoMatrix)


def _expect_pairs(abstract_block, stored):
    """Puts abstract factor pairs into a block where the stored arrays are pairs."""
    for name in ("attention", "mlp"):
        module = getattr(abstract_block, name)
        for layer, arrays in stored[name].items():
            if "left" in arrays:
                setattr(module, layer, _abstract_pair(getattr(module, layer), arrays))


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
        lambda: Llama(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )


# config.json.

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_FIELDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def load_config(directory):
    """`Config` of a model directory."""
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a Hugging Face model directory")
    return config_from_json(_read_json(path))


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
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    if absent := [field for field in required if field not in described]:
        raise ValueError(f"config.json lacks {', '.join(absent)}")
    layers, heads = described["num_hidden_layers"], described["num_attention_heads"]
    # Newer files gather the rotary fields in rope_parameters.
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    theta = rope.get("rope_theta", described.get("rope_theta", 10000.0))
    return Config(
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
    if kind not in _ROPE_FIELDS:
        known = ", ".join(("default", *_ROPE_FIELDS))
        raise ValueError(f"rope type {kind!r} is not supported; known: {known}")
    if absent := [field for field in _ROPE_FIELDS[kind] if field not in rope]:
        raise ValueError(f"config.json lacks {', '.join(absent)} of its rope type {kind!r}")
    fields = [rope[field] for field in _ROPE_FIELDS[kind]]
    if kind == "llama3":
        fields.append(rope.get("original_max_position_embeddings", max_position_embeddings))
    return RopeScaling(kind, *fields)


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
    if config.qk_norm and config.qkv_bias:
        raise ValueError("no known architecture has both biases of q, k, v and norms of q and k")
    windows = set(config.sliding_windows or ())
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    fields = {}
    if windows and kind == "llama":
        if len(windows) > 1:
            raise ValueError("sliding windows that differ by layer are known for Qwen only")
        kind = "mistral"
        fields = {"sliding_window": windows.pop()}
    elif windows:
        (width,) = windows - {None}
        types = ["sliding_attention" if w else "full_attention" for w in config.sliding_windows]
        fields = {"sliding_window": width, "use_sliding_window": True, "layer_types": types}
    scaling = config.rope_scaling
    if scaling:
        fields["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            fields["rope_scaling"] |= {name: getattr(scaling, name) for name in names}
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
    )
    described = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
    }
    return described | {field: getattr(config, field) for field in same} | fields
