"""Chat templates: a conversation as the text that a model was trained to continue.

A template is Jinja, and comes with a checkpoint, so it is a program of a stranger: it runs in
Jinja's immutable sandbox, in a process of its own that ends after some seconds, with the names and
filters that Hugging Face transformers gives to it.
"""

import importlib.util
import json
import pathlib
import signal
import subprocess
import sys

from examples.files import read_text
from examples.llama.json_file import Field, read_fields, read_json

SECONDS = 4  # of a processor; published templates take some milliseconds
RENDER = pathlib.Path(__file__).with_name("render_chat.py")  # the program
MOST_BYTES = 2**20  # of a template; published ones have some ten thousand

FILE = "chat_template.jinja"  # where newer checkpoints have it
CONFIG = "tokenizer_config.json"  # where older ones do, as "chat_template"


class ChatTemplate:
    """The chat template of a model directory.

    Args:
      directory: holds chat_template.jinja, or tokenizer_config.json with a "chat_template".

    Raises:
      ImportError: jinja2 is not installed.
      FileNotFoundError: the directory has no chat template.
      ValueError: a file is damaged.
    """

    def __init__(self, directory):
        if importlib.util.find_spec("jinja2") is None:
            raise ImportError(
                "chat templates are rendered by the package jinja2: pip install jinja2, or "
                "install this project with the extra [hf]"
            )
        self.path, self._source, self._tokens = _read(pathlib.Path(directory))

    def render(self, users, system=None):
        """The texts that ask for answers to messages.

        Args:
          users: messages, each of a conversation of its own.
          system: what the model is told before each; None for nothing.

        Returns:
          A text for each, which most templates begin with the token that begins texts; `encode` of
          a tokenizer puts no second one there.

        Raises:
          ValueError: the template is not Jinja, refuses a conversation, fails, or does not end.
        """
        before = [] if system is None else [{"role": "system", "content": system}]
        conversations = [[*before, {"role": "user", "content": user}] for user in users]
        asked = {"template": self._source, "tokens": self._tokens, "conversations": conversations}
        done = subprocess.run(
            [sys.executable, "-P", str(RENDER), str(SECONDS)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
        )
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            raise ValueError(
                f"{self.path}: the chat template does not end within {SECONDS} s; leave --chat out"
            )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ValueError(f"{self.path}: the chat template fails: {lines[-1]}")
        found = json.loads(done.stdout)
        if "error" in found:
            raise ValueError(f"{self.path}: the chat template {found['error']}")
        return found["texts"]


def _read(directory):
    """The file that has the template, the template, and the special tokens by their names."""
    config = {}
    if (directory / CONFIG).exists():
        config = read_json(directory / CONFIG)
        if not isinstance(config, dict):
            raise ValueError(f"{directory / CONFIG}: it must be an object")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: text for name in names if (text := _text(config.get(name))) is not None}
    if (directory / FILE).exists():
        path = directory / FILE
        return path, read_text(path, MOST_BYTES), tokens
    path, source = directory / CONFIG, config.get("chat_template")
    if isinstance(source, list):  # several, each with a name
        field = [Field("name", str, required=True), Field("template", str, required=True)]
        source = _named(source, field, path).get("default")
    if source is None:
        raise FileNotFoundError(
            f"{directory} has no chat template, neither {FILE} nor 'chat_template' in {CONFIG}; "
            "copy it from the model's own directory, or leave --chat out"
        )
    if not isinstance(source, str):
        raise ValueError(f"{path}: chat_template must be text, or a list of named templates")
    return path, source, tokens


def _named(templates, fields, path):
    """Templates by their names."""
    try:
        read = [read_fields(each, fields) for each in templates]
    except ValueError as error:
        raise ValueError(f"{path}: chat_template: {error}") from None
    return {each["name"]: each["template"] for each in read}


def _text(token):
    """A special token, which is stored as text or as an object that has it as "content"."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
