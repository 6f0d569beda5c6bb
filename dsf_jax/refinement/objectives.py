"""What is made small: the distance of a model's outputs from the dense model's."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

SMALLEST = 1e-6  # of the mean ||target||^2 is what a token's error is relative to at least


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
    target: jax.Array, output: jax.Array, weights: jax.Array, relative_to: str
) -> tuple[jax.Array, jax.Array]:
    """The squared distance of vectors, and what it is relative to, both float32.

    With relative_to="batch" these are sum w ||target - output||^2 and sum w ||target||^2 over the
    vectors of the tokens. With "token" each term of both is divided by the token's own
    ||target||^2, but at least by `SMALLEST` of their mean, so that the quotient is the mean of the
    tokens' relative errors. A few tokens of language models have outputs thousands of times as
    large as the others' ("massive activations", Sun et al., arXiv 2402.17762), beside whose errors
    those of all others vanish in the first form.

    Args:
      target: `[*tokens, features]`; no gradient goes to it.
      output: The same shape.
      weights: w, `[*tokens]`.
      relative_to: "token" or "batch".
    """
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    # A token of weight 0 may have NaN, which a product with 0 would not remove.
    counts = weights > 0
    clean = lambda x: jnp.where(counts[..., None], x, 0)
    apart, size = (
        jnp.sum(jnp.square(clean(x)), axis=-1)
        for x in (target - output.astype(jnp.float32), target)
    )
    if relative_to == "token":
        least = SMALLEST * jnp.mean(size, where=counts)
        weights = weights / jnp.maximum(size, jnp.maximum(least, jnp.finfo(jnp.float32).tiny))
    weights = jnp.where(counts, weights, 0)
    return jnp.sum(weights * apart), jnp.sum(weights * size)
