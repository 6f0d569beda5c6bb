"""Perplexity and bits per byte of dense, pruned and packed models on a text file.

    python -m examples.evaluate --checkpoint=DENSE --checkpoint=PACKED --pruned --text=FILE
    python -m examples.evaluate --checkpoint=DRAFT --against=DENSE

Windowing: the text is cut into windows of --length tokens, each --stride tokens behind the one
before, and only the last --stride predictions of a window count (all of them in the first), so
that each token is predicted once and, past the first window, from at least length - stride tokens.
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from examples import cli, files, stdlib_text
from examples.llama import checkpoint, evaluation, parallel, speculation
from examples.llama import tokenizer as tokenizers
from examples.records import write_json
from macko_jax.format.quantization import NAMES

flags.DEFINE_multi_string(
    "checkpoint",
    [str(pathlib.Path(__file__).parent / "llama" / "checkpoint")],
    "Directory of a dense or packed model; repeatable.",
)
flags.DEFINE_bool(
    "pruned", False, "Evaluate packed models once more with their matrices decompressed."
)
flags.DEFINE_string(
    "against",
    None,
    "Directory of the model that drafts are for, or that was compressed: how often each agrees "
    "with it is said, too.",
)
flags.DEFINE_string(
    "text", None, "Text file, in UTF-8; by default the held-out standard library modules."
)
flags.DEFINE_integer(
    "length",
    None,
    "Tokens of a window; by default the model's positions, at most 2048.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "stride", None, "Tokens from one window to the next; by default half a window.", lower_bound=1
)
flags.DEFINE_integer(
    "eval_windows", 0, "Windows to evaluate, spread over the text; 0 for all of it.", lower_bound=0
)
flags.DEFINE_integer("batch", 4, "Windows per call.", lower_bound=1)
flags.DEFINE_string("out", None, "File of the results, in JSON; by default none.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "What to compute in.")
flags.DEFINE_enum(
    "values",
    None,
    [*NAMES],
    "Round the values of packed matrices, and of a dense model's pruned ones, to 8 bits; by "
    "default they stay as they are stored.",
)
flags.DEFINE_integer(
    "tensor_parallel", 1, "Devices that share each model, heads and cache.", lower_bound=1
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated and how; the flags of the same names say what each is."""

    checkpoint: tuple[str, ...]
    pruned: bool
    against: str | None
    text: str | None
    length: int | None
    stride: int | None
    eval_windows: int
    batch: int
    out: str | None
    dtype: str
    values: str | None
    tensor_parallel: int

    def read_text(self):
        """The text to evaluate on."""
        if self.text:
            return files.read_text(self.text)
        return "\0".join(text.decode() for text in stdlib_text.read_modules().values())

    def models(self):
        """(directory, "dense", "packed" or "pruned", model), loaded one after the other."""
        dtype = jnp.dtype(self.dtype)
        for directory in self.checkpoint:
            packed = checkpoint.is_packed(directory)
            kind = "packed" if packed else "dense"
            shared = {"values": self.values, "tensor_parallel": self.tensor_parallel}
            yield directory, kind, checkpoint.load_any(directory, dtype=dtype, **shared)
            if packed and self.pruned:
                mesh = parallel.make_mesh(self.tensor_parallel, checkpoint.load_config(directory))
                pruned = checkpoint.load_packed(directory, dtype=dtype, unpack=True, mesh=mesh)
                yield directory, "pruned", pruned

    def other(self):
        """The model to compare with, if there is one."""
        if self.against is None:
            return None
        dtype = jnp.dtype(self.dtype)
        return checkpoint.load_any(self.against, dtype=dtype, tensor_parallel=self.tensor_parallel)

    def windowing(self, config):
        """The length of a window and the stride between two."""
        length = evaluation.window_length(self.length, config)
        return length, self.stride or max(length // 2, 1)


def evaluate(directory, kind, model, text, other, settings):
    """Evaluates a model, beside another if there is one, and prints a line; what it found."""
    tokenizer = tokenizers.load_tokenizer(directory, model.config.vocab_size)
    tokens = np.array(tokenizer.encode(text))
    length, stride = settings.windowing(model.config)
    windowing = {"length": length, "stride": stride, "batch": settings.batch}
    windowing["limit"] = settings.eval_windows or None
    with jax.default_matmul_precision("highest"):
        if other is None:
            nats, count = evaluation.total_nats(model, tokens, **windowing)
        else:
            speculation.check_draft(other.config, model.config)
            nats, count, agreement = evaluation.agreement(model, other, tokens, **windowing)
    # Bytes per token of the whole text, should only some of its windows have been read.
    size = len(text.encode()) / (len(tokens) - 1)
    result = {
        "checkpoint": directory,
        "kind": kind,
        "perplexity": math.exp(nats / count),
        "bits_per_byte": nats / count / math.log(2) / size,
        "tokens": count,
        "length": length,
        "stride": stride,
    }
    print(
        f"{directory}, {kind}: perplexity {result['perplexity']:.4f} per token, "
        f"{result['bits_per_byte']:.4f} bits per byte, {count} tokens, windows of {length} with "
        f"stride {stride}",
        flush=True,
    )
    if other is not None:
        result["agreement"] = {"with": settings.against, **agreement}
        print(
            f"  agrees with {settings.against}: the same likeliest token in "
            f"{agreement['same_likeliest']:.1%} of all places, a token that it draws would be "
            f"accepted in {agreement['overlap']:.1%}, divergence {agreement['divergence']:.4f} "
            "nats",
            flush=True,
        )
    return result


def main(_):
    settings = cli.settings(Settings)
    text = settings.read_text()
    other = settings.other()
    results = [evaluate(*model, text, other, settings) for model in settings.models()]
    if settings.out:
        described = {
            "text": settings.text,
            "windows": settings.eval_windows or "all",
            "dtype": settings.dtype,
            "values": settings.values,
        }
        write_json(pathlib.Path(settings.out), described | {"results": results})


if __name__ == "__main__":
    cli.run(main)
