"""Files of results: each is written under a temporary name beside it, and renamed when whole."""

import json

from macko_jax.io.checkpoint import replacing


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path, record):
    write_text(path, json.dumps(record, indent=1) + "\n")
