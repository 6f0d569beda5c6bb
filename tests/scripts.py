"""Scripts, run as `python -m` runs them, but in this process, where JAX has started already."""

import contextlib
import io
import runpy
import shlex
import sys
from typing import NamedTuple
from unittest import mock

from absl import flags


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(script, *arguments, check=True) -> Done:
    """What `python -m examples.SCRIPT ARGUMENTS` prints, and how it ends; `check` wants success.

    Each argument is some of the command line, as a shell reads it.
    """
    command = [f"examples.{script}", *shlex.split(" ".join(arguments))]
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out):
        try:
            with contextlib.redirect_stderr(err):
                runpy.run_module(command[0], run_name="__main__")
        except SystemExit as end:
            message = end.code if isinstance(end.code, str) else ""
            done = Done(1 if message else end.code or 0, out.getvalue(), err.getvalue() + message)
        finally:  # the next script may define flags of the same names
            for flag in list(flags.FLAGS.flags_by_module_dict().get(command[0], [])):
                delattr(flags.FLAGS, flag.name)
            flags.FLAGS.unparse_flags()
    assert not (check and done.returncode), done
    return done
