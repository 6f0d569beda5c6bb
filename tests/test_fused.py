"""Products with a norm or a gate before and a sum after: the kernel, and what it stands for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import macko_jax
from macko_jax.experimental import fused_spmv
from macko_jax.gpu import spmv
from macko_jax.gpu.gather import Settings
from macko_jax.gpu.kernel import Fusion
from tests.kernels import STORED, arrays_of, ask, execute, held, needs_gpu, sparse, vectors

EPS = 1e-5
KINDS = [("norm", False), ("norm", True), ("gated", False), ("gated", True), (None, True)]


def make(rows, cols, density, kind, add, dtype=np.float16):
    """The dense matrix, x [1, cols] (a gate: [1, 2 cols]), the norm's scale, what is added."""
    dense = sparse(rows, cols, density, dtype)
    x = 3 * vectors(1, 2 * cols if kind == "gated" else cols, dtype=dtype)
    scale = 1 + vectors(1, cols, seed=2, dtype=dtype)[0] if kind == "norm" else None
    return dense, x, scale, vectors(1, rows, seed=3, dtype=dtype) if add else None


def options(kind, scale, add):
    return {"norm": None if scale is None else (scale, EPS), "gated": kind == "gated", "add": add}


def assert_exact(y, dense, x, scale, add, rounding=0.0):
    """Against float64, within the bound of a float32 sum, 32 roundings before it and one of y."""
    x, dense = np.asarray(x, np.float64), np.asarray(dense, np.float64)
    if scale is not None:
        x = x / np.sqrt((x * x).mean() + EPS) * np.asarray(scale, np.float64)
    if x.shape[-1] != dense.shape[1]:
        gate, passed = np.split(x, 2, axis=-1)
        x = gate / (1 + np.exp(-gate)) * passed
    exact, size = x @ dense.T, np.abs(x) @ np.abs(dense).T
    if add is not None:
        exact, size = exact + add, size + np.abs(add)
    terms = (dense != 0).sum(1) + 34
    bound = (terms * np.finfo(np.float32).eps + rounding) * size
    assert np.all(np.abs(y - exact) <= bound), np.abs(y - exact).max()


@pytest.mark.once
@pytest.mark.parametrize("encoding,values", STORED)
@pytest.mark.parametrize("kind,add", KINDS)
@pytest.mark.parametrize("shape", [(5, 1, 0.6), (1, 700, 0.5), (37, 301, 0.5)], ids=str)
def test_program(shape, kind, add, encoding, values):
    dense, x, scale, addend = make(*shape, kind, add)
    matrix = macko_jax.compress(dense, encoding=encoding, dtype=values)
    settings = Settings(
        blocks=min(3, shape[0]), warps=4, ahead=2, vectors=1, two_copies=encoding == "two_bank"
    )
    scaled = values is not None
    eps = EPS if kind == "norm" else None
    fusion = Fusion(eps, kind == "gated", add, scaled=scaled)
    plan = spmv.Plan(ask("spmv", matrix, x, fusion=fusion), settings)
    operands = arrays_of(matrix) | {"x": x, "scale": scale, "add": addend}
    if scaled:
        operands["row_scales"] = np.asarray(matrix.scales)
        dense = held(dense, values)
    y = execute(
        spmv.program,
        plan,
        {name: a for name, a in operands.items() if a is not None},
        {"y": np.full((1, shape[0]), np.nan, np.float32)},
        blocks=plan.blocks,
        warps=4,
    )
    assert_exact(y, dense, x, scale, addend)


@pytest.mark.parametrize("density, tokens", [(0.4, ()), (0.4, (2, 3)), (0.0, (1,))], ids=str)
@pytest.mark.parametrize("kind,add", [("norm", True), ("gated", False), (None, True)])
def test_what_it_stands_for(kind, add, density, tokens):
    dense, x, scale, addend = make(21, 40, density, kind, add, np.float32)
    matrix = macko_jax.compress(dense, encoding="bitmask")
    x = np.broadcast_to(x[0], (*tokens, x.shape[1]))
    if addend is not None:
        addend = np.broadcast_to(addend[0], (*tokens, 21))
    y = jax.jit(lambda m, x: fused_spmv(m, x, **options(kind, scale, addend)))(matrix, x)
    assert y.shape == (*tokens, 21)
    for row in y.reshape(-1, 21):
        assert_exact(
            row[None],
            dense,
            x.reshape(-1, x.shape[-1])[:1],
            scale,
            None if addend is None else addend.reshape(-1, 21)[:1],
        )


@pytest.mark.parametrize("kind,add", [("norm", True), ("gated", False)])
def test_derivatives_and_vmap_are_those_of_the_separate_operations(kind, add):
    dense, x, scale, addend = make(13, 24, 0.5, kind, add, np.float32)
    matrix = macko_jax.compress(dense, encoding="bitmask")

    def fused(x, scale, addend):
        return fused_spmv(matrix, x, **options(kind, scale, addend))

    def separate(x, scale, addend):  # two tokens are never one kernel
        two = None if addend is None else jnp.concatenate([addend, addend])
        return fused(jnp.concatenate([x, x]), scale, two)[:1]

    loss = lambda function: lambda *args: (function(*args) ** 2).sum()
    of_matrix = loss(lambda m: fused_spmv(m, x, **options(kind, scale, addend)))

    @jax.jit
    def results(x, scale, addend):
        return (
            jax.grad(loss(fused), (0, 1, 2))(x, scale, addend),
            jax.grad(loss(separate), (0, 1, 2))(x, scale, addend),
            jax.vmap(fused, in_axes=(0, None, None))(jnp.stack([x, 2 * x]), scale, addend)[1],
            fused(2 * x, scale, addend),
            jax.grad(of_matrix, allow_int=True)(matrix).values,
        )

    found, wanted, mapped, alone, by_values = results(x, scale, addend)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mapped, alone, rtol=1e-5, atol=1e-5)
    assert by_values.shape == matrix.values.shape and np.any(by_values)


def lowered(platform, tokens, kind, add, values=None):
    dense, x, scale, addend = make(64, 96, 0.5, kind, add)
    matrix = macko_jax.compress(dense, dtype=values)
    x = jnp.broadcast_to(x, (tokens, x.shape[1]))
    addend = None if addend is None else jnp.broadcast_to(addend, (tokens, 64))
    function = jax.jit(lambda m, x: fused_spmv(m, x, **options(kind, scale, addend)))
    return function.trace(matrix, x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "kind,add,values", [*((*kind, None) for kind in KINDS), ("norm", True, "int8")]
)
def test_one_kernel_for_one_token_on_cuda(kind, add, values):
    arithmetic = "stablehlo.rsqrt", "stablehlo.logistic", "stablehlo.add", "stablehlo.multiply"
    text = lowered("cuda", 1, kind, add, values)
    assert text.count("@mosaic_gpu") == 1 and not any(name in text for name in arithmetic)
    for text in lowered("cuda", 2, kind, add, values), lowered("cpu", 1, kind, add, values):
        assert any(name in text for name in arithmetic)


def test_scales_of_8_bit_values_take_no_kernel_of_their_own():
    matrix = macko_jax.compress(sparse(64, 96, 0.5, np.float16), dtype="int8")
    function = jax.jit(macko_jax.spmv)
    for tokens, alone in (1, True), (2, False):
        traced = function.trace(matrix, vectors(tokens, 96, dtype=np.float16))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == 1 and ("stablehlo.multiply" in text) != alone


def test_old_names_warn_and_work():
    with pytest.warns(DeprecationWarning, match="macko_jax.experimental.fused_spmv"):
        assert macko_jax.fused_spmv is fused_spmv
    assert "fused_spmv" not in dir(macko_jax)


def test_layer():
    layer = nnx.Linear(24, 13, rngs=nnx.Rngs(0))
    layer.kernel[...] = sparse(24, 13, 0.5, np.float32)
    layer.bias[...] = vectors(1, 13)[0]
    packed, _ = macko_jax.flax_nnx.substitute(layer, macko_jax.Rule(encoding="bitmask"))
    _, x, scale, add = make(13, 24, 0.5, "norm", True, np.float32)
    normalized = x / np.sqrt((x * x).mean() + EPS) * scale
    gated = np.concatenate([x, 2 * x], axis=-1)

    @nnx.jit
    def results(packed):
        plain, normed = packed.fused(x), packed.fused(x, norm=(scale, EPS), add=add)
        return plain, normed, packed.fused(gated, gated=True)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    plain, normed, with_gate = results(packed)
    close(plain, layer(x))
    close(normed, layer(normalized) + add)
    close(with_gate, layer(jax.nn.silu(x) * 2 * x))


def test_errors_say_what_is_wrong():
    matrix = macko_jax.compress(sparse(13, 24, 0.5, np.float32))
    x = jnp.ones((1, 24))
    with pytest.raises(ValueError, match=r"\[\.\.\., 48\] with a gate, got \[1, 24\]"):
        fused_spmv(matrix, x, gated=True)
    with pytest.raises(ValueError, match=r"scale .* has shape \[24\], got \[13\]"):
        fused_spmv(matrix, x, norm=(jnp.ones(13), EPS))
    with pytest.raises(ValueError, match="not both"):
        fused_spmv(matrix, x, norm=(jnp.ones(24), EPS), gated=True)
    with pytest.raises(ValueError, match=r"add .* got \[1, 24\]"):
        fused_spmv(matrix, x, add=x)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding,values", STORED)
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "kind,add,shape",
    list(
        itertools.product(
            ["norm", "gated", None], [True], [(5, 1, 0.6), (37, 301, 0.5), (4096, 4096, 0.5)]
        )
    ),
    ids=str,
)
def test_on_gpu(kind, add, shape, dtype, encoding, values):
    dense, x, scale, addend = make(*shape, kind, add, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding, dtype=values)
    dense = held(dense, values)
    product = jax.jit(lambda m, x: fused_spmv(m, x, **options(kind, scale, addend)))
    y = np.asarray(product(matrix, x))
    assert_exact(
        y.astype(np.float64),
        dense,
        x,
        scale,
        np.asarray(addend, np.float64),
        rounding=float(jnp.finfo(dtype).eps),
    )
    np.testing.assert_array_equal(y, product(matrix, x))
