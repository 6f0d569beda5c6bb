"""Times the methods of a product with several vectors, to find which is the fastest for how many.

    python -m examples.benchmarks.tune_many --shape=4096x11008 --density=0.5 --batch=8

The methods are those of macko_jax/gpu/select.py: passes over the packed matrix, and a dense product
with the densified one. Printed and saved is what each takes, and which one the rule in
macko_jax/gpu/tuning.py chooses, where a better rule would go.
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
from macko_jax.gpu import select
from macko_jax.gpu.kernel import problem_of

flags.DEFINE_multi_string("shape", ["4096x11008", "22016x4096"], "Matrix, rows x cols; repeatable.")
flags.DEFINE_multi_float("density", [0.5, 0.3, 0.1], "Share of non-zeros; repeatable.", 0, 1)
flags.DEFINE_multi_integer(
    "batch", [8, 16, 32, 64, 512], "Vectors at a time; repeatable.", lower_bound=1
)
flags.DEFINE_enum("product", "spmv", list(select.METHODS), "Forward or transposed.")
flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16", "float32"], "Type of the vectors.")
flags.DEFINE_string("values", None, "Type of the values, if not that of the vectors.")
flags.DEFINE_string("encoding", None, "Encoding, as in macko_jax.compress; by default its choice.")
flags.DEFINE_integer("most_passes", 64, "Vectors, beyond which passes are left out.")
flags.DEFINE_integer("repeats", 5, "Passes over all matrices.", lower_bound=1)
flags.DEFINE_string("out", "runs/tune_many.json", "File of the record.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run times; the flags of the same names say what each is."""

    shape: tuple[str, ...]
    density: tuple[float, ...]
    batch: tuple[int, ...]
    product: str
    dtype: str
    values: str | None
    encoding: str | None
    most_passes: int
    repeats: int
    out: str


def multiply(product: str, method: str, matrix, x) -> jax.Array:
    """The product by one of the methods, without scales of 8-bit values."""
    function = select.METHODS[product][method]
    return function(matrix.layout, matrix.values, matrix.positions, x, out_dtype=x.dtype)


def tune(settings, matrices: list, batch: int) -> dict:
    """Microseconds by method, and the method that is chosen."""
    first = matrices[0]
    length = first.shape[settings.product == "spmv"]
    x = jax.random.normal(jax.random.key(1), (batch, length), settings.dtype)
    problem = problem_of(settings.product, first.layout, first.values, x, x.dtype)
    microseconds = {}
    for method in select.METHODS[settings.product]:
        if method == "passes" and batch > settings.most_passes:
            continue
        if select.why_not_by(method, problem) is None:
            timing = benchmark.time_products(
                functools.partial(multiply, settings.product, method),
                matrices,
                x,
                repeats=settings.repeats,
            )
            microseconds[method] = 1e6 * timing.median
    return {"batch": batch, "microseconds": microseconds, "chosen": select.fastest_method(problem)}


def main(_):
    settings = cli.settings(Settings)
    if jax.default_backend() != "gpu":
        raise ValueError(f"kernels are timed; this needs a GPU, not {jax.default_backend()}")
    record = {
        **benchmark.environment(),
        "product": settings.product,
        "dtype": settings.dtype,
        "cases": [],
    }
    for shape, density in itertools.product(settings.shape, settings.density):
        rows, cols = benchmark.parse_shape(shape)
        dense = benchmark.random_sparse(rows, cols, density, settings.dtype)
        matrices = benchmark.distinct(
            macko_jax.compress(dense, encoding=settings.encoding, dtype=settings.values)
        )
        first = matrices[0]
        times = [tune(settings, matrices, batch) for batch in settings.batch]
        for row in times:
            each = "  ".join(f"{method} {t:.1f}" for method, t in row["microseconds"].items())
            print(
                f"{shape:>12} {density} {first.encoding} {row['batch']:>5}: {each} us; chosen: "
                f"{row['chosen']}",
                flush=True,
            )
        record["cases"].append(
            {
                "rows": rows,
                "cols": cols,
                "density": density,
                "encoding": first.encoding,
                "lanes": first.lanes,
                "stored": first.stored,
                "values": first.values.dtype.name,
                "times": times,
            }
        )
        write_json(settings.out, record)


if __name__ == "__main__":
    cli.run(main)
