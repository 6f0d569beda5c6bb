"""Times the ways of a product with several vectors, to find from how many on which is the fastest.

    python -m examples.benchmarks.tune_many --shapes=4096x11008 --densities=0.5,0.1 --batches=8,16,32

The ways are those of macko_jax/gpu/select.py: passes over the packed matrix, and a dense decode
with a dense product. Printed and saved is what each takes, and which one the rule in
macko_jax/gpu/tuning.py chooses, where a better rule would go.
"""

import functools
import itertools

import jax
from absl import app, flags

import macko_jax
from examples.benchmarks import timing as benchmark
from examples.records import write_json
from macko_jax.gpu import select as products
from macko_jax.ops import dispatch

SHAPES = flags.DEFINE_list("shapes", ["4096x11008", "22016x4096"], "Matrices, rows x cols.")
DENSITIES = flags.DEFINE_list("densities", ["0.5", "0.3", "0.1"], "Shares of non-zeros.")
BATCHES = flags.DEFINE_list("batches", ["8", "16", "32", "64", "512"], "Numbers of vectors.")
PRODUCT = flags.DEFINE_enum("product", "spmv", list(products.WAYS), "Forward or transposed.")
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16", "float32"], "Of the vectors.")
VALUES = flags.DEFINE_string("values", None, "Type of the values, if not that of the vectors.")
ENCODING = flags.DEFINE_string("encoding", None, "As in macko_jax.compress; None chooses.")
MOST_PASSES = flags.DEFINE_integer("most_passes", 64, "Vectors, beyond which passes are left out.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Passes over all matrices.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/tune_many.json", "Where the record goes.")


def multiply(way: str, matrix, x) -> jax.Array:
    """The product by one of the ways, without scales of 8-bit values."""
    return products.WAYS[PRODUCT.value][way](
        matrix.values,
        x,
        matrix.codes,
        matrix.row_offsets,
        matrix.starts,
        shape=matrix.shape,
        encoding=matrix.encoding,
        lanes=matrix.lanes,
        stored=matrix.stored,
        out_dtype=x.dtype,
    )


def tune(matrices: list, batch: int) -> dict:
    """Microseconds by way, and the way that is chosen."""
    length = matrices[0].shape[PRODUCT.value == "spmv"]
    x = jax.random.normal(jax.random.key(1), (batch, length), DTYPE.value)
    problem = dispatch.problem_of(PRODUCT.value, "cuda", matrices[0], x, x.dtype)
    microseconds = {}
    for way in products.WAYS[PRODUCT.value]:
        if way == "passes" and batch > MOST_PASSES.value:
            continue
        if products.why_not_by(way, problem) is None:
            timing = benchmark.time_products(
                functools.partial(multiply, way), matrices, x, repeats=REPEATS.value
            )
            microseconds[way] = 1e6 * timing.median
    return {"batch": batch, "microseconds": microseconds, "chosen": products.way(problem)}


def main(_):
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"the ways are kernels; this needs a GPU, not {jax.default_backend()}")
    record = {
        **benchmark.environment(),
        "product": PRODUCT.value,
        "dtype": DTYPE.value,
        "cases": [],
    }
    for shape, density in itertools.product(SHAPES.value, DENSITIES.value):
        rows, cols = map(int, shape.split("x"))
        dense = benchmark.random_sparse(rows, cols, float(density), DTYPE.value)
        matrices = benchmark.distinct(
            macko_jax.compress(dense, encoding=ENCODING.value, dtype=VALUES.value)
        )
        first = matrices[0]
        times = [tune(matrices, int(batch)) for batch in BATCHES.value]
        for row in times:
            each = "  ".join(f"{way} {t:.1f}" for way, t in row["microseconds"].items())
            print(
                f"{shape:>12} {density} {first.encoding} {row['batch']:>5}: {each} us; chosen: "
                f"{row['chosen']}",
                flush=True,
            )
        record["cases"].append(
            {
                "rows": rows,
                "cols": cols,
                "density": float(density),
                "encoding": first.encoding,
                "lanes": first.lanes,
                "stored": first.stored,
                "values": first.values.dtype.name,
                "times": times,
            }
        )
        write_json(OUT.value, record)


if __name__ == "__main__":
    app.run(main)
