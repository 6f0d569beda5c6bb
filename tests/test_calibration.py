"""Gram matrices of every kind of layer, against the energy of that layer's own output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from dsf_jax.trace import dataflow, stages
from dsf_jax.trace.calibration import CalibrationPass, gram_matrices
from dsf_jax.trace.network import read_network


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def check_energy(model, x, path="", **kwargs):
    """tr(W G W^T) must be the squared size of the layer's output, for any kernel W.

    G is symmetric, so that enough random kernels determine it; three stand for them.
    """
    (gram,) = gram_matrices(model, [x], **kwargs).values()
    gram = gram.reshape(-1, *gram.shape[-2:])
    for seed in range(3):
        network = read_network(model, **kwargs)
        leaf = network.paths.index((*filter(None, path.split("/")), "kernel"))
        network.leaves = list(network.leaves)
        network.leaves[leaf] = draw(seed, *network.leaves[leaf].shape)
        (layer,) = dataflow.trace(network, x).layers
        matrices = np.asarray(layer.read(network.leaves[leaf]), np.float64)
        energy = np.einsum("goi,gij,goj->", matrices, np.asarray(gram, np.float64), matrices)
        (output,) = network.apply(network.leaves, x)
        expected = np.sum(np.asarray(output, np.float64) ** 2)
        np.testing.assert_allclose(energy, expected, rtol=1e-4)


NNX_LAYERS = {
    "linear": (lambda r: nnx.Linear(6, 5, use_bias=False, rngs=r), (3, 4, 6)),
    "general": (
        lambda r: nnx.LinearGeneral((3, 4), (2, 5), axis=(1, -1), use_bias=False, rngs=r),
        (2, 3, 7, 4),
    ),
    "einsum": (lambda r: nnx.Einsum("btd,dnh->btnh", (6, 2, 3), rngs=r), (2, 4, 6)),
    "einsum_two_axes": (lambda r: nnx.Einsum("btnh,nhd->btd", (2, 3, 5), rngs=r), (2, 4, 2, 3)),
    "einsum_per_head": (lambda r: nnx.Einsum("btnh,nhd->btnd", (2, 3, 5), rngs=r), (2, 4, 2, 3)),
    "einsum_kernel_first": (lambda r: nnx.Einsum("btd,fd->btf", (5, 6), rngs=r), (2, 4, 6)),
}
CONVS = {
    "same": dict(kernel_size=(3, 3)),
    "strides": dict(kernel_size=(3, 3), strides=2),
    "valid": dict(kernel_size=(2, 3), strides=(1, 2), padding="VALID"),
    "explicit": dict(kernel_size=(3, 3), padding=((2, 0), (1, 3))),
    "circular": dict(kernel_size=(3, 3), padding="CIRCULAR"),
    "dilated": dict(kernel_size=(3, 3), kernel_dilation=2),
    "input_dilated": dict(kernel_size=(3, 3), input_dilation=2, padding=((1, 2), (0, 1))),
    "groups": dict(kernel_size=(3, 3), feature_group_count=2),
    "depthwise": dict(kernel_size=(3, 3), feature_group_count=4),
    "pointwise": dict(kernel_size=(1, 1)),
}


@pytest.mark.parametrize("name", NNX_LAYERS)
def test_nnx_products(name):
    build, shape = NNX_LAYERS[name]
    check_energy(build(nnx.Rngs(0)), draw(1, *shape))


@pytest.mark.parametrize("name", CONVS)
def test_nnx_convolutions(name):
    model = nnx.Conv(4, 8, use_bias=False, rngs=nnx.Rngs(0), **CONVS[name])
    check_energy(model, draw(1, 2, 7, 8, 4))


def test_one_dimensional_causal_convolution():
    model = nnx.Conv(4, 8, (3,), padding="CAUSAL", use_bias=False, rngs=nnx.Rngs(0))
    check_energy(model, draw(1, 2, 9, 4))


def test_transposed_convolution():
    model = nnx.ConvTranspose(4, 8, (3, 3), strides=(2, 2), use_bias=False, rngs=nnx.Rngs(0))
    check_energy(model, draw(1, 2, 5, 4, 4))


LINEN_LAYERS = {
    "dense": (nn.Dense(5, use_bias=False), (3, 6)),
    "general": (nn.DenseGeneral((2, 5), axis=(-2, -1), use_bias=False), (2, 7, 3, 4)),
    "einsum": (nn.Einsum((6, 2, 3), "btd,dnh->btnh", use_bias=False), (2, 4, 6)),
    "conv": (nn.Conv(8, (3, 3), strides=2, feature_group_count=2, use_bias=False), (2, 7, 8, 4)),
}


@pytest.mark.parametrize("name", LINEN_LAYERS)
def test_linen_layers(name):
    module, shape = LINEN_LAYERS[name]
    x = draw(1, *shape)
    check_energy(module, x, variables=module.init(jax.random.key(0), x))


def test_linear_gram_is_the_sum_of_outer_products_over_batches_of_any_shape():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    batches = [draw(0, 3, 6), draw(1, 3, 6), draw(2, 2, 4, 6)]
    rows = np.concatenate([np.asarray(b).reshape(-1, 6) for b in batches]).astype(np.float64)
    (gram,) = gram_matrices(model, batches).values()
    assert gram.dtype == jnp.float32
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_half_precision_activations_are_summed_in_float32():
    model = nnx.Linear(6, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = draw(0, 4096, 6)
    rows = np.asarray(x.astype(jnp.bfloat16), np.float64)
    (gram,) = gram_matrices(model, [x]).values()
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-5, atol=1e-2)


class Block(nnx.Module):
    """A residual block as layers are usually written, with a norm and a jitted helper."""

    def __init__(self, size, rngs):
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.up = nnx.Linear(size, 2 * size, rngs=rngs)
        self.down = nnx.Linear(2 * size, size, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Stack(nnx.Module):
    """Blocks stacked by vmap and run by scan, each rematerialized."""

    def __init__(self, depth, size, rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return Block(size, rngs)

        self.blocks = build(rngs)
        self.head = nnx.Linear(size, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return nnx.remat(lambda block, x: block(x))(block, x)

        return self.head(run(self.blocks, x))


class Chain(nnx.Module):
    """The same blocks one by one."""

    def __init__(self, stack, depth):
        graph, state = nnx.split(stack.blocks)
        self.blocks = nnx.List(
            [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(depth)]
        )
        self.head = stack.head

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_scanned_stack_is_seen_slice_by_slice():
    stack = Stack(3, 4, nnx.Rngs(0))
    chain = Chain(stack, 3)
    x = draw(0, 5, 4)
    stacked, single = gram_matrices(stack, [x]), gram_matrices(chain, [x])
    assert list(stacked) == [f"blocks/{name}[{i}]" for i in range(3) for name in ("up", "down")] + [
        "head"
    ]
    for i in range(3):
        for name in ("up", "down"):
            np.testing.assert_allclose(
                stacked[f"blocks/{name}[{i}]"], single[f"blocks/{i}/{name}"], rtol=1e-4, atol=1e-5
            )


def test_linen_scan():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(4)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="body")(x, None)[0]

    x = draw(0, 5, 4)
    model = Model()
    variables = model.init(jax.random.key(0), x)
    grams = gram_matrices(model, [x], variables=variables)
    assert list(grams) == [f"body/Dense_0[{i}]" for i in range(3)]
    dense = variables["params"]["body"]["Dense_0"]
    for i in range(3):
        np.testing.assert_allclose(grams[f"body/Dense_0[{i}]"], x.T @ x, rtol=1e-4, atol=1e-5)
        x = jnp.tanh(x @ dense["kernel"][i] + dense["bias"][i])


def test_experts_are_groups_and_vmap_over_data_is_not():
    class Experts(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(draw(0, 3, 6, 5))

        def __call__(self, x):  # [experts, tokens, in]
            return jax.vmap(jnp.matmul)(x, self.kernel[...])

    x = draw(1, 3, 7, 6)
    (gram,) = gram_matrices(Experts(), [x]).values()
    np.testing.assert_allclose(gram, np.einsum("eti,etj->eij", x, x), rtol=1e-5, atol=1e-5)

    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    (gram,) = gram_matrices(model, [x], forward=lambda m, x: jax.vmap(m)(x)).values()
    np.testing.assert_allclose(gram, np.einsum("eti,etj->ij", x, x), rtol=1e-5, atol=1e-5)


def test_layer_applied_twice_sums_both_inputs():
    class Twice(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(jnp.tanh(self.layer(x)))

    model, x = Twice(), draw(0, 5, 4)
    second = jnp.tanh(model.layer(x))
    (gram,) = gram_matrices(model, [x]).values()
    np.testing.assert_allclose(gram, x.T @ x + second.T @ second, rtol=1e-4, atol=1e-5)


def test_attention_layers_share_one_gram_and_come_in_order():
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    x = draw(0, 2, 5, 8)
    grams = gram_matrices(model, [x])
    assert list(grams) == ["query", "key", "value", "out"]
    assert grams["out"].shape == (8, 8)
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(grams[name], np.einsum("bti,btj->ij", x, x), rtol=1e-4)

    module = nn.MultiHeadDotProductAttention(2)
    variables = module.init(jax.random.key(0), x)
    linen = gram_matrices(module, [x], variables=variables)
    assert sorted(linen) == sorted(grams)
    np.testing.assert_allclose(linen["key"], grams["key"], rtol=1e-4)


def test_stages_follow_the_data_not_the_names():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.gate = nnx.Linear(8, 16, rngs=rngs)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.Linear(16, 8, rngs=rngs)
            self.side = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            y = x + self.attention(x)
            return self.down(nnx.silu(self.gate(y)) * self.up(y)) + self.side(x)

    flow = dataflow.trace(read_network(Net(nnx.Rngs(0))), draw(0, 2, 5, 8))
    members = stages.order_layers(flow, list(range(len(flow.layers)))).members
    named = [{flow.layers[i].path.split("/")[-1] for i in stage} for stage in members]
    assert named == [{"query", "key", "value", "side"}, {"out"}, {"gate", "up"}, {"down"}]


def test_layers_that_feed_each_other_are_one_stage():
    class Alternating(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, rngs=rngs)
            self.b = nnx.Linear(4, 4, rngs=rngs)
            self.c = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.c(self.b(self.a(self.b(self.a(x)))))

    flow = dataflow.trace(read_network(Alternating(nnx.Rngs(0))), draw(0, 2, 4))
    members = stages.order_layers(flow, [0, 1, 2]).members
    assert [sorted(stage) for stage in members] == [[0, 1], [2]]


@pytest.mark.slow
def test_masks_are_made_again_and_not_kept():
    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(20, 8, rngs=rngs)
            self.mix = nnx.Linear(8, 8, rngs=rngs)
            self.first, self.second = (
                nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs) for _ in range(2)
            )

        def __call__(self, tokens):
            causal = nnx.make_causal_mask(tokens)
            mask = nnx.combine_masks(causal, nnx.make_attention_mask(tokens > 0, tokens > 0))
            bias = jnp.where(mask, 0.0, -1e9)
            x = self.mix(self.embed(tokens))
            weights = jax.nn.softmax(x @ x.swapaxes(-1, -2) + bias.squeeze(1))
            return self.second(self.first(weights @ x, mask=mask), mask=mask)

    tokens = np.random.default_rng(0).integers(0, 20, (2, 48))
    network = read_network(Masked(nnx.Rngs(0)))
    halted = CalibrationPass(network, [tokens])
    whole = CalibrationPass(network, [tokens])
    (flow,) = halted.flows.values()
    order = stages.order_layers(flow, list(range(1, len(flow.layers))))
    halted.start(dict.fromkeys(halted.flows, order))
    largest = 0
    for stage, members in enumerate(order.members):
        halted.advance(stage, network.leaves)
        kept = sum(value.nbytes for value in halted.values[0].values())
        largest = max(largest, kept)
        paths = [flow.layers[i].path for i in members]
        got = halted.grams(paths, network.leaves)
        for path, gram in whole.grams(paths, network.leaves).items():
            np.testing.assert_allclose(got[path], gram, rtol=1e-4, atol=1e-4)
    # A few times the activations, [2, 48, 8] in float32; one mask alone is [2, 48, 48] of them.
    assert largest <= 4 * 2 * 48 * 8 * 4 < 2 * 48 * 48 * 4


def test_model_is_not_edited_and_runs_in_evaluation_mode():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))

    model, x = Net(nnx.Rngs(0)), draw(0, 32, 4)
    model.train()
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    gram = gram_matrices(model, [x])["second"]
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    for a, b in zip(before, after):
        np.testing.assert_array_equal(a, b)
    assert not model.norm.use_running_average and not model.dropout.deterministic
    model.eval()
    hidden = nnx.relu(model.norm(model.first(x)))
    np.testing.assert_allclose(gram, hidden.T @ hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_write_puts_back_what_read_took():
    stack = Stack(2, 4, nnx.Rngs(0))
    network = read_network(stack)
    for layer in dataflow.trace(network, draw(0, 3, 4)).layers:
        leaf = network.leaves[layer.leaf]
        new = draw(7, *layer.read(leaf).shape)
        written = layer.write(leaf, new)
        np.testing.assert_array_equal(layer.read(written), new)
        changed = int(np.sum(np.asarray(written) != np.asarray(leaf)))
        assert changed == new.size  # nothing but this slice
        np.testing.assert_array_equal(layer.write(written, layer.read(leaf)), leaf)


def test_parameters_without_a_layer_are_explained():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.lora_a = nnx.Param(draw(0, 4, 2))
            self.lora_b = nnx.Param(draw(1, 2, 4))
            self.looped = nnx.Param(draw(2, 4, 4))
            self.tied = nnx.Param(draw(3, 4, 4))
            self.embed = nnx.Embed(4, 4, rngs=rngs)
            self.joined, self.scaled = nnx.Param(draw(4, 4, 4)), nnx.Param(draw(5, 4, 4))
            self.experts, self.narrow = nnx.Param(draw(6, 3, 4, 4)), nnx.Param(draw(7, 1, 4))
            self.merged, self.unused = nnx.Param(draw(8, 4, 4)), nnx.Param(draw(9, 4, 4))
            self.own, self.cache = nnx.Variable(draw(10, 4, 4)), nnx.Cache(draw(11, 4, 4))

        def __call__(self, x):
            x = self.embed(jnp.arange(3)) + x
            x = x @ jnp.concatenate([self.joined[...], self.joined[...]], 1)[:, :4]
            x = x @ (0.5 * self.scaled[...]) @ self.experts[...][jnp.argmax(x)]
            x = x @ (self.merged[...] + self.lora_a[...] @ self.lora_b[...])
            x = self.embed.attend(x @ self.own[...] @ self.cache[...])
            x = x + x[:, :1] @ self.narrow[...]
            x = x + x @ (self.lora_a[...] @ self.lora_b[...])
            x = jax.lax.while_loop(
                lambda state: state[0] < 2,
                lambda state: (state[0] + 1, state[1] @ self.looped[...]),
                (0, x),
            )[1]
            return (x @ self.tied[...]) @ self.tied[...].T

    network = read_network(Net(nnx.Rngs(0)))
    flow = dataflow.trace(network, draw(0, 3, 4))
    notes = {network.module_path(leaf): reason for leaf, reason in flow.notes.items()}
    assert "another parameter" in notes["lora_a"] and "while" in notes["looped"]
    assert "several ways" in notes["tied"]
    assert notes["embed"] == "an embedding, tied to the head"
    assert notes["joined"].startswith("joined with other arrays before any product")
    assert notes["scaled"].startswith("scaled or masked before any product")
    assert notes["experts"].startswith("gathered: ")
    assert notes["merged"].startswith("added to something")
    assert notes["narrow"] == "too small: its matrix has one input"
    assert notes["unused"] == "not reached by the forward pass"
    assert notes["own"].startswith("no parameter") and "cache" not in notes
    assert flow.layers == []


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e25])
def test_bad_activations_name_the_first_layer_they_reach(value):
    chain = nnx.Sequential(
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
        lambda x: x.at[0, 0].set(value),
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
    )
    with pytest.raises(ValueError, match="layers/2.*NaN, infinite"):
        gram_matrices(chain, [draw(0, 3, 4)])


def test_clear_errors():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="batches is empty"):
        gram_matrices(model, [])
    with pytest.raises(ValueError, match="a single one"):
        gram_matrices(model, draw(0, 3, 4))
    with pytest.raises(ValueError, match="batch 1 is empty"):
        gram_matrices(model, [draw(0, 3, 4), draw(0, 0, 4)])
    with pytest.raises(ValueError, match="no layer matches 'head'"):
        gram_matrices(model, [draw(0, 3, 4)], layers="head")
    with pytest.raises(TypeError, match="flax.nnx.Module or a flax.linen.Module"):
        gram_matrices(jnp.dot, [draw(0, 3, 4)])
    with pytest.raises(ValueError, match="variables"):
        gram_matrices(nn.Dense(3), [draw(0, 3, 4)])
