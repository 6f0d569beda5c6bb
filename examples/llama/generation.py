"""Continuing prompts: the prefill, the decode steps, and the loop on the host that calls them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama import attention
from examples.llama.cache import Cache, cache_slots, final_slots, round_up, widen
from examples.llama.model import logits, through
from examples.llama.sampling import Sampling
from examples.llama.split import SplitModel

GREEDY = Sampling()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["token", "cache", "key", "drawn"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Generation:
    """Where a generation stands.

    Attributes:
      token: [B] the last tokens drawn, not yet in the cache.
      cache: keys and values of everything before.
      key: the random key of all draws; the i-th uses `fold_in(key, i)`, however draws are shared
        out to calls.
      drawn: int32, how many tokens have been drawn for each prompt.
    """

    token: jax.Array
    cache: Cache
    key: jax.Array
    drawn: jax.Array


def prefill(split, tokens, lengths, key, sampling):
    """Reads the prompts and draws the first token after each.

    The device is given some layers at a time: it starts on the first while the host prepares the
    others, and layers that are alike share compiled code.

    Args:
      split: the model, taken apart.
      tokens: [B, T] prompts, padded at the end.
      lengths: [B] true lengths.
      key, sampling: how tokens are drawn.

    Returns:
      A `Generation` with a cache of T slots.
    """
    x, layer_caches = embed(split.ends, tokens), []
    for piece in split.layers:
        x, more = read(piece, x, split.config)
        layer_caches += more
    return first_token(split.ends, x, Cache(tuple(layer_caches), lengths), key, sampling)


@jax.jit
def embed(ends, tokens):
    """The stream [B, T, E] of tokens [B, T] before the first layer."""
    table, _, _ = ends.build()
    return table(tokens)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="x")
def read(piece, x, config):
    """The stream of prompts after some layers, and these layers' caches; x is consumed."""
    x, cache = through(piece.build(), x, config)
    return x, cache.layers


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def first_token(ends, x, cache, key, sampling):
    """The `Generation` after the first draw, from the last layer's x; the cache is consumed."""
    table, norm, head = ends.build()
    last = jnp.take_along_axis(norm(x), (cache.lengths - 1)[:, None, None], axis=1)[:, 0]
    token = sampling(jax.random.fold_in(key, 0), logits(table, head, last))
    return Generation(token, cache, key, jnp.int32(1))


@functools.partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnames="generation")
def decode(split, generation, steps, sampling):
    """Draws `steps` further tokens on the device, without a visit to the host.

    Args:
      split: the model, taken apart.
      generation: where to go on, with `steps` free slots at least; it is consumed.
      steps, sampling: how many tokens are drawn, and how.

    Returns:
      Tokens [B, steps], and the `Generation` after them.
    """

    def step(now, _):
        # Built inside the loop: the modules are then traced at the loop's own level.
        table, norm, head = split.ends.build()
        blocks = [block for piece in split.layers for block in piece.build()]
        x, cache = through(blocks, table(now.token[:, None]), split.config, now.cache)
        key = jax.random.fold_in(now.key, now.drawn)
        token = sampling(key, logits(table, head, norm(x)[:, 0]))
        return Generation(token, cache, now.key, now.drawn + 1), token

    generation, tokens = jax.lax.scan(step, generation, length=steps)
    return tokens.T, generation


def generate(model, prompts, new_tokens, *, sampling=GREEDY, seed=0, chunk=32):
    """Continues prompts, yielding the new tokens in chunks as they come.

    Args:
      model: a `Llama`, dense or with substituted layers, or its `SplitModel`, which saves taking it
        apart again for every call (some 20 ms for 32 layers).
      prompts: B sequences of token ids, each of at least one token.
      new_tokens: how many tokens to draw for each prompt.
      sampling: how tokens are drawn.
      seed: seeds the random draws.
      chunk: tokens per yield; a larger chunk visits the host less often.

    Yields:
      [B, n] int32 arrays on the host, `new_tokens` columns in all: one column, then chunks.

    Raises:
      ValueError: no prompt, an empty one, one with a token that is not in the vocabulary, or more
        tokens than the model has positions.
    """
    split = model if isinstance(model, SplitModel) else SplitModel.of(model)
    padded, lengths = pad_prompts(split.config, prompts, new_tokens)
    calls = draw(split, padded, lengths, new_tokens, jax.random.key(seed), sampling, chunk)
    left = new_tokens
    for tokens in one_ahead(calls):
        yield jax.device_get(tokens)[:, :left]
        left -= tokens.shape[1]


def pad_prompts(config, prompts, new_tokens):
    """Prompts as one array [B, T], padded at the end, and their lengths [B]; see `generate`."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("generate needs at least one prompt, each of at least one token")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    for prompt in prompts:
        config.check_tokens(prompt)
    longest = int(lengths.max())
    if longest + new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and {new_tokens} new tokens exceed the "
            f"model's {config.max_position_embeddings} positions; shorten one of them"
        )
    padded = np.zeros((len(prompts), round_up(longest)), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    return padded, lengths


def one_ahead(calls):
    """The results of calls, each after the next call is queued: the device need not wait."""
    for result, _ in itertools.pairwise(itertools.chain(calls, [None])):
        yield result


def draw(split, tokens, lengths, new_tokens, key, sampling, chunk):
    """The calls of the device behind `generate`.

    Args:
      split: the model, taken apart.
      tokens, lengths: prompts [B, T], padded at the end, and their true lengths [B], NumPy arrays.
      new_tokens: how many tokens are wanted; the last chunk may hold more.
      key, sampling: how tokens are drawn.
      chunk: tokens per call.

    Yields:
      Tokens on the device, without waiting for them: [B, 1] after the prompts, then [B, chunk].
    """
    live = int(lengths.max())
    full = final_slots(live, new_tokens, chunk)
    generation = prefill(split, tokens, lengths, key, sampling)
    yield generation.token[:, None]
    for _ in range(0, new_tokens - 1, chunk):
        cache = generation.cache
        if cache.slots < live + chunk:
            enough = (
                full if attention.has_decode_kernel(cache.layers[0]) else cache_slots(live + chunk)
            )
            generation = dataclasses.replace(generation, cache=widen(cache, min(enough, full)))
        live += chunk
        drawn, generation = decode(split, generation, chunk, sampling)
        yield drawn
