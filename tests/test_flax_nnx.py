"""Substitution in NNX models: equal outputs, nothing shared, transforms, training, restoring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import macko_jax
from macko_jax.flax_nnx import (
    MackoEinsum,
    MackoIndex,
    MackoLinear,
    abstract_model,
    describe,
    from_pure_dict,
    substitute,
    to_pure_dict,
)
from macko_jax.nn.einsum import why_no_contraction
from macko_jax.nn.flax_nnx import become_pair
from macko_jax.nn.rules import Rule

BITMASK = Rule(encoding="bitmask")  # where any encoding does: the one that compiles faster
BF16_BITMASK = Rule(encoding="bitmask", dtype="bfloat16")
# Kernels are filled by NumPy, because the default initializer compiles for long.
ZEROS = nnx.initializers.zeros_init()


def linear(*features, layer=nnx.Linear, rngs=None, **options):
    """A layer with a random bias and a kernel of zeros, to be filled by `fill_kernels`."""
    rngs = rngs or nnx.Rngs(0)
    return layer(
        *features, kernel_init=ZEROS, bias_init=nnx.initializers.uniform(1.0), rngs=rngs, **options
    )


def fill_kernels(model, density=0.4, seed=0):
    """Give each kernel of a model random values in a share of its entries, at random places."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        kept = rng.random(leaf.shape) < density
        values = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2])
        return jnp.asarray(values * kept, leaf.dtype)

    kernels = nnx.state(model, lambda path, variable: path[-1] == "kernel")
    nnx.update(model, jax.tree.map(fill, kernels))
    return model


class MLP(nnx.Module):
    """Linear layers in every kind of container, one of them shared, one tied to an embedding."""

    def __init__(self, rngs, width=48):
        self.first = linear(20, width)
        self.blocks = nnx.List([linear(width, width), nnx.Dict(up=linear(width, width))])
        self.pair = nnx.data((linear(width, width), {"inner": [linear(width, width)]}))
        self.sequence = nnx.Sequential(linear(width, width), jax.nn.relu, linear(width, width))
        self.shared = self.blocks[0]
        self.attention = nnx.MultiHeadAttention(
            4, width, decode=False, kernel_init=ZEROS, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.last = linear(width, 7, use_bias=False)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        x = jnp.tanh(self.blocks[1]["up"](self.blocks[0](x)))
        x = jnp.tanh(self.pair[1]["inner"][0](self.pair[0](x)))
        x = self.norm(self.shared(self.sequence(x)))
        x = x + self.attention(x)
        return self.last(self.dropout(x))


@pytest.fixture(scope="module")
def dense():
    return nnx.view(fill_kernels(MLP(nnx.Rngs(0))), deterministic=True)


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(1), (3, 5, 20))


@nnx.jit
def run(model, x):
    return model(x)


@pytest.fixture(scope="module")
def expected(dense, inputs):
    return run(dense, inputs)


PATHS = [
    "attention/key",
    "attention/out",
    "attention/query",
    "attention/value",
    "blocks/0",
    "blocks/1/up",
    "first",
    "last",
    "pair/0",
    "pair/1/inner/0",
    "sequence/layers/0",
    "sequence/layers/2",
]


def test_every_linear_is_replaced(dense, inputs, expected):
    packed, report = substitute(dense, BITMASK)
    assert sorted(layer.path for layer in report.packed) == PATHS
    assert not report.skipped
    assert packed.shared is packed.blocks[0]
    kinds = {type(module) for _, module in nnx.iter_modules(packed)}
    assert MackoLinear in kinds and not kinds & {nnx.Linear, nnx.LinearGeneral}
    np.testing.assert_allclose(run(packed, inputs), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(packed.first(inputs), dense.first(inputs), rtol=2e-5, atol=2e-5)


def test_the_model_itself(inputs):
    dense = fill_kernels(linear(20, 6))
    packed, report = substitute(dense)
    assert isinstance(packed, MackoLinear) and isinstance(dense, nnx.Linear)
    assert report.layers[0].path == "" and "(the model)" in str(report)
    np.testing.assert_allclose(packed(inputs), dense(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "container", [lambda a, b: [a, b], lambda a, b: (a, b), lambda a, b: {"x": a, "y": {"z": b}}]
)
def test_plain_containers(container):
    layers = [fill_kernels(linear(20, 6), seed=seed) for seed in range(2)]
    packed, report = substitute(container(*layers))
    assert len(report.packed) == 2
    assert type(packed) is type(container(*layers))
    found = jax.tree.leaves(packed, is_leaf=lambda node: isinstance(node, nnx.Module))
    assert all(isinstance(layer, MackoLinear) for layer in found)


def test_a_cycle_between_modules(inputs):
    class Child(nnx.Module):
        def __init__(self, parent, rngs):
            self.parent = parent
            self.linear = linear(20, 6, rngs=rngs)

    class Parent(nnx.Module):
        def __init__(self, rngs):
            self.child = Child(self, rngs)

    dense = fill_kernels(Parent(nnx.Rngs(0)))
    packed, _ = substitute(dense, BITMASK)
    assert packed.child.parent is packed
    np.testing.assert_allclose(
        packed.child.linear(inputs), dense.child.linear(inputs), rtol=1e-5, atol=1e-6
    )


def test_nothing_is_shared_with_the_old_model(inputs):
    dense = fill_kernels(
        nnx.Sequential(linear(20, 12), nnx.LayerNorm(12, rngs=nnx.Rngs(0)), linear(12, 5))
    )
    rules = [Rule("layers/0", skip=True), BITMASK]
    before = jax.tree.map(np.asarray, nnx.state(dense, nnx.Param))
    packed, _ = substitute(dense, rules)
    expected = dense(inputs)
    modules = [{id(module) for _, module in nnx.iter_modules(model)} for model in (dense, packed)]
    assert not modules[0] & modules[1]
    # Writing to the copy does not show in the original, and deleting the original's arrays does
    # not hurt the copy.
    result = packed(inputs)
    nnx.update(packed, jax.tree.map(lambda a: a + 1, nnx.state(packed, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(dense, nnx.Param), before)
    packed, _ = substitute(dense, rules)
    for leaf in jax.tree.leaves(nnx.state(dense)):
        leaf.delete()
    np.testing.assert_array_equal(packed(inputs), result)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)


F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    "param_dtype, dtype, x_dtype", [(BF16, None, F32), (F32, BF16, F16), (F16, F32, F16)]
)
def test_dtypes_are_promoted_as_in_linear(param_dtype, dtype, x_dtype):
    dense = fill_kernels(linear(40, 24, dtype=dtype, param_dtype=param_dtype))
    packed, _ = substitute(dense, BITMASK)
    assert packed.values.dtype == param_dtype
    x = jax.random.normal(jax.random.key(0), (4, 40), x_dtype)
    expected, found = dense(x), packed(x)
    assert found.dtype == expected.dtype
    tolerance = 8 * float(jnp.finfo(expected.dtype).eps)
    np.testing.assert_allclose(
        found.astype(F32), expected.astype(F32), rtol=tolerance, atol=2 * tolerance
    )


def test_integer_input_and_leading_axes():
    dense = fill_kernels(linear(5, 4))
    packed, _ = substitute(dense, BITMASK)
    for shape in [(5,), (0, 5), (2, 1, 3, 5)]:
        x = jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape)
        assert packed(x).dtype == dense(x).dtype
        np.testing.assert_allclose(packed(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "features, axis", [((6, (4, 3)), -1), (((3, 6), (2, 2)), (0, -1)), ((2, 3), 1)]
)
def test_linear_general(features, axis):
    dense = fill_kernels(linear(*features, layer=nnx.LinearGeneral, axis=axis))
    packed, report = substitute(dense, BITMASK)
    assert report.packed
    x = jax.random.normal(jax.random.key(0), (3, 2, 6))
    np.testing.assert_allclose(packed(x), dense(x), rtol=1e-5, atol=1e-5)


EINSUMS = [
    ("BTD,DNH->BTNH", (12, 2, 3), (2, 3), (2, 5, 12)),
    ("BTNH,HND->BTD", (3, 2, 8), None, (2, 5, 2, 3)),
    ("...D,CNDH->C...NH", (2, 2, 12, 3), (2, 2, 3), (4, 12)),
    ("xDy,Dz->zxy", (6, 4), (4, 1, 1), (3, 6, 5)),
]


@pytest.mark.parametrize("subscripts, shape, bias, x_shape", EINSUMS)
def test_einsums_that_are_plain_contractions(subscripts, shape, bias, x_shape):
    dense = fill_kernels(linear(subscripts, shape, bias, layer=nnx.Einsum))
    packed, report = substitute(dense, BITMASK)
    assert report.packed and isinstance(packed, MackoEinsum)
    x = np.random.default_rng(0).normal(size=x_shape).astype(np.float32)
    expected = dense(x)
    np.testing.assert_allclose(packed(x), expected, rtol=1e-5, atol=1e-5)

    def make():
        return nnx.Einsum(subscripts, shape, bias, rngs=nnx.Rngs(0))

    restored = from_pure_dict(nnx.eval_shape(make), to_pure_dict(packed))
    np.testing.assert_array_equal(restored(x), packed(x))
    # Two factors whose product is the kernel: one of them is the matrix itself.
    matrix = macko_jax.decompress(packed.matrix)
    become_pair(dense, matrix[None], jnp.eye(matrix.shape[1])[None])
    np.testing.assert_allclose(dense(x), expected, rtol=1e-5, atol=1e-5)
    assert dense.right.kernel[...].ndim + dense.left.kernel[...].ndim == len(shape) + 2
    with pytest.raises(ValueError, match="einsum_str='ab,bc->ac' and out_sharding=None were given"):
        packed(x, "ab,bc->ac")


@pytest.mark.parametrize(
    "subscripts, reason",
    [
        ("eb,ebo->eo", "has a matrix for each entry of axis 'e'"),
        ("b,f->bf", "has no matrix: none of its kernel is summed"),
        ("bnh,nh->b", "has no matrix: all of its kernel is summed"),
        ("btd,df->bf", "sums an axis that only one operand has"),
        ("...d,df->f", "sums an axis that only one operand has"),
        ("bd,dfg->bf", "sums an axis that only one operand has"),
        ("bd,ddf->bf", "names an axis twice"),
        ("b...,...f->bf", "ellipsis in its kernel"),
        (None, "its einsum is given by each call"),
    ],
)
def test_einsums_that_are_more_than_contractions(subscripts, reason):
    assert reason in why_no_contraction(subscripts)


def test_gradients_are_those_of_the_dense_model(inputs):
    dense = fill_kernels(linear(20, 9))
    packed, _ = substitute(dense, BITMASK)

    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    expected = nnx.grad(loss)(dense, inputs)
    found = nnx.jit(nnx.grad(loss))(packed, inputs)
    assert set(found) == {"values", "bias"}
    mask = np.asarray(dense.kernel[...].T) != 0
    gradient = macko_jax.decompress(with_values(packed, found["values"][...]))
    np.testing.assert_allclose(gradient, expected["kernel"][...].T * mask, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["bias"][...], expected["bias"][...], rtol=1e-5, atol=1e-5)
    of_input = jax.grad(lambda x: loss(packed, x))(inputs)
    np.testing.assert_allclose(
        of_input, jax.grad(lambda x: loss(dense, x))(inputs), rtol=1e-5, atol=1e-5
    )


def with_values(layer, values):
    layer = nnx.clone(layer)
    layer.values[...] = values
    return layer.matrix


@pytest.mark.slow
def test_orbax_restores_a_model_that_is_known_by_its_code_alone(dense, inputs, tmp_path):
    model = nnx.clone(dense)
    # A pair of which one factor is packed: the other is denser than 0.8.
    matrix = jnp.swapaxes(model.last.kernel[...], 0, 1)
    become_pair(model.last, jnp.ones((1, 7, 7)), matrix[None])
    packed, _ = substitute(model, [Rule("blocks/0", dtype="int8"), BF16_BITMASK])
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(nnx.state(packed)),
            layers=ocp.args.JsonSave(describe(packed)),
        )
        checkpointer.save(tmp_path / "packed", items)
        what = ocp.args.Composite(layers=ocp.args.JsonRestore())
        layers = checkpointer.restore(tmp_path / "packed", what)["layers"]
        restored = abstract_model(make_mlp, layers)
        what = ocp.args.Composite(state=ocp.args.StandardRestore(nnx.state(restored)))
        nnx.update(restored, checkpointer.restore(tmp_path / "packed", what)["state"])
    assert restored.shared is restored.blocks[0]
    assert restored.blocks[0].values.dtype == jnp.int8
    assert isinstance(restored.last.left, nnx.Linear)
    np.testing.assert_array_equal(run(restored, inputs), run(packed, inputs))
    del layers["dict"][0]
    with pytest.raises(ValueError, match="missing in the tree"):
        abstract_model(make_mlp, layers)
    with pytest.raises(ValueError, match="the description makes no sense"):
        abstract_model(make_mlp, {"matrix": 3})


def make_mlp():
    return nnx.view(MLP(nnx.Rngs(0)), deterministic=True)


def test_vmapped_and_scanned_stack():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = linear(24, 24, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.linear(x))

    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return Block(rngs)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def chain(block, x):
        return block(x)

    dense = fill_kernels(create(nnx.Rngs(0)))
    # The matrices of a stack have different numbers of non-zeros; one of them has none.
    dense.linear.kernel[...] = dense.linear.kernel[...].at[2].set(0).at[1, :, :20].set(0)
    packed, report = substitute(dense, Rule(encoding="delta4", lanes=2))
    assert report.packed[0].shape == (4, 24, 24)
    x = jax.random.normal(jax.random.key(0), (3, 24))
    np.testing.assert_allclose(chain(packed, x), chain(dense, x), rtol=1e-5, atol=1e-5)

    @nnx.jit
    @nnx.vmap(in_axes=(0, None))
    def each(block, x):
        return block(x)

    np.testing.assert_allclose(each(packed, x), each(dense, x), rtol=1e-5, atol=1e-5)

    def loss(model):
        return jnp.sum(chain(model, x) ** 2)

    gradient = nnx.jit(nnx.grad(loss))
    expected = gradient(dense)["linear"]["kernel"][...]
    found = gradient(packed)["linear"]["values"][...]
    packed.linear.values[...] = found
    mask = dense.linear.kernel[...] != 0
    np.testing.assert_allclose(
        macko_jax.decompress(packed.linear.matrix).swapaxes(1, 2),
        expected * mask,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.slow
def test_a_lora_layer_is_packed_beside_its_adapter(tmp_path):
    def make():
        options = dict(lora_rank=2, b_initializer=nnx.initializers.normal(1.0))
        wrapped = nnx.LoRA(16, 2, 16, base_module=linear(16, 16), rngs=nnx.Rngs(1))
        return nnx.Sequential(linear(16, 16, layer=nnx.LoRALinear, **options), wrapped)

    model, x = fill_kernels(make()), jnp.ones((2, 16))
    packed, report = substitute(model)
    assert [layer.path for layer in report.packed] == ["layers/0", "layers/1/base_module"]
    assert len(report.skipped) == 4 and all("lora" in path for path in report.skipped)
    macko_jax.save_model(tmp_path / "lora.safetensors", packed)
    loaded = macko_jax.load_model(tmp_path / "lora.safetensors", make)
    for one in (packed, loaded):
        np.testing.assert_allclose(one(x), model(x), rtol=1e-5, atol=1e-5)
    assert not isinstance(loaded.layers[0], nnx.LoRALinear)
    adapters = nnx.state(packed, nnx.LoRAParam)
    assert len(jax.tree.leaves(adapters)) == 4


def test_code_that_reads_a_kernel_is_told_what_there_is():
    packed, _ = substitute(fill_kernels(linear(16, 16)))
    assert (packed.kernel.shape, packed.kernel.dtype) == ((16, 16), jnp.float32)
    assert (packed.kernel.ndim, packed.kernel.size) == (2, 256)
    x = jnp.ones(16)
    for read in (lambda kernel: x @ kernel, np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match="MackoLinear has no 'kernel'"):
            read(packed.kernel)
    with pytest.raises(AttributeError, match=r"MackoLinear has no 'kernel': .*decompress\(layer"):
        packed.kernel[...]
    pair = fill_kernels(linear(16, 16))
    become_pair(pair, jnp.ones((1, 16, 2)), jnp.ones((1, 2, 16)))
    with pytest.raises(AttributeError, match=r"FactorPair has no 'kernel': its two layers"):
        pair.kernel[...]
    assert (pair.kernel.shape, pair.kernel.dtype) == ((16, 16), jnp.float32)
    assert not hasattr(pair.kernel, "value")


class LoudLinear(nnx.Linear):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class QuietLinear(nnx.Linear):
    """A subclass that changes nothing."""


@pytest.mark.parametrize(
    "layer, reason",
    [
        (lambda: linear(8, 8, layer=LoudLinear), "LoudLinear has a __call__ of its own"),
        (
            lambda: linear(8, 8, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)),
            "it has a dot_general of its own",
        ),
        (lambda: linear(8, 8, preferred_element_type=F32), "it sets preferred_element_type"),
        (
            lambda: linear(8, 8, param_dtype=jnp.float8_e5m2),
            "values of float8_e5m2 are not packed; a rule can set dtype to float16, bfloat16, "
            "float32",
        ),
        (lambda: linear(8, 8, layer=nnx.LinearGeneral, batch_axis={0: 2}), "it has batch axes"),
        (
            lambda: linear("eb,ebc->ec", (8, 8, 8), layer=nnx.Einsum),
            "its einsum 'eb,ebc->ec' has a matrix for each entry of axis 'e'",
        ),
        (
            lambda: linear("ab,bc->ac", (8, 8), layer=nnx.Einsum, einsum_op=lambda *a, **k: 0),
            "it has an einsum_op of its own",
        ),
        (lambda: linear(0, 8), "its kernel is empty"),
    ],
)
def test_layers_that_stay_dense_are_reported(layer, reason):
    dense = layer()
    packed, report = substitute(dense, Rule(max_density=1.0))
    assert type(packed) is type(dense)
    assert report.layers[0].note == reason
    assert report.layers[0].bytes_before == report.layers[0].bytes_after
    assert reason in str(report)


def test_plain_subclass_is_packed():
    packed, report = substitute(fill_kernels(linear(8, 8, layer=QuietLinear)))
    assert report.layers[0].kind == "QuietLinear" and isinstance(packed, MackoLinear)


def test_dense_layers_stay_dense_unless_a_rule_allows_them(inputs):
    dense = fill_kernels(linear(20, 8), density=1.0)
    packed, report = substitute(dense)
    assert isinstance(packed, nnx.Linear)
    assert report.layers[0].note == "from density 0.8 on dense is faster"
    packed, report = substitute(dense, Rule(max_density=1.0, encoding="bitmask"))
    assert isinstance(packed, MackoLinear) and report.layers[0].density == 1.0
    np.testing.assert_allclose(packed(inputs), dense(inputs), rtol=1e-5, atol=1e-5)


def test_rules_choose_layers_and_dtypes(dense):
    packed, report = substitute(
        dense,
        [
            Rule("last", skip=True),
            Rule("blocks/.*", dtype="bfloat16", encoding="delta4"),
            Rule("first|pair/.*", max_density=0.1),
            "sequence/.*",
        ],
    )
    skipped = report.skipped
    assert skipped["last"] == "rule 'last' says so"
    assert skipped["first"] == skipped["pair/0"] == "from density 0.1 on dense is faster"
    assert skipped["attention/out"] == "no rule matches its path"
    assert {layer.path for layer in report.packed} == {
        "blocks/0",
        "blocks/1/up",
        "sequence/layers/0",
        "sequence/layers/2",
    }
    assert packed.blocks[0].values.dtype == jnp.bfloat16
    assert packed.blocks[0].encoding == "delta4"
    assert packed.sequence.layers[0].values.dtype == jnp.float32
    with pytest.raises(ValueError, match="'decoder' matches no layer(.|\n)*'sequence/layers/0'"):
        substitute(dense, "decoder")


def test_report_counts_bytes(dense):
    packed, report = substitute(dense, [Rule("last", skip=True), ".*"])

    def nbytes(model):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))

    assert report.bytes_before == nbytes(dense)
    assert report.bytes_after == nbytes(packed)
    kernel = dense.first.kernel[...]
    first = next(layer for layer in report.layers if layer.path == "first")
    assert first.density == pytest.approx(np.count_nonzero(kernel) / kernel.size)
    assert first.bytes_before == kernel.nbytes
    assert first.bytes_after == packed.first.matrix.nbytes
    # Of a model that was packed before the report is the same, and the dense model's bytes count.
    packed.table = nnx.Embed(5, 8, rngs=nnx.Rngs(0))
    _, again = substitute(packed, [Rule("last", skip=True)])
    assert again.bytes_before == nbytes(dense) + 160 and again.bytes_after == nbytes(packed)
    assert {layer.note for layer in again.packed} == {"it was packed before"}
    (table,) = again.others
    assert (table.path, table.kind, table.shape) == ("table", "Embed", (5, 8))
    assert again.skipped == {"last": "rule 'last' says so", "table": "an embedding"}


def test_out_sharding_and_wrong_width_are_refused(dense):
    packed, _ = substitute(dense)
    with pytest.raises(ValueError, match="skip=True"):
        packed.first(jnp.ones((2, 20)), out_sharding=jax.P("data"))
    with pytest.raises(ValueError, match="20"):
        packed.first(jnp.ones((2, 21)))


def test_abstract_model_is_refused():
    with pytest.raises(ValueError, match="from_pure_dict"):
        substitute(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))))


@pytest.mark.slow
def test_fine_tuning_keeps_the_zeros():
    """AdamW with weight decay on packed values follows AdamW on masked dense kernels."""
    dense = fill_kernels(nnx.Sequential(linear(40, 30), jnp.tanh, linear(30, 3)))
    packed, _ = substitute(dense, BITMASK)
    masks = [np.asarray(dense.layers[i].kernel[...]) != 0 for i in (0, 2)]
    structure = jax.tree.map(np.asarray, nnx.state(packed, MackoIndex))
    padding = [np.asarray(packed.layers[i].values[...]) == 0 for i in (0, 2)]
    x = jax.random.normal(jax.random.key(1), (64, 40))
    y = jax.random.normal(jax.random.key(2), (64, 3))

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = []
    for model in (dense, packed):
        optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)
        losses.append([])
        for _ in range(30):
            losses[-1].append(float(step(model, optimizer)))
            if model is dense:
                for i, mask in zip((0, 2), masks):
                    dense.layers[i].kernel[...] *= mask
    assert losses[1][-1] < 0.5 * losses[1][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    for i, mask, pad in zip((0, 2), masks, padding):
        kernel = macko_jax.decompress(packed.layers[i].matrix).T
        np.testing.assert_array_equal(np.asarray(kernel) != 0, mask)
        np.testing.assert_allclose(kernel, dense.layers[i].kernel[...], rtol=1e-2, atol=1e-3)
        assert not np.asarray(packed.layers[i].values[...])[pad].any()
    jax.tree.map(np.testing.assert_array_equal, structure, nnx.state(packed, MackoIndex))


def test_packed_checkpoint_without_dense_weights(dense, inputs, tmp_path):
    packed, _ = substitute(dense, [Rule("last", skip=True), BF16_BITMASK])
    expected = run(packed, inputs)
    macko_jax.save(tmp_path / "packed.safetensors", to_pure_dict(packed))
    held = {leaf.shape for leaf in jax.live_arrays()}

    abstract = nnx.view(nnx.eval_shape(lambda: MLP(nnx.Rngs(0), width=48)), deterministic=True)
    count = len([leaf for leaf in jax.live_arrays() if leaf.shape == (20, 48)])
    model = from_pure_dict(abstract, macko_jax.load(tmp_path / "packed.safetensors"))
    assert (20, 48) in held  # the old model's first kernel: the new model has no such array
    assert len([leaf for leaf in jax.live_arrays() if leaf.shape == (20, 48)]) == count
    np.testing.assert_array_equal(run(model, inputs), expected)
    assert isinstance(model.first, MackoLinear) and isinstance(model.last, nnx.Linear)
    assert model.shared is model.blocks[0]
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(model, (nnx.Param, nnx.BatchStat)),
        nnx.state(packed, (nnx.Param, nnx.BatchStat)),
    )
    assert model.dropout.rngs.key[...] == packed.dropout.rngs.key[...]


def test_tree_that_does_not_fit_the_model(dense):
    packed, _ = substitute(dense)
    tree = to_pure_dict(packed)
    del tree["norm"]["mean"]
    tree["extra"] = {"kernel": tree["first"]["kernel"]}
    tree["last"]["kernel"] = tree["first"]["kernel"]
    tree["first"]["bias"] = jnp.zeros((5,))
    with pytest.raises(ValueError) as error:
        from_pure_dict(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))), tree)
    message = str(error.value)
    assert "norm/mean: missing in the tree" in message
    assert "extra/kernel: not in the model" in message
    assert "last/kernel: the matrix [out, in] has shape (48, 20)" in message
    assert "the model needs (7, 48)" in message
    assert "first/bias: the tree has float32[5], the model needs float32[48]" in message
    assert "build the model with the configuration" in message
