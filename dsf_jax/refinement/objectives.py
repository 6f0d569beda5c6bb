"""What is made small: the distance of a model's outputs from the dense model's."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def divergence(
    teacher: jax.Array, student: jax.Array, weights: jax.Array, temperature: float
) -> jax.Array:
    """sum_t w_t KL(p_t || q_t) tau^2, p = softmax(teacher / tau), q = softmax(student / tau).

    The factor tau^2 keeps the size of gradients (Hinton et al., arXiv 1503.02531). Its derivative,
    w tau (q - p), is formed from both logits and two numbers for each token: beside the logits and
    their gradient no array `[tokens, vocabulary]` is kept from the forward to the backward pass.

    Args:
      teacher: Logits `[*tokens, vocabulary]`; no gradient goes to them.
      student: Logits of the same shape.
      weights: w, `[*tokens]` float32.
      temperature: tau.

    Returns:
      The sum in nats, float32.
    """
    return _forward(teacher, student, weights, temperature)[0]


def _forward(teacher, student, weights, temperature):
    scaled = [x.astype(jnp.float32) / temperature for x in (teacher, student)]
    norms = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in scaled]
    theirs, ours = (x - norm for x, norm in zip(scaled, norms))
    each = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    total = temperature**2 * jnp.sum(jnp.where(weights > 0, weights * each, 0))
    return total, (teacher, student, weights, *norms)


def _backward(temperature, kept, change):
    teacher, student, weights, *norms = kept
    p, q = (
        jnp.exp(x.astype(jnp.float32) / temperature - norm)
        for x, norm in zip((teacher, student), norms)
    )
    scale = (change * temperature * weights)[..., None]
    slope = jnp.where(scale > 0, scale * (q - p), 0)
    return None, slope.astype(student.dtype), None


divergence.defvjp(_forward, _backward)


def spread(weights: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    """Weights of tokens `[*tokens]`, as one for each entry of `shape`, whose leading axes they are.

    Raises:
      ValueError: They are no leading axes.
    """
    if weights is None:
        return jnp.ones(shape, jnp.float32)
    if weights.shape != tuple(shape[: weights.ndim]):
        raise ValueError(
            f"token_weights of shape {weights.shape} are not the leading axes of the outputs, "
            f"{tuple(shape)}"
        )
    last = [1] * (len(shape) - weights.ndim)
    return jnp.broadcast_to(weights.reshape(*weights.shape, *last), shape).astype(jnp.float32)


def squared_distance(
    target: jax.Array, output: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """sum w ||target - output||^2 and sum w ||target||^2 over vectors, float32.

    Args:
      target: `[*tokens, features]`; no gradient goes to it.
      output: The same shape.
      weights: w, `[*tokens]`.
    """
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    # A token of weight 0 may have NaN, which a product with 0 would not remove.
    counts = weights[..., None] > 0
    apart = jnp.where(counts, target - output.astype(jnp.float32), 0)
    size = jnp.where(counts, target, 0)
    return tuple(jnp.sum(weights[..., None] * x * x) for x in (apart, size))  # type: ignore
