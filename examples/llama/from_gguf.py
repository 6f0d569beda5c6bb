"""Conversion of GGUF files of Llama-architecture models into Hugging Face directories."""

import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from examples.files import regular_file
from examples.llama.hub_config import config_from_json
from examples.llama.weights import model_tensors
from examples.records import write_json
from macko_jax.io.atomic import replacing

# Tensors of a block in a GGUF file -> in a Hugging Face checkpoint.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What the package gguf raises for a file that is damaged.
DAMAGE = (ValueError, LookupError, TypeError, OverflowError, AttributeError, MemoryError, OSError)
ENDS = ("bos_token_id", "eos_token_id")  # of config.json
CONTROL = 3  # the type of tokens that stand for no text
DIGITS_ONE_BY_ONE = ("smollm", "starcoder", "refact", "command-r")  # pre-tokenizers, by name


class Fields(dict):
    """The metadata of a GGUF file, by name; one that is missing is a ValueError."""

    def __missing__(self, name):
        raise ValueError(f"the GGUF file lacks the field {name}")


def stored_name(name: str) -> str:
    """The name of a GGUF file's tensor in a Hugging Face checkpoint."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    kind, _, rest = name.partition(".")
    number, _, layer = rest.partition(".")
    layer, _, what = layer.rpartition(".")
    if kind != "blk" or layer not in BLOCK_NAMES:
        raise ValueError(
            f"tensor {name!r} belongs to no Llama block; only models of the plain Llama "
            "architecture are converted"
        )
    return f"model.layers.{number}.{BLOCK_NAMES[layer]}.{what}"


def split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the order of a query or key projection's rows in a GGUF file.

    Rotary embeddings turn element i of a head together with element i + D / 2. GGUF files of this
    architecture store the two of each pair side by side.

    Args:
        weight: [heads * D, in].
        heads: number of heads that the rows belong to.

    Returns:
        [heads * D, in], the first halves of each head before the second ones.
    """
    paired = weight.reshape(heads, -1, 2, weight.shape[-1])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def read_config(fields: dict, tensors: set[str], dtype: str) -> dict:
    """The fields of config.json, from those of a GGUF file."""

    def field(name, default=None):
        name = f"llama.{name}"
        return fields[name] if default is None else fields.get(name, default)

    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"the architecture is {architecture!r}; only 'llama' is converted")
    heads = field("attention.head_count")
    hidden = field("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("rope.dimension_count", hidden // heads),
        "max_position_embeddings": field("context_length"),
        # The shortest decimal number that is this float32.
        "rms_norm_eps": float(str(np.float32(field("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": dtype,
    }


def make_tokenizer(fields: dict):
    """The `tokenizers.Tokenizer` of a GGUF file with byte-level BPE."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"the tokenizer is of kind {kind!r}; only byte-level BPE ('gpt2') is converted: copy "
            "the model's own tokenizer.json into the directory"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    )
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if fields.get("tokenizer.ggml.pre") in DIGITS_ONE_BY_ONE:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        t for t, type_ in zip(tokens, fields["tokenizer.ggml.token_type"]) if type_ == CONTROL
    ]
    tokenizer.add_special_tokens(control)
    if fields.get("tokenizer.ggml.add_bos_token"):
        first = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
    return tokenizer


def read_tensors(reader, config: dict, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face checkpoint by name: those of its config.json, of their shapes.

    Raises:
        ValueError: the file has other tensors, or numbers beyond the range of `dtype`.
    """
    import gguf

    wanted = {
        name: shape
        for shapes in model_tensors(config_from_json(config)).values()
        for name, shape in shapes.items()
    }
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        name = stored_name(tensor.name)
        if name not in wanted or name in tensors:
            raise ValueError(f"tensor {tensor.name!r} is surplus, or there twice")
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if weight.shape != wanted[name]:
            raise ValueError(
                f"tensor {tensor.name!r} has shape {weight.shape} instead of {wanted[name]}"
            )
        layer = name.split(".")[-2]
        if layer in heads:
            weight = split_halves(weight, heads[layer])
        rounded = weight.astype(jnp.dtype(dtype))
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise ValueError(f"tensor {tensor.name!r} does not fit {dtype}; choose another --dtype")
        tensors[name] = np.ascontiguousarray(rounded)
    if missing := wanted.keys() - tensors.keys():
        raise ValueError(f"the GGUF file lacks the tensor {min(missing)}")
    return tensors


def describe_tokens(fields: dict, config: dict) -> dict:
    """The fields of tokenizer_config.json: the special tokens, and the template if there is one."""
    tokens = fields["tokenizer.ggml.tokens"]
    for name in ENDS:
        if config[name] is not None and not 0 <= config[name] < len(tokens):
            raise ValueError(f"{name}={config[name]} is none of {len(tokens)} tokens")
    names = {n.removesuffix("_id"): tokens[i] for n in ENDS if (i := config[n]) is not None}
    if (template := fields.get("tokenizer.chat_template")) is None:
        return names
    if not isinstance(template, str):
        raise ValueError("tokenizer.chat_template must be text")
    return names | {"chat_template": template}


def convert(source, directory, dtype="float16") -> None:
    """Writes the Hugging Face directory of a GGUF file.

    Args:
        source: path of the GGUF file.
        directory: is made if it is missing.
        dtype: type of the stored weights; numbers beyond its range are refused.

    Raises:
        ImportError: the package `gguf` is missing.
        ValueError: the model or its tokenizer is of another kind.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files are read by the package gguf: pip install gguf, or install this project "
            "with the extra [hf]"
        ) from error
    source = regular_file(source)
    try:
        reader = gguf.GGUFReader(source)
        fields = Fields({name: field.contents() for name, field in reader.fields.items()})
    except DAMAGE as error:
        raise ValueError(f"{source} is not a whole GGUF file ({error}); fetch it again") from error
    try:
        config = read_config(fields, {tensor.name for tensor in reader.tensors}, dtype)
        tensors = read_tensors(reader, config, dtype)
        tokenizer = make_tokenizer(fields)
        described = describe_tokens(fields, config)
    except Exception as error:  # the package tokenizers raises nothing more special
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{source} cannot be converted: {said}") from error
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    with replacing(directory / "model.safetensors") as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    if "chat_template" in described:
        write_json(directory / "tokenizer_config.json", described)
    write_json(directory / "generation_config.json", {name: config[name] for name in ENDS})
    write_json(directory / "config.json", config)  # last: a directory without it is no model
