"""The problem of one layer: a weight matrix and the Gram matrix of its inputs."""

import dataclasses
import functools
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from macko_jax.format.promotion import own_promotion

# Root mean square of a dead input over that of a live one, as solvers see it.
DEAD_SIZE = 1e-3


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a method is asked to solve, checked and in float32.

    A method looks for a sparse V, or a product of two sparse factors, for which the output error
    tr((V - W) G (V - W)^T) is small.

    Attributes:
      weight: W `[out, in]`.
      gram: G `[in, in]`, the sum of x x^T over the calibration inputs x. It is the identity where
        none was given, and where the one given is zero.
      name: What to call the layer in an error; None for a matrix without a name.
      unseen: Whether the Gram matrix given is zero: no input reached the layer (an expert that got
        no token, a layer behind a dead one), so that its weights alone can say what matters.
      dead: How many inputs are zero throughout where others are not; see `NormalizedProblem`.
    """

    weight: jax.Array
    gram: jax.Array
    name: str | None = None
    unseen: bool = False
    dead: int = 0

    @classmethod
    def of(
        cls, weight: ArrayLike, gram: ArrayLike | None = None, name: str | None = None
    ) -> "Problem":
        """Checks a layer's arrays and makes a problem of them.

        Args:
          weight: `[out, in]`, any real float dtype.
          gram: `[in, in]`, or None for the identity.
          name: What to call the layer in an error.

        Returns:
          The problem.

        Raises:
          TypeError: `weight` or `gram` is not of a real float dtype.
          ValueError: A shape is wrong, a matrix is empty or holds NaN or infinity, or the Gram
            matrix is not symmetric.
        """
        checked, layer = _check_weight(weight, name), layer_prefix(name)
        given = None if gram is None else _check_gram(gram, checked.shape, name)
        # One program and one wait for all that has to be known of the values.
        finite, gram_finite, alive, asymmetry, size = np.asarray(_inspect(checked, given))
        if not finite:
            _raise_infinite(checked, f"{layer}weight")
        if given is not None and not gram_finite:
            _raise_infinite(given, f"{layer}gram")
        if asymmetry > 1e-2 * size:
            raise ValueError(
                f"{layer}gram is not symmetric: entries differ from their mirror images by up to "
                f"{asymmetry:.3g} where the largest is {size:.3g}; give sum x x^T"
            )
        unseen = given is not None and not alive
        if given is None or unseen:
            given = jnp.eye(checked.shape[1], dtype=jnp.float32)
            alive = checked.shape[1]
        return cls(checked, given, name, unseen, checked.shape[1] - int(alive))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        rows, cols = self.weight.shape
        return rows, cols

    def note(self, factor: jax.Array) -> str | None:
        """What a user should know of the problem and a solution; None where there is nothing.

        Args:
          factor: What the solution multiplies inputs by, `[rows, in]`: V, or the right factor.
        """
        if self.unseen:
            return "its inputs are all zero"
        if not self.dead:
            return None
        diagonal = jnp.diagonal(self.gram)
        kept = jnp.sum((factor != 0) & ~_alive(diagonal / jnp.max(diagonal)))
        return f"{self.dead} of its {self.shape[1]} inputs are zero and keep {kept} non-zeros"

    def error(self, approximation: jax.Array) -> float:
        """Relative output error of a matrix `[out, in]` in the place of W; NaN where it has any."""
        return float(_relative_output_error(self.weight, approximation, self.gram))


class NormalizedProblem(NamedTuple):
    """A layer with its inputs scaled to unit size, which is how every solver sees it.

    With D = diag(G)^(1/2), the output error tr((V - W) G (V - W)^T) is
    tr((V D - W D) R (V D - W D)^T), where R = D^-1 G D^-1 has a unit diagonal. Both W D and G are
    also scaled to mean size 1, so no solver depends on the units of weights or activations.

    Attributes:
      weight: W D over `unit`, float32 `[out, in]`.
      gram: R, float32 `[in, in]`, with the damping on its diagonal.
      scale: D, float32 `[in]`.
      unit: Root mean square of W D, a float32 scalar; 1 where W D is zero.
      alive: Which inputs were seen, bool `[in]`; the others are dead. They are taken for ones that
        depend on no other, and so small (`DEAD_SIZE`) that what the live inputs leave of a budget
        goes to the largest weights of dead ones.
    """

    weight: jax.Array
    gram: jax.Array
    scale: jax.Array
    unit: jax.Array
    alive: jax.Array

    def restore(self, weight: jax.Array) -> jax.Array:
        """Takes a matrix `[rows, in]` in the problem's units back to those of the layer."""
        return weight / self.scale * self.unit


def _alive(diagonal: jax.Array) -> jax.Array:
    """Which inputs were seen, by the diagonal of G over its largest entry."""
    return diagonal > 1e-12


def normalize(weight: jax.Array, gram: jax.Array, damping: float) -> NormalizedProblem:
    """Builds the scaled problem from checked float32 arrays; see `NormalizedProblem`.

    Args:
      weight: W, float32 `[out, in]`.
      gram: G, float32 `[in, in]`.
      damping: Added to the unit diagonal of R; counters a short calibration.

    Returns:
      The `NormalizedProblem`.
    """
    diagonal = jnp.diagonal(gram)
    # Only the size of G relative to itself matters; this keeps tiny or huge activations in range.
    size = jnp.max(jnp.abs(diagonal))
    diagonal = diagonal / jnp.where(size > 0, size, 1)
    alive = _alive(diagonal)
    mean = jnp.sum(jnp.where(alive, diagonal, 0)) / jnp.maximum(jnp.sum(alive), 1)
    scale = jnp.sqrt(jnp.where(alive, diagonal, jnp.where(mean > 0, mean, 1) * DEAD_SIZE**2))
    inverse = jnp.where(alive, 1 / scale, 0)
    correlation = gram / jnp.where(size > 0, size, 1) * inverse[:, None] * inverse[None, :]
    correlation = (correlation + correlation.T) / 2 + jnp.diag(jnp.where(alive, 0.0, 1) + damping)
    largest = jnp.max(jnp.abs(weight))
    scaled = weight / jnp.where(largest > 0, largest, 1) * scale
    size = jnp.sqrt(jnp.mean(scaled * scaled))
    size = jnp.where(size > 0, size, 1)
    unit = size * jnp.where(largest > 0, largest, 1)
    return NormalizedProblem(scaled / size, correlation, scale, unit, alive)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def _relative_output_error(
    weight: jax.Array, approximation: jax.Array, gram: jax.Array | None
) -> jax.Array:
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
    # NaN is neither hidden nor taken for no error.
    return jnp.where(error == 0, 0.0, error / norm)


@own_promotion()
def relative_output_error(
    weight: ArrayLike, approximation: ArrayLike, gram: ArrayLike | None = None
) -> jax.Array:
    """Output error of an approximated layer, relative to the size of the output.

    tr((V - W) G (V - W)^T) / tr(W G W^T), which is sum ||V x - W x||^2 / sum ||W x||^2 over the
    calibration inputs x.

    Args:
      weight: W `[out, in]`, any float dtype.
      approximation: V `[out, in]`.
      gram: G = sum x x^T `[in, in]`; None means the identity.

    Returns:
      A float32 scalar. Where the layer's output is zero, it is 0 if V agrees and inf if not; where
      an argument holds NaN, it is NaN.

    Raises:
      ValueError: The shapes do not fit each other.
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


def _check_weight(weight: ArrayLike, name: str | None) -> jax.Array:
    """A weight matrix `[out, in]` as float32, or an error that says what is wrong with it."""
    layer = layer_prefix(name)
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(
            f"{layer}weight has dtype {weight.dtype}; give float16, bfloat16 or float32"
        )
    if weight.ndim != 2 or weight.size == 0:
        hint = "; a Flax conv kernel is reshaped to [out, h * w * in] first"
        raise ValueError(
            f"{layer}weight must be a non-empty matrix [out, in], got shape {weight.shape}"
            + (hint if weight.ndim == 4 else "")
        )
    return weight.astype(jnp.float32)


def _check_gram(gram: ArrayLike, shape: tuple[int, ...], name: str | None) -> jax.Array:
    """The Gram matrix of a weight of `shape` as float32, or an error that says what is wrong."""
    layer = layer_prefix(name)
    gram = jnp.asarray(gram)
    if not jnp.issubdtype(gram.dtype, jnp.floating):
        raise TypeError(f"{layer}gram has dtype {gram.dtype}; give a float Gram matrix")
    inputs = shape[1]
    if gram.shape != (inputs, inputs):
        raise ValueError(
            f"{layer}gram must be [in, in] = {(inputs, inputs)} for a weight of shape "
            f"{shape}, got {gram.shape}; weights are [out, in], Flax kernels [in, out]"
        )
    return gram.astype(jnp.float32)


@jax.jit
def _inspect(weight: jax.Array, gram: jax.Array | None) -> jax.Array:
    """Whether W and G are finite; how many inputs G has seen, its asymmetry and largest entry."""
    finite = jnp.all(jnp.isfinite(weight))
    of_gram = (True, 0, 0.0, 0.0)
    if gram is not None:
        asymmetry, size = jnp.max(jnp.abs(gram - gram.T)), jnp.max(jnp.abs(gram))
        diagonal = jnp.diagonal(gram)
        largest = jnp.max(diagonal)
        alive = jnp.sum(_alive(diagonal / jnp.where(largest > 0, largest, 1)))
        of_gram = jnp.all(jnp.isfinite(gram)), alive, asymmetry, size
    return jnp.stack([jnp.asarray(fact, jnp.float32) for fact in (finite, *of_gram)])


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


def is_finite(array: jax.Array) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    return bool(_is_finite(array))


def _raise_infinite(array: jax.Array, what: str) -> NoReturn:
    bad = np.argwhere(~np.isfinite(np.asarray(array)))
    first = tuple(map(int, bad[0]))
    raise ValueError(
        f"{what} holds {len(bad)} NaN or infinite entries, the first at {first}; "
        "check the checkpoint or the calibration batches"
    )


def check_density(density: float, name: str | None = None) -> float:
    """Returns `density` as a float, or raises a ValueError where it is not in (0, 1]."""
    if not 0 < float(density) <= 1:
        raise ValueError(
            f"{layer_prefix(name)}density is the fraction of entries kept and must be in (0, 1], "
            f"got {density}"
        )
    return float(density)


def layer_prefix(name: str | None) -> str:
    """How an error begins that is about a layer; nothing for a matrix without a name."""
    return f"layer {name!r}: " if name else ""
