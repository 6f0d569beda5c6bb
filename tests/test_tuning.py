"""The rules of the kernels' tuning, and the records that they come from."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from macko_jax.format import cards, choose
from macko_jax.format.layout import Layout
from macko_jax.gpu import densify, gather, occupancy, select, spmv, spmv_transposed, tuning
from macko_jax.gpu.kernel import Fusion
from tests.kernels import ENCODINGS, ask_for

pytestmark = pytest.mark.once

RESULTS = pathlib.Path(__file__).parents[1] / "docs/results"


def record(name):
    return json.loads((RESULTS / name).read_text())


def layout_of(rows, cols, lanes, groups_per_lane, encoding="delta4"):
    return Layout((rows, cols), encoding, lanes, int(rows * lanes * groups_per_lane * 8))


@pytest.mark.parametrize(
    "rows,groups_per_lane,dtype,ahead",
    [
        (100_000, 2, "float16", 1),
        (100_000, 8.2, "float16", 3),
        (100_000, 9.6, "float16", 2),
        (100_000, 16.5, "float16", 3),
        (64, 8.2, "float16", 2),
        (100_000, 8.2, "int8", 3),
        (100_000, 9.6, "int8", 4),
        (64, 20, "int8", 3),
        (64, 8.2, "int8", 2),
    ],
)
def test_more_groups_ahead_where_they_fill_the_chunks_of_several_rows(
    rows, groups_per_lane, dtype, ahead
):
    layout, blocks = layout_of(rows, 8, 32, groups_per_lane), occupancy.row_blocks(rows)
    assert occupancy.prefetch_distance(layout, dtype, blocks) == ahead
    assert occupancy.prefetch_distance(layout, dtype, blocks, vectors=8) == min(ahead, 2)


def test_prefetch_distance_is_near_the_fastest_that_was_measured():
    table = record("tuning_h200.json")["groups that a lane loads ahead"]
    compared = 0
    for name, groups_per_lane, *times in table["rows"]:
        shape, *values, _ = name.split()
        if groups_per_lane is None or "banked" in values:
            continue
        rows, cols = map(int, shape.split("x"))
        layout = layout_of(rows, cols, 32, groups_per_lane)
        dtype = jnp.dtype(values[0] if values else "float16")
        ahead = occupancy.prefetch_distance(layout, dtype, occupancy.row_blocks(rows))
        measured = {i: t for i, t in enumerate(times, start=1) if t is not None}
        assert measured[ahead] <= 1.035 * min(measured.values()), (name, ahead)
        compared += 1
    assert compared >= 18


def test_loads_in_flight_are_near_the_fastest_that_was_measured():
    tables = record("tuning_h200.json")

    def check(what, number_of):
        (table,) = (table for name, table in tables.items() if name.startswith(what))
        counts = [int(column) for column in table["columns"][1:]]
        for name, *times in table["rows"]:
            number = number_of(name)
            # Of a number between two that were measured, neither may be slow.
            near = {max(c for c in counts if c <= number), min(c for c in counts if c >= number)}
            taken = max(times[counts.index(count)] for count in near)
            assert taken <= 1.035 * min(times), (what, name)

    check("groups in flight", lambda name: tuning.GROUPS_IN_FLIGHT)
    check("elements of x", lambda name: tuning.ELEMENTS_IN_FLIGHT)
    check("pairs of columns of x", lambda name: tuning.PAIRS_IN_FLIGHT[int(name.split()[-1])])


def test_passes_are_chosen_where_they_were_measured_to_be_faster():
    rows = record("passes_or_densify_h200.json")["rows"]
    for product, *shape, _, encoding, dtype, stored, times in rows:
        if encoding not in ENCODINGS:  # the bitmask, which has no kernel
            continue
        layout = Layout(tuple(shape), encoding, 32, stored)
        for batch, (by_passes, by_densify) in times.items():
            problem = ask_for(product, layout, dtype, batch=int(batch), out_dtype=dtype)
            taken = by_passes if select.fastest_method(problem) == "passes" else by_densify
            assert taken <= 1.101 * min(by_passes, by_densify), (product, shape, stored, batch)


@pytest.mark.parametrize("lanes", [1, 8, 16, 32])
def test_no_more_warps_than_their_rounds_take(lanes):
    for rows in range(1, 500, 3):
        warpfuls = -(-rows * lanes // 32)
        warps = occupancy.busy_warps(Layout((rows, 8), "delta4", lanes, 8), 1)
        assert warps % 4 == 0 and 4 <= warps <= 32
        assert -(-warpfuls // warps) == -(-warpfuls // 32)
        assert warps == 4 or -(-warpfuls // (warps - 4)) > -(-warpfuls // 32)


@pytest.mark.parametrize(
    "cols,x_dtype,batch,two_copies",
    [
        (11008, "float16", 1, True),
        (11008, "float16", 2, True),
        (11008, "float16", 3, False),
        (11008, "float32", 2, False),
        (18_000, "float32", 1, True),
        (28672, "float16", 1, False),
    ],
)
def test_x_lies_twice_where_there_is_room_and_a_word_for_each_column(
    cols, x_dtype, batch, two_copies
):
    for encoding in ENCODINGS:
        layout = Layout((4096, cols), encoding, 32, 4096 * cols // 2)
        settings = gather.settle(ask_for("spmv", layout, "float16", x_dtype, batch))
        assert settings.two_copies == (two_copies and encoding == "two_bank")


def on(monkeypatch, name):
    """As if that card were named in the environment."""
    monkeypatch.setenv(cards.VARIABLE, name)


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_plans_fit_into_the_shared_memory_of_other_gpus(monkeypatch, batch):
    on(monkeypatch, "RTX 5090")
    room = 99 * 1024
    layout = Layout((4096, 11008), "delta4", 32, 4096 * 5504)
    forward = spmv.plan(ask_for("spmv", layout, "float16", batch=batch))
    backward = ask_for("spmv_transposed", layout, "float16", batch=batch)
    turned = spmv_transposed.plan(backward)
    dense = densify.plan(densify.problem_for(layout, "float16", "float16"))
    assert all(4 * plan.shared_slots <= room for plan in (forward, turned, dense))
    assert forward.settings.vectors == min(batch, 4)
    assert (turned.warps, dense.warps) == (2, 4)  # of four of a block
    assert select.fastest_method(backward) == "densify"


def test_matrices_too_wide_for_a_warpgroup_have_plans(monkeypatch):
    """Of Llama-2-70B the last matrix of a layer."""
    on(monkeypatch, "RTX 5090")
    layout = Layout((8192, 28672), "two_bank", 16, 4096 * 28672)
    ask = lambda product, *dtypes, **more: ask_for(product, layout, *dtypes, **more)
    forward = spmv.plan(ask("spmv", "float16"))
    assert forward.settings.narrow and not forward.settings.two_copies
    assert 4 * forward.shared_slots <= 99 * 1024
    assert "28672 columns" in select.why_not(ask("spmv", "float32"))
    normed = ask("spmv", "float16", fusion=Fusion(eps=1e-5, kept=True))
    assert "28672 columns" in select.why_not_fused((normed,))
    assert "28672 sums" in spmv_transposed.why_not(ask("spmv_transposed", "float16"))
    assert densify.plan(densify.problem_for(layout, "float16", "float16")).warps == 1
    assert [select.fastest_method(ask("spmv", "float16", batch=n)) for n in (1, 512)] == [
        "passes",
        "densify",
    ]


def test_what_is_packed_and_planned_follows_the_card(monkeypatch):
    def chosen(cols):
        counts = {"bitmask": 1000 * cols // 16, "delta4": 10**6, "two_bank": 10**6}
        encoding = choose.choose_encoding((1000, cols), "float16", counts.get)
        return encoding, choose.choose_lanes(11000, 11000 * 40)

    assert [chosen(cols)[0] for cols in (7168, 8192, 18_000, 18_001)] == [
        *["two_bank"] * 3,
        "delta4",
    ]
    for name, most in {"A100": 13_226, "RTX 4090": 7_765}.items():
        on(monkeypatch, name)
        assert [chosen(cols)[0] for cols in (most, most + 1)] == ["two_bank", "delta4"]
        layout = Layout((1000, most), "two_bank", 16, 8000)
        assert spmv.plan(ask_for("spmv", layout, "float16")).settings.two_copies
        assert occupancy.row_blocks(10_000) == cards.CARDS[name].multiprocessors


def test_a_named_card_has_no_more_than_the_gpu_here(monkeypatch):
    gpu = cards.Card("some GPU", (9, 0), 114, 227 * 1024)
    monkeypatch.setattr(cards, "live", lambda: gpu)
    monkeypatch.delenv(cards.VARIABLE, raising=False)
    assert cards.here() == gpu
    on(monkeypatch, "RTX 5090")
    assert cards.here() == cards.Card("RTX 5090", (12, 0), 114, 99 * 1024)
    on(monkeypatch, "GTX 750")
    with pytest.raises(ValueError, match="MACKO_JAX_CARD.*'RTX 4090'.*got 'GTX 750'"):
        cards.here()


def test_the_card_here_is_what_jax_says(monkeypatch):
    class Gpu:
        platform, device_kind, compute_capability = "gpu", "some GPU", "12.1"
        core_count, shared_memory_per_block_optin = 48, 101_376

    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu])
    assert cards.live.__wrapped__() == cards.Card("some GPU", (12, 1), 48, 101_376)
    monkeypatch.setattr(Gpu, "compute_capability", "gfx942")  # of AMD's
    assert cards.live.__wrapped__() is None


@pytest.mark.parametrize(
    "wrong", [{"warps": 3}, {"warps": 36}, {"vectors": 3}, {"blocks": 0}, {"ahead": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="must be"):
        gather.Settings(**{"blocks": 1, "warps": 4, "ahead": 1, "vectors": 1, **wrong})


@pytest.mark.parametrize("encoding,x_dtype", [("delta4", "float32"), ("two_bank", "float16")])
@pytest.mark.parametrize(
    "rows,cols,density,batch",
    [
        (11008, 4096, 0.5, 1),
        (4096, 11008, 0.1, 3),
        (3, 55000, 0.3, 16),
        (1, 1, 1.0, 1),
        (11008, 4096, 0.5, 16),
        (4096, 11008, 0.5, 8),
        (4096, 13500, 0.5, 16),
    ],
)
def test_plans_fit_the_device(rows, cols, density, batch, encoding, x_dtype):
    layout = Layout((rows, cols), encoding, 32, int(rows * cols * density) // 8 * 8)
    plan = spmv.plan(ask_for("spmv", layout, "float16", x_dtype, batch))
    assert 4 * plan.shared_slots <= 227 * 1024
    assert plan.settings.blocks <= rows


def test_a_small_matrix_has_as_many_blocks_as_rows():
    matrix = macko_jax.compress(np.eye(64, dtype=np.float16))
    assert occupancy.row_blocks(matrix.shape[0]) == 64
    assert tuning.MOST_WARPS * 32 == 1024  # the most threads of a block
