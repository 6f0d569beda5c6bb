"""Batches as models take them: flags beside arrays, keys to draw from, and padded tokens."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from dsf_jax import Calibration, Execution, Rule, compress_model, gram_matrices

ROWS, STEPS, SIZE = 3, 5, 8
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
REAL = MASK > 0


def draw(*shape):
    return jax.random.normal(jax.random.key(0), shape)


class Encoder(nn.Module):
    """Reads tokens as they are, all in one axis, by heads, and the first of each sequence."""

    @nn.compact
    def __call__(self, x, mask=None, train=True, mode=None):
        assert mode in (None, "encode")
        h = nn.Dense(SIZE, name="up", use_bias=False)(x)
        h = nn.Dropout(0.5, deterministic=not train)(h)
        if mask is not None:  # a token that attends to nothing
            h = jnp.where(mask[..., None] > 0, h, jnp.nan)
        h = nn.Dense(SIZE, name="flat", use_bias=False)(h.reshape(-1, SIZE)).reshape(h.shape)
        heads = h.reshape(*h.shape[:2], 2, 4).swapaxes(1, 2)
        h = nn.DenseGeneral(SIZE, axis=(1, 3), name="out")(heads)
        return nn.Dense(4, name="pooled")(h[:, 0])


def encoder():
    module, x = Encoder(), draw(ROWS, STEPS, SIZE)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return module, module.init(keys, x), x


def second_moment(rows):
    rows = np.asarray(rows, np.float64)
    return rows.T @ rows


def test_grams_of_padded_tokens_are_those_of_the_real_ones():
    module, variables, x = encoder()
    batch = dict(x=x, mask=MASK, train=False)
    grams = gram_matrices(
        module, [batch], variables=variables, token_weights="mask", layers="up|flat|out"
    )
    up, flat = (np.asarray(variables["params"][name]["kernel"]) for name in ("up", "flat"))
    rows = np.asarray(x)[REAL]
    for name in ("up", "flat", "out"):
        np.testing.assert_allclose(grams[name], second_moment(rows), rtol=2e-4, atol=2e-4)
        rows = rows @ (up if name == "up" else flat)


@pytest.mark.slow
def test_values_in_padded_positions_change_nothing_of_a_compressed_model():
    module, variables, x = encoder()
    padded = jnp.where(REAL[..., None], x, 1e3)
    results = []
    for inputs, keep in ((x, "device"), (padded, "host")):
        model, report = compress_model(
            module,
            [(inputs, None, False, "encode")],
            variables=variables,
            method="wanda",
            token_weights=lambda batch: MASK,
            calibration=Calibration(target="dense"),
            execution=Execution(keep_activations=keep),
            rules=[Rule("pooled", skip=True)],
        )
        results.append((model, [layer.error for layer in report.layers]))
    (model, errors), (other, other_errors) = results
    jax.tree.map(np.testing.assert_array_equal, model, other)
    np.testing.assert_allclose(errors, other_errors, rtol=1e-5)


@pytest.mark.slow
def test_weights_count_as_repeated_tokens_do_and_the_report_says_where_they_cannot():
    module, variables, x = encoder()
    options = dict(variables=variables, rngs={"dropout": jax.random.key(2)})
    weights = MASK * 2.0
    (once,) = gram_matrices(module, [(x, MASK)], token_weights=1, layers="up", **options).values()
    batches = [(x, MASK, weights, weights)]
    forward = {"forward": lambda model, batch: model(*batch[:2], train=True)}
    twice = gram_matrices(module, batches, token_weights=2, layers="up", **options, **forward)
    np.testing.assert_allclose(twice["up"], 2 * once, rtol=1e-5)
    _, report = compress_model(module, [x], token_weights=lambda x: MASK, method="wanda", **options)
    notes = {layer.path: layer.note for layer in report.layers}
    assert notes.pop("pooled").endswith(
        "its inputs (3) have the largest weight of the tokens of their sequence"
    )
    assert not any(notes.values())


def test_convolutions_count_the_positions_of_real_tokens():
    conv = nnx.Conv(4, 6, (3,), use_bias=False, rngs=nnx.Rngs(0))
    x = draw(2, STEPS, 4)
    weights = np.zeros((2, STEPS))
    weights[1, 2] = 1
    (gram,) = gram_matrices(conv, [x], token_weights=lambda x: weights).values()
    np.testing.assert_allclose(gram, second_moment(x[1, 1:4].reshape(1, -1)), rtol=1e-5)


class Drawing(nnx.Module):
    """An NNX model with a flag, a name and a key among its inputs."""

    def __init__(self):
        self.linear = nnx.Linear(SIZE, SIZE, rngs=nnx.Rngs(0))

    def __call__(self, x, *, key, scale, deterministic, kind):
        assert kind == "normal" and scale == 2
        noise = 0.0 if deterministic else jax.random.normal(key, x.shape)
        return self.linear(scale * x + noise)


@pytest.mark.parametrize("keep", ["device", "host"])
def test_flags_numbers_and_keys_may_be_in_a_batch(keep, tmp_path):
    x = draw(4, SIZE)
    batch = dict(x=x, key=jax.random.key(1), scale=2, deterministic=True, kind="normal")
    options = dict(method="wanda", execution=Execution(keep_activations=keep, work_dir=tmp_path))
    first, _ = compress_model(Drawing(), [batch], **options)
    again, report = compress_model(Drawing(), [batch], **options)
    np.testing.assert_array_equal(again.linear.kernel[...], first.linear.kernel[...])
    assert report.layers[0].resumed
    with pytest.raises(ValueError, match="holds results of another run"):
        compress_model(Drawing(), [batch | {"deterministic": False}], **options)


@pytest.mark.parametrize(
    "batch, where, message",
    [
        ([1, 2, 3], None, "batch 0 is a list of numbers; make it an array"),
        ({"x": [[1.0, 2.0]]}, None, r"batch 0\['x'\]\[0\] is a list of numbers"),
        ((draw(2, SIZE), {1, 2}), None, r"batch 0\[1\] is a set; a batch holds arrays, and"),
        ("text", None, "batch 0 holds no array; it is a str"),
        (draw(0, SIZE), None, r"batch 0 is empty: an array of shape \(0, 8\)"),
        ({"x": draw(2, SIZE)}, "mask", "has no 'mask', .* it is a dict with the keys 'x'"),
        ((draw(2, SIZE),), 1, "batch 0 has no 1, .* it is a tuple of 1"),
        ((draw(2, SIZE), True), 1, r"\[1\] has to be an array with a weight for each token"),
        ((draw(2, SIZE), -np.ones(2)), 1, "weights that are negative, NaN or infinite"),
        ((draw(2, SIZE), np.zeros(2)), 1, "zero for every token of every batch"),
        (draw(2, SIZE), lambda x: np.ones((7, 2)), r"shape \(7, 2\) fit no layer: .* are \(2,\)"),
    ],
)
def test_what_no_batch_can_be_is_said(batch, where, message):
    model = nnx.Linear(SIZE, SIZE, rngs=nnx.Rngs(0))
    call = {"forward": lambda m, batch: m(batch[0] if isinstance(batch, tuple) else batch)}
    with pytest.raises(ValueError, match=message):
        gram_matrices(model, [batch], token_weights=where, **call)


def test_keys_are_the_linen_modules_and_an_nnx_module_holds_its_own():
    module, variables, x = encoder()
    with pytest.raises(flax.errors.InvalidRngError, match="dropout") as raised:
        gram_matrices(module, [x], variables=variables)
    assert "rngs={'NAME'" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match="rngs belong to a linen module"):
        gram_matrices(Drawing(), [draw(2, SIZE)], rngs={"dropout": jax.random.key(0)})
