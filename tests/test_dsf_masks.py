"""Masks: exact counts, ties to the earlier position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsf_jax.solvers import masks


def expected_mask(scores, k):
    """The definition: a stable sort by falling score."""
    order = np.argsort(-scores.ravel(), kind="stable")[:k]
    mask = np.zeros(scores.size, bool)
    mask[order] = True
    return mask.reshape(scores.shape)


@st.composite
def scores_and_count(draw):
    rows, cols = draw(st.sampled_from([(1, 1), (1, 7), (5, 1), (4, 6), (8, 16)]))
    levels = draw(st.sampled_from([1, 2, 5, 10**6]))  # few levels: many ties
    seed = draw(st.integers(0, 2**31 - 1))
    values = np.random.default_rng(seed).integers(0, levels, (rows, cols))
    return values.astype(np.float32) / 7, draw(st.integers(0, rows * cols))


@settings(max_examples=60, deadline=None)
@given(scores_and_count())
def test_top_k_is_a_stable_sort(case):
    scores, k = case
    np.testing.assert_array_equal(jax.jit(masks.top_k_mask)(scores, k), expected_mask(scores, k))


def test_top_k_orders_extreme_floats():
    scores = np.array([0.0, -0.0, 1e-45, 1e-38, 1.0, 3e38, 2.0, 0.0], np.float32)
    for k in range(scores.size + 1):
        np.testing.assert_array_equal(
            jax.jit(masks.top_k_mask)(scores, k), expected_mask(scores, k)
        )


def test_top_k_compiles_once_for_all_counts():
    traces = []

    @jax.jit
    def mask(scores, k):
        traces.append(1)
        return masks.top_k_mask(scores, k)

    for k in (0, 3, 12):
        assert int(mask(jnp.arange(12.0), k).sum()) == k
    assert len(traces) == 1


def test_top_k_under_vmap():
    scores = np.random.default_rng(0).integers(0, 3, (4, 9)).astype(np.float32)
    counts = np.array([0, 2, 5, 9])
    got = jax.vmap(masks.top_k_mask)(scores, counts)
    for row, k, mask in zip(scores, counts, np.asarray(got)):
        np.testing.assert_array_equal(mask, expected_mask(row, k))


@pytest.mark.parametrize("k", [0, 1, 7, 12, 13, 30])
def test_rows_share_the_budget_evenly(k):
    scores = np.random.default_rng(1).integers(0, 4, (5, 6)).astype(np.float32)
    mask = np.asarray(jax.jit(masks.row_top_k_mask)(scores, k))
    assert mask.sum() == k
    assert set(mask.sum(axis=1)) <= {k // 5, k // 5 + 1}
    for row, kept in zip(scores, mask):
        np.testing.assert_array_equal(kept, expected_mask(row, kept.sum()))


@pytest.mark.parametrize("n,m", [(1, 2), (2, 4), (3, 4), (4, 8)])
def test_n_m_keeps_the_best_of_each_group(n, m):
    scores = np.random.default_rng(2).integers(0, 3, (3, 16)).astype(np.float32)
    groups = np.asarray(masks.n_m_mask(scores, n, m)).reshape(-1, m)
    for group, kept in zip(scores.reshape(-1, m), groups):
        np.testing.assert_array_equal(kept, expected_mask(group, n))
