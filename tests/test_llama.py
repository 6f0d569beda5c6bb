"""The language model: decoding against whole sequences, sampling, evaluation, packed layers."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import macko_jax.flax_nnx
from dsf_jax import export
from examples import llama
from examples.llama import cache as kv_cache
from examples.llama import checkpoint, evaluation, generation, rope, split
from macko_jax.nn.flax_nnx import become_pair
from macko_jax.nn.rules import Rule

CONFIG = llama.Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=96,
)
# Every option in one of them; one layer is enough where all layers are alike.
VARIANTS = {
    "llama": {},
    "multi_head": {"num_key_value_heads": 4, "num_hidden_layers": 1},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 1},
    "qwen3": {
        "qk_norm": True,
        "rope_scaling": llama.RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        "num_hidden_layers": 1,
    },
    "windows": {"sliding_windows": (5, None), "rope_scaling": llama.RopeScaling("linear", 2.0)},
}
QUICK = "llama", "windows"  # both kinds of attention; with the others it takes seconds each


@functools.cache
def make_model(**changes):
    """A model that tests share, and so its compiled programs; who edits it takes a clone."""
    model = llama.Llama(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(1))
    # Larger than the initial weights, so that attention has something to say.
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda a: 6 * a if a.ndim > 1 else a, state))
    return model


def with_rope(scaling):
    return dataclasses.replace(CONFIG, rope_scaling=scaling)


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@nnx.jit
def begin(model, tokens):
    hidden, cache = model.hidden(tokens)
    return model.logits(hidden), cache


@nnx.jit
def extend(model, tokens, cache):
    hidden, cache = model.hidden(tokens, cache)
    return model.logits(hidden), cache


def make_tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape))


def continuations(model, prompts, new_tokens, **options):
    return np.concatenate(list(llama.generate(model, prompts, new_tokens, **options)), axis=1)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, changes in VARIANTS.items()
    ],
)
def test_cache_gives_the_logits_of_whole_sequences(changes):
    model, tokens = make_model(**changes), make_tokens(2, 20)
    whole = forward(model, tokens)
    logits, cache = begin(model, tokens[:, :12])
    cache = kv_cache.widen(cache, 24)
    parts = [logits]
    # Several tokens at once in one variant only, since each length is compiled.
    rest = [(13, 14), (14, 20)] if not changes else [(i, i + 1) for i in range(13, 20)]
    for first, last in ((12, 13), *rest):
        logits, cache = extend(model, tokens[:, first:last], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [20, 20]


@pytest.mark.once
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_later_tokens_do_not_change_earlier_logits(changes):
    model, tokens = make_model(**changes), make_tokens(2, 20)
    changed = tokens.at[0, 9].set((tokens[0, 9] + 1) % CONFIG.vocab_size)
    before, after = forward(model, tokens), forward(model, changed)
    np.testing.assert_array_equal(before[0, :9], after[0, :9])
    assert not np.allclose(before[0, 9:], after[0, 9:])
    np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.once
def test_sliding_window_forgets():
    tokens = make_tokens(1, 20)
    changed = tokens.at[0, 0].set((tokens[0, 0] + 1) % CONFIG.vocab_size)
    # Two layers with windows of 3 reach back 4 positions from a position.
    model = make_model(sliding_windows=(3, 3))
    before, after = forward(model, tokens), forward(model, changed)
    np.testing.assert_allclose(before[:, 5:], after[:, 5:], rtol=1e-5, atol=1e-5)
    assert not np.allclose(before[:, 4], after[:, 4], atol=1e-5)


@pytest.mark.once
def test_rotation_depends_on_relative_position_only():
    query = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, CONFIG.head_dim)))
    key = query[..., ::-1]

    def product(i, j):
        angles = [rope.rotation(jnp.array([[p]]), CONFIG) for p in (i, j)]
        return jnp.sum(rope.rotate(query, angles[0]) * rope.rotate(key, angles[1]))

    np.testing.assert_allclose(product(9, 4), product(25, 20), rtol=1e-4)
    assert not np.allclose(product(9, 4), product(9, 5), rtol=1e-3)


@pytest.mark.once
def test_llama3_rope_scaling_keeps_short_and_stretches_long_wavelengths():
    scaling = llama.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(CONFIG, head_dim=128, rope_theta=5e5)
    plain = np.asarray(rope.rotary_frequencies(config))
    scaled = np.asarray(rope.rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling)))
    wavelengths = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelengths < 2048], plain[wavelengths < 2048], rtol=1e-6)
    long = wavelengths > 8192
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)


@pytest.mark.slow
def test_generation_follows_the_whole_sequence_model(monkeypatch):
    monkeypatch.setattr(kv_cache, "SMALLEST_CACHE", 64)
    model = make_model()
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    # 64 slots at first, then 96: the cache is widened on the way.
    drawn = continuations(model, prompts, 64, chunk=32)
    assert drawn.shape == (2, 64)
    for prompt, row in zip(prompts, drawn):
        # Tokens after a position do not change its logits, so the whole continuation is checked
        # in one pass: each token is the likeliest after those before it.
        tokens = jnp.array([[*prompt, *row]])
        likeliest = np.asarray(forward(model, tokens)[0].argmax(-1))
        np.testing.assert_array_equal(row, likeliest[len(prompt) - 1 : -1])


def test_generation_does_not_depend_on_chunks_or_batch():
    model, prompts = make_model(), [[3, 1, 4], [1, 5, 9, 2]]
    alone = continuations(model, prompts[:1], 9, chunk=4)
    np.testing.assert_array_equal(alone, continuations(model, prompts, 9)[:1])
    np.testing.assert_array_equal(alone, continuations(split.SplitModel.of(model), prompts[:1], 9))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [VARIANTS["qwen2"], VARIANTS["qwen3"]])
def test_prompts_are_read_some_layers_at_a_time(changes, monkeypatch):
    monkeypatch.setattr(split, "LAYERS_A_CALL", 2)
    model = make_model(**changes | {"num_hidden_layers": 5})
    parts = split.SplitModel.of(model)
    structures = [piece.structure for piece in parts.layers]
    assert structures[0] is structures[1] is not structures[2]  # two, two, and one
    tokens, lengths = make_tokens(2, 12), np.array([12, 7], np.int32)
    found = generation.prefill(parts, tokens, lengths, jax.random.key(0), llama.Sampling())
    logits, cache = begin(model, tokens)
    likeliest = np.asarray(logits)[[0, 1], lengths - 1].argmax(-1)
    np.testing.assert_array_equal(found.token, likeliest)
    np.testing.assert_array_equal(found.cache.lengths, lengths)
    for a, b in zip(found.cache.layers, cache.layers, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sampling_is_seeded_and_cut():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    logits = jnp.broadcast_to(logits, (4000, 4))
    key = jax.random.key(0)

    def shares(**options):
        drawn = llama.Sampling(**options)(key, logits)
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.04)
    # 0.5 + 0.3 is less than 0.9, so the third token is needed as well.
    top_p = shares(temperature=1.0, top_p=0.9)
    np.testing.assert_allclose(top_p, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.04)
    np.testing.assert_array_equal(shares(), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(temperature=1.0, top_p=1e-6), [1, 0, 0, 0])

    model = make_model()
    warm = llama.Sampling(temperature=1.0)
    options = {"sampling": warm, "chunk": 4}
    first = continuations(model, [[1]], 20, seed=3, **options)
    other_chunks = continuations(model, [[1]], 20, seed=3, sampling=warm)
    np.testing.assert_array_equal(first, other_chunks)
    assert (first != continuations(model, [[1]], 20, seed=4, **options)).any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: llama.Sampling(temperature=-1.0), "temperature"),
        (lambda: llama.Sampling(top_k=0), "top_k"),
        (lambda: llama.Sampling(top_p=0.0), "top_p"),
        (lambda: make_model(num_key_value_heads=3), "multiple"),
        (lambda: make_model(head_dim=15), "even"),
        (lambda: make_model(sliding_windows=(4,)), "2 layers"),
        (lambda: rope.rotary_frequencies(with_rope(llama.RopeScaling("yarn", 2.0))), "yarn"),
        (lambda: llama.RopeScaling("llama3", 8.0, 4.0, 4.0), "low_freq_factor=4.0 must be less"),
        (lambda: continuations(make_model(), [[]], 4), "at least one token"),
        (lambda: continuations(make_model(), [[1], [2, 61]], 4), "token 61 is not in .* 61 tokens"),
        (lambda: continuations(make_model(), [[-1]], 4), "token -1 is not"),
        (
            lambda: evaluation.perplexity(make_model(), [1, 99], length=8, stride=8, batch=1),
            "token 99 is not",
        ),
        (lambda: continuations(make_model(), [[1] * 90], 10), "96 positions"),
    ],
)
def test_impossible_requests_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.once
@pytest.mark.parametrize("count", [2, 9, 16, 17, 30])
@pytest.mark.parametrize("length, stride", [(8, 8), (8, 3), (8, 1)])
def test_windows_predict_every_token_once(count, length, stride):
    tokens = np.arange(100, 100 + count)
    inputs, targets, counts = evaluation.windows(tokens, length, stride)
    assert sorted(targets[counts].tolist()) == tokens[1:].tolist()
    np.testing.assert_array_equal(inputs[counts] + 1, targets[counts])
    # A prediction that counts has seen all there is, or at least length - stride + 1 tokens.
    seen = np.broadcast_to(np.arange(length) + 1, counts.shape)[counts]
    assert np.all(seen >= np.minimum(targets[counts] - 100, length - stride + 1))


@pytest.mark.slow
def test_bits_per_token_is_the_mean_of_the_next_token_losses():
    model, tokens = make_model(), np.asarray(make_tokens(21))
    logits = jax.nn.log_softmax(forward(model, jnp.asarray(tokens[None, :-1])))[0]
    expected = -np.mean(np.asarray(logits)[np.arange(20), tokens[1:]])
    options = {"length": 32, "stride": 16, "batch": 2}
    bits = evaluation.bits_per_token(model, tokens, **options)
    np.testing.assert_allclose(bits, expected / math.log(2), rtol=1e-5)
    perplexity = evaluation.perplexity(model, tokens, **options)
    np.testing.assert_allclose(perplexity, math.exp(expected), rtol=1e-5)
    # Windows of 20 that start anew see less, but the sum runs over the same tokens.
    options = {"length": 10, "stride": 10, "batch": 2}
    nats, count = evaluation.total_nats(model, tokens, **options)
    halves = [evaluation.total_nats(model, part, **options) for part in (tokens[:11], tokens[10:])]
    assert count == 20
    np.testing.assert_allclose(nats, sum(half[0] for half in halves), rtol=1e-5)
    last = evaluation.total_nats(model, tokens, limit=1, **options)
    np.testing.assert_allclose(last, halves[0], rtol=1e-5)


@pytest.mark.slow
def test_agreement_is_that_of_the_distributions():
    model, tokens = make_model(), np.asarray(make_tokens(21))
    other = nnx.clone(model)
    other.norm.scale[...] *= jnp.linspace(-1, 3, other.norm.scale[...].size)
    options = {"length": 20, "stride": 20, "batch": 1}
    nats, count, found = evaluation.agreement(model, other, tokens, **options)
    assert (nats, count) == evaluation.total_nats(model, tokens, **options)
    q, p = (
        np.asarray(jax.nn.softmax(forward(each, jnp.asarray(tokens[None, :-1])))[0], np.float64)
        for each in (model, other)
    )
    assert found["same_likeliest"] == np.mean(p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(found["overlap"], np.minimum(p, q).sum(-1).mean(), rtol=1e-5)
    divergence = np.sum(p * np.log(p / q), axis=-1).mean()
    np.testing.assert_allclose(found["divergence"], divergence, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_norms_gates_and_sums_of_a_decode_step_are_in_the_products_kernels(dtype):
    rule = Rule(".*", max_density=1.0, dtype=dtype)
    packed, report = macko_jax.flax_nnx.substitute(make_model(), rule)
    model = split.SplitModules.of(packed)

    def step(model, tokens, cache):
        return model.build().hidden(tokens, cache)

    cache = begin(packed, make_tokens(1, 8))[1]
    # Of one token all but the norm before the head; of two, there is nothing in the kernels.
    for tokens, norms, gates in (1, 1, 0), (2, 2 * CONFIG.num_hidden_layers + 1, 1):
        traced = jax.jit(step).trace(model, make_tokens(1, tokens), cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.rsqrt") == norms
        assert text.count("func private @silu") == gates
        assert text.count("@mosaic_gpu") == len(report.packed) - 1


@pytest.mark.slow
def test_layers_that_are_pruned_alike_share_kernels():
    model = nnx.clone(make_model(hidden_size=256, intermediate_size=512, num_hidden_layers=4))
    for i, block in enumerate(model.layers):
        for linear in block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down:
            mask = np.random.default_rng(0).random(linear.kernel.shape) < 0.5
            mask[: 5 * i, 0] = False
            linear.kernel[...] *= mask
    packed, _ = macko_jax.flax_nnx.substitute(model, Rule("layers/.*", encoding="delta4"))
    parts = split.SplitModel.of(packed)
    [piece], tokens = parts.layers, make_tokens(1, 64)
    x = generation.embed.eval_shape(parts.ends, tokens)
    traced = generation.read.trace(piece, x, parts.config)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"@mosaic_gpu.*module = \"(.*?)\"", text)
    assert len(kernels) == 16 and len(set(kernels)) == 4


@pytest.mark.slow
def test_factor_pairs_are_packed_and_stored(tmp_path):
    model = nnx.clone(make_model())
    rng = np.random.default_rng(0)
    factors = []
    for shape in ((1, CONFIG.hidden_size, 40), (1, 40, CONFIG.intermediate_size)):
        factor = rng.normal(size=shape) * (rng.random(shape) < 0.3)
        factors.append(jnp.asarray(factor, jnp.float32))
    become_pair(model.layers[1].mlp.down, *factors)
    packed, report = export.pack(model, rules=Rule(encoding="bitmask"))
    assert [layer.path for layer in report.packed] == ["layers/1/mlp/down"]
    checkpoint.save_packed(tmp_path, packed)
    tokens = make_tokens(1, 8)
    for unpack in (False, True):
        found = forward(checkpoint.load_packed(tmp_path, unpack=unpack), tokens)
        np.testing.assert_allclose(found, forward(model, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.once
def test_cache_sizes_follow_the_live_length():
    sizes = [kv_cache.cache_slots(live) for live in range(1, 5000)]
    assert sorted(set(sizes)) == [512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(live <= size <= max(512, 1.5 * live) for live, size in enumerate(sizes, start=1))
