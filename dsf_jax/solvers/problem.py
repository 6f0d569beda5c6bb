"""One layer's problem: a weight matrix, the Gram matrix of its inputs, and the error between two."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class LayerProblem(NamedTuple):
    """A layer with its inputs scaled to unit size, which is how every solver sees it.

    With D = diag(G)^(1/2), the output error tr((V - W) G (V - W)^T) is
    tr((V D - W D) R (V D - W D)^T), where R = D^-1 G D^-1 has a unit diagonal. Both W D and G are
    also scaled to mean size 1, so no solver depends on the units of weights or activations.

    Attributes:
      weight: W D over `unit`, float32 `[out, in]`; zero in the columns of dead inputs.
      gram: R, float32 `[in, in]`, with the damping on its diagonal; zero for dead inputs.
      scale: D, float32 `[in]`; zero for dead inputs, those whose diagonal entry of G is not
        positive.
      unit: Root mean square of W D, a float32 scalar; 1 where W D is zero.
    """

    weight: jax.Array
    gram: jax.Array
    scale: jax.Array
    unit: jax.Array

    def restore(self, weight: jax.Array) -> jax.Array:
        """Takes a matrix `[rows, in]` in the problem's units back to those of the layer."""
        inverse = jnp.where(self.scale > 0, 1 / jnp.where(self.scale > 0, self.scale, 1), 0)
        return weight * inverse * self.unit


def normalize(weight: jax.Array, gram: jax.Array, damping) -> LayerProblem:
    """Builds the scaled problem from checked float32 arrays; see `LayerProblem`.

    Args:
      weight: W, float32 `[out, in]`.
      gram: G, float32 `[in, in]`.
      damping: Added to the unit diagonal of R for live inputs; counters a short calibration.

    Returns:
      The `LayerProblem`.
    """
    diagonal = jnp.diagonal(gram)
    # Only the size of G relative to itself matters; this keeps tiny or huge activations in range.
    size = jnp.max(jnp.abs(diagonal))
    diagonal = diagonal / jnp.where(size > 0, size, 1)
    alive = diagonal > 1e-12
    scale = jnp.sqrt(jnp.where(alive, diagonal, 0))
    inverse = jnp.where(alive, 1 / jnp.where(alive, scale, 1), 0)
    correlation = gram / jnp.where(size > 0, size, 1) * inverse[:, None] * inverse[None, :]
    correlation = (correlation + correlation.T) / 2 + damping * jnp.diag(alive.astype(gram.dtype))
    largest = jnp.max(jnp.abs(weight))
    scaled = weight / jnp.where(largest > 0, largest, 1) * scale
    size = jnp.sqrt(jnp.mean(scaled * scaled))
    size = jnp.where(size > 0, size, 1)
    unit = size * jnp.where(largest > 0, largest, 1)
    return LayerProblem(scaled / size, correlation, scale, unit)


@jax.jit
def _relative_output_error(weight, approximation, gram):
    with jax.default_matmul_precision("highest"):
        peak = jnp.max(jnp.abs(weight))
        peak = jnp.where(peak > 0, peak, 1)
        weight, difference = weight / peak, (approximation - weight) / peak
        if gram is None:
            error, norm = jnp.sum(difference * difference), jnp.sum(weight * weight)
        else:
            size = jnp.max(jnp.abs(gram))
            gram = gram / jnp.where(size > 0, size, 1)
            error = jnp.maximum(jnp.sum((difference @ gram) * difference), 0)
            norm = jnp.maximum(jnp.sum((weight @ gram) * weight), 0)
    return jnp.where(error > 0, error / norm, 0.0)


def relative_output_error(weight, approximation, gram=None) -> jax.Array:
    """Output error of an approximated layer, relative to the size of the output.

    tr((V - W) G (V - W)^T) / tr(W G W^T), which is sum ||V x - W x||^2 / sum ||W x||^2 over the
    calibration inputs x.

    Args:
      weight: W `[out, in]`, any float dtype.
      approximation: V `[out, in]`.
      gram: G = sum x x^T `[in, in]`; None means the identity.

    Returns:
      A float32 scalar. Where the layer's output is zero, it is 0 if V agrees and inf if not.
    """
    weight, approximation = jnp.asarray(weight), jnp.asarray(approximation)
    if weight.shape != approximation.shape or weight.ndim != 2:
        raise ValueError(
            "relative_output_error compares two matrices [out, in] of one shape, got "
            f"{weight.shape} and {approximation.shape}"
        )
    if gram is not None:
        gram = jnp.asarray(gram, jnp.float32)
        if gram.shape != (weight.shape[1],) * 2:
            raise ValueError(
                f"gram must be [in, in] = {(weight.shape[1],) * 2} for a weight of shape "
                f"{weight.shape}, got {gram.shape}"
            )
    f32 = jnp.float32
    return _relative_output_error(weight.astype(f32), approximation.astype(f32), gram)


def check_layer(weight, gram, name: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Checks a layer's arrays and returns them as float32, the Gram matrix filled in.

    Args:
      weight: `[out, in]`, any real float dtype.
      gram: `[in, in]` or None for the identity.
      name: What to call the layer in an error.

    Returns:
      Weight and Gram matrix as float32 arrays.

    Raises:
      TypeError: `weight` or `gram` is not of a real float dtype.
      ValueError: A wrong shape, an empty matrix, NaN or infinity, a Gram matrix that is not
        symmetric.
    """
    layer = f"layer {name!r}: " if name else ""
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(
            f"{layer}weight has dtype {weight.dtype}; give float16, bfloat16 or float32"
        )
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(
            f"{layer}weight must be a non-empty matrix [out, in], got shape {weight.shape}"
            + (
                "; a Flax conv kernel is reshaped to [out, h * w * in] first"
                if weight.ndim == 4
                else ""
            )
        )
    inputs = weight.shape[1]
    weight = weight.astype(jnp.float32)
    _check_finite(weight, f"{layer}weight")
    if gram is None:
        return weight, jnp.eye(inputs, dtype=jnp.float32)
    gram = jnp.asarray(gram)
    if not jnp.issubdtype(gram.dtype, jnp.floating):
        raise TypeError(f"{layer}gram has dtype {gram.dtype}; give a float Gram matrix")
    if gram.shape != (inputs, inputs):
        raise ValueError(
            f"{layer}gram must be [in, in] = {(inputs, inputs)} for a weight of shape "
            f"{weight.shape}, got {gram.shape}; weights are [out, in], Flax kernels [in, out]"
        )
    gram = gram.astype(jnp.float32)
    _check_finite(gram, f"{layer}gram")
    asymmetry, size = np.asarray(_asymmetry(gram))
    if asymmetry > 1e-2 * size:
        raise ValueError(
            f"{layer}gram is not symmetric: entries differ from their mirror images by up to "
            f"{asymmetry:.3g} where the largest is {size:.3g}; give sum x x^T"
        )
    return weight, gram


@jax.jit
def _asymmetry(gram):
    return jnp.stack([jnp.max(jnp.abs(gram - gram.T)), jnp.max(jnp.abs(gram))])


@jax.jit
def _is_finite(array):
    return jnp.all(jnp.isfinite(array))


def is_finite(array: jax.Array) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    return bool(_is_finite(array))


def _check_finite(array, what):
    if not is_finite(array):
        bad = np.argwhere(~np.isfinite(np.asarray(array)))
        raise ValueError(
            f"{what} holds {len(bad)} NaN or infinite entries, the first at {tuple(map(int, bad[0]))};"
            " check the checkpoint or the calibration batches"
        )


def check_density(density, name: str | None = None) -> float:
    """Returns `density` as a float, or raises a ValueError where it is not in (0, 1]."""
    if not 0 < float(density) <= 1:
        layer = f"layer {name!r}: " if name else ""
        raise ValueError(
            f"{layer}density is the fraction of entries kept and must be in (0, 1], got {density}"
        )
    return float(density)
