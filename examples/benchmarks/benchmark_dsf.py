"""Times and judges the factorization of layers of large-model size.

    python -m examples.benchmarks.benchmark_dsf --sizes=4096x4096,11008x4096 --density=0.5

For every size a layer is made whose inputs are correlated as a network's are: a Gram matrix with a
decaying spectrum, a dense mean component and outlier channels, and a weight of heavy tails with
low-rank structure. Printed and saved, after each case, are the relative output error, its ratio to
`published`, the seconds of compilation and of the run, the peak memory so far and the packed bytes.
"""

import datetime
import json
import platform
import sys
import time

import jax
import jax.monitoring
import jax.numpy as jnp
from absl import app, flags

import dsf_jax
from examples.records import write_json

_SIZES = flags.DEFINE_list("sizes", ["4096x4096", "11008x4096"], "Layers, out x in.")
_DENSITY = flags.DEFINE_float("density", 0.5, "Non-zeros of both factors over out * in.")
_PRESETS = flags.DEFINE_list("presets", ["published", "quality"], "Presets, in order.")
_OPTIONS = flags.DEFINE_string("options", "{}", "JSON object of options over each preset.")
_AGAIN_BELOW = flags.DEFINE_float(
    "again_below", 5.0, "A first call that takes fewer seconds, less compilation, is run again."
)
_STOP_AFTER = flags.DEFINE_float("stop_after", 240.0, "Seconds after which no case is begun.")
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


class CompileTime:
    """Seconds that JAX has spent on lowering and compiling, counted from now on."""

    EVENTS = (
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event, seconds, **_):
        if event in self.EVENTS:
            self.seconds += seconds


def measure(weight, gram, preset, options, compile_time):
    """Factorizes once to compile and, unless that took long, once again; returns a record."""

    def run():
        start, compiled = time.perf_counter(), compile_time.seconds
        result = dsf_jax.factorize(weight, gram, density=_DENSITY.value, preset=preset, **options)
        jax.block_until_ready((result.left, result.right))
        compiled = compile_time.seconds - compiled
        return result, compiled, time.perf_counter() - start - compiled

    result, compiled, seconds = run()
    again = seconds < _AGAIN_BELOW.value
    if again:  # without what a first call loads and allocates
        seconds = min(seconds, run()[2])
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
        "compile_seconds": compiled,
        "seconds": seconds,
        "timed_on": "second call" if again else "first call, less the time of compilation",
        "peak_bytes_so_far": stats.get("peak_bytes_in_use"),
    }


def main(_):
    began = time.perf_counter()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, density {_DENSITY.value}", flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m examples.benchmarks.benchmark_dsf "
        + " ".join(argument for argument in sys.argv[1:] if not argument.startswith("--output")),
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "layers": "synthetic, inputs correlated, see make_layer",
        "results": [],
    }
    options = json.loads(_OPTIONS.value)
    compile_time = CompileTime()
    published = {}
    # The presets one after the other over all sizes, so that the peak memory is that of the last.
    for preset in _PRESETS.value:
        for size in _SIZES.value:
            if time.perf_counter() - began > _STOP_AFTER.value:
                print(f"{size:>12} {preset:10} not begun: --stop_after={_STOP_AFTER.value:g} s")
                continue
            rows, cols = map(int, size.split("x"))
            result = measure(*make_layer(rows, cols), preset, options, compile_time)
            result = {"rows": rows, "cols": cols, "density": _DENSITY.value} | result
            if preset == "published":
                published[size] = result["relative_output_error"]
            if size in published:
                result["ratio_to_published"] = result["relative_output_error"] / published[size]
            record["results"].append(result)
            write_json(_OUTPUT.value, record)
            _show(size, result)
    print(f"wrote {_OUTPUT.value}")


def _show(size, result):
    peak = result["peak_bytes_so_far"]
    print(
        f"{size:>12} {result['preset']:10} {result['method']:9} "
        f"error {result['relative_output_error']:.5f} "
        f"ratio {result.get('ratio_to_published', float('nan')):.3f}  "
        f"{result['seconds']:.2f} s, compiled in {result['compile_seconds']:.1f} s  "
        f"peak {'?' if peak is None else f'{peak / 2**30:.2f}'} GiB  "
        f"packed {result['packed_bytes'] / 2**20:.1f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    app.run(main)
