"""Text to tokens and back: a Hugging Face tokenizer.json, or plain bytes for byte-level models."""

import contextlib
import pathlib

from examples.files import regular_file
from examples.llama.json_file import Field, read_json

START = 0  # begins every document of the byte-level model


class ByteTokenizer:
    """Tokens are bytes, after one START."""

    stop_tokens = frozenset({START})

    def encode(self, text, *, add_bos=True):
        """Tokens of a text, begun by START unless the text itself is, or `add_bos` is off."""
        tokens = list(text.encode())
        return [START, *tokens] if add_bos and tokens[:1] != [START] else tokens

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` package.

    Args:
      directory: holds tokenizer.json, and config.json with the ids of the tokens that end a text.
      vocab_size: tokens that the model knows.

    Raises:
      ImportError: the package is not installed.
      ValueError: a file is damaged.
    """

    def __init__(self, directory, vocab_size):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "tokenizer.json is read by the package tokenizers: pip install tokenizers, or "
                "install this project with the extra [hf]"
            ) from error
        self._vocab_size = vocab_size
        self._path = regular_file(directory / "tokenizer.json")
        with self._named("is not a whole tokenizer ({}); fetch it again"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        # What a training run stored there would drop text, and add tokens to it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        stop = []
        ids = Field("eos_token_id", list, 0, 2**31 - 1, items=int, or_one=True)
        for name in ("config.json", "generation_config.json"):
            if (directory / name).exists():
                found = read_json(directory / name, [ids]).get("eos_token_id", [])
                stop += found if isinstance(found, list) else [found]
        self.stop_tokens = frozenset(stop)

    def encode(self, text, *, add_bos=True):
        """Tokens of a text.

        Args:
          text: what to encode. A text that a chat template has rendered begins with the token that
            begins texts; it is not given a second one.
          add_bos: whether the tokens that the tokenizer puts before a text are put there.

        Raises:
          ValueError: the tokenizer fails, or knows tokens that the model does not.
        """
        with self._named("cannot encode the text ({}); fetch it again"):
            encoding = self._tokenizer.encode(text)
        tokens, added = encoding.ids, encoding.special_tokens_mask
        before = added.index(0) if 0 in added else len(added)
        bos, tokens = tokens[:before], tokens[before:]
        if add_bos and tokens[: len(bos)] != bos:
            tokens = bos + tokens
        largest = max(tokens, default=0)
        if largest >= self._vocab_size:
            raise ValueError(
                f"{self._path} gives token {largest}, and the model's vocabulary has "
                f"{self._vocab_size} tokens, from 0; copy the model's own tokenizer.json there"
            )
        return tokens

    def decode(self, tokens):
        with self._named("cannot decode tokens ({}); fetch it again"):
            return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    @contextlib.contextmanager
    def _named(self, said):
        """Names the file in what the package raises, which is nothing special, or a Rust panic."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{self._path} {said.format(str(error)[:200])}") from None


def continuation(tokenizer, prompt, drawn):
    """The text of the drawn tokens behind a prompt.

    The two are decoded as one text, for what a token reads as depends on its place: the tokenizers
    of Llama 2 and Mistral take a space from the first.
    """
    return tokenizer.decode([*prompt, *drawn])[len(tokenizer.decode(prompt)) :]


def load_tokenizer(directory, vocab_size):
    """The tokenizer of a model directory.

    Raises:
      FileNotFoundError: there is no tokenizer.json, and the model is not byte-level.
      ValueError: tokenizer.json is damaged.
    """
    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").exists():
        return FileTokenizer(directory, vocab_size)
    if vocab_size == 256:
        return ByteTokenizer()
    raise FileNotFoundError(
        f"{directory} holds no tokenizer.json, and with {vocab_size} tokens its model is not "
        "byte-level; copy tokenizer.json there"
    )
