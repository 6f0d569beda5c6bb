"""Compression of a checkpoint block by block, for models larger than the memory at hand.

The calibration activations enter the first block, and go on from block to block through the packed
weights. At any time memory holds one block, what solving its largest layer takes, and the
activations; or, before the first block and after the last, the embedding or the head. Every
finished block is a file of the packed model, so that a run that was killed goes on where it was.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsf_jax
import macko_jax
import macko_jax.flax_nnx
from dsf_jax import export
from dsf_jax.pipeline.solve import check_method
from dsf_jax.solvers.problem import check_density
from examples.llama import checkpoint
from examples.llama.digests import checkpoint_digests, file_digest
from examples.llama.json_file import read_json
from examples.llama.rope import rotation
from examples.records import write_json
from macko_jax.io.atomic import remove_unfinished

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
LAYERS_OF_BLOCK = 4  # qkv, out, gate_up, down


def calibration_windows(tokens, length, count):
    """`count` windows of a text, evenly spread over it: [count, length] int32."""
    if len(tokens) < length:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens; a window takes {length}. Give a "
            "longer text, or shorter windows"
        )
    starts = np.linspace(0, len(tokens) - length, count).round().astype(int)
    return np.asarray(tokens, np.int32)[starts[:, None] + np.arange(length)]


def calibration_batches(tokens, length, count, batch):
    """The same in a list of at most `batch` windows each, as `dsf_jax` takes them."""
    windows = calibration_windows(tokens, length, count)
    return [windows[first : first + batch] for first in range(0, count, batch)]


def compress_checkpoint(
    source,
    out,
    windows,
    *,
    method,
    density,
    dtype=jnp.float32,
    batch=4,
    encoding=None,
    callback=None,
):
    """Prunes or factorizes a dense checkpoint and writes it packed.

    Each block is compressed by `dsf_jax.compress_model` on the activations that the packed blocks
    before it give, which is what the sequential calibration of the whole model would do.

    Args:
      source: Hugging Face directory.
      out: directory of the packed model, `report.json` beside its parts. config.json comes last.
        Where an earlier run of the same settings was interrupted, it is continued: finished blocks
        are run but not solved again, and of the block at hand neither are finished layers.
      windows: [N, T] calibration tokens.
      method, density: as for `dsf_jax.compress_model`.
      dtype: what activations are computed in; weights keep the checkpoint's.
      batch: most windows at a time.
      encoding: of the packed matrices; None chooses by size.
      callback: called with a `dsf_jax.Progress` after each layer of the model.

    Returns:
      The `dsf_jax.Report` of all layers.

    Raises:
      FileNotFoundError, ValueError: a checkpoint that cannot be read or is packed already, an
        unknown method or density, or a directory that is the checkpoint's own, holds something
        other than a run of these settings, or has another run at work in it.
    """
    began = time.perf_counter()
    check_method(method)
    check_density(density)
    out = pathlib.Path(out)
    stored = _open_source(source, out)
    stored.config.check_tokens(windows)
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        settings = {"method": method, "density": density, "encoding": encoding}
        record = _Record(out / "report.json", settings | _inputs(stored, windows, dtype))
        remove_unfinished(out)
        record.begin()
        progress = _Progress(stored.config, callback)
        model = checkpoint.abstract_model(stored.config, dtype=dtype, param_dtype=stored.dtype())
        save = functools.partial(_save_part, out, stored, model)
        embed = save("embed")
        hidden = [np.asarray(embed(part)) for part in np.split(windows, _batches(windows, batch))]
        del embed
        for i, abstract in enumerate(model.layers):
            if record.has(checkpoint.part_file(out, i), i):
                for layer in record.block(i):
                    progress.add(layer)
            else:
                _compress_block(
                    out,
                    stored,
                    abstract,
                    i,
                    hidden,
                    record,
                    progress,
                    method=method,
                    density=density,
                    encoding=encoding,
                )
            if i + 1 < len(model.layers):
                block = checkpoint.load_block(out, i, abstract, unpack=True)
                hidden = [_advance(block, stored.config, part) for part in hidden]
        for name in ("norm",) if model.head is None else ("norm", "head"):
            save(name)
        _finish(out, stored)
        return record.report(time.perf_counter() - began)


def _open_source(source, out):
    """The dense checkpoint, which `out` must leave as it is."""
    if checkpoint.is_packed(source):
        raise ValueError(
            f"{source} holds a model that is packed already; give the dense checkpoint that it was "
            "made from"
        )
    if out.exists() and out.samefile(source):
        raise ValueError(
            f"{out} is the directory of the checkpoint; give another one for the packed model"
        )
    return checkpoint.Checkpoint(source)


def _inputs(stored, windows, dtype):
    """What a run reads, for the record: a run that goes on must read the same."""
    return {
        "checkpoint": str(stored.directory),
        "files": checkpoint_digests(stored),
        "dtype": jnp.dtype(dtype).name,
        "calibration": hashlib.sha256(windows.tobytes()).hexdigest(),
        "windows": list(windows.shape),
    }


def _finish(out, stored):
    """Copies what a model has beside its weights; config.json comes last."""
    for name in COPIED:
        if (stored.directory / name).is_file():
            shutil.copy(stored.directory / name, out)
    shutil.rmtree(out / "work", ignore_errors=True)
    write_json(out / "config.json", read_json(stored.directory / "config.json"))


@contextlib.contextmanager
def _alone_in(directory):
    """Refuses a second run in the directory, which would remove what the first is writing."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # at most until the process ends
        except BlockingIOError:
            raise ValueError(
                f"another run is at work in {directory}; wait for it, or give another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def _batches(windows, most):
    """The largest number of equal batches' parts: as many windows each as divide them evenly."""
    count = len(windows)
    return count // next(size for size in range(min(most, count), 0, -1) if count % size == 0)


def _save_part(out, stored, model, name):
    """Reads a dense part of the checkpoint, writes it, over a damaged one too, and returns it."""
    part = nnx.clone(getattr(model, name))
    stored.fill(part, (name,))
    macko_jax.save(checkpoint.part_file(out, name), nnx.to_pure_dict(nnx.state(part)))
    return part


def _compress_block(out, stored, abstract, index, hidden, record, progress, *, encoding, **asked):
    """Compresses one block and writes it; its report goes first, so that none is ever lost."""
    prefix = f"layers/{index}"
    block = nnx.clone(abstract)
    stored.fill(block, ("layers", str(index)))
    try:
        compressed = dsf_jax.compress_model(
            block,
            hidden,
            forward=functools.partial(_forward, stored.config),
            execution=dsf_jax.Execution(
                keep_activations="host", work_dir=out / "work" / str(index)
            ),
            callback=lambda step: progress.add(_renamed(step.layer, prefix)),
            **asked,
        )
    except ValueError as error:
        raise ValueError(f"block {index}: {error}") from error
    del block
    record.add(index, [_renamed(layer, prefix) for layer in compressed.report.layers])
    packed, _ = export.pack(compressed.model, rules=macko_jax.Rule(encoding=encoding))
    macko_jax.save(checkpoint.part_file(out, index), macko_jax.flax_nnx.to_pure_dict(packed))
    record.written(checkpoint.part_file(out, index))
    shutil.rmtree(out / "work" / str(index))


def _renamed(layer, prefix):
    return dataclasses.replace(layer, path=f"{prefix}/{layer.path}")


def _forward(config, block, hidden):
    positions = jnp.arange(hidden.shape[1])[None]
    rotary = rotation(positions, config)
    return block(hidden, positions, rotary, None, None)[0]


def _advance(block, config, hidden):
    return np.asarray(_run_block(*nnx.split(block), config, hidden))


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def _run_block(graph, state, config, hidden):
    return _forward(config, nnx.merge(graph, state), hidden)


class _Record:
    """report.json: the settings, what became of each layer, and what each packed block holds."""

    def __init__(self, path, settings):
        self.path, self.settings = path, settings
        self.blocks, self.parts = {}, {}
        if path.is_file():
            self._read()
        self._check_parts()

    def _read(self):
        try:
            found = read_json(self.path)
            earlier, self.parts = dict(found["settings"]), dict(found.get("parts", {}))
            for layer in found["layers"]:
                report = dsf_jax.LayerReport.from_dict(layer)
                self.blocks.setdefault(int(report.path.split("/")[1]), []).append(report)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not the report of a run, or was cut off ({error!r}). Give another "
                "directory, or remove this one"
            ) from error
        short = [i for i, layers in self.blocks.items() if not _is_whole(layers)]
        if short:
            raise ValueError(
                f"{self.path} does not have {LAYERS_OF_BLOCK} layers of block {min(short)}: it was "
                "cut short. Give another directory, or remove this one"
            )
        other = sorted(key for key in self.settings if earlier.get(key) != self.settings[key])
        if other:
            raise ValueError(
                f"{self.path.parent} holds a run with another {', '.join(other)}. Give another "
                "directory, or empty this one"
            )

    def _check_parts(self):
        """Refuses parts that the recorded run did not write."""
        directory = self.path.parent
        parts = {path.name for path in directory.glob("packed-*.safetensors")}
        if self.path.is_file():
            known = ("embed", "norm", "head", *self.blocks)
            parts -= {checkpoint.part_file(directory, name).name for name in known}
        if parts:
            raise ValueError(
                f"{directory} holds {min(parts)} and no {self.path.name} that says which run wrote "
                "it. Give another directory, or remove this one"
            )
        if not self.path.is_file():
            models = ("*.safetensors", "*.safetensors.index.json", "config.json", "work")
            there = sorted(path.name for pattern in models for path in directory.glob(pattern))
            if there:
                raise ValueError(
                    f"{directory} holds {there[0]} and no {self.path.name}: it is the directory of "
                    "something else. Give another one for the packed model"
                )

    def begin(self):
        """Writes the settings before any part, so that those of another run are never taken."""
        if not self.path.is_file():
            write_json(self.path, {"settings": self.settings, "layers": []})

    def has(self, path, index):
        """Whether a block is there as it was written; one that was damaged is solved again."""
        known = self.parts.get(path.name)
        if index not in self.blocks or known is None or not path.is_file():
            return False
        if file_digest(path) == known:
            return True
        warnings.warn(f"{path} is damaged and its block is solved again", stacklevel=2)
        return False

    def written(self, path):
        """Notes what a block's file holds, once it is there."""
        self.parts[path.name] = file_digest(path)
        self._write()

    def block(self, index):
        return [dataclasses.replace(layer, resumed=True) for layer in self.blocks[index]]

    def add(self, index, layers):
        self.blocks[index] = layers
        self._write()

    def _write(self):
        seconds = sum(layer.seconds for block in self.blocks.values() for layer in block)
        described = {"settings": self.settings, "parts": self.parts}
        write_json(self.path, described | self.report(seconds).to_dict())

    def report(self, seconds):
        layers = tuple(layer for index in sorted(self.blocks) for layer in self.blocks[index])
        skipped = {"embed": "an embedding", "head": "the output head"}
        stages = LAYERS_OF_BLOCK * len(self.blocks)  # each of one layer
        return dsf_jax.Report(layers=layers, skipped=skipped, stages=stages, seconds=seconds)


def _is_whole(layers):
    """Whether these are the reports of all layers of a block."""
    return len({layer.path for layer in layers}) == len(layers) == LAYERS_OF_BLOCK


class _Progress:
    """Counts layers of the whole model and estimates the time left from those solved so far."""

    def __init__(self, config, callback):
        self.callback = callback
        self.total = LAYERS_OF_BLOCK * config.num_hidden_layers
        self.index, self.began = 0, None
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        mixed = config.num_attention_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        # Multiplications of each layer's problem: out * in^2, up to a common factor.
        self.left = config.num_hidden_layers * (
            heads * config.head_dim * hidden**2
            + hidden * mixed**2
            + 2 * inner * hidden**2
            + hidden * inner**2
        )
        self.done = 0

    def add(self, layer):
        rows, cols = layer.shape
        work = rows * cols**2
        self.index += 1
        self.left -= work
        seconds_left = None
        if not layer.resumed:
            now = time.perf_counter()
            if self.began is None:
                self.began = now - layer.seconds
            self.done += work
            seconds_left = (now - self.began) * self.left / self.done
        if self.callback is not None:
            self.callback(dsf_jax.Progress(self.index, self.total, layer, seconds_left))
