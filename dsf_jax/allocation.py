"""Densities of layers under one budget for the model, by how much the model's output suffers."""

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax.problem import relative_output_error
from dsf_jax.pruners import prune

# Densities probed, as multiples of the model's; further away, errors add up no more.
PROBES = np.linspace(0.7, 1.3, 7)


def probe_errors(weights, gram, density: float, name: str):
    """Relative output error of a layer at several densities, by Wanda pruning.

    Args:
      weights: `[groups, out, in]`.
      gram: `[groups, in, in]`, or None for the identity.
      density: The density around which to probe.
      name: The layer's path, for errors.

    Returns:
      Densities and errors, both `[probes]`; the weights pruned to `density`; their error.
    """
    grams = [None] * len(weights) if gram is None else gram

    def pruned(share):
        kept = [
            prune(w, g, density=share, method="wanda", name=name) for w, g in zip(weights, grams)
        ]
        errors = [relative_output_error(w, k, g) for w, k, g in zip(weights, kept, grams)]
        return jnp.stack(kept), float(jnp.mean(jnp.stack(errors)))

    densities = np.unique(np.minimum(PROBES * density, 1.0))
    return densities, np.array([pruned(share)[1] for share in densities]), *pruned(density)


@jax.jit
def output_change(reference, changed):
    """How far a model's outputs are from what they were, a scalar for each list of arrays.

    Outputs with more than one entry on their last axis are taken for logits: the mean
    Kullback-Leibler divergence of their softmax; others by their mean squared change.
    """
    total = 0.0
    for a, b in zip(reference, changed):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        if a.ndim and a.shape[-1] > 1:
            p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
            total += jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
        else:
            total += jnp.mean(jnp.square(a - b))
    return total


def allocate_densities(curves: dict, sizes: dict[str, int], density: float) -> dict[str, float]:
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
        for a, b in zip(hull, hull[1:]):
            cost = (densities[b] - densities[a]) * sizes[path]
            steps.append(((errors[a] - errors[b]) / cost, path, densities[b], cost))
    left = density * sum(sizes.values()) - sum(result[path] * sizes[path] for path in curves)
    for _, path, target, cost in sorted(steps, key=lambda step: -step[0]):
        share = min(1.0, max(left, 0.0) / cost)
        result[path] += share * (target - result[path])
        left -= cost
    return {path: float(share) for path, share in result.items()}


def _lower_hull(x, y):
    """Indices of the lower convex hull of points sorted by x (Andrew's monotone chain)."""
    hull = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) >= (y[i] - y[a]) * (x[b] - x[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return hull
