"""What a compressed model becomes: factor pairs, packed matrices, fine-tuning with fixed zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import macko_jax
from dsf_jax import (
    FactorizedKernel,
    FactorPair,
    Rule,
    compress_model,
    export,
    factorized_kernels,
    keep_sparsity,
)
from dsf_jax.trace import dataflow
from dsf_jax.trace.network import read_network
from macko_jax.nn.flax_nnx import become_pair
from tests.test_calibration import Stack
from tests.test_pipeline import PAIR


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sparse(seed, *shape, density=0.3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * (rng.random(shape) < density), jnp.float32)


LAYERS = {
    "linear": (lambda r: nnx.Linear(6, 10, rngs=r), (3, 4, 6), 1),
    "general": (lambda r: nnx.LinearGeneral((3, 4), (2, 5), axis=(1, -1), rngs=r), (2, 3, 7, 4), 1),
    "conv": (lambda r: nnx.Conv(4, 10, (3, 2), 2, kernel_dilation=2, rngs=r), (2, 7, 8, 4), 1),
    "circular": (lambda r: nnx.Conv(4, 10, (3, 3), padding="CIRCULAR", rngs=r), (2, 7, 8, 4), 1),
    "causal": (lambda r: nnx.Conv(4, 10, (3,), padding="CAUSAL", rngs=r), (2, 7, 4), 1),
    "grouped": (
        lambda r: nnx.Conv(4, 10, (3, 3), feature_group_count=2, use_bias=False, rngs=r),
        (2, 7, 8, 4),
        2,
    ),
}


def random_pair(model, x, groups, inner=7):
    """A model, another whose kernel is a product, and the factors of that product."""
    network = read_network(model)
    (leaf,) = [i for i, path in enumerate(network.paths) if path == ("kernel",)]
    (layer,) = dataflow.trace(network, x).layers
    left = sparse(1, groups, layer.rows, inner)
    right = sparse(2, groups, inner, layer.cols)
    leaves = list(network.leaves)
    leaves[leaf] = layer.write(leaves[leaf], left @ right)
    for i, path in enumerate(network.paths):
        if path == ("bias",):
            leaves[i] = draw(3, *leaves[i].shape)
    return network.substitute(leaves, {}), left, right


@pytest.mark.parametrize("name", LAYERS)
def test_pair_and_packed_pair_equal_the_layer_with_the_product(name):
    build, shape, groups = LAYERS[name]
    x = draw(0, *shape)
    model, left, right = random_pair(build(nnx.Rngs(0)), x, groups)
    expected, run = model(x), nnx.jit(lambda model, x: model(x))
    become_pair(model, left, right)
    assert isinstance(model, FactorPair)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)
    packed, report = export.pack(model, rules=macko_jax.Rule(encoding="bitmask"))
    np.testing.assert_allclose(run(packed, x), expected, rtol=1e-4, atol=1e-4)
    assert [layer.kind for layer in report.packed] == ["FactorPair"] and not report.skipped
    assert isinstance(
        model.right, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv
    )  # left as it was


@pytest.mark.slow
def test_packed_convolution_is_differentiable():
    build, shape, groups = LAYERS["conv"]
    x = draw(0, *shape)
    model, left, right = random_pair(build(nnx.Rngs(0)), x, groups)
    become_pair(model, left, right)
    packed, _ = export.pack(model)
    dense = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)
    found = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(packed)
    np.testing.assert_allclose(found.left.bias[...], dense.left.bias[...], rtol=1e-4, atol=1e-3)
    kept = np.asarray(right[0].reshape(7, -1).T).ravel() != 0
    gradient = np.asarray(dense.right.kernel[...]).ravel()[kept]
    values = np.asarray(found.right["values"][...])
    np.testing.assert_allclose(
        np.sort(values[values != 0]), np.sort(gradient[gradient != 0]), rtol=1e-3, atol=1e-3
    )


class ConvNet(nnx.Module):
    """A residual block with a shortcut, and a grouped convolution."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 16, (2, 2), strides=2, rngs=rngs)
        self.shortcut = nnx.Conv(8, 16, (1, 1), strides=2, rngs=rngs)
        self.grouped = nnx.Conv(16, 32, (2, 2), feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(self.conv(x)) + self.shortcut(x)
        return self.head(nnx.relu(self.grouped(x)).mean((1, 2)))


@pytest.mark.slow
def test_factorized_convolutional_network_runs_packed():
    model, x = ConvNet(nnx.Rngs(0)), draw(0, 32, 8, 8, 1)
    model.eval()
    pair, report = compress_model(
        model,
        [x],
        density=0.6,
        **PAIR,
        rules=[Rule("stem", skip=True), Rule("shortcut", method="wanda", options={})],
    )
    assert [layer.path for layer in report.layers] == ["conv", "shortcut", "grouped"]
    assert report.stages == 2  # the shortcut reads what the convolution reads
    for name in ("conv", "grouped"):
        assert isinstance(getattr(pair, name), FactorPair)
        kernels = (getattr(pair, name).left.kernel, getattr(pair, name).right.kernel)
        layer = next(layer for layer in report.layers if layer.path == name)
        assert sum(int(jnp.count_nonzero(k[...])) for k in kernels) == layer.nonzeros
    packed, _ = export.pack(pair)
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(packed, x), run(pair, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_pairs_in_a_scanned_stack():
    model, x = Stack(2, 16, nnx.Rngs(0)), draw(0, 64, 16)
    pair, report = compress_model(
        model, [x], method="wanda", density=0.6, rules=[Rule(r"blocks/down\[.\]", **PAIR)]
    )
    assert [layer.path for layer in report.layers] == [
        f"blocks/{name}[{i}]" for i in range(2) for name in ("up", "down")
    ]
    factors = pair.blocks.down
    assert isinstance(factors, FactorPair) and factors.left.kernel[...].shape[0] == 2
    # The same numbers as the products written into the dense model.
    dense = nnx.clone(model)
    dense.blocks.up.kernel[...] = pair.blocks.up.kernel[...]
    dense.blocks.down.kernel[...] = factors.right.kernel[...] @ factors.left.kernel[...]
    np.testing.assert_allclose(pair(x), dense(x), rtol=1e-4, atol=1e-4)
    rules = [Rule(r"blocks/down\[0\]", **PAIR)]
    report = compress_model(model, [x], method="wanda", density=0.6, rules=rules).report
    (single,) = (layer for layer in report.layers if layer.path == "blocks/down[0]")
    assert single.method == "admm" and "all slices of a stack become pairs" in single.note


@pytest.mark.slow
def test_linen_pairs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (2, 2), strides=2)(x)).reshape(-1, 4, 8)
            x = nn.DenseGeneral((4, 4), axis=(-2, -1), name="general")(x).reshape(-1, 32)
            return nn.Dense(4, name="head")(nn.Dense(16, name="middle")(x))

    module, x = Model(), draw(0, 32, 8, 8, 8)
    variables = module.init(jax.random.key(0), x)
    new, report = compress_model(module, [x], variables=variables, density=0.6, **PAIR)
    assert [layer.shape for layer in report.layers] == [(16, 32)] * 3
    middle = new["params"]["middle"]["kernel"]
    assert isinstance(middle, FactorizedKernel)

    def product(leaf, old):
        if not isinstance(leaf, FactorizedKernel):
            return leaf
        return (leaf.left @ leaf.right)[0].T.reshape(old.shape)

    dense = jax.tree.map(
        product, new, variables, is_leaf=lambda leaf: isinstance(leaf, FactorizedKernel)
    )
    expected = module.apply(dense, x)
    with factorized_kernels():
        np.testing.assert_allclose(module.apply(new, x), expected, rtol=1e-4, atol=1e-4)
        grads = jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2))(new)
    assert jax.tree.structure(grads) == jax.tree.structure(new)
    with export.packed_kernels():
        found = jax.jit(module.apply)(export.pack_linen(new), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.second = nnx.Linear(32, 16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def train(model, x, y, optimizer, steps):
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(steps):
        loss = step(model, optimizer)
    return float(loss), optimizer


def patterns(model):
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: np.asarray(v[...]) != 0 for path, v in state if path[-1] == "kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, rules", [("adamw", [Rule("second", **PAIR)]), ("sgd", [])], ids=["pair", "pruned"]
)
def test_fine_tuning_recovers_loss_and_keeps_every_zero(rules, optimizer):
    x, y = draw(0, 256, 16), jnp.tanh(draw(0, 256, 16) @ draw(1, 16, 4))
    model = Mlp(nnx.Rngs(0))
    dense_loss, _ = train(model, x, y, optax.adam(1e-2), 100)
    new, _ = compress_model(model, [x], method="magnitude", density=0.3, rules=rules)
    before = float(jnp.mean((new(x) - y) ** 2))
    kept = patterns(new)
    # Weight decay and momentum are what would revive or move a removed weight.
    inner = {
        "adamw": optax.adamw(1e-3, weight_decay=1e-2),
        "sgd": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(2e-2, momentum=0.9)),
    }[optimizer]
    after, state = train(new, x, y, keep_sparsity(inner), 150)
    assert before > 2 * dense_loss
    assert after < dense_loss + 0.5 * (before - dense_loss)
    for path, pattern in patterns(new).items():
        assert not np.any(pattern & ~kept[path]), path
    assert int(np.sum(kept["first", "kernel"])) == int(0.3 * 16 * 32)
    # The masks are in the optimizer's state, where a checkpoint finds them.
    masks = [a for a in jax.tree.leaves(nnx.state(state)) if a.dtype == bool and a.ndim > 1]
    assert len(masks) == len(kept)


def test_keep_sparsity_frees_vectors_and_all_zero_matrices():
    params = {"bias": jnp.zeros(3), "fresh": jnp.zeros((2, 2)), "kernel": jnp.eye(2)}
    optimizer = keep_sparsity(optax.sgd(1.0))
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_array_equal(updates["bias"], -jnp.ones(3))
    np.testing.assert_array_equal(updates["fresh"], -jnp.ones((2, 2)))
    np.testing.assert_array_equal(updates["kernel"], -jnp.eye(2))
