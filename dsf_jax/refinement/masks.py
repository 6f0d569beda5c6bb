"""Masks that are re-chosen while a model is trained, with the number of non-zeros of each matrix.

RigL (Evci et al., arXiv 1911.11134): every so often a share of a matrix's weights, the smallest,
is dropped, and as many entries are let in where the loss falls fastest with them, where the
gradient by the dense matrix is largest. They begin at zero. The share decays by a cosine,

    share(t) = SHARE / 2 (1 + cos(pi t / T)),    T = LAST_CHANGE of all steps,

and from T on masks stay, so that what was let in last is trained as well.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsf_jax.solvers.masks import top_k_mask
from dsf_jax.trace.dataflow import Layer

SHARE = 0.3  # of the weights of a matrix that the first change replaces
LAST_CHANGE = 0.75  # of all steps
CHANGES = 20  # in all, and at least EVERY steps apart
EVERY = 5


def find_pattern(mask: np.ndarray) -> str | None:
    """The N:M pattern of a mask `[rows, cols]`, such as "2:4"; None where there is none."""
    for m in (4, 8, 16):
        if mask.shape[1] % m == 0:
            counts = mask.reshape(-1, m).sum(axis=1)
            if len(counts) > 1 and 0 < counts[0] < m and (counts == counts[0]).all():
                return f"{counts[0]}:{m}"
    return None


def can_change(leaf: jax.Array, layers: Sequence[Layer]) -> list[Layer]:
    """The layers of a leaf whose masks may be re-chosen: those without an N:M pattern."""
    return [
        layer
        for layer in layers
        if find_pattern(np.asarray(layer.read(leaf) != 0).reshape(-1, layer.cols)) is None
    ]


def is_time(step: jax.Array, steps: jax.Array) -> jax.Array:
    """Whether masks are re-chosen after a step of so many."""
    last = (LAST_CHANGE * steps).astype(jnp.int32)
    every = jnp.maximum(EVERY, last // CHANGES)
    return (step > 0) & (step % every == 0) & (step <= last)


def share_at(step: jax.Array, steps: jax.Array) -> jax.Array:
    """The share of a matrix's weights that is replaced at a step."""
    progress = jnp.clip(step / (LAST_CHANGE * steps), 0, 1)
    return SHARE / 2 * (1 + jnp.cos(math.pi * progress))


def rechoose(
    parameter: jax.Array,
    gradient: jax.Array,
    mask: jax.Array,
    layers: Sequence[Layer],
    share: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A parameter and its mask once a share of the weights of each matrix has moved.

    Args:
      parameter: A leaf of the model, zero outside its mask.
      gradient: By the dense leaf.
      mask: Bool of the leaf's shape.
      layers: The matrices in it whose masks are re-chosen.
      share: Of their weights.
    """
    for layer in layers:
        kept, size, slope = (
            jnp.asarray(layer.read(x)).reshape(-1) for x in (mask, parameter, gradient)
        )
        count = jnp.sum(kept, dtype=jnp.int32)
        moved = jnp.minimum((share * count).astype(jnp.int32), kept.size - count)
        # Scores are at least 1 among those that are in question, and 0 elsewhere.
        stay = top_k_mask(jnp.where(kept, 1 + _ranked(size), 0), count - moved)
        come = top_k_mask(jnp.where(kept, 0, 1 + _ranked(slope)), moved)
        shape = (layer.groups, layer.rows, layer.cols)
        mask = _written(layer, mask, (stay | come).reshape(shape))
    return jnp.where(mask, parameter, 0), mask


def _ranked(x: jax.Array) -> jax.Array:
    """|x| over its largest, which leaves the order of entries as it is."""
    size = jnp.abs(x)
    return size / jnp.maximum(jnp.max(size), jnp.finfo(jnp.float32).tiny)


def _written(layer: Layer, mask: jax.Array, matrices: jax.Array) -> jax.Array:
    return layer.write(mask.astype(jnp.float32), matrices.astype(jnp.float32)) > 0


def forget(optimizer: Any, state: Any, masks: Any) -> Any:
    """An optimizer's state without what it knew of entries that are outside the masks."""
    return optax.tree.map_params(
        optimizer, lambda moment, mask: jnp.where(mask, moment, 0), state, masks
    )
