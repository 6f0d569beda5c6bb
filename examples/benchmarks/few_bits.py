"""Dense weights of few bits, the rivals of sparse ones: rounded to nearest, and by GPTQ.

Each group of 64 weights of a row has a grid of 2^bits points, zero among them, by a 16-bit scale
and a zero point of as many bits as a weight. It covers the range of the weights, or the share of it
by which the squared error of rounding them is least.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.pruners import inverse_factor

GROUP = 64
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range that its grid may cover


def bits_per_weight(bits):
    """Bits that a weight takes, with its share of its group's scale and zero point."""
    return bits + (16 + bits) / GROUP


def _grid(weight, bits):
    """Scale and zero point of each weight, float32 [out, in]."""
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    padded = jnp.pad(weight, ((0, 0), (0, groups * GROUP - cols)))
    grouped = padded.reshape(rows, groups, GROUP)
    low = jnp.minimum(grouped.min(-1, keepdims=True), 0)
    high = jnp.maximum(grouped.max(-1, keepdims=True), 0)
    best = None
    for share in SHARES:
        scale = (share * (high - low) / (2**bits - 1)).astype(jnp.float16).astype(jnp.float32)
        scale = jnp.where(scale > 0, scale, 1)
        zero = jnp.round(-share * low / scale)
        error = jnp.sum((_round(grouped, scale, zero, bits) - grouped) ** 2, -1, keepdims=True)
        found = error, scale, zero
        best = found if best is None else [jnp.where(error < best[0], *x) for x in zip(found, best)]
    spread = lambda array: jnp.repeat(array[..., 0], GROUP, axis=1)[:, :cols]
    return spread(best[1]), spread(best[2])


def _round(weight, scale, zero, bits):
    return (jnp.clip(jnp.round(weight / scale) + zero, 0, 2**bits - 1) - zero) * scale


@functools.partial(jax.jit, static_argnames="bits")
def round_to_nearest(weight, gram, bits):
    """The weights [out, in], each at the nearest point of its group's grid."""
    del gram
    return _round(weight, *_grid(weight, bits), bits)


@functools.partial(jax.jit, static_argnames="bits", compiler_options=COMPILER_OPTIONS)
def gptq(weight, gram, bits):
    """The weights rounded column by column, while later columns make up for the error.

    Columns go by falling diagonal of the Gram matrix (act-order); groups are of neighbours in that
    order, and a group's grid is that of its weights when their turn comes.

    Args:
      weight: W, float32 [out, in].
      gram: G, the sum of x x^T, float32 [in, in].
      bits: of a weight.

    Returns:
      Weights on the grids, float32 [out, in].

    References:
      GPTQ, arXiv 2210.17323.
    """
    with jax.default_matmul_precision("highest"):
        rows, cols = weight.shape
        padding = -cols % GROUP
        order = jnp.argsort(-jnp.diagonal(gram))
        weight, gram = weight[:, order], gram[order][:, order]
        factor = inverse_factor(weight, gram, padding)
        columns = jnp.arange(cols + padding)

        def group(current, first):
            scale, zero = _grid(lax.dynamic_slice_in_dim(current, first, GROUP, axis=1), bits)

            def step(j, state):
                current, rounded = state
                entry = lax.dynamic_slice_in_dim(current, first + j, 1, axis=1)
                of = lambda array: lax.dynamic_slice_in_dim(array, j, 1, axis=1)
                point = _round(entry, of(scale), of(zero), bits)
                row = lax.dynamic_slice_in_dim(factor, first + j, 1, axis=0)
                error = (entry - point) / lax.dynamic_slice_in_dim(row, first + j, 1, axis=1)
                current = current - jnp.where(columns > first + j, error * row, 0)
                return current, lax.dynamic_update_slice_in_dim(rounded, point, j, axis=1)

            start = current, jnp.zeros((rows, GROUP), weight.dtype)
            return lax.fori_loop(0, GROUP, step, start)

        start = jnp.pad(weight, ((0, 0), (0, padding)))
        rounded = lax.scan(group, start, jnp.arange(0, cols, GROUP))[1]
        rounded = jnp.swapaxes(rounded, 0, 1).reshape(rows, -1)[:, :cols]
        return jnp.zeros_like(rounded).at[:, order].set(rounded)


FEW_BITS = {"rtn": round_to_nearest, "gptq": gptq}
