"""Timing of products, whose matrices come from memory and are checked first, and of generations."""

import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama import generation

# Bytes of distinct matrices that are read in turn: ten times the L2 cache of an H200 (60 MB), and
# several times the last-level cache of a CPU; and how many they are at most, each a product to
# compile.
ROTATION = {"gpu": (600e6, 128), "cpu": (150e6, 24)}


VERSIONS = ("jax", "jaxlib", "flax", "numpy")  # that a record keeps


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one product: percentiles over repeats of a pass over all matrices."""

    p10: float
    median: float
    p90: float


def parse_shape(text: str) -> tuple[int, int]:
    """(rows, cols) of a shape such as "4096x11008"."""
    rows, _, cols = text.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise ValueError(f"a shape is given as ROWSxCOLS, such as 4096x11008; got {text!r}")
    return int(rows), int(cols)


def copies(size: int) -> int:
    """How many matrices of `size` bytes make up the rotation of the default backend."""
    total, most = ROTATION.get(jax.default_backend(), ROTATION["cpu"])
    return min(most, max(2, int(total // max(size, 1)) + 1))


def nbytes(matrix) -> int:
    """Bytes of all arrays of a matrix, whatever its format."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(matrix))


def distinct(matrix) -> list:
    """Copies of a matrix, each in memory of its own, that make up the rotation."""
    return [jax.tree.map(jnp.copy, matrix) for _ in range(copies(nbytes(matrix)))]


def time_products(product, matrices: list, *operands, repeats: int = 10) -> Timing:
    """Times product(matrix, *operands), back to back over a list of distinct matrices.

    On a GPU it counts the time of the kernels (CUPTI), elsewhere the time on the clock.
    """
    several = jax.jit(lambda ms, *ops: [product(m, *ops) for m in ms])
    jax.block_until_ready(several(matrices, *operands))
    measure = _on_gpu if jax.default_backend() == "gpu" else _on_clock
    seconds = np.asarray(measure(several, (matrices, *operands), repeats)) / len(matrices)
    return Timing(*np.percentile(seconds, [10, 50, 90]).tolist())


def _on_gpu(function, operands, repeats) -> list[float]:
    from jax.experimental.mosaic.gpu import profiler

    milliseconds = profiler.measure(function, iterations=max(repeats, 2))(*operands)[1]
    return [1e-3 * t for t in milliseconds]


def _on_clock(function, operands, repeats) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        seconds.append(time.perf_counter() - start)
    return seconds


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def random_sparse(rows: int, cols: int, density: float, dtype, seed: int = 0) -> jax.Array:
    """A dense array [rows, cols] of normal values at random positions, zero elsewhere."""
    values, mask = jax.random.split(jax.random.key(seed))
    kept = jax.random.bernoulli(mask, density, (rows, cols))
    return jnp.where(kept, jax.random.normal(values, (rows, cols)), 0).astype(dtype)


def relative_error(y, dense, x) -> float:
    """||y - x A^T|| / ||x A^T||, the exact product in float64 on the host."""
    exact = np.asarray(x, np.float64) @ np.asarray(dense, np.float64).T
    return float(
        np.linalg.norm(np.asarray(y, np.float64) - exact)
        / max(np.linalg.norm(exact), np.finfo(np.float64).tiny)
    )


def environment() -> dict:
    """What a figure depends on: device, clocks, versions, date."""
    device = jax.devices()[0]
    record = {
        "device": device.device_kind,
        "platform": device.platform,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "date": datetime.date.today().isoformat(),
    }
    if device.platform == "gpu":
        record["clocks"] = _clocks()
    return record


def _clocks() -> str | None:
    query = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,driver_version",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def time_generations(decoder, repeats):
    """Seconds of each call after the prefill, [repeats, calls].

    As in `llama.generate`, the device is given a call while the one before it runs. A CPU would run
    the second call before the host can note when the first one ended, and where several devices
    share a model the host is busy with a call for as long as it runs; they get one at a time.
    """
    one_gpu = jax.default_backend() != "cpu" and decoder.settings.tensor_parallel == 1
    in_turn = generation.one_ahead if one_gpu else iter
    rows = []
    for _ in range(repeats + 1):
        ready = []
        for tokens in in_turn(decoder.draw()):
            jax.block_until_ready(tokens)
            ready.append(time.perf_counter())
        rows.append(np.diff(ready))
    return np.array(rows[1:])
