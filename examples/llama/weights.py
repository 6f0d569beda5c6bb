"""Dense model directories as Hugging Face has them: config.json and safetensors.

The byte-level model of this repository is stored in the same layout as published Llama-family
checkpoints, so there is one loader. Stored weights are [out, in]; Flax kernels are [in, out], and
`qkv` and `gate_up` join matrices that are stored apart.
"""

import contextlib
import functools
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

import macko_jax.flax_nnx
from examples.files import regular_file
from examples.llama import parallel
from examples.llama.hub_config import config_to_json, load_config
from examples.llama.json_file import Field, read_json
from examples.llama.model import Llama
from examples.records import write_json
from macko_jax.io.atomic import replacing

INDEX = "model.safetensors.index.json"  # names the file of every tensor

WHOLE = "model.safetensors"  # holds every tensor of a model that is not cut into shards
# What safetensors calls the types that are read.
FLOATS = ("F64", "F32", "F16", "BF16")


def block_tensors(config):
    """The stored tensors that each parameter of a block joins, and their shapes.

    Returns:
      A dict from the parameter's path below the block to a dict from a name, below
      "model.layers.N.", to a shape.
    """
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads * dim, config.num_key_value_heads * dim
    projections = {"q_proj": query, "k_proj": key, "v_proj": key}
    joined = {
        "attention_norm.scale": {"input_layernorm.weight": (hidden,)},
        "attention.qkv.kernel": {
            f"self_attn.{name}.weight": (size, hidden) for name, size in projections.items()
        },
        "attention.out.kernel": {"self_attn.o_proj.weight": (hidden, query)},
        "mlp_norm.scale": {"post_attention_layernorm.weight": (hidden,)},
        "mlp.gate_up.kernel": {
            f"mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")
        },
        "mlp.down.kernel": {"mlp.down_proj.weight": (hidden, inner)},
    }
    if config.qkv_bias:
        joined["attention.qkv.bias"] = {
            f"self_attn.{name}.bias": (size,) for name, size in projections.items()
        }
    if config.qk_norm:
        joined["attention.query_norm.scale"] = {"self_attn.q_norm.weight": (dim,)}
        joined["attention.key_norm.scale"] = {"self_attn.k_norm.weight": (dim,)}
    return joined


def model_tensors(config):
    """As `block_tensors`, for the parameters of the whole model, names and paths from its top."""
    table = (config.vocab_size, config.hidden_size)
    joined = {
        "embed.embedding": {"model.embed_tokens.weight": table},
        "norm.scale": {"model.norm.weight": (config.hidden_size,)},
    }
    if not config.tie_word_embeddings:
        joined["head.kernel"] = {"lm_head.weight": table}
    block = block_tensors(config)
    for i in range(config.num_hidden_layers):
        for path, tensors in block.items():
            joined[f"layers.{i}.{path}"] = {
                f"model.layers.{i}.{name}": shape for name, shape in tensors.items()
            }
    return joined


def parameters(model):
    """(path of strings, Param) of every parameter."""
    state = nnx.state(model, nnx.Param)
    return [(tuple(map(str, path)), param) for path, param in nnx.to_flat_state(state)]


def save(directory, model, dtype, extra=None):
    """Writes config.json and model.safetensors, each under a temporary name first.

    Args:
      directory: made if missing.
      model: a dense `Llama`.
      dtype: the type of the stored weights.
      extra: further fields for config.json.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, joined = {}, model_tensors(model.config)
    for path, param in parameters(model):
        array = np.asarray(param[...]).astype(dtype)
        if path[-1] == "kernel":
            array = array.T
        shapes = joined[".".join(path)]
        cuts = np.cumsum([shape[0] for shape in shapes.values()])[:-1]
        for name, part in zip(shapes, np.split(array, cuts)):
            tensors[name] = np.ascontiguousarray(part)
    with replacing(directory / WHOLE) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    (directory / INDEX).unlink(missing_ok=True)  # of a checkpoint that was there
    described = config_to_json(model.config) | {"torch_dtype": jnp.dtype(dtype).name}
    write_json(directory / "config.json", described | (extra or {}))


def load(directory, *, dtype=jnp.float32, param_dtype=None, mesh=None):
    """Reads a model directory.

    Args:
      directory: holds config.json and one or more safetensors files.
      dtype: what the model computes in.
      param_dtype: what it holds its parameters in; by default `dtype`.
      mesh: the devices that share the model, see parallel.py; None for the default one.

    Returns:
      A dense `Llama`.

    Raises:
      FileNotFoundError: config.json or the tensors are missing.
      ValueError: an unknown architecture, or missing, surplus or misshapen tensors, by name.
    """
    stored = Checkpoint(directory)
    model = abstract_model(stored.config, dtype=dtype, param_dtype=param_dtype or dtype)
    if mesh is None:
        stored.fill(model)
        return model
    for prefix, abstract, put in parts(model):  # so that no device ever holds all of it
        part = stored.read(abstract, prefix)
        tree = parallel.place(nnx.to_pure_dict(nnx.state(part)), prefix, stored.config, mesh)
        put(macko_jax.flax_nnx.from_pure_dict(abstract, tree))
    return parallel.spread(model, mesh)


def parts(model):
    """(path, part, function that puts another in its place): the ends, and each block."""
    names = ("embed", "norm") if model.head is None else ("embed", "norm", "head")
    ends = [((n,), getattr(model, n), functools.partial(setattr, model, n)) for n in names]
    blocks = [
        (("layers", str(i)), block, functools.partial(model.layers.__setitem__, i))
        for i, block in enumerate(model.layers)
    ]
    return ends + blocks


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
        self._joined = model_tensors(self.config)
        self._stored = {}
        for path in self._files():
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    self._add(name, path, file.get_slice(name))
        self._check_tensors()

    def _files(self):
        """The model's files: those that its index names, where it has one."""
        index, whole = self.directory / INDEX, self.directory / WHOLE
        if index.exists():
            paths = sorted(self.directory / name for name in _names_of(index))
            if absent := [path.name for path in paths if not path.exists()]:
                raise FileNotFoundError(
                    f"{self.directory} lacks {', '.join(absent)}, which {INDEX} names; fetch the "
                    "whole checkpoint"
                )
        elif whole.exists():  # others beside it are adapters, or the same weights once more
            paths = [whole]
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

    @property
    def files(self):
        """The safetensors files that hold its tensors."""
        return sorted({stored.path for stored in self._stored.values()})

    def read(self, abstract, prefix):
        """A part of the model, such as a block at ("layers", "3"), that is abstract until then."""
        part = nnx.clone(abstract)
        self.fill(part, prefix)
        return part

    def fill(self, module, prefix=()):
        """Gives an abstract module its parameters.

        Args:
          module: a `Llama` or a part of one, with shapes in the place of arrays.
          prefix: path of the part in the model, such as ("layers", "3").
        """
        wanted = [((*prefix, *path), param) for path, param in parameters(module)]
        names = [name for path, _ in wanted for name in self._joined[".".join(path)]]
        with contextlib.ExitStack() as stack:
            files = {
                path: stack.enter_context(_open(path))
                for path in sorted({self._stored[name].path for name in names})
            }
            for path, param in wanted:
                parts = [
                    files[self._stored[name].path].get_tensor(name)
                    for name in self._joined[".".join(path)]
                ]
                if len({part.dtype for part in parts}) > 1:  # no two types need have a common one
                    parts = [part.astype(param.dtype) for part in parts]
                joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
                joined = jnp.asarray(joined, param.dtype)
                param.set_value(joined.T if path[-1] == "kernel" else joined)

    def dtype(self):
        """The dtype of the stored embedding, and so in practice of every tensor."""
        (name,) = self._joined["embed.embedding"]
        return dtype_of(self._stored[name].path, name)

    def _check_tensors(self):
        """Refuses a set of tensors that is not exactly the model's, before any is read."""
        wanted = {name: shape for shapes in self._joined.values() for name, shape in shapes.items()}
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
            f"{name} of {stored.dtype}" for name, stored in there if stored.dtype not in FLOATS
        ]
        problems = [
            f"{len(found)} {what}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
            for what, found in (
                ("missing", sorted(wanted.keys() - self._stored.keys())),
                ("surplus", sorted(self._stored.keys() - wanted.keys() - ignored)),
                ("misshapen", misshapen),
                (f"not of {', '.join(FLOATS)}", other_types),
            )
            if found
        ]
        if problems:
            raise ValueError(
                f"the tensors of {self.directory} are not those that its config.json describes; "
                + "; ".join(problems)
                + ("; convert the checkpoint to one of these types" if other_types else "")
            )


def _names_of(index):
    """Names of the files that an index names, all of them beside it."""
    named = read_json(index, [Field("weight_map", dict, required=True)])["weight_map"].values()
    for name in named:
        file = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) < 256
        if not file or pathlib.PurePath(name).name != name:
            raise ValueError(
                f"{index}: weight_map must name files beside it, got {str(name)[:60]!r}"
            )
    return set(named)


def _open(path):
    regular_file(path)
    try:
        return safetensors.safe_open(path, framework="np")
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error})") from error
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). It was cut off, or only points to "
            "the file (git-lfs); fetch it again"
        ) from error


def dtype_of(path, name):
    """The dtype of a tensor in a safetensors file; a ValueError unless models compute in it."""
    with _open(path) as file:
        if name not in file.keys():  # noqa: SIM118 (no dict)
            raise ValueError(f"{path} has no tensor {name!r}; it is not the file of that name")
        stored = file.get_slice(name)
        if stored.get_dtype() not in FLOATS:
            raise ValueError(
                f"{path}: tensor {name!r} is of {stored.get_dtype()}, not of {', '.join(FLOATS)}"
            )
        return stored[:1].dtype


def abstract_model(config, *, dtype, param_dtype):
    """A `Llama` with shapes in the place of arrays."""
    return nnx.eval_shape(
        lambda: Llama(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
