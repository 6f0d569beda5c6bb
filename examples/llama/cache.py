"""The KV cache: keys and values of the tokens seen so far, and how many slots hold them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

SMALLEST_CACHE = 512  # slots, unless a generation needs fewer


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "lengths"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values seen so far.

    Attributes:
      layers: for each layer its keys and values, [B, K, S, 2, D].
      lengths: [B] int32, tokens held per sequence. Slots beyond are never visible, so prompts of
        unequal length are padded at their end and `lengths` set back to the true ones.
    """

    layers: tuple
    lengths: jax.Array

    @property
    def slots(self):
        return self.layers[0].shape[2]


@functools.partial(jax.jit, static_argnames="slots")
def widen(cache, slots):
    """The cache with empty slots added, up to `slots` in all."""
    more = [(0, 0), (0, 0), (0, slots - cache.slots), (0, 0), (0, 0)]
    return dataclasses.replace(cache, layers=tuple(jnp.pad(layer, more) for layer in cache.layers))


def write(layer_cache, new, positions):
    """The cache of a layer with the keys and values [B, K, T, 2, D] of some positions."""
    new = new.astype(layer_cache.dtype)
    if len(layer_cache) == 1:  # one sequence: a slice update, which XLA does in place
        return jax.lax.dynamic_update_slice(layer_cache, new, (0, 0, positions[0, 0], 0, 0))
    rows = jnp.arange(len(layer_cache))[:, None]
    return layer_cache.at[rows, :, positions].set(new.swapaxes(1, 2))


def final_slots(prompt, new_tokens, chunk):
    """Slots that a generation needs at its end, when the last chunk has been drawn whole."""
    return round_up(prompt + round_up(new_tokens - 1, chunk))


def cache_slots(live):
    """Slots to hold `live` tokens: 512, 768, 1024, 1536, 2048, ..., of which a third may be empty.

    Where attention passes over every slot its work then follows the live length, and few sizes mean
    few compilations.
    """
    octave = SMALLEST_CACHE
    while octave < live:
        octave *= 2
    halfway = octave * 3 // 4
    return halfway if octave > SMALLEST_CACHE and live <= halfway else octave


def round_up(count, multiple=64):
    return -(-count // multiple) * multiple
