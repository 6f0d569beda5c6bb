"""Text to tokens and back: a Hugging Face tokenizer.json, or plain bytes for byte-level models."""

import json
import pathlib

START = 0  # begins every document of the byte-level model


class ByteTokenizer:
    """Tokens are bytes, after one START."""

    stop_tokens = frozenset({START})

    def encode(self, text):
        return [START, *text.encode()]

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` package.

    Args:
      directory: holds tokenizer.json, and config.json with the ids of the tokens that end a text.
      vocab_size: tokens that the model knows.
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
        self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        stop = []
        for name in ("config.json", "generation_config.json"):
            if (directory / name).is_file():
                found = json.loads((directory / name).read_text()).get("eos_token_id")
                stop += found if isinstance(found, list) else [found]
        self.stop_tokens = frozenset(stop) - {None}

    def encode(self, text):
        tokens = self._tokenizer.encode(text).ids
        largest = max(tokens, default=0)
        if largest >= self._vocab_size:
            raise ValueError(
                f"tokenizer.json gives token {largest}, and the model's vocabulary has "
                f"{self._vocab_size} tokens, from 0; copy the model's own tokenizer.json there"
            )
        return tokens

    def decode(self, tokens):
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def load_tokenizer(directory, vocab_size):
    """The tokenizer of a model directory.

    Raises:
      FileNotFoundError: there is no tokenizer.json, and the model is not byte-level.
    """
    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").is_file():
        return FileTokenizer(directory, vocab_size)
    if vocab_size == 256:
        return ByteTokenizer()
    raise FileNotFoundError(
        f"{directory} holds no tokenizer.json, and with {vocab_size} tokens its model is not "
        "byte-level; copy tokenizer.json there"
    )
