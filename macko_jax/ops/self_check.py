"""Kernels that check themselves on GPUs whose compute capability no record covers.

The kernels are compiled for every card since Ampere, and were run on a Hopper. Elsewhere the first
use of a kernel runs it once on a small matrix, with the same encoding, types and settings, and
compares the result with a dense product. That takes a compilation and some milliseconds; what was
right is remembered on disk, by the versions of the libraries and the card. Where the result is
wrong, or the kernel does not compile, XLA computes instead, and a warning asks for a report.

The environment variable MACKO_JAX_SELF_CHECK=0 turns this off: then every kernel counts as right.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax._version import __version__
from macko_jax.format import cards, quantization
from macko_jax.format.matrix import MackoMatrix, compress
from macko_jax.gpu import chain, densify, device, occupancy, sddmm, select, spmv, spmv_transposed
from macko_jax.gpu.kernel import Fusion, Problem
from macko_jax.gpu.staging import BLANK
from macko_jax.ops import reference

VARIABLE = "MACKO_JAX_SELF_CHECK"
COLS, DENSITY = 300, 0.3  # of the small matrix
ROUNDINGS = 4  # of a result's type, within which it has to agree with the largest one
ROUNDINGS_OF_CHAIN = 16

_failures: dict[str, str | None] = {}  # of this process: None, or what is wrong


class Trial(NamedTuple):
    """A kernel on something small.

    Attributes:
      call: what runs on the GPU.
      operands: what it is called with.
      wanted: its result or results.
      roundings: how many of them the result may be away.
    """

    call: Callable
    operands: Sequence[Any]
    wanted: Any
    roundings: float = ROUNDINGS


def why_not(*problems: Problem) -> str | None:
    """None if the kernel that serves a product, or a chain of them, may do so; else what is wrong.

    The problems are those that `select.why_not_fused` has no objection to.
    """
    if not _is_needed():
        return None
    name = _kernel_of(problems)
    plan = select.KERNELS[name].plan(problems if name == "chain" else _asked_of(name, *problems))
    return failure(_describe(name, plan, problems), lambda: TRIALS[name](plan))


def failure(description: str, make_trial: Callable[[], Trial]) -> str | None:
    """None if a kernel gives what is wanted of it, or is not to be checked; else what is wrong.

    Args:
      description: of all that is compiled differently; each is checked once.
      make_trial: makes what is tried.
    """
    if not _is_needed():
        return None
    if description not in _failures:
        seen = _marker(description)
        wrong = None if seen.exists() else _try(make_trial)
        if wrong is None:
            _remember(seen)
        else:
            wrong = f"the kernel ({description}) {wrong} on {_card()}"
            warnings.warn(
                f"{wrong}. So XLA computes it. Please report this as an issue of macko_jax, with "
                "what python -m examples.benchmarks.benchmark_spmv prints",
                RuntimeWarning,
                stacklevel=2,
            )
        _failures[description] = wrong
    return _failures[description]


def _is_needed() -> bool:
    there = cards.live() is not None and not device.is_measured()
    return there and os.environ.get(VARIABLE, "1") != "0"


def _kernel_of(problems) -> str:
    """The name of the kernel that serves a product or a chain."""
    if len(problems) > 1:
        return "chain"
    [problem] = problems
    one_way = problem.product not in select.METHODS or problem.fusion != Fusion()
    if one_way or select.fastest_method(problem) == "passes":
        return problem.product
    return "densify"


def _asked_of(name: str, problem: Problem) -> Problem:
    """What the kernel itself is asked for."""
    return select.densified(problem) if name == "densify" else problem


def _describe(name: str, plan, problems) -> str:
    """All that makes a difference to what is compiled, but for sizes."""
    parts = [name]
    for problem in problems:
        eps = None if problem.fusion.eps is None else 1.0
        around = dataclasses.replace(problem.fusion, eps=eps)
        dtypes = [jnp.dtype(dtype).name for dtype in (*problem.dtypes, problem.out_dtype)]
        parts += [problem.layout.encoding, f"{problem.layout.lanes} lanes", *dtypes]
        parts += [] if around == Fusion() else [str(around)]
    if settings := getattr(plan, "settings", None):
        parts += [f"{settings.vectors} vectors"]
        parts += ["x twice"] * settings.two_copies + ["x narrow"] * settings.narrow
    return ", ".join(parts)


# What is remembered


def _card() -> str:
    """The card and its compute capability; also the GPU, where another card is named."""
    here, gpu = cards.here(), cards.live()
    assumed = "" if gpu in (None, here) else f" assumed on {gpu.name}"
    return f"{here.name}{assumed}, compute capability {device.compute_capability()}"


def _marker(description: str) -> pathlib.Path:
    """The empty file that is there if the kernel was right before."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jaxlib = importlib.metadata.version("jaxlib")
    versions = f"{__version__}-jax-{jax.__version__}-jaxlib-{jaxlib}"
    card = re.sub(r"\W+", "-", _card())
    digest = hashlib.sha256(description.encode()).hexdigest()[:20]
    return pathlib.Path(home) / "macko_jax" / "self_check" / versions / card / digest


def _remember(marker: pathlib.Path) -> None:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:  # then the next process checks again
        pass


# What is tried


def _try(make_trial: Callable[[], Trial]) -> str | None:
    """None if a trial gives what is wanted, or what is wrong.

    It runs in a thread of its own: this one may be in the middle of tracing or lowering, whose
    state, like the settings of context managers, belongs to the thread.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        try:
            return threads.submit(lambda: _compare(make_trial())).result()
        except Exception as error:  # whatever keeps the kernel from running, XLA can serve
            lines = str(error).strip().splitlines() or [""]
            return f"does not run ({type(error).__name__}: {lines[0][:300]})"


def _compare(trial: Trial) -> str | None:
    results = jax.tree.leaves(_on_gpu(trial.call, *trial.operands))
    for found, wanted in zip(results, jax.tree.leaves(trial.wanted), strict=True):
        eps = max(float(jnp.finfo(found.dtype).eps), 2e-6)
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        error = np.abs(found.reshape(wanted.shape) - wanted).max() / np.abs(wanted).max()
        if not error <= trial.roundings * eps:
            return f"gives wrong results (they are {error:.1e} of the largest away)"
    return None


def _on_gpu(call: Callable, *operands):
    """The results of a function on the first GPU, as NumPy arrays."""
    [gpu, *_] = [d for d in jax.local_devices() if d.platform == "gpu"]
    with jax.default_device(gpu):
        return jax.tree.map(np.asarray, jax.jit(call)(*operands))


def _rows() -> int:
    """As many as give some blocks of the small matrix two rows for a warp, and others three."""
    return 2 * device.multiprocessors() + 3


def _matrix(problem: Problem, shape, seed: int = 0) -> tuple[MackoMatrix, np.ndarray]:
    """A small matrix as a problem's, of NumPy arrays; and its values without scales, densely."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * (rng.random(shape) < DENSITY)
    weight /= np.sqrt(DENSITY * shape[1])
    narrow = problem.dtype.itemsize == 1
    weight = weight.astype(np.float32 if narrow else problem.dtype)
    matrix = compress(
        weight, dtype=problem.dtype, encoding=problem.layout.encoding, lanes=problem.layout.lanes
    )
    if narrow:
        weight, _ = quantization.quantize(weight, problem.dtype)
    return jax.tree.map(np.asarray, matrix), np.asarray(weight).astype(np.float64)


def _vectors(shape, dtype, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _around(fusion: Fusion, matrix: MackoMatrix, dtype, seed: int = 2) -> dict[str, np.ndarray]:
    """The operands of what is done around a product, by name."""
    rows, cols = matrix.shape
    operands = {}
    if fusion.eps is not None:
        operands["scale"] = 1 + _vectors(cols, dtype, seed) / np.asarray(4, dtype)
    if "add" in fusion.operands:
        operands["add"] = _vectors((1, rows), dtype, seed + 1)
    if fusion.scaled:
        operands["row_scales"] = matrix.scales
    return operands


def _exact(fusion: Fusion, dense: np.ndarray, x: np.ndarray, around: dict) -> np.ndarray:
    """add + row_scales * (A f(x)) of vectors x [batch, cols], without what a chain adds."""
    x = x.astype(np.float64)
    around = {name: array.astype(np.float64) for name, array in around.items()}
    if fusion.eps is not None:
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + fusion.eps) * around["scale"]
    if fusion.gated:
        gate, passed = np.split(x, 2, axis=-1)
        x = gate / (1 + np.exp(-gate)) * passed
    y = x @ dense.T * around.get("row_scales", 1.0)
    return y + around.get("add", 0.0)


def _try_spmv(plan: spmv.Plan) -> Trial:
    settings, problem = plan.settings, plan.problem
    matrix, dense = _matrix(problem, (_rows(), COLS))
    x = _vectors((settings.vectors, COLS * (1 + problem.fusion.gated)), problem.x_dtype)
    around = _around(problem.fusion, matrix, problem.out_dtype)
    small = spmv.Plan(
        dataclasses.replace(problem, layout=matrix.layout, batch=settings.vectors),
        dataclasses.replace(settings, blocks=occupancy.row_blocks(_rows())),
    )
    extras = [around[name] for name in problem.fusion.operands]
    return Trial(
        functools.partial(spmv.run, small),
        (matrix.values, *matrix.positions, x, *extras),
        _exact(problem.fusion, dense, x, around),
    )


def _try_transposed(plan: spmv_transposed.Plan) -> Trial:
    matrix, dense = _matrix(plan.problem, (_rows(), COLS))
    y = _vectors((1, _rows()), plan.problem.x_dtype)
    small = dataclasses.replace(
        plan,
        problem=dataclasses.replace(plan.problem, layout=matrix.layout, batch=1),
        share=occupancy.row_blocks(_rows()),
    )
    return Trial(
        lambda *operands: spmv_transposed.run(small, *operands).sum(1),
        (matrix.values, *matrix.positions, y),
        y.astype(np.float64) @ dense,
    )


def _try_sddmm(plan: sddmm.Plan) -> Trial:
    problem, rows = plan.problem, _rows()
    matrix, _ = _matrix(problem, (rows, COLS))
    x, y = (
        _vectors((problem.known_batch, n), dtype, n)
        for n, dtype in zip((COLS, rows), problem.dtypes)
    )
    small = sddmm.Plan(
        dataclasses.replace(problem, layout=matrix.layout),
        dataclasses.replace(plan.settings, blocks=occupancy.row_blocks(rows)),
        masked=True,
    )
    by_xla = functools.partial(reference.sddmm, matrix.layout, out_dtype=jnp.float32)
    return Trial(
        functools.partial(sddmm.run, small),
        (*matrix.positions, x, y, matrix.values),
        jax.jit(by_xla)(matrix.positions, x, y, matrix.values),
    )


def _try_densify(plan: densify.Plan) -> Trial:
    matrix, dense = _matrix(plan.problem, (_rows(), COLS))
    small = dataclasses.replace(
        plan,
        problem=dataclasses.replace(plan.problem, layout=matrix.layout),
        blocks=occupancy.row_blocks(_rows()),
    )
    return Trial(
        functools.partial(densify.run, small), (matrix.values, *matrix.positions), dense, 0
    )


def _try_chain(plan: chain.Plan) -> Trial:
    """Every result has as many elements, or twice as many where the next step has a gate."""
    length = 8 * (plan.blocks // 8 + 2)
    fusions = [problem.fusion for problem in plan.problems]
    x = _vectors((1, length * (1 + fusions[0].gated)), plan.dtype)
    problems, operands, results = [], [], []
    for i, (problem, fusion) in enumerate(zip(plan.problems, fusions)):
        doubled = i + 1 < len(fusions) and fusions[i + 1].gated
        matrix, dense = _matrix(problem, (length * (1 + doubled), length), seed=10 * i)
        around = _around(fusion, matrix, plan.dtype, seed=10 * i + 2)
        y = _exact(fusion, dense, results[-1] if results else x, around)
        results.append(y if fusion.added is None else y + results[fusion.added])
        problems.append(dataclasses.replace(problem, layout=matrix.layout))
        extras = [around[name] for name in fusion.operands]
        operands += [matrix.values, *matrix.positions, *extras]
    small = chain.Plan(tuple(problems), plan.blocks)
    exchange = np.full(small.exchanged, BLANK, np.uint16)
    return Trial(
        functools.partial(chain.run, small),
        (exchange, x, *operands),
        [results[i] for i in small.kept],
        ROUNDINGS_OF_CHAIN,
    )


TRIALS = {
    "spmv": _try_spmv,
    "spmv_transposed": _try_transposed,
    "sddmm": _try_sddmm,
    "densify": _try_densify,
    "chain": _try_chain,
}
