"""Speculative decoding: a small model drafts tokens, and the model itself verifies them at once.

A packed model is a good draft of the dense one that it was made from: it shares the vocabulary and
most of its mind, and reads a fraction of the bytes. In a cycle the draft continues the text by K
tokens, one after the other. The model then reads them all in one pass over its weights, which costs
little more than one token does, and keeps the first ones as long as they are what it would have
said itself, and a token of its own after them. So a cycle gives between 1 and K + 1 tokens, and the
text is exactly the model's: the same tokens where the likeliest is taken, and the same distribution
where tokens are drawn (arXiv 2211.17192, 2302.01318).

All of it runs on the device; the host is visited once for every `CYCLES` cycles. Caches are not
copied when tokens are refused: slots beyond a sequence's length are never visible, and are written
over.

Shapes: B sequences, K drafted tokens, V entries of the vocabulary.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llama import generation
from examples.llama.cache import Cache, round_up, widen
from examples.llama.model import logits, through
from examples.llama.split import SplitModel

CYCLES = 8  # of a call
MOST_DRAFT_TOKENS = 8  # that `choose_draft_tokens` considers
TRIALS = (1, 1, 4, 4)  # drafted tokens of the calls that measure; the first of each compiles


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "caches", "draft_caches", "left", "key", "cycles"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Speculation:
    """Where a generation with a draft stands.

    Attributes:
      tokens: [B, 2] int32, the last two tokens of each text. The second is in no cache yet; the
        draft's may lack the first.
      lengths: [B] int32, tokens before the second of `tokens`.
      caches, draft_caches: keys and values of the layers, [B, kv heads, slots, 2, head dimension].
      left: [B] int32, how many tokens are still wanted; a sequence that has all of them rests.
      key: the random key of all draws.
      cycles: int32, how many there have been.
    """

    tokens: jax.Array
    lengths: jax.Array
    caches: tuple
    draft_caches: tuple
    left: jax.Array
    key: jax.Array
    cycles: jax.Array


@functools.partial(jax.jit, static_argnames=("cycles", "count", "sampling"), donate_argnames="now")
def advance(split, draft, now, *, cycles, count, sampling, forced=None):
    """Some cycles of drafting and verifying.

    Args:
      split, draft: both models, taken apart.
      now: where to go on, with slots for all tokens that are left and `count` more; it is consumed.
      cycles, count: how many cycles, and tokens drafted in each.
      sampling: how tokens are drawn.
      forced: the share of drafted tokens to accept, whatever they are: for measurements with random
        weights. None accepts what is right.

    Returns:
      The `Speculation` after them; for each cycle the new tokens [cycles, B, count + 1], how many
      of them count [cycles, B], and how many drafted ones were accepted [cycles, B], -1 where a
      sequence rests.
    """

    def cycle(now, _):
        keys = jax.random.split(jax.random.fold_in(now.key, now.cycles), count + 2)
        drafted, chances, draft_caches = _draft(draft, now, keys[:count], sampling)
        read = jnp.concatenate([now.tokens[:, 1:], drafted], axis=1)
        wanted, caches = run(split, read, Cache(now.caches, now.lengths))
        accepted, own = _judge(wanted, drafted, chances, keys[count:], sampling, forced)
        place = jnp.arange(count + 1)
        given = jnp.pad(drafted, ((0, 0), (0, 1)))
        given = jnp.where(place == accepted[:, None], own[:, None], given)
        resting = now.left == 0
        counted = jnp.minimum(accepted + 1, now.left)
        last = jnp.take_along_axis(read, accepted[:, None], axis=1)
        tokens = jnp.concatenate([last, own[:, None]], axis=1)
        after = Speculation(
            jnp.where(resting[:, None], now.tokens, tokens),
            jnp.where(resting, now.lengths, now.lengths + accepted + 1),
            caches,
            draft_caches,
            now.left - counted,
            now.key,
            now.cycles + 1,
        )
        return after, (given, counted, jnp.where(resting, -1, accepted))

    return jax.lax.scan(cycle, now, length=cycles)


def run(split, tokens, cache):
    """Logits [B, T, V] of tokens [B, T] after what the cache holds, and the caches with them."""
    table, norm, head = split.ends.build()
    blocks = [block for piece in split.layers for block in piece.build()]
    x, cache = through(blocks, table(tokens), split.config, cache)
    return logits(table, head, norm(x)), cache.layers


def _draft(draft, now, keys, sampling):
    """Tokens [B, K], the logits [B, K, V] that they were drawn by, and the draft's caches."""

    def draw(read, caches, lengths, key):
        scores, caches = run(draft, read, Cache(caches, lengths))
        scores = scores[:, -1]
        if sampling.temperature:
            scores = sampling.cut(scores)
            token = jax.random.categorical(key, scores).astype(jnp.int32)
        else:
            token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return token, scores, caches

    # The first of the two is read again where the draft has read it already: to the same end.
    first = draw(now.tokens, now.draft_caches, now.lengths - 1, keys[0])

    def step(state, key):
        token, lengths, caches = state
        token, scores, caches = draw(token[:, None], caches, lengths, key)
        return (token, lengths + 1, caches), (token, scores)

    start = first[0], now.lengths + 1, first[2]
    (_, _, caches), (tokens, scores) = jax.lax.scan(step, start, keys[1:])
    tokens = jnp.concatenate([first[0][None], tokens]).T
    return tokens, jnp.concatenate([first[1][None], scores]).swapaxes(0, 1), caches


def _judge(wanted, drafted, chances, keys, sampling, forced):
    """How many drafted tokens are accepted [B], and the model's own token after them [B].

    With p and q the distributions of model and draft, a token t that the draft drew is accepted
    with probability min(1, p(t) / q(t)); after the first that is not, a token is drawn from what p
    has more than q, max(p - q, 0), normalized; after all of them, from p.
    """
    if sampling.temperature == 0:
        best = jnp.argmax(wanted, axis=-1).astype(jnp.int32)
        right = drafted == best[:, :-1]
    else:
        p = jax.nn.softmax(sampling.cut(wanted), axis=-1)
        q = jax.nn.softmax(chances, axis=-1)
        of = lambda array: jnp.take_along_axis(array, drafted[..., None], axis=-1)[..., 0]
        right = jax.random.uniform(keys[0], drafted.shape) * of(q) < of(p[:, :-1])
    if forced is not None:
        right = jax.random.uniform(keys[0], drafted.shape) < forced
    accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1)
    at = lambda array: jnp.take_along_axis(array, accepted[:, None, None], axis=1)[:, 0]
    if sampling.temperature == 0:
        return accepted, at(best[..., None])[:, 0]
    more = jnp.maximum(at(p) - at(jnp.pad(q, ((0, 0), (0, 1), (0, 0)))), 0)
    # Where rounding leaves nothing, p and q are the same.
    more = jnp.where(jnp.sum(more, axis=-1, keepdims=True) > 0, more, at(p))
    return accepted, jax.random.categorical(keys[1], jnp.log(more)).astype(jnp.int32)


@dataclasses.dataclass
class Account:
    """What a generation with a draft came to.

    Attributes:
      draft_tokens: K.
      drafted: cycles of all sequences in which the i-th drafted token was reached, by i.
      accepted: and in which it was accepted.
      cycles: cycles of all sequences.
      tokens: tokens given.
      calls: seconds and cycles of each call of the device; the first compiles.
    """

    draft_tokens: int
    drafted: np.ndarray
    accepted: np.ndarray
    cycles: int = 0
    tokens: int = 0
    calls: list = dataclasses.field(default_factory=list)

    @classmethod
    def empty(cls, draft_tokens):
        zeros = np.zeros(draft_tokens, np.int64)
        return cls(draft_tokens, zeros, zeros.copy())

    def add(self, counted, accepted, seconds):
        """Counts some cycles, whose arrays are [cycles, B]."""
        place = np.arange(self.draft_tokens)
        live = accepted[accepted >= 0]
        self.drafted += (live[:, None] >= place).sum(0)
        self.accepted += (live[:, None] > place).sum(0)
        self.cycles += len(live)
        self.tokens += int(counted.sum())
        self.calls.append((seconds, len(counted)))

    @property
    def cycle_seconds(self):
        """Time of a cycle, without the first call where there are more."""
        seconds, cycles = np.sum(self.calls[1:] or self.calls, axis=0)
        return float(seconds / cycles)

    @property
    def acceptance(self):
        """The share of the drafted tokens that were reached and accepted; NaN without any."""
        return self.accepted.sum() / self.drafted.sum() if self.drafted.sum() else np.nan

    def __str__(self):
        by_place = ", ".join(f"{a / max(d, 1):.2f}" for a, d in zip(self.accepted, self.drafted))
        return (
            f"{self.cycles} cycles of {self.draft_tokens} drafted tokens gave {self.tokens}, "
            f"{self.tokens / max(self.cycles, 1):.2f} a cycle; accepted {self.acceptance:.2f}, by "
            f"place {by_place}"
        )


def choose_draft_tokens(acceptance, draft_seconds, other_seconds, most=MOST_DRAFT_TOKENS):
    """The number K of drafted tokens that gives the most tokens a second.

    K tokens of which each is accepted with probability a, after those before it, give
    (1 - a^(K + 1)) / (1 - a) tokens a cycle.

    Args:
      acceptance: a, in [0, 1].
      draft_seconds: time that one drafted token more adds to a cycle.
      other_seconds: time of the rest of a cycle.
      most: the largest K considered.
    """

    def speed(count):
        tokens = sum(acceptance**i for i in range(count + 1))
        return tokens / (other_seconds + count * draft_seconds)

    return max(range(1, most + 1), key=speed)


def share_arrays(draft, model):
    """Gives a draft the model's own arrays wherever they hold the same; the bytes saved."""
    theirs, saved = dict(nnx.to_flat_state(nnx.state(model))), 0
    ours = dict(nnx.to_flat_state(nnx.state(draft)))
    for path, leaf in ours.items():
        own = leaf.get_value()
        other = theirs[path].get_value() if path in theirs else None
        if not (isinstance(own, jax.Array) and isinstance(other, jax.Array)):
            continue
        if own.dtype == other.dtype and bool(jnp.array_equal(own, other)):
            ours[path], saved = leaf.replace(other), saved + own.nbytes
    nnx.update(draft, nnx.from_flat_state(ours.items()))
    return saved


def check_draft(model, draft):
    """Raises ValueError where a draft cannot draft for a model."""
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"the draft has a vocabulary of {draft.vocab_size} tokens and the model one of "
            f"{model.vocab_size}; a draft shares the model's tokenizer, as a packed copy of it does"
        )


def speculate(
    model,
    draft,
    prompts,
    new_tokens,
    *,
    draft_tokens=4,
    sampling=generation.GREEDY,
    seed=0,
    cycles=CYCLES,
    forced=None,
    accounts=None,
):
    """Continues prompts as `generate` does, with a draft that makes it faster.

    Args:
      model, draft: `Llama`s, dense or packed, or their `SplitModel`s.
      prompts, new_tokens, sampling, seed: as for `generate`.
      draft_tokens: K, or "auto": calls with few and with more measure both models, and then
        `choose_draft_tokens` decides.
      cycles: cycles between two visits to the host.
      forced: see `advance`.
      accounts: a list to which an `Account` is added for every K that was used.

    Yields:
      Lists of B lists of the new tokens of each sequence, `new_tokens` for each in all. Sequences
      go on at their own pace.

    Raises:
      ValueError: as `generate` does, or the draft has another vocabulary.
    """
    split, draft = (m if isinstance(m, SplitModel) else SplitModel.of(m) for m in (model, draft))
    check_draft(split.config, draft.config)
    padded, lengths = generation.pad_prompts(split.config, prompts, new_tokens)
    accounts = [] if accounts is None else accounts
    plan = [*TRIALS] if draft_tokens == "auto" else []
    most = MOST_DRAFT_TOKENS if plan else draft_tokens
    now = _begin(split, draft, padded, lengths, new_tokens, most, jax.random.key(seed), sampling)
    yield now.tokens[:, 1:].tolist()
    left = new_tokens - 1
    while left:
        count = plan.pop(0) if plan else draft_tokens
        if count == "auto":
            count = draft_tokens = _choose(accounts)
        if not accounts or accounts[-1].draft_tokens != count:
            accounts.append(Account.empty(count))
        began = time.perf_counter()
        now, results = advance(
            split, draft, now, cycles=cycles, count=count, sampling=sampling, forced=forced
        )
        given, counted, accepted, left = jax.device_get((*results, now.left.max()))
        accounts[-1].add(counted, accepted, time.perf_counter() - began)
        yield [
            [token for row, n in zip(given[:, b], counted[:, b]) for token in row[:n].tolist()]
            for b in range(given.shape[1])
        ]


def _begin(split, draft, padded, lengths, new_tokens, most, key, sampling):
    """Both models read the prompts; the model draws the first token."""
    begun = generation.prefill(split, padded, lengths, key, sampling)
    read = generation.prefill(draft, padded, lengths, key, sampling)
    slots = round_up(int(lengths.max()) + new_tokens + most + 1)
    last = np.take_along_axis(padded, lengths[:, None] - 1, axis=1)
    return Speculation(
        jnp.concatenate([jnp.asarray(last), begun.token[:, None]], axis=1),
        jnp.asarray(lengths),
        widen(begun.cache, slots).layers,
        widen(read.cache, slots).layers,
        jnp.full(len(lengths), new_tokens - 1, jnp.int32),
        jax.random.fold_in(key, 1),
        jnp.int32(0),
    )


def _choose(accounts):
    """K by what two numbers of tokens took and how many were accepted."""
    few, more = accounts
    each = more.cycle_seconds - few.cycle_seconds
    each = max(each / (more.draft_tokens - few.draft_tokens), 0.0)
    other = max(few.cycle_seconds - few.draft_tokens * each, 1e-9)
    return choose_draft_tokens(more.acceptance, each, other)
