"""Times and judges the factorization of layers of large-model size.

    python -m examples.benchmarks.benchmark_dsf --shape=4096x4096 --density=0.5

For every size a layer is made whose inputs are correlated as a network's are: a Gram matrix with a
decaying spectrum, a dense mean component and outlier channels, and a weight of heavy tails with
low-rank structure. Printed and saved, after each case, are the relative output error, its ratio to
`published`, the seconds of compilation and of the run, the peak memory so far and the packed bytes.
"""

import dataclasses
import datetime
import itertools
import platform
import time

import jax
import jax.monitoring
import jax.numpy as jnp
from absl import flags

import dsf_jax
from dsf_jax.solvers.factorize import PRESETS
from examples import cli
from examples.benchmarks.timing import parse_shape
from examples.records import write_json

flags.DEFINE_multi_string("shape", ["4096x4096", "11008x4096"], "Layer, out x in; repeatable.")
flags.DEFINE_multi_float(
    "density", [0.5], "Non-zeros of both factors over out * in; repeatable.", 0, 1
)
flags.DEFINE_multi_enum(
    "preset", ["published", "quality"], list(PRESETS), "Preset; repeatable, run in order."
)
flags.DEFINE_string("dsf_options", "{}", "JSON object of options over each preset.")
flags.DEFINE_float(
    "again_below", 5.0, "A first call that takes fewer seconds, less compilation, is run again."
)
flags.DEFINE_float("stop_after", 240.0, "Seconds after which no case is begun.")
flags.DEFINE_string("out", "runs/benchmark_dsf.json", "File of the record.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures; the flags of the same names say what each is."""

    shape: tuple[str, ...]
    density: tuple[float, ...]
    preset: tuple[str, ...]
    dsf_options: str
    again_below: float
    stop_after: float
    out: str


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


def measure(weight, gram, density, preset, options, again_below, compile_time):
    """Factorizes once to compile and, unless that took long, once again; returns a record."""

    def run():
        start, compiled = time.perf_counter(), compile_time.seconds
        result = dsf_jax.factorize(weight, gram, density=density, preset=preset, **options)
        jax.block_until_ready((result.left, result.right))
        compiled = compile_time.seconds - compiled
        return result, compiled, time.perf_counter() - start - compiled

    result, compiled, seconds = run()
    again = seconds < again_below
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
    settings = cli.settings(Settings)
    options = cli.read_options(settings.dsf_options)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": cli.command("benchmarks.benchmark_dsf"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "layers": "synthetic, inputs correlated, see make_layer",
        "results": [],
    }
    compile_time = CompileTime()
    published = {}
    # The presets one after the other over all layers, so that the peak memory is the last one's.
    for preset, density, shape in itertools.product(
        settings.preset, settings.density, settings.shape
    ):
        if time.perf_counter() - began > settings.stop_after:
            print(f"{shape:>12} {preset:10} not begun: --stop_after={settings.stop_after:g} s")
            continue
        rows, cols = parse_shape(shape)
        result = measure(
            *make_layer(rows, cols), density, preset, options, settings.again_below, compile_time
        )
        result = {"rows": rows, "cols": cols, "density": density} | result
        case = shape, density
        if preset == "published":
            published[case] = result["relative_output_error"]
        if case in published:
            result["ratio_to_published"] = result["relative_output_error"] / published[case]
        record["results"].append(result)
        write_json(settings.out, record)
        _show(shape, result)
    print(f"written: {settings.out}")


def _show(shape, result):
    peak = result["peak_bytes_so_far"]
    print(
        f"{shape:>12} {result['preset']:10} {result['method']:9} "
        f"error {result['relative_output_error']:.5f} "
        f"ratio {result.get('ratio_to_published', float('nan')):.3f}  "
        f"{result['seconds']:.2f} s, compiled in {result['compile_seconds']:.1f} s  "
        f"peak {'?' if peak is None else f'{peak / 2**30:.2f}'} GiB  "
        f"packed {result['packed_bytes'] / 2**20:.1f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main)
