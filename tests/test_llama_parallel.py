"""The language model on several devices: the same logits and tokens as on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import macko_jax.flax_nnx
from examples import llama
from examples.llama import cache as kv_cache
from examples.llama import checkpoint, parallel, split
from macko_jax.nn.flax_nnx import become_pair
from macko_jax.nn.rules import Rule
from tests.test_llama import (
    CONFIG,
    VARIANTS,
    begin,
    continuations,
    forward,
    make_model,
    make_tokens,
)

PROMPTS = [[5, 3, 9], [2, 7]]


@functools.cache
def pruned_model(pairs=False, **changes):
    """A dense model with half of its weights, or whose layers are pairs of factors."""
    model = nnx.clone(make_model(**changes))
    rng = np.random.default_rng(0)
    for block in model.layers:
        for layer in block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down:
            kernel = np.array(layer.kernel[...])
            kernel[rng.random(kernel.shape) < 0.5] = 0
            layer.kernel.set_value(jnp.asarray(kernel))
            if pairs:
                cols, rows = kernel.shape
                shapes = (1, rows, 24), (1, 24, cols)
                factors = [rng.normal(size=s) * (rng.random(s) < 0.5) / 4 for s in shapes]
                become_pair(layer, *(jnp.asarray(f, jnp.float32) for f in factors))
    return model


def packed(model, **options):
    rule = Rule("layers/.*", **({"max_density": 1.0, "encoding": "bitmask", "lanes": 1} | options))
    return macko_jax.flax_nnx.substitute(model, rule)[0]


def shared(model, count):
    return checkpoint.share(model, parallel.make_mesh(count, model.config))


def assert_same(model, count):
    """A model gives the same logits on several devices, whole and from its cache."""
    tokens = make_tokens(1, 8)
    other = shared(model, count)
    wanted, found = forward(model, tokens), forward(other, tokens)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
    return other


@pytest.mark.slow
def test_dense():
    other = assert_same(pruned_model(qkv_bias=True, tie_word_embeddings=True), 2)
    kernel = other.layers[0].mlp.down.kernel.get_value()
    assert kernel.sharding.shard_shape(kernel.shape) == (24, 32)
    text = nnx.jit(lambda m, t: m(t)).lower(other, make_tokens(2, 8)).compile().as_text()
    assert text.count(" all-reduce(") == 2 * CONFIG.num_hidden_layers
    assert "all-to-all" not in text and "collective-permute" not in text


@pytest.mark.slow
def test_packed_on_four_devices():
    other = assert_same(packed(pruned_model(num_key_value_heads=4)), 4)
    matrix = other.layers[1].attention.qkv.matrix
    assert isinstance(matrix, macko_jax.ShardedMatrix) and matrix.count == 4


@pytest.mark.slow
def test_pairs_of_8_bit_values():
    one_layer = VARIANTS["qwen3"]
    assert_same(packed(pruned_model(pairs=True, **one_layer), dtype="int8"), 2)


@pytest.mark.slow
def test_tokens_are_those_of_one_device(tmp_path):
    model = packed(pruned_model())
    wanted = continuations(model, PROMPTS, 6, chunk=4)
    other = shared(model, 2)
    np.testing.assert_array_equal(continuations(other, PROMPTS, 6, chunk=4), wanted)
    assert begin(other, make_tokens(1, 8))[1].layers[0].sharding.spec == parallel.HEADS
    # From files, dense and packed.
    checkpoint.save_packed(tmp_path / "packed", model)
    checkpoint.save(tmp_path / "dense", pruned_model(), jnp.float32)
    tokens = make_tokens(2, 8)
    for name in ("packed", "dense"):
        loaded = checkpoint.load_any(tmp_path / name, tensor_parallel=2)
        found = forward(loaded, tokens)
        np.testing.assert_allclose(found, forward(model, tokens), rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_a_decode_step_is_the_kernels_of_each_device(monkeypatch):
    """Queries, keys and values; attention; `out`; gate, up and down in a chain; two sums."""
    monkeypatch.setattr("examples.llama.attention.has_decode_kernel", lambda _: True)
    config = dataclasses.replace(
        CONFIG,
        hidden_size=512,
        intermediate_size=528,
        num_hidden_layers=1,
        num_key_value_heads=4,
        head_dim=128,
    )
    model = llama.Llama(config, dtype=jnp.float16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(
        model, jax.tree.map(lambda a: jnp.where(abs(a) > 0.01, a, 0) if a.ndim > 1 else a, state)
    )
    model = split.SplitModules.of(shared(packed(model, encoding="delta4", lanes=None), 2))
    cache = kv_cache.Cache((jnp.zeros((1, 4, 64, 2, 128), jnp.float16),), jnp.full(1, 8))

    def step(model, tokens, cache):
        return model.build().hidden(tokens, cache)

    traced = jax.jit(step).trace(model, make_tokens(1, 1), cache)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.all_reduce") == 2
    assert text.count("stablehlo.all_gather") == 0
    assert text.count("@mosaic_gpu") == 4


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"=3 does not divide the model's 4 attention heads; .*\["):
        parallel.make_mesh(3, CONFIG)
    with pytest.raises(ValueError, match="=8 needs as many devices, and there are 4; on a CPU set"):
        parallel.make_mesh(8, CONFIG)
