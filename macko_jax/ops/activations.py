"""What a transformer's block does before a product: a norm, or a gate."""

import jax
import jax.numpy as jnp

from macko_jax.format.promotion import own_promotion


@own_promotion()
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


def swiglu(x: jax.Array) -> jax.Array:
    """silu(gate) * passed of x [..., 2 n], which holds both one after the other (2002.05202)."""
    gate, passed = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * passed
