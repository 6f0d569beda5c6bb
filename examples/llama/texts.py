"""Texts that models are calibrated and refined on: files, what Python has, or the model's own."""

import numpy as np

from examples import files, stdlib_text
from examples.llama import checkpoint, evaluation
from examples.llama import tokenizer as tokenizers
from examples.llama.compression import calibration_windows
from examples.llama.own_text import own_windows

OWN = "self"


def read_windows(names, directory, out, count, length):
    """Windows of the texts that --calibration names, in turn one of each.

    Args:
      names: files, or "self" for the dense model's own text; none for what comes with Python.
      directory: of the dense model.
      out: directory in which the model's own text is kept.
      count: windows of each text, evenly spread over it.
      length: tokens of each; None takes the model's positions, at most 2048.

    Returns:
      [len(names or [None]) * count, length] int32.
    """
    config = checkpoint.load_config(directory)
    length = evaluation.window_length(length, config)
    tokenizer = tokenizers.load_tokenizer(directory, config.vocab_size)

    def windows(name):
        if name == OWN:
            return own_windows(directory, out, count, length)
        return calibration_windows(tokenizer.encode(read_text(name, config)), length, count)

    each = [windows(name) for name in names or (None,)]
    return np.stack(each, axis=1).reshape(-1, length)


def split_steps(windows, batch):
    """The windows [batch, length] of each step: all where there are fewer; a rest is left out."""
    whole = max(1, len(windows) // batch)
    return [part.copy() for part in np.split(windows[: whole * batch], whole)]


def read_text(name, config):
    """The text of a file, or by default one that comes with Python and suits the model."""
    if name:
        return files.read_text(name)
    if config.vocab_size == 256:
        modules = stdlib_text.read_modules(stdlib_text.CALIBRATION)
        return "\0".join(module.decode() for module in modules.values())
    return stdlib_text.read_topics(held_out=False)
