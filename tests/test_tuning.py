"""The rules of the kernels' tuning, and the records that they come from."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from macko_jax.format import choose
from macko_jax.format.layout import Layout
from macko_jax.gpu import densify, device, gather, occupancy, select, spmv, spmv_transposed, tuning
from tests.kernels import ENCODINGS, ask_for

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


def on_gpu_with(monkeypatch, **attributes):
    """As if the first GPU here had these."""
    monkeypatch.setattr(
        device, "_of_gpu", lambda attribute, otherwise: attributes.get(attribute, otherwise)
    )


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_plans_fit_into_the_shared_memory_of_other_gpus(monkeypatch, batch):
    room = 99 * 1024
    on_gpu_with(monkeypatch, compute_capability="12.0", shared_memory_per_block_optin=room)
    layout = Layout((4096, 11008), "delta4", 32, 4096 * 5504)
    backward = ask_for("spmv_transposed", layout, "float16", batch=batch)
    assert "no room for four times 11008 sums" in spmv_transposed.why_not(backward)
    with pytest.raises(ValueError, match="no room for four times 11008 sums"):
        spmv_transposed.plan(backward)
    forward = spmv.plan(ask_for("spmv", layout, "float16", batch=batch))
    dense = densify.plan(densify.problem_for(layout, "float16", "float16"))
    assert all(4 * plan.shared_slots <= room for plan in (forward, dense))
    assert forward.settings.vectors == min(batch, 4)


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


def test_packing_plans_for_the_device_that_kernels_plan_for():
    assert device.multiprocessors() == choose.MULTIPROCESSORS
    matrix = macko_jax.compress(np.eye(64, dtype=np.float16))
    assert occupancy.row_blocks(matrix.shape[0]) == 64
    assert tuning.MOST_WARPS * 32 == 1024  # the most threads of a block
