"""Continues prompts with a dense or a packed model, printing text as it comes.

    python -m examples.generate --prompt="def main():"
    python -m examples.generate --checkpoint=DIR --prompt=One --prompt=Two --temperature=0.8
    python -m examples.generate --checkpoint=DIR --chat --prompt="What is a sparse matrix?"
    python -m examples.generate --checkpoint=DIR --draft=PACKED --draft_tokens=4

DIR is a Hugging Face directory of the Llama family, or one that examples.demo or
examples.compress_llm wrote. With several prompts they run as one batch, and each continuation is
printed when all are done. With --draft a packed copy drafts and the model verifies, which is faster
and does not change a token.
"""

import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from examples import cli, files, llama
from examples.llama import chat, checkpoint, speculation
from examples.llama import tokenizer as tokenizers
from macko_jax.format.quantization import NAMES

flags.DEFINE_string(
    "checkpoint",
    str(pathlib.Path(__file__).parent / "llama" / "checkpoint"),
    "Directory of a dense or packed model.",
)
flags.DEFINE_multi_string(
    "prompt", [], "Text to continue; repeatable; by default 'def main():' and a new line."
)
flags.DEFINE_multi_string(
    "prompt_file", [], "Text file to continue, in UTF-8, after those of --prompt; repeatable."
)
flags.DEFINE_bool(
    "add_bos", True, "Begin prompts with the token that begins texts, where the model has one."
)
flags.DEFINE_bool(
    "chat",
    False,
    "Put each prompt into the model's chat template, as a user's message (needs the extra [hf]).",
)
flags.DEFINE_string("system", None, "With --chat: what the model is told before the message.")
flags.DEFINE_integer("new_tokens", 200, "Most tokens to draw.", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
flags.DEFINE_integer("top_k", None, "Draw among this many likeliest tokens only.", lower_bound=1)
flags.DEFINE_float("top_p", 1.0, "Draw among the fewest tokens of this probability.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.")
flags.DEFINE_integer("chunk", 32, "Tokens between two visits to the host.", lower_bound=1)
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "What to compute in; by default what the weights are stored in, on a CPU float32.",
)
flags.DEFINE_enum(
    "values",
    None,
    [*NAMES],
    "Round the values of packed matrices, and of a dense model's pruned ones, to 8 bits; by "
    "default they stay as they are stored.",
)
flags.DEFINE_integer(
    "tensor_parallel", 1, "Devices that share the model, heads and cache.", lower_bound=1
)
flags.DEFINE_string(
    "draft",
    None,
    "Directory of a model, such as a packed one, that drafts what the other verifies: the text "
    "stays the other's, and comes faster where they agree.",
)
flags.DEFINE_string("draft_tokens", "4", "Tokens to draft at a time, or auto to measure first.")
flags.register_validator(
    "draft_tokens",
    lambda text: text == "auto" or (text.isdecimal() and int(text) > 0),
    message="tokens to draft are a number from 1 on, or auto",
)


BYTES_A_TOKEN = 256  # of a prompt; more are refused before they are cut into tokens


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is continued and how; the flags of the same names say what each is."""

    checkpoint: str
    prompt: tuple[str, ...]
    prompt_file: tuple[str, ...]
    add_bos: bool
    chat: bool
    system: str | None
    new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    chunk: int
    dtype: str | None
    values: str | None
    tensor_parallel: int
    draft: str | None
    draft_tokens: str

    def prompts(self):
        """The texts to continue."""
        read = []
        if self.prompt_file:
            config = checkpoint.load_config(self.checkpoint)
            most = BYTES_A_TOKEN * config.max_position_embeddings
            read = [files.read_text(path, most) for path in self.prompt_file]
        return [*self.prompt, *read] or ["def main():\n"]

    def asked(self, texts):
        """What the model is given to continue for the texts of the user."""
        if not self.chat:
            if self.system is not None:
                raise ValueError("--system is for --chat; without it write it into the prompt")
            return texts
        checkpoint.load_config(self.checkpoint)  # for a directory that is none has no template
        return chat.ChatTemplate(self.checkpoint).render(texts, self.system)

    def model(self):
        """The model, which computes in the type of its weights, on a CPU in float32."""
        on_cpu = jax.default_backend() == "cpu"
        default = "float32" if on_cpu else checkpoint.stored_dtype(self.checkpoint)
        return checkpoint.load_any(
            self.checkpoint,
            dtype=jnp.dtype(self.dtype or default),
            values=self.values,
            tensor_parallel=self.tensor_parallel,
        )

    def draw(self, model, prompts, sampling, accounts):
        """Lists of each prompt's new tokens, as they come; with a draft, what it came to."""
        common = {"sampling": sampling, "seed": self.seed}
        if self.draft is None:
            calls = llama.generate(model, prompts, self.new_tokens, chunk=self.chunk, **common)
            return (chunk.tolist() for chunk in calls)
        if self.tensor_parallel > 1:
            raise ValueError("--draft is for one device; leave --tensor_parallel or --draft out")
        draft = checkpoint.load_any(self.draft, dtype=model.dtype)
        speculation.check_draft(model.config, draft.config)
        speculation.share_arrays(draft, model)
        count = self.draft_tokens if self.draft_tokens == "auto" else int(self.draft_tokens)
        return llama.speculate(
            model,
            draft,
            prompts,
            self.new_tokens,
            draft_tokens=count,
            cycles=max(1, self.chunk // 4),
            accounts=accounts,
            **common,
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


def main(_):
    settings = cli.settings(Settings)
    texts = settings.prompts()
    asked = settings.asked(texts)
    sampling = llama.Sampling(settings.temperature, settings.top_k, settings.top_p)
    model = settings.model()
    tokenizer = tokenizers.load_tokenizer(settings.checkpoint, model.config.vocab_size)
    prompts = [tokenizer.encode(text, add_bos=settings.add_bos) for text in asked]
    if settings.chat:  # what is shown, the answer on a line of its own
        texts = [f"{text}\n" for text in texts]

    drawn = [[] for _ in prompts]
    alone = len(prompts) == 1
    printed = ""
    if alone:
        print(texts[0], end="", flush=True)
    began = time.perf_counter()
    accounts = []
    for chunk in settings.draw(model, prompts, sampling, accounts):
        for row, tokens in zip(drawn, chunk):
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
    for account in accounts:
        print(f"[{account}]")


if __name__ == "__main__":
    cli.run(main)
