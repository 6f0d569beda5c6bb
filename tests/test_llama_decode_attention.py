"""The GPU kernel of one token's attention: its program on the CPU, its lowering, its results."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import macko_jax
import macko_jax.flax_nnx
from dsf_jax import export
from examples import llama
from examples.llama import attention, decode_attention
from examples.llama.cache import widen
from examples.llama.split import SplitModules
from macko_jax.gpu import staging
from macko_jax.lanes import interpreter
from macko_jax.nn.flax_nnx import become_pair
from tests.test_llama import CONFIG

HAS_GPU = any(device.platform == "gpu" for device in jax.local_devices())
# heads, key-value heads, slots, live tokens of each sequence, window; fewer slots than two blocks
# read at a time take one
CASES = {
    "one block": (2, 2, 40, [33], None),
    "one": (2, 2, 64, [1], None),
    "grouped": (8, 2, 96, [77], None),
    "seven": (14, 2, 96, [50], None),
    "full": (2, 1, 64, [64], None),
    "windowed": (2, 1, 128, [110], 19),
    "short of its window": (2, 1, 64, [7], 19),
    "long": (2, 1, 1100, [1051], None),
    "long, but few live": (2, 1, 2050, [40], None),
    "long and windowed": (2, 1, 1100, [1051], 300),
    "batch": (6, 3, 96, [30, 96, 1, 65], 50),
    "long batch": (2, 1, 1100, [1051, 3], None),
}
DIM = decode_attention.HEAD_DIM


def make(heads, kv_heads, slots, lengths, dtype=jnp.float16):
    """Projected rows [B, n], the angles of their positions, a cache and the positions.

    `lengths` count the rows' own tokens, which the cache lacks.
    """
    rng = np.random.default_rng(0)
    rows = jnp.asarray(2 * rng.normal(size=(len(lengths), (heads + 2 * kv_heads) * DIM)), dtype)
    cache = rng.normal(size=(len(lengths), kv_heads, slots, 2, DIM))
    for sequence, live in zip(cache, lengths):
        sequence[:, live - 1 :] = np.nan  # what is not live is never read
    positions = np.array(lengths) - 1
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    rotation = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return rows, rotation, jnp.asarray(cache, dtype), jnp.asarray(positions, jnp.int32)


def rotated(heads, cos, sin):
    early, late = heads[:, : DIM // 2], heads[:, DIM // 2 :]
    return np.concatenate([early * cos - late * sin, late * cos + early * sin], axis=1)


def with_own_tokens(rows, rotation, cache, positions, heads):
    """The cache with the tokens' keys, computed in float64, and their values."""
    cache = np.array(cache)
    for row, cos, sin, slots, position in zip(
        *(np.asarray(a, np.float64) for a in (rows, *rotation)), cache, positions
    ):
        _, key, value = np.split(row.reshape(-1, DIM), [heads, heads + len(slots)])
        slots[:, int(position)] = np.stack([rotated(key, cos, sin), value], axis=1)
    return cache


def expected(rows, rotation, cache, positions, heads, window):
    """Attention in float64 over a cache that has the tokens' own keys and values: [B, H * D]."""
    out = []
    for row, cos, sin, slots, position in zip(
        *(np.asarray(a, np.float64) for a in (rows, *rotation, cache)), positions
    ):
        live = int(position) + 1
        first = 0 if window is None else max(0, live - window)
        query = rotated(row.reshape(-1, DIM)[:heads], cos, sin)
        seen = slots[:, first:live].repeat(heads // len(slots), axis=0)
        scores = np.einsum("hd,hsd->hs", query, seen[:, :, 0]) / math.sqrt(DIM)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out.append(np.einsum("hs,hsd->hd", weights, seen[:, :, 1]).reshape(-1))
    return np.array(out)


def assert_cache(found, wanted):
    """But for new keys, which may be rounded the other way, every element is the same."""
    found, wanted = np.float64(found), np.float64(wanted)
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2, equal_nan=True)
    differ = (found != wanted) & ~np.isnan(wanted)
    assert differ.sum() <= 1e-2 * found.shape[0] * found.shape[1] * DIM


def interpret(rows, rotation, cache, positions, heads, window, blanks=0):
    """As `decode_attention.attend`, its program executed with NumPy."""
    batch, kv_heads, slots = cache.shape[:3]
    plan = decode_attention.Plan(batch, heads, kv_heads, slots, window, cache.dtype, blanks)
    arrays = {
        "rows": rows,
        "cos": rotation[0],
        "sin": rotation[1],
        "position": positions,
        "cache": cache,
        "out": np.full(batch * heads * DIM, np.nan, np.float32),
        "blank": np.zeros(blanks, np.uint16),
    }
    with np.errstate(under="ignore"):
        results = interpreter.run(
            lambda ops: decode_attention.program(ops, plan),
            {name: np.array(array) for name, array in arrays.items()},
            blocks=plan.blocks,
            warps=decode_attention.WARPS,
            shared_slots=plan.shared_slots,
            cluster=plan.splits,
        )
    return results["out"].reshape(batch, -1), results["cache"], results["blank"]


@pytest.mark.once
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_program_is_attention(case):
    heads, kv_heads, slots, live, window = case
    arguments = make(heads, kv_heads, slots, live)
    found, cache, _ = interpret(*arguments, heads, window)
    rows, rotation, before, positions = arguments
    assert_cache(cache, with_own_tokens(rows, rotation, before, positions, heads))
    wanted = expected(rows, rotation, cache, positions, heads, window)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("blanks", [8, 1000, 100_000])
def test_program_makes_blanks_for_the_chain_after_it(blanks):
    _, _, blank = interpret(*make(4, 2, 64, [5]), 4, None, blanks)
    assert (blank == staging.BLANK).all()


@pytest.mark.once
def test_a_token_past_the_last_slot_changes_nothing():
    rows, rotation, cache, positions = make(4, 2, 64, [65])
    found, changed, _ = interpret(rows, rotation, cache, positions, 4, None)
    np.testing.assert_array_equal(changed, cache)
    wider = jnp.pad(cache, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    _, wider, _ = interpret(rows, rotation, wider, positions, 4, None)
    wanted = expected(rows, rotation, wider, positions, 4, None)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["grouped", "long batch"])
def test_kernel_lowers_for_cuda(case):
    heads, kv_heads, slots, live, window = CASES[case]
    attend = jax.jit(decode_attention.attend, static_argnames=("heads", "window"))
    traced = attend.trace(*make(heads, kv_heads, slots, live), heads=heads, window=window)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert "output_operand_alias" in text  # the cache is changed in place


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="JAX finds no GPU")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_gives_attention(case, dtype):
    heads, kv_heads, slots, live, window = case
    arguments = make(heads, kv_heads, slots, live, dtype)
    found, cache, blank = decode_attention.attend(
        *arguments, heads=heads, window=window, blanks=1 << 20
    )
    assert blank.shape == (1 << 20,) and (blank == staging.BLANK).all()
    rows, rotation, before, positions = arguments
    assert_cache(cache, with_own_tokens(rows, rotation, before, positions, heads))
    wanted = expected(rows, rotation, cache, positions, heads, window)
    rounding = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted, rtol=rounding, atol=rounding / math.sqrt(max(live))
    )


def by_interpreter(rows, rotation, cache, positions, *, heads, window, blanks):
    """`attend`, its program executed on the CPU."""

    def call(rows, cos, sin, cache, positions):
        rows, cos, sin, cache, positions = map(np.asarray, (rows, cos, sin, cache, positions))
        angles = cos.reshape(len(rows), -1), sin.reshape(len(rows), -1)
        mixed, *others = interpret(rows, angles, cache, positions, heads, window, blanks)
        return mixed.astype(rows.dtype), *others

    mixed = jax.ShapeDtypeStruct((len(rows), heads * DIM), rows.dtype)
    results = mixed, cache, jax.ShapeDtypeStruct((blanks,), jnp.uint16)
    return jax.pure_callback(call, results, rows, *rotation, cache, positions)


def decode(model, tokens, prompt):
    """Hidden states of the tokens after a prompt, one after the other, and the cache at the end."""
    model = SplitModules.of(model)

    @jax.jit
    def extend(model, tokens, cache=None):
        return model.build().hidden(tokens, cache)

    cache, out = widen(extend(model, tokens[:, :prompt])[1], 32), []
    for i in range(prompt, tokens.shape[1]):
        hidden, cache = extend(model, tokens[:, i : i + 1], cache)
        out.append(hidden)
    return np.concatenate(out, axis=1), cache


@pytest.mark.parametrize(
    "batch, qk_norm, windows",
    [(1, False, None), pytest.param(2, True, (3, None), marks=pytest.mark.slow)],
    ids=str,
)
def test_model_decodes_with_it_as_without(batch, qk_norm, windows, monkeypatch):
    config = dataclasses.replace(CONFIG, head_dim=DIM, qk_norm=qk_norm, sliding_windows=windows)
    model = llama.Llama(config, dtype=jnp.float16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (batch, 9)))
    monkeypatch.setattr(attention, "has_decode_kernel", lambda cache: False)
    wanted, wanted_cache = decode(model, tokens, 5)
    monkeypatch.setattr(attention, "has_decode_kernel", lambda cache: True)
    if not HAS_GPU:
        monkeypatch.setattr(decode_attention, "attend", by_interpreter)
    found, cache = decode(model, tokens, 5)
    # float16 of numbers of size 1 to 4, through two layers
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)
    for a, b in zip(cache.layers, wanted_cache.layers, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(cache.lengths, wanted_cache.lengths)


@pytest.mark.slow
def test_packed_model_decodes_as_its_dense_twin():
    """A block of single matrices, and one of pairs.

    On a GPU through chains of products, elsewhere through the products one after the other.
    """
    shape = dict(hidden_size=256, intermediate_size=272, num_attention_heads=2, head_dim=DIM)
    config = dataclasses.replace(CONFIG, qkv_bias=True, **shape)
    dense = llama.Llama(config, dtype=jnp.float16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def sparse(*shape):
        values = rng.standard_normal(shape) / np.sqrt(0.4 * shape[-1])
        return jnp.asarray(values * (rng.random(shape) < 0.4), jnp.float16)

    for block, pairs in zip(dense.layers, (False, True), strict=True):
        bias = block.attention.qkv.bias
        bias[...] = jnp.asarray(rng.standard_normal(bias.shape), bias.dtype)
        mlp, attention = block.mlp, block.attention
        for layer in attention.qkv, attention.out, mlp.gate_up, mlp.down:
            rows, cols = layer.out_features, layer.in_features
            if pairs:
                become_pair(layer, sparse(1, rows, 256), sparse(1, 256, cols))
            else:
                layer.kernel[...] = sparse(rows, cols).T
    encoding = None if HAS_GPU else "bitmask"  # which compiles faster for CPUs
    packed, report = export.pack(dense, rules=macko_jax.Rule("layers/.*", encoding=encoding))
    assert len(report.packed) == 8  # four of each block; a pair is one layer
    tokens = jnp.asarray(rng.integers(0, 61, (1, 8)))
    wanted, found = (np.float32(decode(model, tokens, 4)[0]) for model in (dense, packed))
    assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)
