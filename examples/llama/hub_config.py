"""config.json of a Hugging Face model directory: read into a `Config`, and written from one."""

import pathlib
import re
import warnings

from examples.llama.config import Config, RopeScaling
from examples.llama.json_file import Field, read_fields, read_json

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_MOST = 2**31 - 1  # tokens and positions are int32
_SIZE = {"least": 1, "most": 2**24}
_FIELDS = (
    Field("model_type", str),
    Field("hidden_act", str),
    Field("mlp_bias", bool),
    Field("attention_bias", bool),
    Field("partial_rotary_factor", float),
    Field("vocab_size", int, 1, _MOST, required=True),
    Field("hidden_size", int, **_SIZE, required=True),
    Field("intermediate_size", int, **_SIZE, required=True),
    # Twice as many as any published model has, and few enough to be looked through at once.
    Field("num_hidden_layers", int, 1, 1024, required=True),
    Field("num_attention_heads", int, 1, 2**16, required=True),
    Field("num_key_value_heads", int, 1, 2**16),
    Field("head_dim", int, 2, 2**16),
    Field("max_position_embeddings", int, 1, _MOST, required=True),
    Field("rms_norm_eps", float, 1e-20, 1, required=True),  # 0 gives NaN where a row is zero
    Field("rope_theta", float, 1, 1e15),
    Field("rope_scaling", dict),
    Field("rope_parameters", dict),
    Field("tie_word_embeddings", bool),
    Field("use_sliding_window", bool),
    Field("sliding_window", int, 1, _MOST),
    Field("max_window_layers", int, 0, _MOST),
    Field("layer_types", list, items=str),
    Field("quantization_config", dict),
)
_ONLY = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1}
_ROPE = (
    Field("rope_type", str),
    Field("type", str),  # the older name
    Field("rope_theta", float, 1, 1e15),
    Field("factor", float, 1, 1e6),
    Field("low_freq_factor", float, 1e-6, 1e6),
    Field("high_freq_factor", float, 1e-6, 1e6),
    Field("original_max_position_embeddings", int, 1, _MOST),
    Field("partial_rotary_factor", float),
)
_ROPE_FIELDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def load_config(directory):
    """`Config` of a model directory.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is damaged, or an option is one that the model does not have.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: not a Hugging Face model directory{_hint(directory)}"
        )
    described = read_json(path)
    try:
        return config_from_json(described)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _hint(directory):
    """The remedy for the name of a model on the hub that stands in the place of a directory."""
    if directory.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(directory)):
        return ""
    return (
        f". To fetch a model of that name from the hub: hf download {directory} "
        f"--local-dir {directory.name}; then give --checkpoint={directory.name}"
    )


def config_from_json(described):
    """`Config` from the fields of a config.json.

    Raises:
      ValueError: a field that is missing or malformed, or an architecture or an option that the
        model does not have.
    """
    kind = described.get("model_type") if isinstance(described, dict) else None
    if isinstance(described, dict) and kind not in _MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported; known: {', '.join(_MODEL_TYPES)}")
    found = read_fields(described, _FIELDS)
    rope = _rope(found)
    for name, allowed in _ONLY.items():
        for fields in (found, rope):
            if fields.get(name, allowed) != allowed:
                raise ValueError(f"{name}={fields[name]!r} is not supported; only {allowed!r} is")
    if quantized := found.get("quantization_config"):
        raise ValueError(
            f"quantization_config: weights that are quantized "
            f"({str(quantized.get('quant_method', 'in an unknown way'))[:40]}) are not read, only "
            "those of 16, 32 or 64 bits; fetch the model that these were made from"
        )
    if found.get("attention_bias", False):
        raise ValueError("attention_bias=True is not supported: the output projection has no bias")
    layers, heads = found["num_hidden_layers"], found["num_attention_heads"]
    return Config(
        vocab_size=found["vocab_size"],
        hidden_size=found["hidden_size"],
        intermediate_size=found["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=found.get("num_key_value_heads", heads),
        head_dim=found.get("head_dim", found["hidden_size"] // heads),
        max_position_embeddings=found["max_position_embeddings"],
        rms_norm_eps=found["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope, found["max_position_embeddings"]),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_word_embeddings=found.get("tie_word_embeddings", False),
        sliding_windows=_sliding_windows(found, kind, layers),
    )


def _rope(found):
    """The rotary fields, with `rope_theta`, as transformers reads them.

    Newer files gather them in rope_parameters. A rope_scaling, which users add for longer contexts,
    takes its place as a whole.
    """
    name = "rope_scaling" if found.get("rope_scaling") else "rope_parameters"
    stored = found.get(name, {})
    if any(isinstance(value, dict) for value in stored.values()):
        raise ValueError(f"{name} by the type of a layer is not supported")
    try:
        rope = read_fields(stored, _ROPE)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    theta = rope.setdefault("rope_theta", found.get("rope_theta", 10000.0))
    passed_over = found.get("rope_parameters", {}).get("rope_theta", theta)
    if passed_over != theta:
        warnings.warn(
            f"rope_theta={theta:g} is taken, as transformers does, since rope_scaling has none; "
            f"rope_parameters has {passed_over}: add it to rope_scaling if that is meant",
            stacklevel=2,
        )
    return rope


def _rope_scaling(rope, max_position_embeddings):
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _ROPE_FIELDS:
        known = ", ".join(("default", *_ROPE_FIELDS))
        raise ValueError(f"rope type {kind!r} is not supported; known: {known}")
    if absent := [field for field in _ROPE_FIELDS[kind] if field not in rope]:
        raise ValueError(f"it lacks {', '.join(absent)} of its rope type {kind!r}")
    fields = [rope[field] for field in _ROPE_FIELDS[kind]]
    if kind == "llama3":
        fields.append(rope.get("original_max_position_embeddings", max_position_embeddings))
    return RopeScaling(kind, *fields)


def _sliding_windows(found, kind, layers):
    """One window a layer, or None where every layer sees everything."""
    window = found.get("sliding_window")
    if window is None or (kind != "mistral" and not found.get("use_sliding_window", False)):
        return None
    if kind == "mistral":
        return (window,) * layers
    types = found.get("layer_types")
    if types is None:  # the first max_window_layers layers see everything
        full = found.get("max_window_layers", layers)
        return tuple(None if i < full else window for i in range(layers))
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for {layers} layers")
    if unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types has {min(unknown)!r}, which is not supported")
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
