"""One layer of a model solved by any method: a matrix with zeros, or a pair of factors."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax.solvers import pruners
from dsf_jax.solvers.factorize import factorize, factorize_stack
from dsf_jax.solvers.problem import relative_output_error
from dsf_jax.trace.dataflow import Layer


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What is asked for one layer: a name in `METHODS`, the density, and the method's options."""

    method: str
    density: float
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Solution:
    """A solved layer, on the host.

    Attributes:
      product: The new matrices, float32 `[groups, out, in]`; for a pair, A B.
      left, right: A `[groups, out, k]` and B `[groups, k, in]`; None for a single matrix.
      method: What produced it: the method asked for, or "dsf (admm)" and the like where a single
        matrix was better than a pair.
      nonzeros: Non-zeros kept, of both factors together.
      error: Relative output error.
      seconds: Time taken, compilation included.
    """

    product: np.ndarray
    left: np.ndarray | None
    right: np.ndarray | None
    method: str
    nonzeros: int
    error: float
    seconds: float


def _prune(method, weights, grams, names, **options):
    return [
        (pruners.prune(weight, gram, method=method, name=name, **options), None, None, method)
        for weight, gram, name in zip(weights, grams, names)
    ]


def _factorize(method, preset, weights, grams, names, **options):
    if len(weights) > 1:
        found = factorize_stack(weights, grams, preset=preset, names=names, **options)
    else:
        found = [factorize(weights[0], grams[0], preset=preset, name=names[0], **options)]
    return [
        (result.left, None, None, f"{method} ({result.method})")
        if result.kind == "single"
        else (result.product(), result.left, result.right, method)
        for result in found
    ]


# Each takes weights of one shape, their Gram matrices (or None), names for errors, density and
# options, and returns for each the new matrix, its two factors or None, and what it was found by.
METHODS = {name: functools.partial(_prune, name) for name in pruners.METHODS} | {
    "dsf-published": functools.partial(_factorize, "dsf-published", "published"),
    "dsf": functools.partial(_factorize, "dsf", "quality"),
}
PAIRS = frozenset(["dsf", "dsf-published"])  # those that give two factors

# Weights that are factorized in one program. Small layers leave a GPU idle one by one.
STACKED_WEIGHTS = 2**23


def stack_limit(assignment: Assignment, layer: Layer, device: jax.Device) -> int:
    """How many layers like this one to give to `solve` together."""
    if assignment.method not in PAIRS or layer.groups > 1 or device.platform == "cpu":
        return 1
    return max(1, STACKED_WEIGHTS // layer.size)


def solve(weights, grams, assignment: Assignment, device: jax.Device) -> dict[str, Solution]:
    """Solves the matrices of one layer, or of several layers of one shape in one program.

    Args:
      weights: For the path of each layer `[groups, out, in]`; one group if there are several.
      grams: For a path `[groups, in, in]`; where there is none, the identity (an embedding that is
        only looked up in).
      assignment: The method, density and options.
      device: Where the work is done.

    Returns:
      For each path the `Solution`; the time of a program is shared evenly by its layers.
    """
    start = time.perf_counter()
    matrices, inputs = {}, {}
    for path, groups in weights.items():
        matrices[path] = jax.device_put(jnp.asarray(groups, jnp.float32), device)
        known = grams.get(path)
        inputs[path] = [None] * len(groups) if known is None else jax.device_put(known, device)

    def run(matrices, inputs, names):
        return METHODS[assignment.method](
            matrices, inputs, names, density=assignment.density, **assignment.options
        )

    if len(weights) == 1:
        (path,) = weights
        found = {
            path: [
                run([matrix], [gram], [path])[0]
                for matrix, gram in zip(matrices[path], inputs[path])
            ]
        }
    else:
        first = [[each[path][0] for path in weights] for each in (matrices, inputs)]
        found = {path: [result] for path, result in zip(weights, run(*first, list(weights)))}
    solutions = {path: _assess(found[path], matrices[path], inputs[path]) for path in weights}
    seconds = (time.perf_counter() - start) / len(weights)
    return {
        path: dataclasses.replace(solution, seconds=seconds) for path, solution in solutions.items()
    }


def _assess(found, weights, grams) -> Solution:
    """The `Solution` of one layer from what was found for each of its groups."""
    products, lefts, rights, methods = zip(*found)
    errors, sizes = [], []
    for product, weight, gram in zip(products, weights, grams):
        errors.append(float(relative_output_error(weight, product, gram)))
        if len(found) > 1:
            energy = weight * weight if gram is None else (weight @ gram) * weight
            sizes.append(float(jnp.sum(energy)))
    # Of several groups, the error of all outputs together.
    error = errors[0] if len(errors) == 1 else np.dot(errors, sizes) / max(np.sum(sizes), 1e-30)
    product, left, right = np.stack(products), None, None
    if lefts[0] is not None:
        left, right = np.stack(lefts), np.stack(rights)
    # Counted on the host, where the matrices are by now.
    kept = [product] if left is None else [left, right]
    nonzeros = sum(int(np.count_nonzero(matrices)) for matrices in kept)
    return Solution(product, left, right, methods[-1], nonzeros, float(error), 0.0)


def check_method(method: str, path: str | None = None):
    """Raises a ValueError for an unknown method."""
    if method not in METHODS:
        layer = f"layer {path!r}: " if path else ""
        raise ValueError(f"{layer}method must be one of {', '.join(METHODS)}, got {method!r}")
