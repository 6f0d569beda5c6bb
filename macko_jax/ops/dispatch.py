"""Which implementation computes which product, and why another one does not."""

import dataclasses
from collections.abc import Callable

from macko_jax.gpu.kernel import Problem
from macko_jax.ops import reference, xla_cpu


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A family of functions.

    Attributes:
      why_not: None, or the reason why it cannot serve a problem.
      implement: gives the function that computes the problem's product; see reference.py for the
        signatures.
    """

    why_not: Callable[[Problem], str | None]
    implement: Callable[[Problem], Callable]


def _xla(problem: Problem) -> Callable:
    fast = {"spmv": xla_cpu.spmv, "spmv_transposed": xla_cpu.spmv_transposed}
    if problem.platform == "cpu" and problem.product in fast:
        return fast[problem.product]
    return getattr(reference, problem.product)


def _kernels():
    from macko_jax.gpu import select  # here, since Pallas takes a while to import

    return select


def _no_kernel(problem: Problem) -> str | None:
    if problem.platform != "cuda":
        return f"the kernels need platform cuda, and this is lowered for {problem.platform}"
    if (reason := _kernels().why_not(problem)) is not None:
        return reason
    from macko_jax.ops import self_check

    return self_check.why_not(problem)


# In order of preference.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(
        why_not=_no_kernel, implement=lambda problem: _kernels().implement(problem)
    ),
    "xla": Implementation(why_not=lambda problem: None, implement=_xla),
}


def explain(problem: Problem) -> dict[str, str | None]:
    """For every implementation in order of preference: None if it fits, or why it does not."""
    return {name: i.why_not(problem) for name, i in IMPLEMENTATIONS.items()}


def implement(problem: Problem, implementation: str | None) -> Callable:
    """The function that serves `problem`: of the named implementation, or of the first that fits.

    Raises:
      NotImplementedError: the named implementation cannot serve; it never falls back silently.
    """
    if implementation is None:
        implementation = next(name for name, reason in explain(problem).items() if reason is None)
    elif (reason := IMPLEMENTATIONS[implementation].why_not(problem)) is not None:
        able = [name for name, i in IMPLEMENTATIONS.items() if i.why_not(problem) is None]
        raise NotImplementedError(
            f"implementation {implementation!r} cannot compute {problem.product} here: {reason}. "
            f"Use implementation=None or one of {able}."
        )
    return IMPLEMENTATIONS[implementation].implement(problem)


def check_name(implementation: str | None) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; choose None or one of "
            f"{sorted(IMPLEMENTATIONS)}"
        )
