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
    model.config.check_tokens(tokens)
    graph, state = nnx.split(model)
    cut = windows(tokens, length, stride)
    if limit is not None and limit < len(cut[0]):
        chosen = np.linspace(0, len(cut[0]) - 1, limit).round().astype(int)
        cut = [array[chosen] for array in cut]
    inputs, targets, counts = cut
    total = 0.0
    for first in range(0, len(inputs), batch):
        part = [array[first : first + batch] for array in (inputs, targets, counts)]
        missing = batch - len(part[0])
        if missing and first:  # one compiled shape serves the last batch as well
            part = [np.pad(array, ((0, missing), (0, 0))) for array in part]
        total += float(_sum_nats(logits(graph, state, part[0]), *part[1:]))
        if progress:
            progress(min(first + batch, len(inputs)), len(inputs))
    return total, int(counts.sum())


def bits_per_token(model, tokens, **options):
    """Mean bits per predicted token, bits per byte for a byte-level model; see `total_nats`."""
    nats, count = total_nats(model, tokens, **options)
    return nats / count / math.log(2)


def perplexity(model, tokens, **options):
    """exp of the mean nats per predicted token; see `total_nats`."""
    nats, count = total_nats(model, tokens, **options)
    return math.exp(nats / count)
