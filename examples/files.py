"""Files of strangers: whole ones, no pipes and no devices, and errors that name them."""

import pathlib


def regular_file(path):
    """The path of a file that can be read to its end, which pipes and devices cannot.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is something else than a file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; put the file itself there")
    return path


def read_bytes(path, most=None):
    """What a file holds.

    Args:
      path: of the file.
      most: bytes that it may have; None for any number.

    Raises:
      FileNotFoundError, ValueError: as `regular_file`, or it has more bytes.
      OSError: it cannot be read.
    """
    path = regular_file(path)
    if most is not None and path.stat().st_size > most:
        raise ValueError(f"{path} has more than {most} bytes, the most that is read of its kind")
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror})") from error


def read_text(path, most=None):
    """The text of a file in UTF-8, without the mark that some editors put before it.

    Args:
      path: of the file.
      most: bytes that it may have; None for any number.

    Raises:
      FileNotFoundError, ValueError: as `read_bytes`, or it is in another encoding.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); convert it") from None
