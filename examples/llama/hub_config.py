"""config.json of a Hugging Face model directory: read into a `Config`, and written from one."""

import json
import pathlib

from examples.llama.config import Config, RopeScaling

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_FIELDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def load_config(directory):
    """`Config` of a model directory."""
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a Hugging Face model directory")
    return config_from_json(read_json(path))


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


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
