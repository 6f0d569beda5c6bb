"""The product against NumPy in float64: every case, type, batch shape and implementation."""

import dataclasses
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import macko_jax
from macko_jax._compatibility import check_jax
from macko_jax.format.layout import Layout
from macko_jax.ops import dispatch, reference, xla_cpu
from tests.cases import CASES, Case, error_bound

BITMASK, DELTA4 = CASES[6], CASES[8]  # 33 x 301, several lanes


def exact(weight, x):
    return x.astype(np.float64) @ weight.astype(np.float64).T


def assert_product(actual, weight, x):
    actual = np.asarray(actual)
    assert actual.dtype == jnp.promote_types(weight.dtype, x.dtype)
    error = np.abs(actual.astype(np.float64) - exact(weight, x))
    np.testing.assert_array_less(error, error_bound(weight, x, actual.dtype) + 1e-300)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_one_vector(case):
    x = case.vectors()
    assert_product(macko_jax.spmv(case.matrix(), x), case.weight(), x)


@pytest.mark.parametrize("case", [CASES[i] for i in (6, 7, 8, 11, 16, 21)], ids=str)
def test_all_products(case):
    """Forward, transposed and by the values, for CPUs and for others; one program for each case."""
    weight, matrix, x = case.weight(), case.matrix(), case.vectors(9)
    y = np.random.default_rng(1).standard_normal((9, case.rows)).astype(weight.dtype)
    layout, positions = matrix.layout, matrix.positions

    @jax.jit
    def products(values, x, y):
        pattern = values[0] if case.encoding == "bitmask" else values
        by_values = reference.sddmm(layout, positions, x, y, pattern, out_dtype="float32")
        return (
            [
                m.spmv(layout, values, positions, x, out_dtype="float32")
                for m in (xla_cpu, reference)
            ],
            [
                m.spmv_transposed(layout, values, positions, y, out_dtype="float32")
                for m in (xla_cpu, reference)
            ],
            macko_jax.decompress(dataclasses.replace(matrix, values=by_values)),
        )

    forward, transposed, gradient = products(matrix.values, x, y)
    for product in forward:
        error = np.abs(product - exact(weight, x))
        np.testing.assert_array_less(error, error_bound(weight, x, "float32") + 1e-300)
    for product in transposed:
        error = np.abs(product - exact(weight.T, y))
        np.testing.assert_array_less(error, error_bound(weight.T, y, "float32") + 1e-300)
    expected = y.T.astype(np.float64) @ x.astype(np.float64)
    np.testing.assert_allclose(gradient, np.where(weight != 0, expected, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, x_dtype",
    [
        ("float16", "float16"),
        ("float16", "float32"),
        ("bfloat16", "float16"),
        ("bfloat16", "int8"),
        ("float32", "int8"),
    ],
)
def test_promotion_is_that_of_matmul(dtype, x_dtype):
    case = Case(16, 96, 0.5, dtype, lanes=2)
    weight, x = case.weight(), (np.arange(96) % 5 - 2).astype(jnp.dtype(x_dtype))
    y = macko_jax.spmv(case.matrix(), x)
    assert y.dtype == jnp.matmul(jnp.asarray(weight), x).dtype
    error = np.abs(np.asarray(y, np.float64) - exact(weight, x))
    np.testing.assert_array_less(error, error_bound(weight, x, y.dtype))


def test_sums_of_16_bit_values_are_in_float32():
    """In float16, 1 would vanish beside 4096, and 2 x 4096 ones beside their own sum."""
    weight = np.ones((1, 8192), np.float16)
    x = np.ones(8192, np.float16)
    x[0] = 4096
    for encoding in ("bitmask", "delta4"):
        matrix = macko_jax.compress(weight, encoding=encoding, lanes=8)
        assert macko_jax.spmv(matrix, x)[0] == np.float16(4096 + 8191)


def test_float64_is_summed_in_float64():
    with jax.enable_x64(True):
        weight, x = DELTA4.weight(), DELTA4.vectors(2, dtype="float64")
        for encoding in ("bitmask", "delta4"):
            y = macko_jax.spmv(macko_jax.compress(weight, encoding=encoding), x)
            assert y.dtype == np.float64
            # As `error_bound`, with float64's unit: sums in float32 would be 2**29 times as far.
            size = np.abs(x) @ np.abs(weight.astype(np.float64)).T
            bound = (weight.shape[1] + 1) * 2.0**-53 * size
            np.testing.assert_array_less(np.abs(y - exact(weight, x)), bound + 2.0**-1000)


@pytest.mark.parametrize("case", [BITMASK, DELTA4], ids=str)
@pytest.mark.parametrize("batch", [(0,), (2, 3), (20,)], ids=str)
def test_leading_axes(case, batch):
    x = case.vectors(*batch)
    assert_product(macko_jax.spmv(case.matrix(), x), case.weight(), x)


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)
def test_operator_is_matmul(batch):
    weight, matrix = BITMASK.weight(), BITMASK.matrix()
    x = np.random.default_rng(0).standard_normal((*batch[:-1], 301, *batch[-1:])).astype(np.float16)
    expected = jnp.matmul(weight.astype(np.float32), x.astype(np.float32))
    np.testing.assert_allclose(matrix @ x, expected, rtol=2e-3, atol=2e-2)


def test_slots_past_the_last_column_read_nothing():
    """The slots that fill up a row hold zero, but zero times infinity would be NaN."""
    weight = np.zeros((3, 20), np.float32)
    weight[0, 3] = weight[1, 19] = weight[2, 18] = 1
    x = np.ones(20, np.float32)
    x[19] = np.inf
    y = macko_jax.spmv(macko_jax.compress(weight, encoding="delta4"), x)
    assert y[1] == np.inf and y[0] == 1


@pytest.mark.parametrize("case", [BITMASK, DELTA4], ids=str)
def test_spare_capacity_is_never_read(case):
    matrix = macko_jax.compress(
        case.weight(), encoding=case.encoding, lanes=case.lanes, capacity=1000
    )
    spoiled = np.array(matrix.values)
    spoiled[8 * int(matrix.row_offsets[-1]) :] = np.nan
    x = case.vectors(12)
    matrix = dataclasses.replace(matrix, values=spoiled)
    for vectors in (x[0], x):
        assert_product(macko_jax.spmv(matrix, vectors), case.weight(), vectors)


@hypothesis.given(
    st.sampled_from(["bitmask", "delta4"]),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_any_matrix_against_float64(encoding, density, seed, scale):
    rng = np.random.default_rng(seed)
    keep = rng.random((17, 203)) < density * rng.random((17, 1))
    weight = np.where(keep, scale * rng.standard_normal((17, 203)), 0).astype(np.float32)
    x = rng.standard_normal(203).astype(np.float32)
    matrix = macko_jax.compress(weight, encoding=encoding, lanes=4, capacity=17 * 26)
    assert_product(macko_jax.spmv(matrix, x), weight, x)


def test_errors_name_what_was_given():
    matrix = BITMASK.matrix()
    with pytest.raises(ValueError, match=r"\[\.\.\., 301\], got \[300\]"):
        macko_jax.spmv(matrix, jnp.ones(300))
    with pytest.raises(ValueError, match=r"got \[\]"):
        macko_jax.spmv(matrix, 1.0)
    with pytest.raises(ValueError, match=r"\[300, 301\]"):
        matrix @ jnp.ones((300, 301))
    with pytest.raises(TypeError, match="ndarray.*macko_jax.compress"):
        macko_jax.spmv(np.ones((2, 2)), jnp.ones(2))
    with pytest.raises(TypeError, match="complex64"):
        macko_jax.spmv(matrix, jnp.ones(301, jnp.complex64))
    with pytest.raises(ValueError, match="'triton'.*xla"):
        macko_jax.spmv(matrix, jnp.ones(301), implementation="triton")
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), matrix)
    with pytest.raises(ValueError, match="vmap"):
        macko_jax.spmv(stack, jnp.ones(301))


def problem(**changes):
    return dispatch.Problem(
        **dict(
            product="spmv",
            platform="cpu",
            layout=Layout((33, 301), "bitmask", 8, 800),
            batch=1,
            dtypes=("float16", "float16"),
            out_dtype="float16",
        )
        | changes
    )


def test_a_named_implementation_never_falls_back():
    for name, reason in dispatch.explain(problem()).items():
        if reason is None:
            assert callable(dispatch.implement(problem(), name))
        else:
            with pytest.raises(NotImplementedError, match=f"(?s){name}.*implementation=None"):
                macko_jax.spmv(BITMASK.matrix(), BITMASK.vectors(), implementation=name)


def test_there_is_an_implementation_for_every_platform_and_product():
    for platform in ("cpu", "cuda", "any"):
        for product in ("spmv", "spmv_transposed", "sddmm"):
            assert callable(dispatch.implement(problem(platform=platform, product=product), None))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [(), (3,), (64,)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_implementations_on_a_gpu(case, batch):
    x, matrix = case.vectors(*batch), case.matrix()
    served = 0
    for name, implementation in dispatch.IMPLEMENTATIONS.items():
        asked = problem(
            platform="cuda",
            layout=matrix.layout,
            batch=int(np.prod(batch)),
            dtypes=(matrix.dtype, x.dtype),
            out_dtype=matrix.dtype,
        )
        if implementation.why_not(asked) is None:
            assert_product(macko_jax.spmv(matrix, x, implementation=name), case.weight(), x)
            served += 1
    assert served
    assert_product(macko_jax.spmv(matrix, x), case.weight(), x)


@pytest.mark.parametrize(
    "version, warns",
    [
        ("0.10.2", False),
        ("0.11.2", False),
        ("0.11.9", False),
        ("0.10.1", True),
        ("0.12.0", False),
        ("0.13.0", True),
        ("0.11.3.dev20261101", False),
        ("1.0", True),
    ],
)
def test_untested_jax_gives_a_warning(version, warns, recwarn):
    check_jax(version)
    assert len(recwarn) == warns
    if warns:
        assert version in str(recwarn[0].message)


@pytest.mark.slow
def test_import_warns_but_works_with_an_untested_jax():
    code = (
        "import jax; jax.__version__ = '0.99.0'; import macko_jax; print(macko_jax.spmv.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "found 0.99.0" in done.stderr and done.stdout.strip() == "spmv"
