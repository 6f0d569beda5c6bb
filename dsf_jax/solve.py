"""One layer of a model solved by any method: a matrix with zeros, or a pair of factors."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax import pruners
from dsf_jax.factorize import factorize
from dsf_jax.problem import relative_output_error


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


def _prune(method, weight, gram, **options):
    return pruners.prune(weight, gram, method=method, **options), None, None, method


def _factorize(method, preset, weight, gram, **options):
    result = factorize(weight, gram, preset=preset, **options)
    if result.kind == "single":
        return result.left, None, None, f"{method} ({result.method})"
    return result.product(), result.left, result.right, method


# Each takes a weight, its Gram matrix, density, name and options, and returns the new matrix, its
# two factors or None, and what it was found by.
METHODS = {name: functools.partial(_prune, name) for name in pruners.METHODS} | {
    "dsf": functools.partial(_factorize, "dsf", "quality"),
    "dsf-published": functools.partial(_factorize, "dsf-published", "published"),
}
PAIRS = frozenset(["dsf", "dsf-published"])  # those that give two factors


def solve(weights, gram, assignment: Assignment, path: str, device: jax.Device) -> Solution:
    """Solves the matrices of one layer.

    Args:
      weights: `[groups, out, in]`.
      gram: `[groups, in, in]`, or None for the identity (an embedding that is only looked up in).
      assignment: The method, density and options.
      path: The layer's path, for errors.
      device: Where the work is done.

    Returns:
      The `Solution`.
    """
    start = time.perf_counter()
    weights = jax.device_put(jnp.asarray(weights, jnp.float32), device)
    grams = [None] * len(weights) if gram is None else jax.device_put(gram, device)
    products, lefts, rights, errors, sizes, nonzeros = [], [], [], [], [], 0
    for weight, g in zip(weights, grams):
        product, left, right, method = METHODS[assignment.method](
            weight, g, density=assignment.density, name=path, **assignment.options
        )
        products.append(product)
        lefts.append(left)
        rights.append(right)
        kept = (product,) if left is None else (left, right)
        nonzeros += sum(int(jnp.count_nonzero(matrix)) for matrix in kept)
        errors.append(float(relative_output_error(weight, product, g)))
        energy = jnp.sum(weight * weight) if g is None else jnp.sum((weight @ g) * weight)
        sizes.append(float(energy))
    # Of several groups, the error of all outputs together.
    error = errors[0] if len(errors) == 1 else np.dot(errors, sizes) / max(np.sum(sizes), 1e-30)
    pair = lefts[0] is not None
    return Solution(
        np.stack(products), np.stack(lefts) if pair else None, np.stack(rights) if pair else None,
        method, nonzeros, float(error), time.perf_counter() - start,
    )


def check_method(method: str, path: str | None = None):
    """Raises a ValueError for an unknown method."""
    if method not in METHODS:
        layer = f"layer {path!r}: " if path else ""
        raise ValueError(f"{layer}method must be one of {', '.join(METHODS)}, got {method!r}")
