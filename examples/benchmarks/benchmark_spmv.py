"""Times the sparse matrix-vector product against what a user would have without it.

    python -m examples.benchmarks.benchmark_spmv --shape=4096x4096 --shape=11008x4096 --density=0.5

Every implementation is checked against float64 first. Matrices are rotated so that none comes from
a cache; printed and saved are medians and percentiles. With --read_floor, on a GPU, a kernel that
only reads as many bytes shows what memory allows.
"""

import csv
import dataclasses
import importlib.metadata
import importlib.util
import itertools

import jax
import numpy as np
from absl import flags
from jax.experimental import sparse

import macko_jax
from examples import cli
from examples.benchmarks import timing as benchmark
from examples.records import write_json
from macko_jax.format.codes import ENCODINGS
from macko_jax.gpu import tuning
from macko_jax.io.atomic import replacing

# Of rounding the result, and of rivals that sum in 16 bits.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 5e-2}


def macko(implementation=None, **options):
    def make(dense):
        product = lambda m, x: macko_jax.spmv(m, x, implementation=implementation)
        return macko_jax.compress(dense, **options), product

    return make


def jax_sparse(kind):
    return lambda dense: (kind.fromdense(dense), lambda m, x: (m @ x.T).T)


# name -> function of the dense matrix that gives (matrix, product of matrix and vectors)
MAKERS = {
    **{
        "_".join(filter(None, ("macko", encoding, short))): macko(encoding=encoding, dtype=dtype)
        for encoding in (None, *ENCODINGS)
        for short, dtype in ((None, None), ("int8", "int8"), ("fp8", "float8_e4m3fn"))
    },
    "macko_xla": macko(implementation="xla"),
    "dense": lambda dense: (dense, lambda m, x: x @ m.T if x.ndim > 1 else m @ x),
    "bcsr": jax_sparse(sparse.BCSR),
    "bcoo": jax_sparse(sparse.BCOO),
}


TORCH = ("torch", "torch_csr")  # dense by cuBLAS, compressed sparse rows by cuSPARSE

# product name -> from the forward product, a function of (matrix, x, y)
PRODUCTS = {
    "forward": lambda product: lambda m, x, y: product(m, x),
    "transposed": lambda product: lambda m, x, y: jax.vjp(lambda x: product(m, x), x)[1](y)[0],
    "by_values": lambda product: (
        lambda m, x, y: values_of(jax.vjp(lambda m: product(m, x), m)[1](y)[0])
    ),
}


def values_of(matrix):
    """The part of a matrix's gradient that is not about positions."""
    return matrix.values if isinstance(matrix, macko_jax.MackoMatrix) else matrix


flags.DEFINE_multi_string("shape", ["4096x4096"], "Matrix, rows x cols; repeatable.")
flags.DEFINE_multi_float(
    "density", [0.5, 0.3, 0.1], "Share of non-zeros; repeatable.", lower_bound=0.0, upper_bound=1.0
)
flags.DEFINE_multi_enum(
    "dtype",
    ["float16"],
    list(TOLERANCE),
    "Type of matrix and vector; repeatable. XLA's products in float32 are computed in full "
    "(matmul precision 'highest'), not in TensorFloat-32, which fails the check.",
)
flags.DEFINE_enum(
    "product",
    "forward",
    list(PRODUCTS),
    "y = A x, or one of its derivatives: x = A^T y, and y x^T where A has values.",
)
flags.DEFINE_multi_integer("batch", [1], "Vectors at a time; repeatable.", lower_bound=1)
flags.DEFINE_multi_enum(
    "implementation",
    ["macko", "dense"],
    [*MAKERS, *TORCH],
    "What to time; repeatable. macko may end in an encoding and a type; torch is cuBLAS and "
    "torch_csr cuSPARSE on compressed rows, where torch is installed.",
)
flags.DEFINE_multi_string(
    "tuned",
    [],
    "NAME=NUMBER: another value of a number of macko_jax/gpu/tuning.py for this run; repeatable. "
    "PAIRS_IN_FLIGHT gets it for every number of vectors.",
)
flags.DEFINE_integer("repeats", 10, "Passes over all matrices.", lower_bound=1)
flags.DEFINE_bool("read_floor", True, "Time a plain read of the same bytes (GPU).")
flags.DEFINE_string("out", "runs/spmv", "Records go to OUT.json and OUT.csv.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures; the flags of the same names say what each is."""

    shape: tuple[str, ...]
    density: tuple[float, ...]
    dtype: tuple[str, ...]
    product: str
    batch: tuple[int, ...]
    implementation: tuple[str, ...]
    tuned: tuple[str, ...]
    repeats: int
    read_floor: bool
    out: str


def set_tuned(assignments) -> None:
    """Changes tuned numbers of the kernels in this process, given as NAME=NUMBER."""
    for assignment in assignments:
        name, _, number = assignment.partition("=")
        before = getattr(tuning, name, None)
        if not isinstance(before, int | dict) or not number.isdigit():
            raise ValueError(
                f"--tuned={assignment}: give NAME=NUMBER, the name of a whole number, or of "
                "several, in macko_jax/gpu/tuning.py"
            )
        new = int(number)
        setattr(tuning, name, dict.fromkeys(before, new) if isinstance(before, dict) else new)


def error_of(product, result, dense, x, y, matrix) -> float:
    """Relative error of a result against float64, apart from the rounding of 8-bit values."""
    if isinstance(matrix, macko_jax.MackoMatrix):
        dense = macko_jax.decompress(matrix)
    if product == "forward":
        return benchmark.relative_error(result, dense, x)
    if product == "transposed":
        return benchmark.relative_error(result, dense.T, y)
    kept = np.asarray(dense) != 0
    if isinstance(matrix, macko_jax.MackoMatrix):
        result = macko_jax.decompress(dataclasses.replace(matrix, values=result))
    exact = np.atleast_2d(y).astype(np.float64).T @ np.atleast_2d(x).astype(np.float64) * kept
    difference = np.asarray(result, np.float64) * kept - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def time_torch(name, dense, x, repeats):
    """(bytes, result, timing) of cuBLAS or cuSPARSE through torch, in a CUDA graph."""
    import torch

    kind = getattr(torch, x.dtype.name)
    as_torch = lambda a: torch.tensor(np.asarray(a, np.float32), device="cuda").to(kind)
    matrix, size = as_torch(dense), dense.nbytes
    if name == "torch_csr":
        rows = matrix.to_sparse_csr()
        parts = rows.crow_indices().int(), rows.col_indices().int(), rows.values()
        matrix = torch.sparse_csr_tensor(*parts, size=dense.shape)
        size = sum(part.numel() * part.element_size() for part in parts)
    matrices = [matrix.clone() for _ in range(benchmark.copies(size))]
    vectors = as_torch(x).T.contiguous() if x.ndim > 1 else as_torch(x)
    result = (matrices[0] @ vectors).float().cpu().numpy()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for m in matrices:
            m @ vectors
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        kept = [m @ vectors for m in matrices]
    seconds = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(matrices))
    del kept
    timing = benchmark.Timing(*np.percentile(seconds[1:], [10, 50, 90]).tolist())
    return size, result.T if x.ndim > 1 else result, timing


def time_read(count: int, repeats: int) -> float:
    """Median seconds that a kernel takes to read `count` bytes."""
    from examples.benchmarks import read_floor as read

    size = max(1, count // 16) * 8
    array = benchmark.random_sparse(1, size, 1.0, "float16").reshape(-1)
    arrays = benchmark.distinct(array)
    return benchmark.time_products(read.read, arrays, repeats=repeats).median


def measure(name, dense, x, y, settings) -> dict:
    """Checks one implementation, then times it."""
    if name in TORCH:
        matrix, (size, result, timing) = None, time_torch(name, dense, x, settings.repeats)
    else:
        matrix, product = MAKERS[name](dense)
        product = PRODUCTS[settings.product](product)
        size, result = benchmark.nbytes(matrix), jax.jit(product)(matrix, x, y)
        matrices = benchmark.distinct(matrix)
        timing = benchmark.time_products(product, matrices, x, y, repeats=settings.repeats)
    error = error_of(settings.product, result, dense, x, y, matrix)
    if not error < TOLERANCE[x.dtype.name]:
        raise ArithmeticError(f"{name} is wrong: relative error {error:.1e}")
    record = {
        "implementation": name,
        "bytes": size,
        "relative_error": error,
        "microseconds": 1e6 * timing.median,
        "microseconds_p10": 1e6 * timing.p10,
        "microseconds_p90": 1e6 * timing.p90,
        "gigabytes_per_second": size / timing.median / 1e9,
    }
    if settings.read_floor and jax.default_backend() == "gpu":
        floor = time_read(size, settings.repeats)
        record |= {"read_floor_microseconds": 1e6 * floor, "of_read_floor": floor / timing.median}
    return record


def save(settings, records: list) -> None:
    """Writes all records so far, as JSON with the environment and as a table."""
    environment = benchmark.environment()
    if set(TORCH) & set(settings.implementation):
        environment["versions"]["torch"] = importlib.metadata.version("torch")
    command = cli.command("benchmarks.benchmark_spmv")
    write_json(f"{settings.out}.json", {"command": command, **environment, "records": records})
    columns = list(dict.fromkeys(key for record in records for key in record))
    with replacing(f"{settings.out}.csv") as table, table.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)


def measure_case(shape, density, dtype, batch, settings) -> list[dict]:
    """The records of all implementations for one matrix and number of vectors."""
    rows, cols = benchmark.parse_shape(shape)
    dense = benchmark.random_sparse(rows, cols, density, dtype)
    x = jax.random.normal(jax.random.key(1), (batch, cols), dtype)
    y = jax.random.normal(jax.random.key(2), (batch, rows), dtype)
    x, y = (x[0], y[0]) if batch == 1 else (x, y)
    case = {
        "rows": rows,
        "cols": cols,
        "density": density,
        "dtype": dtype,
        "batch": batch,
        "product": settings.product,
    }
    # XLA's dense float32 products would round their operands to TensorFloat-32 on a GPU.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        group = [case | measure(name, dense, x, y, settings) for name in settings.implementation]
    rivals = [r["microseconds"] for r in group if r["implementation"] in ("dense", "torch")]
    for record in group:
        if rivals:
            record["speedup"] = min(rivals) / record["microseconds"]
        print(
            f"{rows:>7} x {cols:<5} {density:>7} {dtype:>9} {batch:>5} "
            f"{record['implementation']:14} {record['microseconds']:>9.2f} "
            f"{record['gigabytes_per_second']:>6.0f} {record.get('speedup', 0):>8.2f} "
            f"{record.get('of_read_floor', 0):>8.2f}",
            flush=True,
        )
    return group


def main(_):
    settings = cli.settings(Settings)
    set_tuned(settings.tuned)
    asked = sorted(set(TORCH) & set(settings.implementation))
    if asked and importlib.util.find_spec("torch") is None:
        raise ValueError(f"torch is not installed; leave {asked} out of --implementation")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    header = (
        f"{'rows x cols':>15} {'density':>7} {'dtype':>9} {'batch':>5} {'':14} "
        f"{'us':>9} {'GB/s':>6} {'speed-up':>8} {'of floor':>8}"
    )
    print(header, flush=True)
    records = []
    for case in itertools.product(settings.shape, settings.density, settings.dtype, settings.batch):
        records += measure_case(*case, settings)
        save(settings, records)
    print(f"written: {settings.out}.json, {settings.out}.csv")


if __name__ == "__main__":
    cli.run(main)
