"""The one way in which files are replaced: written whole beside their place, then renamed."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

SUFFIX = ".unfinished"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path that becomes `path` on success and is removed on failure.

        with replacing("report.json") as temporary:
            temporary.write_text(text)

    The temporary file lies alone in a hidden folder beside `path`, so that whatever a writer puts
    next to it is removed as well, and two threads or processes that write to one path do not meet:
    the last one to finish is the one whose file stays. Nothing that a killed program leaves behind
    has the suffix of `path`; `remove_unfinished` clears it away.

    Args:
        path: the file to replace. Its folder is made where it is missing.

    Yields:
        The path to write to. The file's mode becomes that of the umask.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent))
    try:
        temporary = folder / "file"
        temporary.touch()
        mode = temporary.stat().st_mode  # what safetensors writes only its owner may read
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(directory: str | os.PathLike) -> None:
    """Remove what killed programs were writing by `replacing` in a directory and below it.

    Args:
        directory: a directory in which no other program is writing at the time.
    """
    for folder in sorted(pathlib.Path(directory).rglob(f".*{SUFFIX}")):
        shutil.rmtree(folder, ignore_errors=True)
