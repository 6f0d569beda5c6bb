"""One layer of a model solved by any method: a matrix with zeros, or a pair of factors."""

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsf_jax.pipeline.pace import compile_seconds
from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.methods import METHODS, Method, check_method
from dsf_jax.solvers.problem import Problem
from dsf_jax.solvers.rounding import round_solution
from dsf_jax.solvers.solution import Factorization
from dsf_jax.trace.dataflow import Layer
from dsf_jax.trace.jaxprs import Device
from macko_jax.format.promotion import own_promotion

__all__ = [
    "METHODS",
    "Assignment",
    "LayerSolution",
    "check_method",
    "fit_to_dense",
    "solve",
    "stack_limit",
]

# Of the mean diagonal of G: keeps a short calibration from being fitted too closely.
CORRECTION_DAMPING = 0.1

# Weights that are factorized in one program. Small layers leave a GPU idle one by one.
STACKED_WEIGHTS = 2**23


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What is asked for one layer.

    Attributes:
      method: A name in `METHODS`.
      density: Non-zeros kept over out * in.
      options: The method's options.
      values: The type of 8 bits that the values are to fit, see `rounding`; None for the model's.
    """

    method: str
    density: float
    options: Mapping[str, Any]
    values: str | None = None

    @property
    def solver(self) -> Method:
        """The method of that name."""
        return METHODS[self.method]


@dataclasses.dataclass(frozen=True)
class LayerSolution:
    """A solved layer, on the host.

    Attributes:
      product: The new matrices, float32 `[groups, out, in]`; for a pair, A B.
      left: A, `[groups, out, k]`; None for a single matrix.
      right: B, `[groups, k, in]`; None for a single matrix.
      method: What produced it: the method asked for, with what it resorted to in brackets, as in
        "dsf (admm)" where a single matrix was better than a pair.
      nonzeros: Non-zeros kept, of both factors together.
      error: Relative output error.
      seconds: Time taken, compilation included.
      compile_seconds: What compilation took of it.
    """

    product: np.ndarray
    left: np.ndarray | None
    right: np.ndarray | None
    method: str
    nonzeros: int
    error: float
    seconds: float
    compile_seconds: float = 0.0

    @property
    def factors(self) -> tuple[np.ndarray, ...]:
        """The matrices that have to be stored: A and B, or the single matrix."""
        if self.left is None or self.right is None:
            return (self.product,)
        return self.left, self.right


def stack_limit(assignment: Assignment, layer: Layer, device: Device) -> int:
    """How many layers like this one to give to `solve` together."""
    if not assignment.solver.gives_pairs or layer.groups > 1 or device.platform == "cpu":
        return 1
    return max(1, STACKED_WEIGHTS // layer.size)


@own_promotion()
def solve(
    weights: Mapping[str, jax.Array],
    grams: Mapping[str, jax.Array],
    assignment: Assignment,
    device: Device,
    held: np.dtype,
) -> dict[str, LayerSolution]:
    """Solves the matrices of one layer, or of several layers of one shape in one program.

    Args:
      weights: For the path of each layer `[groups, out, in]`; one group if there are several.
      grams: For a path `[groups, in, in]`; where there is none, the identity (an embedding that is
        only looked up in).
      assignment: The method, density and options.
      device: Where the work is done.
      held: The type in which the model holds these weights.

    Returns:
      For each path its solution; the time of a program is shared evenly by its layers.

    Raises:
      FloatingPointError: A method came to NaN.
    """
    start, compiled = time.perf_counter(), compile_seconds()
    problems = {path: _problems(path, groups, grams, device) for path, groups in weights.items()}
    if len(problems) == 1:
        # The groups one by one: they share a program, and not the memory of a stack.
        found = {
            path: [_solve_all([problem], assignment, held)[0] for problem in groups]
            for path, groups in problems.items()
        }
    else:
        together = _solve_all([problem for (problem,) in problems.values()], assignment, held)
        found = {path: [solution] for path, solution in zip(problems, together)}
    solutions = {path: _join(assignment, problems[path], found[path]) for path in problems}
    spent = time.perf_counter() - start, compile_seconds() - compiled
    seconds, compiling = (each / len(weights) for each in spent)
    return {
        path: dataclasses.replace(solution, seconds=seconds, compile_seconds=compiling)
        for path, solution in solutions.items()
    }


def _problems(
    path: str, weights: jax.Array, grams: Mapping[str, jax.Array], device: Device
) -> list[Problem]:
    """The problem of each group of a layer, on the device."""
    matrices = jax.device_put(jnp.asarray(weights, jnp.float32), device)
    known = grams.get(path)
    inputs = [None] * len(matrices) if known is None else jax.device_put(known, device)
    return [Problem.of(matrix, gram, path) for matrix, gram in zip(matrices, inputs)]


def _solve_all(
    problems: Sequence[Problem], assignment: Assignment, held: np.dtype
) -> list[Factorization]:
    found = assignment.solver.solve(problems, assignment.density, assignment.options)
    if assignment.values is None:
        return found
    return [round_solution(*each, assignment.values, held) for each in zip(problems, found)]


def _join(
    assignment: Assignment, problems: Sequence[Problem], found: Sequence[Factorization]
) -> LayerSolution:
    """The solution of one layer from those of its groups; its `seconds` are still to be set."""
    # Counted on the host, where the matrices are by now.
    product = np.stack([solution.product() for solution in found])
    left, right, kept = None, None, [product]
    if assignment.solver.gives_pairs and all(solution.right is not None for solution in found):
        left = np.stack([np.asarray(solution.left) for solution in found])
        right = np.stack([np.asarray(solution.right) for solution in found])
        kept = [left, right]
    errors = [solution.relative_error for solution in found]
    if len(found) > 1:
        # Of several groups, the error of all outputs together.
        sizes = _output_sizes(problems)
        errors = [float(np.dot(errors, sizes)) / float(np.sum(sizes) or 1)]
    return LayerSolution(
        product,
        left,
        right,
        _name(assignment.method, found),
        sum(int(np.count_nonzero(matrices)) for matrices in kept),
        errors[0],
        0.0,
    )


def _output_sizes(problems: Sequence[Problem]) -> list[float]:
    """Squared sizes of the dense outputs of groups, all in the same unit."""
    peak = max(float(jnp.max(jnp.abs(problem.weight))) for problem in problems) or 1.0
    weights = [problem.weight / peak for problem in problems]  # the square of 1e-30 would be zero
    return [float(jnp.sum((w @ p.gram) * w)) for w, p in zip(weights, problems)]


def _name(asked: str, found: Sequence[Factorization]) -> str:
    """The method asked for, with what the solver resorted to in brackets."""
    used = found[-1].method
    notes = collections.Counter(solution.note for solution in found if solution.note)
    remarks = [] if used == "dsf" or used == asked else [used]
    for note, groups in notes.items():
        remarks.append(f"{note} ({groups} of {len(found)} groups)" if len(found) > 1 else note)
    return f"{asked} ({'; '.join(remarks)})" if remarks else asked


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def fit_to_dense(weights: jax.Array, gram: jax.Array, cross: jax.Array) -> jax.Array:
    """Weights whose outputs on the present inputs are nearest to the dense model's outputs.

    W (C + c I)(G + c I)^-1, c being `CORRECTION_DAMPING` of G's mean diagonal.

    Args:
      weights: W `[groups, out, in]`.
      gram: G = sum y y^T of the present inputs y, `[groups, in, in]`.
      cross: C = sum x y^T of the dense inputs x, `[groups, in, in]`.

    Returns:
      Float32 `[groups, out, in]`.
    """
    size = jnp.trace(gram, axis1=-2, axis2=-1) / gram.shape[-1]
    damping = (CORRECTION_DAMPING * size + 1e-30)[:, None, None] * jnp.eye(gram.shape[-1])
    # The transposed system, since the unknown stands on the left of G.
    right = jnp.matmul(
        weights.astype(jnp.float32), cross + damping, precision=jax.lax.Precision.HIGHEST
    )
    factor = jax.scipy.linalg.cho_factor(gram + damping)
    return jax.scipy.linalg.cho_solve(factor, right.swapaxes(-1, -2)).swapaxes(-1, -2)
