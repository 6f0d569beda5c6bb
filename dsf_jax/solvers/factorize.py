"""Double Sparse Factorization of one weight matrix: W ~ A B with a budget of non-zeros.

Two phases alternate between the factors. The search sees only the diagonal of the inputs' Gram
matrix and finds the masks; the refinement minimises the output error itself, with the full Gram
matrix. docs/dsf.md has the mathematics and what each ingredient gains.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsf_jax.solvers import pruners
from dsf_jax.solvers.admm import (
    COMPILER_OPTIONS,
    Schedule,
    improve_factor,
    refit_coupled,
    refit_rows,
)
from dsf_jax.solvers.budget import choose_width, count_nonzeros, packed_nbytes, split_nonzeros
from dsf_jax.solvers.masks import top_k_mask
from dsf_jax.solvers.problem import (
    LayerProblem,
    check_density,
    check_layer,
    normalize,
    relative_output_error,
)


@dataclass(frozen=True)
class Options:
    """What a preset sets and `factorize` lets one override by keyword.

    Attributes:
      width: Inner dimension over min(out, in), at least 1; None chooses it by density and
        shape with the stored bytes in view (`budget.choose_width`).
      split: Share of the smaller factor, see `budget.split_nonzeros`.
      search_rounds: Rounds with the diagonal of G alone; each improves both factors.
      search_ramp: In round t of the search the first solve for each factor has the penalty
        min(1, t / search_ramp)^3, the later ones 1.
      search_steps: Solves and projections for each factor in a round; `search_mask_steps` of them
        choose the mask anew.
      search_mask_steps: See `search_steps`.
      search_ridge: Ridge on the normalised least-squares problems of the search.
      refine_rounds: Rounds with the full G.
      refine_rho: Penalty of the first and of the last of them; it rises geometrically. None chooses
        it by density, see `choose_rho`.
      refine_steps: As `search_steps`.
      refine_mask_steps: As `search_mask_steps`.
      refine_ridge: As `search_ridge`.
      refine_cg_steps: Conjugate-gradient steps of each solve for the right factor, whose entries
        are all coupled; every other solve is by Cholesky decomposition.
      finalize_steps: ADMM steps for the values of the left factor with the full G at the end.
      refit_steps: Conjugate-gradient steps for the values of either factor at the very end.
      damping: Added to the unit diagonal of the normalised G. 0.01 to 0.1 helps on other inputs
        where the calibration was short.
      compare_single: Also prune the single matrix by every method, and keep the best of all.
      precision: Matrix-product precision of the iterations, as in
        `jax.default_matmul_precision`; the final values are always refitted at "highest".
      seed: Seeds the extra inner dimensions.
    """

    width: float | None = None
    split: float | Literal["published"] = 0.95
    search_rounds: int = 20
    search_ramp: int = 37
    search_steps: int = 5
    search_mask_steps: int = 2
    search_ridge: float = 0.01
    refine_rounds: int = 280
    refine_rho: tuple[float, float] | None = None
    refine_steps: int = 2
    refine_mask_steps: int = 1
    refine_ridge: float = 1e-3
    refine_cg_steps: int = 6
    finalize_steps: int = 0
    refit_steps: int = 10
    damping: float = 0.01
    compare_single: bool = True
    precision: str = "high"
    seed: int = 0


PRESETS = {
    "quality": Options(),
    "published": Options(
        width=1.0,
        split="published",
        search_rounds=40,
        refine_rounds=0,
        finalize_steps=20,
        refit_steps=0,
        damping=0.0,
        compare_single=False,
    ),
}


@dataclass(frozen=True)
class Factorization:
    """Two sparse factors in place of one weight matrix.

    Attributes:
      left: A, float32 `[out, inner]`.
      right: B, float32 `[inner, in]`.
      kind: "pair", or "single" where pruning one matrix at the same budget was better: then `left`
        is the pruned matrix and `right` the identity, which is neither stored nor counted.
      method: "dsf", or the pruning method where `kind` is "single".
      relative_error: Relative output error on the given Gram matrix.
      alternatives: Relative output error of every candidate compared, by method.
    """

    left: jax.Array
    right: jax.Array
    kind: Literal["pair", "single"]
    method: str
    relative_error: float
    alternatives: dict[str, float]

    def product(self) -> jax.Array:
        """The dense matrix A B, float32 `[out, in]`."""
        if self.kind == "single":
            return self.left
        return jnp.matmul(self.left, self.right, precision="highest")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def inner(self) -> int:
        """Inner dimension."""
        return self.left.shape[1]

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        """The matrices that have to be stored: both, or the left one of a single."""
        return (self.left,) if self.kind == "single" else (self.left, self.right)

    @property
    def nnz(self) -> int:
        """Non-zeros stored."""
        return sum(int(jnp.count_nonzero(factor)) for factor in self.factors)

    @property
    def density(self) -> float:
        """Non-zeros over out * in."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed factors with 16-bit values; see `budget.packed_nbytes`."""
        return sum(packed_nbytes(factor) for factor in self.factors)


def factorize(
    weight,
    gram=None,
    *,
    density: float = 0.5,
    preset: str = "quality",
    name: str | None = None,
    **overrides,
) -> Factorization:
    """Factorizes a weight matrix into two sparse ones.

    Looks for A `[out, r]` and B `[r, in]` with nnz(A) + nnz(B) <= density * out * in that minimise
    tr((W - A B) G (W - A B)^T), by alternating ADMM.

    Args:
      weight: W `[out, in]`, float16, bfloat16 or float32.
      gram: G = sum over calibration inputs of x x^T, `[in, in]`; None means the identity.
      density: Non-zeros of both factors over out * in, in (0, 1].
      preset: "quality", or "published" for the algorithm of the paper.
      name: What to call the layer in an error.
      **overrides: Fields of `Options` in place of the preset's.

    Returns:
      A `Factorization`. With `compare_single` (on in "quality") it is never worse than the best
      single pruned matrix of the same budget.

    Raises:
      TypeError, ValueError: An input that cannot be factorized; the message says why.

    References:
      V. Boža, V. Macko, "Two Sparse Matrices are Better than One", arXiv 2409.18850.
    """
    options = choose_options(preset, overrides)
    weight, gram = check_layer(weight, gram, name)
    plan = _plan(weight.shape, check_density(density, name), options)
    left, right = _factorize(weight, gram, plan.numbers, plan.inner, _static(options))
    return _keep_better(weight, gram, left, right, plan.nonzeros, options)


def factorize_stack(
    weights, grams=None, *, density=0.5, preset="quality", names=None, **overrides
) -> list[Factorization]:
    """Factorizes layers of one shape together, in one vectorized program.

    Args:
      weights: `[layers, out, in]`, or a list of `[out, in]`.
      grams: `[layers, in, in]` or a list, in which None is the identity; None for identities.
      density, preset, **overrides: As in `factorize`.
      names: What to call each layer in an error.

    Returns:
      One `Factorization` per layer, as `factorize` would give it up to rounding.
    """
    options = choose_options(preset, overrides)
    grams = [None] * len(weights) if grams is None else grams
    if len(weights) == 0 or len(grams) != len(weights):
        raise ValueError(
            f"a stack needs one gram a layer, got {len(weights)} weights and {len(grams)} grams"
        )
    names = [f"[{i}]" for i in range(len(weights))] if names is None else names
    layers = [check_layer(*layer) for layer in zip(weights, grams, names)]
    if len({weight.shape for weight, _ in layers}) > 1:
        raise ValueError(
            "a stack is of one shape, got weights of shapes "
            f"{', '.join(str(weight.shape) for weight, _ in layers)}"
        )
    plan = _plan(layers[0][0].shape, check_density(density), options)
    stacked = (jnp.stack(arrays) for arrays in zip(*layers))
    lefts, rights = _factorize_stack(*stacked, plan.numbers, plan.inner, _static(options))
    return [
        _keep_better(*layer, left, right, plan.nonzeros, options)
        for layer, left, right in zip(layers, lefts, rights)
    ]


def choose_options(preset: str, overrides: dict) -> Options:
    """The options of a preset with some of them replaced; a ValueError names what is unknown."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = {field.name for field in fields(Options)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"unknown options {unknown}; there are {', '.join(sorted(known))}")
    options = replace(PRESETS[preset], **overrides)
    if options.width is not None and options.width < 1:
        raise ValueError(
            f"width is inner dimension over min(out, in), at least 1, got {options.width}"
        )
    split = options.split
    if split != "published" and (isinstance(split, str) or not 0 < split < 2):
        raise ValueError(f"split must be 'published' or a number in (0, 2), got {split!r}")
    for field in ("search_steps", "refine_steps", "refine_cg_steps"):
        if getattr(options, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(options, field)}")
    return options


def choose_rho(density: float) -> tuple[float, float]:
    """First and last penalty of the refinement for a density.

    A low first penalty lets most of the masks be found anew, which pays at high densities; at low
    ones, where few non-zeros fall on an inner dimension, dimensions die out while the penalty is
    low. From about 0.7 on, masks hardly move.
    """
    first = min(0.03 / density, 0.009 / density**2)  # the second from a density of 0.3 on
    return min(max(0.03, first), 0.5), 0.8


class _Numbers(NamedTuple):
    """What changes from call to call without another program being compiled."""

    left_nonzeros: int
    right_nonzeros: int
    rho: tuple[float, float]
    seed: int


class _Plan(NamedTuple):
    numbers: _Numbers
    inner: int

    @property
    def nonzeros(self):
        return self.numbers.left_nonzeros + self.numbers.right_nonzeros


def _plan(shape, density, options):
    width = choose_width(density, shape) if options.width is None else options.width
    inner = max(min(shape), round(width * min(shape)))
    nonzeros = split_nonzeros(count_nonzeros(density, shape), shape, inner, options.split)
    rho = choose_rho(density) if options.refine_rho is None else options.refine_rho
    return _Plan(_Numbers(*nonzeros, rho, options.seed), inner)


class _Pair(NamedTuple):
    """The state of the alternation: A and B^T, each with its dual variable."""

    left: jax.Array
    left_dual: jax.Array
    right: jax.Array
    right_dual: jax.Array

    def product(self):
        return self.left @ self.right.T

    def without_duals(self):
        zero = jnp.zeros_like
        return self._replace(left_dual=zero(self.left), right_dual=zero(self.right))


def _static(options):
    """The options that shape the program; one compiled for another seed or comparison serves."""
    return replace(options, seed=0, refine_rho=None, compare_single=False)


def _solve(weight, gram, numbers, inner, options):
    budgets = numbers.left_nonzeros, numbers.right_nonzeros
    with jax.default_matmul_precision(options.precision):
        problem = normalize(weight, gram, options.damping)
        pair = _start(problem, *budgets, inner, numbers.seed)
        pair = _search(problem, pair, *budgets, options)
        if options.refine_rounds:
            pair, problem = _refine(problem, pair.without_duals(), *budgets, numbers.rho, options)
    with jax.default_matmul_precision("highest"):
        pair = _finalize(problem, pair, numbers.left_nonzeros, options)
        return _restore(problem, pair)


_compile = partial(jax.jit, static_argnames=("inner", "options"), compiler_options=COMPILER_OPTIONS)
_factorize = _compile(_solve)


@_compile
def _factorize_stack(weights, grams, numbers, inner, options):
    return jax.vmap(lambda weight, gram: _solve(weight, gram, numbers, inner, options))(
        weights, grams
    )


def _start(problem, left_nonzeros, right_nonzeros, inner, seed):
    """The identity beside the pruned weight; extra inner dimensions are random and sparse."""
    weight = problem.weight
    rows, cols = weight.shape
    tall = rows >= cols
    long = weight.T if not tall else weight  # [long, short]
    short = long.shape[1]
    long_nonzeros = left_nonzeros if tall else right_nonzeros
    pruned = jnp.where(top_k_mask(jnp.abs(long), long_nonzeros // 2), long, 0)
    extra = inner - short
    value_key, mask_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    columns = jax.random.normal(value_key, (short, extra))
    columns *= jax.random.uniform(mask_key, (short, extra)) < 3 / short
    noise = 0.01 * jax.random.normal(noise_key, (long.shape[0], extra))
    if not tall:  # the long side is the inputs', some of which may be dead
        noise = jnp.where(problem.scale[:, None] > 0, noise, 0)
    square = jnp.concatenate([jnp.eye(short), columns], axis=1)
    other = jnp.concatenate([pruned, noise], axis=1)
    left, right = (other, square) if tall else (square, other)
    return _Pair(left, jnp.zeros_like(left), right, jnp.zeros_like(right))


def _alternate(pair, improve_left, improve_right, rounds, tall):
    """Runs rounds that improve both factors, the one on the smaller side first."""

    def one_round(t, pair):
        for improve in (improve_right, improve_left) if tall else (improve_left, improve_right):
            pair = improve(t, pair)
        return pair

    return lax.fori_loop(0, rounds, one_round, pair)


def _search(problem, pair, left_nonzeros, right_nonzeros, options):
    weight = problem.weight

    def schedule(t):
        rho_first = jnp.minimum(t / options.search_ramp, 1.0) ** 3
        return Schedule(
            1.0,
            options.search_ridge,
            options.search_steps,
            options.search_mask_steps,
            rho_first=rho_first,
        )

    def improve_left(t, pair):
        residual = (weight - pair.product()) @ pair.right
        left, dual = improve_factor(
            pair.left,
            pair.left_dual,
            residual,
            pair.right.T @ pair.right,
            left_nonzeros,
            schedule(t),
        )
        return pair._replace(left=left, left_dual=dual)

    def improve_right(t, pair):
        residual = (weight - pair.product()).T @ pair.left
        right, dual = improve_factor(
            pair.right,
            pair.right_dual,
            residual,
            pair.left.T @ pair.left,
            right_nonzeros,
            schedule(t),
        )
        return pair._replace(right=right, right_dual=dual)

    tall = weight.shape[0] >= weight.shape[1]
    return _alternate(pair, improve_left, improve_right, options.search_rounds, tall)


def _refine(problem, pair, left_nonzeros, right_nonzeros, rho, options):
    values, vectors = jnp.linalg.eigh(problem.gram)
    # What is negative is rounding, of the Gram matrix or of its storage.
    values = jnp.maximum(values, 0)
    gram = jnp.matmul(vectors * values, vectors.T, precision="highest")
    weight = problem.weight
    first, last = rho

    def schedule(t, cg_steps=0):
        rho = first * (last / first) ** (t / max(options.refine_rounds - 1, 1))
        return Schedule(
            rho, options.refine_ridge, options.refine_steps, options.refine_mask_steps, cg_steps
        )

    def improve_left(t, pair):
        seen = gram @ pair.right
        residual = (weight - pair.product()) @ seen
        left, dual = improve_factor(
            pair.left, pair.left_dual, residual, pair.right.T @ seen, left_nonzeros, schedule(t)
        )
        return pair._replace(left=left, left_dual=dual)

    def improve_right(t, pair):
        residual = (weight - pair.product()).T @ pair.left
        right, dual = improve_factor(
            pair.right,
            pair.right_dual,
            residual,
            pair.left.T @ pair.left,
            right_nonzeros,
            schedule(t, options.refine_cg_steps),
            values,
            vectors,
        )
        return pair._replace(right=right, right_dual=dual)

    tall = weight.shape[0] >= weight.shape[1]
    pair = _alternate(pair, improve_left, improve_right, options.refine_rounds, tall)
    return pair, problem._replace(gram=gram)


def _finalize(problem, pair, left_nonzeros, options):
    """Fits the values of the kept entries to the full Gram matrix, at full precision."""
    left, right = pair.left, pair.right
    seen = problem.gram @ right
    if options.finalize_steps:
        schedule = Schedule(1.0, 0.0, options.finalize_steps, mask_steps=0)
        left, _ = improve_factor(
            left,
            jnp.zeros_like(left),
            (problem.weight - pair.product()) @ seen,
            right.T @ seen,
            left_nonzeros,
            schedule,
        )
    if options.refit_steps:
        correlation = problem.weight @ problem.gram
        left = refit_rows(correlation @ right, right.T @ seen, left != 0, left, options.refit_steps)
        right = refit_coupled(
            correlation.T @ left,
            problem.gram,
            left.T @ left,
            right != 0,
            right,
            options.refit_steps,
        )
    return pair._replace(left=left, right=right)


def _restore(problem: LayerProblem, pair: _Pair):
    """A and B in the layer's units.

    The scale of each inner dimension is shared evenly between the factors, and the dimensions come
    in order of non-zeros: unused ones at the end, where the packed rows of A end before them.
    """
    used = jnp.count_nonzero(pair.left, axis=0) + jnp.count_nonzero(pair.right, axis=0)
    order = jnp.argsort(-used, stable=True)
    pair = pair._replace(left=pair.left[:, order], right=pair.right[:, order])
    left, right = pair.left * problem.unit, problem._replace(unit=1.0).restore(pair.right.T)
    left_size = jnp.max(jnp.abs(left), axis=0)
    right_size = jnp.max(jnp.abs(right), axis=1)
    alive = (left_size > 0) & (right_size > 0)
    ratio = jnp.where(alive, right_size, 1) / jnp.where(alive, left_size, 1)
    balance = jnp.where(alive, jnp.sqrt(ratio), 0)
    return left * balance, jnp.where(alive, 1 / jnp.where(alive, balance, 1), 0)[:, None] * right


def _keep_better(weight, gram, left, right, nonzeros, options):
    """The pair, or the best single pruned matrix where that is better."""
    errors = {
        "dsf": float(
            relative_output_error(weight, jnp.matmul(left, right, precision="highest"), gram)
        )
    }
    singles = {}
    if options.compare_single:
        for method, prune in pruners.METHODS.items():
            singles[method] = prune(weight, gram, nonzeros)
            errors[method] = float(relative_output_error(weight, singles[method], gram))
    # A method that failed numerically has a NaN error and is not chosen.
    best = min(errors, key=lambda method: np.nan_to_num(errors[method], nan=np.inf))
    if best == "dsf":
        return Factorization(left, right, "pair", "dsf", errors[best], errors)
    identity = jnp.eye(weight.shape[1], dtype=jnp.float32)
    return Factorization(singles[best], identity, "single", best, errors[best], errors)
