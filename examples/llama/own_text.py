"""Text that a model writes itself, to calibrate and refine it on where there is no other.

Each window begins with what the tokenizer puts before a text and one token drawn from the whole
vocabulary; the rest is sampled from the model at temperature 1 (LLM-QAT, arXiv 2305.17888).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import macko_jax
from examples.llama import checkpoint
from examples.llama import tokenizer as tokenizers
from examples.llama.digests import checkpoint_digests
from examples.llama.generation import generate
from examples.llama.sampling import Sampling

FILE = "own_text.macko"  # a file of macko_jax.save; no loader of models takes it for one of theirs
BATCH = 64  # windows that are written at a time


def own_windows(directory, out, count, length, *, seed=0):
    """Windows of a dense model's own text: those kept in `out`, or new ones, which are kept there.

    Args:
      directory: of the dense model, which is loaded whole.
      out: directory of the file own_text.macko.
      count: windows.
      length: tokens of each.
      seed: of all draws.

    Returns:
      [count, length] int32.

    Raises:
      ValueError: the file that is there was made by another model or with another seed or length,
        or is damaged.
    """
    path = pathlib.Path(out) / FILE
    stored = checkpoint.Checkpoint(directory)
    files = checkpoint_digests(stored)
    described = json.dumps({"files": files, "length": length, "seed": seed}, sort_keys=True)
    if path.exists():
        tokens = _read(path, described, length, stored.config)
        if len(tokens) >= count:
            return tokens[:count]
    tokens = _write(directory, count, length, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    macko_jax.save(path, {"tokens": tokens, "described": described})
    return tokens


def _read(path, described, length, config):
    """The windows [N, length] of a file, which `described` must have written."""
    try:
        found = macko_jax.load(path)
        tokens, told = np.asarray(found["tokens"]), found["described"]
        if tokens.dtype != np.int32 or tokens.ndim != 2:
            raise ValueError(f"its tokens are {tokens.dtype} {list(tokens.shape)}")
        config.check_tokens(tokens)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and it is made anew") from error
    if told != described or tokens.shape[1] != length:
        raise ValueError(
            f"{path} was written by another model, or with another length or seed; remove it, or "
            "give another directory"
        )
    return tokens


def _write(directory, count, length, seed):
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = checkpoint.load(directory, dtype=dtype)
    before = tokenizers.load_tokenizer(directory, model.config.vocab_size).encode("")
    first = np.random.default_rng(seed).integers(0, model.config.vocab_size, count)
    windows = []
    for start in range(0, count, BATCH):
        # The last batch is filled up, so that one program writes all.
        chosen = first[np.arange(start, start + min(BATCH, count)) % count]
        prompts = [[*before, int(token)] for token in chosen]
        sampling = Sampling(temperature=1.0)
        new = length - len(prompts[0])
        drawn = generate(model, prompts, new, sampling=sampling, seed=seed + start)
        windows.append(np.concatenate([np.asarray(prompts, np.int32), *drawn], axis=1))
    return np.concatenate(windows)[:count].astype(np.int32)
