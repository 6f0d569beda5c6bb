"""Speculative decoding: the text is the model's own, whatever the draft says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import macko_jax.flax_nnx
from examples import llama
from examples.llama import speculation
from examples.llama.speculation import Account, choose_draft_tokens, speculate
from tests.test_llama import VARIANTS, continuations, make_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [53], [5, 8, 9]]


def other(model, share):
    """A model whose weights are partly other ones: a draft that is often wrong."""
    draft = nnx.clone(model)
    key = jax.random.key(5)
    move = lambda a: a + share * jnp.std(a) * jax.random.normal(key, a.shape) if a.ndim > 1 else a
    nnx.update(draft, jax.tree.map(move, nnx.state(draft)))
    return draft


def texts(*arguments, **options):
    rows = None
    for given in speculate(*arguments, **options):
        rows = [[] for _ in given] if rows is None else rows
        for row, tokens in zip(rows, given):
            row += tokens
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama", "qwen2", "windows"])
def test_the_likeliest_tokens_are_the_model_s_own(variant):
    model = make_model(**VARIANTS[variant])
    expected = continuations(model, PROMPTS, 20)
    for share, count in ((0.0, 3), (0.3, 3)):
        accounts = []
        found = texts(
            model, other(model, share), PROMPTS, 20, draft_tokens=count, cycles=3, accounts=accounts
        )
        np.testing.assert_array_equal(found, expected)
        (account,) = accounts
        assert account.tokens == 3 * 19
        if share == 0:
            assert account.acceptance == 1
        else:
            assert 0 < account.acceptance < 1 and "accepted 0." in str(account)


@pytest.mark.slow
def test_a_packed_model_drafts_and_shares_what_is_the_same():
    model = make_model()
    pruned = nnx.clone(model)
    kernel = pruned.layers[0].mlp.down.kernel
    kernel.set_value(jnp.where(jnp.abs(kernel[...]) > 0.5 * jnp.std(kernel[...]), kernel[...], 0))
    rules = [macko_jax.Rule("layers/0/mlp/down", encoding="bitmask", lanes=1)]
    draft, _ = macko_jax.flax_nnx.substitute(pruned, rules=rules)
    assert isinstance(draft.layers[0].mlp.down, macko_jax.flax_nnx.MackoLinear)
    saved = speculation.share_arrays(draft, model)
    assert draft.embed.embedding[...] is model.embed.embedding[...]
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert saved == everything - kernel[...].nbytes
    found = texts(model, draft, PROMPTS, 12, draft_tokens=3, cycles=3)
    np.testing.assert_array_equal(found, continuations(model, PROMPTS, 20)[:, :12])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.8}])
def test_drawn_tokens_have_the_model_s_distribution(options):
    """Chi-square of 400 draws of two tokens after the first, against exact probabilities."""
    sampling = llama.Sampling(temperature=1.5, **options)
    model = make_model(vocab_size=7, num_hidden_layers=1)
    draft, count = other(model, 0.5), 400
    prompt = [1, 2]
    accounts = []
    found = texts(
        model,
        draft,
        [prompt] * count,
        3,
        draft_tokens=2,
        cycles=2,
        sampling=sampling,
        accounts=accounts,
    )
    assert 0.2 < accounts[0].acceptance < 0.95
    chances = {}
    pairs = list(itertools.product(range(7), repeat=2))
    inputs = np.array([[*prompt, a, b] for a, b in pairs])
    p = jax.nn.softmax(sampling.cut(model(inputs)), axis=-1)
    for (a, b), rows in zip(pairs, np.asarray(p)):
        for c in range(7):
            chances[a, b, c] = rows[1, a] * rows[2, b] * rows[3, c]
    assert abs(sum(chances.values()) - 1) < 1e-4
    counts = {key: 0 for key in chances}
    for row in found.tolist():
        counts[tuple(row)] += 1
    assert all(chances[key] > 0 for key, n in counts.items() if n)
    often = [key for key in chances if chances[key] * count >= 5]
    rest = [sum(t[k] for k in t if k not in often) for t in (chances, counts)]
    statistic = sum((counts[k] - count * chances[k]) ** 2 / (count * chances[k]) for k in often)
    if rest[0]:
        statistic += (rest[1] - count * rest[0]) ** 2 / (count * rest[0])
    # Mean n and variance 2 n for n degrees of freedom; six deviations, with the seed fixed.
    assert statistic < len(often) + 6 * np.sqrt(2 * len(often))


@pytest.mark.slow
def test_draft_tokens_are_chosen_by_what_was_measured():
    assert choose_draft_tokens(0.0, 1.0, 3.0) == 1
    assert choose_draft_tokens(1.0, 0.1, 3.0, most=6) == 6
    best = choose_draft_tokens(0.8, 1.5, 4.0)
    speed = lambda k: sum(0.8**i for i in range(k + 1)) / (4.0 + 1.5 * k)
    assert all(speed(best) >= speed(k) for k in range(1, 9)) and 1 < best < 8
    model = make_model()
    accounts = []
    found = texts(model, model, PROMPTS[:1], 60, draft_tokens="auto", cycles=1, accounts=accounts)
    np.testing.assert_array_equal(found, continuations(model, PROMPTS[:1], 60))
    assert [account.draft_tokens for account in accounts[:2]] == [1, 4] and len(accounts) > 2


@pytest.mark.slow
def test_forced_acceptance_and_what_is_refused():
    model = make_model()
    accounts, compiled = [], speculation.advance._cache_size()
    found = texts(
        model, model, PROMPTS, 64, draft_tokens=3, cycles=4, forced=0.5, accounts=accounts
    )
    assert len(accounts[0].calls) > 1 and speculation.advance._cache_size() == compiled + 1
    assert found.shape == (3, 64) and 0.3 < accounts[0].acceptance < 0.7
    with pytest.raises(ValueError, match="vocabulary of 7 tokens and the model one of 61"):
        next(speculate(model, make_model(vocab_size=7), PROMPTS, 4))
    with pytest.raises(ValueError, match="positions"):
        next(speculate(model, model, PROMPTS, 90))
    assert np.isnan(Account.empty(2).acceptance)
