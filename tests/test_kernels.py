"""The GPU kernel: its program executed on the CPU, its lowering for CUDA, and its results on a GPU."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from macko_jax import dispatch
from macko_jax.kernels import config, emulation, strips
from macko_jax.kernels import spmv as kernel

HAS_GPU = any(d.platform == "gpu" for d in jax.local_devices())
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="JAX finds no GPU")

# rows, cols, density: one row, one column, odd sizes, gaps beyond 15 zeros, empty rows, all dense
SHAPES = [(1, 1, 1.0), (5, 1, 0.6), (1, 700, 0.5), (9, 33, 1.0), (37, 300, 0.5), (40, 1000, 0.02)]
SETTINGS = config.Settings(blocks=3, warps=4, unroll=2, vectors=1, stage_x=True)


def sparse(rows, cols, density, dtype, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < density)
    return np.asarray(jnp.asarray(dense, dtype))


def vectors(batch, cols, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, cols)).astype(np.float32)


def abstract(matrix):
    return strips.Matrix(
        matrix.shape, matrix.encoding, matrix.lanes, matrix.stored, matrix.dtype)


def emulate(matrix, x, settings):
    plan = kernel.Plan(abstract(matrix), len(x), settings)
    arrays = {name: np.asarray(getattr(matrix, name))
              for name in ("values", "codes", "row_offsets", "starts")}
    unwritten = np.full((len(x), matrix.shape[0]), np.nan, np.float32)
    ops = emulation.NumpyLanes(
        arrays | {"x": x, "y": unwritten}, blocks=plan.blocks, threads=32 * settings.warps,
        shared_slots=plan.shared_slots)
    kernel.program(ops, plan)
    return ops.arrays["y"].reshape(len(x), -1)


def assert_product(y, dense, x):
    """Within the bound of a float32 sum in any order: (terms + 2) eps sum |w x|, Higham section 4.2."""
    exact = x.astype(np.float64) @ dense.astype(np.float64).T
    terms = (dense != 0).sum(1) + 2
    bound = terms * np.finfo(np.float32).eps * (np.abs(x.astype(np.float64))
                                                @ np.abs(dense.astype(np.float64)).T)
    assert np.all(np.abs(y - exact) <= bound), np.abs(y - exact).max()


@pytest.mark.parametrize("encoding", ["delta4", "bitmask"])
@pytest.mark.parametrize("lanes", [1, 8, 32])
@pytest.mark.parametrize("rows,cols,density", SHAPES)
def test_program_on_shapes(rows, cols, density, lanes, encoding):
    dense = sparse(rows, cols, density, jnp.float16)
    matrix = macko_jax.compress(dense, encoding=encoding, lanes=lanes)
    x = vectors(1, cols)
    assert_product(emulate(matrix, x, SETTINGS), dense, x)


@pytest.mark.parametrize("encoding", ["delta4", "bitmask"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("batch,per_pass,unroll,stage_x", [
    (3, 2, 1, True), (5, 4, 3, True), (2, 1, 2, False)])
def test_program_on_types_and_batches(batch, per_pass, unroll, stage_x, dtype, encoding):
    dense = sparse(23, 410, 0.4, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding)
    x = vectors(batch, 410)
    settings = config.Settings(
        blocks=2, warps=4, unroll=unroll, vectors=per_pass, stage_x=stage_x)
    assert_product(emulate(matrix, x, settings), dense, x)


def test_program_reads_only_its_own_rows():
    """Empty rows between full ones, and spare capacity that holds NaN."""
    dense = sparse(12, 90, 1.0, jnp.float32).copy()
    dense[[0, 4, 5, 11]] = 0
    matrix = macko_jax.compress(dense, capacity=150, encoding="delta4")
    values = np.asarray(matrix.values).copy()
    values[8 * int(matrix.row_offsets[-1]):] = np.nan
    matrix = macko_jax.MackoMatrix(
        values, matrix.codes, matrix.row_offsets, matrix.starts, matrix.shape, matrix.encoding,
        matrix.lanes)
    x = vectors(1, 90)
    assert_product(emulate(matrix, x, SETTINGS), dense, x)


def lowered(implementation, platform, batch=1):
    matrix = macko_jax.compress(sparse(64, 96, 0.5, jnp.float16))
    x = jnp.ones((batch, 96), jnp.float16)
    product = jax.jit(lambda m, x: macko_jax.spmv(m, x, implementation=implementation))
    return product.trace(matrix, x).lower(lowering_platforms=(platform,)).as_text()


def test_lowers_to_the_kernel_for_cuda_alone():
    assert "mosaic_gpu" in lowered(None, "cuda")
    assert "mosaic_gpu" in lowered("mosaic_gpu", "cuda")
    assert "mosaic_gpu" not in lowered("xla", "cuda")
    assert "mosaic_gpu" not in lowered(None, "cpu")
    with pytest.raises(NotImplementedError, match="lowered for cpu"):
        lowered("mosaic_gpu", "cpu")


def test_many_vectors_go_through_a_dense_decode():
    assert "mosaic_gpu" in lowered(None, "cuda", config.BREAK_EVEN_BATCH)
    assert "mosaic_gpu" not in lowered(None, "cuda", config.BREAK_EVEN_BATCH + 1)
    assert "mosaic_gpu" in lowered("mosaic_gpu", "cuda", config.BREAK_EVEN_BATCH + 1)


def test_explains_why_not():
    problem = dispatch.Problem(
        product="spmv", platform="cuda", shape=(8, 8), encoding="delta4", lanes=1, stored=8,
        batch=1, dtypes=(np.dtype("float16"), np.dtype("float64")), out_dtype=np.dtype("float64"))
    reasons = dispatch.explain(problem)
    assert "float64" in reasons["mosaic_gpu"] and reasons["xla"] is None


@pytest.mark.parametrize("wrong", [
    {"warps": 3}, {"warps": 36}, {"vectors": 3}, {"blocks": 0}, {"unroll": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="must be"):
        config.Settings(**{"blocks": 1, "warps": 4, "unroll": 1, "vectors": 1, "stage_x": True,
                           **wrong})


@pytest.mark.parametrize("rows,cols,density,batch", [
    (11008, 4096, 0.5, 1), (4096, 11008, 0.1, 3), (3, 60000, 0.3, 16), (1, 1, 1.0, 1)])
def test_chosen_settings_fit_the_device(rows, cols, density, batch):
    stored = int(rows * cols * density) // 8 * 8
    matrix = strips.Matrix((rows, cols), "delta4", 32, stored, np.dtype("float16"))
    settings = config.choose(matrix, batch)
    plan = kernel.Plan(matrix, batch, settings)
    assert 4 * plan.shared_slots <= 227 * 1024
    assert settings.blocks <= rows


GPU_CASES = list(itertools.product(
    ["delta4", "bitmask"], [jnp.float16, jnp.bfloat16, jnp.float32],
    SHAPES + [(300, 2051, 0.3), (33, 70000, 0.02), (4096, 4096, 0.5), (257, 55000, 0.2)],
    [1, 5]))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding,dtype,shape,batch", GPU_CASES)
def test_on_gpu(encoding, dtype, shape, batch):
    rows, cols, density = shape
    dense = sparse(rows, cols, density, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding)
    x = vectors(batch, cols)
    product = jax.jit(lambda m, x: macko_jax.spmv(m, x, implementation="mosaic_gpu"))
    y = np.asarray(product(matrix, x))
    assert_product(y, dense, x)
    np.testing.assert_array_equal(y, product(matrix, x))


@pytest.mark.gpu
@needs_gpu
def test_gradients_on_gpu():
    dense = sparse(130, 200, 0.4, jnp.float32)
    matrix = macko_jax.compress(dense)
    x, y = vectors(1, 200)[0], vectors(1, 130)[0]

    def loss(values, x):
        m = macko_jax.MackoMatrix(values, matrix.codes, matrix.row_offsets, matrix.starts,
                                  matrix.shape, matrix.encoding, matrix.lanes)
        return jnp.vdot(macko_jax.spmv(m, x), y)

    by_values, by_x = jax.jit(jax.grad(loss, (0, 1)))(matrix.values, x)
    np.testing.assert_allclose(by_x, y @ dense, rtol=1e-4, atol=1e-4)
    tangent = np.asarray(jax.jvp(lambda v: loss(v, x), (matrix.values,), (matrix.values,))[1])
    np.testing.assert_allclose(tangent, np.vdot(by_values, matrix.values), rtol=1e-4)
