"""The language of the kernels: one specification, two implementations.

The interpreter's operations are compared with plain NumPy; that the code which `mosaic` emits does
the same is for the tests of the kernels on a GPU.
"""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from macko_jax.lanes import interpreter
from macko_jax.lanes.interpreter import InterpreterError, NumpyLanes
from macko_jax.lanes.mosaic import MosaicLanes
from macko_jax.lanes.vocabulary import FRESH, Lanes, prefetch_range, sum_over_lanes

pytestmark = pytest.mark.once

WARP = 32
SEEDS = st.integers(0, 2**32 - 1)


def operations(kind):
    """name -> signature, without the types, of a class's public methods."""

    def untyped(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    methods = inspect.getmembers(kind, inspect.isfunction)
    return {name: untyped(method) for name, method in methods if not name.startswith("_")}


@pytest.mark.parametrize("implementation", [MosaicLanes, NumpyLanes])
def test_implementations_have_exactly_the_operations_of_the_language(implementation):
    assert operations(implementation) == operations(Lanes)
    assert len(operations(Lanes)) > 30
    assert all(
        method.__doc__
        for _, method in inspect.getmembers(Lanes, inspect.isfunction)
        if not method.__name__.startswith("_")
    )


def lanes(arrays=None, *, blocks=1, warps=1, shared_slots=0, cluster=1):
    return NumpyLanes(
        arrays or {},
        blocks=blocks,
        threads=warps * WARP,
        shared_slots=shared_slots,
        cluster=cluster,
    )


def words(seed, count=WARP):
    return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)


def finite(seed, dtype, count=WARP):
    """Numbers of a type, of all magnitudes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-20, 12, count)).astype(dtype)


def test_lanes_know_their_block_and_their_place_in_it():
    ops = lanes(blocks=3, warps=2)
    np.testing.assert_array_equal(ops.block() * 64 + ops.thread(), np.arange(3 * 64))
    assert ops.block().dtype == ops.thread().dtype == np.uint32


@given(SEEDS, st.integers(0, 3), st.integers(1, 2**20))
def test_add_byte(seed, number, scale):
    word, total = words(seed), words(seed + 1)
    wanted = [
        (int(t) + scale * int(w).to_bytes(4, "little")[number]) % 2**32 for w, t in zip(word, total)
    ]
    np.testing.assert_array_equal(lanes().add_byte(word, number, scale, total), wanted)


@given(SEEDS, st.sampled_from(["float16", "bfloat16"]))
def test_pair_takes_apart_what_pack_joins(seed, dtype):
    low, high = finite(seed, np.float32), finite(seed + 1, np.float32)
    ops = lanes()
    word = ops.pack(low, high, dtype)
    assert word.dtype == np.uint32
    for found, real in zip(ops.pair(word, dtype), (low, high), strict=True):
        np.testing.assert_array_equal(found, real.astype(jnp.dtype(dtype)).astype(np.float32))


@given(SEEDS, st.sampled_from(["int8", "float8_e4m3fn"]))
def test_four_gives_the_bytes_of_a_word_from_the_lowest_on(seed, dtype):
    word = words(seed)
    octets = np.stack([(word >> 8 * i) & 0xFF for i in range(4)]).astype(np.uint8)
    wanted = octets.view(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(lanes().four(word, dtype), wanted)


@given(SEEDS)
def test_words_and_reals_have_the_same_bits(seed):
    ops, word = lanes(), words(seed)
    np.testing.assert_array_equal(ops.as_word(ops.as_real(word)), word)


@given(SEEDS)
def test_fma_rounds_the_sum_alone(seed):
    a, b, c = (finite(seed + i, np.float32) for i in range(3))
    exact = a.astype(np.longdouble) * b + c
    np.testing.assert_array_equal(lanes().fma(a, b, c), exact.astype(np.float32))


@given(SEEDS, st.integers(0, WARP - 1))
def test_exchange(seed, distance):
    ops, value = lanes(warps=2), words(seed, 2 * WARP)
    wanted = [value[i // WARP * WARP + (i % WARP ^ distance)] for i in range(2 * WARP)]
    np.testing.assert_array_equal(ops.exchange(value, distance), wanted)


@given(SEEDS, st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_sum_over_lanes(seed, count):
    value = words(seed, 2 * WARP)
    [found] = sum_over_lanes(lanes(warps=2), [value], count)
    groups = value.reshape(-1, count)
    np.testing.assert_array_equal(found, np.repeat(groups.sum(1, dtype=np.uint32), count))


@given(st.lists(st.booleans(), min_size=WARP, max_size=WARP))
def test_votes_are_of_a_warp(condition):
    ops = lanes(warps=2)
    everywhere = np.array([*condition, *[True] * WARP])
    np.testing.assert_array_equal(ops.all(everywhere), [all(condition)] * WARP + [True] * WARP)
    np.testing.assert_array_equal(
        ops.any(~everywhere), [not all(condition)] * WARP + [False] * WARP
    )


@given(SEEDS)
def test_select_goes_through_pytrees(seed):
    ops, condition = lanes(), words(seed) % 2 == 0
    yes, no = ({"a": words(seed + i), "b": [words(seed + i + 1)]} for i in (1, 3))
    found = ops.select(condition, yes, no)
    for mine, a, b in (found["a"], yes["a"], no["a"]), (found["b"][0], yes["b"][0], no["b"][0]):
        np.testing.assert_array_equal(mine, [x if c else y for c, x, y in zip(condition, a, b)])


@given(st.lists(st.integers(0, 2**16), min_size=WARP, max_size=WARP))
def test_each_lane_leaves_a_loop_by_itself(numbers):
    """Steps of the Collatz iteration of each lane's number."""
    ops, start = lanes(), np.array(numbers, np.uint32)

    def step(state):
        number, steps = state
        odd = (number & 1) == 1
        number = ops.branch(odd, lambda: number * 3 + 1, number)
        return ops.branch(~odd, lambda: number >> 1, number), steps + 1

    def collatz(number, steps=0):
        while number >= 2 and steps < 50:
            number, steps = number * 3 + 1 if number % 2 else number // 2, steps + 1
        return number % 2**32, steps

    running = lambda state: (state[0] >= 2) & (state[1] < 50)
    number, steps = ops.loop(running, step, (start, ops.integer(0)))
    assert [*zip(number.tolist(), steps.tolist())] == [collatz(n) for n in numbers]


@given(SEEDS, st.lists(st.booleans(), min_size=WARP, max_size=WARP))
def test_only_lanes_of_a_branch_store(seed, condition):
    value = finite(seed, np.float32)
    arrays = {"y": np.full(WARP, np.nan, np.float16)}
    ops, condition = lanes(arrays), np.array(condition)

    def yes():
        ops.store_real("y", ops.thread(), value, ops.thread() >= 3)
        return ops.integer(1)

    done = ops.branch(condition, yes, ops.integer(0))
    np.testing.assert_array_equal(done, condition)
    kept = condition & (np.arange(WARP) >= 3)
    np.testing.assert_array_equal(arrays["y"], np.where(kept, value, np.nan).astype(np.float16))


@given(SEEDS, st.sampled_from([1, 2, 4]))
def test_words_in_global_and_in_shared_memory(seed, count):
    data = words(seed, WARP * count)

    def program(ops):
        index, everywhere = ops.thread() ^ 5, ops.thread() < WARP
        loaded = ops.load_words("x", index, count, everywhere, how=FRESH)
        ops.store_shared_words(index * (4 * count), loaded, everywhere)
        ops.barrier()
        shared = ops.load_shared_words(ops.thread() * (4 * count), count)
        ops.store_words("y", ops.thread(), shared, everywhere)

    arrays = {"x": data.view(np.float16), "y": np.zeros_like(data)}
    out = interpreter.run(program, arrays, blocks=1, warps=1, shared_slots=WARP * count)
    np.testing.assert_array_equal(out["y"], data)


@given(SEEDS)
def test_halves_of_memory(seed):
    data, everywhere = words(seed), np.ones(WARP, bool)
    arrays = {"x": data, "y": np.zeros(2 * WARP, np.float16)}
    ops = lanes(arrays, shared_slots=WARP)
    for half in (0, 1):
        number = ops.thread() * 2 + half
        bits = ops.load_small("x", number * 2, 2, everywhere)
        ops.store_shared_half(number * 2, bits, everywhere)
        ops.store_half("y", number, bits | 0xABCD0000, everywhere)
    np.testing.assert_array_equal(ops.load_shared_words(ops.thread() * 4, 1)[0], data)
    np.testing.assert_array_equal(arrays["y"].view(np.uint32), data)


def test_nothing_is_read_where_not_asked():
    ops = lanes({"x": np.arange(1, 4, dtype=np.float32)})
    far, where = ops.thread() + 1_000_000, ops.thread() < 0
    assert not ops.load_real("x", far, where).any()
    assert not np.any(ops.load_words("x", far, 2, where))
    assert not ops.load_small("x", far * 2 + 1, 2, where).any()
    ops.prefetch("x", far, where)
    ops.store_real("x", far, ops.real(1), where)


def test_what_is_published_is_never_blank():
    arrays = {"x": np.zeros(WARP, np.uint16)}
    ops = lanes(arrays)
    value = ops.real(1.5)
    value.view(np.uint32)[0] = 0xFFFFFFFF  # a NaN, which is 0xFFFF as float16
    ops.publish("x", ops.thread(), value, jnp.float16, ops.thread() < WARP)
    assert arrays["x"][0] == 0xFFFE
    np.testing.assert_array_equal(arrays["x"][1:].view(np.float16), 1.5)


def test_blocks_of_a_cluster_read_each_other():
    ops = lanes(blocks=4, shared_slots=1, cluster=2)
    ops.store_shared(ops.integer(0), ops.block().astype(np.float32), ops.thread() == 0)
    ops.cluster_barrier()
    np.testing.assert_array_equal(ops.load_peer(ops.integer(0), 1), np.repeat([1, 1, 3, 3], WARP))
    with pytest.raises(InterpreterError, match="block 2 in a cluster of 2"):
        ops.load_peer(ops.integer(0), 2)


@pytest.mark.parametrize(
    "access,message",
    [
        (lambda ops, i, on: ops.load_real("x", i, on), "index 10 of x .* 10 elements of 2 bytes"),
        (lambda ops, i, on: ops.load_words("x", i, 2, on), "index 2 of x .* 2 elements of 8 bytes"),
        (lambda ops, i, on: ops.load_integer("n", i), "index 3 of n .* 3 elements of 4 bytes"),
        (lambda ops, i, on: ops.load_small("n", i, 1, on), "index 12 of n .* 12 elements of 1 "),
        (lambda ops, i, on: ops.load_small("x", i, 2, on), "2 bytes of x at offset 1"),
        (lambda ops, i, on: ops.store_real("x", i, ops.real(0), on), "index 10 of x"),
        (lambda ops, i, on: ops.store_real("x", i >> 2, ops.real(0), on), "several .* 0 of x"),
        (lambda ops, i, on: ops.store_half("x", i, i, on), "index 10 of x"),
        (lambda ops, i, on: ops.store_words("x", i, [i] * 4, on), "index 1 of x .* of 16 bytes"),
        (lambda ops, i, on: ops.prefetch("x", i, on), "index 10 of x"),
        (lambda ops, i, on: prefetch_range(ops, "n", 0, i * 0 + 40, 4), "index 32 of n"),
        (lambda ops, i, on: ops.load_shared(i * 4, 1), "index 4 of shared memory .* of 4 bytes"),
        (lambda ops, i, on: ops.load_shared_words(i, 1), "4 bytes of shared memory at offset 1"),
        (lambda ops, i, on: ops.load_shared(i >> 3 << 2, 1), "nothing wrote, at offset 4 in block"),
        (lambda ops, i, on: ops.store_shared(i, ops.real(0), on), "index 4 of shared memory"),
        (lambda ops, i, on: ops.store_shared_half(i, i, on), "2 bytes of shared .* at offset 1"),
    ],
)
def test_wrong_accesses_are_errors(access, message):
    ops = lanes({"x": np.ones(10, np.float16), "n": np.ones(3, np.int32)}, shared_slots=4)
    ops.store_shared(ops.integer(0), ops.real(1), ops.thread() == 0)
    with pytest.raises(InterpreterError, match=message):
        access(ops, ops.thread(), ops.thread() < WARP)


@pytest.mark.parametrize(
    "operation,message",
    [
        (lambda ops: ops.exchange(ops.thread(), 1), r"exchange that only lanes .* warp 1 of"),
        (lambda ops: ops.all(ops.thread() < 1), "all that only lanes"),
        (lambda ops: ops.any(ops.thread() < 1), "any that only lanes"),
        (lambda ops: ops.warp_barrier(), "warp_barrier that only lanes"),
        (lambda ops: ops.barrier(), "barrier that 40 of the grid's 64 lanes reach"),
        (lambda ops: ops.cluster_barrier(), "cluster_barrier that 40 of"),
    ],
)
def test_what_a_whole_warp_has_to_reach(operation, message):
    ops = lanes(warps=2)
    with pytest.raises(InterpreterError, match=message):
        ops.branch(ops.thread() < 40, lambda: operation(ops) or (), ())


def test_a_warp_may_be_elsewhere():
    ops = lanes(warps=2)
    first = ops.thread() < WARP
    found = ops.branch(first, lambda: ops.exchange(ops.thread(), 1), ops.integer(7))
    np.testing.assert_array_equal(found, np.where(first, ops.thread() ^ 1, 7))
