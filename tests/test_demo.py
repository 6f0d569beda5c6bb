"""The scripts around the language model, run as a user runs them, and the model that is shipped."""

import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples import llama, stdlib_text
from examples.benchmarks import timing
from examples.llama import checkpoint, evaluation
from examples.llama import tokenizer as tokenizers
from tests.scripts import run

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = ROOT / "examples" / "llama" / "checkpoint"
DATA = ROOT / "tests" / "data" / "llama"
# Two pairs of layers share their shapes, and so programs.
BYTE_CONFIG = llama.Config(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("byte_model")
    model = llama.Llama(BYTE_CONFIG, rngs=nnx.Rngs(0))
    checkpoint.save(directory, model, jnp.bfloat16, extra={"bos_token_id": 0})
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(pathlib.Path(__file__).read_bytes())
    return path


@pytest.mark.slow
def test_shipped_model_predicts_held_out_text():
    record = json.loads((SHIPPED / "record.json").read_text())
    assert record["held_out_bits_per_byte"] <= 1.25
    assert set(record["held_out_modules"]) == set(stdlib_text.HELD_OUT)
    assert 6e6 <= record["parameters"] <= 10e6
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 20e6
    model = checkpoint.load(SHIPPED)
    tokens = stdlib_text.join(stdlib_text.read_modules().values())
    # A sample of the windows whose full count is in the record.
    options = record["windowing"] | {"batch": 2, "limit": 4}
    bits = evaluation.bits_per_token(model, tokens, **options)
    assert bits < 1.25


def test_held_out_modules_and_their_tests_are_not_trained_on(tmp_path):
    names = [
        "heapq.py",
        "test/test_heapq.py",
        "test/test_csv/extra.py",
        "csvlike.py",
        "json/a.py",
        "site-packages/x.py",
        "copy_of_json_a.py",
    ]
    for i, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        number = names.index("json/a.py") if name == "copy_of_json_a.py" else i
        path.write_text("\n".join(f"line {number} {j} of a file" for j in range(9)))
    found = {str(path) for path, _ in stdlib_text.training_documents([tmp_path])}
    assert found == {"copy_of_json_a.py", "csvlike.py"}


def test_missing_library_sources_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="--text=FILE"):
        stdlib_text.read_modules(library=tmp_path)


@pytest.mark.slow
def test_demo(byte_model, text, tmp_path):
    out = tmp_path / "out"
    methods = ("wanda",)
    done = run(
        "demo",
        f"--checkpoint={byte_model} --text={text} --calibration={text} --density=0.5",
        f"--eval_windows=4 --new_tokens=8 --windows=2 --out={out} --prompt='import '",
        *(f"--method={method}" for method in methods),
    )
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["dense", *methods]
    dense, *compressed = results["rows"]
    for row in compressed:
        assert row["megabytes"] < dense["megabytes"]
        assert row["density"] <= 0.5
        assert row["agreement"] <= 1e-4
        assert len(row["continuation"].encode()) >= 8
        assert f"{row['method']} " in done.stdout and f"{row['bits_per_byte']:.4f}" in done.stdout
        # What was saved is what was evaluated.
        tokens = stdlib_text.join([text.read_bytes()])
        loaded = checkpoint.load_packed(row["checkpoint"])
        bits = evaluation.bits_per_token(loaded, tokens, length=64, stride=32, batch=4, limit=4)
        assert bits == pytest.approx(row["bits_per_byte"], rel=1e-5)
    assert str(out) in done.stdout

    generated = run(
        "generate", f"--checkpoint={out / 'wanda-0.5'} --prompt='import ' --new_tokens=9 --chunk=4"
    )
    assert generated.stdout.startswith("import ") and "[9 tokens in" in generated.stdout
    evaluated = run(
        "evaluate", f"--checkpoint={out / 'wanda-0.5'} --text={text} --eval_windows=4 --length=64"
    )
    assert f"{compressed[0]['bits_per_byte']:.3f}"[:4] in evaluated.stdout


@pytest.mark.slow
def test_compare_methods(byte_model, text, tmp_path):
    out = tmp_path / "methods.json"
    run(
        "benchmarks.compare_methods",
        f"--checkpoint={byte_model} --text={text} --eval_windows=2",
        f"--calibration={text} --windows=2 --method=magnitude --density=0.5",
        f"--density=0.25 --values=stored --values=int8 --bits=8 --bits=3 --out={out}",
    )
    record = json.loads(out.read_text())
    rows = {
        (row["method"], row.get("bits") or row["asked_density"]): row
        for row in record["rows"]
        if row.get("values") != "int8"
    }
    eight = {row["asked_density"]: row for row in record["rows"] if row.get("values") == "int8"}
    assert rows["magnitude", 0.25]["bytes"] < rows["magnitude", 0.5]["bytes"]
    for density, row in eight.items():
        full = rows["magnitude", density]
        assert row["bytes"] < full["bytes"] and row["nonzeros"] == full["nonzeros"]
        assert abs(row["bits_per_byte"] - full["bits_per_byte"]) < 0.01
    assert sorted(eight) == [0.25, 0.5]
    assert rows["rtn", 8]["bytes"] < record["dense"]["bytes"]
    assert rows["rtn", 3]["bytes"] == rows["gptq", 3]["bytes"]
    for bits in (8, 3):
        error, best = (rows[method, bits]["mean_relative_error"] for method in ("rtn", "gptq"))
        assert best < 0.8 * error < 0.1
    table = out.with_suffix(".csv").read_text().splitlines()
    assert len(table) == 9 and table[2].startswith("magnitude,0.5,,int8,")


@pytest.mark.slow
def test_generate_reads_a_tokenizer_and_batches(tmp_path):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(DATA / "tokenizer.json"))
    config = llama.Config(**(vars(BYTE_CONFIG) | {"vocab_size": tokenizer.get_vocab_size()}))
    model = llama.Llama(config, rngs=nnx.Rngs(0))
    checkpoint.save(tmp_path, model, jnp.float32, extra={"eos_token_id": 2})
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        tokenizers.load_tokenizer(tmp_path, config.vocab_size)
    shutil.copy(DATA / "tokenizer.json", tmp_path)
    loaded = tokenizers.load_tokenizer(tmp_path, config.vocab_size)
    assert loaded.decode(loaded.encode("def grüße(x):")) == "def grüße(x):"
    assert loaded.stop_tokens == {2}
    with pytest.raises(ValueError, match="has 5 tokens"):
        tokenizers.load_tokenizer(tmp_path, 5).encode("def")
    done = run(
        "generate",
        f"--checkpoint={tmp_path} --prompt='def ' --prompt='import os' --new_tokens=5",
        f"--temperature=1 --top_k=10 --top_p=0.9 --draft={tmp_path} --draft_tokens=2",
    )
    assert "--- def " in done.stdout and "--- import os" in done.stdout
    assert "cycles of 2 drafted tokens gave" in done.stdout and "accepted 1.00" in done.stdout


@pytest.mark.slow
def test_benchmark_spmv_and_its_figure(tmp_path, monkeypatch):
    # Two copies of each matrix are timed like two dozen, each of which is compiled.
    monkeypatch.setitem(timing.ROTATION, "cpu", (150e6, 2))
    out = tmp_path / "spmv"
    run(
        "benchmarks.benchmark_spmv",
        f"--shape=64x96 --density=0.5 --batch=1 --repeats=2 --out={out}",
        *(f"--implementation={name}" for name in ("macko", "dense", "bcoo")),
    )
    records = json.loads(out.with_suffix(".json").read_text())["records"]
    assert len(records) == 3 and all(r["speedup"] > 0 for r in records)
    assert out.with_suffix(".csv").read_text().count("\n") == 4
    figure = tmp_path / "spmv.png"
    run("benchmarks.plot_results", f"--record={out}.json", f"--out={figure}")
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_benchmark_decode(tmp_path):
    out = tmp_path / "record.json"
    done = run(
        "benchmarks.benchmark_decode",
        "--config=tiny --layers=1 --density=1 --density=0.5 --new_tokens=8 --chunk=4 --repeats=2",
        "--prompt_tokens=16 --dtype=float32 --pairs --values=int8 --encoding=bitmask",
        f"--tensor_parallel=2 --out={out}",
    )
    record = json.loads(out.read_text())
    sparse, dense = record["results"]
    assert (sparse["density"], dense["density"]) == (0.5, 1.0)
    assert sparse["weight_bytes"] < dense["weight_bytes"]
    assert sparse["tokens_per_second"] > 0 and "of dense" in done.stdout


@pytest.mark.slow
def test_benchmark_draft(tmp_path):
    out = tmp_path / "record.json"
    run(
        "benchmarks.benchmark_draft",
        f"--config=tiny --layers=1 --new_tokens=17 --repeats=1 --draft_tokens=2 --out={out}",
        "--acceptance=0 --acceptance=1 --draft_values=stored",
    )
    record = json.loads(out.read_text())
    never, always = record["rows"]
    assert (never["tokens_of_a_cycle"], always["tokens_of_a_cycle"]) == (1, pytest.approx(8 / 3))
    assert min(never["tokens_per_second"], always["of_alone"]) > 0
    assert record["bytes"]["draft, what is its own"] < record["bytes"]["model"]


@pytest.mark.slow
def test_benchmark_decode_names_checkpoints(byte_model, tmp_path):
    done = run(
        "benchmarks.benchmark_decode",
        f"--checkpoint={byte_model} --new_tokens=4 --chunk=4 --repeats=1",
        f"--prompt_tokens=16 --out={tmp_path / 'record.json'}",
    )
    table = done.stdout[done.stdout.index("density  tokens/s") :].splitlines()
    assert table[0].endswith("  checkpoint") and table[1].endswith(f"  {byte_model}")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of calls on a CPU")
def test_calls_on_a_cpu_are_timed_one_by_one():
    class Decoder:
        def draw(self):  # as on a CPU, where a call runs while it is queued
            for _ in range(3):
                time.sleep(0.1)
                yield 0

    assert timing.time_generations(Decoder(), repeats=1).min() > 0.09


@pytest.mark.slow
def test_training_learns_and_records(tmp_path):
    rng = np.random.default_rng(0)
    corpus = tmp_path / "corpus.npz"
    # Text of four letters: two bits a byte are within reach, and soon.
    letters = rng.choice(np.frombuffer(b"abcd", np.uint8), 5000)
    np.savez(corpus, train=letters, held_out=letters[:500], libraries=["none"])
    out = tmp_path / "lm"
    run(
        "train_lm",
        f"--corpus={corpus} --out={out} --steps=60 --chunk=20 --batch=4 --length=32",
        "--hidden=32 --intermediate=32 --layers=1 --heads=2 --kv_heads=1",
        "--head_dim=16 --warmup=5 --learning_rate=0.01",
    )
    record = json.loads((out / "record.json").read_text())
    assert record["steps"] == 60 and len(record["curve_bits_per_byte"]) == 3
    assert record["held_out_bits_per_byte"] < 3
    assert checkpoint.load(out).config.max_position_embeddings == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("demo", ["--density=1.5"], "density"),
        ("demo", ["--checkpoint=nowhere"], "nowhere/config.json is missing"),
        ("demo", [f"--checkpoint={DATA / 'llama3'}"], "96 tokens"),
        ("evaluate", ["--eval_windows=-1"], "eval_windows"),
        ("evaluate", ["--length=0"], "length"),
        (
            "benchmarks.benchmark_decode",
            ["--prompt_tokens=900", "--new_tokens=256"],
            "1024 positions of tiny",
        ),
    ],
)
def test_scripts_refuse(script, arguments, message):
    done = run(script, *arguments, check=False)
    assert done.returncode == 1 and message in done.stderr
