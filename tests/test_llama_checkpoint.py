"""Hugging Face directories: logits as `transformers` gives them, and errors that name the fault.

The checkpoints in tests/data/llama were made by tests/make_llama_fixtures.py.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import macko_jax.flax_nnx
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


@pytest.mark.once
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


@pytest.mark.once
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


@pytest.mark.once
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
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config: .* \(fp8\)"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor of its rope type 'linear'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, changes, message):
    directory = copy_of(tmp_path, "llama3")
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(directory)


@pytest.mark.once
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


@pytest.mark.once
def test_tensors_of_integers_are_refused(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    name = "model.norm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].astype(np.int32)}))
    with pytest.raises(ValueError, match="1 not of F64, F32, F16, BF16: model.norm.weight of I32"):
        checkpoint.load(directory)


@pytest.mark.once
def test_float8_with_scales_is_refused(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    name = "model.layers.0.mlp.down_proj.weight"

    def quantize(tensors):
        tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
        tensors[f"{name}_scale"] = np.ones((), np.float32)

    edit_tensors(directory, quantize)
    message = f"{directory} .*; 1 surplus: {name}_scale; 1 not of .*: {name} of F8_E4M3; convert"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(directory)


def test_tensors_of_several_types_are_joined(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")

    def mix(tensors):
        tensors[q], tensors[k] = tensors[q].astype(jnp.bfloat16), tensors[k].astype(np.float16)

    edit_tensors(directory, mix)
    kernel = checkpoint.load(directory).layers[0].attention.qkv.kernel[...]
    expected = checkpoint.load(DATA / "llama3").layers[0].attention.qkv.kernel[...]
    np.testing.assert_allclose(kernel, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.once
def test_files_beside_the_model_are_left_out(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    stray = {"tok_embeddings.weight": np.zeros((4, 4), np.float32)}
    safetensors.numpy.save_file(stray, directory / "consolidated.safetensors")
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


@pytest.mark.once
def test_shards_that_disagree_are_refused(tmp_path):
    directory = copy_of(tmp_path, "llama3")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    checkpoint.load(directory)
    shutil.copy(directory / "a.safetensors", directory / "b.safetensors")
    with pytest.raises(ValueError, match=r"in both .*/a.safetensors and .*/b.safetensors"):
        checkpoint.load(directory)


@pytest.mark.once
@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        [],
        {},
        ["model.safetensors"],
        "../llama3/model.safetensors",
        "/etc/passwd",
        "",
        "\0",
    ],
)
def test_index_names_files_beside_it(tmp_path, value):
    directory = copy_of(tmp_path, "llama3")
    index = directory / checkpoint.INDEX
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": value}}))
    with pytest.raises(ValueError, match=f"{index}: weight_map must name files beside it"):
        checkpoint.load(directory)
    index.write_text(json.dumps({"weight_map": value}))
    with pytest.raises((ValueError, FileNotFoundError), match="weight_map|holds no .safetensors"):
        checkpoint.load(directory)


@pytest.mark.once
def test_rope_scaling_takes_the_place_of_rope_parameters():
    described = json.loads((DATA / "llama2" / "config.json").read_text())
    assert described["rope_parameters"]["rope_type"] == "default"
    linear = {"rope_type": "linear", "factor": 4}
    config = checkpoint.config_from_json(described | {"rope_scaling": linear})
    assert config.rope_scaling == llama.RopeScaling("linear", 4)
    for kind in ("yarn", "dynamic"):
        with pytest.raises(ValueError, match=f"rope type '{kind}' is not supported"):
            checkpoint.config_from_json(described | {"rope_scaling": linear | {"rope_type": kind}})
    own = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.warns(UserWarning, match="rope_theta=10000 is taken.*500000"):
        checkpoint.config_from_json(described | {"rope_parameters": own, "rope_scaling": linear})


SIZES = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"
SIZES += "num_attention_heads", "num_key_value_heads", "max_position_embeddings"
WINDOWS = "sliding_window", "layer_types", "use_sliding_window", "max_window_layers"
OTHERS = "rms_norm_eps", "rope_parameters", "rope_scaling", "tie_word_embeddings"


@pytest.mark.once
@pytest.mark.parametrize("field", [*SIZES, *WINDOWS, *OTHERS, "hidden_act", "attention_bias"])
def test_fields_of_a_wrong_type_are_named(field):
    described = json.loads((DATA / "qwen2_windows" / "config.json").read_text())
    right = {"tie_word_embeddings": True, "use_sliding_window": True, "rms_norm_eps": 0.5}
    for wrong in ("32", -1, 0.5, True, [], [1], {"a": {}}, math.inf, math.nan, 10**400):
        if right.get(field) == wrong:
            continue
        with pytest.raises(ValueError, match=field) as caught:
            checkpoint.config_from_json(described | {field: wrong})
        assert len(str(caught.value)) < 200


@pytest.mark.once
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number from 1e-20 to 1, got 0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters: factor"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters: rope_theta"),
        ({"rope_parameters": {"full_attention": {}}}, "by the type of a layer"),
        ({"num_hidden_layers": 2**20}, "num_hidden_layers must be an integer from 1 to 1024"),
        ({"num_hidden_layers": 1000}, "missing: model.layers.10.input_layernorm.weight"),
        ({"hidden_size": 2**24, "head_dim": None}, "misshapen"),
        ({"num_attention_heads": 64, "head_dim": None}, "head_dim=0 must be even"),
    ],
)
def test_hyperparameters_that_give_nonsense_are_refused_quickly(tmp_path, changes, message):
    directory = copy_of(tmp_path, "llama3")
    edit_config(directory, **changes)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        checkpoint.load(directory)
    assert time.perf_counter() - began < 5


@pytest.mark.once
@pytest.mark.parametrize("text", ["[]", "true", '"x"', "null", "3", "[" * 10**5, "{", "\xff"])
def test_files_that_hold_no_object_are_named(tmp_path, text):
    directory = copy_of(tmp_path, "llama2")
    for name in ("config.json", checkpoint.INDEX):
        (directory / name).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=f"{directory / name}"):
            checkpoint.load(directory)
        shutil.copy(DATA / "llama2" / name, directory)


@pytest.mark.once
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", checkpoint.INDEX])
def test_pipes_are_not_waited_for(tmp_path, name):
    directory = copy_of(tmp_path, "llama3")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        checkpoint.load(directory)


def test_packed_parts_of_another_place_are_named(tmp_path):
    packed, _ = macko_jax.flax_nnx.substitute(checkpoint.load(DATA / "llama3"), "layers/.*")
    checkpoint.save_packed(tmp_path, packed)
    norm, block = checkpoint.part_file(tmp_path, "norm"), checkpoint.part_file(tmp_path, 1)
    whole = block.read_bytes()
    shutil.copy(norm, block)
    with pytest.raises(ValueError, match=f"{block} is not the part that the config.json beside"):
        checkpoint.load_any(tmp_path)
    embed = checkpoint.part_file(tmp_path, "embed")
    block.write_bytes(whole)
    shutil.copy(norm, embed)
    with pytest.raises(ValueError, match=f"{embed} has no tensor 'embedding'"):
        checkpoint.load_any(tmp_path)
    macko_jax.save(embed, {"embedding": jnp.ones((96, 32), jnp.int8)})
    with pytest.raises(ValueError, match=f"{embed}: tensor 'embedding' is of I8, not of F64"):
        checkpoint.load_any(tmp_path)


def test_names_on_the_hub_get_the_way_to_a_directory():
    with pytest.raises(FileNotFoundError, match="hf download meta-llama/Llama-2-7b-hf --local-dir"):
        checkpoint.load("meta-llama/Llama-2-7b-hf")


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


@pytest.mark.once
@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_being_written(family):
    config = checkpoint.load_config(DATA / family)
    assert checkpoint.config_from_json(checkpoint.config_to_json(config)) == config
