"""Perplexity and bits per byte of a dense, pruned or packed model on a text file.

    python -m examples.evaluate --checkpoint=DIR --text=FILE

Windowing: the text is cut into windows of --length tokens, each --stride tokens behind the one
before, and only the last --stride predictions of a window count (all of them in the first), so
that each token is predicted once and, past the first window, from at least length - stride tokens.
"""

import math
import pathlib

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from examples import stdlib_text
from examples.llama import checkpoint
from examples.llama import evaluation
from examples.llama import tokenizer as tokenizers

CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint",
    [str(pathlib.Path(__file__).parent / "llama" / "checkpoint")],
    "Directory of a dense or packed model; repeatable.",
)
TEXT = flags.DEFINE_string(
    "text", None, "Text file, in UTF-8; by default the held-out standard library modules."
)
LENGTH = flags.DEFINE_integer("length", None, "Window; by default the model's, at most 2048.")
STRIDE = flags.DEFINE_integer("stride", None, "Step between windows; by default half a window.")
WINDOWS = flags.DEFINE_integer("windows", None, "Take at most this many, spread over the text.")
BATCH = flags.DEFINE_integer("batch", 4, "Windows per call.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "What to compute in."
)


def read_text():
    if TEXT.value:
        return pathlib.Path(TEXT.value).read_text(encoding="utf-8")
    return "\0".join(text.decode() for text in stdlib_text.read_modules().values())


def main(_):
    text = read_text()
    for directory in CHECKPOINT.value:
        model = checkpoint.load_any(directory, dtype=jnp.dtype(DTYPE.value))
        tokenizer = tokenizers.load_tokenizer(directory, model.config.vocab_size)
        tokens = np.array(tokenizer.encode(text))
        length = LENGTH.value or min(2048, model.config.max_position_embeddings)
        stride = STRIDE.value or max(length // 2, 1)
        if length > model.config.max_position_embeddings:
            raise ValueError(
                f"--length={length} exceeds the {model.config.max_position_embeddings} positions "
                f"of {directory}"
            )
        with jax.default_matmul_precision("highest"):
            nats, count = evaluation.total_nats(
                model, tokens, length=length, stride=stride, batch=BATCH.value, limit=WINDOWS.value
            )
        # Bytes per token of the whole text, should only some of its windows have been read.
        size = len(text.encode()) / (len(tokens) - 1)
        print(
            f"{directory}: perplexity {math.exp(nats / count):.4f} per token, "
            f"{nats / count / math.log(2) / size:.4f} bits per byte, {count} tokens, "
            f"windows of {length} with stride {stride}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
