"""`explain`: which implementation multiplies here, and why another one does not."""

import dataclasses
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike

from macko_jax.format import cards
from macko_jax.format.matrix import MackoMatrix
from macko_jax.format.sharded import ARRAYS, Matrix, ShardedMatrix
from macko_jax.gpu.kernel import Fusion, Problem, problem_of
from macko_jax.ops import api, dispatch, fused


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation computes `spmv(matrix, x)` here; `str` gives it to read.

    Attributes:
      implementation: "mosaic_gpu" for the kernels, or "xla".
      how: what the implementation does for this product: which kernel, and how it is laid out.
      why_not: (implementation, reason) of every other one that would have been preferred.
      device: what the product is compiled for, and whether its kernels were measured there.
    """

    implementation: str
    how: str
    why_not: tuple[tuple[str, str], ...]
    device: str

    def __str__(self) -> str:
        reasons = [f"not {name}: {reason}" for name, reason in self.why_not]
        return "\n".join([f"{self.implementation} on {self.device}: {self.how}", *reasons])


def explain(matrix: Matrix, x: ArrayLike | jax.ShapeDtypeStruct) -> Explanation:
    """Says which implementation computes `spmv(matrix, x)` on this process's default device.

    It asks what `spmv` asks when it is compiled, so that on a GPU that no record covers the kernel
    may check itself first, see the guide. Nothing is multiplied.

    Args:
      matrix: [rows, cols], from `compress`; or from `shard`, then it says what each device does.
      x: [..., cols], an array or a `jax.ShapeDtypeStruct`.

    Returns:
      The implementation, what it does, and why those that are preferred do not serve.

    Raises:
      TypeError, ValueError: for what `spmv` does not take.
    """
    x = jax.eval_shape(jnp.asarray, x)
    jax.eval_shape(api.spmv, matrix, x)
    if isinstance(matrix, ShardedMatrix):
        matrix, x = _of_one_device(matrix, x)
    platform = _platform()
    problem = _problem(matrix, x, platform)
    if platform == "cuda" and _is_fused(matrix, x):
        scaled = dataclasses.replace(problem, fusion=Fusion(scaled=True, kept=True))
        if fused.why_no_kernel(scaled) is None:
            how = f"{_how_by_passes(scaled)}, with the scales of the rows"
            return Explanation("mosaic_gpu", how, (), _device(platform))
    if matrix.scales is not None:
        accumulator = jnp.promote_types(problem.out_dtype, "float32")
        problem = dataclasses.replace(problem, out_dtype=accumulator)
    reasons = dispatch.explain(problem)
    chosen = next(name for name, reason in reasons.items() if reason is None)
    return Explanation(
        implementation=chosen,
        how=_how_by_xla(platform) if chosen == "xla" else _how_by_kernels(problem),
        why_not=tuple((name, reason) for name, reason in reasons.items() if reason is not None),
        device=_device(platform),
    )


def _of_one_device(matrix: ShardedMatrix, x: Any) -> tuple[MackoMatrix, jax.ShapeDtypeStruct]:
    """What each device has of a matrix and takes of x, with shapes in the place of arrays."""

    def first(matrix):
        own = {name: getattr(matrix, name)[:1] for name in ARRAYS}
        scales = None if matrix.scales is None else matrix.scales[: matrix.layout.shape[0]]
        return dataclasses.replace(matrix, **own, scales=scales).local()

    own = jax.eval_shape(first, matrix)
    return own, jax.ShapeDtypeStruct((*x.shape[:-1], own.shape[1]), x.dtype)


def _platform() -> str:
    """What a product is lowered for on the default device."""
    backend = jax.default_backend()
    if backend == "gpu":
        return "cuda" if cards.live() is not None else "any"
    return "cpu" if backend == "cpu" else "any"


def _problem(matrix: MackoMatrix, x, platform: str) -> Problem:
    """What a kernel would be asked for, with the result in the type that `spmv` gives."""
    out_dtype = jnp.promote_types(matrix.dtype, x.dtype)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    count = math.prod(x.shape[:-1])
    batch = None if jax.export.is_symbolic_dim(count) else count
    vectors = jax.ShapeDtypeStruct((count, x.shape[-1]), x.dtype if floating else out_dtype)
    problem = problem_of("spmv", matrix.layout, matrix.values, vectors, out_dtype)
    return dataclasses.replace(problem, platform=platform, batch=batch)


def _is_fused(matrix: MackoMatrix, x) -> bool:
    """Whether `spmv` multiplies by the scales of the rows in the kernel, if that serves."""
    one = math.prod(x.shape[:-1]) == 1 and jnp.issubdtype(x.dtype, jnp.floating)
    return one and matrix.scales is not None


def _how_by_kernels(problem: Problem) -> str:
    from macko_jax.gpu import select  # here, since Pallas takes a while to import

    if select.fastest_method(problem) == "passes":
        return _how_by_passes(problem)
    dtype = select.densified(problem).out_dtype.name
    return f"a kernel densifies the matrix, and a dense product of {dtype} follows"


def _how_by_passes(problem: Problem) -> str:
    from macko_jax.gpu import spmv

    plan = spmv.plan(problem)
    copies = "narrow " * plan.settings.narrow + "twice " * plan.settings.two_copies
    passes = "pass" if plan.passes == 1 else "passes"
    return (
        f"the kernel spmv in {plan.passes} {passes} of {plan.vectors} vectors, by {plan.blocks} "
        f"blocks of {plan.warps} warps, with x {copies}in {4 * plan.shared_slots} bytes of shared "
        "memory"
    )


def _how_by_xla(platform: str) -> str:
    if platform == "cpu":
        return "the products for CPUs in macko_jax/ops/xla_cpu.py"
    return "the matrix is densified in XLA, and a dense product follows"


def _device(platform: str) -> str:
    if platform != "cuda":
        return jax.default_backend()
    from macko_jax.gpu import device

    state = "measured" if device.is_measured() else "compiled, self-checked, not yet measured"
    return f"{cards.here().name} (compute capability {device.compute_capability()}, {state})"
