"""Chat templates: a conversation as the text that a model was trained to continue.

A template is Jinja, and comes with a checkpoint, so it is a program of a stranger: it runs in
Jinja's immutable sandbox, with the names and filters that Hugging Face transformers gives to it.
"""

import datetime
import json
import pathlib

from examples.llama.json_file import Field, read_fields, read_json, regular_file

FILE = "chat_template.jinja"  # where newer checkpoints have it
CONFIG = "tokenizer_config.json"  # where older ones do, as "chat_template"


class ChatTemplate:
    """The chat template of a model directory.

    Args:
      directory: holds chat_template.jinja, or tokenizer_config.json with a "chat_template".

    Raises:
      ImportError: jinja2 is not installed.
      FileNotFoundError: the directory has no chat template.
      ValueError: a file is damaged, or the template is not Jinja.
    """

    def __init__(self, directory):
        environment, self._failures = _environment()
        self.path, source, self._tokens = _read(pathlib.Path(directory))
        try:
            self._template = environment.from_string(source)
        except self._failures as error:
            raise ValueError(f"{self.path}: the chat template is not Jinja ({error})") from None

    def render(self, user, system=None):
        """The text that asks for an answer to a message.

        Args:
          user: the message.
          system: what the model is told before it; None for nothing.

        Returns:
          The text, which most templates begin with the token that begins texts; `encode` of a
          tokenizer puts no second one there.

        Raises:
          ValueError: the template refuses the conversation, or fails.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": user})
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._tokens
            )
        except self._failures as error:
            raise ValueError(f"{self.path}: the chat template fails: {error}") from None


def _environment():
    """What templates run in, and the errors that running one may end in."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError(
            "chat templates are rendered by the package jinja2: pip install jinja2, or install "
            "this project with the extra [hf]"
        ) from error

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks the model's own turns and says nothing of the text."""

        tags = frozenset(["generation"])

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    failures = (jinja2.TemplateError, TypeError, ValueError, AttributeError)
    return environment, (*failures, ArithmeticError, LookupError, RecursionError)


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
        path = regular_file(directory / FILE)
        try:
            return path, path.read_text(encoding="utf-8"), tokens
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8 ({error}); fetch it again") from None
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


def _to_json(value, indent=None):
    """JSON as templates want it: not escaped for HTML, as Jinja's own filter does."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(pattern):
    return datetime.datetime.now().strftime(pattern)
