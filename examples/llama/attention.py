"""Attention over the tokens of one call and over a cache, by whatever serves the device best."""

import functools
import math

import jax
import jax.numpy as jnp


@functools.cache
def _flash_attention():
    """Whether cuDNN's fused attention serves the default device."""
    if jax.default_backend() != "gpu":
        return False
    query = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)

    def loss(query, key, value):
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
        return mixed.astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key).compile()
    except Exception:  # whatever is missing (cuDNN, a supported GPU), XLA's attention remains
        return False
    return True


def fits_flash_attention(query, window):
    """Whether cuDNN serves the queries [B, T, H, D] of whole sequences."""
    length, narrow = query.shape[1], query.dtype in (jnp.bfloat16, jnp.float16)
    whole = window is None or window >= length
    return narrow and whole and length % 64 == 0 and _flash_attention()


def decode_kernel():
    from examples.llama import decode_attention  # half a second of imports that only GPUs need

    return decode_attention


def has_decode_kernel(layer_cache):
    """Whether a kernel rotates one token, adds it to a cache and attends to the live slots."""
    return jax.default_backend() == "gpu" and decode_kernel().fits(layer_cache)


def attend(query, layer_cache, positions, window):
    """Attention of queries [B, T, H, D] at `positions` [B, T] over the slots of a cache."""
    keys, values = layer_cache[..., 0, :], layer_cache[..., 1, :]
    batch, length, heads, head_dim = query.shape
    kv_heads, slots = keys.shape[1:3]
    # Rows of queries per key head, so that both products run along the cache as it lies in memory.
    query = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    wide = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bkgtd,bksd->bkgts", query, keys, **wide) / math.sqrt(head_dim)
    # A slot holds the key of the position of that number: later slots are empty or padding.
    slot, position = jnp.arange(slots), positions[:, None, None, :, None]
    visible = slot <= position
    if window is not None:
        visible &= slot > position - window
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights, values, **wide).astype(query.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
