"""Packing, unpacking, sizes and validation of MackoMatrix."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import macko_jax
from macko_jax.format import choose
from macko_jax.format import pack as packing
from macko_jax.format import unpack as positions
from macko_jax.format.codes import code_parts, delta_prefixes, join_parts, split_parts
from macko_jax.format.layout import Layout, Positions
from tests.cases import BITS, CASES, LAYOUTS, pack_as_paper, pack_slowly

FIELDS = ("values", "codes", "row_offsets", "starts")
ENCODINGS = tuple(BITS)  # of any number of lanes


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    unsigned = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(actual.view(unsigned), expected.view(unsigned))


def special_values() -> np.ndarray:
    """Zeros of both signs, subnormals, infinities and NaN, in every place of a group and a word."""
    tiny = np.float32(1e-45)
    pattern = np.array([0, -0.0, tiny, 1, -0.0, np.inf, -np.inf, np.nan, 0, -tiny], np.float32)
    return np.resize(pattern, (7, 71))


@pytest.mark.once
@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_follow_the_layout(case):
    weight = case.weight()
    matrix = macko_jax.compress(weight, encoding=case.encoding, lanes=case.lanes)
    for name, expected in zip(FIELDS, pack_slowly(weight, case.encoding, case.lanes)):
        assert_same_bits(getattr(matrix, name), expected)
    macko_jax.validate(matrix)
    assert matrix.nnz == np.count_nonzero(weight)
    assert matrix.density == np.count_nonzero(weight) / weight.size
    assert matrix.shape == weight.shape and matrix.dtype == weight.dtype
    assert matrix.stored == matrix.values.size
    assert matrix.nbytes == sum(getattr(matrix, name).nbytes for name in FIELDS)


@pytest.mark.parametrize("case", CASES[1::16], ids=str)
def test_device_packing_is_bit_identical(case):
    weight = jnp.asarray(case.weight())
    expected = case.matrix()
    arrays, _, _ = packing.pack(weight, case.encoding, case.lanes, None, on_device=True)
    for name, array in zip(FIELDS, arrays, strict=True):
        assert_same_bits(array, getattr(expected, name))


@pytest.mark.parametrize(
    "encoding, dtype", [*zip(ENCODINGS, ("float32", "bfloat16", "float32", "float16"))]
)
def test_special_values(encoding, dtype):
    weight = special_values().astype(jnp.dtype(dtype))
    matrix = macko_jax.compress(weight, encoding=encoding, lanes=2)
    expected = np.where(weight == 0, np.zeros((), weight.dtype), weight)  # -0.0 becomes 0.0
    assert_same_bits(macko_jax.decompress(matrix), expected)
    macko_jax.validate(matrix)
    arrays, _, _ = packing.pack(jnp.asarray(weight), encoding, 2, None, on_device=True)
    for name, array in zip(FIELDS, arrays, strict=True):
        assert_same_bits(array, getattr(matrix, name))


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.sampled_from([("bitmask", 1), *itertools.product(ENCODINGS, [4])]), st.data())
def test_round_trip_of_any_bits(layout_, data):
    (rows, cols), (encoding, lanes) = (6, 133), layout_
    sparse = st.one_of(st.just(0), st.just(0), st.integers(0, 2**16 - 1))
    bits = data.draw(st.lists(sparse, min_size=rows * cols, max_size=rows * cols))
    weight = np.array(bits, np.uint16).view(np.float16).reshape(rows, cols)
    # Room for every element, so that few programs are compiled.
    matrix = macko_jax.compress(weight, encoding=encoding, lanes=lanes, capacity=32 * rows)
    macko_jax.validate(matrix)
    dense = np.asarray(macko_jax.decompress(matrix))
    assert_same_bits(dense, np.where(weight == 0, np.float16(0), weight))
    slowly = pack_slowly(weight, encoding, lanes)
    assert_same_bits(matrix.values[: slowly[0].size], slowly[0])
    assert_same_bits(matrix.row_offsets, slowly[2])
    assert_same_bits(matrix.starts, slowly[3])


@pytest.mark.once
@pytest.mark.parametrize("cols", [256, 1000, 4096])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bytes_stay_near_the_papers(cols, density, dtype):
    rng = np.random.default_rng(0)
    weight = (rng.random((12, cols)) < density).astype(dtype)
    matrix = macko_jax.compress(weight)
    values, deltas, row_indices = pack_as_paper(weight)
    paper = values.nbytes + deltas.nbytes + row_indices.nbytes
    assert matrix.nbytes <= 1.02 * paper + 64 * weight.shape[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "density, cols, expected",
    [
        (0.1, 4096, "delta5"),
        (0.14, 4096, "delta4"),
        (0.2, 4096, "delta4"),
        (0.4, 4096, "two_bank"),
        (0.5, 18_001, "delta4"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float32"])
def test_the_fastest_encoding_is_chosen(density, cols, expected, dtype):
    """By the records that choose.py names; float32 gains nothing from "two_bank"."""
    weight = (np.random.default_rng(0).random((96, cols)) < density).astype(jnp.dtype(dtype))
    on_device = dtype == "float16" and density == 0.4
    _, encoding, _ = packing.pack(weight, None, None, None, on_device)
    if dtype == "float32" and expected == "two_bank":
        expected = "delta4"
    assert encoding == expected


@pytest.mark.once
@pytest.mark.parametrize(
    "rows, cols, density, expected",
    [
        (11008, 4096, 0.1, 8),
        (14336, 4096, 0.2, 8),
        (11008, 4096, 0.3, 16),
        (11008, 4096, 0.5, 32),
        (4096, 4096, 0.1, 16),
        (4096, 4096, 0.3, 32),
        (4096, 11008, 0.1, 32),
        (28672, 8192, 0.1, 8),
        (28672, 8192, 0.2, 16),
        (28672, 8192, 0.3, 32),
        (8192, 8192, 0.1, 16),
    ],
)
def test_the_fastest_lanes_are_chosen(rows, cols, density, expected):
    """Those of docs/results/lanes_h200.json, or within 3 % of them."""
    row = (np.random.default_rng(0).random((1, cols)) < density).astype(np.float16)
    groups = macko_jax.compress(np.repeat(row, 8, axis=0)).stored // 64
    assert choose.choose_lanes(rows, rows * groups) == expected


@pytest.mark.once
@pytest.mark.parametrize("rows", [1, 100, 40_000])
@pytest.mark.parametrize("groups", [0, 1, 2, 3, 9, 20, 40])
def test_lanes_have_two_groups_where_rows_have_them(rows, groups):
    lanes = choose.choose_lanes(rows, rows * groups)
    assert lanes == 1 or 2 * lanes <= groups


def test_the_former_name_of_two_bank_warns():
    with pytest.warns(DeprecationWarning, match="'choice' is now called 'two_bank'"):
        matrix = macko_jax.compress(np.eye(4, dtype=np.float16), encoding="choice")
    assert matrix.encoding == "two_bank"


@pytest.mark.once
@pytest.mark.parametrize(
    "encoding, density, ratio",
    [("delta5", 0.1, 0.9), ("delta5", 0.05, 0.76), ("delta5", 0.02, 0.65)],
)
def test_other_deltas_are_smaller_at_other_densities(encoding, density, ratio):
    weight = (np.random.default_rng(0).random((64, 4096)) < density).astype(np.float16)
    found, usual = (macko_jax.compress(weight, encoding=e).nbytes for e in (encoding, "delta4"))
    assert found <= ratio * usual


def test_choices_spread_reads_over_banks():
    """A choice of two takes 2.1 turns a gather; random columns take 3.5."""
    weight = (np.random.default_rng(0).random((6, 4096)) < 0.5).astype(np.float16)
    matrix = macko_jax.compress(weight, encoding="two_bank", lanes=32)
    place = jax.jit(functools.partial(positions.slot_positions, matrix.layout))
    _, column, _ = place(matrix.positions)
    codes = np.asarray(matrix.codes)
    chosen = codes[:, None] >> np.arange(3, 32, 4, dtype=np.uint32) & 1
    columns = np.asarray(column).reshape(-1, 8)
    turns, plain, distance = [], [], np.array([[1], [2]] * 16)
    for begin, end in itertools.pairwise(np.asarray(matrix.row_offsets)):
        for first in range(begin, end - 31, 32):  # full turns
            words = 3 * columns[first : first + 32] + chosen[first : first + 32] * distance
            turns += [np.bincount(bank % 32).max() for bank in words.T]
            plain += [np.bincount(bank % 32).max() for bank in columns[first : first + 32].T]
    assert np.mean(turns) < 2.1 and np.mean(plain) > 3.4


@pytest.mark.parametrize("encoding, lanes", LAYOUTS[::3])
def test_padding_gets_no_gradient_from_decompress(encoding, lanes):
    """Else a step of training would move explicit zeros, and fill columns that are pruned."""
    weight = (np.random.default_rng(0).random((6, 133)) < 0.1).astype(np.float32)
    matrix = macko_jax.compress(weight, encoding=encoding, lanes=lanes)

    def total(values):
        return macko_jax.decompress(dataclasses.replace(matrix, values=values)).sum()

    gradient = jax.grad(total)(matrix.values)
    np.testing.assert_array_equal(gradient, np.asarray(matrix.values) != 0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_empty_shapes(shape, encoding):
    matrix = macko_jax.compress(np.zeros(shape, np.float16), encoding=encoding)
    macko_jax.validate(matrix)
    assert macko_jax.decompress(matrix).shape == shape
    assert matrix.nnz == matrix.stored == 0 and matrix.density == 0
    assert macko_jax.spmv(matrix, jnp.ones((2, shape[1]))).tolist() == [[0] * shape[0]] * 2


@pytest.mark.parametrize("encoding, on_device", [("delta4", False), ("two_bank", True)])
def test_capacity_may_be_a_function_of_the_groups(encoding, on_device):
    weight = (np.random.default_rng(0).random((5, 600)) < 0.5).astype(np.float16)
    weight, groups = jnp.asarray(weight) if on_device else weight, []

    def more(needed):
        groups.append(needed)
        return needed + 7

    exact = macko_jax.compress(weight, encoding=encoding).stored // 8
    found, expected = (
        packing.pack(weight, encoding, None, capacity, on_device)[0]
        for capacity in (more, exact + 7)
    )
    assert groups == [exact]
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


def test_room_is_not_asked_for_beyond_what_fits(monkeypatch):
    weight = np.ones((4, 64), np.float16)
    monkeypatch.setattr(packing, "MAX_STORED", weight.size)
    assert macko_jax.compress(weight, capacity=lambda needed: needed + 1).stored == weight.size
    for capacity, said in (33, "Split it by rows"), (lambda needed: needed - 1, "31 .* too small"):
        with pytest.raises(ValueError, match=said):
            macko_jax.compress(weight, capacity=capacity)
    monkeypatch.setattr(packing, "MAX_STORED", weight.size - 8)
    with pytest.raises(ValueError, match="Split it by rows"):
        macko_jax.compress(weight, capacity=choose.shared_capacity)


@pytest.mark.once
@hypothesis.given(st.integers(0, 2**28))
def test_shared_capacity_has_room_and_few_values(groups):
    capacity = choose.shared_capacity(groups)
    assert groups <= capacity <= groups + groups / 256
    assert choose.shared_capacity(capacity) == capacity
    assert capacity % (1 << max(0, capacity.bit_length() - 9)) == 0


def test_reading_structure_while_tracing_is_refused():
    matrix = CASES[6].matrix()
    with pytest.raises(TypeError, match="while tracing"):
        jax.jit(lambda m: m.nnz)(matrix)
    assert jax.jit(lambda m: m.stored)(matrix) == matrix.stored


@pytest.mark.parametrize(
    "weight, options, error, message",
    [
        (np.zeros((2, 2), np.int32), {}, TypeError, "int32"),
        (np.zeros((2, 2), np.float64), {}, TypeError, "float64"),
        (np.zeros(4, np.float32), {}, ValueError, r"\[4\]"),
        (np.zeros((1, 2, 3), np.float32), {}, ValueError, r"\[1, 2, 3\]"),
        (np.zeros((2, 2), np.float32), {"encoding": "csr"}, ValueError, "csr"),
        (np.zeros((2, 2), np.float32), {"lanes": 3}, ValueError, "lanes"),
        (np.zeros((2, 2), np.float32), {"lanes": 4.0}, ValueError, "integer"),
        (np.zeros((2, 2), np.float32), {"encoding": "banked"}, ValueError, "two_bank"),
        (np.ones((2, 2), np.float32), {"capacity": 1}, ValueError, "capacity=1"),
    ],
)
def test_bad_input_is_named(weight, options, error, message):
    with pytest.raises(error, match=message):
        macko_jax.compress(weight, **options)


def test_compress_while_tracing_is_refused():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(macko_jax.compress)(jnp.ones((2, 2)))


def _with(name, index, value):
    def change(matrix):
        array = np.array(getattr(matrix, name))
        array[index] = value
        return dataclasses.replace(matrix, **{name: array})

    return change


def _as(name, dtype):
    return lambda m: dataclasses.replace(m, **{name: np.asarray(getattr(m, name)).astype(dtype)})


BROKEN = {
    "rows out of order": (_with("row_offsets", 3, 2**30), "row_offsets"),
    "negative offset": (_with("row_offsets", 0, -1), "row_offsets"),
    "too many groups": (_with("row_offsets", -1, 2**20), "row_offsets"),
    "a start": (_with("starts", (5, 1), 7), "starts"),
    "codes of another row": (_with("codes", slice(0, 20), 0), "row|starts"),
    "encoding": (lambda m: dataclasses.replace(m, encoding="csr"), "encoding"),
    "lanes": (lambda m: dataclasses.replace(m, lanes=3), "lanes"),
    "lanes that are a float": (lambda m: dataclasses.replace(m, lanes=8.0), "integer.* got 8.0"),
    "lanes that are a bool": (lambda m: dataclasses.replace(m, lanes=True), "integer.* got True"),
    "too many slots": (
        lambda m: dataclasses.replace(m, values=np.broadcast_to(np.float16(0), 2**31)),
        "2147483648 slots; at most 2147483647",
    ),
    "two rows of values": (lambda m: dataclasses.replace(m, values=m.values[None]), "leading axes"),
    "a scalar": (lambda m: dataclasses.replace(m, row_offsets=np.int32(0)), "leading axes"),
    "shape": (lambda m: dataclasses.replace(m, shape=(33, -1)), "shape"),
    "fewer rows": (lambda m: dataclasses.replace(m, shape=(32, 301)), "must be"),
    "cut values": (lambda m: dataclasses.replace(m, values=m.values[:-1]), "values"),
    "cut codes": (lambda m: dataclasses.replace(m, codes=m.codes[:-1]), "codes"),
    "dtype": (lambda m: dataclasses.replace(m, values=np.zeros(m.stored, np.int32)), "int32"),
    "offsets that begin late": (_with("row_offsets", 0, 1), "row_offsets"),
    "floating offsets": (_as("row_offsets", np.float32), "row_offsets"),
    "signed codes": (_as("codes", np.int32), "codes"),
    "too few starts": (lambda m: dataclasses.replace(m, starts=m.starts[:-1]), "starts"),
    "more columns": (lambda m: dataclasses.replace(m, shape=(33, 70_000)), "starts|codes"),
    "fewer columns": (lambda m: dataclasses.replace(m, shape=(33, 40)), "column|codes"),
    "fractional shape": (lambda m: dataclasses.replace(m, shape=(33.5, 301)), "shape"),
}


@pytest.mark.once
@pytest.mark.parametrize("case", CASES[6:8], ids=str)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_arrays_are_refused(case, name):
    change, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        macko_jax.validate(change(case.matrix()))


def test_columns_out_of_range_are_refused():
    bitmask, delta4 = CASES[6].matrix(), CASES[7].matrix()
    with pytest.raises(ValueError, match="beyond the last"):
        macko_jax.validate(_with("codes", 9, 0xFFFFFFFF)(bitmask))  # 301 = 9 * 32 + 13
    with pytest.raises(ValueError, match="column"):
        macko_jax.validate(_with("codes", slice(None), 0xFFFFFFFF)(delta4))


@pytest.mark.parametrize("encoding, most", [("delta4", 15), ("delta5", 31), ("two_bank", 7)])
@pytest.mark.parametrize("lanes", [1, 8, 32])
def test_deltas_of_slots_past_the_columns_are_refused(encoding, most, lanes):
    """Kernels have room for less than a group of columns past the last one."""
    rng = np.random.default_rng(1)
    weight = (rng.random((6, 90)) < 0.5).astype(np.float16)
    weight[:, -1] = 1  # so that all padding lies past the columns
    matrix = macko_jax.compress(weight, encoding=encoding, lanes=lanes)
    parts = split_parts(np.asarray(matrix.codes), encoding)
    within = np.stack(delta_prefixes(parts, encoding), axis=1)
    delta = np.diff(within, axis=1, prepend=-1).astype(np.uint8) - np.uint8(1)
    padding = np.asarray(matrix.values).reshape(-1, 8) == 0
    padding &= np.flip(np.logical_and.accumulate(np.flip(padding, 1), axis=1), 1)  # at the end
    assert padding.any() and not delta[padding].any()
    delta[padding] = most
    codes = join_parts(code_parts(delta, encoding), encoding)
    with pytest.raises(ValueError, match="past its 90 columns whose delta is not 0"):
        macko_jax.validate(dataclasses.replace(matrix, codes=codes))


def test_stacks_are_validated():
    weights = (np.random.default_rng(0).random((3, 5, 70)) < 0.3).astype(np.float16)
    matrices = [
        macko_jax.compress(w, encoding="delta4", lanes=2, capacity=40, dtype="int8")
        for w in weights
    ]
    stack = jax.tree.map(lambda *a: np.stack(a), *matrices)
    macko_jax.validate(stack)
    assert stack.nnz == np.count_nonzero(weights) and stack.stored == 40 * 8
    assert stack.density == np.count_nonzero(weights) / weights.size
    np.testing.assert_allclose(macko_jax.decompress(stack), weights, rtol=2e-3)
    for name in (*FIELDS, "scales"):
        cut = dataclasses.replace(stack, **{name: getattr(stack, name)[:2]})
        with pytest.raises(ValueError, match=f"leading axes.* {name} "):
            macko_jax.validate(cut)
    with pytest.raises(ValueError, match="row_offsets"):
        macko_jax.validate(_with("row_offsets", (2, -1), 99)(stack))


def test_layout_and_positions_are_those_of_the_matrix():
    matrix = CASES[7].matrix()
    assert matrix.layout == Layout(matrix.shape, "delta4", matrix.lanes, matrix.stored)
    assert matrix.positions == Positions(matrix.codes, matrix.row_offsets, matrix.starts)


def test_values_in_the_tail_are_refused():
    matrix = macko_jax.compress(np.ones((1, 3), np.float32), encoding="bitmask")
    with pytest.raises(ValueError, match="after its 3 elements"):
        macko_jax.validate(_with("values", 5, 1.0)(matrix))


def test_a_matrix_lies_where_its_weight_is_bound_to():
    device = jax.devices()[1]
    matrix = macko_jax.compress(jax.device_put(np.eye(4, 9, dtype=np.float32), device))
    assert {array.device for array in jax.tree.leaves(matrix)} == {device}
