"""Files of strangers, by a fuzzer: each loads, or ends in one sentence that names the file."""

import copy
import functools
import json
import pathlib
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from examples.llama import checkpoint, tokenizer
from macko_jax.flax_linen import FactorizedKernel
from tests.cases import LAYOUTS

pytestmark = pytest.mark.once

LLAMA = pathlib.Path(__file__).parent / "data/llama/llama3"
DEEP = "[" * 50_000  # written as it is
ODD = [
    *[None, True, False, 0, -1, 1, 2, 3.5, 2**31, 2**63, -(2**70), float("nan"), float("inf")],
    *["", "x", "1", "float8_e4m3fn", "int64", "complex64", "two_bank", "banked", "__metadata__"],
    *["../model.safetensors", "/etc/passwd", "a\x00b", [], [1], [[]], {}, {"a": 1}, DEEP],
]


def nodes(tree, path=()):
    """The paths of all nodes of a JSON tree."""
    yield path
    items = enumerate(tree) if isinstance(tree, list) else tree.items()
    for key, child in items if isinstance(tree, list | dict) else ():
        yield from nodes(child, (*path, key)) if isinstance(child, list | dict) else [(*path, key)]


def mutate_json(rng, tree) -> str:
    """The text of a JSON tree in which one to three nodes are odd, gone, or somewhere else."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.integers(1, 4)):
        paths = list(nodes(tree))
        *way, last = paths[rng.integers(len(paths))] or (None,)
        if last is None:
            continue
        parent = tree
        for key in way:
            parent = parent[key]
        kind = rng.integers(4)
        if kind == 0:
            del parent[last]
        elif kind == 1:  # another node of this tree
            other = tree
            for key in paths[rng.integers(len(paths))]:
                other = other[key]
            parent[last] = copy.deepcopy(other)
        else:
            parent[last] = ODD[rng.integers(len(ODD))]
        if rng.random() < 0.1 and isinstance(parent, dict):
            parent[str(ODD[rng.integers(len(ODD))])] = 1
    return json.dumps(tree).replace(json.dumps(DEEP), DEEP)


def mutate_bytes(rng, data: bytes) -> bytes:
    """Data with some bytes changed, cut off, doubled, or swapped."""
    data = bytearray(data)
    kind = rng.integers(4)
    at = int(rng.integers(len(data)))
    if kind == 0:
        for i in rng.integers(len(data), size=rng.integers(1, 4)):
            data[i] ^= 1 << rng.integers(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[at : at + 64]
    else:
        data[at : at + 8] = rng.bytes(8)
    return bytes(data)


def ends_well(read, path) -> bool:
    """Whether what `path` names loads; fails unless it does or is refused by name."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error), f"no file is named: {error!r}"
        assert "\n" not in str(error) or len(str(error)) < 2000
        return False
    return True


def packed_trees():
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((5, 40)) < 0.4, rng.standard_normal((5, 40)), 0)
    for i, (encoding, lanes) in enumerate(LAYOUTS):
        options = dict(encoding=encoding, lanes=lanes, dtype=[None, "int8", "float8_e4m3fn"][i % 3])
        matrix = macko_jax.compress(weight.astype(np.float16), capacity=40, **options)
        stack = jax.tree.map(lambda a: jnp.stack([a, a]), matrix)
        yield {
            "layers": [{"kernel": matrix, "bias": jnp.ones(5)}, (stack, None, 3)],
            "pair": FactorizedKernel(matrix[0:5], macko_jax.compress(np.eye(40, dtype="float32"))),
            1: {"key": jax.random.key(0), "flag": True},
        }


def described(text: str, version: int) -> dict[str, str]:
    """The metadata of a packed file of version 1 or 2, for the JSON text of its tree."""
    if version == 1:
        return {"format": "macko_jax", "version": "1", "tree": text, "crc32": checksum(text)}
    try:
        plain = json.dumps(json.loads(text), separators=(",", ":"))
    except (RecursionError, ValueError):  # too deep, or a key that is no string
        plain = text
    return {"macko_jax": f'{{"version":"2","crc32":"{checksum(plain)}","tree":{text}}}'}


def checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def rebuilt(data: bytes, edit, version) -> bytes:
    """A packed file whose tree or tensors are edited, with every checksum made right."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = bytearray(data[8 + length :])
    tree = json.dumps(json.loads(header["__metadata__"]["macko_jax"])["tree"])
    header["__metadata__"] = described(edit(tree, header, body), version)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def edit_tree(rng):
    return lambda tree, header, body: mutate_json(rng, json.loads(tree))


def edit_tensor(rng):
    """Changes some numbers of one tensor, and its checksum in the tree."""

    def edit(tree, header, body):
        names = [name for name in header if name != "__metadata__"]
        name = names[rng.integers(len(names))]
        begin, end = header[name]["data_offsets"]
        if begin == end:
            return tree
        old = f"{zlib.crc32(body[begin:end]):08x}"
        for at in rng.integers(begin, end, size=rng.integers(1, 4)):
            body[at] = rng.choice([0, 1, 127, 128, 255, body[at] ^ 1])
        return tree.replace(old, f"{zlib.crc32(body[begin:end]):08x}")

    return edit


def packed_mutants(rng, count, folder):
    """Mutated packed files, each of a kind by turns."""
    whole = []
    for i, tree in enumerate(packed_trees()):
        macko_jax.save(folder / f"whole{i}", tree)
        whole.append((folder / f"whole{i}").read_bytes())
    for i in range(count):
        data = whole[i % len(whole)]
        edit = (None, edit_tree, edit_tensor)[i // len(whole) % 3]
        yield mutate_bytes(rng, data) if edit is None else rebuilt(data, edit(rng), 1 + i % 5 % 2)


def fuzz_packed(count, folder, seed):
    rng, path, loaded = np.random.default_rng(seed), folder / "mutant.safetensors", 0
    for data in packed_mutants(rng, count, folder):
        path.write_bytes(data)
        loaded += ends_well(functools.partial(macko_jax.load, path), path)
    return loaded


def fuzz_directories(count, folder, seed):
    rng, loaded = np.random.default_rng(seed), 0
    model = folder / "model"
    shutil.copytree(LLAMA, model)
    shutil.copy(LLAMA.parent / "tokenizer.json", model)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tensors = checkpoint.Checkpoint(model)._stored
    index = {"weight_map": {name: "model.safetensors" for name in tensors}}
    (model / checkpoint.INDEX).write_text(json.dumps(index))
    names = ["config.json", checkpoint.INDEX, "generation_config.json"]
    names += ["model.safetensors", "tokenizer.json"]

    def read():
        checkpoint.Checkpoint(model)
        tokenizer.load_tokenizer(model, 64)

    assert ends_well(read, model)
    for i in range(count):
        path = model / names[i % len(names)]
        whole = path.read_bytes()
        if path.suffix == ".json" and i % 3:
            path.write_text(mutate_json(rng, json.loads(whole)), errors="surrogatepass")
        else:
            path.write_bytes(mutate_bytes(rng, whole))
        loaded += ends_well(read, model)
        path.write_bytes(whole)
    return loaded


def test_a_few_mutations(tmp_path):
    assert 0 < fuzz_packed(60, tmp_path, seed=0) < 60


def test_a_few_mutations_of_a_model_directory(tmp_path):
    pytest.importorskip("tokenizers")
    assert 0 < fuzz_directories(60, tmp_path, seed=0) < 60


@pytest.mark.slow
def test_two_thousand_mutations(tmp_path):
    pytest.importorskip("tokenizers")
    assert fuzz_packed(1200, tmp_path, seed=1) < 1200
    assert fuzz_directories(800, tmp_path, seed=1) < 800
