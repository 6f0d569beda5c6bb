"""Real layers with their Gram matrices, and the errors that the published program makes on them."""

import json
from pathlib import Path

import numpy as np


def load_layer(path):
    """Weight `[out, in]`, Gram matrix and the other text's Gram matrix `[in, in]`, float32."""
    with np.load(path) as arrays:
        weight = arrays["W"].astype(np.float32)
        gram = _symmetric(arrays["XX"], weight.shape[1])
        size = np.sqrt(arrays["XXt_diag"])
        other = _symmetric(arrays["XXt_corr"].astype(np.float32), weight.shape[1])
    return weight, gram, other * size * size[:, None]


def _symmetric(packed, size):
    upper = np.zeros((size, size), np.float32)
    upper[np.triu_indices(size)] = packed
    return upper + np.triu(upper, 1).T


def load_reference(data):
    """Reference errors, {(layer, method, density): (error, error on other text)}."""
    entries = json.loads((Path(data) / "reference.json").read_text())
    return {
        (e["layer"], e["method"], e["density"]): (e["relative_output_error"], e["on_other_text"])
        for e in entries
    }
