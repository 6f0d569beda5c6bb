"""Makes the tiny random checkpoints in tests/data/llama, with logits by `transformers`.

Needs torch and transformers, which nothing else in the project does:

    pip install torch transformers tokenizers
    python tests/make_llama_fixtures.py
"""

import pathlib

import safetensors.torch
import tokenizers
import torch
import transformers

OUT = pathlib.Path(__file__).parent / "data" / "llama"

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_theta": 1e6}),
}


def make(name, model_type, changes):
    config = transformers.AutoConfig.for_model(model_type, **(COMMON | changes))
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start as constants, which would hide a wrong assignment.
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        tokens = torch.randint(0, config.vocab_size, (2, 24))
        logits = model.eval()(tokens).logits
    # The first family is stored in shards, the others in one file.
    model.save_pretrained(OUT / name, max_shard_size="40KB" if name == "llama2" else "1GB")
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    safetensors.torch.save_file(
        {"tokens": tokens.to(torch.int32), "logits": logits.contiguous()},
        OUT / f"{name}.expected.safetensors",
    )


def make_tokenizer():
    """A byte-level BPE of 300 tokens, trained on this file."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([__file__], trainer)
    tokenizer.save(str(OUT / "tokenizer.json"))


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, (model_type, changes) in FAMILIES.items():
        make(name, model_type, changes)
    make_tokenizer()
