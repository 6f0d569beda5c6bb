"""Text that a model writes itself, to calibrate and refine it on where there is no other.

Each window begins with what the tokenizer puts before a text and one token drawn from the whole
vocabulary; the rest is sampled from the model at temperature 1 (LLM-QAT, arXiv 2305.17888).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama import checkpoint
from examples.llama import tokenizer as tokenizers
from examples.llama.digests import checkpoint_digests
from examples.llama.generation import generate
from examples.llama.sampling import Sampling
from macko_jax.io.atomic import replacing

FILE = "own_text.npz"
BATCH = 64  # windows that are written at a time


def own_windows(directory, out, count, length, *, seed=0):
    """Windows of a dense model's own text: those kept in `out`, or new ones, which are kept there.

    Args:
      directory: of the dense model, which is loaded whole.
      out: directory of the file own_text.npz.
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
    files = checkpoint_digests(checkpoint.Checkpoint(directory))
    described = json.dumps({"files": files, "length": length, "seed": seed}, sort_keys=True)
    if path.is_file():
        tokens = _read(path, described)
        if len(tokens) >= count:
            return tokens[:count]
    tokens = _write(directory, count, length, seed)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, tokens=tokens, described=described)
    return tokens


def _read(path, described):
    try:
        with np.load(path) as found:
            tokens, told = found["tokens"], str(found["described"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and it is made anew") from error
    if told != described:
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
