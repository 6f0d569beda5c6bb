"""The shape of a model: its options, and those of published models."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training context.

    `kind` is "linear" (every frequency is divided by `factor`) or "llama3" (only wavelengths
    longer than the original context are, with a ramp between the two frequency factors).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"rope scaling {self.kind!r} is not supported; use 'linear' or 'llama3'"
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be less than "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model. Fields that Hugging Face's config.json has keep their names there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm of each query and key head before the rotation
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] | None = None  # one entry a layer; None sees everything

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even, and not 0, for rotary embeddings"
            )
        windows = self.sliding_windows
        if windows is not None and len(windows) != self.num_hidden_layers:
            raise ValueError(
                f"sliding_windows has {len(windows)} entries for {self.num_hidden_layers} layers"
            )

    def check_tokens(self, tokens):
        """Refuses token ids that are not in the vocabulary, which a lookup would make others of."""
        tokens = np.asarray(tokens)
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token {outside[0]} is not in the model's vocabulary of {self.vocab_size} tokens, "
                "from 0; encode the text with the model's own tokenizer"
            )


# Shapes of published models, and a tiny one for trying things out.
CONFIGS = {
    "llama2_7b": Config(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama2_13b": Config(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama2_70b": Config(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama3_8b": Config(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=5e5,
    ),
    "qwen3_8b": Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm=True,
    ),
    "tiny": Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    ),
}
