"""Hugging Face directories: logits as `transformers` gives them, and errors that name the fault.

The checkpoints in tests/data/llama were made by tests/make_llama_fixtures.py.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from examples import llama
from examples.llama import checkpoint

DATA = pathlib.Path(__file__).parent / "data" / "llama"
FAMILIES = sorted(path.name for path in DATA.iterdir() if path.is_dir())


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def copy_of(tmp_path, family):
    return shutil.copytree(DATA / family, tmp_path / family)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_every_family_is_there():
    assert {"llama2", "llama3", "mistral", "qwen2", "qwen2_windows", "qwen3"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family):
    expected = safetensors.numpy.load_file(DATA / f"{family}.expected.safetensors")
    model = checkpoint.load(DATA / family)
    logits = forward(model, jnp.asarray(expected["tokens"]))
    np.testing.assert_allclose(logits, expected["logits"], rtol=2e-4, atol=2e-4)
    assert np.abs(expected["logits"]).max() > 1  # or the comparison would say little


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama3", {"rope_scaling": None}),
        ("llama3", {"rope_theta": 1e4}),
        ("mistral", {"sliding_windows": None}),
        ("qwen2_windows", {"sliding_windows": (5, 5)}),
        ("qwen3", {"rms_norm_eps": 0.1}),
    ],
)
def test_each_option_matters_to_the_logits(family, changes):
    expected = safetensors.numpy.load_file(DATA / f"{family}.expected.safetensors")
    model = checkpoint.load(DATA / family)
    config = dataclasses.replace(model.config, **changes)
    other = llama.Llama(config, rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(model))
    logits = forward(other, jnp.asarray(expected["tokens"]))
    assert not np.allclose(logits, expected["logits"], rtol=1e-2, atol=1e-2)


def test_shards_are_joined():
    assert len(list((DATA / "llama2").glob("*.safetensors"))) == 3


def test_parameters_keep_the_asked_dtype():
    model = checkpoint.load(DATA / "qwen2", dtype=jnp.float32, param_dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    assert forward(model, jnp.zeros((1, 3), jnp.int32)).dtype == jnp.float32


def test_saved_model_loads_again(tmp_path):
    model = checkpoint.load(DATA / "llama3")
    checkpoint.save(tmp_path / "copy", model, jnp.float32, extra={"bos_token_id": 1})
    again = checkpoint.load(tmp_path / "copy")
    assert again.config == model.config
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(forward(again, tokens), forward(model, tokens))
    names = safetensors.numpy.load_file(tmp_path / "copy" / "model.safetensors").keys()
    assert names == safetensors.numpy.load_file(DATA / "llama3" / "model.safetensors").keys()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_older_configs_are_read():
    described = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    config = checkpoint.config_from_json(described)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (32, 128, 10000.0)
    assert config.rope_scaling == llama.RopeScaling("linear", 2.0)
    mistral = checkpoint.config_from_json(
        described | {"model_type": "mistral", "sliding_window": None, "rope_scaling": None}
    )
    assert mistral.sliding_windows is None and mistral.rope_scaling is None
    qwen = described | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}
    assert checkpoint.config_from_json(qwen).sliding_windows is None
    qwen |= {"use_sliding_window": True, "max_window_layers": 30}
    assert checkpoint.config_from_json(qwen).sliding_windows == (None,) * 30 + (8, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "gpt2.*llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"intermediate_size": 41}, r"down_proj.weight.*\(32, 40\).*\(32, 41\)"),
        ({"num_hidden_layers": 3}, r"9 missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, r"9 surplus: model.layers.1.input_layernorm.weight"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor of its rope type 'linear'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, changes, message):
    directory = copy_of(tmp_path, "llama3")
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(directory)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        checkpoint.load(directory)
    edit_config(directory, tie_word_embeddings=True)
    assert checkpoint.load(directory).head is None
    edit_tensors(directory, lambda tensors: tensors.update(spare=np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match="1 surplus: spare"):
        checkpoint.load(directory)


def test_tensors_of_integers_are_refused(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    name = "model.norm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].astype(np.int32)}))
    with pytest.raises(ValueError, match="1 not of floats: model.norm.weight of I32"):
        checkpoint.load(directory)


def test_files_beside_the_model_are_refused_or_left_out_by_its_index(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"in both .*consolidated.* and .*/model.safetensors"):
        checkpoint.load(directory)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (directory / checkpoint.INDEX).write_text(json.dumps(index))
    (directory / "consolidated.safetensors").write_bytes(b"anything")
    checkpoint.load(directory)
    index["weight_map"]["lm_head.weight"] = "model-00002.safetensors"
    (directory / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="lacks model-00002.safetensors"):
        checkpoint.load(directory)


def test_files_that_are_cut_off_are_named(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        checkpoint.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        checkpoint.load(directory)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        checkpoint.load(tmp_path)
    shutil.copy(DATA / "qwen3" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 3}')
    with pytest.raises(ValueError, match="lacks hidden_size, intermediate_size"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_being_written(family):
    config = checkpoint.load_config(DATA / family)
    assert checkpoint.config_from_json(checkpoint.config_to_json(config)) == config
