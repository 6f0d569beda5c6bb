"""Dense weights of few bits, the rivals of sparse ones: rounded to nearest, and by GPTQ.

Each group of 64 neighbouring weights of a row has a grid of 2^bits points between its least and its
largest weight (zero among them), by a 16-bit scale and a zero point of as many bits as a weight.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from dsf_jax.solvers.pruners import inverse_factor

GROUP = 64


def bits_per_weight(bits):
    """Bits that a weight takes, with its share of its group's scale and zero point."""
    return bits + (16 + bits) / GROUP


def _grid(weight, bits):
    """Scale and zero point of each weight, float32 [out, in]."""
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    padded = jnp.pad(weight, ((0, 0), (0, groups * GROUP - cols)))
    grouped = padded.reshape(rows, groups, GROUP)
    low, high = jnp.minimum(grouped.min(-1), 0), jnp.maximum(grouped.max(-1), 0)
    scale = ((high - low) / (2**bits - 1)).astype(jnp.float16).astype(jnp.float32)
    scale = jnp.where(scale > 0, scale, 1)
    spread = lambda array: jnp.repeat(array, GROUP, axis=1)[:, :cols]
    return spread(scale), spread(jnp.round(-low / scale))


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

    Columns go by falling diagonal of the Gram matrix (act-order), with the grids of the weights as
    they were before (static groups).

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
        order = jnp.argsort(-jnp.diagonal(gram))
        scale, zero = (array[:, order] for array in _grid(weight, bits))
        weight = weight[:, order]
        factor = inverse_factor(weight, gram[order][:, order], 0)
        columns = jnp.arange(weight.shape[1])

        def step(j, state):
            current, rounded = state
            of = lambda array: lax.dynamic_slice_in_dim(array, j, 1, axis=1)
            entry = of(current)
            point = _round(entry, of(scale), of(zero), bits)
            row = lax.dynamic_slice_in_dim(factor, j, 1, axis=0)
            error = (entry - point) / of(row)
            current = current - jnp.where(columns > j, error * row, 0)
            return current, lax.dynamic_update_slice_in_dim(rounded, point, j, axis=1)

        start = weight, jnp.zeros_like(weight)
        rounded = lax.fori_loop(0, weight.shape[1], step, start)[1]
        return jnp.zeros_like(rounded).at[:, order].set(rounded)


FEW_BITS = {"rtn": round_to_nearest, "gptq": gptq}
