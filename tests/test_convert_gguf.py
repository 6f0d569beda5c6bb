"""Converting GGUF files: names, the order of rotary pairs, quantized tensors, the tokenizer."""

import json
import os
import unittest.mock

import numpy as np
import pytest
import safetensors.numpy

from examples.llama import checkpoint, from_gguf, tokenizer
from tests.scripts import run

gguf = pytest.importorskip("gguf")

LLAMA = [f"llama.{name}" for name in ("attention.head_count", "embedding_length")]
# Pairs of the layers of a block share their shapes, and so programs.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 128, 4, 2, 16, 64, 2


def pair_up(weight, heads):
    """The order of rows that GGUF files of Llama models have: i beside i + D / 2 of each head."""
    halves = weight.reshape(heads, 2, HEAD_DIM // 2, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def byte_tokens():
    """The 256 tokens of byte-level BPE, as the letters that stand for the bytes."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def stored():
    """Tensors of a small model under their Hugging Face names, float16."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float16)
    tensors = {"model.embed_tokens.weight": draw(259, HIDDEN), "model.norm.weight": draw(HIDDEN)}
    for i in range(LAYERS):
        tensors |= {
            f"model.layers.{i}.input_layernorm.weight": draw(HIDDEN),
            f"model.layers.{i}.self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, HIDDEN),
            f"model.layers.{i}.self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            f"model.layers.{i}.self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            f"model.layers.{i}.post_attention_layernorm.weight": draw(HIDDEN),
            f"model.layers.{i}.mlp.gate_proj.weight": draw(MLP, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": draw(MLP, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": draw(HIDDEN, MLP),
        }
    return tensors


def write(path, stored, architecture="llama", kind="gpt2", quantized=()):
    """A GGUF file of the tensors, those that are named in 8 bits."""
    blocks = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_block_count(len(blocks))
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|start|>", "<|end|>", *byte_tokens(), "he"])
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    names = {v: k for k, v in from_gguf.OTHER_NAMES.items()}
    layers = {v: k for k, v in from_gguf.BLOCK_NAMES.items()}
    for name, weight in stored.items():
        if name not in names:
            number, layer = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            names[name] = f"blk.{number}.{layers[layer]}.weight"
        for end, heads in (("q_proj.weight", HEADS), ("k_proj.weight", KV_HEADS)):
            weight = pair_up(weight, heads) if name.endswith(end) else weight
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(
                names[name], gguf.quantize(weight.astype(np.float32), kind), None, kind
            )
        else:
            writer.add_tensor(names[name], weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_converted_model_is_the_one_that_was_written(tmp_path, stored):
    down = "model.layers.1.mlp.down_proj.weight"
    source = write(tmp_path / "model.gguf", stored, quantized=[down])
    from_gguf.convert(source, tmp_path / "out")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == stored.keys()
    for name in stored.keys() - {down}:
        np.testing.assert_array_equal(found[name], stored[name], err_msg=name)
    # 8 bits with a scale for 32 weights: half a step, and the rounding of the scale.
    step = np.abs(stored[down].astype(np.float32)).max() / 127
    assert 0 < np.abs(found[down].astype(np.float32) - stored[down]).max() < 0.6 * step

    model = checkpoint.load(tmp_path / "out")
    assert model.config.tie_word_embeddings and model.config.rope_theta == 5e4
    assert model.config.rms_norm_eps == 1e-5
    text = tokenizer.load_tokenizer(tmp_path / "out", model.config.vocab_size)
    letters = byte_tokens()
    place = lambda letter: 2 + letters.index(letter)
    assert text.encode("he 12<|end|>") == [0, 258, place("Ġ"), place("1"), place("2"), 1]
    assert text.decode(text.encode("hé\n 12")) == "hé\n 12"
    assert text.stop_tokens == {1}
    template = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    names = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert template == names | {"chat_template": "{{ messages }}"}


def test_files_that_are_no_whole_gguf_are_named(tmp_path, stored):
    source = write(tmp_path / "model.gguf", stored)
    whole = source.read_bytes()
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ValueError, match="pipe.gguf is not a regular file"):
        from_gguf.convert(tmp_path / "pipe.gguf", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="none.gguf is missing"):
        from_gguf.convert(tmp_path / "none.gguf", tmp_path / "out")
    huge = whole[:8] + b"\xff" * 8 + whole[16:]  # the number of tensors
    for damaged in (b"", b"{}" * 40, whole[:1000], huge, whole[:-5000]):
        source.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.gguf is not a whole GGUF file"):
            from_gguf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="lacks the field tokenizer.ggml.tokens"):
        from_gguf.read_config(
            from_gguf.Fields({"general.architecture": "llama"} | dict.fromkeys(LLAMA, 1)), set(), ""
        )


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("llama.attention.head_count", 0, "division|modulo"),
        ("llama.block_count", "x", "num_hidden_layers must be an integer"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "rms_norm_eps must be a number"),
        ("llama.feed_forward_length", 97, "blk.0.ffn_gate.weight' has shape .* instead of"),
        ("llama.block_count", 3, "lacks the tensor model.layers.2"),
        ("llama.block_count", 1, "tensor 'blk.1.attn_norm.weight' is surplus, or there twice"),
        ("tokenizer.ggml.merges", ["x", "y z"], "Merges"),
        ("tokenizer.ggml.eos_token_id", 999, "eos_token_id=999 is none of 259 tokens"),
        ("tokenizer.chat_template", 3, "tokenizer.chat_template must be text"),
    ],
)
def test_fields_that_do_not_fit_are_named(name, value, message, tmp_path, stored, monkeypatch):
    source = write(tmp_path / "model.gguf", stored)

    class Reader(gguf.GGUFReader):
        def __init__(self, path):
            super().__init__(path)
            odd = unittest.mock.Mock(contents=lambda: value)
            self.fields = dict(self.fields) | {name: odd}

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    with pytest.raises(ValueError, match=f"model.gguf cannot be converted: .*({message})"):
        from_gguf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path, stored):
    with pytest.raises(ValueError, match="'gemma'; only 'llama'"):
        from_gguf.convert(write(tmp_path / "a.gguf", stored, architecture="gemma"), tmp_path)
    with pytest.raises(ValueError, match="kind 'bert'"):
        from_gguf.convert(write(tmp_path / "b.gguf", stored, kind="bert"), tmp_path / "b")
    with pytest.raises(ValueError, match="ssm_in"):
        from_gguf.stored_name("blk.0.ssm_in.weight")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_llm_goes_from_the_file_to_a_packed_model_beside_dense(stored, tmp_path):
    one_block = {name: tensor for name, tensor in stored.items() if ".layers.1." not in name}
    write(tmp_path / "small.gguf", one_block)
    out = tmp_path / "out"
    done = run(
        "llm",
        f"--gguf={tmp_path / 'small.gguf'} --out={out}",
        "--length=32 --windows=2 --eval_windows=2 --new_tokens=4",
    )
    dense, packed = json.loads((out / "results.json").read_text())["rows"]
    assert (packed["method"], packed["density"]) == ("wanda", 0.5)
    assert packed["bytes"] < dense["bytes"] and packed["perplexity"] != dense["perplexity"]
    assert (
        checkpoint.load_packed(out / "wanda-0.5-int8").layers[0].mlp.down.matrix.scales is not None
    )
    assert "of dense" in done.stdout and "wanda" in done.stdout.splitlines()[-3]
