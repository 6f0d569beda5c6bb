"""Versioned, checked files of pytrees with MackoMatrix leaves: safetensors with JSON metadata.

A file is an ordinary safetensors file whose metadata has one entry, "macko_jax", with the JSON of

    version   "2"
    crc32     CRC-32 of the JSON of the tree, without white space
    tree      nested dicts, lists and tuples; each array leaf names its tensor, its dtype and the
              CRC-32 of its bytes; a MackoMatrix names its arrays and carries its shape, encoding
              and lanes; a ShardedMatrix as well, with stacked arrays, its axes, which dimension
              they split, and its parts; a FactorizedKernel has two such leaves

so that any safetensors reader can look into it, and a broken file gives an error and never a wrong
product. In files of version 1 each of these is an entry of the metadata, beside "format". Dtypes
that safetensors' NumPy reader does not know (the 8-bit floats) are stored as bytes.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from macko_jax.format.factors import FactorizedKernel
from macko_jax.format.matrix import MackoMatrix, validate
from macko_jax.format.repack import for_here
from macko_jax.format.sharded import ShardedMatrix, check_is_here, place
from macko_jax.io.atomic import replacing

FORMAT = "macko_jax"
VERSION = "2"

METADATA = "__metadata__"  # no tensor of a safetensors file has this name

MATRIX_ARRAYS = ("values", "codes", "row_offsets", "starts", "scales")

NATIVE_DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
)
# These are stored as uint8.
BYTE_DTYPES = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)


def save(path: str | os.PathLike, tree: Any) -> None:
    """Save a pytree of arrays and MACKO matrices to one file.

    The file is written beside its place and then renamed (`io.atomic.replacing`), so that `path`
    never holds half a file, and threads that save to one path do not disturb each other. Equal
    trees give equal bytes.

    Args:
        path: the file; `.safetensors` is the customary suffix. An existing one is replaced.
        tree: nested dicts (keys: strings and integers), lists and tuples. Leaves are arrays of
            booleans, integers or floats, typed PRNG keys, `MackoMatrix` (also with stacked arrays),
            `ShardedMatrix`, `FactorizedKernel`, and plain None, bool, int, float and str.

    Raises:
        FileNotFoundError: if the directory of `path` does not exist.
        TypeError: for a node or leaf of another type; the message names its place in the tree.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot save {path}: the directory {path.parent} does not exist")
    tensors: dict[str, np.ndarray] = {}
    described = _encode(tree, (), functools.partial(_store, tensors))
    checksum = _crc32(_to_json(described).encode())
    # In one entry, since the library writes several in an order that is left to chance.
    text = _to_json({"version": VERSION, "crc32": checksum, "tree": described})
    with replacing(path) as temporary:
        save_file(tensors, temporary, {FORMAT: text})


def load(path: str | os.PathLike, mesh: Mesh | None = None) -> Any:
    """Load a pytree that `save` wrote, after checking it.

    Leaves are read, checked on the host and put on JAX's default device one by one. On a GPU, a
    matrix that was packed for a CPU is packed anew, with the same values. Array leaves come back as
    JAX arrays with the dtype they were saved with; 64-bit ones come back as NumPy arrays while
    `jax_enable_x64` is off, for JAX would shorten them.

    Args:
        path: the file.
        mesh: where each `ShardedMatrix` goes, over its axes of this mesh, of which there may be
            more devices or fewer than when it was saved; then it is split and packed anew. None:
            it comes back whole, as a `MackoMatrix`.

    Returns:
        The tree.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, of another format or version, altered after it was
            saved, or holds a matrix whose arrays contradict each other.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return _decode_file(file, mesh)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). It was cut off or is something "
            "else; save it again with macko_jax.save"
        ) from error
    except (ValueError, OSError) as error:  # the latter of a device or a file of the system
        raise ValueError(f"Cannot load {path}: {error}") from error


def describe(tree: Any) -> dict:
    """What is in a tree that `save` takes, but for the numbers: structure, shapes, dtypes.

    Args:
        tree: as for `save`; no array is read.

    Returns:
        Dicts, lists and strings, ready for JSON.

    Raises:
        TypeError: as `save` does.
    """

    for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, ShardedMatrix)):
        if isinstance(leaf, ShardedMatrix):
            raise TypeError(f"describe takes matrices that are whole, got {leaf}; use save")

    def put(array: Any, place: str) -> dict:
        return {"array": list(array.shape), "dtype": _known_dtype(array, place)}

    return _encode(tree, (), put)


def abstract(description: dict) -> Any:
    """The tree of a description, with `jax.ShapeDtypeStruct` in the place of arrays.

    Args:
        description: as `describe` gave it, also after it has been through JSON.

    Returns:
        The tree.

    Raises:
        ValueError: if it is no such description.
    """

    def read(node: dict) -> Any:
        return jax.ShapeDtypeStruct(tuple(node["array"]), jnp.dtype(node["dtype"]))

    try:
        return _decode(description, read)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"the description makes no sense ({error!r}); give one as describe made it"
        ) from error


def _to_json(node: Any) -> str:
    return json.dumps(node, separators=(",", ":"))


def _read_description(metadata: Mapping[str, str]) -> dict:
    """The description of a file's tree, whose checksum is right."""
    nonsense = (
        "the description of its tree makes no sense ({}); load reads what macko_jax.save wrote"
    )
    if metadata.get("format") == FORMAT:  # version 1
        known, found, text = "1", metadata, metadata.get("tree", "")
    elif FORMAT in metadata:
        try:
            found = json.loads(metadata[FORMAT])
            known, text = VERSION, _to_json(found["tree"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(nonsense.format(repr(error))) from error
    else:
        raise ValueError(
            f"its metadata has no entry {FORMAT!r}; load reads what macko_jax.save wrote"
        )
    if found.get("version") != known:
        raise ValueError(
            f"it has version {found.get('version')!r}, and this macko_jax reads versions 1 and "
            f"{VERSION}; install the macko_jax that wrote it, or save the tree again"
        )
    if found.get("crc32") != _crc32(text.encode()):
        raise ValueError(
            "the description of its tree does not match its checksum: the file was altered after "
            "it was saved; take an unaltered copy"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(nonsense.format(repr(error))) from error


def _decode_file(file, mesh: Mesh | None) -> Any:
    described = _read_description(file.metadata() or {})
    unread = set(file.keys())

    def read(node: dict) -> np.ndarray:
        name = node["array"]
        if name not in unread:
            raise ValueError(
                f"tensor {name!r} is missing or named twice; take an unaltered copy of the file"
            )
        unread.remove(name)
        stored = file.get_tensor(name)
        if _crc32(_as_bytes(stored)) != node["crc32"]:
            raise ValueError(
                f"the bytes of tensor {name!r} do not match their checksum: the file was altered "
                "or damaged after it was saved; take an unaltered copy"
            )
        if stored.dtype.name != ("uint8" if node["dtype"] in BYTE_DTYPES else node["dtype"]):
            raise ValueError(
                f"tensor {name!r} holds {stored.dtype.name}, which cannot be {node['dtype']!r}"
            )
        return stored.view(jnp.dtype(node["dtype"]))

    try:
        tree = _decode(described, read, mesh)
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"the description of its tree makes no sense ({error!r}); load reads what "
            "macko_jax.save wrote"
        ) from error
    if unread:
        raise ValueError(
            f"it holds tensors that its tree does not mention: {sorted(unread)}; take an "
            "unaltered copy of the file"
        )
    return tree


def _encode(node: Any, path: tuple, put: Callable[[Any, str], dict]) -> dict:
    """The JSON description of a tree; `put(array, where)` gives that of each array in it."""
    where = "/".join(map(str, path))
    if isinstance(node, MackoMatrix):
        return _encode_matrix("matrix", node, where, put)
    if isinstance(node, ShardedMatrix):
        return _encode_sharded(node, where, put)
    if isinstance(node, FactorizedKernel):
        return {
            "factors": {
                name: _encode(getattr(node, name), (*path, name), put) for name in ("left", "right")
            }
        }
    if node is None or isinstance(node, bool | int | float | str):
        return {"scalar": node}
    if isinstance(node, Mapping):
        for key in node:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(
                    f"The dict at {where!r} has the key {key!r}; keys are strings or integers"
                )
        # In the order of keys, as JAX has them in a pytree: equal trees are equal files.
        keys = sorted(node, key=lambda key: (isinstance(key, str), key))
        return {"dict": [[key, _encode(node[key], (*path, key), put)] for key in keys]}
    if type(node) in (list, tuple):
        return {
            type(node).__name__: [
                _encode(child, (*path, index), put) for index, child in enumerate(node)
            ]
        }
    if isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        return {
            "key": put(jax.random.key_data(node), where),
            "implementation": str(jax.random.key_impl(node)),
        }
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        return put(node, where)
    raise TypeError(
        f"Cannot save the {type(node).__name__} at {where!r}: a tree consists of dicts, lists and "
        "tuples of arrays, MackoMatrix and plain numbers and strings; turn an nnx model or state "
        "into one with macko_jax.flax_nnx.to_pure_dict or nnx.to_pure_dict"
    )


def _encode_matrix(
    kind: str, matrix: MackoMatrix | ShardedMatrix, where: str, put: Callable[[Any, str], dict]
) -> dict:
    """What the JSON descriptions of a matrix, whole or in shards, have in common."""
    return {
        kind: {
            name: put(getattr(matrix, name), f"{where}.{name}")
            for name in MATRIX_ARRAYS
            if getattr(matrix, name) is not None
        },
        "shape": list(matrix.shape),
        "encoding": matrix.encoding,
        "lanes": matrix.lanes,
    }


def _encode_sharded(matrix: ShardedMatrix, where: str, put: Callable[[Any, str], dict]) -> dict:
    """The JSON description of a matrix in shards."""
    if matrix.values.ndim != 2:
        raise TypeError(
            f"Cannot save the stack of ShardedMatrix at {where!r}; save its matrices one by one"
        )
    return {
        **_encode_matrix("sharded", matrix, where, put),
        "axes": list(matrix.axes),
        "dimension": matrix.dimension,
        "parts": list(matrix.parts),
    }


def _store(tensors: dict[str, np.ndarray], array: Any, place: str) -> dict:
    """Add an array to the tensors of a file, and describe it."""
    check_is_here(array, f"saving {place!r}")
    array = np.asarray(array)
    dtype = _known_dtype(array, place)
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes 0-d arrays 1-d
    stored = array.view(np.uint8) if dtype in BYTE_DTYPES else array
    name = place
    while name in tensors or name == METADATA:  # the paths ("a/b",) and ("a", "b") read the same
        name += "'"
    tensors[name] = stored
    return {"array": name, "dtype": dtype, "crc32": _crc32(_as_bytes(stored))}


def _known_dtype(array: Any, place: str) -> str:
    dtype = array.dtype.name
    if dtype not in (*NATIVE_DTYPES, *BYTE_DTYPES):
        raise TypeError(
            f"Cannot save the array of {dtype} at {place!r}; allowed are "
            f"{', '.join((*NATIVE_DTYPES, *BYTE_DTYPES))}"
        )
    return dtype


def _decode(node: dict, read: Callable[[dict], Any], mesh: Mesh | None = None) -> Any:
    """The tree of a description; `read` gives the array of an array node, on the host or abstract.

    Abstract arrays stay so; those on the host are checked and put on JAX's default device.
    """
    if "matrix" in node:
        host = MackoMatrix(
            **{name: read(array) for name, array in node["matrix"].items()},
            shape=tuple(node["shape"]),
            encoding=_known_encoding(node["encoding"]),
            lanes=node["lanes"],
        )
        if _is_abstract(host.values):
            return host
        validate(host)
        return for_here(jax.tree.map(jnp.asarray, host))
    if "sharded" in node:
        return _decode_sharded(node, read, mesh)
    if "factors" in node:
        kernel = FactorizedKernel(
            **{name: _decode(factor, read, mesh) for name, factor in node["factors"].items()}
        )
        if not any(map(_is_abstract, jax.tree.leaves(kernel))):
            kernel.check()
        return kernel
    if "scalar" in node:
        if not isinstance(node["scalar"], bool | int | float | str | None):
            raise ValueError(f"its tree has a scalar that is a {type(node['scalar']).__name__}")
        return node["scalar"]
    if "dict" in node:
        if not all(type(key) in (str, int) for key, _ in node["dict"]):
            raise ValueError("its tree has a dict with a key that is no string and no integer")
        return {key: _decode(child, read, mesh) for key, child in node["dict"]}
    if "list" in node:
        return [_decode(child, read, mesh) for child in node["list"]]
    if "tuple" in node:
        return tuple(_decode(child, read, mesh) for child in node["tuple"])
    if "key" in node:
        data = read(node["key"])
        wrap = functools.partial(jax.random.wrap_key_data, impl=node["implementation"])
        return jax.eval_shape(wrap, data) if _is_abstract(data) else wrap(data)
    if "array" in node:
        host = read(node)
        shortened = jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype
        return host if shortened or _is_abstract(host) else jnp.asarray(host)
    raise ValueError(f"its tree has a node of unknown kind, {sorted(node)}")


def _decode_sharded(node: dict, read: Callable[[dict], Any], mesh: Mesh | None) -> Any:
    """A matrix in shards, on the devices of a mesh, or whole where there is none."""
    arrays = {name: read(array) for name, array in node["sharded"].items()}
    axes, dimension = tuple(map(str, node["axes"])), int(node["dimension"])
    count = arrays["values"].shape[0]
    saved = AbstractMesh((count, *[1] * (len(axes) - 1)), axes)
    spec = [PartitionSpec(axes, None), PartitionSpec(None, axes)][dimension]
    return place(
        ShardedMatrix(
            **arrays,
            shape=tuple(node["shape"]),
            encoding=_known_encoding(node["encoding"]),
            lanes=node["lanes"],
            sharding=NamedSharding(saved, spec),
            parts=tuple(node["parts"]),
        ),
        mesh,
    )


def _is_abstract(array: Any) -> bool:
    return isinstance(array, jax.ShapeDtypeStruct)


def _known_encoding(name: str) -> str:
    """The name of today of an encoding in a file; refuse those that are no longer read."""
    if name in ("delta3", "banked"):
        raise ValueError(
            f"a matrix is in the encoding {name!r}, which is no longer read; load the file with "
            "macko_jax 0.1 and save macko_jax.compress(macko_jax.decompress(m)) for each matrix m, "
            "or pack the checkpoint again"
        )
    return "two_bank" if name == "choice" else name


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _crc32(data) -> str:
    return f"{zlib.crc32(data):08x}"
