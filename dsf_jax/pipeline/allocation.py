"""Densities of layers under one budget for the model, by how much each layer's output suffers."""

import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dsf_jax.solvers.methods import METHODS
from dsf_jax.solvers.problem import Problem

# Densities probed, as multiples of the model's. A wider range lowers the sum of errors further, and
# made a language model worse: errors of layers do not simply add up.
PROBES = np.linspace(0.7, 1.3, 7)


def probe_errors(
    weights: jax.Array, gram: jax.Array | None, density: float, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Relative output error of a layer at several densities, by Wanda pruning.

    Args:
      weights: `[groups, out, in]`.
      gram: `[groups, in, in]`, or None for the identity.
      density: The density around which to probe.
      name: The layer's path, for errors.

    Returns:
      Densities and errors, both `[probes]`.
    """
    grams = [None] * len(weights) if gram is None else gram
    problems = [Problem.of(*group, name) for group in zip(weights, grams)]
    densities = np.unique(np.minimum(PROBES * density, 1.0))
    errors = [
        np.mean([found.relative_error for found in METHODS["wanda"].solve(problems, d, {})])
        for d in densities
    ]
    return densities, np.asarray(errors)


def allocate_densities(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], sizes: Mapping[str, int], density: float
) -> dict[str, float]:
    """Splits one budget between layers so that the sum of their errors is least.

    minimise sum_l e_l(d_l) subject to sum_l n_l d_l <= density * sum_l n_l, by taking, step by
    step, what lowers the error most per non-zero; with convex curves (their lower hull is taken)
    that is optimal among the densities probed.

    Args:
      curves: For each path, densities (ascending) and errors, as from `probe_errors`.
      sizes: out * in of each layer.
      density: Kept fraction of all layers together.

    Returns:
      A density for each path.
    """
    steps, result = [], {}
    for path, (densities, errors) in curves.items():
        hull = _lower_hull(densities, errors)
        result[path] = densities[hull[0]]
        for a, b in itertools.pairwise(hull):
            cost = (densities[b] - densities[a]) * sizes[path]
            steps.append(((errors[a] - errors[b]) / cost, path, densities[b], cost))
    left = density * sum(sizes.values()) - sum(result[path] * sizes[path] for path in curves)
    for _, path, target, cost in sorted(steps, key=lambda step: -step[0]):
        share = min(1.0, max(left, 0.0) / cost)
        result[path] += share * (target - result[path])
        left -= cost
    return {path: float(share) for path, share in result.items()}


def _lower_hull(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points sorted by x (Andrew's monotone chain)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) >= (y[i] - y[a]) * (x[b] - x[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return hull
