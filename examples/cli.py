"""How every script begins and ends: its flags are read once, and expected errors take one line."""

import dataclasses
import functools
import json
import re
import sys

from absl import app, flags

import dsf_jax
from dsf_jax.solvers.methods import METHODS

flags.DEFINE_bool("debug", False, "Show the traceback of an error, and not its sentence alone.")
EXPECTED = (ValueError, OSError, ImportError, app.UsageError)


def settings(kind):
    """The flags that are named as the fields of a dataclass, as an instance of it.

    Only a script's `main` calls this; what it calls takes arguments, and so can be called alone.
    """
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(kind)}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def read_options(text):
    """The options that --dsf_options gives."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--dsf_options is not JSON ({error}), got {text!r}") from None
    if not isinstance(options, dict):
        raise ValueError(f"--dsf_options must be a JSON object, got {text!r}")
    return options


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_size(text):
    """The bytes that a size stands for, such as "250MB", "1.5 GB", "64MiB" or "1000000"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found and UNITS.get(found[2].upper() or "B")
    if not unit:
        raise ValueError(
            f"{text!r} is no size; give a number of bytes, or one with a unit among KB, MB, GB, "
            "KiB, MiB and GiB, such as 250MB"
        )
    return int(float(found[1]) * unit)


def read_rule(text):
    """The rule that --rule gives: a path's regular expression, then what is asked for.

    After the expression come `skip`, or `density=NUMBER` and `method=NAME`, with spaces between.
    """
    path, *asked = text.split()
    fields = {}
    for part in asked:
        name, _, value = part.partition("=")
        if part == "skip":
            fields["skip"] = True
        elif name == "density" and re.fullmatch(r"\d*\.?\d+", value):
            fields["density"] = float(value)
        elif name == "method" and value in METHODS:
            fields["method"] = value
        else:
            raise ValueError(
                f"--rule={text!r}: {part!r} is none of skip, density=NUMBER and method=NAME, NAME "
                f"one of {', '.join(METHODS)}"
            )
    return dsf_jax.Rule(path, **fields)


def command(script):
    """The command line of this run, for its record; where the record goes is no part of it."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--out")]
    return " ".join([f"python -m examples.{script}", *arguments])


def run(main):
    """Parses the flags and runs `main`, as `absl.app.run` does.

    Errors that users can mend (a file that is missing or damaged, a setting that does not fit) end
    the script with a sentence and exit code 1; others, and all with --debug, with a traceback.
    """
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["debug"])
    app.run(functools.partial(_run, main))


def _run(main, argv):
    try:
        if argv[1:]:
            raise ValueError(
                f"unexpected argument {argv[1]!r}; every setting is a flag, --NAME=VALUE"
            )
        main(argv)
    except EXPECTED as error:
        if flags.FLAGS["debug"].value:
            raise
        sys.exit(f"error: {error}")
