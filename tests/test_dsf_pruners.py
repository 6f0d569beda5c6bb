"""Pruning baselines: reference errors, exact budgets, hard inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsf_jax
from dsf_jax.solvers import pruners
from tests.dsf_cases import hard_layers, real_layer, reference, small_layer

METHODS = list(pruners.PRUNERS)
# Every method is compiled for every shape, so small layers are [12, 16].


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("layer", ["l0.query", "l0.attn_out"])
@pytest.mark.parametrize("method", METHODS)
def test_reference_errors(layer, method):
    weight, gram, _ = real_layer(layer)
    # The ADMM here has a rising penalty, which the reference has not.
    limit = 0.92 if method == "admm" else 1.03
    # All four densities, each on one of the layers.
    for density in (0.5, 0.3) if layer == "l0.query" else (0.4, 0.2):
        pruned = dsf_jax.prune(weight, gram, density=density, method=method)
        assert int((pruned != 0).sum()) == int(density * weight.size)
        error = dsf_jax.relative_output_error(weight, pruned, gram)
        assert error <= limit * reference(layer, method, density)


@settings(max_examples=16, deadline=None)
@given(density=st.floats(0.001, 1), method=st.sampled_from(METHODS), levels=st.integers(1, 4))
def test_budget_is_exact_with_ties(density, method, levels):
    weight, gram = small_layer()
    # Few levels, all non-zero: ties everywhere.
    weight = np.sign(weight) * np.ceil(np.abs(weight) * levels) / levels
    pruned = np.asarray(dsf_jax.prune(weight, gram, density=density, method=method))
    assert (pruned != 0).sum() <= density * weight.size
    if method in ("magnitude", "wanda"):
        assert (pruned != 0).sum() == int(density * weight.size)


# Those of other shapes are compiled anew.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.once if name.startswith("one ") else ())
        for name in hard_layers()
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_hard_inputs_have_finite_results(name, method):
    weight, gram = hard_layers()[name]
    for density in (0.02, 0.5):
        pruned = np.asarray(dsf_jax.prune(weight, gram, density=density, method=method))
        assert np.isfinite(pruned).all()
        assert (pruned != 0).sum() <= density * weight.size
        # Least squares is never worse than dropping the layer's output altogether.
        assert method != "admm" or dsf_jax.relative_output_error(weight, pruned, gram) <= 1 + 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_density_one_keeps_the_layer(method):
    weight, gram = small_layer()
    pruned = dsf_jax.prune(weight, gram, density=1.0, method=method)
    assert dsf_jax.relative_output_error(weight, pruned, gram) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_n_m_pattern(method):
    weight, gram = small_layer()
    pruned = np.asarray(dsf_jax.prune(weight, gram, pattern="2:4", method=method))
    assert ((pruned.reshape(12, 4, 4) != 0).sum(axis=-1) == 2).all()
    free = dsf_jax.prune(weight, gram, density=0.5, method=method)
    errors = [float(dsf_jax.relative_output_error(weight, v, gram)) for v in (free, pruned)]
    assert errors[0] < errors[1] < 1


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_invariant_to_units_and_input_order(method):
    weight, gram = small_layer()
    order = np.random.default_rng(0).permutation(16)
    base = np.asarray(dsf_jax.prune(weight, gram, density=0.4, method=method))
    scaled = np.asarray(dsf_jax.prune(weight * 8, gram * 64, density=0.4, method=method)) / 8
    np.testing.assert_allclose(scaled, base, rtol=1e-3, atol=1e-4)
    if method == "admm":  # SparseGPT goes through the inputs in their order
        turned = np.asarray(
            dsf_jax.prune(weight[:, order], gram[np.ix_(order, order)], density=0.4, method=method)
        )
        errors = [
            float(dsf_jax.relative_output_error(w, v, g))
            for w, v, g in (
                (weight, base, gram),
                (weight[:, order], turned, gram[np.ix_(order, order)]),
            )
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_kept(dtype):
    weight, gram = small_layer()
    pruned = dsf_jax.prune(jnp.asarray(weight, dtype), gram, density=0.5, method="admm")
    assert pruned.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("method", METHODS)
def test_no_recompilation_for_a_second_layer(method):
    run = pruners.PRUNERS[method]
    dsf_jax.prune(*small_layer(seed=0), density=0.5, method=method)
    size = run._cache_size()
    dsf_jax.prune(*small_layer(seed=1), density=0.3, method=method)
    assert run._cache_size() == size


def test_sparsegpt_solves_what_it_keeps():
    """Against the definition, one column at a time in float64 (blocks of 128 hold all 16)."""
    weight, gram = small_layer()
    pruned = np.asarray(dsf_jax.prune(weight, gram, density=0.5, method="sparsegpt"))
    hessian = gram.astype(np.float64)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(16)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, mask = weight.astype(np.float64), pruned != 0
    for j in range(16):
        error = np.where(mask[:, j], 0, left[:, j]) / factor[j, j]
        left[:, j] = np.where(mask[:, j], left[:, j], 0)
        left[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
    np.testing.assert_allclose(pruned, left, rtol=1e-3, atol=1e-4)


def test_admm_values_are_least_squares():
    """Given its mask, every row solves its damped normal equations (float64)."""
    weight, gram = small_layer()
    pruned = np.asarray(dsf_jax.prune(weight, gram, density=0.5, method="admm"), np.float64)
    gram = gram + 0.03 * np.diag(np.diag(gram))
    for row, kept in zip(weight, pruned):
        mask = kept != 0
        exact = np.linalg.solve(
            gram[np.ix_(mask, mask)].astype(np.float64), gram[mask].astype(np.float64) @ row
        )
        np.testing.assert_allclose(kept[mask], exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "change,error",
    [
        (dict(density=0.0), "density .* must be in"),
        (dict(density=1.5), "density .* must be in"),
        (dict(density=None), "needs a density"),
        (dict(method="random"), "method must be one of magnitude"),
        (dict(density=None, pattern="5:4"), "pattern must be"),
        (dict(density=None, pattern="1:3"), "divisible by 3"),
        (dict(density=0.3, pattern="2:4"), "leave density"),
        (dict(weight=np.full((3, 16), np.nan, np.float32)), "layer 'attn': weight holds 48 NaN"),
        (dict(gram=np.full((16, 16), np.inf, np.float32)), "layer 'attn': gram holds"),
        (dict(gram=np.eye(5, dtype=np.float32)), r"gram must be \[in, in\]"),
        (dict(gram=np.triu(np.ones((16, 16), np.float32))), "not symmetric"),
        (dict(weight=np.ones((2, 3, 4), np.float32)), "non-empty matrix"),
        (dict(weight=np.ones((0, 16), np.float32)), "non-empty matrix"),
    ],
)
def test_clear_errors(change, error):
    weight, gram = small_layer()
    arguments = dict(weight=weight, gram=gram, density=0.5, name="attn") | change
    with pytest.raises(ValueError, match=error):
        dsf_jax.prune(**arguments)


@pytest.mark.parametrize("method", METHODS)
def test_a_gram_matrix_of_zeros_leaves_magnitude(method):
    weight, _ = small_layer()
    for density, pattern in ((0.3, None), (None, "2:4")):
        unseen = dsf_jax.prune(
            weight, np.zeros((16, 16), np.float32), density=density, pattern=pattern, method=method
        )
        expected = dsf_jax.prune(weight, density=density, pattern=pattern, method="magnitude")
        np.testing.assert_array_equal(unseen, expected)
        assert np.count_nonzero(unseen) == int((density or 0.5) * weight.size)


@pytest.mark.parametrize("method", METHODS)
def test_what_live_inputs_leave_goes_to_the_largest_weights_of_dead_ones(method):
    weight, gram = small_layer()
    live = np.arange(16) >= 12
    gram = gram * live * live[:, None]
    scarce = np.asarray(dsf_jax.prune(weight, gram, density=0.1, method=method))
    if method != "magnitude":
        assert np.count_nonzero(scarce) == np.count_nonzero(scarce[:, live]) == 19
        ample = np.asarray(dsf_jax.prune(weight, gram, density=0.5, method=method))
        assert np.count_nonzero(ample) == 96 and np.count_nonzero(ample[:, live]) == 48
        np.testing.assert_allclose(ample[:, live], weight[:, live], rtol=1e-3)
        kept = ample[:, ~live]
        np.testing.assert_allclose(kept, weight[:, ~live] * (kept != 0), rtol=1e-3)
        # Wanda keeps equally many of each row.
        best = np.sort(np.abs(weight[:, ~live]), axis=1 if method == "wanda" else None)
        best = best[:, -4:] if method == "wanda" else best[-48:]
        np.testing.assert_allclose(
            np.sort(np.abs(kept[kept != 0])), np.sort(best.ravel()), rtol=1e-3
        )


def test_integer_weights_are_refused():
    with pytest.raises(TypeError, match="int32"):
        dsf_jax.prune(jnp.ones((3, 4), jnp.int32), density=0.5)


def test_relative_output_error_is_its_definition():
    weight, gram = small_layer()
    other = weight * 0.9
    difference = (other - weight).astype(np.float64)
    exact = np.trace(difference @ gram @ difference.T) / np.trace(weight @ gram @ weight.T)
    assert float(dsf_jax.relative_output_error(weight, other, gram)) == pytest.approx(exact, 1e-4)
    assert float(dsf_jax.relative_output_error(weight * 0, weight * 0, gram)) == 0
    assert np.isinf(dsf_jax.relative_output_error(weight * 0, weight, gram))
    broken = np.where(weight == weight[0, 0], np.nan, weight)
    assert np.isnan(dsf_jax.relative_output_error(weight, broken, gram))
    with pytest.raises(ValueError, match="one shape"):
        dsf_jax.relative_output_error(weight, weight.T, gram)
