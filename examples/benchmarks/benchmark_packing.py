"""Time to pack and unpack a matrix, on the host and on the default device.

    python -m examples.benchmarks.benchmark_packing --out=docs/results/packing_cpu

Where other programs share the processor, the processor time says more than the clock.
"""

import functools
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

import macko_jax
from examples.benchmarks import timing as benchmark
from examples.records import write_json
from macko_jax.format import pack as packing
from macko_jax.format.codes import ENCODINGS

SHAPE = flags.DEFINE_string("shape", "4096x11008", "Rows x cols.")
DENSITY = flags.DEFINE_float("density", 0.5, "Share of non-zeros.", 0, 1)
DTYPES = flags.DEFINE_list("dtypes", ["float16", "float32"], "Types of the values.")
REPEATS = flags.DEFINE_integer(
    "repeats", 5, "How often each is timed; the first run is left out.", lower_bound=1
)
OUT = flags.DEFINE_string("out", "runs/packing", "The record goes to <out>.json.")


def seconds(run) -> dict:
    """First and median time of `run`; on the host also the processor time, free of neighbours."""
    wall, processor = [], []
    for _ in range(REPEATS.value + 1):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "first": wall[0],
        "median": float(np.median(wall[1:])),
        "processor": float(np.median(processor[1:])),
    }


def main(_):
    rows, cols = map(int, SHAPE.value.split("x"))
    records = []
    for dtype in DTYPES.value:
        on_device = benchmark.random_sparse(rows, cols, DENSITY.value, dtype)
        on_host = np.asarray(on_device)
        for encoding in ENCODINGS:
            matrix = macko_jax.compress(on_host, encoding=encoding)
            if not np.array_equal(macko_jax.decompress(matrix), on_host):
                raise SystemExit(f"{encoding} {dtype}: the round trip changed the matrix")
            pack_there = functools.partial(packing.pack, encoding=encoding, lanes=32, capacity=None)
            runs = {
                "host": functools.partial(macko_jax.compress, on_host, encoding=encoding),
                "device": functools.partial(pack_there, on_device, on_device=True),
                "decompress": functools.partial(macko_jax.decompress, matrix),
            }
            for where, run in runs.items():
                took = seconds(run)
                records.append(
                    {
                        "shape": [rows, cols],
                        "density": DENSITY.value,
                        "dtype": dtype,
                        "encoding": encoding,
                        "run": where,
                        **took,
                        "gb_per_s": on_host.nbytes / took["median"] / 1e9,
                    }
                )
                print(
                    f"{dtype:9} {encoding:8} {where:10} {took['median'] * 1e3:9.1f} ms "
                    f"(first {took['first'] * 1e3:.0f}, processor {took['processor'] * 1e3:.0f}) "
                    f"{records[-1]['gb_per_s']:7.2f} GB/s of dense input",
                    flush=True,
                )
    write_json(
        pathlib.Path(OUT.value).with_suffix(".json"),
        {
            "command": " ".join(["examples/benchmarks/benchmark_packing.py", *sys.argv[1:]]),
            **benchmark.environment(),
            "records": records,
        },
    )


if __name__ == "__main__":
    app.run(main)
