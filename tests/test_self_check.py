"""What happens on a GPU that no record covers: kernels check themselves, and `explain` says so."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from examples.llama import decode_attention
from macko_jax.experimental import Step, fused_chain, fused_spmv
from macko_jax.format import cards
from macko_jax.lanes import interpreter, mosaic
from macko_jax.ops import self_check
from tests.kernels import sparse

X = jax.ShapeDtypeStruct((16,), jnp.float16)


class FakeGpu:
    """A GPU of three SMs, whose kernels the interpreter runs.

    Attributes:
      card: its facts.
      ran: the names of the kernels that it ran.
      damage: what is done to the results of a kernel.
    """

    def __init__(self):
        self.card = cards.Card("fake GPU", (12, 0), 3, 99 * 1024)
        self.ran: list[str] = []
        self.damage = lambda results: results

    def on_gpu(self, call, *operands):
        jax.jit(jnp.sin)(np.ones(len(self.ran) + 1))  # compiles something, as a GPU would
        return jax.tree.map(np.asarray, call(*operands))

    def run(self, emit, name, program, names, operands, result, **sizes):
        changed = sizes.pop("changed", ())
        if any(isinstance(operand, jax.core.Tracer) for operand in operands):
            return emit(name, program, names, operands, result, changed=changed, **sizes)
        self.ran.append(name)
        out = [np.zeros(each.shape, each.dtype) for each in jax.tree.leaves(result)]
        arrays = dict(zip(names, map(np.array, (*operands, *changed, *out))))
        arrays = interpreter.run(program, arrays, **sizes)
        found = [arrays[each] for each in names]
        in_place, out = len(operands), len(operands) + len(changed)
        results = self.damage(found[out:])
        results = results if isinstance(result, list) else results[0]
        return (results, found[in_place:out]) if changed else results


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    fake = FakeGpu()
    monkeypatch.setattr(cards, "live", lambda: fake.card)
    monkeypatch.delenv(cards.VARIABLE, raising=False)
    monkeypatch.setattr(self_check, "_on_gpu", fake.on_gpu)
    monkeypatch.setattr(self_check, "_failures", {})
    monkeypatch.setattr(mosaic, "run", functools.partial(fake.run, mosaic.run))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return fake


@functools.cache
def packed(shape=(16, 16), **options):
    return macko_jax.compress(sparse(*shape, 0.5, np.float16), **options)


def lowered(function, *arguments):
    fresh = lambda *arguments: function(*arguments)  # JAX remembers what it has lowered
    return jax.jit(fresh).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def chained(matrices, x):
    steps = [Step(matrices[0], norm=(x, 1e-5)), Step(matrices[1], gated=True, kept=True)]
    return fused_chain(x, [*steps, Step(matrices[2], add=1)])


@pytest.mark.slow
def test_every_kernel_runs_once_before_its_first_use(gpu, monkeypatch):
    loss = lambda m, x: macko_jax.spmv(m, x).astype(jnp.float32).sum()
    lowered(jax.value_and_grad(loss, (0, 1), allow_int=True), packed(), X)
    assert sorted(gpu.ran) == ["macko_sddmm", "macko_spmv", "macko_spmv_transposed"]
    many = jax.ShapeDtypeStruct((200, 16), jnp.float16)
    calls = [
        (macko_jax.spmv, packed(), many),
        (macko_jax.spmv, packed(dtype="int8"), X),
        (chained, [packed((32, 16)), packed(), packed()], X),
    ]
    for call in calls:
        assert "mosaic_gpu" in lowered(*call)
    before = ["macko_densify", "macko_spmv", "macko_chain"]
    assert gpu.ran[3:] == before
    lowered(*calls[1])
    monkeypatch.setattr(self_check, "_failures", {})  # as in another process
    lowered(*calls[1])
    assert gpu.ran[3:] == before
    gpu.card = cards.Card("another GPU", (12, 0), 3, 99 * 1024)
    monkeypatch.setattr(self_check, "_failures", {})
    lowered(*calls[1])
    assert gpu.ran[3:] == [*before, "macko_spmv"]


def test_every_form_of_a_product_is_tried_as_it_is_used(gpu):
    """The trial is of what was asked for, and right: what is wanted is computed otherwise."""
    normed = lambda m, x, add: fused_spmv(m, x, norm=(x, 1e-5), add=add)
    lowered(normed, packed(dtype="float8_e4m3fn"), X, X)
    wide = packed((16, 30_000), encoding="two_bank")
    lowered(macko_jax.spmv, wide, jax.ShapeDtypeStruct((30_000,), jnp.bfloat16))
    lowered(macko_jax.spmv, packed(encoding="delta5"), jax.ShapeDtypeStruct((4, 16), jnp.float32))
    assert gpu.ran == ["macko_spmv"] * 3
    forms = "\n".join(self_check._failures)
    assert "float8_e4m3fn, float16, float16" in forms and "eps=1.0, gated=False, add=True" in forms
    assert "x narrow" in forms and "delta5, " in forms and "4 vectors" in forms


def test_the_attention_of_a_decode_step_is_tried(gpu, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cache = jax.ShapeDtypeStruct((1, 2, 64, 2, decode_attention.HEAD_DIM), jnp.bfloat16)
    assert decode_attention.fits(cache) and gpu.ran == ["decode_attention"]
    assert decode_attention.fits(cache) and gpu.ran == ["decode_attention"]


@pytest.mark.parametrize("fault", ["wrong", "NaN", "does not compile"])
def test_a_kernel_that_fails_is_left_to_xla(gpu, fault, tmp_path):
    def damage(results):
        if fault == "does not compile":
            raise RuntimeError("ptxas says no")
        results[0].flat[1] += np.nan if fault == "NaN" else 0.5
        return results

    gpu.damage = damage
    what = r"RuntimeError: ptxas says no" if fault == "does not compile" else "wrong results"
    with pytest.warns(RuntimeWarning, match=f"(?s)spmv.*{what}.*fake GPU.*report"):
        assert "mosaic_gpu" not in lowered(macko_jax.spmv, packed(), X)
    assert "mosaic_gpu" not in lowered(macko_jax.spmv, packed(), X)  # it warns once
    assert gpu.ran == ["macko_spmv"] and not list(tmp_path.rglob("*"))
    with pytest.raises(NotImplementedError, match=what):
        lowered(functools.partial(macko_jax.spmv, implementation="mosaic_gpu"), packed(), X)


def test_no_check_where_there_is_a_record_or_it_is_turned_off(gpu, monkeypatch):
    monkeypatch.setenv(self_check.VARIABLE, "0")
    assert "mosaic_gpu" in lowered(macko_jax.spmv, packed(), X)
    monkeypatch.delenv(self_check.VARIABLE)
    gpu.card = cards.Card("an H100", (9, 0), 132, 227 * 1024)
    assert "mosaic_gpu" in lowered(macko_jax.spmv, packed(), X)
    gpu.card = None
    assert "mosaic_gpu" in lowered(macko_jax.spmv, packed(), X)
    assert gpu.ran == []


def test_a_cache_that_cannot_be_written_is_done_without(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "mosaic_gpu" in lowered(macko_jax.spmv, packed(), X)
    assert gpu.ran == ["macko_spmv"]


def test_explains_what_runs_on_a_cpu():
    found = macko_jax.explain(packed(), np.ones(16))
    assert found.implementation == "xla" and found.device == "cpu"
    [(name, reason)] = found.why_not
    assert name == "mosaic_gpu" and "need platform cuda" in reason and reason in str(found)
    assert found == macko_jax.explain(packed(), jax.ShapeDtypeStruct((16,), np.float32))
    with pytest.raises(ValueError, match=r"\[16, 16\] matrix"):
        macko_jax.explain(packed(), np.ones(15))
    with pytest.raises(TypeError, match="takes a MackoMatrix"):
        macko_jax.explain(np.ones((2, 2)), np.ones(2))


def test_explains_what_runs_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    one, many = X, jax.ShapeDtypeStruct((200, 16), jnp.float16)
    found = macko_jax.explain(packed(), one)
    assert (found.implementation, found.why_not) == ("mosaic_gpu", ())
    assert str(found).startswith(
        "mosaic_gpu on fake GPU (compute capability 12.0, compiled, self-checked, not yet "
        "measured): the kernel spmv in 1 pass of 1 vectors, by 3 blocks of 4 warps, with x twice"
    )
    assert "dense product of float16 follows" in macko_jax.explain(packed(), many).how
    assert "with the scales" in macko_jax.explain(packed(dtype="int8"), one).how
    by_bitmask = macko_jax.explain(packed(encoding="bitmask"), one)
    assert by_bitmask.implementation == "xla" and "'bitmask'" in str(by_bitmask)
    some = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 16), jnp.float16)
    assert "the number of vectors is symbolic" in str(macko_jax.explain(packed(), some))
    gpu.card = cards.Card("RTX 2080", (7, 5), 46, 64 * 1024)
    text = str(macko_jax.explain(packed(), one))
    assert "xla on RTX 2080" in text and "8.0 and later, not 7.5" in text
