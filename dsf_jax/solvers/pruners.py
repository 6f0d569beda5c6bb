"""Pruning of one matrix: the baselines beside which a factorization is judged.

Every method keeps exactly ``floor(density * out * in)`` entries (or exactly n of every m for an N:M
pattern) and works on the scaled problem of `dsf_jax.problem`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsf_jax.solvers import masks
from dsf_jax.solvers.admm import COMPILER_OPTIONS, refit_rows
from dsf_jax.solvers.budget import count_nonzeros
from dsf_jax.solvers.problem import check_density, check_layer, normalize

SPARSEGPT_BLOCK = 128
SPARSEGPT_DAMPING = 0.01
ADMM_STEPS = 80
ADMM_RHO = (0.1, 1.0)  # the penalty rises geometrically from the first to the second
ADMM_MASK_SHARE = 0.75  # of the steps; after them the mask stays and only values move
REFIT_STEPS = 20


def prune(
    weight,
    gram=None,
    *,
    density: float | None = None,
    method: str = "magnitude",
    pattern: str | None = None,
    precision: str = "highest",
    name: str | None = None,
) -> jax.Array:
    """Prunes a weight matrix to an exact number of non-zeros.

    `magnitude` keeps the largest |w|; `wanda` the largest |w_ij| G_jj^(1/2), equally many in each
    row; `sparsegpt` removes weights column by column and lets the later columns make up for it;
    `admm` minimises tr((V - W) G (V - W)^T) over values and mask by ADMM with a rising penalty and
    then refits the kept values.

    Args:
      weight: W `[out, in]`, float16, bfloat16 or float32.
      gram: G = sum over calibration inputs of x x^T, `[in, in]`; None means the identity.
      density: Kept fraction, in (0, 1]. Leave it out where `pattern` is given.
      method: "magnitude", "wanda", "sparsegpt" or "admm".
      pattern: N:M sparsity such as "2:4": n kept of every m neighbours along the inputs.
      precision: Matrix-product precision, as in `jax.default_matmul_precision`.
      name: What to call the layer in an error.

    Returns:
      V `[out, in]` of W's dtype, with at most floor(density * out * in) non-zeros: exactly as many,
      unless W itself has fewer.

    Raises:
      TypeError, ValueError: An input that cannot be pruned; the message says why.

    References:
      Wanda, arXiv 2306.11695. SparseGPT, arXiv 2301.00774. ADMM pruning, arXiv 2401.02938.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    dtype = jnp.asarray(weight).dtype
    weight, gram = check_layer(weight, gram, name)
    if pattern is None:
        if density is None:
            raise ValueError("prune needs a density in (0, 1], or a pattern such as '2:4'")
        group = None
        nonzeros = count_nonzeros(check_density(density, name), weight.shape)
    else:
        group = _parse_pattern(pattern, density, weight.shape, name)
        nonzeros = weight.size * group[0] // group[1]
    pruned = METHODS[method](weight, gram, nonzeros, group=group, precision=precision)
    return pruned.astype(dtype)


_compile = partial(
    jax.jit, static_argnames=("group", "precision"), compiler_options=COMPILER_OPTIONS
)


def _parse_pattern(pattern, density, shape, name):
    layer = f"layer {name!r}: " if name else ""
    try:
        n, m = (int(part) for part in pattern.split(":"))
    except ValueError:
        n, m = 0, 0
    if not 0 < n <= m:
        raise ValueError(f"pattern must be 'n:m' with 0 < n <= m, such as '2:4', got {pattern!r}")
    if density is not None and abs(density - n / m) > 1e-9:
        raise ValueError(f"pattern {pattern} has density {n / m:g}; leave density={density} out")
    if shape[1] % m:
        raise ValueError(
            f"{layer}pattern {pattern} needs a number of inputs divisible by {m}, got "
            f"weight [out, in] = {shape}; prune this layer by density instead"
        )
    return n, m


def _best_mask(scores, nonzeros, group):
    return masks.n_m_mask(scores, *group) if group else masks.top_k_mask(scores, nonzeros)


@_compile
def magnitude(weight, gram, nonzeros, *, group=None, precision="highest"):
    """Keeps the entries of largest magnitude; see `prune`."""
    del gram, precision
    return jnp.where(_best_mask(jnp.abs(weight), nonzeros, group), weight, 0)


@_compile
def wanda(weight, gram, nonzeros, *, group=None, precision="highest"):
    """Keeps the entries of largest |w_ij| G_jj^(1/2), row by row; see `prune`."""
    del precision
    scores = jnp.abs(normalize(weight, gram, 0.0).weight)
    if group:
        mask = masks.n_m_mask(scores, *group)
    else:
        mask = masks.row_top_k_mask(scores, nonzeros)
    return jnp.where(mask, weight, 0)


@_compile
def sparsegpt(weight, gram, nonzeros, *, group=None, precision="highest"):
    """Removes entries by saliency, block by block, updating the columns after them; see `prune`."""
    with jax.default_matmul_precision(precision):
        problem = normalize(weight, gram, 0.0)
        rows, cols = weight.shape
        width = group[1] if group else SPARSEGPT_BLOCK
        blocks = -(-cols // width)
        padding = blocks * width - cols

        # In units of G itself, since the damping is relative to its mean diagonal.
        size = jnp.maximum(jnp.max(problem.scale), jnp.finfo(jnp.float32).tiny)
        scale = jnp.pad(problem.scale / size, (0, padding))
        damping = SPARSEGPT_DAMPING * jnp.sum(scale * scale) / cols
        hessian = jnp.pad(problem.gram, (0, padding)) * scale[:, None] * scale[None, :]
        # A dead input (or padding) gets curvature 1 and is decoupled from all others.
        hessian += jnp.diag(jnp.where(scale > 0, damping, 1))
        inverse = jnp.linalg.inv(hessian)
        factor = jnp.linalg.cholesky((inverse + inverse.T) / 2, upper=True)

        start = jnp.pad(jnp.where(problem.scale > 0, weight, 0), ((0, 0), (0, padding)))
        column = jnp.arange(blocks * width)
        # Each block's share of the budget, floor(nonzeros * end / cols) up to its end, in two parts
        # that fit into 32 bits.
        ends = np.minimum(np.arange(blocks + 1) * width, cols)
        shares = jnp.diff(nonzeros // cols * ends + nonzeros % cols * ends // cols)

        def prune_block(weight, block):
            first, share = block
            here = lax.dynamic_slice(weight, (0, first), (rows, width))
            rows_of_factor = lax.dynamic_slice(factor, (first, 0), (width, factor.shape[1]))
            local = lax.dynamic_slice(rows_of_factor, (0, first), (width, width))
            real = (first + jnp.arange(width)) < cols
            saliency = jnp.abs(here / jnp.diagonal(local)) * real
            keep = _best_mask(saliency, share, group) & real

            def prune_column(j, state):
                current, errors = state
                entry = lax.dynamic_slice(current, (0, j), (rows, 1))
                kept = lax.dynamic_slice(keep, (0, j), (rows, 1))
                row = lax.dynamic_slice(local, (j, 0), (1, width))
                error = jnp.where(kept, 0, entry) / lax.dynamic_slice(row, (0, j), (1, 1))
                later = jnp.arange(width) > j
                current = current - jnp.where(later, error * row, 0)
                return current, lax.dynamic_update_slice(errors, error, (0, j))

            here, errors = lax.fori_loop(0, width, prune_column, (here, jnp.zeros_like(here)))
            weight = weight - errors @ jnp.where(column >= first + width, rows_of_factor, 0)
            return lax.dynamic_update_slice(weight, jnp.where(keep, here, 0), (0, first)), None

        first = jnp.arange(blocks) * width
        return lax.scan(prune_block, start, (first, shares))[0][:, :cols]


@_compile
def admm(weight, gram, nonzeros, *, group=None, precision="highest"):
    """Finds mask and values together by ADMM with a rising penalty; see `prune`.

    Each step solves for X = (W R + rho (Z - U)) (R + rho I)^-1, projects X + U onto the best mask
    to get Z, and adds X - Z to U. One eigendecomposition of R serves every rho.
    """
    with jax.default_matmul_precision(precision):
        problem = normalize(weight, gram, 0.0)
        values, vectors = jnp.linalg.eigh(problem.gram)
        values = jnp.maximum(values, 0)
        target = problem.weight @ problem.gram
        turned = target @ vectors
        last_mask_step = int(ADMM_MASK_SHARE * ADMM_STEPS)

        def step(i, state):
            z, u, mask = state
            progress = jnp.minimum(i / last_mask_step, 1)
            rho = ADMM_RHO[0] * (ADMM_RHO[1] / ADMM_RHO[0]) ** progress
            x = ((turned + rho * ((z - u) @ vectors)) / (values + rho)) @ vectors.T
            mask = lax.cond(
                i < last_mask_step,
                lambda: _best_mask(jnp.abs(x + u), nonzeros, group),
                lambda: mask,
            )
            z = jnp.where(mask, x + u, 0)
            return z, u + x - z, mask

        zero = jnp.zeros_like(problem.weight)
        mask = jnp.zeros(zero.shape, bool)  # the first step chooses one
        z, _, mask = lax.fori_loop(0, ADMM_STEPS, step, (zero, zero, mask))
        return problem.restore(refit_rows(target, problem.gram, mask, z, REFIT_STEPS))


METHODS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt, "admm": admm}
