"""Which kernel computes which product of a `dispatch.Problem`; functions as in `reference.py`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from macko_jax.format import quantization
from macko_jax.format.layout import words_per_row
from macko_jax.gpu import chain, spmv
from macko_jax.gpu import densify as decode
from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import sddmm as by_values
from macko_jax.gpu import spmv_transposed as transposed
from macko_jax.gpu import tuning as config

FLOATS = ("float16", "bfloat16", "float32")


def why_not(problem) -> str | None:
    """None if a kernel serves the problem, or the reason why none does."""
    if (reason := config.why_no_kernels()) is not None:
        return reason
    if problem.encoding not in strips.ENCODINGS:
        return (
            f"no kernel reads the encoding {problem.encoding!r}; "
            "macko_jax.compress(macko_jax.decompress(m)) gives one that has kernels"
        )
    values_first = problem.product != "spmv_values"
    for i, dtype in enumerate((*problem.dtypes, problem.out_dtype)):
        allowed = FLOATS + quantization.NAMES * (values_first and i == 0)
        if jnp.dtype(dtype).name not in allowed:
            return f"the kernels take {', '.join(allowed)} here, not {jnp.dtype(dtype).name}"
    if problem.stored == 0 or 0 in problem.shape or problem.batch == 0:
        return "the matrix or the batch is empty"
    rows, cols = problem.shape
    if max(rows * words_per_row(cols), problem.batch * max(rows, cols), problem.stored) >= 2**31:
        return "the arrays are too large for 32-bit indices"
    if problem.product == "spmv_values":
        return by_values.why_not(_matrix(problem), problem.dtypes[0], problem.batch)
    reasons = [why_not_by(way, problem) for way in WAYS[problem.product]]
    return None if None in reasons else ", and ".join(reasons)


def choose(problem) -> Callable:
    """The function that serves a problem that `why_not` has no objection to."""
    if problem.product == "spmv_values":
        return by_values.spmv_values
    return WAYS[problem.product][way(problem)]


def way(problem) -> str:
    """The fastest of the `WAYS` of a product with vectors, by what was measured."""
    matrix = _matrix(problem)
    if why_not_by("passes", problem) is not None:
        return "decode"
    by_passes = config.by_passes(problem.product, matrix, problem.dtypes[1], problem.batch)
    return "passes" if by_passes or why_not_by("decode", problem) is not None else "decode"


def why_not_by(way: str, problem) -> str | None:
    """None if one of the `WAYS` serves the product, or the reason why it does not."""
    matrix, backward = _matrix(problem), problem.product == "spmv_transposed"
    if way == "decode":
        return decode.why_not(matrix, config.dense_dtype(*problem.dtypes))
    if backward:
        return transposed.why_not(matrix, problem.batch)
    return spmv.why_not(matrix, problem.dtypes[1])


def plan_fused(problems, around) -> spmv.Plan | chain.Plan | None:
    """Of one kernel for a chain of products, or for one; None where there is none.

    `around` has for each of them what a `chain.Step` is beside its matrix.
    """
    if any(why_not(problem) is not None for problem in problems):
        return None
    steps = [chain.Step(_matrix(problem), *more) for problem, more in zip(problems, around)]
    x_dtype = problems[0].dtypes[1]
    if len(steps) == 1:
        [step] = steps
        return spmv.plan_fused(step.matrix, x_dtype, step.fusion)
    plan = chain.Plan(tuple(steps), x_dtype, config.multiprocessors())
    return plan if chain.why_not(plan) is None else None


def _matrix(problem) -> strips.Matrix:
    """What the kernels know of the problem's matrix; its values are an operand or the result."""
    dtype = problem.out_dtype if problem.product == "spmv_values" else problem.dtypes[0]
    return strips.Matrix(
        problem.shape, problem.encoding, problem.lanes, problem.stored, jnp.dtype(dtype)
    )


def _spmv_by_decode(values, x, codes, row_offsets, starts, *, out_dtype, **static):
    # Decoding waits for x: else XLA decodes matrices ahead, and holds two or more at a time.
    row_offsets, x = jax.lax.optimization_barrier((row_offsets, x))
    dense = _decode(values, x, codes, row_offsets, starts, **static)
    return _matmul("kc,rc->kr", x, dense, out_dtype)


def _transposed_by_decode(values, y, codes, row_offsets, starts, *, out_dtype, **static):
    dense = _decode(values, y, codes, row_offsets, starts, **static)
    return _matmul("kr,rc->kc", y, dense, out_dtype)


def _decode(values, x, *positions, **static):
    dtype = config.dense_dtype(values.dtype, x.dtype)
    return decode.decode(values, *positions, **static, dtype=dtype)


def _matmul(subscripts, a, b, out_dtype) -> jax.Array:
    """A dense product, summed in float32; 16-bit operands go to tensor cores as they are."""
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = "highest" if a.dtype == jnp.float32 else None
    # A result of the operands' type is rounded by the product itself, which sums in float32 too.
    result = out_dtype if out_dtype == a.dtype else jnp.float32
    product = jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=result)
    return product.astype(out_dtype)


# The ways of a product with vectors: by passes over the matrix; by a dense decode and a dense
# product.
WAYS = {
    "spmv": {"passes": spmv.spmv, "decode": _spmv_by_decode},
    "spmv_transposed": {"passes": transposed.spmv_transposed, "decode": _transposed_by_decode},
}
