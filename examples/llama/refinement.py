"""Refinement of a packed model: unpacked, trained towards the dense one, and packed again."""

import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import dsf_jax
import macko_jax
from examples.llama import checkpoint
from examples.llama.compression import COPIED
from examples.llama.json_file import read_json
from examples.llama.packed import is_matrix
from examples.llama.rope import rotation
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


def _by_blocks(model, tokens):
    """The logits of a `Llama` that calls each block by itself, where `refine` can see it."""
    x = model.embed(tokens)
    positions = jnp.arange(tokens.shape[1])[None]
    rotary = rotation(positions, model.config)
    for block in model.layers:
        x, _ = block(x, positions, rotary, None, None)
    return model.logits(model.norm(x))


def refine_checkpoint(
    packed, dense, out, batches, *, dtype, values=None, held_out=None, text=None, **training
):
    """Refines a packed model, and writes the result as one.

    Args:
      packed, dense: directories of the packed model and of the dense one.
      out: directory of the result; what a run that goes on needs is in its folder "work".
      batches: tokens [B, T] of each step.
      dtype: what is computed in.
      values: "int8" or "float8_e4m3fn" for 8-bit values; None keeps those of the packed model.
      held_out: batches on which the loss is measured as well.
      text: what the record calls the texts.
      **training: keywords of `dsf_jax.refine`.

    Returns:
      The `dsf_jax.RefineReport`, and the bytes of the files of weights.
    """
    check(packed, dense, out)
    out = pathlib.Path(out)
    layouts = _layouts(packed)
    values = values or next((kept["dtype"] for kept in layouts.values() if kept["dtype"]), None)
    student = checkpoint.load_packed(packed, dtype=dtype, unpack=True)
    student.config.check_tokens(np.stack(batches))
    refined, report = dsf_jax.refine(
        student,
        batches,
        teacher=checkpoint.load(dense, dtype=dtype),
        values=values,
        held_out=held_out,
        forward=_by_blocks,
        work_dir=out / "work",
        **training,
    )
    rules = [
        macko_jax.Rule(re.escape(path), max_density=1.0, **(layout | {"dtype": values}))
        for path, layout in layouts.items()
    ]
    model, packing = dsf_jax.pack(refined, rules=[*rules, macko_jax.Rule(skip=True)])
    size = checkpoint.save_packed(out, model)
    for name in COPIED:
        if (pathlib.Path(packed) / name).is_file():
            shutil.copy(pathlib.Path(packed) / name, out)
    described = {
        "checkpoint": str(packed),
        "teacher": str(dense),
        "text": text,
        "stage": training.get("stage", "model"),
        "batches": [len(batches), *batches[0].shape],
        "dtype": jnp.dtype(dtype).name,
        "values": values,
        "learning_rate": training.get("learning_rate"),
        "masks": training.get("masks", "fixed"),
        "bytes": size,
        "density": packing.density,
    }
    before = pathlib.Path(packed) / "report.json"
    if before.is_file():
        described["compressed"] = read_json(before).get("settings")
    write_json(out / "report.json", {"settings": described} | report.to_dict())
    shutil.rmtree(out / "work", ignore_errors=True)
    return report, size
