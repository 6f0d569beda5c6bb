"""The GPU kernels: programs executed on the CPU, their lowering for CUDA, and results on a GPU."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from macko_jax.format import cards, quantization, unpack
from macko_jax.format.layout import Layout
from macko_jax.gpu import densify, sddmm, select, spmv, spmv_transposed
from macko_jax.gpu.gather import Settings
from macko_jax.gpu.kernel import Kernel
from macko_jax.gpu.staging import Vectors
from macko_jax.ops import dispatch
from tests.kernels import (
    ENCODINGS,
    arrays_of,
    ask,
    ask_for,
    assert_product,
    execute,
    needs_gpu,
    sparse,
    vectors,
)
from tests.test_tuning import on

# rows, cols, density: one row, one column, odd sizes, gaps beyond 15 zeros, empty rows, all dense
SHAPES = [(1, 1, 1.0), (5, 1, 0.6), (1, 700, 0.5), (9, 33, 1.0), (37, 300, 0.5), (40, 1000, 0.02)]
SETTINGS = Settings(blocks=3, warps=4, ahead=2, vectors=1)


def interpret(matrix, x, settings):
    plan = spmv.Plan(ask("spmv", matrix, x), settings)
    y = np.full((len(x), matrix.shape[0]), np.nan, np.float32)
    arrays = arrays_of(matrix) | {"x": x}
    return execute(spmv.program, plan, arrays, {"y": y}, blocks=plan.blocks, warps=settings.warps)


@pytest.mark.once
@pytest.mark.parametrize("name", select.KERNELS)
def test_every_kernel_has_the_functions_of_the_protocol(name):
    for function in ("why_not", "plan", "program", "run"):
        wanted = list(inspect.signature(getattr(Kernel, function)).parameters.values())[1:]
        found = list(inspect.signature(getattr(select.KERNELS[name], function)).parameters.values())
        kinds = [p.kind is p.VAR_POSITIONAL for p in found]
        # A chain has one more array before its operands.
        assert kinds[: len(wanted) - 1] == [p.kind is p.VAR_POSITIONAL for p in wanted[:-1]]
        assert len(found) - len(wanted) == (name == "chain" and function == "run")


@pytest.mark.once
@pytest.mark.parametrize("encoding,lanes", list(itertools.product(ENCODINGS, [1, 8, 32])))
@pytest.mark.parametrize("rows,cols,density", SHAPES)
def test_program_on_shapes(rows, cols, density, encoding, lanes):
    dense = sparse(rows, cols, density, jnp.float16)
    matrix = macko_jax.compress(dense, encoding=encoding, lanes=lanes)
    x = vectors(1, cols)
    assert_product(interpret(matrix, x, SETTINGS), dense, x)


@pytest.mark.once
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "batch,x_dtype,per_pass,ahead",
    [
        (3, "float32", 2, 1),
        (5, "float32", 4, 3),
        (2, "float16", 1, 2),
        (3, "float16", 2, 1),
        (9, "bfloat16", 8, 1),
        (4, "float16", 4, 2),
    ],
)
def test_program_on_types_and_batches(batch, x_dtype, per_pass, ahead, dtype, encoding):
    dense = sparse(23, 410, 0.4, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding)
    x = vectors(batch, 410, dtype=x_dtype)
    settings = Settings(blocks=2, warps=4, ahead=ahead, vectors=per_pass)
    assert_product(interpret(matrix, x, settings), dense, x)


@pytest.mark.once
@pytest.mark.parametrize("batch,x_dtype", [(1, "float32"), (1, "float16"), (3, "bfloat16")])
@pytest.mark.parametrize("lanes", [8, 32])
@pytest.mark.parametrize("rows,cols,density", SHAPES)
def test_program_with_two_copies(rows, cols, density, lanes, batch, x_dtype):
    dense = sparse(rows, cols, density, jnp.float16)
    matrix = macko_jax.compress(dense, encoding="two_bank", lanes=lanes)
    x = vectors(batch, cols, dtype=x_dtype)
    settings = dataclasses.replace(SETTINGS, vectors=min(2, batch), two_copies=True)
    assert_product(interpret(matrix, x, settings), dense, x)


@pytest.mark.once
@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("encoding,cols", [("delta4", 301), ("delta5", 300), ("two_bank", 300)])
def test_program_with_a_narrow_x(cols, encoding, x_dtype):
    dense = sparse(37, cols, 0.3, jnp.float16)
    matrix = macko_jax.compress(dense, encoding=encoding, lanes=8)
    x = vectors(3, cols, dtype=x_dtype)
    settings = dataclasses.replace(SETTINGS, narrow=True)
    assert_product(interpret(matrix, x, settings), dense, x)
    with pytest.raises(ValueError, match="2 vectors of float16 cannot be narrow"):
        Vectors("float16", length=8, count=2, batch=2, narrow=True)


@pytest.mark.once
@pytest.mark.parametrize("warps", [1, 2, 3])
def test_fewer_warps_work_than_a_block_has(warps):
    dense = sparse(37, 301, 0.3, jnp.float16)
    matrix = macko_jax.compress(dense, lanes=8)
    problem = densify.problem_for(matrix.layout, "float16", "float16")
    packed = arrays_of(matrix)
    found = densified(problem, packed, blocks=3, warps=warps, rows_per_warp=1)
    np.testing.assert_array_equal(found, dense)
    y = vectors(2, 37)
    problem = ask("spmv_transposed", matrix, y)
    found = transposed(problem, packed, y, warps=warps, share=3, rows_per_warp=1)
    assert_product(found, dense.T, y)


def densified(problem, packed, **settings):
    """The dense matrix, by the program."""
    plan = densify.Plan(problem, **settings)
    out = np.full(plan.layout.shape, np.nan, problem.out_dtype)
    return execute(densify.program, plan, packed, {"y": out}, blocks=plan.blocks, warps=4)


def transposed(problem, packed, y, warps=4, **settings):
    """The transposed product, by the program."""
    plan = spmv_transposed.Plan(problem, warps=warps, **settings)
    shape = len(y), plan.share, plan.layout.shape[1]
    partial = execute(
        spmv_transposed.program,
        plan,
        packed | {"y": y},
        {"x": np.full(shape, np.nan, np.float32)},
        blocks=plan.blocks,
        warps=4,
    )
    return partial.sum(1, dtype=np.float32)


@pytest.mark.once
@pytest.mark.parametrize("encoding", ["delta4", "delta5"])
@pytest.mark.parametrize("dtype", quantization.NAMES)
@pytest.mark.parametrize("dense_dtype", ["float16", "bfloat16", "float32"])
def test_8_bit_values_are_densified_exactly(dtype, dense_dtype, encoding):
    dense = sparse(37, 300, 0.5, jnp.float32)
    matrix = macko_jax.compress(dense, dtype=dtype, encoding=encoding)
    problem = densify.problem_for(matrix.layout, dtype, dense_dtype)
    found = densified(problem, arrays_of(matrix), blocks=2, warps=4, rows_per_warp=1)
    exact, _ = quantization.quantize(dense, dtype)
    np.testing.assert_array_equal(found.astype(np.float64), exact.astype(np.float64))


@pytest.mark.once
@pytest.mark.parametrize(
    "rows,cols,density,dtype,lanes,encoding",
    [
        (1, 1, 1.0, jnp.float16, 4, "delta4"),
        (5, 1, 0.6, jnp.float32, 1, "delta4"),
        (9, 33, 1.0, jnp.float16, 4, "two_bank"),
        (37, 300, 0.5, jnp.bfloat16, 32, "delta4"),
        (7, 94, 0.5, jnp.float16, 8, "delta5"),
        (37, 300, 0.02, jnp.bfloat16, 32, "delta5"),
        (7, 94, 0.5, jnp.float16, 8, "two_bank"),
        (37, 300, 0.1, jnp.bfloat16, 32, "two_bank"),
        (7, 94, 0.5, jnp.float16, 8, "delta4"),
        (40, 1000, 0.02, jnp.float32, 16, "delta4"),
        (37, 700, 0.5, jnp.float16, 32, "two_bank"),
    ],
)
def test_other_programs(rows, cols, density, dtype, lanes, encoding):
    """The dense matrix, the transposed product and the gradient by the values."""
    dense = sparse(rows, cols, density, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding, lanes=lanes)
    packed, rows_per_warp = arrays_of(matrix), max(1, 16 // lanes)

    problem = densify.problem_for(matrix.layout, dtype, dtype)
    found = densified(problem, packed, blocks=2, warps=4, rows_per_warp=rows_per_warp)
    np.testing.assert_array_equal(found, dense)

    y = vectors(2, rows, dtype=dtype)
    problem = ask("spmv_transposed", matrix, y)
    found = transposed(problem, packed, y, share=3, rows_per_warp=rows_per_warp)
    assert_product(found, dense.T, y)

    x = vectors(2, cols, dtype=dtype)
    settings = Settings(blocks=3, warps=4, ahead=2, vectors=2)
    structure = arrays_of(matrix, "codes", "row_offsets", "starts")
    rounding = 2 * jnp.finfo(dtype).eps  # of the sum, and of its rounding to the values' type
    place = jax.jit(functools.partial(unpack.slot_positions, matrix.layout))
    row, column, valid = place(matrix.positions)
    product = y.astype(np.float32).T @ x.astype(np.float32)
    exact = np.where(valid, product[row, column], 0)
    for pattern in packed["values"], packed["values"][:0]:  # is padding told by the values?
        plan = sddmm.Plan(ask("sddmm", matrix, x, dtype), settings, masked=pattern.size > 0)
        out = execute(
            sddmm.program,
            plan,
            structure | {"x": x, "y": y, "values": pattern},
            {"gradient": np.full(matrix.stored, np.nan, dtype)},
            blocks=3,
            warps=4,
        )
        wanted = np.where(pattern == 0, 0, exact) if pattern.size else exact
        np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=rounding, atol=rounding)


@pytest.mark.once
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_programs_on_8_bit_values(dtype, encoding):
    dense = sparse(21, 300, 0.5, jnp.float32)
    matrix = macko_jax.compress(dense, dtype=dtype, encoding=encoding)
    unscaled = dataclasses.replace(matrix, scales=None)
    dense = quantization.quantize(dense, dtype)[0].astype(np.float32)
    x, y = vectors(2, 300, dtype=np.float16), vectors(1, 21)
    settings = dataclasses.replace(SETTINGS, vectors=2)
    assert_product(interpret(unscaled, x, settings), dense, x)

    problem = ask("spmv_transposed", unscaled, y)
    found = transposed(problem, arrays_of(unscaled), y, share=2, rows_per_warp=1)
    assert_product(found, dense.T, y)


@pytest.mark.once
def test_program_reads_only_its_own_rows():
    """Empty rows between full ones, and spare capacity that holds NaN."""
    dense = sparse(12, 90, 1.0, jnp.float32).copy()
    dense[[0, 4, 5, 11]] = 0
    matrix = macko_jax.compress(dense, capacity=150, encoding="delta4")
    values = np.asarray(matrix.values).copy()
    values[8 * int(matrix.row_offsets[-1]) :] = np.nan
    matrix = dataclasses.replace(matrix, values=values)
    x = vectors(1, 90)
    assert_product(interpret(matrix, x, SETTINGS), dense, x)


def lowered(
    implementation,
    platform,
    batch=1,
    differentiate=False,
    shape=(64, 96),
    density=0.5,
    dtype=jnp.float16,
    encoding=None,
):
    matrix = macko_jax.compress(sparse(*shape, density, dtype), encoding=encoding)
    x = jnp.ones((batch, shape[1]), dtype)

    def product(values, x):
        m = dataclasses.replace(matrix, values=values)
        y = macko_jax.spmv(m, x, implementation=implementation)
        return y if not differentiate else y.astype(jnp.float32).sum()

    function = jax.jit(jax.grad(product, (0, 1)) if differentiate else product)
    return function.trace(matrix.values, x).lower(lowering_platforms=(platform,)).as_text()


def test_lowers_to_the_kernel_for_cuda_alone():
    assert "mosaic_gpu" in lowered(None, "cuda")
    assert "mosaic_gpu" in lowered("mosaic_gpu", "cuda")
    assert "mosaic_gpu" not in lowered("xla", "cuda")
    assert "mosaic_gpu" not in lowered(None, "cpu")
    with pytest.raises(NotImplementedError, match="lowered for cpu"):
        lowered("mosaic_gpu", "cpu")


@pytest.mark.parametrize(
    "shape,density,dtype,encoding,limit",
    [((16, 4096), 0.1, "float16", None, 32), ((16, 4096), 0.5, "float32", "delta4", 20)],
)
def test_many_vectors_go_through_a_dense_matrix(shape, density, dtype, encoding, limit):
    lower = functools.partial(
        lowered, None, "cuda", shape=shape, density=density, dtype=dtype, encoding=encoding
    )
    assert "dot_general" not in lower(limit)
    many = lower(limit + 1)
    assert "mosaic_gpu" in many and "dot_general" in many


def test_derivatives_lower_to_kernels():
    text = lowered(None, "cuda", differentiate=True)
    assert text.count("mosaic_gpu") >= 2 and "dot_general" not in text and "gather" not in text
    assert "stablehlo.select" not in text  # padding is left out by the kernel


@pytest.mark.parametrize("density,dtype,limit", [(0.1, "float16", 3), (0.5, "float32", 1)])
def test_the_transposed_product_of_many_goes_through_a_dense_matrix(density, dtype, limit):
    lower = functools.partial(
        lowered,
        None,
        "cuda",
        differentiate=True,
        shape=(16, 4096),
        density=density,
        dtype=dtype,
        encoding="delta4",
    )
    assert "dot_general" not in lower(limit)
    many = lower(limit + 1)
    assert "mosaic_gpu" in many and "dot_general" in many


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_8_bit_values_lower_to_the_kernels(dtype):
    matrix = macko_jax.compress(sparse(64, 96, 0.5, jnp.float16), dtype=dtype)
    many = jax.jit(macko_jax.spmv).trace(matrix, jnp.ones((200, 96), jnp.bfloat16))
    text = many.lower(lowering_platforms=("cuda",)).as_text()
    assert "macko_densify" in text and "dot_general" in text
    loss = lambda x, m: macko_jax.spmv(m, x, implementation="mosaic_gpu").astype(jnp.float32).sum()
    both = jax.jit(jax.value_and_grad(loss)).trace(jnp.ones((2, 96), jnp.float16), matrix)
    assert both.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2


def test_explains_why_not():
    layout = macko_jax.compress(np.ones((8, 8), np.float16), encoding="delta4").layout
    problem = ask_for("spmv", layout, "float16", "float64", out_dtype="float64")
    reasons = dispatch.explain(problem)
    assert "float64" in reasons["mosaic_gpu"] and reasons["xla"] is None


def explained(shape, encoding="delta4") -> str | None:
    """Why the kernels do not serve a product of float16 on CUDA; None if they do."""
    problem = ask_for("spmv", Layout(shape, encoding, 1, 8), "float16")
    return dispatch.explain(problem)["mosaic_gpu"]


def test_encodings_without_a_kernel_name_the_cure():
    assert explained((8, 8)) is None
    reason = explained((8, 8), "bitmask")
    assert "'bitmask'" in reason and "macko_jax.compress(macko_jax.decompress(m))" in reason
    assert "mosaic_gpu" not in lowered(None, "cuda", encoding="bitmask", differentiate=True)


def test_x_that_does_not_fit_into_shared_memory_is_left_to_xla():
    assert explained((4, 112_000)) is None
    assert "120000 columns does not fit into shared memory" in explained((4, 120_000))
    assert "mosaic_gpu" not in lowered(None, "cuda", shape=(4, 120_000), density=0.01)


def test_older_gpus_are_left_to_xla(monkeypatch):
    turing = cards.Card("RTX 2080", (7, 5), 46, 64 * 1024)
    monkeypatch.setattr(cards, "here", lambda: turing)
    assert "mosaic_gpu" not in lowered(None, "cuda", differentiate=True)
    with pytest.raises(NotImplementedError, match="compute capability 8.0 and later, not 7.5"):
        lowered("mosaic_gpu", "cuda")


def test_before_hopper_the_kernels_need_a_newer_jax(monkeypatch):
    on(monkeypatch, "RTX 4090")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "for compute capability 8.9 the kernels need jax 0.11 or newer" in explained((8, 8))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert explained((8, 8)) is None


def test_float8_needs_a_gpu_that_converts_it(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    problem = ask_for("spmv", Layout((8, 8), "delta4", 1, 8), "float8_e4m3fn", "float16")
    for name, served in {"A100": False, "RTX A6000": False, "RTX 4090": True}.items():
        on(monkeypatch, name)
        reason = dispatch.explain(problem)["mosaic_gpu"]
        assert reason is None if served else "dtype='int8'" in reason


GPU_CASES = list(
    itertools.product(
        ENCODINGS,
        [jnp.float16, jnp.bfloat16, jnp.float32],
        [*SHAPES, (300, 2051, 0.3), (33, 55000, 0.02), (4096, 4096, 0.5), (257, 55000, 0.2)],
        [1, 5],
    )
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding,dtype,shape,batch", GPU_CASES)
def test_on_gpu(encoding, dtype, shape, batch):
    rows, cols, density = shape
    dense = sparse(rows, cols, density, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding)
    x = vectors(batch, cols)
    reason = dispatch.explain(ask("spmv", matrix, x))["mosaic_gpu"] or ""
    if "does not fit into shared memory" in reason:
        assert cols > 23_000 and x.itemsize == 4, reason
        pytest.skip(reason)
    product = jax.jit(lambda m, x: macko_jax.spmv(m, x, implementation="mosaic_gpu"))
    y = np.asarray(product(matrix, x))
    assert_product(y, dense, x)
    np.testing.assert_array_equal(y, product(matrix, x))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "rows,cols,density,batch",
    [
        (37, 300, 0.5, 5),
        (300, 2051, 0.3, 16),
        (33, 55000, 0.02, 3),
        (33, 70000, 0.02, 3),
        (1500, 4096, 0.5, 16),
        (257, 11008, 0.5, 8),
        (140, 1000, 0.02, 19),
    ],
)
def test_several_vectors_on_gpu(rows, cols, density, batch, dtype, encoding):
    """Of the matrix's own type."""
    dense = sparse(rows, cols, density, dtype)
    matrix, x = macko_jax.compress(dense, encoding=encoding), vectors(batch, cols, dtype=dtype)
    product = jax.jit(lambda m, x: macko_jax.spmv(m, x))
    y = np.asarray(product(matrix, x), np.float32)
    dense, x = dense.astype(np.float64), x.astype(np.float64)
    bound = np.abs(x) @ np.abs(dense).T * (cols + 2) * 2.0**-24
    exact = x @ dense.T
    assert np.all(np.abs(y - exact) <= bound + float(jnp.finfo(dtype).eps) * np.abs(exact))
    np.testing.assert_array_equal(y, np.asarray(product(matrix, x.astype(dtype)), np.float32))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "shape", [*SHAPES, (300, 2051, 0.3), (33, 55000, 0.02), (1500, 4096, 0.5)], ids=str
)
def test_other_products_on_gpu(encoding, dtype, shape):
    """Derivatives with few vectors, and all products with many, which densify the matrix."""
    rows, cols, density = shape
    # Four rows of the widest do not fit in shared memory, so that XLA has to help.
    implementation = "mosaic_gpu" if cols < 10000 else None
    dense = sparse(rows, cols, density, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding)

    @jax.jit
    def products(matrix, x, y):
        forward = lambda values, x: macko_jax.spmv(
            dataclasses.replace(matrix, values=values), x, implementation=implementation
        )
        out, transpose = jax.vjp(forward, matrix.values, x)
        return out, *transpose(y.astype(out.dtype))

    for batch in (1, 3):
        x, y = vectors(batch, cols), vectors(batch, rows, seed=2)
        out, gradient, by_x = products(matrix, x, y)
        assert_product(np.asarray(out), dense, x)
        assert_product(np.asarray(by_x), dense.T, y)
        kept = np.asarray(macko_jax.decompress(dataclasses.replace(matrix, values=gradient)))
        exact = (y.T.astype(np.float64) @ x) * (dense != 0)
        rounding = 2 * float(jnp.finfo(dtype).eps) * np.abs(exact).max() + 1e-5
        np.testing.assert_allclose(
            np.where(dense != 0, kept, 0).astype(np.float64), exact, atol=rounding
        )

    x = vectors(100, cols, dtype=dtype)
    many = jax.jit(lambda m, x: macko_jax.spmv(m, x))
    exact = x.astype(np.float64) @ dense.astype(np.float64).T
    scale = np.abs(x.astype(np.float64)) @ np.abs(dense.astype(np.float64)).T + 1e-30
    error = np.abs(np.asarray(many(matrix, x)).astype(np.float64) - exact) / scale
    assert error.max() <= float(jnp.finfo(dtype).eps) + (cols + 1) * 2.0**-24


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(37, 300, 0.5), (300, 2051, 0.3), (1500, 4096, 0.5)], ids=str)
def test_8_bit_values_on_gpu(shape, dtype, encoding):
    rows, cols, density = shape
    matrix = macko_jax.compress(
        sparse(rows, cols, density, jnp.float32), dtype=dtype, encoding=encoding
    )
    dense = np.asarray(macko_jax.decompress(dataclasses.replace(matrix, scales=None)), np.float64)
    dense *= np.asarray(matrix.scales, np.float64)[:, None]
    x, y = vectors(3, cols), vectors(1, rows, seed=2)
    product = jax.jit(lambda m, x: macko_jax.spmv(m, x, implementation="mosaic_gpu"))
    assert_product(np.asarray(product(matrix, x)), dense, x)
    for count in (8, 200):  # in a pass; by a dense matrix
        several = vectors(count, cols, dtype=np.float16)
        found = np.asarray(product(matrix, several), np.float32)
        exact = several.astype(np.float64) @ dense.T
        assert np.linalg.norm(found - exact) <= 2.0**-10 * np.linalg.norm(exact)
    transpose = jax.jit(lambda m, y: jax.vjp(lambda x: product(m, x), x[:1])[1](y)[0])
    assert_product(np.asarray(transpose(matrix, y)), dense.T, y)
