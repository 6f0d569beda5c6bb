"""Compressed models of every kind of layer are packed, saved, and loaded by another process."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import dsf_jax
import macko_jax
from macko_jax.flax_linen import FactorizedKernel
from macko_jax.flax_nnx import MackoConv, MackoLinear
from macko_jax.nn.flax_nnx import become_pair
from tests import served_models
from tests.served_models import LinenNet

ROOT = pathlib.Path(__file__).parent.parent
INNER = 5
# Of each layer that becomes a pair: stack, groups, out, in.
PAIRS = {
    "conv": ((), 1, 8, 72),
    "grouped": ((), 2, 8, 16),
    "blocks/down": ((3,), 1, 8, 24),
    "query": ((), 1, 12, 8),
    "merge": ((), 1, 10, 12),
    "head": ((), 1, 5, 10),
}


# A bitmask compiles faster; one layer is in what is chosen.
RULES = [macko_jax.Rule("merge"), macko_jax.Rule(encoding="bitmask")]


def sparse(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) * (rng.random(shape) < 0.4) / 4, jnp.float32)


def factors(rng, stack, groups, rows, cols):
    return (
        sparse(rng, *stack, groups, rows // groups, INNER),
        sparse(rng, *stack, groups, INNER, cols),
    )


def compressed_nnx():
    """A model with pairs, single sparse matrices and a layer that is dense."""
    rng = np.random.default_rng(0)

    def fill(path, variable):
        leaf = variable.get_value()
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return variable.replace(jax.random.key(0))
        if path[-1] == "kernel" and path[0] != "plain":
            return variable.replace(sparse(rng, *leaf.shape))
        positive = np.abs(rng.normal(size=leaf.shape)) + 0.1  # also those that are variances
        return variable.replace(jnp.asarray(positive, leaf.dtype))

    # Filled by NumPy, because initializers compile for long.
    graph, state = nnx.split(nnx.eval_shape(served_models.make))
    flat = [(path, fill(path, variable)) for path, variable in nnx.to_flat_state(state)]
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    for path, shape in PAIRS.items():
        layer = model
        for name in path.split("/"):
            layer = getattr(layer, name)
        become_pair(layer, *factors(rng, *shape))
    return model


def compressed_linen(x):
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(LinenNet().init, jax.random.key(0), x)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(abstract).items():
        dense = jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) / 4
        flat[path] = dense if "plain" in path or leaf.ndim < 2 else sparse(rng, *leaf.shape)
    for path, shape in PAIRS.items():
        flat["params", *path.split("/"), "kernel"] = FactorizedKernel(*factors(rng, *shape))
    return traverse_util.unflatten_dict(flat)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(size=(3, 6, 6, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def nnx_model():
    return compressed_nnx()


@pytest.fixture(scope="module")
def variables(x):
    return compressed_linen(x)


@nnx.jit
def run_nnx(model, x):
    return model(x)


@jax.jit
def run(variables, x):
    return macko_jax.flax_linen.apply(LinenNet(), variables, x)


SHAPES = {
    "stem": (8, 36),
    "conv": (8, 72),
    "grouped": (8, 16),
    "blocks/up": (3, 24, 8),
    "blocks/down": (3, 8, 24),
    "heads": (12, 8),
    "query": (12, 8),
    "value": (12, 8),
    "merge": (10, 12),
    "plain": (10, 10),
    "head": (5, 10),
}


def check_report(report):
    """Every layer is there once, compared with the dense model, a pair as one layer."""
    assert {layer.path: layer.shape for layer in report.layers} == SHAPES
    assert report.skipped == {"plain": "from density 0.8 on dense is faster"}
    for layer in report.layers:
        assert layer.bytes_before == 4 * np.prod(layer.shape)
        assert ("two factors via 5" in layer.note) == (layer.path in PAIRS)


def assert_close(found, expected, tolerance):
    """Relative to the largest of all numbers."""
    np.testing.assert_allclose(found, expected, atol=tolerance * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_packed_models_equal_the_compressed_ones(nnx_model, variables, x):
    packed, report = dsf_jax.pack(nnx_model, rules=RULES)
    check_report(report)
    assert isinstance(packed.stem, MackoConv) and isinstance(packed.head.left, MackoLinear)
    assert_close(run_nnx(packed, x), run_nnx(nnx_model, x), 1e-5)

    packed, report = dsf_jax.pack(variables, rules=RULES, module=LinenNet(), inputs=(x,))
    check_report(report)
    assert_close(run(packed, x), run(variables, x), 1e-5)


@pytest.mark.slow
def test_another_process_loads_and_runs_them(nnx_model, variables, x, tmp_path):
    """With 8-bit values, which equal the compressed ones up to their rounding."""
    np.save(tmp_path / "inputs.npy", x)
    # Of single matrices and of pairs some have 8-bit values.
    eight_bits = macko_jax.Rule("conv|query|value|blocks/.*", dtype="int8", encoding="bitmask")
    rules = [eight_bits, *RULES]
    packed, _ = dsf_jax.pack(nnx_model, rules=rules)
    assert packed.value.values.dtype == packed.query.right.values.dtype == jnp.int8
    macko_jax.save_model(tmp_path / "nnx.safetensors", packed)
    packed_variables, report = dsf_jax.pack(
        variables, "int8", RULES, module=LinenNet(), inputs=(x,)
    )
    check_report(report)
    assert packed_variables["params"]["head"]["kernel"].left.values.dtype == jnp.int8
    macko_jax.save_model(tmp_path / "linen.safetensors", packed_variables)
    subprocess.run(
        [sys.executable, "-m", "tests.served_models", str(tmp_path)], cwd=ROOT, check=True
    )
    expected = run_nnx(packed, x)
    np.testing.assert_allclose(np.load(tmp_path / "nnx.npy"), expected, rtol=1e-6, atol=1e-6)
    assert_close(expected, run_nnx(nnx_model, x), 0.05)
    expected = run(packed_variables, x)
    np.testing.assert_allclose(np.load(tmp_path / "linen.npy"), expected, rtol=1e-6, atol=1e-6)
    assert_close(expected, run(variables, x), 0.05)


def test_what_is_not_packed_loads_as_well(nnx_model, variables, x, tmp_path):
    path = tmp_path / "model.safetensors"
    macko_jax.save_model(path, nnx_model)
    model = macko_jax.load_model(path, served_models.make)
    np.testing.assert_array_equal(run_nnx(model, x), run_nnx(nnx_model, x))
    macko_jax.save_model(path, variables)
    loaded = macko_jax.load_model(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    np.testing.assert_array_equal(run(loaded, x), run(variables, x))


@pytest.mark.slow
def test_linen_variables_alone_pack_what_is_known(variables, x):
    packed, report = dsf_jax.pack(variables, rules=RULES)
    assert {layer.path for layer in report.packed} == set(PAIRS)
    assert "it is not known which axes are summed" in report.skipped["heads"]
    np.testing.assert_allclose(run(packed, x), run(variables, x), rtol=1e-4, atol=1e-4)
    # What was packed stays so, and the rest follows with the module at hand.
    packed, report = dsf_jax.pack(packed, rules=RULES, module=LinenNet(), inputs=(x,))
    assert set(report.skipped) == {"plain"}
    notes = {layer.path: layer.note for layer in report.layers}
    assert notes["head"] == notes["conv"] == "it was packed before"
    assert_close(run(packed, x), run(variables, x), 1e-5)


@pytest.mark.once
def test_files_that_do_not_fit_name_the_layer(nnx_model, variables, tmp_path):
    path = tmp_path / "model.safetensors"
    packed, _ = dsf_jax.pack(nnx_model)
    macko_jax.save_model(path, packed)

    def make_other():
        model = served_models.make()
        model.head = nnx.Linear(10, 6, use_bias=False, rngs=nnx.Rngs(0))
        model.merge = nnx.Embed(3, 4, rngs=nnx.Rngs(0))
        model.stem = nnx.Conv(4, 8, (5, 5), rngs=nnx.Rngs(0))
        return model

    with pytest.raises(ValueError) as error:
        macko_jax.load_model(path, make_other)
    for place, found, needed in [
        ("head/left/kernel", "(5, 5)", "(6, 5)"),
        ("stem/kernel", "(8, 36)", "(8, 100)"),
    ]:
        expected = f"{place}: the matrix [out, in] has shape {found}, the model needs {needed}"
        assert expected in str(error.value)
    assert "merge/left/kernel: not in the model" in str(error.value)
    with pytest.raises(ValueError, match="give make_model, a function that makes the dense model"):
        macko_jax.load_model(path)
    with pytest.raises(TypeError, match="must make a flax.nnx.Module"):
        macko_jax.load_model(path, LinenNet)
    macko_jax.save(path, [1])
    with pytest.raises(ValueError, match=f"Cannot load {path}: .* and this tree is a list"):
        macko_jax.load_model(path, served_models.make)
    with pytest.raises(TypeError, match="variables of a linen module, got builtins.list"):
        macko_jax.save_model(path, [packed])


def test_factors_that_do_not_fit_each_other_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    kernel = FactorizedKernel(jnp.ones((1, 4, 3)), jnp.ones((1, 2, 6)))
    macko_jax.save(path, {"params": {"kernel": kernel}})
    with pytest.raises(ValueError, match=r"\[out, k\] = \[4, 3\] and .* = \[2, 6\] do not fit"):
        macko_jax.load(path)


def test_values_and_rules_together(nnx_model):
    rules = [macko_jax.Rule("stem", dtype="bfloat16"), "head"]
    packed, report = dsf_jax.pack(nnx_model, "int8", rules)
    assert packed.stem.values.dtype == jnp.bfloat16
    assert packed.head.left.values.dtype == jnp.int8
    assert report.skipped["merge"] == "two factors via 5, no rule matches its path"
    with pytest.raises(TypeError, match="values must be None or the name of a dtype, got Rule"):
        dsf_jax.pack(nnx_model, macko_jax.Rule("head"))
