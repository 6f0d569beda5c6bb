"""Which kernel computes which product of a `kernel.Problem`, and how."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from macko_jax.format import quantization
from macko_jax.format.layout import words_per_row
from macko_jax.gpu import chain, densify, device, row_walk, sddmm, spmv, spmv_transposed, tuning
from macko_jax.gpu.kernel import Kernel, Problem
from macko_jax.lanes.mosaic import WARPGROUP

FLOATS = ("float16", "bfloat16", "float32")
KERNELS: dict[str, Kernel] = {
    "spmv": spmv,
    "spmv_transposed": spmv_transposed,
    "sddmm": sddmm,
    "densify": densify,
    "chain": chain,
}


def why_not(problem: Problem) -> str | None:
    """None if a kernel serves the problem, or the reason why none does."""
    if (reason := device.why_no_kernels()) is not None:
        return reason
    layout, batch = problem.layout, problem.batch
    if layout.encoding not in row_walk.ENCODINGS:
        return (
            f"no kernel reads the encoding {layout.encoding!r}; "
            "macko_jax.compress(macko_jax.decompress(m)) gives one that has kernels"
        )
    if (reason := device.why_no_values(problem.dtype)) is not None:
        return reason
    values_first = problem.product != "sddmm"
    for i, dtype in enumerate((*problem.dtypes, problem.out_dtype)):
        allowed = FLOATS + quantization.NAMES * (values_first and i == 0)
        if jnp.dtype(dtype).name not in allowed:
            return f"the kernels take {', '.join(allowed)} here, not {jnp.dtype(dtype).name}"
    if batch is None:
        return "the number of vectors is symbolic, and a kernel is made for one number of them"
    if layout.stored == 0 or 0 in layout.shape or batch == 0:
        return "the matrix or the batch is empty"
    rows, cols = layout.shape
    if max(rows * words_per_row(cols), batch * max(rows, cols), layout.stored) >= 2**31:
        return "the arrays are too large for 32-bit indices"
    if problem.product == "sddmm":
        return sddmm.why_not(problem)
    methods = METHODS[problem.product]
    reasons = [reason for method in methods if (reason := why_not_by(method, problem))]
    return ", and ".join(reasons) if len(reasons) == len(methods) else None


def implement(problem: Problem) -> Callable:
    """The function that serves a problem that `why_not` has no objection to."""
    if problem.product == "sddmm":
        return sddmm.sddmm
    return METHODS[problem.product][fastest_method(problem)]


def fastest_method(problem: Problem) -> str:
    """The fastest of the `METHODS` of a product with vectors, by what was measured."""
    if why_not_by("passes", problem) is not None:
        return "densify"
    if why_not_by("densify", problem) is not None:
        return "passes"
    passes, dense = KERNELS[problem.product].plan(problem), densify.plan(densified(problem))
    # Where shared memory has room for fewer warps than a warpgroup, they take as much longer.
    idle = min(passes.warps, WARPGROUP) / min(dense.warps, WARPGROUP)
    if idle < 1:
        return "densify"
    # Where types differ, the dense product is one of float32.
    dtype = densified(problem).out_dtype
    bits = 16 if dtype.itemsize == 2 and dtype == problem.x_dtype else 32
    faster = tuning.passes_are_faster(
        problem.product, problem.layout, bits, problem.known_batch, passes.vectors, idle
    )
    return "passes" if faster else "densify"


def why_not_by(method: str, problem: Problem) -> str | None:
    """None if one of the `METHODS` serves the product, or the reason why it does not."""
    if method == "passes":
        return KERNELS[problem.product].why_not(problem)
    return densify.why_not(densified(problem))


def densified(problem: Problem) -> Problem:
    """The problem of writing the matrix of a product with vectors out for a dense product."""
    dtype, x_dtype = problem.dtypes
    return densify.problem_for(problem.layout, dtype, dense_dtype(dtype, x_dtype))


def why_not_fused(problems: tuple[Problem, ...]) -> str | None:
    """None if one kernel computes a product with its fusion, or a chain, or the reason why not."""
    reasons = filter(None, map(why_not, problems))
    if (reason := next(reasons, None)) is not None:
        return reason
    return chain.why_not(problems) if len(problems) > 1 else spmv.why_not(*problems)


def dense_dtype(dtype, x_dtype) -> jnp.dtype:
    """The type in which a matrix is densified for vectors, which represents its values exactly."""
    return jnp.dtype(x_dtype if jnp.dtype(dtype).itemsize == 1 else dtype)


def _spmv_by_densify(layout, values, positions, x, *, out_dtype) -> jax.Array:
    # The densifying waits for x: else XLA does it ahead, and holds two or more matrices at a time.
    row_offsets, x = jax.lax.optimization_barrier((positions.row_offsets, x))
    dense = _densify(layout, values, positions._replace(row_offsets=row_offsets), x.dtype)
    return _matmul("kc,rc->kr", x, dense, out_dtype)


def _transposed_by_densify(layout, values, positions, y, *, out_dtype) -> jax.Array:
    return _matmul("kr,rc->kc", y, _densify(layout, values, positions, y.dtype), out_dtype)


def _densify(layout, values, positions, x_dtype) -> jax.Array:
    dtype = dense_dtype(values.dtype, x_dtype)
    return densify.densify(layout, values, positions, dtype=dtype)


def _matmul(subscripts, a, b, out_dtype) -> jax.Array:
    """A dense product, summed in float32; 16-bit operands go to tensor cores as they are."""
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = "highest" if a.dtype == jnp.float32 else None
    # A result of the operands' type is rounded by the product itself, which sums in float32 too.
    result = out_dtype if out_dtype == a.dtype else jnp.float32
    product = jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=result)
    return product.astype(out_dtype)


# How a product with vectors is computed: by passes over the matrix, or by densifying it for a dense
# product.
METHODS = {
    "spmv": {"passes": spmv.spmv, "densify": _spmv_by_densify},
    "spmv_transposed": {
        "passes": spmv_transposed.spmv_transposed,
        "densify": _transposed_by_densify,
    },
}
