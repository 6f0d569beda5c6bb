"""Matrices in shards: products, gradients and chains on two and four devices, and their files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import macko_jax
from macko_jax.experimental import Step, fused_chain
from macko_jax.ops.fused import blanks

ROWS, COLS = 48, 64
RNG = np.random.default_rng(0)


def sparse(rows, cols, dtype=np.float32):
    weight = RNG.standard_normal((rows, cols)) * (RNG.random((rows, cols)) < 0.4)
    return (weight / np.sqrt(cols)).astype(dtype)


WEIGHT = sparse(ROWS, COLS)
X = RNG.standard_normal((3, COLS)).astype(np.float32)


@functools.cache
def mesh_of(count, kind=AxisType.Auto):
    return jax.make_mesh((count,), ("model",), (kind,), devices=jax.devices()[:count])


def by(dimension, count=2, kind=AxisType.Auto):
    spec = P("model", None) if dimension == "rows" else P(None, "model")
    return NamedSharding(mesh_of(count, kind), spec)


def close(found, wanted, eps=1e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=eps, atol=eps)


@pytest.mark.parametrize(
    "dimension, count, kind", [("columns", 4, AxisType.Auto), ("rows", 2, AxisType.Explicit)]
)
def test_products_and_gradients(dimension, count, kind):
    matrix = macko_jax.shard(WEIGHT, by(dimension, count, kind), encoding="bitmask")
    assert matrix.count == count and len(matrix.values.sharding.device_set) == count
    assert matrix.nnz == np.count_nonzero(WEIGHT)

    def loss(values, x):
        own = macko_jax.ShardedMatrix(values, *index, *meta)
        return jnp.sum(jnp.sin(macko_jax.spmv(own, x)))

    index = matrix.codes, matrix.row_offsets, matrix.starts
    meta = matrix.shape, matrix.encoding, matrix.lanes, matrix.sharding, matrix.parts

    @jax.jit
    def everything(matrix, x):
        y = macko_jax.spmv(matrix, x)
        mapped = jax.vmap(lambda matrix, x: matrix @ x, (None, 0))(matrix, x)
        return y, mapped, y @ matrix, *jax.grad(loss, (0, 1))(matrix.values, x)

    y, mapped, back, by_values, by_x = everything(matrix, X)
    close(y, X @ WEIGHT.T)
    close(mapped, y)
    close(back, X @ WEIGHT.T @ WEIGHT)
    wanted = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w.T)), (0, 1))(WEIGHT, X)
    close(by_x, wanted[1])
    by_weight = macko_jax.ShardedMatrix(by_values, *index, *meta).join()
    close(macko_jax.decompress(by_weight), np.where(WEIGHT != 0, wanted[0], 0))
    assert y.sharding.is_fully_replicated == (dimension == "columns")


def block(values=None):
    """out, gate_up, down and qkv of a small decoder's layer; the norm's scale and the stream."""
    weights = sparse(48, 32), sparse(2 * 40, 48), sparse(48, 40), sparse(96, 48)
    matrices = [macko_jax.compress(w, dtype=values, encoding="bitmask") for w in weights]
    scale = (1 + RNG.random(48)).astype(np.float32)
    return matrices, scale, RNG.standard_normal((1, 48)).astype(np.float32)


def in_shards(matrices, *sharding):
    """The matrices of a layer in shards."""
    parts = None, (matrices[1].shape[0] // 2,) * 2, None, (matrices[3].shape[0] // 3,) * 3
    kinds = "columns", "rows", "columns", "rows"
    return [
        macko_jax.shard(m, by(kind, *sharding), parts=p)
        for m, kind, p in zip(matrices, kinds, parts)
    ]


def block_steps(matrices, scale, residual):
    """A small decoder's layer from attention to attention, as steps of a chain."""
    return [
        Step(matrices[0], add=residual),
        Step(matrices[1], norm=(scale, 1e-5)),
        Step(matrices[2], gated=True, add=0, kept=True),
        Step(matrices[3], norm=(scale, 1e-5)),
    ]


def restored(y, parts, count):
    """A result that is split by rows, in the order of the whole matrix."""
    order = np.argsort(
        np.concatenate(
            [
                np.arange(size).reshape(count, -1) + begin
                for size, begin in zip(parts, np.cumsum([0, *parts]))
            ],
            axis=1,
        ).reshape(-1)
    )
    return np.asarray(y)[..., order]


def exact(matrices, scale, residual, x):
    """The stream after a layer, and the next one's projection."""
    out, up, down, qkv = (np.asarray(macko_jax.decompress(m), np.float64) for m in matrices)

    def norm(x):
        return x / np.sqrt((x * x).mean() + 1e-5) * scale

    stream = residual + x @ out.T
    gate, passed = np.split(norm(stream) @ up.T, 2, axis=-1)
    stream = stream + (gate / (1 + np.exp(-gate)) * passed) @ down.T
    return stream, norm(stream) @ qkv.T


@pytest.mark.parametrize(
    "count,values,kind",
    [(2, None, AxisType.Explicit), pytest.param(4, "int8", AxisType.Auto, marks=pytest.mark.slow)],
)
def test_chains(count, values, kind):
    matrices, scale, residual = block(values)
    shards = in_shards(matrices, count, kind)
    x = RNG.standard_normal((1, 32)).astype(np.float32)
    chained = jax.jit(lambda shards, x: fused_chain(x, block_steps(shards, scale, residual)))
    stream, qkv = chained(shards, x)
    wanted = exact(matrices, scale, residual, x)
    close(stream, wanted[0])
    close(restored(qkv, (32, 32, 32), count), wanted[1])
    assert blanks(block_steps(shards, scale, residual)) == 80
    assert stream.sharding.is_fully_replicated and not qkv.sharding.is_fully_replicated


def dense(matrix):
    """The dense matrix as it was split, on the host."""
    return np.asarray(macko_jax.decompress(matrix.join() if hasattr(matrix, "join") else matrix))


@pytest.mark.parametrize("dimension,parts", [("rows", (32, 16)), ("columns", (16, 48))])
def test_files_are_read_on_any_number_of_devices(dimension, parts, tmp_path):
    whole = macko_jax.compress(WEIGHT, dtype="int8", encoding="bitmask")
    saved = macko_jax.shard(whole, by(dimension, 4), parts=parts)
    np.testing.assert_array_equal(dense(saved), dense(whole))
    path = tmp_path / "shards.safetensors"
    macko_jax.save(path, {"a": [saved]})
    for mesh in (None, mesh_of(2), mesh_of(4)):
        loaded = macko_jax.load(path, mesh)["a"][0]
        assert getattr(loaded, "count", 1) == (1 if mesh is None else mesh.shape["model"])
        np.testing.assert_array_equal(dense(loaded), dense(whole))
    assert loaded.parts == parts and loaded.values.sharding == saved.values.sharding
    close(macko_jax.spmv(macko_jax.load(path)["a"][0], X), X @ dense(whole).T)
    with pytest.raises(ValueError, match=r"the mesh .*'other'.* has no \['model'\]"):
        macko_jax.load(path, jax.make_mesh((2,), ("other",), devices=jax.devices()[:2]))
    odd = jax.make_mesh((3,), ("model",), devices=jax.devices()[:3])
    with pytest.raises(ValueError, match="(32|16) (rows|columns) of a part cannot be split evenly"):
        macko_jax.load(path, odd)


def test_a_weight_that_lies_on_the_mesh_is_packed_where_it_lies():
    for dimension in ("rows", "columns"):
        placed = jax.device_put(WEIGHT, by(dimension))
        found = macko_jax.shard(placed, by(dimension), dtype="bfloat16", encoding="bitmask")
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(dense(found), np.asarray(jnp.asarray(WEIGHT, jnp.bfloat16)))
        again = macko_jax.shard(found, by(dimension, 4))  # from shards to other shards
        np.testing.assert_array_equal(dense(again), dense(found))


def check_over_processes(path):
    """Runs in each of the processes of tests/test_pipeline.py that share four devices."""
    for dimension, dtype in (("rows", "int8"), ("columns", None)):
        whole = macko_jax.compress(WEIGHT, dtype=dtype, encoding="bitmask")
        matrix = macko_jax.shard(whole, by(dimension, 4))
        assert not matrix.values.is_fully_addressable
        multiply = jax.jit(macko_jax.spmv, out_shardings=NamedSharding(mesh_of(4), P()))
        close(multiply(matrix, X).addressable_shards[0].data, X @ dense(whole).T)
        with pytest.raises(ValueError, match=r"lies on devices of other processes.*allgather"):
            macko_jax.save(path, {"a": matrix})
        macko_jax.save(path, {"a": multihost_utils.process_allgather(matrix, tiled=True)})
        loaded = macko_jax.load(path, mesh_of(4))["a"]
        close(multiply(loaded, X).addressable_shards[0].data, X @ dense(whole).T)


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.q = nnx.Einsum("BTD,DNH->BTNH", (16, 4, 8), rngs=rngs)
        self.o = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.o(self.q(x))


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Einsum((16, 4, 8), "BTD,DNH->BTNH", name="q")(x)
        return linen.Einsum((4, 8, 16), "BTNH,NHD->BTD", use_bias=False, name="o")(x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_flax_layers_run_on_shards_as_on_the_whole(kind, tmp_path):
    x = RNG.standard_normal((1, 3, 16)).astype(np.float32)
    rules = [macko_jax.Rule(".*", max_density=1.0, encoding="bitmask")]
    how = {"q": by("rows", 2, kind), "o": by("columns", 2, kind)}
    make = lambda: NnxAttention(nnx.Rngs(0))
    model, module = make(), LinenAttention()
    variables = module.init(jax.random.key(0), x)
    packed, _ = macko_jax.flax_nnx.substitute(model, rules)
    tree = macko_jax.flax_nnx.to_pure_dict(packed)
    params = macko_jax.flax_linen.substitute(module, variables, x, rules=rules)[0]["params"]
    for name, sharding in how.items():
        for layers in (tree, params):
            layers[name]["kernel"] = macko_jax.shard(layers[name]["kernel"], sharding)
    shared = macko_jax.flax_nnx.from_pure_dict(nnx.eval_shape(make), tree)
    macko_jax.save_model(tmp_path / "model.safetensors", shared)
    mesh = mesh_of(2, kind)
    loaded = macko_jax.load_model(tmp_path / "model.safetensors", make, mesh=mesh)
    assert isinstance(loaded.q.matrix, macko_jax.ShardedMatrix)
    with jax.set_mesh(mesh):
        close(nnx.jit(lambda model: model(x))(loaded), model(x))
        apply = jax.jit(lambda params: macko_jax.flax_linen.apply(module, {"params": params}, x))
        close(apply(params), module.apply(variables, x))


@pytest.mark.once
def test_a_convolution_does_not_run_on_shards():
    make = lambda: nnx.List([nnx.Conv(4, 8, (1,), rngs=nnx.Rngs(0))])
    tree = macko_jax.flax_nnx.to_pure_dict(make())
    tree[0]["kernel"] = macko_jax.shard(sparse(8, 4), by("rows"))
    with pytest.raises(ValueError, match="in shards, on which an nnx.Conv does not run"):
        macko_jax.flax_nnx.from_pure_dict(nnx.eval_shape(make), tree)


def test_errors_say_what_to_do():
    with pytest.raises(TypeError, match="takes a jax.sharding.NamedSharding, got P"):
        macko_jax.shard(WEIGHT, P("model", None))
    with pytest.raises(ValueError, match=r"by rows, P\(axis, None\), or by columns"):
        macko_jax.shard(WEIGHT, NamedSharding(mesh_of(2), P()))
    with pytest.raises(ValueError, match=r"47 rows cannot .* append rows of zeros .*\(0, 1\)"):
        macko_jax.shard(WEIGHT[1:], by("rows"))
    with pytest.raises(ValueError, match=r"lengths that make up the 64 columns, got \[8\]"):
        macko_jax.shard(WEIGHT, by("columns"), parts=[8])
    matrix = macko_jax.shard(WEIGHT, by("rows"))
    with pytest.raises(ValueError, match=r"takes x of shape \[..., 64\], got \[48\]"):
        macko_jax.spmv(matrix, jnp.ones(48))
    with pytest.raises(ValueError, match="all whole, or all in shards over the same axes"):
        fused_chain(X, [Step(matrix), Step(macko_jax.compress(WEIGHT.T))])
    with pytest.raises(TypeError, match=r"join\(\)"):
        macko_jax.decompress(matrix)


def test_what_one_device_does_is_explained():
    matrix = macko_jax.shard(WEIGHT, by("rows", 4))
    assert str(macko_jax.explain(matrix, X)).startswith("xla on cpu")


@pytest.mark.gpu
@pytest.mark.skipif(
    sum(device.platform == "gpu" for device in jax.devices()) < 2, reason="JAX finds no two GPUs"
)
@pytest.mark.parametrize("values", [None, "int8"])
def test_two_gpus_give_what_one_gives(values):
    """A layer of 7B's shape from attention to attention, whole and in shards, eight times."""
    rng = np.random.default_rng(0)
    shapes = (4096, 4096), (22016, 4096), (4096, 11008), (12288, 4096)
    weights = [
        (rng.standard_normal(s, np.float32) * (rng.random(s) < 0.5) / 50).astype(np.float16)
        for s in shapes
    ]
    whole = [macko_jax.compress(w, dtype=values) for w in weights]
    shards = in_shards(whole, 2)
    scale = (1 + rng.random(4096) / 4).astype(np.float16)
    residual, x = rng.standard_normal((2, 1, 4096)).astype(np.float16)
    chained = jax.jit(lambda m, x, r: fused_chain(x, block_steps(m, scale, r)))
    lowered = chained.trace(shards, x, residual).lower().as_text()
    assert lowered.count("@mosaic_gpu") == 3  # out, gate_up and down, qkv
    wanted = [np.asarray(y, np.float32) for y in chained(whole, x, residual)]
    for _ in range(8):
        stream, qkv = chained(shards, x, residual)
        for found, exact in (stream, wanted[0]), (restored(qkv, (4096,) * 3, 2), wanted[1]):
            error = np.linalg.norm(np.asarray(found, np.float32) - exact)
            assert error <= 2.0**-9 * np.linalg.norm(exact)
