"""Double Sparse Factorization of one weight matrix: W ~ A B with a budget of non-zeros.

Two phases alternate between the factors. The search sees only the diagonal of the inputs' Gram
matrix and finds the masks; the refinement minimises the output error itself, with the full Gram
matrix. docs/dsf.md has the mathematics and what each ingredient gains.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dsf_jax.solvers.admm import Schedule, improve_factor, refit_coupled, refit_rows
from dsf_jax.solvers.budget import plan_pair
from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.masks import top_k_mask
from dsf_jax.solvers.problem import NormalizedProblem, Problem, check_density, normalize
from dsf_jax.solvers.pruners import PRUNERS
from dsf_jax.solvers.solution import Factorization, best_solution
from macko_jax.format.promotion import own_promotion


@dataclasses.dataclass(frozen=True)
class Options:
    """What a preset sets and `factorize` lets one override by keyword.

    Attributes:
      width: Inner dimension over min(out, in), at least 1; None chooses it by density and
        shape with the stored bytes in view (`budget.choose_width`).
      split: Share of the smaller factor, see `budget.split_nonzeros`.
      search_rounds: Rounds with the diagonal of G alone; each improves both factors.
      search_ramp: In round t of the search the first solve for each factor has the penalty
        min(1, t / search_ramp)^3, the later ones 1.
      search_steps: Solves and projections for each factor in a round of the search.
      search_mask_steps: How many of them choose the mask anew.
      search_ridge: Ridge on the normalised least-squares problems of the search.
      refine_rounds: Rounds with the full G.
      refine_rho: Penalty of the first and of the last of them; it rises geometrically. None chooses
        it by density, see `choose_rho`.
      refine_steps: Solves and projections for each factor in one of these rounds.
      refine_mask_steps: How many of them choose the mask anew.
      refine_ridge: Ridge on the normalised least-squares problems of the refinement.
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


@own_promotion()
def factorize(
    weight: ArrayLike,
    gram: ArrayLike | None = None,
    *,
    density: float = 0.5,
    preset: str = "quality",
    name: str | None = None,
    **overrides: Any,
) -> Factorization:
    """Factorizes a weight matrix into two sparse ones.

    Looks for A `[out, r]` and B `[r, in]` with nnz(A) + nnz(B) <= density * out * in that minimise
    tr((W - A B) G (W - A B)^T), by alternating ADMM. Where G is zero, so that it says nothing of
    any weight, the identity takes its place, and the result's `note` says so.

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
      TypeError: An array is not of a float dtype.
      ValueError: An argument cannot be served; the message says why.
      FloatingPointError: The factors came to NaN.

    References:
      V. Boža, V. Macko, "Two Sparse Matrices are Better than One", arXiv 2409.18850.
    """
    options = choose_options(preset, overrides)
    (found,) = factorize_problems([Problem.of(weight, gram, name)], density, options)
    return found


def factorize_stack(
    weights: ArrayLike | Sequence[ArrayLike],
    grams: ArrayLike | Sequence[ArrayLike | None] | None = None,
    *,
    density: float = 0.5,
    preset: str = "quality",
    names: Sequence[str] | None = None,
    **overrides: Any,
) -> list[Factorization]:
    """Factorizes layers of one shape together, in one vectorized program.

    Args:
      weights: `[layers, out, in]`, or a list of `[out, in]`.
      grams: `[layers, in, in]` or a list, in which None is the identity; None for identities.
      density: Non-zeros of both factors over out * in, in (0, 1].
      preset: "quality" or "published".
      names: What to call each layer in an error.
      **overrides: Fields of `Options` in place of the preset's.

    Returns:
      One `Factorization` per layer, as `factorize` would give it up to rounding.

    Raises:
      TypeError: An array is not of a float dtype.
      ValueError: An argument cannot be served; the message says why.
      FloatingPointError: The factors of a layer came to NaN.
    """
    options = choose_options(preset, overrides)
    each_weight = _each(weights)
    each_gram = [None] * len(each_weight) if grams is None else _each(grams)
    if not each_weight or len(each_gram) != len(each_weight):
        raise ValueError(
            f"a stack needs one gram a layer, got {len(each_weight)} weights and "
            f"{len(each_gram)} grams"
        )
    each_name = [f"[{i}]" for i in range(len(each_weight))] if names is None else names
    problems = [Problem.of(*layer) for layer in zip(each_weight, each_gram, each_name)]
    return factorize_problems(problems, density, options)


def _each(stack: Any) -> list[Any]:
    """The members of a stack that is an array or already a sequence."""
    return list(stack) if isinstance(stack, Sequence) else list(jnp.asarray(stack))


def factorize_problems(
    problems: Sequence[Problem], density: float, options: Options
) -> list[Factorization]:
    """Factorizes the matrices of problems of one shape; several go through one program.

    Raises:
      ValueError: The density is not in (0, 1], or the problems differ in shape.
      FloatingPointError: The factors of a problem came to NaN.
    """
    shapes = {problem.shape for problem in problems}
    if len(shapes) > 1:
        raise ValueError(
            f"a stack is of one shape, got weights of shapes {', '.join(map(str, shapes))}"
        )
    plan = _plan(problems[0].shape, check_density(density, problems[0].name), options)
    static = _static(options)
    if len(problems) == 1:
        (problem,) = problems
        pairs = [_factorize(problem.weight, problem.gram, plan.numbers, plan.inner, static)]
    else:
        weights = jnp.stack([problem.weight for problem in problems])
        grams = jnp.stack([problem.gram for problem in problems])
        pairs = list(zip(*_factorize_stack(weights, grams, plan.numbers, plan.inner, static)))
    found = []
    for problem, (left, right) in zip(problems, pairs):
        candidates = {"dsf": (left, right)}
        if options.compare_single:
            for method in ["magnitude"] if problem.unseen else PRUNERS:
                pruned = PRUNERS[method](problem.weight, problem.gram, plan.nonzeros)
                candidates[method] = (pruned, None)
        found.append(best_solution(problem, candidates))
    return found


def choose_options(preset: str, overrides: Mapping[str, Any]) -> Options:
    """The options of a preset with some of them replaced.

    Raises:
      ValueError: The preset, or an option, is unknown or out of its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = {field.name for field in dataclasses.fields(Options)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"unknown options {unknown}; there are {', '.join(sorted(known))}")
    options = dataclasses.replace(PRESETS[preset], **overrides)
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
    """The budgets and the inner dimension of a pair."""

    numbers: _Numbers
    inner: int

    @property
    def nonzeros(self) -> int:
        """Non-zeros of both factors together."""
        return self.numbers.left_nonzeros + self.numbers.right_nonzeros


def _plan(shape: tuple[int, int], density: float, options: Options) -> _Plan:
    inner, left, right = plan_pair(density, shape, width=options.width, split=options.split)
    rho = choose_rho(density) if options.refine_rho is None else options.refine_rho
    return _Plan(_Numbers(left, right, rho, options.seed), inner)


class _Pair(NamedTuple):
    """The state of the alternation: A and B^T, each with its dual variable."""

    left: jax.Array
    left_dual: jax.Array
    right: jax.Array
    right_dual: jax.Array

    def product(self) -> jax.Array:
        """A B."""
        return self.left @ self.right.T

    def without_duals(self) -> "_Pair":
        """The same factors with dual variables of zero."""
        zero = jnp.zeros_like
        return self._replace(left_dual=zero(self.left), right_dual=zero(self.right))


def _static(options: Options) -> Options:
    """The options that shape the program; one compiled for another seed or comparison serves."""
    return dataclasses.replace(options, seed=0, refine_rho=None, compare_single=False)


def _solve(
    weight: jax.Array, gram: jax.Array, numbers: _Numbers, inner: int, options: Options
) -> tuple[jax.Array, jax.Array]:
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


# Improves one factor in round t.
_Improve = Callable[[jax.Array, _Pair], _Pair]

_compile = functools.partial(
    jax.jit, static_argnames=("inner", "options"), compiler_options=COMPILER_OPTIONS
)
_factorize = _compile(_solve)


@_compile
def _factorize_stack(
    weights: jax.Array, grams: jax.Array, numbers: _Numbers, inner: int, options: Options
) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(lambda weight, gram: _solve(weight, gram, numbers, inner, options))(
        weights, grams
    )


def _start(
    problem: NormalizedProblem, left_nonzeros: int, right_nonzeros: int, inner: int, seed: int
) -> _Pair:
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
        noise = jnp.where(problem.alive[:, None], noise, 0)
    square = jnp.concatenate([jnp.eye(short), columns], axis=1)
    other = jnp.concatenate([pruned, noise], axis=1)
    left, right = (other, square) if tall else (square, other)
    return _Pair(left, jnp.zeros_like(left), right, jnp.zeros_like(right))


def _alternate(
    pair: _Pair, improve_left: _Improve, improve_right: _Improve, rounds: int, tall: bool
) -> _Pair:
    """Runs rounds that improve both factors, the one on the smaller side first."""

    def one_round(t, pair):
        for improve in (improve_right, improve_left) if tall else (improve_left, improve_right):
            pair = improve(t, pair)
        return pair

    return lax.fori_loop(0, rounds, one_round, pair)


def _search(
    problem: NormalizedProblem,
    pair: _Pair,
    left_nonzeros: int,
    right_nonzeros: int,
    options: Options,
) -> _Pair:
    """Finds the masks with the diagonal of G alone."""
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


def _refine(
    problem: NormalizedProblem,
    pair: _Pair,
    left_nonzeros: int,
    right_nonzeros: int,
    rho: tuple[float, float],
    options: Options,
) -> tuple[_Pair, NormalizedProblem]:
    """Minimises the output error itself; gives the problem with a clean Gram matrix as well."""
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


def _finalize(
    problem: NormalizedProblem, pair: _Pair, left_nonzeros: int, options: Options
) -> _Pair:
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


def _restore(problem: NormalizedProblem, pair: _Pair) -> tuple[jax.Array, jax.Array]:
    """A and B in the layer's units.

    The scale of each inner dimension is shared evenly between the factors, and the dimensions come
    in order of non-zeros: unused ones at the end, where the packed rows of A end before them.
    """
    used = jnp.count_nonzero(pair.left, axis=0) + jnp.count_nonzero(pair.right, axis=0)
    order = jnp.argsort(-used, stable=True)
    left = pair.left[:, order]
    right = problem._replace(unit=jnp.float32(1)).restore(pair.right[:, order].T)
    left_size = jnp.max(jnp.abs(left), axis=0)
    right_size = jnp.max(jnp.abs(right), axis=1)
    alive = (left_size > 0) & (right_size > 0)
    ratio = jnp.where(alive, right_size, 1) / jnp.where(alive, left_size, 1)
    balance = jnp.where(alive, jnp.sqrt(ratio), 0)
    right = jnp.where(alive, 1 / jnp.where(alive, balance, 1), 0)[:, None] * right
    # The layer's unit comes last, half to each: beside 1e-30 the sizes above would not fit float32.
    root = jnp.sqrt(problem.unit)
    return left * balance * root, right * root
