"""Times and judges the factorization of layers of large-model size.

    python -m examples.benchmark_dsf --sizes=4096x4096,11008x4096 --density=0.5

For every size a layer is made whose inputs are correlated as a network's are: a Gram matrix with a
decaying spectrum, a dense mean component and outlier channels, and a weight of heavy tails with
low-rank structure. Each preset factorizes it once to compile and then again; printed and saved are
the relative output errors, their ratio to `published`, seconds, and peak memory.
"""

import json
import os
import time

from absl import app, flags
import jax
import jax.numpy as jnp

import dsf_jax

_SIZES = flags.DEFINE_list("sizes", ["4096x4096", "11008x4096"], "Layers, out x in.")
_DENSITY = flags.DEFINE_float("density", 0.5, "Non-zeros of both factors over out * in.")
_PRESETS = flags.DEFINE_list("presets", ["published", "quality"], "Presets, in order.")
_OPTIONS = flags.DEFINE_string("options", "{}", "JSON object of options over each preset.")
_REPEATS = flags.DEFINE_integer("repeats", 1, "Timed runs after the one that compiles.")
_OUTPUT = flags.DEFINE_string("output", "runs/benchmark_dsf.json", "Where the record goes.")


def make_layer(rows, cols, seed=0):
    """A weight `[rows, cols]` and the Gram matrix `[cols, cols]` of correlated inputs."""
    keys = jax.random.split(jax.random.key(seed), 7)
    samples = 4 * cols
    with jax.default_matmul_precision("highest"):
        basis = jnp.linalg.qr(jax.random.normal(keys[0], (cols, cols)))[0]
        spectrum = (1 + jnp.arange(cols)) ** -0.4
        inputs = (jax.random.normal(keys[1], (samples, cols)) * spectrum) @ basis
        inputs += 0.5 * jnp.std(inputs) * jax.random.normal(keys[2], (cols,))
        # A few channels are many times larger than the rest, as in transformers.
        inputs *= jnp.exp(0.5 * jax.random.normal(keys[3], (cols,)))
        gram = inputs.T @ inputs
        rank = min(rows, cols) // 8
        low = jax.random.normal(keys[4], (rows, rank)) @ jax.random.normal(keys[5], (rank, cols))
        weight = jax.random.t(keys[6], 6.0, (rows, cols)) + 0.5 * low / rank**0.5
    return 0.02 * weight, gram


def measure(weight, gram, preset, options, repeats):
    """Factorizes once to compile and then `repeats` times; returns a record."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        result = dsf_jax.factorize(
            weight, gram, density=_DENSITY.value, preset=preset, **options
        )
        jax.block_until_ready((result.left, result.right))
        seconds.append(time.perf_counter() - start)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "preset": preset,
        "options": options,
        "method": result.method,
        "relative_output_error": result.relative_error,
        "alternatives": result.alternatives,
        "nonzeros": result.nnz,
        "inner": result.inner,
        "packed_bytes": result.nbytes,
        "seconds_with_compilation": seconds[0],
        "seconds": min(seconds[1:], default=None),
        "peak_bytes_so_far": stats.get("peak_bytes_in_use"),
    }


def main(_):
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, density {_DENSITY.value}")
    records = []
    for size in _SIZES.value:
        rows, cols = map(int, size.split("x"))
        weight, gram = make_layer(rows, cols)
        published = None
        for preset in _PRESETS.value:
            options = json.loads(_OPTIONS.value)
            record = measure(weight, gram, preset, options, _REPEATS.value)
            record = {"rows": rows, "cols": cols, "density": _DENSITY.value} | record
            if preset == "published":
                published = record["relative_output_error"]
            if published:
                record["ratio_to_published"] = record["relative_output_error"] / published
            records.append(record)
            timed = record["seconds"]
            peak = record["peak_bytes_so_far"]
            print(
                f"{size:>12} {preset:10} {record['method']:9} "
                f"error {record['relative_output_error']:.5f} "
                f"ratio {record.get('ratio_to_published', float('nan')):.3f}  "
                f"{timed if timed is not None else float('nan'):.2f} s "
                f"(first {record['seconds_with_compilation']:.1f} s)  "
                f"peak {'?' if peak is None else f'{peak / 2**30:.2f}'} GiB  "
                f"packed {record['packed_bytes'] / 2**20:.1f} MiB",
                flush=True,
            )
    record = {"device": device.device_kind, "jax": jax.__version__, "results": records}
    os.makedirs(os.path.dirname(_OUTPUT.value) or ".", exist_ok=True)
    with open(_OUTPUT.value + ".part", "w") as file:
        json.dump(record, file, indent=1)
    os.replace(_OUTPUT.value + ".part", _OUTPUT.value)
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
