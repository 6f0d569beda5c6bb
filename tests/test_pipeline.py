"""Whole models: order, budgets, resume, devices and processes, errors."""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from dsf_jax import (
    Calibration,
    Execution,
    FactorPair,
    Rule,
    compress_model,
    gram_matrices,
    pack,
    prune,
    relative_output_error,
)
from dsf_jax.pipeline.allocation import allocate_densities
from dsf_jax.pipeline.pace import Pace, Task, compile_seconds
from dsf_jax.pipeline.plan import plan_layers
from dsf_jax.pipeline.report import format_seconds
from dsf_jax.pipeline.solve import METHODS, Assignment
from dsf_jax.trace.calibration import CalibrationPass
from dsf_jax.trace.network import read_network
from macko_jax import decompress

# Factorizations compile for seconds per shape, so the tests have them of 16 x 32 matrices only, and
# of few rounds: how good they are is tested elsewhere.
PAIR = dict(method="dsf-published", options=dict(search_rounds=4))
PRUNED = dict(method="wanda", density=0.5)
MIXED = PRUNED | dict(rules=[Rule("down", **PAIR)])


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Net(nnx.Module):
    """An attention block and a gated MLP with a head: four stages of layers."""

    def __init__(self, size=16, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.embed = nnx.Embed(20, size, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, size, decode=False, rngs=rngs)
        self.gate = nnx.Linear(size, 2 * size, rngs=rngs)
        self.up = nnx.Linear(size, 2 * size, rngs=rngs)
        self.down = nnx.Linear(2 * size, size, rngs=rngs)
        self.head = nnx.Linear(size, 20, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        return self.head(x + self.down(nnx.silu(self.gate(x)) * self.up(x)))


LAYERS = [
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/out",
    "gate",
    "up",
    "down",
]


def token_batches(count=3, shape=(4, 9)):
    return [np.random.default_rng(i).integers(0, 20, shape) for i in range(count)]


def kernels(model):
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value) for path, value in state}


def assert_same(a, b):
    a, b = kernels(a), kernels(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.slow
def test_every_layer_is_calibrated_on_the_outputs_of_the_compressed_ones():
    model = nnx.Sequential(
        nnx.Linear(16, 32, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(32, 16, rngs=nnx.Rngs(1)),
        nnx.relu,
        nnx.Linear(16, 16, rngs=nnx.Rngs(2)),
    )
    batches = [draw(i, 16, 16) for i in range(3)]
    new, report = compress_model(model, batches, method="wanda", density=0.5)
    assert [layer.path for layer in report.layers] == ["layers/0", "layers/2", "layers/4"]
    partly = nnx.clone(model)
    for i in (0, 2, 4):
        gram = gram_matrices(partly, batches)[f"layers/{i}"]
        weight = partly.layers[i].kernel[...].T
        expected = prune(weight, gram, density=0.5, method="wanda")
        np.testing.assert_allclose(new.layers[i].kernel[...].T, expected, rtol=1e-4, atol=1e-5)
        error = next(layer.error for layer in report.layers if layer.path == f"layers/{i}")
        assert error == pytest.approx(
            float(relative_output_error(weight, expected, gram)), rel=1e-3
        )
        partly.layers[i].kernel[...] = expected.T


@pytest.mark.slow
def test_given_gram_matrices_are_those_of_one_pass():
    model, batches = Net(), token_batches()
    call = dict(calibration=Calibration("one-pass"), method="wanda", density=0.5)
    expected = compress_model(model, batches, **call).model
    grams = gram_matrices(model, batches)
    seen = []

    def one_pass(grams):
        return call | dict(calibration=Calibration("one-pass", grams=grams))

    found = compress_model(model, batches[:1], callback=seen.append, **one_pass(grams))
    assert_same(found.model, expected)
    assert [layer.path for layer in found.report.layers] == LAYERS
    assert {progress.layer.path for progress in seen} == set(LAYERS)
    with pytest.raises(ValueError, match="need mode='one-pass', got 'sequential'"):
        Calibration(grams=grams)
    del grams["gate"]
    with pytest.raises(ValueError, match="layer 'gate': grams lacks it"):
        compress_model(model, batches, **one_pass(grams))
    with pytest.raises(ValueError, match="layer 'gate': its Gram matrix must be"):
        compress_model(model, batches, **one_pass(grams | {"gate": np.eye(3)}))


@pytest.mark.slow
def test_layers_of_one_shape_are_factorized_together(monkeypatch):
    model, batches = Net(), token_batches()
    call = dict(
        calibration=Calibration("one-pass"),
        density=0.5,
        rules=[Rule("attention/.*", skip=True), Rule("down", skip=True)],
        **PAIR,
    )
    alone = compress_model(model, batches, **call).report
    monkeypatch.setattr("dsf_jax.pipeline.run.stack_limit", lambda *_: 2)
    together = compress_model(model, batches, **call).report
    assert [layer.path for layer in together.layers] == ["gate", "up"]
    for a, b in zip(together.layers, alone.layers):
        assert (a.path, a.shape, a.inner) == (b.path, b.shape, b.inner)
        assert a.nonzeros <= 0.5 * 16 * 32
        assert a.error == pytest.approx(b.error, rel=0.05)


@pytest.mark.slow
def test_stages_budgets_report_and_the_model_left_alone():
    model, batches = Net(), token_batches()
    before = kernels(model)
    seen = []
    new, report = compress_model(model, batches, method="wanda", density=0.3, callback=seen.append)
    assert sorted(layer.path for layer in report.layers) == sorted(LAYERS)
    assert report.stages == 4
    assert report.skipped == {"embed": "an embedding", "head": "the output head"}
    for layer in report.layers:
        assert layer.nonzeros == int(0.3 * np.prod(layer.shape))
        assert 0 < layer.error < 1
    assert report.density <= 0.3
    for path, value in kernels(model).items():
        np.testing.assert_array_equal(value, before[path])
    np.testing.assert_array_equal(new.head.kernel[...], model.head.kernel[...])
    assert [progress.index for progress in seen] == list(range(1, 8))
    assert seen[-1].seconds_left == 0 and all(p.total == 7 for p in seen)
    assert "7/7" in str(seen[-1])
    loaded = json.loads(report.to_json())
    assert loaded["nonzeros"] == sum(layer["nonzeros"] for layer in loaded["layers"])
    table = str(report)
    assert all(path in table for path in (*LAYERS, "embed", "an embedding", "the output head"))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert report.bytes_before == report.bytes_after == nbytes
    assert {entry.path: entry.shape for entry in report.others} == {
        "embed": (20, 16),
        "head": (20, 16),
    }


@pytest.mark.slow
def test_dense_target_makes_up_for_the_layers_before():
    model, batches, unseen = Net(), token_batches(40), token_batches(50)[40:]
    call = dict(method="sparsegpt", density=0.5)

    def change(new):
        return sum(float(jnp.sum((new(b) - model(b)) ** 2)) for b in unseen)

    layer = change(compress_model(model, batches, **call).model)
    assert (
        change(
            compress_model(model, batches, calibration=Calibration(target="dense"), **call).model
        )
        < 0.9 * layer
    )


@pytest.mark.slow
def test_where_activations_wait_does_not_matter():
    model, batches = Net(), [*token_batches(2), *token_batches(1, (2, 5))]
    call = dict(method="sparsegpt", density=0.5)
    expected = kernels(compress_model(model, batches, **call).model)
    for keep in ("host", "nowhere"):
        execution = Execution(keep_activations=keep)
        found = kernels(compress_model(model, batches, execution=execution, **call).model)
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_are_calibrated_together():
    model, batches = Net(), token_batches()
    rules = dict(method="sparsegpt", density=0.5)
    new, report = compress_model(
        model, batches, calibration=Calibration(blocks="attention"), **rules
    )
    assert report.stages == 3
    # The output projection saw the dense attention.
    gram = gram_matrices(model, batches)["attention/out"]
    weight = model.attention.out.kernel[...].reshape(16, 16).T
    np.testing.assert_allclose(
        new.attention.out.kernel[...].reshape(16, 16).T,
        prune(weight, gram, density=0.5, method="sparsegpt"),
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="blocks='nothing'"):
        compress_model(model, batches, calibration=Calibration(blocks="nothing"), **rules)


@pytest.mark.slow
def test_rules():
    model, batches = Net(), token_batches()
    _, report = compress_model(
        model,
        batches,
        method="wanda",
        density=0.5,
        rules=[
            Rule("attention/out", skip=True),
            Rule("attention/.*", density=0.25, method="magnitude"),
            Rule("head", density=0.75),
            Rule("embed"),
            Rule("gate|up", options={"pattern": "2:4"}),
        ],
    )
    by_path = {layer.path: layer for layer in report.layers}
    assert report.skipped == {"attention/out": "rule 'attention/out'"}
    assert by_path["attention/query"].nonzeros == 16 * 16 // 4
    assert by_path["attention/query"].method == "magnitude"
    assert by_path["head"].nonzeros == 240 and by_path["embed"].nonzeros == 160
    assert by_path["down"].method == "wanda"


@pytest.mark.slow
def test_models_are_packed_with_the_8_bit_values_that_were_found():
    model = Net()
    for layer in (model.up, model.down):
        layer.kernel.set_value(layer.kernel[...].astype(jnp.float16))
    rules = [Rule("down", **PAIR), "up"]
    options = dict(method="wanda", rules=[*rules, Rule(".*", skip=True)])
    found = compress_model(model, token_batches(1), values="int8", **options)
    packed, _ = pack(found.model, values="int8")
    layers = {
        "up": (packed.up, found.model.up),
        "left": (packed.down.left, found.model.down.left),
        "right": (packed.down.right, found.model.down.right),
    }
    for name, (stored, layer) in layers.items():
        assert stored.matrix.values.dtype == np.int8, name
        np.testing.assert_array_equal(decompress(stored.matrix), layer.kernel[...].T, name)
    plain = compress_model(model, token_batches(1), **options).report
    for layer, before in zip(found.report.layers, plain.layers):
        assert layer.error != before.error and layer.nonzeros <= before.nonzeros
        assert layer.error < 1.1 * before.error, layer.path
    with pytest.raises(ValueError, match="values must be None or one of int8, float8_e4m3fn"):
        compress_model(model, token_batches(1), values="int4")


@pytest.mark.slow
def test_sensitivity_lowers_the_sum_of_errors_within_the_budget():
    model, batches = Net(), token_batches()
    # Two layers have fewer non-zeros than density 0.5 leaves them; the others can use the rest.
    for layer in (model.gate, model.up):
        layer.kernel[...] = prune(layer.kernel[...], density=0.25)
    uniform = compress_model(model, batches, method="wanda", density=0.5)
    shared = compress_model(model, batches, method="wanda", density=0.5, budget="sensitivity")
    assert shared.report.nonzeros <= 0.5 * (4 * 16 * 16 + 3 * 16 * 32)

    def total_error(report):
        return sum(layer.error for layer in report.layers)

    assert total_error(shared.report) < 0.8 * total_error(uniform.report)
    # A density that a rule names is not touched.
    fixed = compress_model(
        model,
        batches,
        method="wanda",
        density=0.5,
        budget="sensitivity",
        rules=[Rule("down", density=0.2)],
    ).report
    assert next(layer for layer in fixed.layers if layer.path == "down").nonzeros == int(
        0.2 * 16 * 32
    )


def test_allocation_meets_the_budget_and_is_best_among_the_probed():
    d = np.array([0.2, 0.5, 0.8])
    curves = {"steep": (d, np.array([0.9, 0.3, 0.0])), "flat": (d, np.array([0.2, 0.1, 0.05]))}
    sizes = {"steep": 100, "flat": 100}
    found = allocate_densities(curves, sizes, 0.5)
    assert found == pytest.approx({"steep": 0.8, "flat": 0.2})
    # A bump in a curve is not stopped at.
    curves["steep"] = (d, np.array([0.9, 0.9, 0.0]))
    assert allocate_densities(curves, sizes, 0.5) == pytest.approx({"steep": 0.8, "flat": 0.2})


@pytest.mark.slow
def test_linen_model_and_forward():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(8)(x))
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(4, name="head")(nn.relu(nn.Dense(8, name="middle")(x)))

    module, x = Model(), draw(0, 32, 6)
    variables = module.init(jax.random.key(0), x, train=False)
    new, report = compress_model(
        module,
        [x],
        variables=variables,
        method="wanda",
        density=0.5,
        forward=lambda bound, x: bound(x, train=False),
    )
    assert [layer.path for layer in report.layers] == ["Dense_0", "middle"]
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    assert int(jnp.count_nonzero(new["params"]["middle"]["kernel"])) == 32
    assert module.apply(new, x, train=False).shape == (32, 4)


class Killed(Exception):
    pass


def kill_after(count):
    def callback(progress):
        if progress.index == count:
            raise Killed

    return callback


@pytest.mark.slow
def test_resume_after_being_killed(tmp_path):
    model, batches = Net(), token_batches()
    call = dict(method="sparsegpt", density=0.5)
    expected = compress_model(model, batches, **call).model
    call["execution"] = Execution(work_dir=tmp_path)
    with pytest.raises(Killed):
        compress_model(model, batches, callback=kill_after(5), **call)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    # The fifth layer's stage was solved as a whole.
    assert 5 <= len(files) < 7
    new, report = compress_model(model, batches, **call)
    assert sum(layer.resumed for layer in report.layers) == len(files)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in files.items())
    assert_same(new, expected)
    # A third run solves nothing.
    again, report = compress_model(model, batches, **call)
    assert all(layer.resumed for layer in report.layers)
    assert_same(again, expected)


@pytest.mark.slow
def test_damaged_file_is_solved_again_and_foreign_results_are_refused(tmp_path):
    model, batches = Net(), token_batches()
    call = dict(method="wanda", density=0.5, execution=Execution(work_dir=tmp_path))
    expected = compress_model(model, batches, **call).model
    victim, piped = sorted(tmp_path.iterdir())[2:4]
    victim.write_bytes(victim.read_bytes()[:-7])
    piped.unlink()
    os.mkfifo(piped)
    with pytest.warns(UserWarning, match="damaged"):
        new, report = compress_model(model, batches, **call)
    assert [layer.resumed for layer in report.layers].count(False) == 2
    assert_same(new, expected)
    flipped = bytearray(victim.read_bytes())
    flipped[-1] ^= 1
    victim.write_bytes(flipped)
    with pytest.warns(UserWarning, match="does not match its checksum"):
        assert_same(compress_model(model, batches, **call).model, expected)
    for change in (
        dict(density=0.6),
        dict(method="magnitude"),
        dict(calibration=Calibration("one-pass")),
    ):
        with pytest.raises(ValueError, match="another run"):
            compress_model(model, batches, **{**call, **change})
    with pytest.raises(ValueError, match="another run"):
        compress_model(model, token_batches(2), **call)
    with pytest.raises(ValueError, match="another run"):
        compress_model(Net(rngs=nnx.Rngs(5)), batches, **call)


@pytest.mark.slow
def test_pairs_survive_a_resume_and_are_packed(tmp_path):
    model, batches = Net(), token_batches()
    expected, report = compress_model(
        model, batches, execution=Execution(work_dir=tmp_path), **MIXED
    )
    assert [layer.path for layer in report.layers if layer.inner] == ["down"]
    again, report = compress_model(model, batches, execution=Execution(work_dir=tmp_path), **MIXED)
    assert all(layer.resumed for layer in report.layers)
    assert_same(again, expected)
    packed, report = pack(again)
    assert {layer.path for layer in report.packed} == set(LAYERS)
    run = nnx.jit(lambda model, tokens: model(tokens))
    found, wanted = run(packed, batches[0]), run(expected, batches[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "one-pass"])
def test_spread_over_devices_equals_single(mode):
    if len(jax.devices()) < 2:
        pytest.skip("one device only; tests/conftest.py makes several of the CPU")
    model, batches = Net(), token_batches(5)
    call = dict(calibration=Calibration(mode), **MIXED)
    expected = compress_model(model, batches, **call)
    found = compress_model(model, batches, execution=Execution(devices=jax.devices()), **call)
    assert_same(found.model, expected.model)
    for a, b in zip(found.report.layers, expected.report.layers):
        assert (a.path, a.error, a.nonzeros) == (b.path, b.error, b.nonzeros)


WORKER = """
import sys
import jax
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from dsf_jax import Execution, compress_model
from tests.test_pipeline import PRUNED, Net, kernels, token_batches
assert jax.process_count() == 2 and len(jax.devices()) == 4
call = dict(execution=Execution(devices=jax.devices(), work_dir=sys.argv[3]), **PRUNED)
new, report = compress_model(Net(), token_batches(), **call)
np.savez(f"{sys.argv[3]}/result{sys.argv[2]}.npz", **kernels(new))
again, report = compress_model(Net(), token_batches(), **call)
assert all(layer.resumed for layer in report.layers)
from tests.test_sharded import check_over_processes
check_over_processes(sys.argv[3] + "/shards" + sys.argv[2])
"""


@pytest.mark.slow
def test_spread_over_processes_equals_single(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    root = pathlib.Path(__file__).parents[1]
    # With the flags of this process otherwise: only the same compiler gives the same bits.
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(root), XLA_FLAGS=flags)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(i), str(tmp_path)],
            cwd=root,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-3000:]
    expected = kernels(compress_model(Net(), token_batches(), **PRUNED).model)
    for i in range(2):
        with np.load(tmp_path / f"result{i}.npz") as found:
            assert set(found.files) == set(expected)
            for path, value in expected.items():
                np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.once
def test_nothing_is_silently_nan():
    model, batches = Net(), token_batches()
    model.up.kernel[...] = model.up.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="layer 'up': its weights"):
        compress_model(model, batches, method="wanda")
    model = Net()
    model.attention.out.bias[...] = jnp.full(16, jnp.inf)
    with pytest.raises(ValueError, match="layer '(gate|up)': its inputs"):
        compress_model(model, batches, method="wanda")


def test_a_rule_with_another_method_inherits_the_options_that_both_take():
    options = {"precision": "high", "seed": 1}
    dense = CalibrationPass(read_network(Net()), token_batches())
    default = Assignment("dsf", 0.5, options)
    rules = [Rule("up", method="admm"), Rule("down", method="dsf-published")]
    plan = plan_layers(dense, rules, default)
    assert plan.assignments["up"] == Assignment("admm", 0.5, {"precision": "high"})
    assert plan.assignments["down"] == Assignment("dsf-published", 0.5, options)


def test_clear_errors():
    model, batches = Net(), token_batches()
    for kwargs, message in [
        (dict(method="wand"), "method must be one of magnitude, wanda"),
        (dict(density=0.0), r"\(0, 1\]"),
        (dict(density=1.5), r"\(0, 1\]"),
        (dict(budget="all"), "budget must be one of"),
        (dict(rules=[Rule("gat")]), "'gat' matches no layer"),
        (dict(rules=[Rule("gate", method="wand")]), "layer 'gate': method must be"),
        (dict(rules=[Rule(".*", skip=True)]), "no layer is left to compress"),
        (
            dict(options={"foo": 1}),
            "layer 'attention/query': options hold 'foo', which method 'wanda' does not take; it "
            "takes pattern, precision",
        ),
        (
            dict(rules=[Rule("up", options={"seed": 1})]),
            "layer 'up': the options of rule 'up' hold 'seed'",
        ),
        (dict(method="dsf", options={"width": 0.5}), "layer 'attention/query': width is inner"),
        (dict(density=0.3, options={"pattern": "2:4"}), "'attention/query': pattern 2:4 has dens"),
        (dict(options={"precision": "exact"}), "layer 'attention/query': precision: "),
    ]:
        with pytest.raises(ValueError, match=message):
            compress_model(model, batches, **{"method": "wanda", **kwargs})
    with pytest.raises(ValueError, match="batches is empty"):
        compress_model(model, [], method="wanda")
    with pytest.raises(TypeError, match="dsf_jax.Rule"):
        compress_model(model, batches, method="wanda", rules=[3])
    with pytest.raises(ValueError, match="regular expression"):
        Rule("(")
    with pytest.raises(TypeError, match=r"'blocs'.*calibration=Calibration\(mode, target, blocks"):
        compress_model(model, batches, blocs=".*")
    with pytest.raises(TypeError, match=r"must be a dsf_jax.Execution"):
        compress_model(model, batches, execution="host")
    with pytest.raises(TypeError, match=r"give target inside calibration=Calibration"):
        compress_model(model, batches, target="dense", calibration=Calibration())


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Calibration("twice"), "mode must be one of sequential, one-pass, got 'twice'"),
        (lambda: Calibration(target="all"), "target must be one of layer, dense"),
        (lambda: Calibration(blocks="("), "no valid regular expression"),
        (lambda: Calibration("one-pass", blocks="a"), "leave it out where mode='one-pass'"),
        (lambda: Execution(keep_activations="disk"), "keep_activations must be one of"),
        (lambda: Execution(devices=[]), "devices is empty"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.once
def test_the_former_spelling_works_with_a_warning(tmp_path):
    model, batches = Net(), token_batches(1)
    call = dict(method="magnitude", density=0.5)
    settings = dict(calibration="one-pass", keep_activations="host", work_dir=tmp_path)
    with pytest.warns(
        DeprecationWarning,
        match=r"calibration=dsf_jax.Calibration\(mode=...\), "
        r"execution=dsf_jax.Execution\(keep_activations=..., work_dir=...\)",
    ) as warned:
        former = compress_model(model, batches, **call, **settings)
    assert warned[0].filename == __file__
    new = compress_model(
        model,
        batches,
        calibration=Calibration("one-pass"),
        execution=Execution(keep_activations="host", work_dir=tmp_path),
        **call,
    )
    assert_same(former.model, new.model)
    assert all(layer.resumed for layer in new.report.layers)


class Heads(nnx.Module):
    """Matrices of 16 x 32: of three kinds that cannot be two factors, and one that can."""

    def __init__(self):
        self.embed = nnx.Embed(16, 32, rngs=nnx.Rngs(0))
        self.per_head = nnx.Einsum("bnd,ndf->bnf", (2, 32, 16), rngs=nnx.Rngs(1))
        self.up = nnx.LoRALinear(32, 16, lora_rank=4, rngs=nnx.Rngs(2))
        self.down = nnx.Einsum("bnd,fnd->bf", (16, 2, 16), rngs=nnx.Rngs(3))

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = self.up(self.per_head(jnp.stack([x, x], 1)).reshape(-1, 32))
        return self.down(jnp.stack([x, x * x], 1))


NO_PAIR = {
    "embed": "its parameter embed/embedding is no kernel of a Flax layer",
    "per_head": "its einsum 'bnd,ndf->bnf' has a matrix for each entry of axis 'n'",
    "up": "LoRALinear has a __call__ of its own",
}
HEADS_RULES = [Rule("embed|down"), Rule("up/.*", skip=True)]


def test_layers_without_two_factors_are_known_before_anything_is_solved():
    dense = CalibrationPass(read_network(Heads()), [np.arange(16)])
    asked = Assignment("dsf", 0.5, {"seed": 1, "precision": "highest"}, "int8")
    plan = plan_layers(dense, HEADS_RULES, asked)
    assert plan.singles == {
        path: f"{reason}: one matrix in place of two" for path, reason in NO_PAIR.items()
    }
    single = Assignment("admm", 0.5, {"precision": "highest"}, "int8")
    assert plan.assignments == {**dict.fromkeys(NO_PAIR, single), "down": asked}
    assert [(entry.path, entry.note) for entry in plan.others] == [
        (f"up/lora/lora_{c}", "rule 'up/.*'") for c in "ab"
    ]


@pytest.mark.slow
def test_layers_without_two_factors_get_the_best_single_matrix():
    new, report = compress_model(Heads(), [np.arange(16)], density=0.5, rules=HEADS_RULES, **PAIR)
    found = {layer.path: layer for layer in report.layers}
    assert found.pop("down").method == "dsf-published" and isinstance(new.down, FactorPair)
    product = jnp.einsum("ndk,kf->fnd", new.down.right.kernel[...], new.down.left.kernel[...])
    kernel = Heads().down.kernel[...]
    assert jnp.linalg.norm(product - kernel) < 0.9 * jnp.linalg.norm(kernel)
    assert found.keys() == NO_PAIR.keys()
    for path, layer in found.items():
        assert layer.method == "admm" and NO_PAIR[path] in layer.note
        assert layer.nonzeros == layer.bytes_before / 8 and layer.note in str(report)


def test_a_layer_that_no_input_reaches_is_pruned_by_magnitude_and_the_report_says_so():
    model = nnx.Sequential(
        nnx.Linear(16, 16, rngs=nnx.Rngs(0)), lambda x: 0 * x, nnx.Linear(16, 16, rngs=nnx.Rngs(1))
    )
    batch = draw(0, 8, 16).at[:, :2].set(0)
    new, report = compress_model(model, [batch], method="sparsegpt", density=0.3)
    expected = prune(model.layers[2].kernel[...], density=0.3, method="magnitude")
    np.testing.assert_array_equal(np.asarray(new.layers[2].kernel[...]) != 0, expected != 0)
    assert [layer.nonzeros for layer in report.layers] == [76, 76]
    dead = "2 of its 16 inputs are zero and keep 0 non-zeros"
    assert report.layers[0].method == f"sparsegpt ({dead})"
    assert report.layers[1].method == "sparsegpt (its inputs are all zero)"
    assert report.layers[1].error > 0.1


class Namer(nnx.Module):
    """A language model whose head is called `to_words`, beside layers called as heads are."""

    def __init__(self, words=24, size=16):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(words, size, rngs=rngs)
        self.output = nnx.Linear(size, size, rngs=rngs)
        self.up = nnx.LoRALinear(size, size, lora_rank=2, rngs=rngs)
        self.to_words = nnx.Linear(size, words, rngs=rngs)
        self.classifier = nnx.Linear(size, 3, rngs=rngs)
        self.score = nnx.Linear(size, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.up(nnx.relu(self.output(x)))
        pooled = x.mean(-2)
        logits = 30 * jnp.tanh(self.to_words(x) / 30)
        return logits, self.classifier(pooled), nnx.softmax(self.score(pooled)), x


@pytest.mark.slow
def test_heads_are_found_by_what_they_make():
    _, report = compress_model(Namer(), [np.arange(16).reshape(2, 8)], method="magnitude")
    head = "the output head"
    assert report.skipped == {
        "classifier": head,
        "embed": "an embedding",
        "to_words": head,
        **dict.fromkeys(["up/lora/lora_a", "up/lora/lora_b"], "an adapter of low rank (LoRA)"),
    }
    assert {layer.path: layer.note for layer in report.layers} == {
        "output": "",
        "up": "",
        "score": "makes an output of the model; Rule('score', skip=True) leaves it as it is",
    }


def run_of_blocks(blocks, *, compile_seconds, rate):
    """For each layer of a transformer its path, task and two times, stage by stage."""
    shapes = [["q", "k", "v"], ["out"], ["gate", "up"], ["down"]]
    sizes = dict(q=(64, 64), k=(16, 64), v=(16, 64), out=(64, 64), gate=(160, 64), up=(160, 64))
    sizes["down"] = (64, 160)
    stages, known = [], set()
    for block in range(blocks):
        for names in shapes:
            stage = {}
            for name in names:
                size = sizes[name]
                work = METHODS["admm"].work(size)
                compiling = 0 if size in known else compile_seconds
                known.add(size)
                times = rate * work + compiling, compiling
                stage[f"{block}/{name}"] = Task("admm", size, work, "cpu"), times
            stages.append(stage)
    return stages


@pytest.mark.once
@pytest.mark.parametrize("compile_seconds", [0.1, 5.0, 60.0])
@pytest.mark.parametrize("blocks", [1, 4, 32])
def test_time_left_is_right_within_a_factor_of_two_from_the_third_layer_on(compile_seconds, blocks):
    stages = run_of_blocks(blocks, compile_seconds=compile_seconds, rate=1e-6)
    passes = [(0.5 + 3.0 * (i < 4), 3.0 * (i < 4)) for i in range(len(stages))]
    pace = Pace([{path: task for path, (task, _) in stage.items()} for stage in stages])
    left = sum(seconds for stage in stages for _, (seconds, _) in stage.values())
    left += sum(seconds for seconds, _ in passes)
    solved = 0
    assert pace.seconds_left() is None
    for stage, (seconds, compiling) in zip(stages, passes):
        pace.calibrated(seconds, compiling)
        left -= seconds
        for path, (_, times) in stage.items():
            pace.solved(path, *times)
            left -= times[0]
            solved += 1
            if solved >= 3 and left > 1e-6:
                assert left / 2 <= pace.seconds_left() <= 2 * left
            assert pace.seconds_left() is not None
    assert pace.seconds_left() == 0


@pytest.mark.once
def test_devices_work_side_by_side_and_resumed_layers_take_no_time():
    tasks = {str(i): Task("wanda", ("shape", i % 2), 10.0, i % 2) for i in range(10)}
    pace = Pace([tasks])
    pace.calibrated(1.0, 0.5)
    for path in "01":
        pace.solved(path, 7.0)
    pace.resumed("2")
    for path in "34":
        pace.solved(path, 2.0)
    # Five are left: two on device 0, and three on device 1.
    assert pace.seconds_left() == pytest.approx(6.0)


@pytest.mark.slow
def test_compilation_is_known_of_every_solution_and_counted_by_thread():
    before = compile_seconds()
    model = nnx.Linear(8, 24, rngs=nnx.Rngs(0))
    _, report = compress_model(model, [draw(0, 4, 8)], method="wanda", density=0.4)
    (layer,) = report.layers
    assert 0 < layer.compile_seconds < layer.seconds
    assert compile_seconds() - before > layer.compile_seconds
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(compile_seconds).result() == 0
    assert compile_seconds(all_threads=True) >= compile_seconds()


@pytest.mark.once
def test_durations_read_well():
    assert [format_seconds(s) for s in (0.4219, 12.3, 200, 1260, 7500)] == [
        "0.42 s",
        "12 s",
        "3 min 20 s",
        "21 min",
        "2 h 5 min",
    ]
