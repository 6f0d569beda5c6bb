"""Refinement of a packed model: unpacked, trained towards the dense one, and packed again."""

import functools
import pathlib
import re
import shutil
import time

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import dsf_jax
import macko_jax
import macko_jax.flax_nnx
from dsf_jax.pipeline.resume import claim, fingerprint
from dsf_jax.refinement.report import BlockReport, RefineReport
from examples.llama import checkpoint
from examples.llama.compression import COPIED, alone_in
from examples.llama.digests import checkpoint_digests, file_digest
from examples.llama.json_file import read_json
from examples.llama.packed import is_matrix, part_names
from examples.llama.stream import Stream, run_block
from examples.records import write_json


def check(packed, dense, out):
    """Raises a ValueError where the directories are not what they should be."""
    if not checkpoint.is_packed(packed):
        raise ValueError(
            f"{packed} holds no packed model; give a directory that examples.compress_llm wrote"
        )
    if checkpoint.is_packed(dense):
        raise ValueError(f"{dense} holds a packed model; give the dense one")
    out = pathlib.Path(out)
    if out.exists() and any(out.samefile(other) for other in (packed, dense)):
        raise ValueError(f"{out} is one of the models that are read; give another directory")
    ours, theirs = map(checkpoint.load_config, (packed, dense))
    if ours != theirs:
        raise ValueError(f"{packed} was not made from {dense}: their config.json differ")
    if (out / "config.json").is_file() and not (out / "report.json").is_file():
        raise ValueError(f"{out} holds another model; give another directory")


def _layouts(packed):
    """The rules by which a packed model was packed: its matrices' encodings, lanes and 8 bits.

    What the two factors of a layer do not share is left to be chosen.
    """
    found = {}
    for i in range(checkpoint.load_config(packed).num_hidden_layers):
        tree = macko_jax.load(checkpoint.part_file(packed, i))
        for names, matrix in traverse_util.flatten_dict(tree, is_leaf=_is_matrix).items():
            if is_matrix(matrix):
                layer = [name for name in names if name not in ("left", "right")]
                path = f"layers/{i}/{'/'.join(map(str, layer))}".removesuffix("/kernel")
                eight = matrix.scales is not None
                layout = {
                    "dtype": jnp.dtype(matrix.values.dtype).name if eight else None,
                    "encoding": matrix.encoding,
                    "lanes": matrix.lanes,
                }
                other = found.get(path, layout)
                found[path] = {k: v if other[k] == v else None for k, v in layout.items()}
    return found


def _is_matrix(path, leaf):
    return is_matrix(leaf)


def refine_checkpoint(
    packed, dense, out, batches, *, dtype, stage="model", values=None, text=None, **training
):
    """Refines a packed model, and writes the result as one.

    Args:
      packed, dense: directories of the packed model and of the dense one.
      out: directory of the result; what a run that goes on needs is in its folder "work".
      batches: tokens [B, T] of each step.
      dtype: what is computed in.
      stage: "model" trains the whole; "block" one block after the other, in the memory of one.
      values: "int8" or "float8_e4m3fn" for 8-bit values; None keeps those of the packed model.
      text: what the record calls the texts.
      **training: keywords of `dsf_jax.refine`, or of `dsf_jax.refine_block`.

    Returns:
      The `dsf_jax.RefineReport`, and the bytes of the files of weights.
    """
    check(packed, dense, out)
    out = pathlib.Path(out)
    layouts = _layouts(packed)
    values = values or next((kept["dtype"] for kept in layouts.values() if kept["dtype"]), None)
    rules = {
        path: {"max_density": 1.0, **layout, "dtype": values} for path, layout in layouts.items()
    }
    refine = _refine_blocks if stage == "block" else _refine_model
    described = {
        "checkpoint": str(packed),
        "teacher": str(dense),
        "text": text,
        "stage": stage,
        "batches": [len(batches), *batches[0].shape],
        "dtype": jnp.dtype(dtype).name,
        "values": values,
        "learning_rate": training.get("learning_rate"),
        "masks": training.get("masks", "fixed"),
    }
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        report = refine(packed, dense, out, batches, rules, dtype=dtype, values=values, **training)
        return report, _finish(packed, out, report, described)


def _finish(packed, out, report, described):
    """Writes what a model has beside its weights, config.json last; the bytes of the weights."""
    for name in COPIED:
        if (pathlib.Path(packed) / name).is_file():
            shutil.copy(pathlib.Path(packed) / name, out)
    size = sum(path.stat().st_size for path in out.glob("packed-*.safetensors"))
    before = pathlib.Path(packed) / "report.json"
    if before.is_file():
        described["compressed"] = read_json(before).get("settings")
    write_json(out / "report.json", {"settings": described | {"bytes": size}} | report.to_dict())
    write_json(out / "config.json", read_json(pathlib.Path(packed) / "config.json"))
    shutil.rmtree(out / "work", ignore_errors=True)
    return size


def _pack(refined, rules):
    """A model or a block packed by the layouts of its layers by path; others stay dense."""
    rules = [macko_jax.Rule(re.escape(path), **layout) for path, layout in rules.items()]
    return dsf_jax.pack(refined, rules=[*rules, macko_jax.Rule(skip=True)])[0]


def _refine_model(packed, dense, out, batches, rules, *, dtype, **training):
    """The report of the whole model, which is written."""
    student = checkpoint.load_packed(packed, dtype=dtype, unpack=True)
    student.config.check_tokens(np.stack(batches))
    refined, report = dsf_jax.refine(
        student,
        batches,
        teacher=checkpoint.load(dense, dtype=dtype),
        work_dir=out / "work",
        **training,
    )
    checkpoint.save_packed(out, _pack(refined, rules))
    return report


def _refine_blocks(packed, dense, out, batches, rules, *, dtype, **training):
    """The report of all blocks, each of which is written as soon as it is refined."""
    if training.pop("held_out", None) is not None:
        raise ValueError("the loss on held-out text is that of a whole model: stage 'model'")
    stored = checkpoint.Checkpoint(dense)
    config, windows = stored.config, np.concatenate(batches)
    config.check_tokens(windows)
    done = _Done(out / "work", packed, stored, batches, rules, dtype, training)
    (out / "config.json").unlink(missing_ok=True)  # until all blocks are there
    model = checkpoint.abstract_model(config, dtype=dtype, param_dtype=stored.dtype())
    embed = stored.read(model.embed, ("embed",))
    hidden = wanted = Stream.of(windows, embed, config, len(batches[0]))
    forward, steps = functools.partial(run_block, config), {}
    for i, abstract in enumerate(model.layers):
        name = f"layers/{i}"
        block = stored.read(abstract, ("layers", str(i)))
        wanted = wanted.behind(block)
        file = checkpoint.part_file(out, i)
        if not done.has(i, file):
            refined, report = dsf_jax.refine_block(
                checkpoint.load_block(packed, i, abstract, unpack=True),
                block,
                hidden.parts,
                targets=wanted.parts,
                forward=forward,
                name=name,
                steps_made=steps,
                work_dir=out / "work" / str(i),
                **training,
            )
            own = {
                p.removeprefix(f"{name}/"): r for p, r in rules.items() if p.startswith(f"{name}/")
            }
            macko_jax.save(file, macko_jax.flax_nnx.to_pure_dict(_pack(refined, own)))
            done.add(i, file, report)
        hidden = hidden.behind(checkpoint.load_block(out, i, abstract, unpack=True))
    for name in part_names(config):
        if not isinstance(name, int):
            shutil.copy(checkpoint.part_file(packed, name), checkpoint.part_file(out, name))
    return done.report()


class _Done:
    """The blocks that are refined, of this run and of one that was killed.

    Args:
      work: directory of what is known of them.
      packed: directory of the packed model.
      stored: the dense `Checkpoint`.
      batches, rules, dtype, training: how blocks are refined and packed.

    Raises:
      ValueError: the directory holds another run, or what it knows is damaged.
    """

    def __init__(self, work, packed, stored, batches, rules, dtype, training):
        self.began, self.path, self.blocks = time.perf_counter(), work / "blocks.json", {}
        names = part_names(stored.config)
        settings = {name: x for name, x in training.items() if name not in ("callback", "mesh")}
        settings |= {"rules": rules, "dtype": jnp.dtype(dtype).name}
        settings["packed"] = [file_digest(checkpoint.part_file(packed, name)) for name in names]
        settings["dense"] = checkpoint_digests(stored)
        claim(work, fingerprint(settings, batches), "models, text or settings")
        if self.path.exists():
            try:
                for block in read_json(self.path)["blocks"]:
                    read = BlockReport(**block["report"]["blocks"][0])
                    rest = block["report"] | {"blocks": (read,)}
                    self.blocks[block["number"]] = block | {"report": RefineReport(**rest)}
            except (LookupError, TypeError) as error:
                raise ValueError(
                    f"{self.path} is damaged ({error!r}); remove {work}, and the run begins anew"
                ) from error

    def has(self, number, file):
        """Whether a block is there as it was written; one that is damaged is refined again."""
        known = self.blocks.get(number)
        return known is not None and file.is_file() and file_digest(file) == known["file"]

    def add(self, number, file, report):
        """Notes a block that is written, of which no more is needed to go on."""
        self.blocks[number] = {"number": number, "file": file_digest(file), "report": report}
        told = [block | {"report": block["report"].to_dict()} for block in self.blocks.values()]
        write_json(self.path, {"blocks": told})
        shutil.rmtree(self.path.parent / str(number))

    def report(self):
        """The report of all blocks."""
        reports = [self.blocks[number]["report"] for number in sorted(self.blocks)]
        stopped = [f"{r.blocks[0].path}: {r.stopped}" for r in reports if r.stopped]
        return RefineReport(
            stage="block",
            steps=max(report.steps for report in reports),
            losses=tuple(loss for report in reports for loss in report.losses),
            blocks=tuple(report.blocks[0] for report in reports),
            parameters=sum(report.parameters for report in reports),
            nonzeros=tuple(map(sum, zip(*(report.nonzeros for report in reports)))),
            seconds=time.perf_counter() - self.began,
            stopped="; ".join(stopped) or None,
        )
