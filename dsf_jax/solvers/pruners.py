"""Pruning of one matrix: the baselines beside which a factorization is judged.

Every pruner keeps exactly ``floor(density * out * in)`` entries (or exactly n of every m for an N:M
pattern) and works on a `problem.NormalizedProblem`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dsf_jax.solvers import masks
from dsf_jax.solvers.admm import refit_rows
from dsf_jax.solvers.budget import count_nonzeros
from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.problem import Problem, check_density, is_finite, layer_prefix, normalize
from macko_jax.format.promotion import own_promotion

SPARSEGPT_BLOCK = 128
SPARSEGPT_DAMPING = 0.01
ADMM_STEPS = 80
ADMM_RHO = (0.1, 1.0)  # the penalty rises geometrically from the first to the second
# Without it weights grow in directions that the calibration inputs hardly have, to 55 times the
# largest one, to the harm of other inputs and of 8-bit values (docs/notebook/2026-12-01.md).
ADMM_DAMPING = 0.03
ADMM_MASK_SHARE = 0.75  # of the steps; after them the mask stays and only values move
REFIT_STEPS = 20


@own_promotion()
def prune(
    weight: ArrayLike,
    gram: ArrayLike | None = None,
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
    `admm` minimises tr((V - W) G' (V - W)^T) over values and mask by ADMM with a rising penalty and
    then refits the kept values, where G' is G with 1.03 times its diagonal. Where G is zero, so
    that it says nothing of any weight, every method is `magnitude`; of inputs that were never seen
    the largest weights are kept, with what the others leave of the budget.

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
      TypeError: An array is not of a float dtype.
      ValueError: An argument cannot be served; the message says why.
      FloatingPointError: The result holds NaN or infinity.

    References:
      Wanda, arXiv 2306.11695. SparseGPT, arXiv 2301.00774. ADMM pruning, arXiv 2401.02938.
    """
    if method not in PRUNERS:
        raise ValueError(f"method must be one of {', '.join(PRUNERS)}, got {method!r}")
    problem = Problem.of(weight, gram, name)
    pruned = prune_problem(problem, method, density=density, pattern=pattern, precision=precision)
    return pruned.astype(jnp.asarray(weight).dtype)


def prune_problem(
    problem: Problem,
    method: str,
    *,
    density: float | None = None,
    pattern: str | None = None,
    precision: str = "highest",
) -> jax.Array:
    """Prunes the matrix of a problem; see `prune`.

    Returns:
      V, float32 `[out, in]`.

    Raises:
      ValueError: The density or the pattern cannot be served.
      FloatingPointError: The result holds NaN or infinity.
    """
    n_m = None
    if pattern is not None:
        n_m = parse_pattern(pattern, density, problem.shape, problem.name)
        nonzeros = problem.weight.size * n_m[0] // n_m[1]
    elif density is not None:
        nonzeros = count_nonzeros(check_density(density, problem.name), problem.shape)
    else:
        raise ValueError("prune needs a density in (0, 1], or a pattern such as '2:4'")
    run = PRUNERS["magnitude" if problem.unseen else method]
    pruned = run(problem.weight, problem.gram, nonzeros, n_m=n_m, precision=precision)
    if not is_finite(pruned):
        raise FloatingPointError(
            f"{layer_prefix(problem.name)}{method} came to NaN or infinity; look at the size of "
            "its weights and of its Gram matrix, or choose another method"
        )
    return pruned


def parse_pattern(
    pattern: str, density: float | None, shape: tuple[int, int], name: str | None = None
) -> tuple[int, int]:
    """Reads an N:M pattern such as "2:4".

    Args:
      pattern: The pattern.
      density: A density asked for beside it, which has to be n / m; None for none.
      shape: (out, in) of the matrix.
      name: What to call the layer in an error.

    Returns:
      n and m.

    Raises:
      ValueError: It is no pattern, has another density, or does not divide the matrix.
    """
    layer = layer_prefix(name)
    try:
        n, m = (int(part) for part in pattern.split(":"))
    except (ValueError, AttributeError):
        n, m = 0, 0
    if not 0 < n <= m:
        raise ValueError(
            f"{layer}pattern must be 'n:m' with 0 < n <= m, such as '2:4', got {pattern!r}"
        )
    if density is not None and abs(density - n / m) > 1e-9:
        raise ValueError(
            f"{layer}pattern {pattern} has density {n / m:g}, which density={density:g} "
            "contradicts; give that one, or leave density out"
        )
    if shape[1] % m:
        raise ValueError(
            f"{layer}pattern {pattern} needs a number of inputs divisible by {m}, got "
            f"weight [out, in] = {shape}; prune this layer by density instead"
        )
    return n, m


_compile = functools.partial(
    jax.jit, static_argnames=("n_m", "precision"), compiler_options=COMPILER_OPTIONS
)


def _best_mask(
    scores: jax.Array, nonzeros: int | jax.Array, n_m: tuple[int, int] | None
) -> jax.Array:
    return masks.n_m_mask(scores, *n_m) if n_m else masks.top_k_mask(scores, nonzeros)


@_compile
def magnitude(
    weight: jax.Array,
    gram: jax.Array,
    nonzeros: int | jax.Array,
    *,
    n_m: tuple[int, int] | None = None,
    precision: str = "highest",
) -> jax.Array:
    """Keeps the entries of largest magnitude; see `prune`."""
    del gram, precision
    return jnp.where(_best_mask(jnp.abs(weight), nonzeros, n_m), weight, 0)


@_compile
def wanda(
    weight: jax.Array,
    gram: jax.Array,
    nonzeros: int | jax.Array,
    *,
    n_m: tuple[int, int] | None = None,
    precision: str = "highest",
) -> jax.Array:
    """Keeps the entries of largest |w_ij| G_jj^(1/2), row by row; see `prune`."""
    del precision
    scores = jnp.abs(normalize(weight, gram, 0.0).weight)
    mask = masks.n_m_mask(scores, *n_m) if n_m else masks.row_top_k_mask(scores, nonzeros)
    return jnp.where(mask, weight, 0)


@_compile
def sparsegpt(
    weight: jax.Array,
    gram: jax.Array,
    nonzeros: int | jax.Array,
    *,
    n_m: tuple[int, int] | None = None,
    precision: str = "highest",
) -> jax.Array:
    """Removes entries by saliency, block by block, updating the columns after them; see `prune`."""
    with jax.default_matmul_precision(precision):
        rows, cols = weight.shape
        width = n_m[1] if n_m else SPARSEGPT_BLOCK
        blocks = -(-cols // width)
        padding = blocks * width - cols
        factor = inverse_factor(weight, gram, padding)
        start = jnp.pad(weight, ((0, 0), (0, padding)))
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
            keep = _best_mask(saliency, share, n_m) & real
            here, errors = _remove_columns(here, local, keep)
            weight = weight - errors @ jnp.where(column >= first + width, rows_of_factor, 0)
            return lax.dynamic_update_slice(weight, jnp.where(keep, here, 0), (0, first)), None

        first = jnp.arange(blocks) * width
        return lax.scan(prune_block, start, (first, shares))[0][:, :cols]


def inverse_factor(weight: jax.Array, gram: jax.Array, padding: int) -> jax.Array:
    """U of (G + damping)^-1 = U^T U, upper triangular, for `padding` inputs more."""
    problem = normalize(weight, gram, 0.0)
    # In units of G itself, since the damping is relative to its mean diagonal.
    size = jnp.maximum(jnp.max(problem.scale), jnp.finfo(jnp.float32).tiny)
    scale = jnp.pad(problem.scale / size, (0, padding))
    damping = SPARSEGPT_DAMPING * jnp.sum(scale * scale) / weight.shape[1]
    hessian = jnp.pad(problem.gram, (0, padding)) * scale[:, None] * scale[None, :]
    # A dead input depends on no other, and would be taken for a live one if it were damped; padding
    # gets curvature 1.
    curvature = jnp.pad(jnp.where(problem.alive, damping, 0), (0, padding), constant_values=1)
    hessian += jnp.diag(curvature)
    inverse = jnp.linalg.inv(hessian)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2, upper=True)


def _remove_columns(
    block: jax.Array, factor: jax.Array, keep: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Removes what is not kept of a block, column by column; later columns make up for it.

    Args:
      block: Weights `[rows, width]`.
      factor: The block's part of U, `[width, width]`.
      keep: Boolean `[rows, width]`.

    Returns:
      The block, whose kept entries are final, and the error of each column over its diagonal entry
      of U, `[rows, width]`, which the blocks behind it have to make up for.
    """
    rows, width = block.shape

    def remove(j, state):
        current, errors = state
        entry = lax.dynamic_slice(current, (0, j), (rows, 1))
        kept = lax.dynamic_slice(keep, (0, j), (rows, 1))
        row = lax.dynamic_slice(factor, (j, 0), (1, width))
        error = jnp.where(kept, 0, entry) / lax.dynamic_slice(row, (0, j), (1, 1))
        later = jnp.arange(width) > j
        current = current - jnp.where(later, error * row, 0)
        return current, lax.dynamic_update_slice(errors, error, (0, j))

    return lax.fori_loop(0, width, remove, (block, jnp.zeros_like(block)))


@_compile
def admm(
    weight: jax.Array,
    gram: jax.Array,
    nonzeros: int | jax.Array,
    *,
    n_m: tuple[int, int] | None = None,
    precision: str = "highest",
) -> jax.Array:
    """Finds mask and values together by ADMM with a rising penalty; see `prune`.

    Each step solves for X = (W R + rho (Z - U)) (R + rho I)^-1, projects X + U onto the best mask
    to get Z, and adds X - Z to U. One eigendecomposition of R serves every rho.
    """
    with jax.default_matmul_precision(precision):
        problem = normalize(weight, gram, ADMM_DAMPING)
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
                i < last_mask_step, lambda: _best_mask(jnp.abs(x + u), nonzeros, n_m), lambda: mask
            )
            z = jnp.where(mask, x + u, 0)
            return z, u + x - z, mask

        zero = jnp.zeros_like(problem.weight)
        mask = jnp.zeros(zero.shape, bool)  # the first step chooses one
        z, _, mask = lax.fori_loop(0, ADMM_STEPS, step, (zero, zero, mask))
        return problem.restore(refit_rows(target, problem.gram, mask, z, REFIT_STEPS))


PRUNERS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt, "admm": admm}
