"""Saving and loading: exact round trips, and no broken file is ever accepted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import macko_jax
from macko_jax import MackoMatrix
from macko_jax.format import cards
from macko_jax.io import checkpoint
from tests.cases import LAYOUTS


def matrix(rows=6, cols=70, density=0.4, dtype=jnp.float32, seed=0, **options):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, cols)) * (rng.random((rows, cols)) < density)
    return macko_jax.compress(jnp.asarray(weight, dtype), **options)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        if isinstance(b, jax.Array | np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(
                np.asarray(a).reshape(-1).view(np.uint8), np.asarray(b).reshape(-1).view(np.uint8)
            )
        else:
            assert type(a) is type(b) and a == b


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tree.safetensors"


@pytest.mark.parametrize(
    "layout, dtype", list(zip(LAYOUTS, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float16)))
)
def test_matrix_round_trip(path, layout, dtype):
    encoding, lanes = layout
    expected = matrix(dtype=dtype, encoding=encoding, lanes=lanes)
    macko_jax.save(path, expected)
    found = macko_jax.load(path)
    assert isinstance(found, MackoMatrix) and isinstance(found.values, jax.Array)
    assert_same(found, expected)
    if dtype == jnp.float16:  # the same arrays give the same product
        x = jnp.linspace(-1, 1, 70, dtype=dtype)
        np.testing.assert_array_equal(found @ x, expected @ x)


DTYPES = [
    *(np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float16),
    *(np.float32, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


def test_tree_round_trip(path):
    stacked = [matrix(seed=seed, encoding="bitmask", lanes=1, capacity=40) for seed in range(3)]
    weight = np.where(np.arange(420).reshape(6, 70) % 3, 0, 1.5).astype(np.float16)
    expected = {
        "stack": jax.tree.map(lambda *a: jnp.stack(a), *stacked),
        "without elements": [matrix(density=0.0), matrix(1, 1, 1.0), matrix(rows=0)],
        "8 bits": [macko_jax.compress(weight, dtype=d) for d in ("int8", "float8_e4m3fn")],
        "dtypes": [jnp.asarray(np.arange(12).reshape(3, 4).astype(d)) for d in DTYPES],
        "wide": [np.array([2**53 - 1, 1], d) for d in (np.int64, np.uint64, np.float64)],
        "bits": jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.0], jnp.float32),
        "layers": {0: {"kernel": matrix()}, 1: [matrix(seed=1), (matrix(seed=2), None)]},
        "config": {"name": "näme", "width": 128, "rate": 1e-4, "tied": True, "window": None},
        "strings": {"1": jnp.arange(3)},
        "integers": {1: jnp.float32(2.5), -2: jnp.ones(())},
        "empty": {},
        "nothing": jnp.zeros((0, 4)),
        "a/b": jnp.ones(2),
        "a": {"b": jnp.zeros(3)},
        "host": np.ones((2, 3), np.float32),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
    }
    macko_jax.save(path, expected)
    found = macko_jax.load(path)
    assert list(found) == sorted(expected)
    assert found["empty"] == {} and found["config"] == expected["config"]
    assert found["layers"][1][1][1] is None
    assert_same(found, expected)


def test_other_readers_can_look_inside(path):
    expected = {"layers": {0: matrix()}, "bias": jnp.arange(3.0)}
    macko_jax.save(path, expected)
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == {
            "bias",
            "layers/0.values",
            "layers/0.codes",
            "layers/0.row_offsets",
            "layers/0.starts",
        }
        np.testing.assert_array_equal(file.get_tensor("bias"), expected["bias"])
        assert json.loads(file.metadata()["macko_jax"])["version"] == "2"


def test_existing_file_is_replaced_and_nothing_is_left_behind(path):
    for value in (1.0, 2.0):
        macko_jax.save(str(path), {"x": jnp.full(4, value)})
        np.testing.assert_array_equal(macko_jax.load(str(path))["x"], np.full(4, value))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    macko_jax.save(path, {"x": jnp.ones(4)})

    def write_half(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", write_half)
    with pytest.raises(OSError, match="no space"):
        macko_jax.save(path, {"x": jnp.zeros(4)})
    np.testing.assert_array_equal(macko_jax.load(path)["x"], np.ones(4))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.once
def test_equal_trees_give_equal_bytes(path):
    tree = {"b": matrix(dtype=jnp.bfloat16), "a": [jnp.ones(3), jnp.arange(5, dtype=jnp.int8)]}
    macko_jax.save(path, tree)
    first = path.read_bytes()
    other = dict(reversed(tree.items()))
    for _ in range(8):  # safetensors writes several entries of metadata in an order of chance
        for equal in (tree, other):
            macko_jax.save(path, equal)
            assert path.read_bytes() == first


def test_tensors_are_aligned_and_any_name_is_allowed(path):
    expected = {
        "a": jnp.arange(3, dtype=jnp.int8),
        "__metadata__": jnp.arange(5.0),
        "z": jnp.eye(2),
    }
    macko_jax.save(path, expected)
    assert_same(macko_jax.load(path), expected)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % {"I8": 1, "F32": 4}[
                entry["dtype"]
            ] == 0


def test_save_names_the_place_of_what_it_cannot_store(path):
    with pytest.raises(TypeError, match="the object at 'a/1'(.|\n)*flax_nnx.to_pure_dict"):
        macko_jax.save(path, {"a": [1, object()]})
    with pytest.raises(TypeError, match=r"array of int4 at 'x'; allowed are bool, int8"):
        macko_jax.save(path, {"x": jnp.ones(3, jnp.int4)})
    with pytest.raises(TypeError, match=r"has the key \(1, 2\); keys are strings or integers"):
        macko_jax.save(path, {"x": {(1, 2): jnp.ones(3)}})
    with pytest.raises(FileNotFoundError, match="directory .*missing does not exist"):
        macko_jax.save(path.parent / "missing" / "tree", {})
    assert not list(path.parent.iterdir())


def test_missing_and_foreign_files(path):
    with pytest.raises(FileNotFoundError, match="tree.safetensors"):
        macko_jax.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        macko_jax.load(path)
    path.write_text("a text\n" * 100)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        macko_jax.load(path)
    safetensors.numpy.save_file({"x": np.ones(3)}, path)
    with pytest.raises(ValueError, match="metadata has no entry 'macko_jax'"):
        macko_jax.load(path)


def test_another_version(path):
    macko_jax.save(path, {"x": jnp.ones(3)})
    rewrite(path, lambda tensors, description: description.update(version="3"))
    with pytest.raises(ValueError, match="version '3', and this macko_jax reads versions 1 and 2"):
        macko_jax.load(path)


def test_files_of_version_1_are_read(path):
    expected = {"m": matrix(), "x": [jnp.ones(3), None, 2.5, "näme"]}
    macko_jax.save(path, expected)

    def write_as_version_1(tensors, description):
        former = description | {"format": "macko_jax", "version": "1"}
        safetensors.numpy.save_file(tensors, path, former)

    change_file(path, write_as_version_1)
    assert_same(macko_jax.load(path), expected)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"[6,70]", b"[7,70]"))
    with pytest.raises(ValueError, match="does not match its checksum"):
        macko_jax.load(path)


def change_file(path, change):
    """Give `change` the tensors of a file, and what its metadata says, the tree as JSON text."""
    with safetensors.safe_open(path, framework="np") as file:
        description = json.loads(file.metadata()["macko_jax"])
    description["tree"] = json.dumps(description["tree"], separators=(",", ":"))
    change(safetensors.numpy.load_file(path), description)


def rewrite(path, change):
    """Read a file with safetensors, change its tensors and description, and write it again."""

    def write(tensors, description):
        change(tensors, description)
        description["tree"] = json.loads(description["tree"])
        safetensors.numpy.save_file(tensors, path, {"macko_jax": json.dumps(description)})

    change_file(path, write)


def test_changed_tensors_and_tree(path):
    def flip(tensors, description):
        tensors["m.values"][3] += 1

    def remove(tensors, description):
        del tensors["x"]

    def add(tensors, description):
        tensors["y"] = np.ones(3)

    def edit(tensors, description):
        description["tree"] = description["tree"].replace("[6,70]", "[7,70]")

    for change, message in [
        (flip, "'m.values' do not match their checksum"),
        (remove, "missing"),
        (add, "does not mention: .'y'"),
        (edit, "description of its tree"),
    ]:
        macko_jax.save(path, {"m": matrix(), "x": jnp.ones(3)})
        rewrite(path, change)
        with pytest.raises(ValueError, match=message):
            macko_jax.load(path)


@pytest.mark.once
def test_every_truncation_is_refused(path):
    macko_jax.save(path, {"m": matrix(3, 20), "x": jnp.ones(3)})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="tree.safetensors"):
            macko_jax.load(path)


@pytest.mark.once
def test_a_changed_byte_never_changes_the_tree(path):
    expected = {"m": matrix(3, 20), "x": jnp.ones(3)}
    macko_jax.save(path, expected)
    whole = bytearray(path.read_bytes())
    refused = 0
    rng = np.random.default_rng(0)
    for position in range(len(whole)):
        changed = whole.copy()
        changed[position] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            assert_same(macko_jax.load(path), expected)
        except ValueError:
            refused += 1
    assert refused > 0.9 * len(whole)  # the rest is white space and the like


def test_a_matrix_that_contradicts_itself_is_refused(path):
    whole = matrix()
    macko_jax.save(path, {"layer": dataclasses.replace(whole, values=whole.values[:-8])})
    with pytest.raises(ValueError, match="Cannot load .*tree.safetensors"):
        macko_jax.load(path)


def rename_encoding(path, old: str, new: str) -> None:
    def change(tensors, description):
        description["tree"] = description["tree"].replace(
            f'"encoding":"{old}"', f'"encoding":"{new}"'
        )
        description["crc32"] = checkpoint._crc32(description["tree"].encode())

    rewrite(path, change)


def test_files_with_the_former_name_of_two_bank_are_read(path):
    expected = matrix(encoding="two_bank", lanes=2)
    macko_jax.save(path, {"layer": expected})
    rename_encoding(path, "two_bank", "choice")
    found = macko_jax.load(path)["layer"]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("encoding", ["delta3", "banked"])
def test_former_encodings_are_refused_with_the_cure(path, encoding):
    macko_jax.save(path, {"layer": matrix(encoding="delta4", lanes=2)})
    rename_encoding(path, "delta4", encoding)
    with pytest.raises(ValueError, match=f"'{encoding}'.* macko_jax 0.1 .*compress.* pack"):
        macko_jax.load(path)


@pytest.mark.parametrize(
    "tree",
    [
        {"odd": 1},
        {"array": "x"},
        {"matrix": {}, "shape": [1, 2]},
        [],
        3,
        {"list": 4},
        {"matrix": 3},
        {"array": "x", "dtype": "object", "crc32": "{crc}"},
        {"dict": [["a"]]},
        {"dict": [[[], {}]]},
        {"dict": [[True, {"array": "x", "dtype": "float32", "crc32": "{crc}"}]]},
        {"array": "x", "dtype": "float8", "crc32": "{crc}"},
    ],
)
def test_a_forged_description_is_refused(path, tree):
    """Also with a valid checksum a description that makes no sense is a ValueError."""
    macko_jax.save(path, {"x": jnp.ones(3)})

    def forge(tensors, description):
        crc = checkpoint._crc32(tensors["x"].view(np.uint8))
        text = json.dumps(tree, separators=(",", ":"))
        description["tree"] = text.replace("{crc}", crc)
        description["crc32"] = checkpoint._crc32(description["tree"].encode())

    rewrite(path, forge)
    with pytest.raises(ValueError, match="Cannot load"):
        macko_jax.load(path)


@pytest.mark.once
def test_what_is_packed_for_a_cpu_is_packed_anew_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv(cards.VARIABLE, raising=False)
    monkeypatch.setattr(cards, "live", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(8, 64)) * (rng.random((8, 64)) < 0.4)).astype(np.float16)
    single, eight = macko_jax.compress(weight), macko_jax.compress(weight, dtype="int8")
    stack = jax.tree.map(lambda array: jnp.stack([array, array]), single)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    split = macko_jax.shard(single, NamedSharding(mesh, P("model", None)))
    tree = {"single": single, "eight": eight, "stack": stack, "split": split}
    assert {(m.encoding, m.lanes) for m in tree.values()} == {("bitmask", 1)}
    path = tmp_path / "tree.safetensors"
    macko_jax.save(path, tree)
    assert_same(macko_jax.load(path, mesh), tree)
    monkeypatch.setattr(cards, "live", lambda: cards.H200)
    for place in (None, mesh):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            loaded = macko_jax.load(path, place)
        for name, found in loaded.items():
            assert found.encoding in ("delta4", "two_bank")
            macko_jax.validate(found.join() if name == "split" and place else found)
            dense, expected = (
                macko_jax.decompress(m.join() if hasattr(m, "join") else m)
                for m in (found, tree[name])
            )
            assert_same(dense, expected)
