"""Times the settings of the GPU kernel, to find the best for a device.

    python -m examples.benchmarks.tune_spmv --shape=4096x4096 --density=0.5

Every number of lanes a row (fixed when a matrix is packed) is tried with every pair of warps and
prefetch distance. Printed and saved are the times, the best first, beside those of the default rule
in macko_jax/gpu/tuning.py, where a better rule would go.
"""

import dataclasses
import functools
import itertools

import jax
from absl import flags

import macko_jax
from examples import cli
from examples.benchmarks import timing as benchmark
from examples.records import write_json
from macko_jax.gpu import spmv
from macko_jax.gpu.kernel import problem_of

flags.DEFINE_multi_string("shape", ["4096x4096", "11008x4096"], "Matrix, rows x cols; repeatable.")
flags.DEFINE_multi_float("density", [0.5, 0.3, 0.1], "Share of non-zeros; repeatable.", 0, 1)
flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16"], "Type of matrix and vector.")
flags.DEFINE_string("values", None, "Type of the values, if not that of the vector.")
flags.DEFINE_string("encoding", None, "Encoding, as in macko_jax.compress; by default its choice.")
flags.DEFINE_multi_integer("lanes", [8, 16, 32], "Lanes that share a row; repeatable.")
flags.DEFINE_multi_string(
    "warps_and_ahead",
    ["32x1", "32x2", "32x4", "28x2", "24x2", "24x4", "16x4"],
    "Warps of a block x groups that a lane loads ahead; repeatable.",
)
flags.DEFINE_integer("repeats", 5, "Passes over all matrices.", lower_bound=1)
flags.DEFINE_string("out", "runs/tune_spmv.json", "File of the record.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run times; the flags of the same names say what each is."""

    shape: tuple[str, ...]
    density: tuple[float, ...]
    dtype: str
    values: str | None
    encoding: str | None
    lanes: tuple[int, ...]
    warps_and_ahead: tuple[str, ...]
    repeats: int
    out: str


def time_plan(matrices, x, repeats, **changes) -> float:
    """Median microseconds of a product by a changed plan, without scales of 8-bit values."""

    def product(m, x):
        plan = spmv.plan(problem_of("spmv", m.layout, m.values, x[None], x.dtype))
        plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **changes))
        return spmv.run(plan, m.values, *m.positions, x[None])

    return 1e6 * benchmark.time_products(product, matrices, x, repeats=repeats).median


def tune(settings, rows: int, cols: int, density: float) -> list[dict]:
    """The times of all plans for one matrix, the fastest first."""
    dense = benchmark.random_sparse(rows, cols, density, settings.dtype)
    x = jax.random.normal(jax.random.key(1), cols, settings.dtype)
    pack = functools.partial(
        macko_jax.compress, dense, encoding=settings.encoding, dtype=settings.values
    )
    default, out = pack().lanes, []
    for lanes in settings.lanes:
        matrix = pack(lanes=lanes)
        matrices = benchmark.distinct(matrix)
        for pair in ["default"] * (lanes == default) + list(settings.warps_and_ahead):
            changes = {}
            if pair != "default":
                warps, ahead = benchmark.parse_shape(pair)
                changes = {"warps": warps, "ahead": ahead}
            out.append(
                {
                    "lanes": lanes,
                    "settings": pair,
                    "encoding": matrix.encoding,
                    "microseconds": time_plan(matrices, x, settings.repeats, **changes),
                }
            )
    return sorted(out, key=lambda row: row["microseconds"])


def main(_):
    settings = cli.settings(Settings)
    if jax.default_backend() != "gpu":
        raise ValueError(f"plans are of kernels; this needs a GPU, not {jax.default_backend()}")
    record = {
        **benchmark.environment(),
        "dtype": settings.dtype,
        "values": settings.values,
        "cases": [],
    }
    for shape, density in itertools.product(settings.shape, settings.density):
        rows, cols = benchmark.parse_shape(shape)
        times = tune(settings, rows, cols, density)
        default = next(t for t in times if t["settings"] == "default")
        best = "  ".join(f"{t['lanes']}:{t['settings']} {t['microseconds']:.2f}" for t in times[:4])
        print(
            f"{shape:>12} {density}: default {default['lanes']} lanes "
            f"{default['microseconds']:.2f} us; best {best}",
            flush=True,
        )
        record["cases"].append({"rows": rows, "cols": cols, "density": density, "times": times})
        write_json(settings.out, record)


if __name__ == "__main__":
    cli.run(main)
