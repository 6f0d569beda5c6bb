"""Layers that the tests of `dsf_jax` share: real ones, small ones and hard ones."""

from functools import cache
from pathlib import Path

import numpy as np

from examples.benchmarks import layers

DATA = Path(__file__).parent / "data" / "dsf_layers"


@cache
def real_layer(name):
    """Weight, Gram matrix and the other text's Gram matrix of a stored layer."""
    return layers.load_layer(DATA / f"{name}.npz")


@cache
def reference(layer, method, density):
    """Reference relative output error on the calibration text."""
    return layers.load_reference(DATA)[layer, method, density][0]


def small_layer(rows=12, cols=16, seed=0, samples=200):
    """A random weight `[rows, cols]` and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, cols)).astype(np.float32)
    mixing = rng.standard_normal((cols, cols)) * np.linspace(0.1, 1, cols)
    inputs = rng.standard_normal((samples, cols)) @ mixing
    return weight, (inputs.T @ inputs).astype(np.float32)


def hard_layers():
    """{name: (weight, gram)} of inputs on which a careless solver breaks."""
    rng = np.random.default_rng(3)
    weight, gram = small_layer()
    dead = gram.copy()
    dead[[0, 5], :] = dead[:, [0, 5]] = 0
    few = rng.standard_normal((3, 16)).astype(np.float32)
    correlation = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    return {
        "zero weight": (np.zeros_like(weight), gram),
        "zero gram": (weight, np.zeros_like(gram)),
        "dead inputs": (weight, dead),
        "rank-deficient gram": (weight, few.T @ few),
        "slightly indefinite gram": (
            weight,
            correlation
            - 1.02 * np.min(np.linalg.eigvalsh(correlation)) * np.eye(16, dtype=np.float32),
        ),
        "signs": (np.sign(weight), gram),
        "constant": (np.ones_like(weight), None),
        "rank one": (weight[:, :1] * weight[:1], gram),
        "tiny": (weight * 1e-20, gram * 1e-25),
        "huge": (weight * 1e15, gram * 1e20),
        "one row": (weight[:1], gram),
        "one column": (weight[:, :1], gram[:1, :1]),
        "one entry": (weight[:1, :1], gram[:1, :1]),
    }
