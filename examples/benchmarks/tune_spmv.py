"""Times the settings of the GPU kernel, to find the best for a device.

    python -m examples.benchmarks.tune_spmv --shapes=4096x4096,22016x4096 --densities=0.5,0.1

Every number of lanes a row (fixed when a matrix is packed) is tried with every pair of warps and
unroll. Printed and saved are the times, the best first, beside those of the default rule in
macko_jax/kernels/config.py, where a better rule would go.
"""

import dataclasses
import functools
import itertools

import jax
from absl import app, flags

import macko_jax
from examples.benchmarks import timing as benchmark
from examples.records import write_json
from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import spmv

SHAPES = flags.DEFINE_list("shapes", ["4096x4096", "11008x4096"], "Matrices, rows x cols.")
DENSITIES = flags.DEFINE_list("densities", ["0.5", "0.3", "0.1"], "Shares of non-zeros.")
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16"], "Of matrix and vector.")
VALUES = flags.DEFINE_string("values", None, "Type of the values, if not that of the vector.")
ENCODING = flags.DEFINE_string("encoding", None, "As in macko_jax.compress; None chooses.")
LANES = flags.DEFINE_multi_integer("lanes", [8, 16, 32], "Lanes that share a row.")
SETTINGS = flags.DEFINE_list(
    "settings",
    ["32x1", "32x2", "32x4", "28x2", "24x2", "24x4", "16x4"],
    "Warps of a block x groups that a lane loads ahead.",
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Passes over all matrices.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/tune_spmv.json", "Where the record goes.")


def time_settings(matrices, x, **changes) -> float:
    """Median microseconds of a product with changed settings, without scales of 8-bit values."""

    def product(m, x):
        static = strips.Matrix(m.shape, m.encoding, m.lanes, m.stored, m.values.dtype)
        plan = spmv.choose(static, x.dtype, 1)
        plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **changes))
        return spmv.run(plan, x.dtype, m.values, m.codes, m.row_offsets, m.starts, x[None])

    return 1e6 * benchmark.time_products(product, matrices, x, repeats=REPEATS.value).median


def tune(rows: int, cols: int, density: float) -> list[dict]:
    """The times of all settings for one matrix, the fastest first."""
    dense = benchmark.random_sparse(rows, cols, density, DTYPE.value)
    x = jax.random.normal(jax.random.key(1), cols, DTYPE.value)
    pack = functools.partial(macko_jax.compress, dense, encoding=ENCODING.value, dtype=VALUES.value)
    default, out = pack().lanes, []
    for lanes in LANES.value:
        matrix = pack(lanes=lanes)
        matrices = benchmark.distinct(matrix)
        for pair in ["default"] * (lanes == default) + SETTINGS.value:
            changes = {}
            if pair != "default":
                warps, unroll = map(int, pair.split("x"))
                changes = {"warps": warps, "unroll": unroll}
            out.append(
                {
                    "lanes": lanes,
                    "settings": pair,
                    "encoding": matrix.encoding,
                    "microseconds": time_settings(matrices, x, **changes),
                }
            )
    return sorted(out, key=lambda row: row["microseconds"])


def main(_):
    if jax.default_backend() != "gpu":
        raise app.UsageError(
            f"settings are of kernels; this needs a GPU, not {jax.default_backend()}"
        )
    record = {**benchmark.environment(), "dtype": DTYPE.value, "values": VALUES.value, "cases": []}
    for shape, density in itertools.product(SHAPES.value, DENSITIES.value):
        rows, cols = map(int, shape.split("x"))
        times = tune(rows, cols, float(density))
        default = next(t for t in times if t["settings"] == "default")
        best = "  ".join(f"{t['lanes']}:{t['settings']} {t['microseconds']:.2f}" for t in times[:4])
        print(
            f"{shape:>12} {density}: default {default['lanes']} lanes "
            f"{default['microseconds']:.2f} us; best {best}",
            flush=True,
        )
        record["cases"].append(
            {"rows": rows, "cols": cols, "density": float(density), "times": times}
        )
        write_json(OUT.value, record)


if __name__ == "__main__":
    app.run(main)
