"""The text of the byte-level model: source code of Python's standard library.

Modules named in `HELD_OUT` are never trained on, nor are their tests. Run as a script, this
writes the training corpus from one or more standard libraries:

    python -m examples.stdlib_text --out=.corpus/stdlib.npz

Read files are joined into one byte string, each begun by a NUL byte, which marks the start of a
document for the model.
"""

import pathlib
import pydoc_data.topics
import sysconfig

import numpy as np
from absl import flags

from examples import cli, files
from macko_jax.io.atomic import replacing

HELD_OUT = (
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "ftplib",
    "graphlib",
    "heapq",
    "mailbox",
    "pprint",
    "queue",
    "selectors",
    "shlex",
    "statistics",
    "tempfile",
    "textwrap",
    "webbrowser",
)

# Modules that stand for the training text where layers are calibrated.
CALIBRATION = ("ast", "dataclasses", "datetime", "inspect", "optparse", "subprocess", "typing")

START = b"\0"  # before every document


def read_modules(modules=HELD_OUT, library=None):
    """The sources of some modules of the running interpreter's standard library.

    Args:
      modules: module names, by default the held-out ones.
      library: the directory to read; by default the running interpreter's.

    Returns:
      A dict from module name to bytes.

    Raises:
      FileNotFoundError: a source file is missing, as in interpreters shipped without sources.
    """
    library = pathlib.Path(library or sysconfig.get_path("stdlib"))
    documents = {}
    for module in modules:
        path = library / f"{module}.py"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: this Python comes without the source of its standard "
                "library. Name files with --text=FILE and --calibration=FILE instead."
            )
        documents[module] = path.read_bytes()
    return documents


def read_tokens(path=None, modules=HELD_OUT):
    """Tokens of a file, or of modules of the standard library: START, then bytes."""
    if path is None:
        return join(read_modules(modules).values())
    return join([files.read_bytes(path)])


def read_topics(held_out):
    """Prose in English that comes with Python: the topics of its interactive help.

    Args:
      held_out: whether to give every fourth topic, to evaluate on, or the other ones.

    Returns:
      One string of about 0.2 or 0.5 MB; topics are in the order of their names.
    """
    topics = sorted(pydoc_data.topics.topics.items())
    chosen = [text for i, (_, text) in enumerate(topics) if (i % 4 == 3) == held_out]
    return "\n\n".join(chosen)


def is_held_out(path):
    """Whether a path inside a standard library belongs to a held-out module or its tests."""
    for part in path.with_suffix("").parts:
        for module in HELD_OUT:
            if part in (module, f"test_{module}") or part.startswith(f"test_{module}_"):
                return True
    return False


def training_documents(libraries, novelty=0.2):
    """Sources of several standard libraries, without near-copies.

    A file is kept if more than `novelty` of its distinct lines occur in no file kept before, so
    that the same module in two versions of Python is mostly read once.

    Args:
      libraries: standard library directories; earlier ones have precedence.
      novelty: share of new lines from which a file is kept.

    Yields:
      Pairs of a path inside its library, and bytes.
    """
    seen = set()
    for library in map(pathlib.Path, libraries):
        for path in sorted(library.rglob("*.py")):
            inside = path.relative_to(library)
            if "site-packages" in inside.parts or is_held_out(inside):
                continue
            text = path.read_bytes()
            lines = {hash(line.strip()) for line in text.splitlines() if len(line.strip()) > 8}
            if START in text or len(lines - seen) <= novelty * len(lines):
                continue
            seen |= lines
            yield inside, text


def join(documents):
    """Documents as one uint8 array, each begun by START."""
    return np.frombuffer(b"".join(START + text for text in documents), np.uint8)


def main(_):
    out = pathlib.Path(_OUT.value)
    train = []
    for path, text in training_documents(_LIBRARY.value):
        train.append(text)
        if len(train) % 500 == 0:
            print(f"{len(train)} files, {sum(map(len, train)) / 1e6:.1f} MB, at {path}")
    held_out = read_modules(library=_LIBRARY.value[0])
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            train=join(train),
            held_out=join(held_out.values()),
            libraries=[pathlib.Path(library).name for library in _LIBRARY.value],
        )
    print(
        f"{out}: {len(train)} files, {sum(map(len, train)) / 1e6:.1f} MB to train on; "
        f"{len(held_out)} modules, {sum(map(len, held_out.values())) / 1e6:.2f} MB held out"
    )


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", ".corpus/stdlib.npz", "File of the corpus.")
    _LIBRARY = flags.DEFINE_multi_string(
        "library",
        [sysconfig.get_path("stdlib")],
        "A standard library directory; repeatable. Held-out text comes from the first.",
    )
    cli.run(main)
