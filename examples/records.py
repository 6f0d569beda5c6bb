"""Files of results: text and JSON, each replaced only by a whole new one."""

import json

from macko_jax.io.atomic import replacing


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path, record):
    write_text(path, json.dumps(record, indent=1) + "\n")
