"""8-bit values with a scale for every row."""

import jax
import jax.numpy as jnp
import numpy as np

# Type of the values -> the largest magnitude that a row is scaled to.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
# Half of the distance between that and the value below it: as far as rounding may reach beyond it.
HALF_STEP = {jnp.dtype(jnp.int8): 0.5, jnp.dtype(jnp.float8_e4m3fn): 16.0}
NAMES = tuple(dtype.name for dtype in LARGEST)


def quantize(weight, dtype):
    """8-bit values q and scales s with weight[r, c] ~ s[r] q[r, c].

    s[r] is max_c |weight[r, c]| over the type's largest value, rounded to the weight's type so that
    the largest q is still the nearest one, but not so far that their product would overflow; q is
    the nearest value of the type (ties to even). So |weight - s q| is at most s[r] / 2 for int8,
    and for float8_e4m3fn at most 2**-4 |weight|, or 2**-10 s[r] where that is more; and s q is
    finite in the weight's type.

    Args:
      weight: [rows, cols] float16, bfloat16 or float32, NumPy or JAX.
      dtype: int8 or float8_e4m3fn.

    Returns:
      q [rows, cols] of `dtype` and s [rows] of the weight's type; a row of zeros has scale 0.

    Raises:
      ValueError: the weight is not finite.

    References:
      Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2.1 (row-wise absmax quantization);
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433 (e4m3).
    """
    weight = weight if isinstance(weight, jax.Array) else np.asarray(weight)
    xp = weight.__array_namespace__()
    peak = xp.max(xp.abs(weight.astype(np.float32)), axis=1, initial=0)
    if not bool(xp.isfinite(peak).all()):
        raise ValueError(
            f"{jnp.dtype(dtype)} values need finite weights, and rows "
            f"{np.flatnonzero(~np.isfinite(np.asarray(peak)))[:8].tolist()} are not; clean the "
            "weight, or store it in its own type"
        )
    return _nearest(weight, dtype)


def _nearest(weight, dtype):
    """`quantize` of a weight that is known to be finite."""
    xp = weight.__array_namespace__()
    dtype, largest = jnp.dtype(dtype), LARGEST[jnp.dtype(dtype)]
    exact = weight.astype(np.float32)
    peak = xp.max(xp.abs(exact), axis=1, initial=0)
    most = _largest_scale(weight.dtype, largest)
    least = peak / np.float32(largest + HALF_STEP[dtype])
    scales = xp.minimum(_round(peak / np.float32(largest), least, weight.dtype), most)
    ratio = exact / xp.where(scales > 0, scales.astype(np.float32), 1)[:, None]
    return nearest_value(ratio, dtype), scales


# A jitted program that rounds must not keep what it rounds in a wider type, as XLA likes to.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def settle(weight: jax.Array, dtype) -> jax.Array:
    """A matrix that 8 bits hold, near another one: `quantize` gives its q and s for it once more.

    That is nearly what q and s of the weight give. But s q rounded to the weight's type may have
    another scale than s, an ulp away, which is settled in three turns.

    Args:
      weight: [rows, cols] float16, bfloat16 or float32, finite; may be traced, in a program that is
        compiled with `COMPILER_OPTIONS`.
      dtype: int8 or float8_e4m3fn.

    Returns:
      s q as products have it, float32 [rows, cols]; `quantize` takes it in the weight's type.
    """
    values, scales = settled(weight, dtype)
    return values.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]


def settled(weight: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """The q and s of `settle`: [rows, cols] of the 8-bit type, and [rows] of the weight's type."""
    again = lambda _, weight: dequantize(*_nearest(weight, dtype))
    return _nearest(jax.lax.fori_loop(0, 2, again, weight), dtype)


def nearest_value(ratio, dtype):
    """The values of an 8-bit type that are nearest to float32 numbers, weights over their scale.

    They are clipped, since a scale may be smaller than the weight asks for.
    """
    xp, dtype = ratio.__array_namespace__(), jnp.dtype(dtype)
    ratio = xp.clip(ratio, -LARGEST[dtype], LARGEST[dtype])
    return (xp.round(ratio) if dtype == jnp.int8 else ratio).astype(dtype)


def _round(real, least, dtype):
    """The numbers of a float type nearest to real ones, or those above where that is below `least`.

    Both are float32. Below a type's normal numbers the nearest may be far.
    """
    xp, info = real.__array_namespace__(), jnp.finfo(dtype)
    nearest = real.astype(dtype)
    above = nearest.astype(np.float32) * np.float32(1 + float(info.eps))
    above = (above + np.float32(info.smallest_subnormal)).astype(dtype)
    return xp.where(nearest.astype(np.float32) < least, above, nearest)


def _largest_scale(dtype, largest: float):
    """The largest number of a float type whose product with `largest` is finite in it."""
    most = float(jnp.finfo(dtype).max)
    scale = np.array(most / largest, dtype)
    return scale if float(scale) * largest <= most else np.nextafter(scale, np.zeros_like(scale))


def dequantize(values, scales) -> jax.Array:
    """[rows, cols] of the scales' type, to which each product is rounded once more."""
    exact = values.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]
    return exact.astype(scales.dtype)
