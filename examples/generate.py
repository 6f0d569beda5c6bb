"""Continues prompts with a dense or a packed model, printing text as it comes.

    python -m examples.generate --prompt="def main():"
    python -m examples.generate --checkpoint=DIR --prompt=One --prompt=Two --temperature=0.8

DIR is a Hugging Face directory of the Llama family, or one that examples.demo or
examples.compress_llm wrote. With several prompts they run as one batch, and each continuation is
printed when all are done.
"""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from examples import cli, llama
from examples.llama import checkpoint
from examples.llama import tokenizer as tokenizers

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parent / "llama" / "checkpoint"),
    "Directory of a dense or packed model.",
)
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue; repeatable; by default 'def main():' and a new line."
)
PROMPT_FILE = flags.DEFINE_multi_string(
    "prompt_file", [], "Text file to continue, in UTF-8, after those of --prompt; repeatable."
)
ADD_BOS = flags.DEFINE_bool(
    "add_bos", True, "Begin prompts with the token that begins texts, where the model has one."
)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 200, "Most tokens to draw.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer(
    "top_k", None, "Draw among this many likeliest tokens only.", lower_bound=1
)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the fewest tokens of this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")
CHUNK = flags.DEFINE_integer("chunk", 32, "Tokens between two visits to the host.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "What to compute in; by default what the weights are stored in, on a CPU float32.",
)


def until_stop(tokens, stop_tokens):
    """The tokens before the first one that ends a text, and whether there is one."""
    for i, token in enumerate(tokens):
        if token in stop_tokens:
            return tokens[:i], True
    return tokens, False


def settled(text):
    """Text without what a following token may still change: an unfinished character."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def read_prompts():
    """The texts of --prompt and --prompt_file."""
    files = [pathlib.Path(path).read_text(encoding="utf-8") for path in PROMPT_FILE.value]
    return PROMPT.value + files or ["def main():\n"]


def main(_):
    texts = read_prompts()
    on_cpu = jax.default_backend() == "cpu"
    default = "float32" if on_cpu else checkpoint.stored_dtype(CHECKPOINT.value)
    sampling = llama.Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    model = checkpoint.load_any(CHECKPOINT.value, dtype=jnp.dtype(DTYPE.value or default))
    tokenizer = tokenizers.load_tokenizer(CHECKPOINT.value, model.config.vocab_size)
    prompts = [tokenizer.encode(text, add_bos=ADD_BOS.value) for text in texts]

    drawn = [[] for _ in prompts]
    alone = len(prompts) == 1
    printed = ""
    if alone:
        print(texts[0], end="", flush=True)
    began = time.perf_counter()
    for chunk in llama.generate(
        model, prompts, NEW_TOKENS.value, sampling=sampling, seed=SEED.value, chunk=CHUNK.value
    ):
        for row, tokens in zip(drawn, chunk.tolist()):
            row += tokens
        ends = [until_stop(row, tokenizer.stop_tokens) for row in drawn]
        if alone:
            text = settled(tokenizers.continuation(tokenizer, prompts[0], ends[0][0]))
            print(text[len(printed) :], end="", flush=True)
            printed = text
        if all(stopped for _, stopped in ends):
            break
    seconds = time.perf_counter() - began
    if alone:
        print(tokenizers.continuation(tokenizer, prompts[0], ends[0][0])[len(printed) :])
    else:
        for text, prompt, (tokens, _) in zip(texts, prompts, ends):
            print(f"--- {text}{tokenizers.continuation(tokenizer, prompt, tokens)}")
    count = int(np.sum([len(tokens) for tokens, _ in ends]))
    print(f"[{count} tokens in {seconds:.1f} s, compilation included]")


if __name__ == "__main__":
    cli.run(main)
