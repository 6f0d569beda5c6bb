"""Refinement: what is trained and what stays, its mathematics, meshes, resuming, and its end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import dsf_jax
import macko_jax
from dsf_jax.refinement import masks, objectives

PAIR = dict(method="dsf-published", options=dict(search_rounds=2))
VOCABULARY, WIDTH = 24, 16


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 32, rngs=rngs)
        self.down = nnx.Linear(32, WIDTH, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return x + scale * self.down(jax.nn.gelu(self.up(self.norm(x)))), "a note"


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens, weights=None):
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x, scale=2.0)
        return self.head(x)


def draw_batches(count, seed=0, shape=(4, 8)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, shape).astype(np.int32) for _ in range(count)]


BATCHES, OTHERS = draw_batches(3), draw_batches(1, seed=1)


@pytest.fixture(scope="module")
def dense():
    model = Net(nnx.Rngs(0))
    state = jax.tree.map(lambda a: 2 * a if a.ndim > 1 else a, nnx.state(model, nnx.Param))
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def pruned(dense):
    return dsf_jax.compress_model(dense, BATCHES, method="wanda", density=0.3)


def leaves(model):
    """The parameters of a model by path, float32."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(x[...], np.float32) for path, x in flat}


def same(one, other):
    one, other = leaves(one), leaves(other)
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


def mean_divergence(dense, model, batches, weights=None):
    p, q = (
        np.concatenate([np.asarray(jax.nn.log_softmax(m(b)), np.float64) for b in batches])
        for m in (dense, model)
    )
    each = np.sum(np.exp(p) * (p - q), axis=-1)
    return np.average(each, weights=weights)


def test_distillation_lowers_the_divergence_and_moves_what_it_should(dense, pruned):
    seen = []
    refined, report = dsf_jax.refine(
        pruned.model,
        BATCHES,
        teacher=dense,
        steps=30,
        learning_rate=3e-3,
        held_out=OTHERS,
        callback=seen.append,
    )
    before, after = leaves(pruned.model), leaves(refined)
    for path, old in before.items():
        assert (after[path] == 0)[old == 0].all() or path.endswith("bias"), path
        stays = path.startswith(("embed", "head"))
        assert (after[path] == old).all() == stays, path
    assert report.nonzeros[0] == report.nonzeros[1] == pruned.report.nonzeros
    # What is reported is what others would measure, and it falls by more than half.
    start, end = (mean_divergence(dense, m, OTHERS) for m in (pruned.model, refined))
    np.testing.assert_allclose(
        [x for _, x in report.held_out][:: len(report.held_out) - 1], [start, end], rtol=1e-4
    )
    losses = [mean_divergence(dense, m, BATCHES) for m in (pruned.model, refined)]
    assert losses[1] < 0.5 * losses[0]
    assert len(report.losses) == report.steps == 30
    assert [p.step for p in seen] == [5, 10, 15, 20, 25, 30] and seen[-1].seconds_left == 0
    assert json.loads(json.dumps(report.to_dict()))["losses"][0] == report.losses[0]
    assert "30 steps" in str(report) and "[5/30] loss" in str(seen[0])


def test_loss_is_the_weighted_mean_of_divergences_and_has_their_gradient():
    rng = np.random.default_rng(0)
    teacher, student = (jnp.asarray(rng.normal(size=(6, 9)), jnp.float32) * 3 for _ in range(2))
    weights = jnp.asarray([0, 1, 2, 0.5, 1, 0])
    teacher = teacher.at[0].set(jnp.nan)  # of a token that does not count

    def plain(student, tau=2.0):
        p, q = (jax.nn.log_softmax(x[1:] / tau) for x in (teacher, student))
        return tau**2 * jnp.sum(weights[1:] * jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    def ours(student):
        return objectives.divergence(teacher, student, weights, 2.0)

    for one, other in zip(jax.value_and_grad(ours)(student), jax.value_and_grad(plain)(student)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "target, relative_to",
    [pytest.param("prefix", "batch", marks=pytest.mark.once), ("dense", "token")],
)
def test_blocks_come_nearer_to_the_dense_blocks(dense, pruned, target, relative_to):
    refined, report = dsf_jax.refine(
        pruned.model,
        BATCHES,
        teacher=dense,
        stage="block",
        steps=20,
        learning_rate=3e-3,
        target=target,
        relative_to=relative_to,
    )
    assert [block.path for block in report.blocks] == ["layers/0", "layers/1"]
    assert all(block.after < block.before for block in report.blocks)
    # The error that is reported of the second block is that of its input from the first, refined.
    second = lambda model, x: np.asarray(model.layers[1](x, scale=2.0)[0], np.float64)
    x, own = (
        np.concatenate([m.layers[0](m.embed(b), scale=2.0)[0] for b in BATCHES])
        for m in (refined, dense)
    )
    wanted = second(dense, x if target == "prefix" else own)
    apart, size = (np.sum(a**2, -1) for a in (wanted - second(refined, x), wanted))
    error = apart.sum() / size.sum() if relative_to == "batch" else np.mean(apart / size)
    np.testing.assert_allclose(report.blocks[1].after, error, rtol=1e-3)
    before, after = leaves(pruned.model), leaves(refined)
    assert all((after[k] == 0)[v == 0].all() for k, v in before.items() if "kernel" in k)
    assert report.nonzeros[0] == report.nonzeros[1]


@pytest.mark.once
def test_a_tokens_error_is_relative_to_its_own_size_but_not_to_nothing():
    target = jnp.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [jnp.nan, 1.0]])
    output = target + jnp.asarray([1.0, 0.0])
    weights = jnp.asarray([1.0, 3.0, 1.0, 0.0])
    apart, size = objectives.squared_distance(target, output, weights, "token")
    least = 1e-6 * (25 + 0.25) / 3
    np.testing.assert_allclose([apart, size], [1 / 25 + 3 / 0.25 + 1 / least, 4], rtol=1e-5)


def test_one_block_by_itself(dense, pruned):
    inputs = [dense.embed(batch) for batch in BATCHES]
    forward = lambda block, x: block(x, scale=2.0)
    given = [dense.layers[0](x, scale=2.0)[0] for x in inputs]
    common = dict(forward=forward, steps=10, learning_rate=3e-3)
    block, report = dsf_jax.refine_block(pruned.model.layers[0], dense.layers[0], inputs, **common)
    again, _ = dsf_jax.refine_block(
        pruned.model.layers[0], dense.layers[0], inputs, targets=given, **common
    )
    assert report.blocks[0].after < report.blocks[0].before
    for path, leaf in leaves(block).items():
        np.testing.assert_allclose(leaf, leaves(again)[path], atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("values", ["int8", "float8_e4m3fn"])
def test_trained_values_are_packed_as_they_are(dense, pruned, values):
    refined, report = dsf_jax.refine(
        pruned.model,
        BATCHES,
        teacher=dense,
        steps=10,
        learning_rate=3e-3,
        values=values,
        held_out=OTHERS,
    )
    # The loss is that of the rounded model.
    np.testing.assert_allclose(
        report.held_out[-1][1], mean_divergence(dense, refined, OTHERS), rtol=1e-4
    )
    for layer in pruned.report.layers:
        kernel = leaves(refined)[f"{layer.path}/kernel"].T
        packed = macko_jax.compress(jnp.asarray(kernel), dtype=values)
        # Scales of float32 may settle an ulp away.
        np.testing.assert_allclose(macko_jax.decompress(packed), kernel, rtol=2.0**-22)
        assert (kernel != leaves(pruned.model)[f"{layer.path}/kernel"].T).any()
    assert report.nonzeros[1] <= report.nonzeros[0]


@pytest.mark.slow
def test_masks_that_move_keep_each_matrixs_budget(dense, pruned):
    refined, report = dsf_jax.refine(
        pruned.model, BATCHES, teacher=dense, steps=30, learning_rate=3e-3, masks="rechosen"
    )
    moved = 0
    for layer in pruned.report.layers:
        old, new = (leaves(m)[f"{layer.path}/kernel"] != 0 for m in (pruned.model, refined))
        assert old.sum() == new.sum() == layer.nonzeros
        moved += (old != new).sum()
    assert moved > 20
    assert report.losses[-1] < 0.5 * report.losses[0]


def test_a_change_of_masks_drops_the_smallest_and_takes_the_steepest():
    from dsf_jax.trace.dataflow import Layer, View

    layer = Layer("x", 0, "linear", 1, 2, 4, View(0).then("matrix", lambda x: x[None]))
    weight = jnp.asarray([[5.0, 0.1, 0, 0], [0, 0, -3.0, 0.2]])
    slope = jnp.asarray([[9.0, 9, 1, -8], [2, 0, 9, 9]])
    new, mask = masks.rechoose(weight, slope, weight != 0, [layer], jnp.float32(0.5))
    assert mask.tolist() == [[True, False, False, True], [True, False, True, False]]
    assert new.tolist() == [[5, 0, 0, 0], [0, 0, -3, 0]]
    assert masks.find_pattern(np.asarray([[1, 1, 0, 0, 1, 0, 0, 1]], bool)) == "2:4"
    assert masks.find_pattern(np.asarray([[1, 1, 1, 0, 1, 0, 0, 0]], bool)) is None


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(WIDTH, name=f"mix_{i}")(nn.LayerNorm(name=f"norm_{i}")(x))
        return nn.Dense(5, name="head")(x)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["model", "block"])
def test_linen_with_a_pair(stage):
    module, rng = LinenNet(), np.random.default_rng(0)
    batches = [jnp.asarray(rng.normal(size=(16, WIDTH)), jnp.float32) for _ in range(2)]
    variables = module.init(jax.random.key(0), batches[0])
    compressed, found = dsf_jax.compress_model(
        module,
        batches,
        variables=variables,
        method="wanda",
        density=0.4,
        rules=[dsf_jax.Rule("mix_1", **PAIR), dsf_jax.Rule("mix_0")],
    )
    refined, report = dsf_jax.refine(
        module,
        batches,
        variables=compressed,
        teacher=variables,
        stage=stage,
        steps=15,
        learning_rate=3e-3,
    )
    if stage == "model":
        assert report.losses[-1] < report.losses[0]
    else:
        assert [block.path for block in report.blocks] == ["mix_0", "mix_1"]
        assert all(block.after < block.before for block in report.blocks)
    pairs = [tree["params"]["mix_1"]["kernel"] for tree in (compressed, refined)]
    for old, new in zip(*(jax.tree.leaves(pair) for pair in pairs)):
        assert (new != old).any() and (new == 0)[old == 0].all()
    assert jax.tree.structure(compressed) == jax.tree.structure(refined)
    assert report.nonzeros[1] == sum(layer.nonzeros for layer in found.layers)


def test_a_mesh_gives_what_one_device_gives(dense, pruned):
    weighted = [
        dict(tokens=batch, weights=np.linspace(0, 1, batch.size).reshape(batch.shape))
        for batch in BATCHES
    ]
    common = dict(teacher=dense, steps=6, learning_rate=3e-3, token_weights="weights")
    one, first = dsf_jax.refine(pruned.model, weighted, **common)
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    two, second = dsf_jax.refine(pruned.model, weighted, mesh=mesh, **common)
    np.testing.assert_allclose(second.losses, first.losses, rtol=1e-4)
    for path, leaf in leaves(one).items():
        np.testing.assert_allclose(leaves(two)[path], leaf, atol=1e-4, err_msg=path)
    with pytest.raises(ValueError, match="first axis is to be shared out to 4 devices"):
        dsf_jax.refine(
            pruned.model, draw_batches(1, shape=(3, 8)), teacher=dense, steps=1, mesh=mesh
        )


@pytest.mark.slow
def test_ways_to_compute_a_step_agree(dense, pruned):
    whole, halves = draw_batches(1), [batch[:2] for batch in draw_batches(1)]
    halves.append(whole[0][2:])
    common = dict(teacher=dense, learning_rate=3e-3)
    one, first = dsf_jax.refine(pruned.model, whole, steps=4, **common)
    two, second = dsf_jax.refine(pruned.model, halves, steps=4, accumulate=2, **common)
    three, third = dsf_jax.refine(pruned.model, whole, steps=4, remat=True, **common)
    for model, report in ((two, second), (three, third)):
        np.testing.assert_allclose(report.losses, first.losses, rtol=1e-4)
        for path, leaf in leaves(one).items():
            np.testing.assert_allclose(leaves(model)[path], leaf, atol=1e-4)
    for dtype in ("bfloat16", "float16"):
        near, report = dsf_jax.refine(pruned.model, whole, steps=4, compute_dtype=dtype, **common)
        np.testing.assert_allclose(report.losses, first.losses, rtol=0.1)
        assert near.layers[0].up.kernel.get_value().dtype == jnp.float32
    _, timed = dsf_jax.refine(pruned.model, whole, seconds=1.0, **common)
    assert timed.steps == len(timed.losses) >= 1
    hidden = dict(hidden=r"layers/\d+", hidden_weight=1.0)
    _, matched = dsf_jax.refine(pruned.model, whole, steps=1, **hidden, **common)
    x = y = whole[0]
    x, y, apart = dense.embed(x), dense.embed(y), 0.0
    for a, b in zip(dense.layers, pruned.model.layers):
        x, y = a(x, scale=2.0)[0], b(y, scale=2.0)[0]
        apart += float(jnp.mean(jnp.sum((x - y) ** 2, -1) / jnp.sum(x**2, -1))) / 2
    np.testing.assert_allclose(matched.losses[0] - first.losses[0], apart, rtol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=None), "give either steps or seconds"),
        (dict(learning_rate=-1.0), "learning_rate must be positive"),
        (dict(values="int4"), "values must be None or one of int8"),
        (dict(stage="layer"), "stage must be one of model, block"),
        (dict(layers="nothing"), "layers='nothing' matches no layer"),
        (dict(train=["nothing"]), "train='nothing' matches no parameter"),
        (dict(hidden="nothing"), "has to match modules that both models call"),
        (dict(stage="block", blocks="nothing"), "no blocks found"),
    ],
)
def test_what_cannot_be_served_is_said(dense, pruned, change, message):
    with pytest.raises(ValueError, match=message):
        dsf_jax.refine(pruned.model, BATCHES, **(dict(teacher=dense, steps=1) | change))


def test_a_dense_model_has_nothing_to_refine(dense):
    with pytest.raises(ValueError, match="none of its matrices holds an exact zero"):
        dsf_jax.refine(dense, BATCHES, teacher=dense, steps=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'; settings are steps"):
        dsf_jax.refine(dense, BATCHES, teacher=dense, steps=1, rate=1)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(dense, pruned, tmp_path):
    common = dict(teacher=dense, steps=12, learning_rate=3e-3, masks="rechosen", held_out=OTHERS)
    whole, report = dsf_jax.refine(pruned.model, BATCHES, **common)
    seen = []

    def kill(progress):
        seen.append(progress.step)
        if progress.step == 10 and seen.count(10) == 1:
            raise Killed

    common |= dict(work_dir=tmp_path / "work", callback=kill, save_seconds=0)
    with pytest.raises(Killed):
        dsf_jax.refine(pruned.model, BATCHES, **common)
    again, continued = dsf_jax.refine(pruned.model, BATCHES, **common)
    assert seen == [5, 10, 10, 12]
    assert same(whole, again) and continued.losses == report.losses
    assert continued.held_out == report.held_out
    done, _ = dsf_jax.refine(pruned.model, BATCHES, **common)
    assert same(whole, done) and len(seen) == 4
    with pytest.raises(ValueError, match=r"results of another run .*Give another work_dir"):
        dsf_jax.refine(pruned.model, BATCHES, **(common | dict(learning_rate=1e-3)))
    for path in (tmp_path / "work").glob("checkpoints/*/known/metadata"):
        path.write_text(path.read_text().replace('"seconds"', '"Seconds"'))
    with pytest.raises(ValueError, match=r"is damaged .*not match .*Remove the folder of its last"):
        dsf_jax.refine(pruned.model, BATCHES, **common)
    (tmp_path / "work/run.json").write_text("[" * 50_000)
    with pytest.raises(ValueError, match="results of another run"):
        dsf_jax.refine(pruned.model, BATCHES, **common)


def spoiled_from(step, by):
    """SGD whose updates are multiplied from some step on."""

    def update(updates, state, params=None, **extra):
        factor = jnp.where(extra["step"] >= step, by, -1e-2)
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.once
@pytest.mark.parametrize("by, what", [(jnp.nan, "was NaN or infinite at step"), (0.3, "diverged")])
def test_a_run_that_goes_wrong_keeps_its_last_good_state(dense, pruned, by, what):
    common = dict(teacher=dense, steps=20)
    with pytest.warns(RuntimeWarning, match="as it was after step 5 is what is returned"):
        stopped, report = dsf_jax.refine(
            pruned.model, BATCHES, optimizer=spoiled_from(5, by), **common
        )
    assert what in report.stopped and what in str(report) and len(report.losses) == 5
    good = mean_divergence(dense, stopped, BATCHES)
    assert good < mean_divergence(dense, pruned.model, BATCHES)
    with pytest.raises(FloatingPointError, match="NaN or infinite at step"):
        dsf_jax.refine(pruned.model, BATCHES, optimizer=spoiled_from(0, jnp.nan), **common)
