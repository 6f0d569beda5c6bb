"""The layout of the paper's torch package, bit for bit."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import macko_jax
from tests.cases import CASES, pack_as_paper
from tests.test_format import assert_same_bits, special_values

pytestmark = pytest.mark.once


def assert_paper_layout(weight):
    *arrays, rows, cols = macko_jax.to_macko_spmv(macko_jax.compress(weight))
    for actual, expected in zip(arrays, pack_as_paper(weight), strict=True):
        assert_same_bits(actual, expected)
    assert (rows, cols) == weight.shape
    back = macko_jax.from_macko_spmv(*arrays, rows, cols, encoding="bitmask", lanes=1)
    again = macko_jax.compress(weight, encoding="bitmask", lanes=1)
    for name in ("values", "codes", "row_offsets", "starts"):
        assert_same_bits(getattr(back, name), getattr(again, name))


def test_published_example():
    weight = np.zeros((3, 32), np.float16)
    weight[1, 31], weight[2, 1] = 1, 2
    values, deltas, row_indices, rows, cols = macko_jax.to_macko_spmv(macko_jax.compress(weight))
    assert values.tolist() == [0, 1, 2, 0, 0, 0, 0, 0] and values.dtype == np.float16
    assert deltas.tolist() == [255, 1, 0, 0] and deltas.dtype == np.uint8
    assert row_indices.tolist() == [0, 0, 2, 3] and row_indices.dtype == np.int32
    assert (rows, cols) == (3, 32)


@pytest.mark.parametrize("case", CASES[1::4], ids=str)
def test_every_structure(case):
    assert_paper_layout(case.weight())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_special_values(dtype):
    assert_paper_layout(special_values().astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("gap", [0, 14, 15, 16, 17, 30, 31, 32, 33, 47, 48])
def test_gaps_around_the_largest_delta(gap):
    weight = np.zeros((3, 120), np.float32)
    weight[0, gap] = weight[1, [3, 4 + gap]] = weight[2, 119 - gap] = 1
    assert_paper_layout(weight)


@hypothesis.given(st.data())
def test_streams_with_needless_zeros_are_read(data):
    """Any stream of deltas that stays within the columns is a matrix, canonical or not."""
    rows, cols = 3, 100
    dense = np.zeros((rows, cols), np.float32)
    values, deltas, row_indices = [], [], [0]
    for row in range(rows):
        column = -1
        for delta, value in data.draw(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 2)))):
            if column + delta + 1 >= cols:
                break
            column += delta + 1
            dense[row, column] = value
            values.append(value)
            deltas.append(delta)
        row_indices.append(len(values))
    fill = -len(values) % 8
    values, deltas = values + [0] * fill, deltas + [0] * fill
    packed = np.array([a | b << 4 for a, b in zip(deltas[::2], deltas[1::2])], np.uint8)
    matrix = macko_jax.from_macko_spmv(
        np.array(values, np.float32),
        packed,
        row_indices,
        rows,
        cols,
        encoding="bitmask",
        lanes=1,
        capacity=40,
    )
    np.testing.assert_array_equal(macko_jax.decompress(matrix), dense)


GOOD = dict(
    values=np.array([0, 1, 2, 0, 0, 0, 0, 0], np.float16),
    deltas=np.array([255, 1, 0, 0], np.uint8),
    row_indices=np.array([0, 0, 2, 3], np.int32),
    rows=3,
    cols=32,
)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(values=np.zeros(8, np.int8)), TypeError, "int8"),
        (dict(deltas=np.zeros(4, np.int32)), TypeError, "deltas must be uint8"),
        (dict(row_indices=np.zeros(4)), TypeError, "integers"),
        (dict(deltas=np.zeros(3, np.uint8)), ValueError, r"\[8\] and \[3\]"),
        (dict(values=np.zeros((2, 4), np.float16)), ValueError, r"\[2, 4\]"),
        (dict(rows=2), ValueError, r"\[rows \+ 1\] = \[3\]"),
        (dict(rows=-1), ValueError, "negative"),
        (dict(row_indices=np.array([0, 2, 1, 3])), ValueError, "decreasing"),
        (dict(row_indices=np.array([1, 1, 2, 3])), ValueError, "from 1"),
        (dict(row_indices=np.array([0, 0, 2, 9])), ValueError, "at most 8"),
        (dict(row_indices=np.array([0, 0, 1, 2])), ValueError, "after element 2"),
        (dict(cols=31), ValueError, "row 1 run to column 31"),
    ],
)
def test_bad_streams_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        macko_jax.from_macko_spmv(**GOOD | change)
