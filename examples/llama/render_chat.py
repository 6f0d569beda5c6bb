"""A program that renders a chat template, and ends when that takes too long or too much memory.

Its argument is the time that it may take, in seconds of a processor. Its input is a JSON object
with "template", "tokens" (the special tokens by their names) and "conversations" (lists of
messages); its output has "texts", or "error". `chat.py` starts it, for a template comes with a
checkpoint and so is a program of a stranger, and Jinja's sandbox keeps it from reading files and
from reaching further into Python, but not from looping for ever. It runs by its path, and imports
nothing of this package, which would start JAX.
"""

import datetime
import json
import resource
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

BYTES = 2**29  # of memory
MOST_CHARACTERS = 2**24  # of all texts


class Generation(jinja2.ext.Extension):
    """{% generation %}, which marks the model's own turns and says nothing of the text."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def to_json(value, indent=None):
    """JSON as templates want it: not escaped for HTML, as Jinja's own filter does."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def strftime_now(pattern):
    return datetime.datetime.now().strftime(pattern)


def render(template, tokens, conversations):
    """The text of each conversation, by the names and filters that transformers gives."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise SyntaxError(f"is not Jinja ({error})") from None
    common = {"add_generation_prompt": True, "tools": None, **tokens}
    texts = [compiled.render(messages=messages, **common) for messages in conversations]
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise ValueError(f"gives more than {MOST_CHARACTERS} characters")
    return texts


def main():
    seconds = int(sys.argv[1])  # of a processor
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        result = {"texts": render(**json.load(sys.stdin))}
    except SyntaxError as error:
        result = {"error": str(error)[:300]}
    except MemoryError:
        result = {"error": "fails: it takes too much memory"}
    except Exception as error:  # whatever a template can bring about
        result = {"error": f"fails: {' '.join(str(error).split())[:300]}"}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
