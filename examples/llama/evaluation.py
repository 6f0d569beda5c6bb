"""How well a model predicts a text, in bits per byte or perplexity, over sliding windows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def window_length(asked, config):
    """Tokens of a window: those asked for, or by default the model's positions, at most 2048."""
    length = asked or min(2048, config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--length={length} exceeds the model's {config.max_position_embeddings} positions; "
            "give at most these"
        )
    return length


def windows(tokens, length, stride):
    """Cuts a text into overlapping windows in which every token but the first counts once.

    Args:
      tokens: [N] token ids.
      length: tokens a window feeds to the model.
      stride: how far a window starts behind the one before. Only its last `stride` predictions
        count, each of which has seen at least `length - stride` tokens; the first window counts
        whole.

    Returns:
      inputs [W, length], targets [W, length], counts [W, length] of bool.
    """
    if not 0 < stride <= length:
        raise ValueError(f"stride must lie in 1..{length} (the window), got {stride}")
    tokens = np.asarray(tokens, np.int32)
    predictions = len(tokens) - 1
    if predictions < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has nothing to predict; give at least 2")
    starts = np.arange(0, max(predictions - length, 0) + stride, stride)
    places = starts[:, None] + np.arange(length)
    counts = places < predictions
    counts[1:, : length - stride] = False
    padded = np.pad(tokens, (0, max(0, int(places.max()) + 2 - len(tokens))))
    return padded[places], padded[places + 1], counts


@functools.partial(jax.jit, static_argnames="graph")
def logits(graph, state, tokens):
    """Logits [B, T, vocab] of a model that `nnx.split` took apart."""
    return nnx.merge(graph, state)(tokens)


@jax.jit
def _sum_nats(logits, targets, counts):
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return -jnp.sum(likelihood[..., 0], where=counts)


def _batches(config, tokens, length, stride, batch, limit=None):
    """Windows of a text in batches of one shape: inputs, targets, counts; and how many are done."""
    config.check_tokens(tokens)
    cut = windows(tokens, length, stride)
    if limit is not None and limit < len(cut[0]):
        chosen = np.linspace(0, len(cut[0]) - 1, limit).round().astype(int)
        cut = [array[chosen] for array in cut]
    total = len(cut[0])
    for first in range(0, total, batch):
        part = [array[first : first + batch] for array in cut]
        missing = batch - len(part[0])
        if missing and first:  # one compiled shape serves the last batch as well
            part = [np.pad(array, ((0, missing), (0, 0))) for array in part]
        yield *part, (min(first + batch, total), total)


def total_nats(model, tokens, *, length, stride, batch, limit=None, progress=None):
    """Negative log-likelihood of a text.

    Args:
      model: a `Llama`, dense or with substituted layers.
      tokens: [N] token ids; the first one is given, not predicted.
      length, stride: the windowing; see `windows`.
      batch: windows per call of the model.
      limit: take at most this many windows, evenly spread over the text; None takes all.
      progress: called with (windows done, windows in all) after each batch.

    Returns:
      The sum in nats, and the number of predicted tokens.
    """
    graph, state = nnx.split(model)
    nats, predicted = 0.0, 0
    for inputs, *rest, done in _batches(model.config, tokens, length, stride, batch, limit):
        nats += float(_sum_nats(logits(graph, state, inputs), *rest))
        predicted += int(rest[-1].sum())
        if progress:
            progress(*done)
    return nats, predicted


@jax.jit
def _sum_agreement(logits, other, counts):
    p, q = (jax.nn.log_softmax(array) for array in (other, logits))
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    both = jnp.sum(jnp.exp(jnp.minimum(p, q)), axis=-1)
    apart = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return jnp.stack([jnp.sum(array, where=counts) for array in (same, both, apart)])


def agreement(model, other, tokens, *, length, stride, batch, limit=None):
    """How a model predicts a text, and how it agrees with another one there, in one pass.

    Where `model` drafts for `other`, a drafted token is accepted as often as the first two of the
    shares say. The other arguments are those of `total_nats`.

    Returns:
      The sum in nats and the number of predicted tokens, as `total_nats`; and a dict:
      "same_likeliest", the share of places where both have the same likeliest token; "overlap", the
      mean of sum_t min(p_t, q_t) over the vocabulary, p and q their distributions; "divergence",
      the mean of sum_t p_t log(p_t / q_t) in nats, p those of `other`.
    """
    parts = [nnx.split(each) for each in (model, other)]
    sums, nats, predicted = np.zeros(3), 0.0, 0
    for inputs, *rest, _ in _batches(model.config, tokens, length, stride, batch, limit):
        both = [logits(graph, state, inputs) for graph, state in parts]
        nats += float(_sum_nats(both[0], *rest))
        sums += np.asarray(_sum_agreement(*both, rest[-1]), np.float64)
        predicted += int(rest[-1].sum())
    names = ("same_likeliest", "overlap", "divergence")
    return nats, predicted, dict(zip(names, (sums / predicted).tolist()))


def bits_per_token(model, tokens, **options):
    """Mean bits per predicted token, bits per byte for a byte-level model; see `total_nats`."""
    nats, count = total_nats(model, tokens, **options)
    return nats / count / math.log(2)


def perplexity(model, tokens, **options):
    """exp of the mean nats per predicted token; see `total_nats`."""
    nats, count = total_nats(model, tokens, **options)
    return math.exp(nats / count)
