"""Files of results: each is written under a temporary name beside it, and renamed when whole."""

import contextlib
import json
import os
import pathlib


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`, renamed to it on success and removed on failure.

    Its folder is made where it is missing. The name does not end as the file's does, so that what a
    killed program leaves behind is not taken for a file.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors lets only the owner read
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path, record):
    write_text(path, json.dumps(record, indent=1) + "\n")
