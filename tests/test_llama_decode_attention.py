"""The GPU kernel of one token's attention: its program on the CPU, its lowering, its results."""

import math

import jax
import jax.numpy as jnp
from macko_jax.kernels import emulation
import numpy as np
import pytest

from examples.llama import decode_attention

HAS_GPU = any(device.platform == "gpu" for device in jax.local_devices())
# heads, key-value heads, slots, live tokens, window; more than 1024 slots take several blocks
CASES = {
    "one": (2, 2, 64, 1, None),
    "grouped": (8, 2, 96, 77, None),
    "seven": (14, 2, 96, 50, None),
    "full": (2, 1, 64, 64, None),
    "windowed": (2, 1, 128, 110, 19),
    "short of its window": (2, 1, 64, 7, 19),
    "long": (2, 1, 1100, 1051, None),
    "long, but few live": (2, 1, 2050, 40, None),
    "long and windowed": (2, 1, 1100, 1051, 300),
}
DIM = decode_attention.HEAD_DIM


def make(heads, kv_heads, slots, live, dtype=jnp.float16):
    """A projected row [1, n], the angles of its position, a cache and the position."""
    rng = np.random.default_rng(0)
    row = jnp.asarray(2 * rng.normal(size=(1, (heads + 2 * kv_heads) * DIM)), dtype)
    cache = np.full((1, kv_heads, slots, 2, DIM), np.nan)  # what is not live is never read
    cache[:, :, :live] = rng.normal(size=(1, kv_heads, live, 2, DIM))
    angles = (live - 1) * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    rotation = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return row, rotation, jnp.asarray(cache, dtype), jnp.array([live - 1], jnp.int32)


def expected(row, rotation, cache, position, heads, window):
    """The same in float64: [1, H * D]."""
    live = int(position[0]) + 1
    first = 0 if window is None else max(0, live - window)
    query = np.asarray(row[0, : heads * DIM], np.float64).reshape(heads, 2, DIM // 2)
    cos, sin = (np.asarray(a, np.float64) for a in rotation)
    early, late = query[:, 0], query[:, 1]
    query = np.concatenate([early * cos - late * sin, late * cos + early * sin], axis=1)
    cache = np.asarray(cache[0, :, first:live], np.float64).repeat(heads // cache.shape[1], axis=0)
    scores = np.einsum("hd,hsd->hs", query, cache[:, :, 0]) / math.sqrt(DIM)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("hs,hsd->hd", weights, cache[:, :, 1]).reshape(1, -1)


def emulate(row, rotation, cache, position, heads, window):
    plan = decode_attention.Plan(heads, cache.shape[1], cache.shape[2], window, cache.dtype)
    size = heads * DIM if plan.splits == 1 else plan.blocks * plan.group * plan.width
    arrays = {"query": row, "cos": rotation[0], "sin": rotation[1], "cache": cache,
              "position": position, "out": np.full(size, np.nan, np.float32)}  # fmt: skip
    ops = emulation.NumpyLanes(
        {name: np.array(array) for name, array in arrays.items()}, blocks=plan.blocks,
        threads=32 * plan.warps, shared_slots=plan.shared_slots,
    )  # fmt: skip
    with np.errstate(under="ignore"):
        decode_attention.program(ops, plan)
    out = ops.arrays["out"]
    return out if plan.splits == 1 else decode_attention.join(jnp.asarray(out), plan)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_program_is_attention(case):
    heads, kv_heads, slots, live, window = case
    arguments = make(heads, kv_heads, slots, live)
    found = emulate(*arguments, heads, window)
    wanted = expected(*arguments, heads, window)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["grouped", "long and windowed"])
def test_kernel_lowers_for_cuda(case):
    heads, kv_heads, slots, live, window = CASES[case]
    attend = jax.jit(decode_attention.attend, static_argnames=("heads", "window"))
    traced = attend.trace(*make(heads, kv_heads, slots, live), heads=heads, window=window)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="JAX finds no GPU")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_gives_attention(case, dtype):
    heads, kv_heads, slots, live, window = case
    arguments = make(heads, kv_heads, slots, live, dtype)
    found = decode_attention.attend(*arguments, heads=heads, window=window)
    wanted = expected(*arguments, heads, window)
    rounding = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted, rtol=rounding, atol=rounding / math.sqrt(live)
    )
