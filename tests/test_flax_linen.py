"""Unmodified linen modules on packed kernels."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.training.train_state import TrainState

import macko_jax
from macko_jax import MackoMatrix, flax_linen
from macko_jax.nn.rules import Rule

BITMASK = Rule(encoding="bitmask")  # where any encoding does: the one that compiles faster


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.Dense(16, name="up")(x)
        return x + nn.MultiHeadDotProductAttention(4)(x), None


class Network(nn.Module):
    """Dense and DenseGeneral: in compact and setup style, in lists, under scan, remat and vmap."""

    def setup(self):
        self.stem = nn.Dense(16)
        self.blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )()
        self.tail = [nn.Dense(16), nn.Dense(16, use_bias=False)]
        self.block = nn.jit(Block)()
        self.heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )(5)

    def __call__(self, x):
        x, _ = self.blocks(self.stem(x), None)
        for layer in self.tail:
            x = jnp.tanh(layer(x))
        x, _ = self.block(x)
        return self.heads(x)


PATHS = [
    *(
        f"{block}/{name}"
        for block in ("block", "blocks")
        for name in (
            "MultiHeadDotProductAttention_0/key",
            "MultiHeadDotProductAttention_0/out",
            "MultiHeadDotProductAttention_0/query",
            "MultiHeadDotProductAttention_0/value",
            "up",
        )
    ),
    "heads",
    "stem",
    "tail_0",
    "tail_1",
]


def create(module, *args, density=0.4, seed=0):
    """Variables of a module, its kernels sparse; filled by NumPy, for `init` compiles for long."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1] in ("scale", "var"):
            value = np.ones(leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])
        if path[-1] == "kernel":
            value = value * (rng.random(leaf.shape) < density)
        return jnp.asarray(value, leaf.dtype)

    abstract = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *args))
    return traverse_util.unflatten_dict({path: fill(path, leaf) for path, leaf in abstract.items()})


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(1), (2, 6, 8))


@pytest.fixture(scope="module")
def variables(inputs):
    return create(Network(), inputs)


@pytest.fixture(scope="module")
def expected(variables, inputs):
    return jax.jit(Network().apply)(variables, inputs)


def test_every_dense_layer_is_packed(variables, inputs, expected):
    packed, report = flax_linen.substitute(Network(), variables, inputs, rules=BITMASK)
    assert sorted(layer.path for layer in report.packed) == PATHS
    assert not report.skipped
    run = jax.jit(functools.partial(flax_linen.apply, Network()))
    np.testing.assert_allclose(run(packed, inputs), expected, rtol=1e-4, atol=1e-4)


class Tower(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(8), nn.Dense(4)

    def __call__(self, x):
        return self.decoder(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)


@pytest.fixture
def tower(inputs):
    return create(Tower(), inputs)


def test_unpacked_variables_run_as_ever(tower, inputs):
    expected = Tower().apply(tower, inputs)
    packed, _ = flax_linen.substitute(Tower(), tower, inputs)
    with flax_linen.packed_kernels():
        np.testing.assert_array_equal(Tower().apply(tower, inputs), expected)
        np.testing.assert_allclose(Tower().apply(packed, inputs), expected, rtol=1e-5, atol=1e-5)
    # Outside of the context linen is as it was.
    np.testing.assert_array_equal(Tower().apply(tower, inputs), expected)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        Tower().apply(packed, inputs)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tower))


def test_nothing_is_shared_with_the_old_variables(tower, inputs):
    packed, _ = flax_linen.substitute(
        Tower(), tower, inputs, rules=Rule("encoder", encoding="bitmask")
    )
    expected = flax_linen.apply(Tower(), packed, inputs)
    for leaf in jax.tree.leaves(tower):
        leaf.delete()
    np.testing.assert_array_equal(flax_linen.apply(Tower(), packed, inputs), expected)


def test_training_flags_rngs_and_mutable_collections(inputs):
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(12)(x))
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    variables = create(Layers(), inputs)
    packed, _ = flax_linen.substitute(
        Layers(),
        variables,
        jax.ShapeDtypeStruct(inputs.shape, inputs.dtype),
        rules=BITMASK,
        train=True,
        rngs={"dropout": jax.random.key(0)},
    )
    options = dict(train=True, rngs={"dropout": jax.random.key(2)}, mutable=["batch_stats"])
    expected, expected_state = Layers().apply(variables, inputs, **options)
    found, state = flax_linen.apply(Layers(), packed, inputs, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_method_argument(tower, inputs):
    packed, report = flax_linen.substitute(Tower(), tower, inputs, rules=BITMASK, method="encode")
    assert [layer.path for layer in report.packed] == ["encoder"]
    assert "does not reach it" in report.skipped["decoder"]
    np.testing.assert_allclose(
        flax_linen.apply(Tower(), packed, inputs),
        Tower().apply(tower, inputs),
        rtol=1e-5,
        atol=1e-5,
    )


F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    "param_dtype, dtype, x_dtype", [(BF16, None, F32), (F32, None, F16), (F32, BF16, F16)]
)
def test_dtypes_are_promoted_as_in_dense(param_dtype, dtype, x_dtype):
    layer = nn.Dense(24, dtype=dtype, param_dtype=param_dtype)
    x = jax.random.normal(jax.random.key(0), (4, 40), x_dtype)
    variables = create(layer, x)
    packed, report = flax_linen.substitute(layer, variables, x, rules=BITMASK)
    assert report.layers[0].path == "" and report.packed
    expected, found = layer.apply(variables, x), flax_linen.apply(layer, packed, x)
    assert found.dtype == expected.dtype
    tolerance = 8 * float(jnp.finfo(expected.dtype).eps)
    np.testing.assert_allclose(
        found.astype(F32), expected.astype(F32), rtol=tolerance, atol=2 * tolerance
    )


@pytest.mark.parametrize("features, axis", [((4, 3), -1), ((2, 2), (0, -1)), (3, 1)])
def test_dense_general(features, axis):
    layer = nn.DenseGeneral(features, axis=axis)
    x = jax.random.normal(jax.random.key(0), (3, 2, 6))
    variables = create(layer, x)
    packed, report = flax_linen.substitute(layer, variables, x, rules=BITMASK)
    assert isinstance(packed["params"]["kernel"], MackoMatrix) and report.packed
    np.testing.assert_allclose(
        flax_linen.apply(layer, packed, x), layer.apply(variables, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "subscripts, shape, x_shape",
    [("BTD,NDH->BTNH", (2, 12, 3), (2, 5, 12)), ("...NH,HND->D...", (3, 2, 8), (4, 2, 3))],
)
def test_einsums_that_are_plain_contractions(subscripts, shape, x_shape):
    layer = nn.Einsum(shape, subscripts)
    x = np.random.default_rng(0).normal(size=x_shape).astype(np.float32)
    variables = create(layer, x)
    rules = Rule(encoding="bitmask", max_density=1.0)
    packed, report = flax_linen.substitute(layer, variables, x, rules=rules)
    kernel = packed["params"]["kernel"]
    assert isinstance(kernel, MackoMatrix) and report.packed
    expected = layer.apply(variables, x)
    np.testing.assert_allclose(flax_linen.apply(layer, packed, x), expected, rtol=1e-5, atol=1e-5)
    matrix = macko_jax.decompress(kernel)
    pair = flax_linen.FactorizedKernel(matrix[None], jnp.eye(matrix.shape[1])[None])
    pair = {"params": variables["params"] | {"kernel": pair}}
    np.testing.assert_allclose(flax_linen.apply(layer, pair, x), expected, rtol=1e-5, atol=1e-5)
    packed, report = flax_linen.substitute(layer, pair, x, rules=rules)
    assert "two factors" in report.packed[0].note
    np.testing.assert_allclose(flax_linen.apply(layer, packed, x), expected, rtol=1e-5, atol=1e-5)


def test_an_einsum_whose_kernel_could_be_taken_for_that_of_a_dense_stays_dense():
    layer, x = nn.Einsum((6, 6), "bd,fd->bf"), jnp.ones((2, 6))
    variables = create(layer, x)
    _, report = flax_linen.substitute(layer, variables, x)
    assert report.skipped[""] == (
        "its kernel (6, 6) is [out, in]; of two axes only [in, out] is packed"
    )
    guessed, report = flax_linen.pack_variables(variables)
    assert report.packed
    with pytest.raises(TypeError, match=r"is a Einsum with a packed kernel; .* is \[out, in\]"):
        flax_linen.apply(layer, guessed, x)


class LoudDense(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_a_call_of_its_own_is_not_passed_over():
    """Without the module it is not seen when packing that the layer is more than a Dense."""
    layer, x = LoudDense(6), jnp.ones((2, 6))
    packed, report = flax_linen.pack_variables(create(layer, x))
    assert report.packed
    with pytest.raises(TypeError, match="LoudDense with a packed kernel; it has a __call__ of its"):
        flax_linen.apply(layer, packed, x)


@pytest.mark.parametrize(
    "layer, reason",
    [
        (LoudDense(4), "LoudDense has a __call__ of its own"),
        (
            nn.Dense(4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)),
            "it has a dot_general of its own",
        ),
        (nn.DenseGeneral(4, batch_dims=(0,)), "it has batch dimensions"),
        (nn.Einsum((3, 6, 4), "abc,acd->abd"), "has a matrix for each entry of axis 'a'"),
        (nn.Einsum((6, 4), "abc,cd->abd", preferred_element_type=F32), "it sets preferred"),
    ],
)
def test_layers_that_stay_dense_are_reported(layer, reason):
    x = jnp.ones((3, 2, 6))
    variables = create(layer, x)
    packed, report = flax_linen.substitute(layer, variables, x)
    assert reason in report.layers[0].note
    np.testing.assert_array_equal(flax_linen.apply(layer, packed, x), layer.apply(variables, x))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_convolutions_are_packed_when_asked_for():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    variables = create(Convolutional(), x)
    _, report = flax_linen.substitute(Convolutional(), variables, x)
    assert [layer.path for layer in report.packed] == ["Dense_0"]
    assert "convolutions=True packs it" in report.skipped["Conv_0"]
    packed, report = flax_linen.substitute(
        Convolutional(), variables, x, rules=BITMASK, convolutions=True
    )
    assert [layer.shape for layer in report.packed] == [(8, 36), (6, 36), (3, 54)]
    np.testing.assert_allclose(
        flax_linen.apply(Convolutional(), packed, x),
        Convolutional().apply(variables, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_layer_of_another_kind_is_listed_and_refuses_to_run():
    class Transposed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.zeros, (5, 6)).T

    x = jnp.ones((2, 6))
    variables = create(Transposed(), x)
    packed, report = flax_linen.substitute(Transposed(), variables, x)
    assert report.skipped == {"": "Transposed is no nn.Dense, DenseGeneral, Einsum or Conv"}
    packed, _ = flax_linen.pack_variables(variables)
    with pytest.raises(TypeError, match="is a Transposed with a packed kernel; only nn.Dense"):
        flax_linen.apply(Transposed(), packed, x)


def test_rules_and_report(variables, inputs):
    packed, report = flax_linen.substitute(
        Network(),
        variables,
        inputs,
        rules=[Rule("stem", skip=True), Rule("tail_.", dtype="bfloat16"), "blocks?/.*"],
    )
    assert report.skipped == {"stem": "rule 'stem' says so", "heads": "no rule matches its path"}
    assert packed["params"]["tail_0"]["kernel"].dtype == jnp.bfloat16
    assert report.bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert report.bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    with pytest.raises(ValueError, match="'decoder' matches no layer(.|\n)*'blocks/up'"):
        flax_linen.substitute(Network(), variables, inputs, rules="decoder")


def test_axis_metadata_is_dropped():
    layer = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    x = jnp.ones((2, 3))
    variables = layer.init(jax.random.key(0), x)
    packed, _ = flax_linen.substitute(layer, variables, x, rules=Rule(max_density=1.0))
    np.testing.assert_allclose(flax_linen.apply(layer, packed, x), layer.apply(variables, x))


def test_frozen_dict_variables(variables, inputs):
    packed, _ = flax_linen.substitute(Network(), flax.core.freeze(variables), inputs)
    assert isinstance(packed["params"]["stem"]["kernel"], MackoMatrix)


@pytest.mark.slow
def test_fine_tuning_keeps_the_zeros():
    """AdamW with weight decay through partition and combine, in a TrainState."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(jnp.tanh(nn.Dense(30)(x)))

    x = jax.random.normal(jax.random.key(1), (64, 40))
    y = jax.random.normal(jax.random.key(2), (64, 3))
    network = Network()
    packed, _ = flax_linen.substitute(network, create(network, x), x, rules=Rule(encoding="delta4"))
    before = packed["params"]
    trainable, fixed = flax_linen.partition(before)
    state = TrainState.create(
        apply_fn=functools.partial(flax_linen.apply, network),
        params=trainable,
        tx=optax.adamw(1e-2, weight_decay=0.1),
    )

    @jax.jit
    def step(state):
        def loss(trainable):
            params = flax_linen.combine(trainable, fixed)
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(30):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    after = flax_linen.combine(state.params, fixed)
    for name in ("Dense_0", "Dense_1"):
        old, new = before[name]["kernel"], after[name]["kernel"]
        zeros = macko_jax.decompress(old) == 0
        np.testing.assert_array_equal(macko_jax.decompress(new) == 0, zeros)
        assert not np.any(np.asarray(new.values)[np.asarray(old.values) == 0])
        assert np.abs(macko_jax.decompress(new) - macko_jax.decompress(old)).max() > 1e-3


def test_partition_and_combine_are_inverse(variables, inputs):
    packed, _ = flax_linen.substitute(Network(), variables, inputs)
    trainable, fixed = flax_linen.partition(packed)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trainable))
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(fixed))
    whole = flax_linen.combine(trainable, fixed)
    assert jax.tree.structure(whole) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, whole, packed)
