"""spmv under JAX's transformations, against the same transformations of the dense product."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import macko_jax
from macko_jax.ops import primitive
from tests.cases import CASES

# 33 x 301 on 8 lanes and on 2. Derivatives leave out the padding of deltas; for the rest any
# encoding does, and bitmasks compile faster.
PAIR = BITMASK, DELTA4 = CASES[6], CASES[8]
ids = dict(ids=str)


def single(case):
    """The case's matrix with float32 values, its dense weight, and three vectors."""
    weight = case.weight().astype(np.float32)
    matrix = macko_jax.compress(weight, encoding=case.encoding, lanes=case.lanes)
    return matrix, jnp.asarray(weight), jnp.asarray(case.vectors(3, dtype="float32"))


def with_values(matrix, values):
    return dataclasses.replace(matrix, values=values)


def sparse_loss(matrix):
    return lambda values, x: jnp.sum(jnp.sin(macko_jax.spmv(with_values(matrix, values), x)))


def dense_loss(weight, x):
    return jnp.sum(jnp.sin(x @ weight.T))


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(actual, expected, **dict(rtol=1e-4, atol=1e-4) | tolerance)


@pytest.mark.parametrize("case", PAIR, **ids)
def test_gradients(case):
    matrix, weight, x = single(case)
    by_values, by_x = jax.jit(jax.grad(sparse_loss(matrix), argnums=(0, 1)))(matrix.values, x)
    dense_by_weight, dense_by_x = jax.grad(dense_loss, argnums=(0, 1))(weight, x)
    close(by_x, dense_by_x)
    close(
        macko_jax.decompress(with_values(matrix, by_values)),
        jnp.where(weight != 0, dense_by_weight, 0),
    )
    # Padding is what a matrix of ones does not have; it gets exactly zero.
    ones = macko_jax.compress(
        np.asarray(weight != 0, np.float32), encoding=case.encoding, lanes=case.lanes
    )
    assert np.count_nonzero(np.asarray(by_values)[np.asarray(ones.values) == 0]) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_have_the_types_of_their_arguments(dtype):
    matrix = BITMASK.matrix()
    matrix = with_values(matrix, matrix.values.astype(dtype))
    x = jnp.ones(301, jnp.float32)
    by_values, by_x = jax.eval_shape(
        jax.grad(sparse_loss(matrix), argnums=(0, 1)), matrix.values, x
    )
    assert by_values.dtype == dtype and by_x.dtype == jnp.float32


def test_gradient_of_a_whole_matrix():
    matrix, weight, x = single(DELTA4)
    loss = lambda m: jnp.sum(macko_jax.spmv(m, x))
    gradient = jax.jit(jax.grad(loss, allow_int=True))(matrix)
    assert gradient.codes.dtype == jax.dtypes.float0
    close(
        macko_jax.decompress(with_values(matrix, gradient.values)),
        jnp.where(weight != 0, x.sum(0), 0),
    )


def test_a_bitmask_keeps_elements_that_have_become_zero():
    matrix, _, x = single(BITMASK)
    zeros = jnp.zeros_like(matrix.values)
    product = lambda values: macko_jax.spmv(with_values(matrix, values), x[0])
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(product(v))))(zeros)
    assert np.count_nonzero(gradient) == matrix.nnz == with_values(matrix, zeros).nnz
    (by_transpose,) = jax.linear_transpose(product, zeros)(jnp.ones(33))
    close(by_transpose, gradient)


@pytest.mark.parametrize("case", PAIR, **ids)
def test_padding_has_no_tangent_and_no_second_derivative(case):
    """Every slot of the matrix moves, but as far as products see only those of its elements."""
    matrix, _, x = single(case)
    ones = macko_jax.compress(
        np.ones(matrix.shape, np.float32) * np.asarray(macko_jax.decompress(matrix) != 0),
        encoding=case.encoding,
        lanes=case.lanes,
    )
    elements = np.asarray(ones.values)
    f = lambda v: jnp.sum(jnp.sin(macko_jax.spmv(with_values(matrix, v), x)))
    every = jnp.ones_like(matrix.values)
    for function in f, jax.grad(f):
        moved = jax.jit(lambda t, function=function: jax.jvp(function, (matrix.values,), (t,))[1])
        close(moved(every), moved(elements * every))


def test_second_derivatives():
    """Hessian-vector products, in both orders of modes and across values and x."""
    matrix, weight, x = single(DELTA4)
    tangents = jnp.where(matrix.values != 0, 0.5, 0), jnp.cos(x)
    dense_tangents = jnp.where(weight != 0, 0.5, 0), jnp.cos(x)

    def products(f, primals, tangents):
        gradient = jax.grad(f, argnums=(0, 1))
        forward_over_reverse = jax.jvp(gradient, primals, tangents)[1]
        reverse_over_reverse = jax.grad(
            lambda *p: sum(jnp.vdot(a, b) for a, b in zip(gradient(*p), tangents)), argnums=(0, 1)
        )(*primals)
        return forward_over_reverse, reverse_over_reverse

    sparse = jax.jit(lambda *p: products(sparse_loss(matrix), p, tangents))(matrix.values, x)
    dense = jax.jit(lambda *p: products(dense_loss, p, dense_tangents))(weight, x)
    for (by_values, by_x), (by_weight, dense_by_x) in zip(sparse, dense):
        close(by_x, dense_by_x, rtol=1e-3, atol=1e-3)
        close(
            macko_jax.decompress(with_values(matrix, by_values)),
            jnp.where(weight != 0, by_weight, 0),
            rtol=1e-3,
            atol=1e-3,
        )


def test_vmap():
    matrix, weight, x = single(BITMASK)
    expected = x @ weight.T
    scale = jnp.arange(1.0, 4.0)
    values = scale[:, None] * matrix.values

    @jax.jit
    def products(values, x):
        product = lambda v, x: macko_jax.spmv(with_values(matrix, v), x)
        return (
            jax.vmap(product, (None, 0))(matrix.values, x),
            jax.vmap(product, (None, 1), 1)(matrix.values, x.T),
            jax.vmap(product, (0, None))(values, x[0]),
            jax.vmap(product)(values, x),
            jax.vmap(jax.vmap(product, (None, 0)), (0, None))(values, x),
        )

    over_x, over_columns, over_values, both, nested = products(values, x)
    close(over_x, expected)
    close(over_columns, expected.T)
    close(over_values, scale[:, None] * expected[0])
    close(both, scale[:, None] * expected)
    close(nested, scale[:, None, None] * expected)


def test_per_example_gradients_and_checkpoint():
    matrix, weight, x = single(BITMASK)
    loss = jax.checkpoint(sparse_loss(matrix))
    by_values = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(matrix.values, x)
    dense = jax.vmap(jax.grad(dense_loss), (None, 0))(weight, x)
    for sparse_one, dense_one in zip(by_values, dense):
        close(
            macko_jax.decompress(with_values(matrix, sparse_one)),
            jnp.where(weight != 0, dense_one, 0),
        )


def test_padding_mask_costs_nothing_at_run_time():
    """The select that keeps delta4's padding out of gradients is gone from the forward product."""
    matrix, _, x = single(DELTA4)
    compiled = jax.jit(macko_jax.spmv).lower(matrix, x[0]).compile().as_text()
    slots = f"[{matrix.stored}]"
    assert not [
        line
        for line in compiled.splitlines()
        if "select(" in line and f"f32{slots}" in line.split("select(")[0]
    ]


@pytest.mark.parametrize("case", PAIR, **ids)
def test_lowers_for_other_platforms(case):
    """All three products are traced here, lowered for any platform, and for several at once."""
    matrix, _, x = single(case)
    traced = jax.jit(lambda m, x: jax.grad(sparse_loss(m), (0, 1))(m.values, x)).trace(matrix, x)
    for platform in ("cpu", "cuda", "tpu"):
        assert "func" in traced.lower(lowering_platforms=(platform,)).as_text()
    assert "func" in traced.lower(lowering_platforms=("cpu", "cuda")).as_text()


def test_one_primitive_per_product():
    matrix, _, x = single(DELTA4)
    jaxpr = str(jax.make_jaxpr(jax.grad(sparse_loss(matrix), argnums=(0, 1)))(matrix.values, x))
    for p in primitive.PRIMITIVES.values():
        assert jaxpr.count(f" {p.name}[") == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_a_replicated_matrix(check_vma):
    """Four devices, each with its part of the vectors; gradients are summed over devices."""
    assert jax.device_count() >= 4
    mesh = jax.make_mesh(
        (4,), ("d",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,)
    )
    matrix, weight, _ = single(BITMASK)
    x = jnp.asarray(BITMASK.vectors(8, dtype="float32"))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=check_vma)
    def product(matrix, x):
        return macko_jax.spmv(matrix, x)

    close(product(matrix, x), x @ weight.T)

    def loss(values, x):
        return jnp.sum(jnp.sin(product(with_values(matrix, values), x)))

    by_values, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(matrix.values, x)
    by_weight, dense_by_x = jax.grad(dense_loss, argnums=(0, 1))(weight, x)
    close(by_x, dense_by_x)
    close(
        macko_jax.decompress(with_values(matrix, by_values)), jnp.where(weight != 0, by_weight, 0)
    )


def test_vectors_sharded_over_a_mesh():
    mesh = jax.make_mesh(
        (4,), ("d",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,)
    )
    matrix, weight, _ = single(DELTA4)
    x = jnp.asarray(DELTA4.vectors(8, dtype="float32"))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
    close(jax.jit(macko_jax.spmv)(matrix, sharded), x @ weight.T)
