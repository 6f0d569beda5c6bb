"""Compression of checkpoints block by block: like the whole model, resumed, in little memory."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsf_jax
import macko_jax
from examples import cli, llama
from examples.llama import checkpoint, compression
from examples.llama.recipe import Recipe
from examples.llama.sizes import PackedSizes
from tests.scripts import run
from tests.test_llama import CONFIG as LLAMA
from tests.test_llama import forward

# Two pairs of layers share their shapes, and so programs.
SHAPE = dict(intermediate_size=32, num_hidden_layers=3, max_position_embeddings=64)
CONFIG = dataclasses.replace(LLAMA, num_attention_heads=2, num_key_value_heads=1, **SHAPE)
LAYERS = ["attention/qkv", "attention/out", "mlp/gate_up", "mlp/down"]
SETTINGS = {"method": "wanda", "density": 0.5, "encoding": "bitmask"}


class Killed(Exception):
    pass


def save_model(directory, **changes):
    model = llama.Llama(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(1))
    state = jax.tree.map(lambda a: 6 * a if a.ndim > 1 else a, nnx.state(model))
    nnx.update(model, state)
    checkpoint.save(directory, model, jnp.float32)
    return model


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    (directory / "tokenizer.json").write_text("{}")
    return directory, save_model(directory)


@pytest.fixture(scope="module")
def packed(dense, windows, tmp_path_factory):
    """A run without interruption: its directory and report."""
    out = tmp_path_factory.mktemp("packed")
    return out, compression.compress_checkpoint(dense[0], out, windows, batch=2, **SETTINGS)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.glob("packed-*")}


@pytest.mark.slow
def test_blocks_give_what_the_whole_model_gives(dense, packed, windows):
    out, report = packed
    whole = dsf_jax.compress_model(
        dense[1], list(np.split(windows, 2)), method="wanda", density=0.5
    )
    assert [layer.path for layer in report.layers] == [
        f"layers/{i}/{layer}" for i in range(3) for layer in LAYERS
    ]
    found = {layer.path: layer for layer in report.layers}
    for layer in whole.report.layers:
        assert found[layer.path].nonzeros == layer.nonzeros
        np.testing.assert_allclose(found[layer.path].error, layer.error, rtol=1e-3)
    pruned = checkpoint.load_packed(out, unpack=True)
    wanted = dict(nnx.to_flat_state(nnx.state(whole.model)))
    for path, param in nnx.to_flat_state(nnx.state(pruned)):
        np.testing.assert_allclose(param[...], wanted[path][...], atol=1e-5, err_msg=str(path))
    tokens = jnp.asarray(windows[:1])
    expected = forward(pruned, tokens)
    np.testing.assert_allclose(
        forward(checkpoint.load_any(out), tokens), expected, rtol=1e-4, atol=1e-4
    )


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_directory_holds_the_model_and_the_report(packed):
    out, report = packed
    assert names(out) == sorted(
        [
            "config.json",
            "report.json",
            "tokenizer.json",
            "packed-embed.safetensors",
            "packed-norm.safetensors",
            "packed-head.safetensors",
            *(f"packed-0000{i}.safetensors" for i in range(3)),
        ]
    )
    stored = json.loads((out / "report.json").read_text())
    assert [layer["error"] for layer in stored["layers"]] == [
        layer.error for layer in report.layers
    ]
    assert stored["density"] == report.density == 0.5
    assert stored["settings"]["method"] == "wanda"


@pytest.mark.once
@pytest.mark.slow
def test_two_devices_share_the_layers_of_whole_blocks(dense, windows, tmp_path):
    report = compression.compress_checkpoint(
        dense[0],
        tmp_path,
        windows,
        batch=2,
        whole_blocks=True,
        devices=jax.devices()[:2],
        **SETTINGS,
    )
    whole = dsf_jax.compress_model(
        dense[1],
        list(np.split(windows, 2)),
        method="wanda",
        density=0.5,
        calibration=dsf_jax.Calibration(blocks=r"layers/\d+"),
    )
    found = {layer.path: layer.error for layer in report.layers}
    wanted = {layer.path: layer.error for layer in whole.report.layers}
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[path] for path in wanted], [*wanted.values()], rtol=1e-3)


@pytest.mark.parametrize(
    "killed_at", [4, 6, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 12))]
)
def test_killed_run_goes_on(dense, packed, windows, tmp_path, killed_at):
    def kill(progress):
        if progress.index == killed_at:
            raise Killed

    with pytest.raises(Killed):
        compression.compress_checkpoint(
            dense[0], tmp_path, windows, batch=2, callback=kill, **SETTINGS
        )
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="not finished"):
        checkpoint.load_any(tmp_path)
    (work,) = (tmp_path / "work").iterdir()
    half_written = [
        directory / name / "file"
        for directory in (tmp_path, work)
        for name in (".packed-00001.safetensors.Qx4a9Z.unfinished", ".a.json.l6_k2xw1.unfinished")
    ]
    for path in half_written:
        path.parent.mkdir()
        path.write_bytes(b"half")
    seen = []

    def see(progress):
        assert not any(path.exists() for path in half_written)
        seen.append(progress)

    compression.compress_checkpoint(dense[0], tmp_path, windows, batch=2, callback=see, **SETTINGS)
    resumed = [i < killed_at for i in range(12)]
    assert [progress.layer.resumed for progress in seen] == resumed
    assert {progress.seconds_left for progress in seen if progress.layer.resumed} <= {None, 0.0}
    assert [progress.index for progress in seen] == list(range(1, 13))
    assert seen[-1].seconds_left in (0, None)
    assert contents(tmp_path) == contents(packed[0])
    assert names(tmp_path) == names(packed[0])


@pytest.mark.once
def test_second_run_in_a_directory_is_refused_and_harms_nothing(dense, packed, windows, tmp_path):
    def start_another(progress):
        half_written = tmp_path / ".packed-00001.safetensors.Qx4a9Z.unfinished" / "file"
        half_written.parent.mkdir()
        half_written.write_bytes(b"half")
        with pytest.raises(ValueError, match="another run is at work"):
            compression.compress_checkpoint(dense[0], tmp_path, windows, batch=2, **SETTINGS)
        shutil.rmtree(half_written.parent)

    compression.compress_checkpoint(
        dense[0], tmp_path, windows, batch=2, callback=start_another, **SETTINGS
    )
    assert contents(tmp_path) == contents(packed[0])


@pytest.mark.once
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_time_left_is_by_the_pace_of_what_was_solved(whole_blocks):
    seen = []
    blocks = [[(f"{i}/{j}", (32, 32), "wanda") for j in range(4)] for i in range(3)]
    progress = compression._Progress(blocks, whole_blocks, seen.append)
    solved = dsf_jax.LayerReport(
        "", "linear", (32, 32), 512, 4096, 4096, method="wanda", inner=None, error=0.1, seconds=10.0
    )
    for i, times in enumerate([(1e6, 0.0), (60.0, 50.0), (10.0, 0.0), (10.0, 0.0)]):
        seconds = dict(zip(("seconds", "compile_seconds"), times))
        progress.add(dataclasses.replace(solved, path=f"0/{i}", resumed=i == 0, **seconds))
    assert seen[0].seconds_left is None
    np.testing.assert_allclose(seen[1].seconds_left, 10 * 10, rtol=0.01)
    np.testing.assert_allclose(seen[3].seconds_left, 8 * 10, rtol=0.01)


@pytest.mark.once
def test_other_settings_are_refused(dense, packed, windows):
    with pytest.raises(ValueError, match="differs in calibration, density"):
        compression.compress_checkpoint(
            dense[0], packed[0], windows[::-1].copy(), **SETTINGS | {"density": 0.4}
        )


@pytest.mark.once
def test_directories_of_something_else_are_refused(dense, packed, windows, tmp_path):
    def refuse(source, out, message, **changes):
        before = names(out)
        with pytest.raises(ValueError, match=message):
            compression.compress_checkpoint(source, out, windows, **SETTINGS | changes)
        assert names(out) == before

    other = shutil.copytree(packed[0], tmp_path / "other")
    refuse(packed[0], other, "packed already; give the dense checkpoint")
    (tmp_path / "link").symlink_to(dense[0])
    refuse(dense[0], tmp_path / "link", "is the directory of the checkpoint")
    refuse(dense[0], tmp_path, r"must be in \(0, 1\], got 0", density=0)
    refuse(dense[0], tmp_path, "method must be one of", method="none")

    report = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(report | {"layers": report["layers"][:4]}))
    refuse(dense[0], other, "holds packed-00001.safetensors and no report.json that says")
    (other / "report.json").write_text(json.dumps(report)[:99])
    refuse(dense[0], other, "other/report.json is not the report of a run, or was cut off")
    (other / "report.json").write_text(json.dumps({"settings": {}, "layers": [{"old": 1}]}))
    refuse(dense[0], other, "written by another version of this program .* has version 1")
    for name, odd in (
        ("nonzeros", "1"),
        ("seconds", None),
        ("shape", ["x"]),
        ("error", float("nan")),
    ):
        layers = [report["layers"][0] | {name: odd}, *report["layers"][1:]]
        (other / "report.json").write_text(json.dumps(report | {"layers": layers}))
        refuse(dense[0], other, f"other/report.json .*{name} of a layer cannot be")
    (other / "report.json").write_text(json.dumps(report | {"shares": {"layers/0/mlp/down": "x"}}))
    refuse(dense[0], other, "other/report.json .*shares must be densities")
    (other / "report.json").write_text("[]")
    refuse(dense[0], other, "other/report.json is not the report of a run, or was cut off")
    (other / "report.json").unlink()
    refuse(dense[0], other, "packed-00000.safetensors and no report.json .* Give another directory")


@pytest.mark.once
def test_a_run_goes_on_with_nothing_damaged_and_of_no_other_model(dense, packed, windows, tmp_path):
    source, out = tmp_path / "dense", tmp_path / "out"
    shutil.copytree(dense[0], source)
    shutil.copytree(packed[0], out)
    report = json.loads((out / "report.json").read_text())
    report["settings"]["checkpoint"] = str(source)
    (out / "report.json").write_text(json.dumps(report))
    before = contents(out)
    again = functools.partial(
        compression.compress_checkpoint, source, out, windows, batch=2, **SETTINGS
    )
    resumed = []
    # Damaged parts of the model are written again, and blocks that have changed places.
    embed = out / "packed-embed.safetensors"
    embed.write_bytes(embed.read_bytes()[:-3])
    (out / "packed-00001.safetensors").write_bytes((out / "packed-00002.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="packed-00001.safetensors is damaged"):
        again(callback=lambda progress: resumed.append(progress.layer.resumed))
    assert resumed == [True] * 4 + [False] * 4 + [True] * 4
    assert contents(out) == before

    short = json.loads((out / "report.json").read_text())
    whole = (out / "report.json").read_text()
    (out / "report.json").write_text(json.dumps(short | {"layers": short["layers"][:-2]}))
    with pytest.raises(ValueError, match="does not have all layers of block 2: it was cut short"):
        again()
    (out / "report.json").write_text(whole)

    weights = source / "model.safetensors"
    other = bytearray(weights.read_bytes())
    other[-1] ^= 1  # another model, of the same shapes and sizes
    weights.write_bytes(other)
    with pytest.raises(ValueError, match="holds a run that differs in files"):
        again()
    with pytest.raises(ValueError, match="dense holds config.json and no report.json"):
        compression.compress_checkpoint(dense[0], source, windows, **SETTINGS)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(windows, tmp_path):
    """Peak of all live device arrays, sampled while a layer has just been solved."""

    def peak(layers):
        name = f"of_{layers}"
        save_model(tmp_path / name, num_hidden_layers=layers)
        before, held = live_bytes(), []
        compression.compress_checkpoint(
            tmp_path / name,
            tmp_path / f"{name}_packed",
            windows,
            batch=2,
            callback=lambda _: held.append(live_bytes()),
            **SETTINGS,
        )
        assert len(held) == 4 * layers
        return max(held) - before

    few, many = peak(2), peak(6)
    assert many <= 1.02 * few
    block = 4 * sum(rows * cols for rows, cols in ((64, 32), (32, 32), (64, 32), (32, 32)))
    # The block as it was and as it becomes, Gram matrices and activations; never all six blocks.
    assert many < 4 * block


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def packed_bytes(directory):
    return sum(path.stat().st_size for path in directory.glob("packed-*"))


@pytest.mark.slow
def test_rules_8_bit_values_and_what_somebody_else_pruned(dense, windows, tmp_path):
    rules = (
        dsf_jax.Rule("layers/0/.*", skip=True),
        dsf_jax.Rule(".*/mlp/down", density=0.25, method="magnitude"),
    )
    recipe = SETTINGS | {"rules": rules, "values": "int8"}
    out = tmp_path / "int8"
    report = compression.compress_checkpoint(dense[0], out, windows, batch=2, **recipe)
    found = {layer.path: layer for layer in report.layers}
    assert found.keys() == {f"layers/{i}/{layer}" for i in (1, 2) for layer in LAYERS}
    assert (found["layers/1/mlp/down"].density, found["layers/2/attention/qkv"].density) == (
        0.25,
        0.5,
    )
    assert found["layers/1/mlp/down"].method == "magnitude"
    assert report.skipped["layers/0/mlp/down"] == "rule 'layers/0/.*'"
    assert all(layer.bytes_after < layer.bytes_before for layer in report.layers)
    loaded = checkpoint.load_packed(out)
    assert loaded.layers[1].mlp.down.matrix.values.dtype == jnp.int8
    assert isinstance(loaded.layers[0].mlp.down, nnx.Linear)

    # The same zeros, as somebody else would publish them, packed as they are.
    pruned = checkpoint.load_packed(out, unpack=True)
    checkpoint.save(tmp_path / "pruned", pruned, jnp.float32)
    again = compression.compress_checkpoint(
        tmp_path / "pruned", tmp_path / "given", None, method="given", encoding="bitmask"
    )
    assert {layer.method for layer in again.layers} == {"given"}
    nonzeros = {layer.path: layer.nonzeros for layer in again.layers}
    assert {path: nonzeros[path] for path in found} == {p: x.nonzeros for p, x in found.items()}
    tokens = jnp.asarray(windows[:1])
    wanted = forward(pruned, tokens)
    np.testing.assert_allclose(
        forward(checkpoint.load_any(tmp_path / "given"), tokens), wanted, rtol=1e-4, atol=1e-4
    )
    # Weights in 16 bits or packed alike are read with 8-bit values where that is asked for.
    for name in ("pruned", "given"):
        eight = checkpoint.load_any(tmp_path / name, values="int8")
        assert eight.layers[1].mlp.down.matrix.values.dtype == jnp.int8
        np.testing.assert_allclose(forward(eight, tokens), wanted, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="has no layer in which fewer than 0.8"):
        compression.compress_checkpoint(dense[0], tmp_path / "full", None, method="given")
    assert not (tmp_path / "full").exists()


@pytest.mark.slow
def test_target_and_budget_are_met_and_resumed(dense, windows, tmp_path):
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(dense[1])))
    target = int(0.75 * dense_bytes)
    recipe = {"target_bytes": target, "budget": "sensitivity", "encoding": "bitmask"}

    def kill(progress):
        if progress.index == 6:
            raise Killed

    with pytest.raises(Killed):
        compression.compress_checkpoint(
            dense[0], tmp_path, windows, batch=2, callback=kill, **recipe
        )
    report = compression.compress_checkpoint(dense[0], tmp_path, windows, batch=2, **recipe)
    assert 0.9 * target < packed_bytes(tmp_path) <= target
    assert len({layer.density for layer in report.layers}) > 3
    with pytest.raises(ValueError, match="MB at density 0.04 and .* the target leaves"):
        compression.compress_checkpoint(
            dense[0], tmp_path / "small", windows, **recipe | {"target_bytes": 1000}
        )


@pytest.mark.once
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "given", "pattern": "2:4"}, "method 'given' packs the zeros that are there"),
        ({"pattern": "2:4", "target_bytes": 9}, "pattern '2:4' says how many weights stay"),
        ({"values": "int4"}, "values must be None or one of int8"),
        ({"budget": "all"}, "budget must be one of uniform, sensitivity"),
        ({"rules": (dsf_jax.Rule("layers/9/.*"),)}, "matches no layer"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(dense, windows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compression.compress_checkpoint(dense[0], tmp_path / "out", windows, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method, values", [("wanda", None), ("dsf", "int8")])
def test_sizes_are_foreseen(method, values):
    recipe = Recipe(method=method, values=values, encoding="delta4")
    sizes = PackedSizes(recipe, jnp.float16)
    matrices = sizes._matrices((128, 192), method, 0.4)
    assert sum(nonzeros for *_, nonzeros in matrices) <= 0.4 * 128 * 192
    rng, found = np.random.default_rng(1), 0
    for rows, cols, nonzeros in matrices:
        kept = rng.permutation(rows * cols).reshape(rows, cols) < nonzeros
        found += macko_jax.compress(kept.astype(np.float16), dtype=values, encoding="delta4").nbytes
    np.testing.assert_allclose(sizes.layer((128, 192), method, 0.4), found, rtol=0.02)


@pytest.mark.slow
def test_scripts_compress_and_evaluate(tmp_path):
    save_model(tmp_path / "dense", vocab_size=256, num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text("def read(path):\n    return open(path).read()\n" * 20)
    out = tmp_path / "packed"
    compressed = run(
        "compress_llm",
        f"--checkpoint={tmp_path / 'dense'} --out={out} --method=magnitude",
        f"--density=0.4 --calibration={text} --windows=3 --length=32",
    )
    assert "[4/4] layers/0/mlp/down 32 x 32" in compressed.stdout
    assert "packed model:" in compressed.stdout
    found = tmp_path / "found.json"
    run(
        "evaluate",
        f"--checkpoint={tmp_path / 'dense'} --checkpoint={out} --pruned --text={text}",
        f"--length=32 --eval_windows=4 --out={found} --against={tmp_path / 'dense'}",
    )
    results = json.loads(found.read_text())["results"]
    itself, other, _ = (result["agreement"] for result in results)
    assert itself["same_likeliest"] == 1 and abs(itself["overlap"] - 1) < 1e-5
    assert abs(itself["divergence"]) < 1e-5 < other["divergence"] and other["overlap"] < 1
    assert [result["kind"] for result in results] == ["dense", "packed", "pruned"]
    dense, packed, pruned = (result["perplexity"] for result in results)
    assert abs(packed / pruned - 1) < 1e-4 < abs(dense / pruned - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument, message",
    [
        ("--density=0", "--density=0.0: the share of weights that stay is in (0, 1]"),
        ("--length=0", "--length=0"),
        ("--length=65", "--length=65 exceeds the model's 64 positions"),
    ],
)
def test_script_refuses(dense, tmp_path, argument, message):
    out = tmp_path / "packed"
    arguments = f"--checkpoint={dense[0]}", f"--out={out}", argument
    done = run("compress_llm", *arguments, check=False)
    assert done.returncode and message in done.stderr and not out.exists()


def test_sizes_and_rules_are_read():
    assert [cli.read_size(text) for text in ("90MB", "1.5 gb", "64MiB", "100")] == [
        90_000_000,
        1_500_000_000,
        2**26,
        100,
    ]
    assert cli.read_rule(".*/down density=0.3 method=admm") == dsf_jax.Rule(
        ".*/down", density=0.3, method="admm"
    )
    assert cli.read_rule("layers/0/.* skip").skip
    for read, text in ((cli.read_size, "90 apples"), (cli.read_rule, "x densty=0.3")):
        with pytest.raises(ValueError, match=text.split()[-1]):
            read(text)


def test_short_texts_are_refused():
    with pytest.raises(ValueError, match="has 3 tokens; a window takes 4"):
        compression.calibration_windows([1, 2, 3], 4, 2)
    spread = compression.calibration_windows(np.arange(10), 4, 3)
    assert spread.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
