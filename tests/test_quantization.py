"""Matrices with 8-bit values: rounding, products, layers, files."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from jax.sharding import PartitionSpec as P

import macko_jax
from macko_jax.format import quantization
from macko_jax.format.matrix import validate

DTYPES = ("int8", "float8_e4m3fn")


def sparse(rows=33, cols=301, dtype="float16", seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < 0.5)
    return weight.astype(jnp.dtype(dtype))


def bound(weight, scales, dtype):
    """What quantize's docstring promises, and the rounding of the product to float32."""
    size, scales = np.abs(weight.astype(np.float64)), scales.astype(np.float64)[:, None]
    error = scales / 2 if dtype == "int8" else np.maximum(2.0**-4 * size, 2.0**-10 * scales)
    return error + 2.0**-22 * size


def rounded(weight, dtype):
    return np.asarray(quantization.dequantize(*quantization.quantize(weight, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(
    weight=st_numpy.arrays(
        np.float32,
        st_numpy.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-6e4, 6e4, width=32),
    ),
    kind=st.sampled_from(["float16", "float32"]),
)
def test_rounding_error(dtype, weight, kind):
    weight = weight.astype(kind)
    values, scales = quantization.quantize(weight, dtype)
    assert values.dtype == jnp.dtype(dtype) and scales.dtype == weight.dtype
    product = values.astype(np.float64) * scales.astype(np.float64)[:, None]
    error = np.abs(product - weight.astype(np.float64))
    # float32 subnormals are flushed to zero on the way, which errs by less than 2**-126.
    assert (error <= bound(weight, scales, dtype) + 2.0**-126).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
@hypothesis.given(
    parts=st_numpy.arrays(
        np.float64,
        st.tuples(st.integers(1, 4), st.integers(1, 9)),
        elements=st.one_of(st.sampled_from([0, 1, -1]), st.floats(-1, 1)),
    ),
    exponents=st.lists(st.integers(0, 30), min_size=4, max_size=4),
)
def test_weights_of_any_magnitude_stay_finite(dtype, kind, parts, exponents):
    """Also the largest finite number, in rows that are scaled down from it by powers of two."""
    most = float(jnp.finfo(kind).max)
    weight = parts * (most * 2.0 ** -np.array(exponents[: len(parts)]))[:, None]
    weight = weight.astype(jnp.dtype(kind))
    values, scales = quantization.quantize(weight, dtype)
    restored = rounded(weight, dtype)
    assert restored.dtype == weight.dtype and np.isfinite(restored.astype(np.float64)).all()
    product = values.astype(np.float64) * scales.astype(np.float64)[:, None]
    error = np.abs(product - weight.astype(np.float64))
    assert (error <= bound(weight, scales, dtype) + 2.0**-126).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [65504, 65472, 65440])
def test_the_largest_half_is_restored(dtype, top):
    weight = np.zeros((2, 8), np.float16)
    weight[0, 3] = top
    dense = np.asarray(macko_jax.decompress(macko_jax.compress(weight, dtype=dtype)))
    assert abs(float(dense[0, 3]) - top) <= 2.0**-8 * top


@pytest.mark.parametrize(
    "dtype, weight_dtype, encoding",
    [
        ("int8", "float16", "delta4"),
        ("int8", "float32", "bitmask"),
        ("float8_e4m3fn", "bfloat16", "two_bank"),
        ("float8_e4m3fn", "float16", "bitmask"),
    ],
)
def test_products(dtype, weight_dtype, encoding):
    weight = sparse(dtype=weight_dtype)
    matrix = macko_jax.compress(weight, dtype=dtype, encoding=encoding, lanes=4)
    validate(matrix)
    dense = rounded(weight, dtype)
    assert matrix.dtype == weight.dtype == dense.dtype
    assert matrix.nbytes < 0.8 * macko_jax.compress(weight, encoding=encoding, lanes=4).nbytes
    assert matrix.values.dtype == jnp.dtype(dtype)

    x = sparse(3, 301, weight_dtype, seed=1)
    y = macko_jax.spmv(matrix, x)
    assert y.dtype == weight.dtype
    size = np.abs(x.astype(np.float64)) @ np.abs(dense.astype(np.float64)).T
    # Rounding of decompressed elements and of the result, each to the weight's type.
    error = np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ dense.astype(np.float64).T)
    assert (error <= 2 * float(jnp.finfo(weight.dtype).eps) * size + 302 * 2.0**-24 * size).all()


def test_derivatives():
    weight, dtype = sparse(dtype="float32"), "float8_e4m3fn"
    matrix = macko_jax.compress(weight, dtype=dtype, encoding="bitmask")
    x, y = sparse(1, 301, "float32", seed=1)[0], sparse(1, 33, "float32", seed=2)[0]

    @jax.jit
    def loss(scales, x):
        return jnp.vdot(macko_jax.spmv(dataclasses.replace(matrix, scales=scales), x), y)

    by_scales, by_x = jax.grad(loss, (0, 1))(matrix.scales, x)
    dense = rounded(weight, dtype).astype(np.float64)
    unscaled = dense @ x / np.asarray(matrix.scales, np.float64)
    np.testing.assert_allclose(by_x, y @ dense, rtol=1e-5, atol=1e-5)
    (by_transpose,) = jax.linear_transpose(lambda x: macko_jax.spmv(matrix, x), x)(y)
    np.testing.assert_allclose(by_transpose, by_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_scales, y * unscaled, rtol=1e-4, atol=1e-3)


def test_transformations_of_one_vector():
    """Which has a primitive of its own, with the scales."""
    weights = [sparse(40, 64, "float32", seed=i) for i in range(3)]
    options = dict(dtype="int8", encoding="bitmask", capacity=320)
    matrices = [macko_jax.compress(w, **options) for w in weights]
    matrix, dense = matrices[0], rounded(weights[0], "int8").astype(np.float64)
    x = sparse(4, 64, "float32", seed=9)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)

    stack = jax.tree.map(lambda *a: jnp.stack(a), *matrices)
    for w, y, row in zip(weights, jax.vmap(macko_jax.spmv)(stack, x[:3]), x):
        close(y, rounded(w, "int8").astype(np.float64) @ row)
    hessian = jax.jit(jax.hessian(lambda x: (macko_jax.spmv(matrix, x) ** 2).sum()))(x[0])
    close(hessian, 2 * dense.T @ dense)

    mesh = jax.make_mesh(
        (4,), ("d",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,)
    )
    product = jax.shard_map(macko_jax.spmv, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))

    def loss(scales, x):
        return (product(dataclasses.replace(matrix, scales=scales), x) ** 2).sum()

    by_scales, by_x = jax.jit(jax.grad(loss, (0, 1)))(matrix.scales, x)
    y = x @ dense.T
    close(by_x, 2 * y @ dense, rtol=1e-3, atol=1e-3)
    close(by_scales, (2 * y * y / np.asarray(matrix.scales)).sum(0), rtol=1e-3)


@pytest.mark.slow
def test_layers():
    rules = [macko_jax.Rule(dtype="int8", encoding="bitmask")]
    x = jnp.asarray(sparse(2, 64, "float32", seed=3))
    layer = nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(sparse(64, 48, "float32"))
    packed, _ = macko_jax.flax_nnx.substitute(layer, rules)
    error = jnp.abs(packed(x) - layer(x)).max() / jnp.abs(layer(x)).max()
    assert packed.values[...].dtype == jnp.int8 and 0 < error < 0.05
    gradient = nnx.grad(lambda m: (m(x) ** 2).sum())(packed)
    assert gradient["scales"].shape == (48,) and "values" not in gradient
    abstract = nnx.eval_shape(lambda: nnx.Linear(64, 48, rngs=nnx.Rngs(0)))
    again = macko_jax.flax_nnx.from_pure_dict(abstract, macko_jax.flax_nnx.to_pure_dict(packed))
    np.testing.assert_array_equal(again(x), packed(x))

    module = nn.Dense(48)
    variables = module.init(jax.random.key(0), x)
    variables["params"]["kernel"] = layer.kernel[...]
    dense, (linen, _) = (
        module.apply(variables, x),
        macko_jax.flax_linen.substitute(module, variables, x, rules=rules),
    )
    np.testing.assert_allclose(macko_jax.flax_linen.apply(module, linen, x), dense, atol=0.5)
    trained, fixed = macko_jax.flax_linen.partition(linen["params"])
    assert trained["kernel"].values is None and trained["kernel"].scales is not None
    assert fixed["kernel"].values is not None


def test_errors():
    weight = sparse(4, 9, "float32")
    with pytest.raises(ValueError, match="float8_e4m3fn, got float64"):
        macko_jax.compress(weight, dtype="float64")
    weight[2, 3] = np.inf
    with pytest.raises(ValueError, match=r"rows \[2\] are not"):
        macko_jax.compress(weight, dtype="int8")
    matrix = macko_jax.compress(sparse(), dtype="int8")
    for wrong, message in (
        (dataclasses.replace(matrix, scales=None), "without scales"),
        (dataclasses.replace(matrix, scales=matrix.scales[1:]), r"scales must be \[33\]"),
        (dataclasses.replace(matrix, scales=matrix.scales.at[5].set(jnp.nan)), "row 5 is nan"),
        (dataclasses.replace(macko_jax.compress(sparse()), scales=matrix.scales), "with scales"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(wrong)
