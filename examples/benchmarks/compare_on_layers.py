"""Prunes and factorizes real layers by every method and compares with the reference errors.

    python -m examples.benchmarks.compare_on_layers --method=admm --method=quality

Reads the layers of --data (their README says what they are) and prints, for each layer, density and
method, the relative output error on the calibration text and on other text, both also as ratio to
the published program's, with non-zeros, packed bytes and seconds. The record is rewritten after
every case, so that a long run can be watched.
"""

import dataclasses
import datetime
import itertools
import platform
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

import dsf_jax
from dsf_jax.solvers.budget import packed_nbytes
from dsf_jax.solvers.factorize import PRESETS
from dsf_jax.solvers.pruners import PRUNERS
from examples import cli
from examples.benchmarks.layers import load_layer, load_reference
from examples.records import write_json

flags.DEFINE_string("data", "tests/data/dsf_layers", "Folder of .npz layers.")
flags.DEFINE_multi_string(
    "layer", [], "Layer such as l0.query; repeatable; by default all in --data."
)
flags.DEFINE_multi_float("density", [0.5, 0.4, 0.3, 0.2], "Density; repeatable.", 0, 1)
flags.DEFINE_multi_enum(
    "method",
    [*PRUNERS, *PRESETS],
    [*PRUNERS, *PRESETS],
    "Pruning method or preset of the factorization; repeatable.",
)
flags.DEFINE_string("dsf_options", "{}", "JSON object of options over the presets.")
flags.DEFINE_string("out", "runs/compare_on_layers.json", "File of the record.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run compares; the flags of the same names say what each is."""

    data: str
    layer: tuple[str, ...]
    density: tuple[float, ...]
    method: tuple[str, ...]
    dsf_options: str
    out: str


def run_case(weight, gram, other, density, method, options):
    """Runs one method on one layer; returns a record."""
    start = time.perf_counter()
    if method in PRESETS:
        result = dsf_jax.factorize(weight, gram, density=density, preset=method, **options)
        product, extra = result.product(), {"inner": result.inner, "kept": result.method}
        nonzeros, stored = result.nnz, result.nbytes
    else:
        product = dsf_jax.prune(weight, gram, density=density, method=method)
        extra, nonzeros, stored = {}, int((product != 0).sum()), packed_nbytes(product)
    return {
        "relative_output_error": float(dsf_jax.relative_output_error(weight, product, gram)),
        "on_other_text": float(dsf_jax.relative_output_error(weight, product, other)),
        "nonzeros": nonzeros,
        "packed_bytes": stored,
        **extra,
        "seconds": round(time.perf_counter() - start, 2),
    }


def main(_):
    settings = cli.settings(Settings)
    options = cli.read_options(settings.dsf_options)
    reference = load_reference(settings.data)
    layers = settings.layer or sorted(path.stem for path in Path(settings.data).glob("*.npz"))
    record = {
        "date": datetime.date.today().isoformat(),
        "command": cli.command("benchmarks.compare_on_layers"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "results": [],
    }
    print(
        "layer         density method      error    other    | to published, other | nnz, bytes, s"
    )
    for layer in layers:
        arrays = load_layer(Path(settings.data) / f"{layer}.npz")
        for density, method in itertools.product(settings.density, settings.method):
            case = run_case(*arrays, density, method, options)
            case = {"layer": layer, "density": density, "method": method, **case}
            if published := reference.get((layer, "published DSF", density)):
                case["ratio_to_published"] = case["relative_output_error"] / published[0]
                case["ratio_to_published_on_other_text"] = case["on_other_text"] / published[1]
            record["results"].append(case)
            print(
                f"{layer:13} {density:<7} {method:10} {case['relative_output_error']:.6f} "
                f"{case['on_other_text']:.6f} | {case.get('ratio_to_published', 0):.3f} "
                f"{case.get('ratio_to_published_on_other_text', 0):.3f} | "
                f"{case['nonzeros']} {case['packed_bytes']} {case['seconds']}",
                flush=True,
            )
            write_json(settings.out, record)
    _print_means(record["results"])


def _print_means(results):
    for method in dict.fromkeys(case["method"] for case in results):
        for density in dict.fromkeys(case["density"] for case in results):
            ratios = [
                (case["ratio_to_published"], case["ratio_to_published_on_other_text"])
                for case in results
                if "ratio_to_published" in case
                and (case["method"], case["density"]) == (method, density)
            ]
            if ratios:
                mean = np.mean(ratios, axis=0)
                print(
                    f"{method:10} density {density}: mean ratio to published {mean[0]:.3f}, "
                    f"on other text {mean[1]:.3f}"
                )


if __name__ == "__main__":
    cli.run(main)
