"""Models that other libraries wrap, annotate or write: run rightly, or refused by one sentence."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import dsf_jax
import macko_jax
from dsf_jax.trace.network import read_network
from macko_jax import flax_linen, flax_nnx

X = jax.random.normal(jax.random.key(0), (8, 16))


def stranger(package, **attributes):
    """An instance of a class of that package, as far as its class says."""
    return type("Model", (), {"__module__": f"{package}.models", **attributes})()


WRAPPER = stranger("transformers", module=nn.Dense(4), params={})
HAIKU = collections.namedtuple("Transformed", ["init", "apply"])(jnp.sin, jnp.cos)


@pytest.mark.parametrize(
    "model, message",
    [
        (WRAPPER, r"give model.module, with variables=\{'params': model.params\}"),
        (stranger("equinox"), "an Equinox module; only Flax models are read"),
        (HAIKU, "a part of Haiku; only Flax models are read"),
        (stranger("torch"), "a PyTorch module; only Flax models are read"),
        (object(), "got builtins.object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_flax_model_is_refused_everywhere(model, message, tmp_path):
    for attempt in (
        lambda: dsf_jax.compress_model(model, [X]),
        lambda: dsf_jax.gram_matrices(model, [X]),
        lambda: dsf_jax.pack(model),
        lambda: flax_nnx.substitute(model),
        lambda: flax_linen.substitute(model, {"params": {}}, X),
        lambda: macko_jax.save_model(tmp_path / "model.safetensors", model),
    ):
        with pytest.raises(TypeError, match=message):
            attempt()


def test_parameters_alone_are_no_variables():
    params = {"linear": {"w": np.ones((4, 4))}}
    for attempt in (
        lambda: dsf_jax.pack(params),
        lambda: flax_linen.substitute(nn.Dense(4), params, X),
        lambda: dsf_jax.compress_model(nn.Dense(4), [X], variables=params),
    ):
        with pytest.raises(ValueError, match="have 'params'; these have 'linear'. Give"):
            attempt()


def partitioned(box):
    """A module whose kernels have names of axes, and its variables as `init` gives them."""
    init = box(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer = nn.Dense(16, kernel_init=init, bias_init=box(nn.initializers.normal(), ("mlp",)))
    module = nn.Sequential([layer, nn.relu, layer.clone()])
    return module, module.init(jax.random.key(0), X)


def put_pair(network):
    """The model of a network with two dense factors in the place of its first kernel."""
    kernels = [leaf for leaf, path in enumerate(network.paths) if path[-1] == "kernel"]
    left, right = jax.random.normal(jax.random.key(1), (2, 1, 16, 16))
    return network.substitute(network.leaves, {kernels[0]: (left, right)})


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxed_parameters_of_linen_are_pruned_factorized_packed_and_loaded(box, tmp_path):
    module, variables = partitioned(box)
    options = dict(variables=variables, method="wanda", density=0.5)
    pruned, report = dsf_jax.compress_model(module, [X], **options)
    assert [layer.path for layer in report.layers] == ["layers_0", "layers_2"]
    found = put_pair(read_network(module, pruned))
    assert isinstance(found["params"]["layers_0"]["kernel"], dsf_jax.FactorizedKernel)
    assert isinstance(found["params"]["layers_2"]["kernel"], nn.meta.AxisMetadata)
    expected = flax_linen.apply(module, found, X)
    packed, report = dsf_jax.pack(found, None, ".*", module=module, inputs=(X,))
    assert [bool(layer.encoding) for layer in report.layers] == [False, True]
    macko_jax.save_model(tmp_path / "boxed.safetensors", packed)
    loaded = macko_jax.load_model(tmp_path / "boxed.safetensors")
    np.testing.assert_allclose(flax_linen.apply(module, loaded, X), expected, atol=1e-4)


def test_partitioned_parameters_of_nnx_are_pruned_factorized_packed_and_loaded(tmp_path):
    def make():
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        with nnx.use_eager_sharding(False):
            linear = [nnx.Linear(16, 16, kernel_init=init, rngs=nnx.Rngs(i)) for i in range(2)]
        return nnx.Sequential(linear[0], nnx.relu, linear[1])

    pruned, _ = dsf_jax.compress_model(make(), [X], method="wanda")
    found = put_pair(read_network(pruned))
    packed, report = dsf_jax.pack(found)
    assert [bool(layer.encoding) for layer in report.layers] == [False, True]
    macko_jax.save_model(tmp_path / "boxed.safetensors", packed)
    loaded = macko_jax.load_model(tmp_path / "boxed.safetensors", make)
    np.testing.assert_allclose(loaded(X), found(X), atol=1e-4)


class Odd(nnx.Module):
    """A model with layers of other numbers than real ones, of none, and of one."""

    def __init__(self):
        def linear(*shape, init=nnx.initializers.ones, **options):
            return nnx.Linear(*shape, kernel_init=init, rngs=nnx.Rngs(0), **options)

        self.phase = linear(16, 4, param_dtype=jnp.complex64)
        self.empty, self.after = linear(16, 0), linear(0, 4)
        self.narrow, self.one = linear(16, 1), linear(1, 1)

    def __call__(self, x):
        return jnp.real(self.phase(x)) + self.after(self.empty(x)) + self.one(self.narrow(x))


def test_layers_of_complex_numbers_and_of_none_are_left_alone_and_reported():
    model, report = dsf_jax.compress_model(Odd(), [X], method="wanda")
    assert [layer.path for layer in report.layers] == ["narrow"]
    assert report.skipped == {
        "phase": "complex64 numbers; only real ones are compressed",
        "empty": "empty",
        "after": "empty",
        "one": "too small: its matrix has one input",
    }
    np.testing.assert_array_equal(model.phase.kernel[...], Odd().phase.kernel[...])
    packed, report = dsf_jax.pack(model)
    assert {"phase", "empty", "after"} <= set(report.skipped)
    np.testing.assert_allclose(packed(X), model(X), rtol=1e-5)
