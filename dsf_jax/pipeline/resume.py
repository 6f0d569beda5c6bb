"""Finished layers on disk, so that a run that was killed goes on where it stopped."""

import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dsf_jax.pipeline.solve import LayerSolution
from macko_jax.io.atomic import replacing


def fingerprint(settings: Mapping[str, Any], *trees: Any) -> str:
    """SHA-256 of settings (as JSON) and of every array in some pytrees."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def claim(path: pathlib.Path, mark: str, differs: str) -> None:
    """Makes a work directory a run's own, by a file with the run's fingerprint.

    Args:
      path: The directory; it is made if there is none.
      mark: The fingerprint.
      differs: What is different in another run, for the error.

    Raises:
      ValueError: The directory is another run's, or holds something else.
    """
    path.mkdir(parents=True, exist_ok=True)
    own = path / "run.json"
    if own.is_file():
        try:
            found = json.loads(own.read_text())["fingerprint"]
        except (ValueError, LookupError, TypeError, RecursionError):
            found = None
        if found != mark:
            raise ValueError(other_run(path, own.name, differs))
        return
    there = sorted(file.name for file in path.iterdir())
    if there:
        raise ValueError(other_run(path, there[0], differs))
    with replacing(own) as temporary:
        temporary.write_text(json.dumps({"fingerprint": mark}))


def other_run(path: pathlib.Path, file: str, differs: str) -> str:
    """What is said of a work directory that holds something else."""
    return (
        f"{path} holds results of another run ({file}): its {differs} were different. Give another "
        "work_dir, or empty this one"
    )


class WorkDirectory:
    """A directory with one safetensors file per finished layer.

    A file which exists is whole (`macko_jax.io.atomic.replacing`). Each carries a checksum of what
    it holds, and the fingerprint of the run: results of another model, other batches or other
    settings are refused, never mixed in.

    Args:
      path: The directory; it is made if there is none.
      mark: The run's fingerprint.

    Raises:
      ValueError: The directory holds results of another run.
    """

    def __init__(self, path: str | os.PathLike[str], mark: str):
        self.path, self.mark = pathlib.Path(path), mark
        self.path.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.path.glob("*.safetensors")):
            found = _metadata(file)
            if found is not None and found.get("fingerprint") != mark:
                differs = "model, batches, method or density"
                raise ValueError(other_run(self.path, file.name, differs))

    def file(self, layer: str) -> pathlib.Path:
        """Where the solution of a layer is kept."""
        # The hash keeps paths apart that differ only in what a file name cannot hold.
        name = re.sub(r"[^A-Za-z0-9._-]+", ".", layer)[-100:]
        return self.path / f"{name}-{hashlib.sha256(layer.encode()).hexdigest()[:8]}.safetensors"

    def load(self, layer: str) -> LayerSolution | None:
        """The finished solution of a layer; None if there is none, or only a damaged file."""
        file = self.file(layer)
        metadata = _metadata(file) if file.exists() else None
        if metadata is None:
            return None
        try:
            values = load_file(file)
        except (SafetensorError, OSError, AttributeError) as error:  # the last: types unknown here
            _warn_of_damage(file, error)
            return None
        found = metadata.pop("checksum", None)
        if metadata.get("layer") != layer or found != fingerprint(metadata, values):
            _warn_of_damage(file, "it does not match its checksum")
            return None
        return LayerSolution(
            product=values["product"],
            left=values.get("left"),
            right=values.get("right"),
            method=metadata["method"],
            nonzeros=int(metadata["nonzeros"]),
            error=float(metadata["error"]),
            seconds=float(metadata["seconds"]),
            compile_seconds=float(metadata.get("compile_seconds", 0)),
        )

    def save(self, layer: str, solution: LayerSolution) -> None:
        """Writes the finished solution of a layer."""
        names = ("product", "left", "right")
        arrays = {n: getattr(solution, n) for n in names if getattr(solution, n) is not None}
        metadata = {
            "fingerprint": self.mark,
            "layer": layer,
            "method": solution.method,
            "nonzeros": str(solution.nonzeros),
            "error": repr(solution.error),
            "seconds": repr(solution.seconds),
            "compile_seconds": repr(solution.compile_seconds),
        }
        metadata["checksum"] = fingerprint(metadata, arrays)
        with replacing(self.file(layer)) as temporary:
            save_file(arrays, temporary, metadata)


def _metadata(file: pathlib.Path) -> dict[str, str] | None:
    """The metadata of a file; None, with a warning, where it is damaged and will be redone."""
    if not file.is_file():  # a pipe would be waited for
        _warn_of_damage(file, "it is no regular file")
        return None
    try:
        with safe_open(file, framework="numpy") as arrays:
            return arrays.metadata() or {}
    except (SafetensorError, OSError) as error:
        _warn_of_damage(file, error)
        return None


def _warn_of_damage(file: pathlib.Path, problem: object) -> None:
    warnings.warn(f"{file} is damaged and its layer is solved again: {problem}", stacklevel=4)
