"""Refinement of language models: in compress_llm, of packed directories, on their own text."""

import json
import shutil

import numpy as np
import pytest

import macko_jax
from examples.llama import checkpoint, own_text, refinement, texts
from examples.llama.evaluation import total_nats
from tests.scripts import run
from tests.test_llama_compression import save_model

WINDOWS = (
    "--calibration=self --windows=8 --length=16 --batch=4 --encoding=bitmask "
    """--rule="layers/1/mlp/down method=dsf-published" --dsf_options='{"search_rounds": 2}'"""
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    save_model(directory, vocab_size=256, num_hidden_layers=2)
    return directory


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "packed"
    run(
        "compress_llm",
        f"--checkpoint={dense} --out={out} --method=wanda --values=int8 {WINDOWS}",
        "--refine=block --refine_steps=10 --refine_rate=1e-3",
    )
    return out


def report_of(directory):
    return json.loads((directory / "report.json").read_text())


def kernels(directory):
    model = checkpoint.load_packed(directory, unpack=True)
    layers = (model.layers[0].attention.qkv, model.layers[1].mlp.gate_up)
    return [np.asarray(layer.kernel[...]) for layer in layers]


@pytest.mark.slow
def test_blocks_are_refined_as_they_are_compressed(dense, packed, tmp_path):
    blocks = report_of(packed)["refined"]
    assert list(blocks) == ["0", "1"]
    assert all(block["after"] < block["before"] for block in blocks.values())
    assert all(len(block["losses"]) == 10 for block in blocks.values())
    # Of a run that was killed after its first block, the second is refined as it was.
    shutil.copytree(packed, tmp_path / "again")
    checkpoint.part_file(tmp_path / "again", 1).unlink()
    run(
        "compress_llm",
        f"--checkpoint={dense} --out={tmp_path / 'again'} --method=wanda --values=int8 {WINDOWS}",
        "--refine=block --refine_steps=10 --refine_rate=1e-3",
    )
    for one, other in zip(kernels(packed), kernels(tmp_path / "again")):
        np.testing.assert_allclose(one, other, rtol=1e-5)  # what float32 scales are stored as
    plain = run(
        "compress_llm",
        f"--checkpoint={dense} --out={packed} --method=wanda --values=int8 {WINDOWS}",
        check=False,
    )
    assert plain.returncode and "differs in refine" in plain.stderr


@pytest.mark.slow
def test_a_packed_model_is_refined_and_packed_again(dense, packed, tmp_path):
    (tmp_path / "text.txt").write_text("other text than that " * 20)
    done = run(
        "refine_llm",
        f"--checkpoint={packed} --teacher={dense} --out={tmp_path / 'out'} --calibration=self",
        "--windows=8 --length=16 --batch=4 --steps=20 --learning_rate=1e-3",
        f"--held_out={tmp_path / 'text.txt'} --held_out_windows=4",
    )
    assert "[20/20] loss" in done.stdout
    report = report_of(tmp_path / "out")
    assert report["losses"][-1] < report["losses"][0] and len(report["held_out"]) > 1
    assert report["settings"]["values"] == "int8" and report["nonzeros"][0] >= report["nonzeros"][1]
    for old, new in zip(kernels(packed), kernels(tmp_path / "out")):
        assert (new == 0)[old == 0].all() and (new != old).any()
    part = macko_jax.load(checkpoint.part_file(tmp_path / "out", 0))
    before = macko_jax.load(checkpoint.part_file(packed, 0))
    for tree in (part, before):
        matrix = tree["mlp"]["down"]["kernel"]
        assert matrix.scales is not None and matrix.encoding == "bitmask"
    pair = macko_jax.load(checkpoint.part_file(tmp_path / "out", 1))["mlp"]["down"]
    assert all(pair[name]["kernel"].encoding == "bitmask" for name in ("left", "right"))
    # What was reported at the end is what the packed model does: it is nearer to the dense one.
    assert not (tmp_path / "out" / "work").exists()
    tokens = own_text.own_windows(dense, tmp_path / "out", 8, 16)
    losses = [
        total_nats(checkpoint.load_any(d), tokens.ravel(), length=16, stride=16, batch=4)[0]
        for d in (packed, tmp_path / "out")
    ]
    assert losses[1] < losses[0]
    for wrong, message in ((dense, "holds no packed model"), (packed, "models that are read")):
        out = packed if wrong is packed else tmp_path / "other"
        failed = run(
            "refine_llm",
            f"--checkpoint={wrong} --teacher={dense} --out={out} --steps=1",
            check=False,
        )
        assert failed.returncode and message in failed.stderr
    run(
        "refine_llm",
        f"--checkpoint={packed} --teacher={dense} --out={tmp_path / 'blocks'} --stage=block",
        f"--steps=10 --learning_rate=1e-3 --calibration=self --calibration={tmp_path / 'text.txt'}",
        "--windows=4 --length=16 --batch=4",
    )
    found = report_of(tmp_path / "blocks")
    assert [block["path"] for block in found["blocks"]] == ["layers/0", "layers/1"]
    assert all(block["after"] < block["before"] for block in found["blocks"])
    assert found["settings"]["batches"] == [2, 4, 16]
    # A run that was killed in its second block goes on there, to the same result.
    seen = []

    def kill(progress):
        seen.append(progress.block)
        if progress.block == "layers/1" and seen.count("layers/1") == 1:
            raise KeyboardInterrupt

    windows = texts.read_windows(("self", tmp_path / "text.txt"), dense, tmp_path / "blocks", 4, 16)
    settings = dict(stage="block", dtype="float32", steps=10, learning_rate=1e-3, callback=kill)
    arguments = packed, dense, tmp_path / "again", [windows[:4], windows[4:]]
    with pytest.raises(KeyboardInterrupt):
        refinement.refine_checkpoint(*arguments, **settings)
    refinement.refine_checkpoint(*arguments, **settings)
    assert seen.index("layers/1") == len(seen) - seen[::-1].index("layers/0")
    for one, other in zip(kernels(tmp_path / "blocks"), kernels(tmp_path / "again")):
        np.testing.assert_array_equal(one, other)
    figure = tmp_path / "figure.png"
    pytest.importorskip("matplotlib")
    records = f"--record={tmp_path / 'out' / 'report.json'} --record={packed / 'report.json'}"
    run("benchmarks.plot_results", f"--kind=refine {records} --out={figure}")
    assert figure.stat().st_size > 1000


@pytest.mark.slow
def test_own_text_is_kept_and_used_again(dense, tmp_path):
    tokens = own_text.own_windows(dense, tmp_path, 5, 12, seed=1)
    assert tokens.shape == (5, 12) and tokens.dtype == np.int32 and len(np.unique(tokens)) > 8
    written = (tmp_path / own_text.FILE).read_bytes()
    np.testing.assert_array_equal(own_text.own_windows(dense, tmp_path, 3, 12, seed=1), tokens[:3])
    assert (tmp_path / own_text.FILE).read_bytes() == written
    with pytest.raises(ValueError, match="another length or seed"):
        own_text.own_windows(dense, tmp_path, 3, 12, seed=2)


@pytest.mark.slow
def test_stages_are_compared(dense, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text("a text to evaluate on " * 20)
    record = tmp_path / "record.json"
    command = (
        f"--checkpoint={dense} --out={record} --method=magnitude --density=0.5 --windows=4",
        "--calibration=self --block_windows=4 --model_windows=8 --length=16 --batch=4",
        f"--block_steps=10 --steps=20 --text={tmp_path / 'text.txt'} --eval_windows=2",
    )
    run("benchmarks.compare_refinement", *command, "--stage=layers", "--stage=block")
    made = json.loads(record.read_text())
    run("benchmarks.compare_refinement", *command)  # goes on
    rows = json.loads(record.read_text())["rows"]
    assert rows[:2] == made["rows"] and [row["stage"] for row in rows] == [
        "layers",
        "block",
        "model",
    ]
    assert all(block["after"] < block["before"] for block in rows[1]["blocks"])
    assert len(rows[2]["losses"]) == 2 and rows[2]["losses"][1] < rows[2]["losses"][0]
    apart = [row["agreement"]["divergence"] for row in rows]
    assert apart[2] < apart[1] < apart[0]
    assert all(row["perplexity"].keys() == {"text", "topics"} for row in rows)
    run("benchmarks.plot_results", f"--kind=refine --record={record} --out={tmp_path / 'a.png'}")
    assert (tmp_path / "a.png").stat().st_size > 1000
