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
import json
import math
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
from dsf_jax.pipeline.allocation import allocate_densities, probe_errors
from dsf_jax.pipeline.pace import Pace, Task, compile_seconds
from dsf_jax.solvers.methods import METHODS
from examples.llama import checkpoint
from examples.llama.digests import checkpoint_digests, file_digest
from examples.llama.json_file import read_json
from examples.llama.recipe import GIVEN, LAYERS, Recipe
from examples.llama.sizes import END_HEADER, HEADER, Densities, PackedSizes
from examples.llama.stream import Stream, run_block
from examples.records import write_json
from macko_jax.io.atomic import remove_unfinished
from macko_jax.nn.report import LayerReport
from macko_jax.nn.rules import BREAK_EVEN_DENSITY

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
VERSION = 2  # of report.json; a run goes on only where it was begun by this one


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
    source, out, windows, *, dtype=jnp.float32, batch=4, devices=None, callback=None, **recipe
):
    """Prunes or factorizes a dense checkpoint and writes it packed.

    Each block is compressed by `dsf_jax.compress_model` on the activations that the packed blocks
    before it give, which is what the sequential calibration of the whole model would do.

    Args:
      source: Hugging Face directory.
      out: directory of the packed model, `report.json` beside its parts. config.json comes last.
        Where an earlier run of the same settings was interrupted, it is continued: finished blocks
        are run but not solved again, and of the block at hand neither are finished layers.
      windows: [N, T] calibration tokens; None for the method "given", which needs none.
      dtype: what activations are computed in; weights keep the checkpoint's.
      batch: most windows at a time.
      devices: over which the layers of a stage are spread; None takes the first.
      callback: called with a `dsf_jax.Progress` after each layer of the model.
      **recipe: fields of `Recipe`: method, density or target_bytes, rules, values and others.

    Returns:
      The `dsf_jax.Report` of all layers; bytes after are those of the packed matrices.

    Raises:
      FileNotFoundError, ValueError: a checkpoint that cannot be read or is packed already, an
        unknown method or density, a target out of reach, or a directory that is the checkpoint's
        own, holds something other than a run of these settings, or has another run at work in it.
    """
    began = time.perf_counter()
    recipe = Recipe(**recipe)
    out = pathlib.Path(out)
    stored = _open_source(source, out)
    given = recipe.method == GIVEN
    if not given:
        stored.config.check_tokens(windows)
    assigned = recipe.assign(stored.config)
    model = checkpoint.abstract_model(stored.config, dtype=dtype, param_dtype=stored.dtype())
    if given:
        _check_sparse(stored, model, assigned)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        settings = recipe.settings() | _inputs(stored, None if given else windows, dtype)
        record = _Record(out / "report.json", settings, _others(model, assigned))
        remove_unfinished(out)
        run = _Run(out, stored, model, recipe, assigned, record, devices, callback)
        record.begin()
        run.given() if given else run.solved(windows, batch)
        for name in ("norm",) if model.head is None else ("norm", "head"):
            run.save_part(name)
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


def _check_sparse(stored, model, assigned):
    """Raises a ValueError if no layer that may be packed has few enough non-zeros for it."""
    asked = False
    for i, abstract in enumerate(model.layers):
        block = stored.read(abstract, ("layers", str(i)))
        for layer in LAYERS:
            rule, kernel = assigned[f"layers/{i}/{layer}"], _kernel(block, layer)
            if rule is not None and rule.skip:
                continue
            asked = True
            if jnp.count_nonzero(kernel) < BREAK_EVEN_DENSITY * kernel.size:
                return
    if asked:
        raise ValueError(
            f"{stored.directory} has no layer in which fewer than {BREAK_EVEN_DENSITY:g} of the "
            "weights are non-zero: nothing can be packed. Choose a method that prunes it"
        )


def _inputs(stored, windows, dtype):
    """What a run reads, for the record: a run that goes on must read the same."""
    return {
        "checkpoint": str(stored.directory),
        "files": checkpoint_digests(stored),
        "dtype": jnp.dtype(dtype).name,
        "calibration": windows is not None and hashlib.sha256(windows.tobytes()).hexdigest(),
        "windows": windows is not None and list(windows.shape),
    }


def _finish(out, stored):
    """Copies what a model has beside its weights; config.json comes last."""
    for name in COPIED:
        if (stored.directory / name).is_file():
            shutil.copy(stored.directory / name, out)
    shutil.rmtree(out / "work", ignore_errors=True)
    write_json(out / "config.json", read_json(stored.directory / "config.json"))


@contextlib.contextmanager
def alone_in(directory):
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


def array_bytes(part):
    """Bytes of the parameters of a part of a model, concrete or abstract."""
    leaves = jax.tree.leaves(nnx.state(part, nnx.Param))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class _Run:
    """The blocks of one model, one after the other.

    Args:
      out: the directory of the packed model.
      stored: the dense `Checkpoint`.
      model: the abstract model.
      recipe: the `Recipe`.
      assigned: the rule of each layer, as `Recipe.assign` gives it.
      record: the `_Record` of the run.
      devices: over which layers are spread.
      callback: called after each layer.
    """

    def __init__(self, out, stored, model, recipe, assigned, record, devices, callback):
        self.out, self.stored, self.model, self.recipe = out, stored, model, recipe
        self.assigned, self.record, self.devices = assigned, record, devices
        self.layers = self._layers()
        self.progress = _Progress(self.layers, recipe.whole_blocks, callback)
        self.densities = None if recipe.method == GIVEN else self._uniform()
        self.forward = functools.partial(run_block, stored.config)
        self.steps = {}  # of refinements, which blocks that are alike share

    def _layers(self):
        """For each block the (path, shape, method) of its layers that are not skipped."""
        blocks = []
        for i, block in enumerate(self.model.layers):
            shapes = {layer: _kernel(block, layer).shape[::-1] for layer in LAYERS}
            blocks.append([])
            for layer, shape in shapes.items():
                path = f"layers/{i}/{layer}"
                rule = self.assigned[path]
                if rule is None or not rule.skip:
                    blocks[-1].append((path, shape, self.recipe.method_of(rule)))
        return blocks

    def solved(self, windows, batch):
        """Compresses every block on what the packed ones before it give."""
        device = self.devices[0] if self.devices else None
        embed = self.save_part("embed")
        hidden = Stream.of(windows, embed, self.stored.config, batch, device)
        del embed
        densities = self._shared(hidden) if self.recipe.budget == "sensitivity" else self.densities
        refines = self.recipe.refine is not None
        # What the dense blocks make of the windows is held only where it is aimed at.
        written, wanted = [], hidden if refines else None
        for i, abstract in enumerate(self.model.layers):
            found = self.record.has(i)
            dense = self._read(i) if refines or not found else None
            if refines:
                wanted = wanted.behind(dense)
            if found:
                for layer in self.record.block(i):
                    self.progress.add(layer)
                block = checkpoint.load_block(self.out, i, abstract, unpack=True)
            else:
                block = self._compress(i, dense, hidden, wanted, densities.of_block(i, written))
            given = {layer.path: layer.density for layer in self.record.block(i)}
            written.append((given, checkpoint.part_file(self.out, i).stat().st_size))
            if i + 1 < len(self.model.layers):
                hidden = hidden.behind(block)

    def given(self):
        """Packs every block as it is."""
        self.save_part("embed")
        for i in range(len(self.model.layers)):
            if self.record.has(i):
                for layer in self.record.block(i):
                    self.progress.add(layer)
            else:
                began = time.perf_counter()
                self._write(i, self._read(i), [], began)

    def save_part(self, name):
        """Reads a dense part of the checkpoint, writes it, also over a damaged one, returns it."""
        part = self.stored.read(getattr(self.model, name), (name,))
        macko_jax.save(checkpoint.part_file(self.out, name), nnx.to_pure_dict(nnx.state(part)))
        return part

    def _read(self, index):
        return self.stored.read(self.model.layers[index], ("layers", str(index)))

    def _uniform(self):
        """The `Densities` of the layers before a budget is shared out."""
        recipe, layers = self.recipe, self.layers
        asked = {path: self.assigned[path] for block in layers for path, _, _ in block}
        fixed = {path: rule.density for path, rule in asked.items() if rule and rule.density}
        shares = dict.fromkeys(asked, recipe.density) | fixed
        if recipe.target_bytes is None:
            return Densities(shares, fixed, layers)
        sizes = PackedSizes(recipe, self.stored.dtype())
        dense = [array_bytes(block) + HEADER for block in self.model.layers]
        for i, block in enumerate(layers):
            dense[i] -= sum(rows * cols * sizes.dtype.itemsize for _, (rows, cols), _ in block)
        ends = (self.model.embed, self.model.norm, self.model.head)
        ends = sum(array_bytes(part) + END_HEADER for part in ends if part is not None)
        return Densities(shares, fixed, layers, dense, recipe.target_bytes - ends, sizes)

    def _shared(self, hidden):
        """The `Densities` of the layers under a sensitivity budget."""
        uniform = self.densities
        if self.record.shares is None:
            density = self.recipe.density
            if self.recipe.target_bytes is not None:
                density *= uniform.common()
            free = [path for path in uniform.shares if path not in uniform.fixed]
            self.record.shares = self._share(hidden, density, free)
            self.record.write()
        return dataclasses.replace(uniform, shares=uniform.shares | self.record.shares)

    def _share(self, hidden, density, paths):
        """Densities of least summed error, by a pass of the dense model that probes each layer."""
        curves, sizes = {}, {}
        for i in range(len(self.model.layers)):
            block = self._read(i)
            grams = dsf_jax.gram_matrices(block, hidden.parts, forward=self.forward)
            for layer in LAYERS:
                path = f"layers/{i}/{layer}"
                if path in paths:
                    weights = _kernel(block, layer).T[None]
                    curves[path] = probe_errors(weights, grams[layer][None], density, path)
                    sizes[path] = weights.size
            hidden = hidden.behind(block)
        return allocate_densities(curves, sizes, density)

    def _compress(self, index, block, hidden, wanted, densities):
        """Compresses one block and writes it; the block as it now is, dense with zeros.

        Args:
          index: the block's number.
          block: the dense block.
          hidden: the `Stream` before it.
          wanted: the dense model's `Stream` behind it, towards which it is refined, if it is.
          densities: of its layers that are not skipped, by path in the model.
        """
        prefix, began = f"layers/{index}", time.perf_counter()
        if not densities:  # all of its layers are skipped
            self._write(index, block, [], began)
            return block
        work = self.out / "work" / str(index)
        try:
            compressed = dsf_jax.compress_model(
                block,
                hidden.parts,
                rules=self.recipe.block_rules(self.assigned, index, densities),
                values=self.recipe.values,
                forward=self.forward,
                calibration=dsf_jax.Calibration(
                    "one-pass" if self.recipe.whole_blocks else "sequential"
                ),
                execution=dsf_jax.Execution(
                    devices=self.devices,
                    keep_activations=hidden.keep,
                    work_dir=work,
                    work_key=self.record.key(index),
                ),
                callback=lambda step: self.progress.add(_renamed(step.layer, prefix)),
            )
        except ValueError as error:
            raise ValueError(f"block {index}: {error}") from error
        finished = compressed.model
        if self.recipe.refine is not None:
            finished = self._refine(index, finished, block, hidden, wanted)
        self._write(index, finished, compressed.report.layers, began)
        shutil.rmtree(work)
        return finished

    def _refine(self, index, compressed, dense, hidden, wanted):
        """A compressed block trained towards what the dense model has behind its own."""
        refined, report = dsf_jax.refine_block(
            compressed,
            dense,
            hidden.parts,
            targets=wanted.parts,
            forward=self.forward,
            steps=self.recipe.refine.steps,
            learning_rate=self.recipe.refine.rate,
            values=self.recipe.values,
            name=f"layers/{index}",
            steps_made=self.steps,
        )
        self.record.refined[str(index)] = report.blocks[0].to_dict()
        if self.progress.callback is not None:
            print(report.blocks[0], flush=True)
        return refined

    def _write(self, index, block, solved, began):
        """Packs a block and writes it; its report goes first, so that none is ever lost."""
        rules = self.recipe.packing_rules(self.assigned, index)
        packed, packing = export.pack(block, rules=rules)
        sizes = {layer.path: layer for layer in packing.layers}
        if self.recipe.method == GIVEN:
            solved = self._as_given(index, block, packed, sizes, time.perf_counter() - began)
        layers = [
            _renamed(
                dataclasses.replace(
                    layer,
                    nonzeros=sizes[layer.path].nonzeros,
                    bytes_after=sizes[layer.path].bytes_after,
                ),
                f"layers/{index}",
            )
            for layer in solved
        ]
        self.record.add(index, layers)
        macko_jax.save(
            checkpoint.part_file(self.out, index), macko_jax.flax_nnx.to_pure_dict(packed)
        )
        self.record.written(index)
        if self.recipe.method == GIVEN:
            for layer in layers:
                self.progress.add(layer)

    def _as_given(self, index, block, packed, sizes, seconds):
        """Reports of layers that were packed as they are; their error is that of 8-bit values."""
        here = [path.split("/", 2)[2] for path, _, _ in self.layers[index]]
        layers = []
        for layer in here:
            weight = _kernel(block, layer).T
            after = _part(packed, layer)
            matrix = getattr(after, "matrix", None)
            error = 0.0
            if matrix is not None and self.recipe.values:
                error = float(dsf_jax.relative_output_error(weight, macko_jax.decompress(matrix)))
            layers.append(
                dsf_jax.LayerReport(
                    layer,
                    "linear",
                    weight.shape,
                    sizes[layer].nonzeros,
                    weight.nbytes,
                    sizes[layer].bytes_after,
                    method=GIVEN,
                    inner=None,
                    error=error,
                    seconds=seconds / len(here),
                )
            )
        return layers


def _part(block, layer):
    """A layer of a block by its path, such as "mlp/down"."""
    for name in layer.split("/"):
        block = getattr(block, name)
    return block


def _kernel(block, layer):
    """The kernel [in, out] of a layer of a block, concrete or abstract."""
    return _part(block, layer).kernel.get_value()


def _renamed(layer, prefix):
    return dataclasses.replace(layer, path=f"{prefix}/{layer.path}")


def _others(model, assigned):
    """What to report of the matrices of an abstract model that are saved as they are."""
    embedding = model.embed.embedding.get_value()
    reason = "an embedding" if model.head is not None else "an embedding, tied to the head"
    others = [_kept("embed", embedding.shape, embedding.dtype, reason)]
    for i, block in enumerate(model.layers):
        for layer in LAYERS:
            path, kernel = f"layers/{i}/{layer}", _kernel(block, layer)
            rule = assigned[path]
            if rule is not None and rule.skip:
                reason = f"rule {rule.path!r}"
                others.append(_kept(path, kernel.shape[::-1], kernel.dtype, reason))
    if model.head is not None:
        kernel = model.head.kernel.get_value()
        others.append(_kept("head", kernel.shape[::-1], kernel.dtype, "the output head"))
    return tuple(others)


def _kept(path, shape, dtype, reason):
    size = math.prod(shape)
    nbytes = size * dtype.itemsize
    return LayerReport(path, "parameter", shape, size, nbytes, nbytes, reason)


class _Record:
    """report.json: the settings, what became of each finished layer, and what each block holds.

    Attributes:
      parts: digests of the blocks' files by name.
      blocks: the reports of finished layers by block.
      shares: densities by path that a sensitivity budget has found; None before it has.
      refined: what became of each block that was refined, by its number.
    """

    def __init__(self, path, settings, others):
        self.path, self.settings, self.others = path, settings, others
        self.blocks, self.parts, self.shares, self.refined = {}, {}, None, {}
        if path.is_file():
            self._read()
        self._check_parts()

    def _read(self):
        try:
            found = read_json(self.path)
            version = found.get("version")
            earlier = dict(found["settings"])
            if version == VERSION:
                self.shares = found["shares"] and _densities(found["shares"])
                self.parts = dict(found["parts"])
                self.refined = dict(found.get("refined", {}))
                for layer in found["layers"]:
                    report = dsf_jax.LayerReport.from_dict(layer)
                    self.blocks.setdefault(int(report.path.split("/")[1]), []).append(report)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not the report of a run, or was cut off ({error!r}). Give another "
                "directory, or remove this one"
            ) from error
        if version != VERSION:
            raise ValueError(
                f"{self.path} was written by another version of this program (its report has "
                f"version {str(version or 1)[:40]}, this program's {VERSION}), whose runs cannot "
                "be continued. Give another directory, or remove this one"
            )
        short = [i for i in self.blocks if not self._is_whole(i)]
        if short:
            raise ValueError(
                f"{self.path} does not have all layers of block {min(short)}: it was cut short. "
                "Give another directory, or remove this one"
            )
        # As it will be read: tuples are lists in JSON.
        now = json.loads(json.dumps(self.settings))
        other = sorted(key for key in now if earlier.get(key) != now[key])
        if other:
            raise ValueError(
                f"{self.path.parent} holds a run that differs in {', '.join(other)}. Give another "
                "directory, or empty this one"
            )

    def _check_parts(self):
        """Refuses parts that the recorded run did not write."""
        directory = self.path.parent
        parts = {path.name for path in directory.glob("packed-*.safetensors")}
        if self.path.is_file():
            known = ("embed", "norm", "head", *filter(self._is_whole, range(len(parts))))
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
            self.write()

    def write(self):
        """Writes what is known so far."""
        seconds = sum(layer.seconds for block in self.blocks.values() for layer in block)
        head = {"version": VERSION, "settings": self.settings}
        head |= {"shares": self.shares, "parts": self.parts, "refined": self.refined}
        write_json(self.path, head | self.report(seconds).to_dict())

    def _is_whole(self, index):
        """Whether there are reports of all layers of a block, once each."""
        paths = [entry.path for entry in (*self.blocks.get(index, ()), *self.others)]
        here = [path for path in paths if path.startswith(f"layers/{index}/")]
        return len(set(here)) == len(here) == len(LAYERS)

    def has(self, index):
        """Whether a block is there as it was written; one that was damaged is solved again."""
        path = checkpoint.part_file(self.path.parent, index)
        known = self.parts.get(path.name)
        if known is None or not path.is_file() or not self._is_whole(index):
            return False
        if file_digest(path) == known:
            return True
        warnings.warn(f"{path} is damaged and its block is solved again", stacklevel=2)
        return False

    def written(self, index):
        """Notes what a block's file holds, once it is there."""
        path = checkpoint.part_file(self.path.parent, index)
        self.parts[path.name] = file_digest(path)
        self.write()

    def key(self, index):
        """What a block and its inputs are known by: the settings, and the parts before it."""
        parts = [self.parts[checkpoint.part_file("", i).name] for i in range(index)]
        return json.dumps([self.settings, parts])

    def block(self, index):
        """The reports of a block's layers, as those of layers that were read back."""
        return [dataclasses.replace(layer, resumed=True) for layer in self.blocks.get(index, [])]

    def add(self, index, layers):
        self.blocks[index] = layers
        self.write()

    def report(self, seconds):
        layers = tuple(layer for index in sorted(self.blocks) for layer in self.blocks[index])
        return dsf_jax.Report(
            layers=layers, others=self.others, stages=len(layers), seconds=seconds
        )


def _densities(shares):
    """The densities by path that a report has."""
    if any(type(share) not in (int, float) or not 0 <= share <= 1 for share in shares.values()):
        raise ValueError("shares must be densities from 0 to 1")
    return dict(shares)


class _Progress:
    """Counts layers of the whole model; `Pace` estimates the time left.

    Args:
      blocks: for each block the (path, shape, method) of its layers.
      whole_blocks: whether the layers of a block are calibrated together.
      callback: called with a `dsf_jax.Progress` after each layer; None for none.
    """

    def __init__(self, blocks, whole_blocks, callback):
        self.callback = callback
        layers = [layer for block in blocks for layer in block]
        stages = list(filter(None, blocks)) if whole_blocks else [[layer] for layer in layers]
        self.total, self.index, self.last = len(layers), 0, self._now()
        self.pace = Pace(
            [{path: self._task(shape, method) for path, shape, method in stage} for stage in stages]
        )
        self.stage = {path: i for i, stage in enumerate(stages) for path, *_ in stage}
        self.begun = set()  # the stages of which a layer is done

    def _task(self, shape, method):
        work = 1.0 if method == GIVEN else METHODS[method].work(shape)
        return Task(method, (shape, method), work, None)

    @staticmethod
    def _now():
        return np.array([time.perf_counter(), compile_seconds(all_threads=True)])

    def add(self, layer):
        self.index += 1
        now = self._now()
        if self.stage[layer.path] not in self.begun:
            self.begun.add(self.stage[layer.path])
            own = np.array([layer.seconds, layer.compile_seconds])
            passed = np.zeros(2) if layer.resumed else np.maximum(now - self.last - own, 0.0)
            self.pace.calibrated(*passed.tolist())
        if layer.resumed:
            self.pace.resumed(layer.path)
        else:
            self.pace.solved(layer.path, layer.seconds, layer.compile_seconds)
        self.last = now
        if self.callback is not None:
            left = self.pace.seconds_left()
            self.callback(dsf_jax.Progress(self.index, self.total, layer, left))
