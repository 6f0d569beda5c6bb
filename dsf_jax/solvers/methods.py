"""The methods by name: each solves problems at a density, with options of its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from dsf_jax.solvers.budget import choose_width
from dsf_jax.solvers.factorize import Options, choose_options, factorize_problems
from dsf_jax.solvers.problem import Problem, layer_prefix
from dsf_jax.solvers.pruners import PRUNERS, parse_pattern, prune_problem
from dsf_jax.solvers.solution import Factorization, best_solution


class Method(Protocol):
    """One way to solve problems.

    Attributes:
      name: Its name in `METHODS`.
      gives_pairs: Whether it gives pairs of factors; else it gives single matrices.
      option_names: The options that it takes.
    """

    @property
    def name(self) -> str: ...

    @property
    def gives_pairs(self) -> bool: ...

    @property
    def option_names(self) -> tuple[str, ...]: ...

    def check(
        self, options: Mapping[str, Any], density: float, shape: tuple[int, int], layer: str
    ) -> None:
        """Raises a ValueError where the options, at this density, do not suit the layer.

        Every name among `options` is in `option_names`.
        """
        ...

    def solve(
        self, problems: Sequence[Problem], density: float, options: Mapping[str, Any]
    ) -> list[Factorization]:
        """Solves problems of one shape."""
        ...

    def work(self, shape: tuple[int, int]) -> float:
        """Multiplications for a matrix `[out, in]`, up to a factor that depends on options."""
        ...


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A pruner of `PRUNERS` as a `Method`."""

    name: str
    gives_pairs: bool = dataclasses.field(default=False, init=False)

    option_names: tuple[str, ...] = dataclasses.field(
        default=("pattern", "precision"), init=False, repr=False
    )

    def check(
        self, options: Mapping[str, Any], density: float, shape: tuple[int, int], layer: str
    ) -> None:
        _check_precision(options, layer)
        if options.get("pattern") is not None:
            parse_pattern(options["pattern"], density, shape, layer)

    def solve(
        self, problems: Sequence[Problem], density: float, options: Mapping[str, Any]
    ) -> list[Factorization]:
        found = []
        for problem in problems:
            pruned = prune_problem(problem, self.name, density=density, **options)
            found.append(best_solution(problem, {self.name: (pruned, None)}))
        return found

    def work(self, shape: tuple[int, int]) -> float:
        rows, cols = shape
        if self.name in ("magnitude", "wanda"):
            return float(rows * cols)
        # An inverse or eigenvectors of G, and products of the weight with matrices of its size.
        return float(cols**3 + rows * cols**2)


@dataclasses.dataclass(frozen=True)
class DoubleSparse:
    """Double Sparse Factorization with a preset of `factorize.PRESETS` as a `Method`."""

    name: str
    preset: str
    gives_pairs: bool = dataclasses.field(default=True, init=False)

    @property
    def option_names(self) -> tuple[str, ...]:
        return tuple(sorted(field.name for field in dataclasses.fields(Options)))

    def check(
        self, options: Mapping[str, Any], density: float, shape: tuple[int, int], layer: str
    ) -> None:
        del density, shape
        _check_precision(options, layer)
        try:
            choose_options(self.preset, options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{layer_prefix(layer)}{error}") from error

    def solve(
        self, problems: Sequence[Problem], density: float, options: Mapping[str, Any]
    ) -> list[Factorization]:
        return factorize_problems(problems, density, choose_options(self.preset, options))

    def work(self, shape: tuple[int, int]) -> float:
        rows, cols = shape
        inner = min(shape) * choose_width(0.5, shape)
        # Residuals; the factors' Gram matrices, solves and inverses; the change of basis by G.
        return rows * inner * cols + (rows + cols + inner) * inner**2 + cols**2 * (cols + inner)


def _check_precision(options: Mapping[str, Any], layer: str) -> None:
    try:
        with jax.default_matmul_precision(options.get("precision", "highest")):
            pass
    except ValueError as error:
        raise ValueError(f"{layer_prefix(layer)}precision: {error}") from error


METHODS: dict[str, Method] = {
    **{name: Pruning(name) for name in PRUNERS},
    "dsf-published": DoubleSparse("dsf-published", "published"),
    "dsf": DoubleSparse("dsf", "quality"),
}


def check_method(method: str, layer: str | None = None) -> None:
    """Raises a ValueError for an unknown method."""
    if method not in METHODS:
        raise ValueError(
            f"{layer_prefix(layer)}method must be one of {', '.join(METHODS)}, got {method!r}"
        )
