"""Attention of one token a sequence in a GPU kernel: rotation, the cache's update, softmax, mixing.

A block serves the query heads of one key-value head, at most four. Eight lanes of a warp share a
slot and each holds 16 elements of its key and value, so that a warp has four slots at a time, or a
multiple, each with a running softmax (Milakov and Gimelshein, arXiv 1805.02867). At the end these
meet by shuffles and in shared memory. Only live slots are read, so the work follows the live length
whatever the size of the cache; but the first step's loads do not wait to know it. The slots are
shared out among the blocks of a cluster, which read each other's partial results (flash-decoding).
The new token's key and value never pass through the cache: the warp that writes them there begins
its softmax with them.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama import attention
from examples.llama.cache import write
from examples.llama.rope import rotate
from macko_jax.gpu import device, staging
from macko_jax.lanes import mosaic as lanes
from macko_jax.lanes.vocabulary import sum_over_lanes
from macko_jax.ops import self_check

HEAD_DIM = 128
LANES = 8  # that share a slot
TOGETHER = lanes.WARP // LANES  # slots that a warp reads at once
CHUNK = 8  # consecutive elements in the 16 bytes of one load; a lane has two such chunks of a head
CHUNKS = HEAD_DIM // CHUNK
MOST_HEADS = 4  # query heads of a block: each takes 32 registers
WARPS = 4  # of a block; small blocks leave room for several on each multiprocessor
ENOUGH_BLOCKS = 256
MOST_SPLITS = 8  # blocks of a cluster, on every GPU that has clusters
BLANKS = staging.BLANK * 0x10001  # two of them
NEVER = -1e30  # score of a slot that is not visible; finite, so that differences are numbers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a call when it is compiled.

    Attributes:
      batch: sequences.
      heads, kv_heads: query and key-value heads.
      slots: of the cache.
      window: how many tokens back are visible, or None.
      dtype: of the rows and the cache.
      blanks: elements of the array `blank`.
    """

    batch: int
    heads: int
    kv_heads: int
    slots: int
    window: int | None
    dtype: object
    blanks: int = 0

    @property
    def group(self):
        """Query heads of a block."""
        shared = self.heads // self.kv_heads
        return next(size for size in range(MOST_HEADS, 0, -1) if shared % size == 0)

    @property
    def parts(self):
        """Blocks among which the query heads of a key-value head are shared out."""
        return self.heads // self.kv_heads // self.group

    @property
    def splits(self):
        """Blocks of a cluster, among which slots are shared out, a power of two.

        As many as it takes to have enough blocks, but every block has slots for all its lanes.
        One where the GPU has no clusters.
        """
        if not device.has_clusters():
            return 1
        wanted = min(MOST_SPLITS, ENOUGH_BLOCKS // self.head_groups)
        return 1 << max(1, min(wanted, self.slots // self.slots_at_once)).bit_length() - 1

    @property
    def head_groups(self):
        """Query heads of all sequences, in groups of a block."""
        return self.batch * self.kv_heads * self.parts

    @property
    def blocks(self):
        return self.head_groups * self.splits

    @property
    def unroll(self):
        """Rounds of slots that a warp loads at a time, while it works on as many before them."""
        return 2 if self.group == 1 else 1

    @property
    def slots_at_once(self):
        """Slots that the lanes of a block read in a step."""
        return WARPS * TOGETHER * self.unroll

    @property
    def slots_of_a_step(self):
        """Slots that all blocks of a cluster read in a step."""
        return self.slots_at_once * self.splits

    @property
    def width(self):
        """Float32 of a head's partial result: the mixture, its largest score and its weight."""
        return HEAD_DIM + 2

    @property
    def row(self):
        """Heads of a sequence's row: of queries, keys and values."""
        return self.heads + 2 * self.kv_heads

    @property
    def shared_slots(self):
        """Partial results of each warp, and of the block."""
        return (WARPS + 1) * self.group * self.width


def fits(cache):
    """Whether the kernel serves a layer's cache [B, K, S, 2, D] on the default device."""
    return (
        jax.default_backend() == "gpu"
        and device.why_no_kernels() is None
        and cache.shape[-1] == HEAD_DIM
        and cache.dtype in (jnp.float16, jnp.bfloat16)
        and cache.size // CHUNK < 2**31  # loads have 32-bit indices
        and self_check.failure(f"decode_attention, {cache.dtype}", lambda: trial(cache.dtype))
        is None
    )


def trial(dtype) -> self_check.Trial:
    """A step of two heads that share a key-value head, by the kernel and by XLA."""
    rng = np.random.default_rng(0)
    heads, slots, live = 2, 64, 33
    qkv, cache = (
        rng.standard_normal(shape).astype(dtype)
        for shape in ((1, 1, heads + 2, HEAD_DIM), (1, 1, slots, 2, HEAD_DIM))
    )
    positions = np.full((1, 1), live, np.int32)
    angles = np.linspace(0, 3, HEAD_DIM // 2, dtype=np.float32).reshape(1, 1, 1, -1)
    rotary = np.cos(angles), np.sin(angles)

    def by_kernel(*arguments):
        return attend(*arguments, heads=heads, window=None)[:2]

    @jax.jit
    def by_xla(qkv, rotary, cache, positions):
        query, key, value = jnp.split(qkv, [heads, heads + 1], axis=2)
        query, key = rotate(query, rotary), rotate(key, rotary)
        cache = write(cache, jnp.stack([key, value], axis=3).swapaxes(1, 2), positions)
        return attention.attend(query, cache, positions, None).reshape(1, -1), cache

    operands = qkv.reshape(1, -1), rotary, cache, positions[:, 0]
    return self_check.Trial(by_kernel, operands, by_xla(qkv, rotary, cache, positions), 8)


def attend(rows, rotation, cache, positions, *, heads, window, blanks=0):
    """Attention of one token a sequence to the live slots of a cache and to itself.

    Args:
      rows: [B, (H + 2 K) * D], a token's query, key and value heads, not yet rotated.
      rotation: (cos, sin) of the tokens' angles, each of B * D / 2 elements, float32.
      cache: [B, K, S, 2, D]: keys and values of the tokens before.
      positions: [B] int32, the tokens' positions; the slots before them are live. A token past
        the last slot attends to all of them, and is not kept.
      heads, window: H, and how many tokens back are visible, itself included (None: all).
      blanks: how many, in whole eights, the chain of products after it needs.

    Returns:
      [B, H * D] in the dtype of the rows; the cache with the tokens' keys and values; and [blanks]
      uint16, see `macko_jax.experimental.fused_chain`.
    """
    batch, kv_heads, slots = cache.shape[:3]
    plan = Plan(batch, heads, kv_heads, slots, window, cache.dtype, blanks)
    (mixed, blank), [changed] = lanes.run(
        "decode_attention",
        lambda ops: program(ops, plan),
        ("rows", "cos", "sin", "position", "cache", "out", "blank"),
        [operand.reshape(-1) for operand in (rows, *rotation, positions)],
        [
            jax.ShapeDtypeStruct((batch * heads * HEAD_DIM,), rows.dtype),
            jax.ShapeDtypeStruct((max(blanks, CHUNK),), jnp.uint16),
        ],
        blocks=plan.blocks,
        warps=WARPS,
        shared_slots=plan.shared_slots,
        cluster=plan.splits,
        changed=[cache.reshape(-1)],
    )
    return mixed.reshape(batch, -1), changed.reshape(cache.shape), blank[:blanks]


def program(ops, plan: Plan):
    """The lane program on rows, cos, sin, position, cache and out, all flat."""
    at = _place(ops, plan)
    live, start, loaded = _begin(ops, plan, at)
    last = (at.split == plan.splits - 1) & (at.warp == WARPS - 1)  # which has the fewest slots
    own = at.sequence * plan.row + plan.heads + (at.kv_head - at.sequence * plan.kv_heads)
    own_words = [_load_head(ops, "rows", row, at.chunk, last) for row in (own, own + plan.kv_heads)]
    turn = _angles(ops, at.sequence, at.chunk)
    first_query = at.heads * plan.group + at.sequence * (plan.row - plan.heads)
    scale = math.log2(math.e) / math.sqrt(HEAD_DIM)  # for scores in powers of two
    queries = [
        [element * scale for element in _rotated_head(ops, plan, first_query + j, at.chunk, turn)]
        for j in range(plan.group)
    ]
    empty = (ops.real(NEVER), ops.real(0), [ops.real(0)] * (2 * CHUNK))
    softmaxes = ops.branch(
        last,
        lambda: _with_own_token(ops, plan, at, live, own_words, turn, queries, empty),
        [empty for _ in queries],
    )
    # What was read beyond the live slots may be anything; the next is being written.
    loaded = [
        ops.select(live.sees(slot), words, [[ops.integer(0)] * CHUNK] * 2)
        for slot, words in zip(_slots(plan, at, start), loaded)
    ]
    *_, softmaxes = ops.loop(
        lambda state: state[0] < live.end,
        lambda state: _step(ops, plan, at, live, queries, *state),
        (start, loaded, softmaxes),
    )
    _clear(ops, plan, at.block * (WARPS * lanes.WARP) + at.thread)
    for j, softmax in enumerate(softmaxes):
        _share(ops, plan, at, j, _join_places(ops, softmax))
    ops.barrier()
    _join_warps(ops, plan, at.thread, at.block)
    if plan.splits > 1:
        _join_blocks(ops, plan, at.thread, at.heads, at.split)


class _Place(NamedTuple):
    """Where a thread works.

    Attributes:
      thread, block: of the launch.
      lane, warp: of the thread in its block.
      chunk: which of a slot's chunks the lane reads.
      slot: which of the slots that the warp reads at once is the lane's.
      heads: which group of query heads of all sequences is the block's.
      split: which share of the slots is the block's.
      kv_head: the key-value head of all sequences that these query heads share.
      sequence: the sequence of the batch.
    """

    thread: object
    block: object
    lane: object
    warp: object
    chunk: object
    slot: object
    heads: object
    split: object
    kv_head: object
    sequence: object


def _place(ops, plan):
    """Blocks come in the order of sequences, key-value heads, their parts and shares of slots."""
    thread, block = ops.thread(), ops.block()
    lane, warp = thread & (lanes.WARP - 1), thread >> 5
    chunk, slot = lane & (LANES - 1), lane >> 3
    heads, split = block >> (plan.splits.bit_length() - 1), block & (plan.splits - 1)
    kv_head = heads // plan.parts
    sequence = heads // (plan.parts * plan.kv_heads)
    return _Place(thread, block, lane, warp, chunk, slot, heads, split, kv_head, sequence)


class _Live(NamedTuple):
    """The slots that a token sees: from `oldest` to before `end`; and if one is left for itself."""

    oldest: object
    end: object
    has_slot: object

    def sees(self, slot):
        return (slot >= self.oldest) & (slot < self.end)


def _begin(ops, plan, at):
    """The live slots, the slot at which a warp's first step begins, and what that step reads."""
    start = (at.split * WARPS + at.warp) * (TOGETHER * plan.unroll)
    if plan.window is None:  # the first loads do not wait for the position
        loaded = _load(ops, plan, at, start, lambda slot: slot < plan.slots)
    end = ops.load_integer("position", at.sequence)  # slots before the token's own
    has_slot = end < plan.slots
    end = ops.select(has_slot, end, ops.integer(plan.slots))
    oldest = ops.integer(0)
    if plan.window is None:
        return _Live(oldest, end, has_slot), start, loaded
    oldest = ops.select(end >= plan.window - 1, end - (plan.window - 1), oldest)
    # Whole steps before the first visible slot are left out.
    start = start + (oldest & (2**32 - plan.slots_of_a_step))
    live = _Live(oldest, end, has_slot)
    return live, start, _load(ops, plan, at, start, live.sees)


def _slots(plan, at, first):
    """The slots that a lane reads in the step that begins at slot `first` for its warp."""
    return [first + (i * TOGETHER) + at.slot for i in range(plan.unroll)]


def _load(ops, plan, at, first, inside):
    """A lane's parts of the keys and values of a step's slots, as words."""
    return [
        [
            _load_head(
                ops, "cache", (at.kv_head * plan.slots + slot) * 2 + i, at.chunk, inside(slot)
            )
            for i in (0, 1)
        ]
        for slot in _slots(plan, at, first)
    ]


def _step(ops, plan, at, live, queries, first, loaded, softmaxes):
    """One step of the walk: loads the following slots, and adds those loaded to the softmaxes."""
    following = _load(ops, plan, at, first + plan.slots_of_a_step, live.sees)
    wheres = [live.sees(slot) for slot in _slots(plan, at, first)]
    keys = [_numbers(ops, plan, key) for key, _ in loaded]
    values = [_numbers(ops, plan, value) for _, value in loaded]
    updated = []
    for query, (largest, weight, mixed) in zip(queries, softmaxes):
        scores = [
            ops.select(where, _score(ops, query, key), ops.real(NEVER))
            for where, key in zip(wheres, keys)
        ]
        new = _maximum(ops, [largest, *scores])
        kept = ops.exp2(largest - new)
        weight, mixed = weight * kept, [m * kept for m in mixed]
        for score, value in zip(scores, values):
            share = ops.exp2(score - new)
            weight = weight + share
            mixed = [ops.fma(share, v, m) for v, m in zip(value, mixed)]
        updated.append((new, weight, mixed))
    return first + plan.slots_of_a_step, following, updated


def _with_own_token(ops, plan, at, live, own_words, turn, queries, empty):
    """The softmaxes of a warp that has seen the new token, once it is in the cache."""
    own_key, own_value = own_words
    key = _rotate(_numbers(ops, plan, own_key), turn)
    key = [ops.pack(a, b, plan.dtype) for a, b in zip(key[::2], key[1::2])]
    first_part = at.heads == at.kv_head * plan.parts
    for i, words in enumerate((key, own_value)):
        row = (at.kv_head * plan.slots + live.end) * 2 + i
        where = first_part & live.has_slot & (at.slot == 0)
        _store_head(ops, "cache", row, at.chunk, words, where)
    key, value = _numbers(ops, plan, key), _numbers(ops, plan, own_value)
    return [
        ops.select(at.slot == 0, (_score(ops, query, key), ops.real(1), value), empty)
        for query in queries
    ]


def _share(ops, plan, at, j, softmax):
    """Puts a warp's softmax of the block's query head `j` into shared memory."""
    largest, weight, mixed = softmax
    base = (at.warp * plan.group + j) * plan.width
    for i, m in enumerate(mixed):
        element = (i // CHUNK) * (HEAD_DIM // 2) + i % CHUNK
        ops.store_shared(base + at.chunk * CHUNK + element, m, at.slot == 0)
    ops.store_shared(base + HEAD_DIM, largest, at.lane == 0)
    ops.store_shared(base + (HEAD_DIM + 1), weight, at.lane == 0)


def _clear(ops, plan, thread):
    """Fills the array `blank`; `thread` is counted over all blocks."""

    def store(piece):
        ops.store_words("blank", piece, [ops.integer(BLANKS)] * 4, piece < plan.blanks // CHUNK)
        return piece + plan.blocks * WARPS * lanes.WARP

    ops.loop(lambda piece: piece < plan.blanks // CHUNK, store, thread)


def _join_places(ops, softmax):
    """Adds up the softmaxes of a warp's four slots; every lane has the result of its elements."""
    distance = LANES
    while distance < lanes.WARP:
        largest, weight, mixed = softmax
        new = ops.maximum(largest, ops.exchange(largest, distance))
        kept = ops.exp2(largest - new)
        scaled = [value * kept for value in (weight, *mixed)]
        weight, *mixed = [value + ops.exchange(value, distance) for value in scaled]
        softmax = new, weight, mixed
        distance *= 2
    return softmax


def _join_warps(ops, plan, thread, block):
    """Adds up the warps' softmaxes; a thread does one element of one head at a time."""
    elements, threads = plan.group * HEAD_DIM, WARPS * lanes.WARP
    for first in range(0, elements, threads):
        element = thread + first
        inside = element < elements
        element = ops.select(inside, element, ops.integer(0))
        j, d = element >> 7, element & (HEAD_DIM - 1)

        largest, weight, mixed = _join(
            ops,
            [
                [
                    ops.load_shared(((j + warp * plan.group) * plan.width + offset) * 4, 1)[0]
                    for offset in (HEAD_DIM, HEAD_DIM + 1, d)
                ]
                for warp in range(WARPS)
            ],
        )
        if plan.splits == 1:
            out = block * elements + element
            ops.store_real("out", out, mixed * ops.reciprocal(weight), inside)
            continue
        base = (j + WARPS * plan.group) * plan.width
        ops.store_shared(base + d, mixed, inside)
        ops.store_shared(base + HEAD_DIM, largest, inside & (d == 0))
        ops.store_shared(base + (HEAD_DIM + 1), weight, inside & (d == 0))


def _join_blocks(ops, plan, thread, heads, split):
    """Adds up the softmaxes of a cluster's blocks; each block does its share of the elements."""
    share = plan.group * HEAD_DIM // plan.splits
    inside = thread < share
    element = ops.select(inside, thread, ops.integer(0)) + split * share
    j, d = element >> 7, element & (HEAD_DIM - 1)
    base = (j + WARPS * plan.group) * plan.width
    ops.cluster_barrier()
    _, weight, mixed = _join(
        ops,
        [
            [ops.load_peer((base + offset) * 4, peer) for offset in (HEAD_DIM, HEAD_DIM + 1, d)]
            for peer in range(plan.splits)
        ],
    )
    out = heads * (plan.group * HEAD_DIM) + element
    ops.store_real("out", out, mixed * ops.reciprocal(weight), inside)
    ops.cluster_barrier()  # whose shared memory is being read must not end


def _join(ops, softmaxes):
    """The softmax (largest score, weight, one element of the mixture) of several."""
    new = _maximum(ops, [largest for largest, _, _ in softmaxes])
    weight, mixed = ops.real(0), ops.real(0)
    for largest, its_weight, its_mixed in softmaxes:
        kept = ops.exp2(largest - new)
        weight = ops.fma(kept, its_weight, weight)
        mixed = ops.fma(kept, its_mixed, mixed)
    return new, weight, mixed


def _load_head(ops, name, row, chunk, where):
    """A lane's two chunks of a row of `HEAD_DIM` elements, half a head apart, as words."""
    return [
        word
        for half in (0, CHUNKS // 2)
        for word in ops.load_words(name, row * CHUNKS + (chunk + half), CHUNK // 2, where)
    ]


def _store_head(ops, name, row, chunk, words, where):
    """The opposite of `_load_head`."""
    for half, some in (0, words[: CHUNK // 2]), (CHUNKS // 2, words[CHUNK // 2 :]):
        ops.store_words(name, row * CHUNKS + (chunk + half), some, where)


def _numbers(ops, plan, words):
    return [number for word in words for number in ops.pair(word, plan.dtype)]


def _angles(ops, sequence, chunk):
    """cos and sin of the angles by which a lane's elements turn, `CHUNK` each."""
    everywhere = chunk < LANES
    return [
        [
            ops.as_real(word)
            for i in (0, 1)
            for word in ops.load_words(
                name, sequence * CHUNKS + (chunk * 2 + i), CHUNK // 2, everywhere
            )
        ]
        for name in ("cos", "sin")
    ]


def _rotated_head(ops, plan, head, chunk, turn):
    """A lane's elements of a head of the rows, rotated."""
    words = _load_head(ops, "rows", head, chunk, chunk < LANES)
    return _rotate(_numbers(ops, plan, words), turn)


def _rotate(elements, turn):
    """A lane's elements of a head, rotated."""
    first, second = elements[:CHUNK], elements[CHUNK:]  # those that turn together
    rotated = [a * c - b * s for a, b, c, s in zip(first, second, *turn)]
    return rotated + [b * c + a * s for a, b, c, s in zip(first, second, *turn)]


def _score(ops, query, key):
    """The product of two heads, of which each of `LANES` lanes has its elements."""
    [score] = sum_over_lanes(ops, [_dot(ops, query, key)], LANES)
    return score


def _dot(ops, a, b):
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:]):
        total = ops.fma(x, y, total)
    return total


def _maximum(ops, values):
    largest = values[0]
    for value in values[1:]:
        largest = ops.maximum(largest, value)
    return largest
