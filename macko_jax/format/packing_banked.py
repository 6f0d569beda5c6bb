"""Packing in the encoding "banked": on the host with NumPy, on a device place by place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from macko_jax.format import layout, packing_numpy
from macko_jax.format.banked import (
    BITS,
    LANES,
    MAX_DELTA,
    count_dtype,
    lane_major,
    most_groups,
    places,
    step_positions,
)
from macko_jax.format.layout import GROUP, join_deltas, join_parts


class Elements:
    """The stored elements of a matrix, lane by lane; every pass over them is made once.

    Attributes:
      counts: [rows, 32] groups of each lane.
    """

    def __init__(self, weight: np.ndarray):
        rows, cols = weight.shape
        width = places(cols)
        by_lane = np.zeros((rows, width * LANES), weight.dtype)
        by_lane[:, :cols] = weight
        by_lane = by_lane.reshape(rows, width, LANES).swapaxes(1, 2).reshape(rows * LANES, width)
        self.weight = by_lane
        self.elements = packing_numpy.Elements(np.ascontiguousarray(by_lane))
        self.counts = (-(-self.elements.padded_count(BITS) // GROUP)).reshape(rows, LANES)

    def fill(self, capacity: int):
        """values, codes, row_offsets and starts, with room for `capacity` groups."""
        cols = self.weight.shape[1] * LANES
        offsets = np.concatenate([[0], np.cumsum(self.counts.sum(axis=1))])
        begin = np.cumsum(self.counts) - self.counts.reshape(-1)
        values, delta = packing_numpy.fill_deltas(
            self.weight, self.elements, GROUP * begin, GROUP * capacity, BITS
        )
        words = packing_numpy.join_deltas(delta.reshape(-1, GROUP), BITS)

        order = np.arange(capacity)
        order[: offsets[-1]] = lane_major(self.counts)
        return (
            values.reshape(-1, GROUP)[order].reshape(-1),
            join_parts((words[order],), "banked"),
            offsets.astype(np.int32),
            self.counts.astype(count_dtype(cols)),
        )


@jax.jit
def find(weight: jax.Array):
    """What is stored, place by place: (stored, delta) [places, rows, 32], and group counts."""
    rows, cols = weight.shape
    width = places(cols)
    present = jnp.pad(~layout.is_zero(weight), ((0, 0), (0, width * LANES - cols)))
    present = present.reshape(rows, width, LANES).swapaxes(0, 1)
    more = lax.cummax(present.astype(jnp.int8), axis=0, reverse=True) > 0

    def visit(skipped, place):
        present, more = place
        stored = present | (more & (skipped == MAX_DELTA))
        return jnp.where(stored, 0, skipped + 1).astype(jnp.uint8), (stored, skipped)

    _, (stored, delta) = lax.scan(visit, jnp.zeros((rows, LANES), jnp.uint8), (present, more))
    counts = -(-jnp.sum(stored, axis=0, dtype=jnp.int32) // GROUP)
    return stored, delta, counts


@functools.partial(jax.jit, static_argnames="groups")
def fill(weight: jax.Array, stored, delta, counts, *, groups: int):
    """values, codes, row_offsets and starts, with room for `groups` groups."""
    rows, cols = weight.shape
    width = stored.shape[0]
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts.sum(axis=1))])
    at = step_positions(counts, offsets, most_groups(cols), groups)  # [rows, steps, 32]
    rank = jnp.cumsum(stored, axis=0, dtype=jnp.int32) - stored
    row, lane = jnp.arange(rows)[:, None], jnp.arange(LANES)
    slot = GROUP * at[row, rank // GROUP, lane] + rank % GROUP
    slot = jnp.where(stored, slot, GROUP * groups)

    # As integers, since a device may flush subnormals; an explicit zero may stand for -0.0.
    bits = lax.bitcast_convert_type(weight, f"uint{8 * weight.dtype.itemsize}")
    bits = jnp.where(bits << 1 == 0, 0, bits)
    bits = jnp.pad(bits, ((0, 0), (0, width * LANES - cols)))
    bits = bits.reshape(rows, width, LANES).swapaxes(0, 1)

    def scatter(updates, dtype):
        empty = jnp.zeros(GROUP * groups, dtype)
        return empty.at[slot].set(updates.astype(dtype), mode="drop", unique_indices=True)

    values = lax.bitcast_convert_type(scatter(bits, bits.dtype), weight.dtype)
    words = join_deltas(scatter(delta, jnp.uint32).reshape(groups, GROUP), BITS)
    return values, join_parts((words,), "banked"), offsets, counts.astype(count_dtype(cols))
