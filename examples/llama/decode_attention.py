"""Attention of one token over its cache, in one GPU kernel: rotation, scores, softmax and mixing.

A block serves one key-value head. Its warps take slots in turn, a row of the head's keys and values
spread over the lanes, and hold a running softmax (Milakov and Gimelshein, arXiv 1805.02867) for
each query head of the group; at the end they meet in shared memory. Only live slots are read, so
the work follows the live length whatever the size of the cache. Long caches are shared out among
several blocks, whose partial results are joined by XLA (flash-decoding).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from macko_jax.kernels import lanes

HEAD_DIM = 128
PER_LANE = HEAD_DIM // lanes.WARP  # elements of a head that a lane holds
WARPS = 16
UNROLL = 4  # slots that a warp has in flight
SLOTS_PER_BLOCK = 1024  # cache slots for which one block is enough
NEVER = -1e30  # score of a slot that is not visible; finite, so that differences are numbers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a call when it is compiled.

    Attributes:
      heads, kv_heads: query and key-value heads.
      slots: of the cache.
      window: how many tokens back are visible, or None.
      dtype: of the query row and the cache.
    """

    heads: int
    kv_heads: int
    slots: int
    window: int | None
    dtype: object

    @property
    def group(self):
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @property
    def splits(self):
        """Blocks of a key-value head, a power of two."""
        return 1 << max(0, math.ceil(math.log2(self.slots / SLOTS_PER_BLOCK)))

    @property
    def width(self):
        """Float32 of a head's partial result: the mixture, its largest score and its weight."""
        return HEAD_DIM + 2

    @property
    def shared_slots(self):
        return WARPS * self.group * self.width


def fits(query_row, cache):
    """Whether the kernel serves a row [1, ...] and a cache [1, K, S, 2, D] on the default device."""
    return (
        jax.default_backend() == "gpu"
        and cache.shape[0] == 1
        and cache.shape[-1] == HEAD_DIM
        and query_row.dtype == cache.dtype
        and cache.dtype in (jnp.float16, jnp.bfloat16)
    )


def attend(query_row, rotation, cache, position, *, heads, window):
    """Attention of the query heads of one token over the live slots of a cache.

    Args:
      query_row: [1, n], which begins with the H query heads of D elements, not yet rotated.
      rotation: (cos, sin) of the token's angles, each of D / 2 elements, float32.
      cache: [1, K, S, 2, D]: keys and values, the token's own among them.
      position: [1] int32, the token's position; slots up to it are live.
      heads, window: H, and how many tokens back are visible (None: all).

    Returns:
      [1, H * D] in the dtype of the query row.
    """
    plan = Plan(heads, cache.shape[1], cache.shape[2], window, cache.dtype)
    cos, sin = (a.reshape(HEAD_DIM // 2) for a in rotation)
    alone = plan.splits == 1
    shape = (heads * HEAD_DIM,) if alone else (plan.kv_heads * plan.splits * plan.group * plan.width,)
    out = lanes.run(
        lambda ops: program(ops, plan), ("query", "cos", "sin", "cache", "position", "out"),
        (query_row.reshape(-1), cos, sin, cache.reshape(-1), position),
        jax.ShapeDtypeStruct(shape, query_row.dtype if alone else jnp.float32),
        blocks=plan.kv_heads * plan.splits, warps=WARPS, shared_slots=plan.shared_slots,
    )  # fmt: skip
    return (out if alone else join(out, plan).astype(query_row.dtype)).reshape(1, -1)


def join(partial, plan):
    """Of the blocks' partial results, the mixture of all slots: [H * D] float32."""
    partial = partial.reshape(plan.kv_heads, plan.splits, plan.group, plan.width)
    mixed, largest, weight = jnp.split(partial, [HEAD_DIM, HEAD_DIM + 1], axis=-1)
    share = jnp.exp2(largest - largest.max(axis=1, keepdims=True))
    return ((share * mixed).sum(1) / (share * weight).sum(1)).reshape(-1)


def program(ops, plan: Plan):
    """The lane program on query, cos, sin, cache, position and out, all flat."""
    thread, block = ops.thread(), ops.block()
    lane, warp = thread & (lanes.WARP - 1), thread >> 5
    shift = plan.splits.bit_length() - 1
    head, split = block >> shift, block & (plan.splits - 1)
    live = ops.load_integer("position", ops.integer(0)) + 1
    oldest = ops.integer(0)
    if plan.window is not None:
        oldest = ops.select(live >= plan.window, live - plan.window, oldest)
    queries = [_rotated_query(ops, plan, head * plan.group + j, lane) for j in range(plan.group)]

    def read(slot):
        """A lane's part of the keys and values of a slot, as words."""
        row = (head * plan.slots + slot) * 2
        where = (slot >= oldest) & (slot < live)
        return where, [
            ops.load_words("cache", (row + i) * lanes.WARP + lane, PER_LANE // 2, where)
            for i in (0, 1)
        ]

    def numbers(words):
        return [number for word in words for number in ops.pair(word, plan.dtype)]

    stride = plan.splits * WARPS  # warps of all blocks of a head

    def step(state):
        first, softmaxes = state
        rows = [read(first + i * stride) for i in range(UNROLL)]
        keys = [numbers(key) for _, (key, _) in rows]
        values = [numbers(value) for _, (_, value) in rows]
        updated = []
        for query, (largest, weight, mixed) in zip(queries, softmaxes):
            scores = [
                ops.select(where, _warp_sum(ops, _dot(ops, query, key)), ops.real(NEVER))
                for (where, _), key in zip(rows, keys)
            ]
            new = largest
            for score in scores:
                new = ops.maximum(new, score)
            kept = ops.exp2(largest - new)
            weight, mixed = weight * kept, [m * kept for m in mixed]
            for score, value in zip(scores, values):
                share = ops.exp2(score - new)
                weight = weight + share
                mixed = [ops.fma(share, v, m) for v, m in zip(value, mixed)]
            updated.append((new, weight, mixed))
        return first + UNROLL * stride, updated

    empty = [(ops.real(NEVER), ops.real(0), [ops.real(0)] * PER_LANE) for _ in queries]
    start = split * WARPS + warp
    if plan.window is not None:  # the first slot of this warp's that is visible, or little before
        start = start + (oldest & (0xFFFFFFFF - (stride - 1)))
    _, softmaxes = ops.loop(lambda state: state[0] < live, step, (start, empty))

    for j, (largest, weight, mixed) in enumerate(softmaxes):
        base = (warp * plan.group + j) * plan.width
        for i, m in enumerate(mixed):
            ops.store_shared(base + lane * PER_LANE + i, m, lane < lanes.WARP)
        ops.store_shared(base + HEAD_DIM, largest, lane == 0)
        ops.store_shared(base + HEAD_DIM + 1, weight, lane == 0)
    ops.barrier()
    _join_warps(ops, plan, thread, block)


def _join_warps(ops, plan, thread, block):
    """Adds up the warps' softmaxes; a thread does one element of one head at a time."""
    threads = WARPS * lanes.WARP
    for first in range(0, plan.group * HEAD_DIM, threads):
        element = thread + first
        inside = element < plan.group * HEAD_DIM
        element = ops.select(inside, element, ops.integer(0))
        j, d = element >> 7, element & (HEAD_DIM - 1)

        def at(warp, offset):
            return ops.load_shared(((j + warp * plan.group) * plan.width + offset) * 4, 1)[0]

        scores = [at(warp, ops.integer(HEAD_DIM)) for warp in range(WARPS)]
        largest = scores[0]
        for score in scores[1:]:
            largest = ops.maximum(largest, score)
        weight, mixed = ops.real(0), ops.real(0)
        for warp, score in enumerate(scores):
            share = ops.exp2(score - largest)
            weight = ops.fma(share, at(warp, ops.integer(HEAD_DIM + 1)), weight)
            mixed = ops.fma(share, at(warp, d), mixed)
        if plan.splits == 1:
            place = block * plan.group * HEAD_DIM + element
            ops.store_real("out", place, mixed * ops.reciprocal(weight), inside)
            continue
        base = (block * plan.group + j) * plan.width
        ops.store_real("out", base + d, mixed, inside)
        ops.store_real("out", base + HEAD_DIM, largest, inside & (d == 0))
        ops.store_real("out", base + HEAD_DIM + 1, weight, inside & (d == 0))


def _rotated_query(ops, plan, head, lane):
    """A lane's elements of a rotated query head, scaled for scores in powers of two."""
    words = ops.load_words("query", head * lanes.WARP + lane, PER_LANE // 2, lane < lanes.WARP)
    query = [number for word in words for number in ops.pair(word, plan.dtype)]
    # Elements d and d + D / 2 turn by one angle; their lanes are half a warp apart.
    half = lanes.WARP // 2
    later = lane >= half
    everywhere = lane < lanes.WARP
    rotated = []
    for i, mine in enumerate(query):
        angle = (lane & (half - 1)) * PER_LANE + i
        cos, sin = (ops.load_real(name, angle, everywhere) for name in ("cos", "sin"))
        sin = ops.select(later, sin, ops.real(0) - sin)
        turned = ops.fma(ops.exchange(mine, half), sin, mine * cos)
        rotated.append(turned * (math.log2(math.e) / math.sqrt(HEAD_DIM)))
    return rotated


def _dot(ops, a, b):
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:]):
        total = ops.fma(x, y, total)
    return total


def _warp_sum(ops, value):
    distance = lanes.WARP // 2
    while distance:
        value = value + ops.exchange(value, distance)
        distance //= 2
    return value
