"""JAX as people switch it: meshes with Explicit axes, no jit, strict promotion, export, checks."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dsf_jax
import macko_jax
from tests.cases import CASES

CASE = CASES[8]  # 33 x 301, delta4 float32 on 2 lanes
MATRIX, WEIGHT = CASE.matrix(), CASE.weight()
BITMASK = macko_jax.compress(WEIGHT, encoding="bitmask")  # which compiles faster
SMALL = macko_jax.compress(WEIGHT[:16, :24], encoding="bitmask")


def loss(values, x):
    return jnp.sum(jnp.sin(macko_jax.spmv(dataclasses.replace(MATRIX, values=values), x)))


def dense_loss(weight, x):
    return jnp.sum(jnp.sin(x @ weight.T))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


@functools.cache
def explicit_mesh():
    mesh = jax.make_mesh(
        (2, 2), ("d", "e"), (jax.sharding.AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    return mesh, NamedSharding(mesh, P("d")), NamedSharding(mesh, P())


def spec(array):
    return tuple(jax.typeof(array).sharding.spec)


def test_products_and_gradients_keep_a_batch_on_its_axes():
    mesh, by_batch, everywhere = explicit_mesh()
    vectors = CASE.vectors(8, dtype="float32")
    x, values = jax.device_put(vectors, by_batch), jax.device_put(MATRIX.values, everywhere)

    @jax.jit
    def derivatives(values, x):
        y = macko_jax.spmv(dataclasses.replace(MATRIX, values=values), x)
        back = y @ dataclasses.replace(MATRIX, values=values)
        return y, back, *jax.grad(loss, argnums=(0, 1))(values, x)

    with jax.set_mesh(mesh):
        compiled = derivatives.lower(values, x).compile()
        y, back, by_values, by_x = compiled(values, x)
    assert spec(y) == spec(back) == spec(by_x) == ("d", None) and spec(by_values) == (None,)
    assert "all-gather" not in compiled.as_text()
    close(y, vectors @ WEIGHT.T)
    close(back, vectors @ WEIGHT.T @ WEIGHT)
    by_weight, dense_by_x = jax.grad(dense_loss, argnums=(0, 1))(WEIGHT, vectors)
    close(by_x, dense_by_x)
    found = macko_jax.decompress(dataclasses.replace(MATRIX, values=np.asarray(by_values)))
    close(found, np.where(WEIGHT != 0, by_weight, 0))


def test_batches_and_stacks_of_several_axes_on_a_mesh():
    mesh, _, everywhere = explicit_mesh()
    vectors = CASE.vectors(2, 4, dtype="float32")
    both = jax.device_put(vectors, NamedSharding(mesh, P("d", "e")))
    y = jax.jit(macko_jax.spmv)(BITMASK, both)
    assert spec(y) == ("d", "e", None)
    close(y, vectors @ WEIGHT.T)

    mapped = jax.jit(jax.vmap(macko_jax.spmv, (None, 0)))(BITMASK, both)
    assert spec(mapped) == ("d", "e", None)
    close(mapped, y)

    # Row shards: each device multiplies by rows of its own.
    for matrix in MATRIX, BITMASK, macko_jax.compress(WEIGHT, dtype="int8", encoding="bitmask"):
        stack = jax.tree.map(lambda a: jnp.stack([a, a]), matrix)
        stack = jax.device_put(stack, NamedSharding(mesh, P("d")))
        rows = jax.jit(jax.vmap(macko_jax.spmv, (0, None)))(stack, vectors[0, 0])
        assert spec(rows) == ("d", None)
        close(rows, [np.asarray(macko_jax.decompress(matrix)) @ vectors[0, 0]] * 2)

    cut = jax.device_put(vectors[..., :300], NamedSharding(mesh, P(None, None, "d")))
    part = jax.device_put(macko_jax.compress(WEIGHT[:, :300], encoding="bitmask"), everywhere)
    close(jax.jit(macko_jax.spmv)(part, cut), vectors[..., :300] @ WEIGHT[:, :300].T)
    with pytest.raises(ValueError, match="row_offsets of a MackoMatrix are .*Replicate it"):
        odd = jax.device_put(np.zeros(34, np.int32), NamedSharding(mesh, P("d")))
        macko_jax.spmv(dataclasses.replace(BITMASK, row_offsets=odd), both)


def test_8_bit_values_and_fused_products_on_a_mesh():
    _, by_batch, everywhere = explicit_mesh()
    matrix = jax.device_put(
        macko_jax.compress(WEIGHT, dtype="int8", encoding="bitmask"), everywhere
    )
    vectors = CASE.vectors(8, dtype="float32")
    y = jax.jit(macko_jax.spmv)(matrix, jax.device_put(vectors, by_batch))
    assert spec(y) == ("d", None)
    close(y, vectors @ np.asarray(macko_jax.decompress(matrix)).T)
    one = jax.jit(macko_jax.spmv)(matrix, jax.device_put(vectors[0], everywhere))
    close(one, np.asarray(y)[0])


def test_without_jit():
    x = CASE.vectors(dtype="float32")[:24]
    with jax.disable_jit():
        close(macko_jax.spmv(SMALL, x), WEIGHT[:16, :24] @ x)
        by_x = jax.grad(lambda x: macko_jax.spmv(SMALL, x).sum())(x)
        close(by_x, WEIGHT[:16, :24].sum(0))
        scaled = macko_jax.compress(WEIGHT[:16, :24], dtype="int8")
        assert macko_jax.spmv(scaled, x).shape == (16,)


def test_what_a_program_forbids_to_itself_does_not_stop_the_packages():
    weight, x = WEIGHT[:16, :24].astype(np.float16), jnp.ones((2, 24), jnp.float16)

    def derivatives(m, x):
        by_all = jax.grad(lambda m, x: macko_jax.spmv(m, x).sum(), (0, 1), allow_int=True)(m, x)
        return by_all, macko_jax.spmv(m, x[0]), x[:, :16] @ m, macko_jax.decompress(m)

    # Both are asked while a program is traced and lowered.
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for options in ({"encoding": "bitmask"}, {"encoding": "delta4"}, {"dtype": "int8"}):
            matrix = macko_jax.compress(weight, lanes=4, **options)
            jax.jit(derivatives).lower(matrix, x)
        dsf_jax.prune(weight.astype(np.float32), np.eye(24), density=0.5, method="wanda")
    with jax.numpy_dtype_promotion("strict"), pytest.raises(Exception, match="promotion"):
        macko_jax.spmv(matrix, x.astype(jnp.float32))  # as of a dense product


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "dsf"])
def test_models_are_compressed_under_strict_promotion(method):
    from flax import nnx

    x = jax.random.normal(jax.random.key(0), (32, 24))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        model = nnx.Linear(24, 16, use_bias=False, rngs=nnx.Rngs(0))
        model, _ = dsf_jax.compress_model(model, [x], method=method, density=0.5)
        packed, _ = dsf_jax.pack(model)
        packed(x)


def test_export_with_a_symbolic_batch():
    (b,) = jax.export.symbolic_shape("b")
    product = jax.jit(lambda m, x: (macko_jax.spmv(m, x), jax.grad(loss, argnums=1)(m.values, x)))
    asked = jax.ShapeDtypeStruct((b, 301), jnp.float32)
    exported = jax.export.export(product, platforms=["cpu", "cuda"])(MATRIX, asked)
    for count in (1, 11):
        x = CASE.vectors(count, dtype="float32")
        y, by_x = exported.call(MATRIX, x)
        close(y, x @ WEIGHT.T)
        close(by_x, jax.grad(dense_loss, argnums=1)(WEIGHT, x))
    named = jax.jit(lambda x: macko_jax.spmv(MATRIX, x, implementation="mosaic_gpu"))
    with pytest.raises(NotImplementedError, match="the number of vectors is symbolic"):
        jax.export.export(named, platforms=["cuda"])(asked)


def test_exports_that_take_a_matrix_are_serialized():
    pytest.importorskip("flatbuffers")
    exported = jax.export.export(jax.jit(macko_jax.spmv), platforms=["cpu"])
    exported = exported(SMALL, jax.ShapeDtypeStruct((24,), jnp.float32))
    again = jax.export.deserialize(exported.serialize())
    x = CASE.vectors(dtype="float32")[:24]
    close(again.call(SMALL, x), WEIGHT[:16, :24] @ x)


def test_descriptions_in_exports_are_checked():
    from macko_jax.io import exported

    metadata = ((16, 24), "delta4", 4)
    assert exported._from_bytes(exported._to_bytes(metadata)) == metadata
    for text in (b"", b"[]", b'{"shape": [1, "a"], "encoding": "delta4", "lanes": 4}', b"\xff"):
        with pytest.raises(ValueError, match="export it again"):
            exported._from_bytes(text)


def test_checks_find_what_is_there_and_nothing_else():
    x = jnp.ones(24)
    product = lambda x: macko_jax.spmv(SMALL, x)
    checked = jax.jit(checkify.checkify(product, errors=checkify.all_checks))
    error, _ = checked(x)
    error.throw()
    with jax.debug_nans(True):
        product(x)
        with pytest.raises(FloatingPointError, match="nan"):
            product(x * jnp.nan)
