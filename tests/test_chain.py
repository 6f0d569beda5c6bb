"""Chains of products: the kernel, and the products one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import macko_jax
from macko_jax.experimental import Step, fused_chain, fused_spmv
from macko_jax.gpu import chain, occupancy
from macko_jax.gpu.kernel import Fusion
from macko_jax.gpu.staging import BLANK
from macko_jax.lanes import interpreter
from tests.kernels import ARRAYS, STORED, ask, held, needs_gpu, sparse, vectors

EPS = 1e-5
HIDDEN, WIDE, NEXT = 72, 136, 104


def draw(i, shape, dtype):
    return (sparse(*shape, 0.4, np.float32, seed=i) / 4).astype(dtype)


def make(hidden=HIDDEN, wide=WIDE, after=NEXT, encoding=None, dtype=np.float16, values=None):
    """Matrices, x, residual stream and norm scale of what follows attention in a transformer."""
    shapes = [(hidden, 40), (2 * wide, hidden), (hidden, wide), (after, hidden)]
    matrices = [
        macko_jax.compress(draw(i, shape, dtype), encoding=encoding, dtype=values)
        for i, shape in enumerate(shapes)
    ]
    x, residual = (vectors(1, n, n, dtype) for n in (40, hidden))
    return matrices, x, residual, 1 + vectors(1, hidden, 2, dtype)[0]


def steps(matrices, residual, scale):
    out, gate_up, down, after = matrices
    return [
        Step(out, add=residual),
        Step(gate_up, norm=(scale, EPS)),
        Step(down, gated=True, add=0, kept=True),
        Step(after, norm=(scale, EPS)),
    ]


def weight(i, matrix):
    """What the i-th matrix holds, float64."""
    return held(
        draw(i, matrix.shape, matrix.dtype), None if matrix.scales is None else matrix.values.dtype
    )


def exact(matrices, x, residual, scale):
    """The last two results in float64, each step's input rounded as the kernel rounds it."""
    dtype = matrices[0].dtype
    out, gate_up, down, after = (weight(i, matrix) for i, matrix in enumerate(matrices))
    x, residual, scale = (np.asarray(a, np.float64).reshape(-1) for a in (x, residual, scale))
    rounded = lambda v: v.astype(dtype).astype(np.float64)
    norm = lambda v: v / np.sqrt((v * v).mean() + EPS) * scale
    stream = out @ x + residual
    gate, up = np.split(gate_up @ norm(rounded(stream)), 2)
    stream = stream + down @ rounded(gate / (1 + np.exp(-gate)) * up)
    return stream, after @ norm(rounded(stream))


def assert_close(found, wanted, eps):
    """Each result within some roundings of its inputs, which add up like random errors."""
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64).reshape(-1), b, rtol=4 * eps, atol=4 * eps * np.abs(b).max()
        )


def problems_of(matrices, fusions):
    """What a chain of float16 vectors is asked for."""
    x = np.zeros((1, 1), np.float16)
    return tuple(ask("spmv", m, x, fusion=fusion) for m, fusion in zip(matrices, fusions))


def interpret(plan, matrices, **others):
    """All arrays after the program is executed with NumPy, the results among them."""
    arrays = {
        f"{name}{i}": np.asarray(getattr(m, name))
        for i, m in enumerate(matrices)
        for name in ARRAYS
    } | others
    arrays |= {
        f"row_scales{i}": np.asarray(m.scales)
        for i, m in enumerate(matrices)
        if m.scales is not None
    }
    assert set(arrays) == set(plan.names)
    for i in plan.kept:
        arrays[f"y{i}"] = np.full(matrices[i].shape[0], np.nan, np.float32)
    arrays["exchange"] = np.full(plan.exchanged, BLANK, np.uint16)
    return interpreter.run(
        lambda ops: chain.program(ops, plan),
        arrays,
        blocks=plan.blocks,
        warps=chain.WARPS,
        shared_slots=plan.shared_slots,
    )


@pytest.mark.once
@pytest.mark.parametrize(
    "encoding,values,blocks,ahead",
    [*((*stored, 5, 2) for stored in STORED), ("delta4", None, 1, 3), ("two_bank", "int8", 1, 3)],
)
def test_program(encoding, values, blocks, ahead, monkeypatch):
    monkeypatch.setattr(occupancy, "prefetch_distance", lambda layout, dtype, blocks: ahead)
    matrices, x, residual, scale = make(encoding=encoding, values=values)
    fusion = functools.partial(Fusion, scaled=values is not None)
    fusions = [
        fusion(add=True),
        fusion(EPS),
        fusion(gated=True, add=True, added=0, kept=True),
        fusion(EPS, kept=True),
    ]
    plan = chain.Plan(problems_of(matrices, fusions), blocks)
    arrays = interpret(plan, matrices, x=x, add0=residual, scale1=scale, scale3=scale)
    assert not (arrays["exchange"] == BLANK).any()
    found = arrays["y2"], arrays["y3"]
    assert_close(found, exact(matrices, x, residual, scale), np.finfo(np.float16).eps)


@pytest.mark.once
@pytest.mark.parametrize("kept", [False, True])
def test_only_what_is_needed_is_published(kept):
    """Of gate and up their product, unless they are results themselves."""
    (_, gate_up, down, _), _, residual, scale = make()
    fusions = [Fusion(EPS, kept=kept), Fusion(gated=True, kept=True)]
    plan = chain.Plan(problems_of([gate_up, down], fusions), 3)
    assert plan.exchanged == (2 * WIDE if kept else WIDE)
    arrays = interpret(plan, [gate_up, down], x=residual, scale0=scale)
    assert not (arrays["exchange"] == BLANK).any()
    x, scale = (np.asarray(a, np.float64) for a in (residual[0], scale))
    gate_up, down = weight(1, gate_up), weight(2, down)
    wide = gate_up @ (x / np.sqrt((x * x).mean() + EPS) * scale)
    gate, up = np.split(wide, 2)
    wanted = [wide] * kept + [down @ (gate / (1 + np.exp(-gate)) * up)]
    found = [arrays[f"y{i}"] for i in plan.kept]
    assert_close(found, wanted, np.finfo(np.float16).eps)


@pytest.mark.once
def test_what_is_no_number_is_published_as_such():
    """Not as what is missing, for which other blocks would wait for ever."""
    ops = interpreter.NumpyLanes(
        {"exchange": np.full(64, BLANK, np.uint16)}, blocks=1, threads=32, shared_slots=8
    )
    nan = np.full(32, 0xFFFFFFFF, np.uint32).view(np.float32)  # becomes 0xFFFF in 16 bits
    for dtype in jnp.float16, jnp.bfloat16:
        ops.publish("exchange", ops.thread(), nan, dtype, ops.thread() < 32)
        published = ops.arrays["exchange"][:32]
        assert (published != BLANK).all() and np.isnan(published.view(dtype)).all()


def lowered(platform, arguments):
    function = jax.jit(lambda m, x, r, s: fused_chain(x, steps(m, r, s)))
    return function.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.slow
def test_one_kernel_on_cuda_where_it_serves():
    served = make(136, 272, 144)
    assert lowered("cuda", served).count("@mosaic_gpu") == 1
    assert lowered("cpu", served).count("@mosaic_gpu") == 0
    # Fewer rows than blocks, rows that are not whole pieces, and float32: a kernel for each step.
    for other in make(), make(136, 270, 144), make(136, 272, 144, "delta4", np.float32):
        assert lowered("cuda", other).count("@mosaic_gpu") == 4
    wide = np.concatenate([served[1]] * 2)  # two vectors
    text = lowered("cuda", (served[0], wide, np.concatenate([served[2]] * 2), served[3]))
    assert "stablehlo.rsqrt" in text


@pytest.mark.slow
def test_layers_are_one_kernel_too():
    layers = []
    for i, shape in enumerate([(256, 512), (512, 256)]):
        layer = nnx.Linear(
            *shape, use_bias=False, dtype=np.float16, param_dtype=np.float16, rngs=nnx.Rngs(i)
        )
        layer.kernel[...] = sparse(*shape, 0.5, np.float16, seed=i) / 16
        layers.append(macko_jax.flax_nnx.substitute(layer, macko_jax.Rule(dtype="int8"))[0])
    graph, state = nnx.split(layers)

    @jax.jit
    def function(state, x):
        return macko_jax.flax_nnx.chain(x, [Step(a) for a in nnx.merge(graph, state)])

    x = vectors(1, 256, dtype=np.float16)
    text = function.trace(state, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    np.testing.assert_allclose(function(state, x)[0], layers[1](layers[0](x)), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", [(1,), (2, 3)], ids=str)
def test_is_the_products_one_after_the_other(tokens):
    matrices, x, residual, scale = make(encoding="bitmask", dtype=np.float32)
    x, residual = (np.broadcast_to(a[0], (*tokens, a.shape[1])) for a in (x, residual))
    found = jax.jit(lambda m, x, r, s: fused_chain(x, steps(m, r, s)))(matrices, x, residual, scale)
    assert [y.shape for y in found] == [(*tokens, HIDDEN), (*tokens, NEXT)]
    wanted = exact(matrices, x.reshape(-1, 40)[0], residual.reshape(-1, HIDDEN)[0], scale)
    for i in range(int(np.prod(tokens))):
        assert_close([y.reshape(-1, y.shape[-1])[i] for y in found], wanted, 1e-6)


@pytest.mark.slow
def test_derivatives_are_those_of_the_products():
    matrices, x, residual, scale = make(encoding="bitmask", dtype=np.float32)

    def loss(x, residual, scale, separate):
        chained = steps(matrices, residual, scale)
        if separate:
            x1 = fused_spmv(matrices[0], x, add=residual)
            wide = fused_spmv(matrices[1], x1, norm=(scale, EPS))
            x2 = fused_spmv(matrices[2], wide, gated=True, add=x1)
            return (x2**2).sum() + fused_spmv(matrices[3], x2, norm=(scale, EPS)).sum()
        x2, y = fused_chain(x, chained)
        return (x2**2).sum() + y.sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    found, wanted = (gradient(x, residual, scale, separate) for separate in (False, True))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    by_matrix = jax.grad(
        lambda m: fused_chain(x, steps([m, *matrices[1:]], residual, scale))[1].sum(),
        allow_int=True,
    )
    of_values = jax.jit(lambda m: by_matrix(m).values)(matrices[0])
    assert np.any(of_values)


@pytest.mark.slow
def test_one_vector_on_each_device():
    matrices, x, residual, scale = make(136, 272, 144)
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    all_x, all_residual = (
        np.concatenate([k * a for k in range(1, count + 1)]) for a in (x, residual)
    )

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("d"), P("d"), P()), out_specs=P("d"))
    def chained(m, x, r, s):
        return fused_chain(x, steps(m, r, s))

    arguments = matrices, all_x, all_residual, scale
    lowered_here = chained.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered_here.count("@mosaic_gpu") == 1
    found = chained(*arguments)
    for k in range(count):
        assert_close(
            [y[k] for y in found], exact(matrices, (k + 1) * x, (k + 1) * residual, scale), 2.0**-10
        )


def test_errors_say_what_is_wrong():
    matrices, x, residual, scale = make(dtype=np.float32)
    good = steps(matrices, residual, scale)
    with pytest.raises(ValueError, match="at least one step"):
        fused_chain(x, [])
    with pytest.raises(ValueError, match=r"72\] without a gate, got \[1, 104\]"):
        fused_chain(x, [*good, good[1]])
    with pytest.raises(ValueError, match="step 2 adds the result of step 1 to 72 rows"):
        fused_chain(x, [*good[:2], good[2]._replace(add=1)])
    with pytest.raises(ValueError, match="step 0 adds the result of step 0"):
        fused_chain(x, [good[0]._replace(add=0)])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding,values", STORED)
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(136, 272, 144), (1000, 2744, 2008), (4096, 11008, 12288)], ids=str
)
def test_kernel(shape, dtype, encoding, values):
    matrices, x, residual, scale = make(*shape, encoding=encoding, dtype=dtype, values=values)
    assert lowered("cuda", (matrices, x, residual, scale)).count("@mosaic_gpu") == 1
    function = jax.jit(lambda m, x, r, s: fused_chain(x, steps(m, r, s)))
    found = function(matrices, x, residual, scale)
    wanted = exact(matrices, x, residual, scale)
    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(found, wanted, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64)[0] - b) <= 2 * eps * np.linalg.norm(b)
    for _ in range(20):  # the same bits whenever blocks happen to meet
        again = function(matrices, x, residual, scale)
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(found, again))


@pytest.mark.gpu
@needs_gpu
def test_kernel_passes_on_what_is_no_number():
    matrices, x, residual, scale = make(136, 272, 144)
    x[0, 3] = np.nan
    found = jax.jit(lambda m, x, r, s: fused_chain(x, steps(m, r, s)))(matrices, x, residual, scale)
    assert all(np.isnan(np.asarray(y, np.float32)).all() for y in found)
