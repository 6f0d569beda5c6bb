"""What files hold, in a line: by this a run that goes on knows what it began with and wrote."""

import hashlib


def file_digest(path):
    """SHA-256 of a file's contents."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror})") from error


def checkpoint_digests(stored):
    """Those of all files that a `weights.Checkpoint` and its model are made of, by name.

    Another model of the same shape has files of the same names and sizes, so that only contents
    tell them apart.
    """
    described = [path for path in stored.directory.glob("*.json") if path.is_file()]
    return {path.name: file_digest(path) for path in sorted({*described, *stored.files})}
