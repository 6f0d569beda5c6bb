"""Time to pack and unpack a matrix, on the host and on the default device.

    python -m examples.benchmarks.benchmark_packing --shape=4096x11008 --out=runs/packing

Where other programs share the processor, the processor time says more than the clock.
"""

import dataclasses
import functools
import itertools
import time

import jax
import numpy as np
from absl import flags

import macko_jax
from examples import cli
from examples.benchmarks import timing as benchmark
from examples.records import write_json
from macko_jax.format import pack as packing
from macko_jax.format.codes import ENCODINGS

flags.DEFINE_multi_string("shape", ["4096x11008"], "Matrix, rows x cols; repeatable.")
flags.DEFINE_multi_float("density", [0.5], "Share of non-zeros; repeatable.", 0, 1)
flags.DEFINE_multi_enum(
    "dtype",
    ["float16", "float32"],
    ["float32", "bfloat16", "float16"],
    "Type of the values; repeatable.",
)
flags.DEFINE_integer("repeats", 5, "Timed runs, after one that is left out.", lower_bound=1)
flags.DEFINE_string("out", "runs/packing", "The record goes to OUT.json.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures; the flags of the same names say what each is."""

    shape: tuple[str, ...]
    density: tuple[float, ...]
    dtype: tuple[str, ...]
    repeats: int
    out: str


def seconds(run, repeats: int) -> dict:
    """First and median time of `run`; on the host also the processor time, free of neighbours."""
    wall, processor = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "first": wall[0],
        "median": float(np.median(wall[1:])),
        "processor": float(np.median(processor[1:])),
    }


def measure(shape, density, dtype, repeats) -> list[dict]:
    """Times every encoding of one matrix, after checking that it survives the round trip."""
    rows, cols = benchmark.parse_shape(shape)
    on_device = benchmark.random_sparse(rows, cols, density, dtype)
    on_host = np.asarray(on_device)
    records = []
    for encoding in ENCODINGS:
        matrix = macko_jax.compress(on_host, encoding=encoding)
        if not np.array_equal(macko_jax.decompress(matrix), on_host):
            raise ArithmeticError(f"{encoding} {dtype}: the round trip changed the matrix")
        runs = {
            "host": functools.partial(macko_jax.compress, on_host, encoding=encoding),
            "device": functools.partial(
                packing.pack, on_device, encoding, 32, None, on_device=True
            ),
            "decompress": functools.partial(macko_jax.decompress, matrix),
        }
        for where, run in runs.items():
            took = seconds(run, repeats)
            record = {
                "shape": [rows, cols],
                "density": density,
                "dtype": dtype,
                "encoding": encoding,
                "run": where,
                **took,
                "gb_per_s": on_host.nbytes / took["median"] / 1e9,
            }
            print(
                f"{dtype:9} {encoding:8} {where:10} {took['median'] * 1e3:9.1f} ms "
                f"(first {took['first'] * 1e3:.0f}, processor {took['processor'] * 1e3:.0f}) "
                f"{record['gb_per_s']:7.2f} GB/s of dense input",
                flush=True,
            )
            records.append(record)
    return records


def main(_):
    settings = cli.settings(Settings)
    records = []
    for case in itertools.product(settings.shape, settings.density, settings.dtype):
        records += measure(*case, settings.repeats)
        described = {"command": cli.command("benchmarks.benchmark_packing")}
        write_json(
            f"{settings.out}.json", described | benchmark.environment() | {"records": records}
        )


if __name__ == "__main__":
    cli.run(main)
