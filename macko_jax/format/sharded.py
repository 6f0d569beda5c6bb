"""A matrix in shards, one on each device of a mesh axis: `ShardedMatrix` and `shard`."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from macko_jax.format.layout import Layout
from macko_jax.format.matrix import (
    MackoMatrix,
    check_layout,
    check_weight,
    dense_values,
    stored_values,
)
from macko_jax.format.operators import PackedMatrix
from macko_jax.format.pack import Capacity, pack
from macko_jax.format.repack import kept_encoding, pack_alike
from macko_jax.format.validate import QUANTIZED, check_metadata, validate

ARRAYS = ("values", "codes", "row_offsets", "starts")  # of which every shard has its own
ROWS, COLUMNS = 0, 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(*ARRAYS, "scales"),
    meta_fields=("shape", "encoding", "lanes", "sharding", "parts"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedMatrix(PackedMatrix):
    """A sparse matrix [rows, cols] whose rows or columns lie on n devices; made by `shard`.

    Every shard is a `MackoMatrix` of its own, and all of them have arrays of equal shapes, which
    are stacked on a leading axis: device i has entry i. Products are those of a MackoMatrix, with
    `jax.shard_map` around them unless they are inside one over the same axes already:

      - split by rows, y_i = A_i x on each device: x is whole, y is split, and no device waits;
      - split by columns, y = sum_i A_i x_i: x is split, y is whole, and there is one `psum`.

    So a matrix that is split by rows and one that is split by columns follow each other with one
    sum for the two (Megatron-LM, arXiv 1909.08053, section 3).

    Attributes:
      values: [n, 8 * groups], see `MackoMatrix`.
      codes: [n, ...].
      row_offsets: [n, rows of a shard + 1] int32.
      starts: [n, rows of a shard, lanes].
      shape: (rows, cols) of the whole matrix.
      encoding, lanes: those of every shard.
      sharding: how a dense matrix [rows, cols] would lie on the mesh: P(axis, None) for rows, or
        P(None, axis) for columns, where `axis` is a name or a tuple of names.
      parts: lengths of what the rows (or columns) join; see `shard`.
      scales: [rows] factors of 8-bit values, split as the rows are; None for other values.
    """

    values: jax.Array
    codes: jax.Array
    row_offsets: jax.Array
    starts: jax.Array
    shape: tuple[int, int]
    encoding: str
    lanes: int
    sharding: NamedSharding
    parts: tuple[int, ...]
    scales: jax.Array | None = None

    @property
    def dimension(self) -> int:
        """Which of the two dimensions is split: 0, the rows, or 1, the columns."""
        return dimension_of(self.sharding.spec)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which the matrix is split."""
        entry = self.sharding.spec[self.dimension]
        return entry if isinstance(entry, tuple) else (entry,)

    @property
    def count(self) -> int:
        """The number of shards."""
        return math.prod(self.sharding.mesh.shape[axis] for axis in self.axes)

    @property
    def layout(self) -> Layout:
        """The description of a shard, for which kernels are compiled."""
        shape = list(self.shape)
        shape[self.dimension] //= self.count
        return Layout((shape[0], shape[1]), self.encoding, self.lanes, self.stored)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of a stack of matrices, () for one."""
        return self.values.shape[:-2]

    @property
    def nnz(self) -> int:
        """Number of elements kept; needs concrete arrays."""
        array = self.codes if self.encoding == "bitmask" else self.values
        check_is_here(array, "nnz")
        if isinstance(array, Tracer):
            raise TypeError(
                "nnz and density of a ShardedMatrix depend on the contents of its arrays, which "
                "are not known while tracing (jit, vmap, grad). Read them outside"
            )
        counted = jnp.bitwise_count(array) if self.encoding == "bitmask" else array != 0
        return int(np.sum(jax.device_get(counted.sum(-1)), dtype=np.int64))

    @property
    def specs(self) -> "ShardedMatrix":
        """The same tree with a `PartitionSpec` for each array, for `in_specs` of `shard_map`."""
        axis = self.sharding.spec[self.dimension]
        scales = PartitionSpec(axis if self.dimension == ROWS else None)
        return dataclasses.replace(
            self,
            **dict.fromkeys(ARRAYS, PartitionSpec(axis)),
            scales=None if self.scales is None else scales,
        )

    def local(self) -> MackoMatrix:
        """The shard of this device, inside `shard_map` over the axes of the matrix."""
        if self.values.ndim != 2 or self.values.shape[0] != 1:
            raise ValueError(
                "inside shard_map over its axes a ShardedMatrix has one shard, its values "
                f"[1, {self.stored}], got {list(self.values.shape)}; give shard_map in_specs of "
                "matrix.specs"
            )
        own = {name: getattr(self, name) for name in ARRAYS}
        return MackoMatrix(
            **{name: array.reshape(array.shape[1:]) for name, array in own.items()},
            shape=self.layout.shape,
            encoding=self.encoding,
            lanes=self.lanes,
            scales=self.scales,
        )

    def shards(self) -> list[MackoMatrix]:
        """The shards as matrices on the host; needs concrete arrays."""
        check_is_here(self, "shards")
        host = jax.tree.map(np.asarray, self)
        own: list = [host.scales] * self.count
        if host.scales is not None and self.dimension == ROWS:
            own = np.split(np.asarray(host.scales), self.count)
        return [
            MackoMatrix(
                **{name: getattr(host, name)[i] for name in ARRAYS},
                shape=self.layout.shape,
                encoding=self.encoding,
                lanes=self.lanes,
                scales=own[i],
            )
            for i in range(self.count)
        ]

    def join(self) -> MackoMatrix:
        """The whole matrix, packed anew on the host, with all elements as they are."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)):
            raise TypeError(
                "join packs a matrix, whose sizes are not known while tracing (jit, vmap, grad); "
                "join outside"
            )
        check_is_here(self, "join")
        if self.values.ndim != 2:
            raise ValueError("join takes one matrix, and this one is a stack; join them one by one")
        whole = np.concatenate([*map(dense_values, self.shards())], axis=self.dimension)
        order = np.argsort(_order(self.parts, self.count))
        arrays, encoding, lanes = pack(
            np.take(whole, order, axis=self.dimension), kept_encoding(self.encoding), None, None
        )
        scales = self.scales
        if scales is not None:
            scales = np.asarray(scales)
            scales = jnp.asarray(scales[order] if self.dimension == ROWS else scales)
        values, codes, row_offsets, starts = map(jnp.asarray, arrays)
        return MackoMatrix(values, codes, row_offsets, starts, self.shape, encoding, lanes, scales)

    def __repr__(self) -> str:
        kind = getattr(self.values, "dtype", type(self.values).__name__)
        return (
            f"ShardedMatrix(shape={self.shape}, dtype={kind}, encoding={self.encoding!r}, "
            f"lanes={self.lanes}, spec={self.sharding.spec}, count={self.count})"
        )


Matrix = MackoMatrix | ShardedMatrix


def shard(
    weight,
    sharding: NamedSharding,
    *,
    parts: Sequence[int] | None = None,
    dtype=None,
    encoding: str | None = None,
    lanes: int | None = None,
    capacity: Capacity = None,
) -> ShardedMatrix:
    """Splits a matrix by rows or by columns over the devices of a mesh, and packs each shard.

        mesh = jax.make_mesh((2,), ("model",))
        matrix = macko_jax.shard(weight, NamedSharding(mesh, P("model", None)))

    A dense weight that lies on the mesh by this sharding is packed where it lies, each shard on its
    device, and is never gathered. 8-bit values have the scales of whole rows, also where these are
    split by columns: the shards have the elements that the whole matrix has.

    The mesh may have devices of several processes (`jax.distributed`): each of them calls `shard`
    with the whole weight, on its host or its devices, and keeps the shards of its own devices.

    Args:
      weight: [rows, cols], dense as for `compress`, or a `MackoMatrix` or `ShardedMatrix`, whose
        elements stay as they are.
      sharding: P(axis, None) splits rows, P(None, axis) splits columns; the axis is a name, or a
        tuple of several.
      parts: where the rows (or columns) are those of several matrices, their lengths, such as those
        of queries, keys and values: device i then has the i-th share of each of them, and what is
        split by rows gives its results in this order. None: one part.
      dtype, encoding, lanes: as for `compress`; None keeps what a packed matrix has, but for the
        lanes, which are chosen for a shard.
      capacity: room of every shard in groups of eight, as for `compress`; at least as many as the
        fullest one takes. None: that, and less than 1/256 more.

    Returns:
      The matrix, with each shard on its devices.

    Raises:
      TypeError: as `compress`, or the sharding is no NamedSharding.
      ValueError: as `compress`, the sharding does not split one dimension, or the size or a part is
        no multiple of the number of shards.
    """
    _check_sharding(sharding)
    check_is_here(weight, "shard")
    encoding = check_layout(encoding, lanes)
    if isinstance(weight, ShardedMatrix):
        weight = weight.join()
    dimension = dimension_of(sharding.spec)
    if isinstance(weight, MackoMatrix):
        encoding = encoding or kept_encoding(weight.encoding)
    raw, scales = _raw(weight, dtype)
    shape = (int(raw.shape[0]), int(raw.shape[1]))
    parts = (shape[dimension],) if parts is None else tuple(map(int, parts))
    no: Any = None
    empty = ShardedMatrix(no, no, no, no, shape, "", 1, sharding, parts)
    _check_parts(empty)
    packed, encoding, lanes = pack_alike(_pieces(raw, empty), encoding, lanes, capacity)
    if scales is not None:
        if dimension == ROWS:
            scales = np.asarray(scales)[_order(parts, empty.count)]
        specs = sharding.spec[:1] if dimension == ROWS else ()
        scales = jax.device_put(scales, NamedSharding(sharding.mesh, PartitionSpec(*specs)))
    placed = {name: _place(leaves, empty) for name, leaves in zip(ARRAYS, zip(*packed))}
    return dataclasses.replace(empty, **placed, encoding=encoding, lanes=lanes, scales=scales)


def check_is_here(tree, what: str) -> None:
    """Raises a ValueError if an array of a tree lies on devices of other processes, too."""
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
            continue
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"{what} reads whole arrays, and one of shape {list(leaf.shape)} lies on devices "
                "of other processes, too; gather it first, in all processes: "
                "jax.experimental.multihost_utils.process_allgather(array_or_tree, tiled=True)"
            )


def place(host: ShardedMatrix, mesh: Mesh | None) -> Matrix:
    """A matrix of NumPy arrays, checked and put on the devices of a mesh; whole without a mesh.

    On another number of devices than it has shards it is split and packed anew, and so is what does
    not keep its encoding here.

    Raises:
      ValueError: the arrays contradict each other, or the mesh lacks an axis.
    """
    _check(host)
    if mesh is None:
        return host.join()
    spec = host.sharding.spec
    if missing := set(host.axes) - set(mesh.axis_names):
        raise ValueError(
            f"a matrix is split over the axes {list(host.axes)}, and the mesh {mesh} has no "
            f"{sorted(missing)}; give a mesh with these axes, or none to have the matrix whole"
        )
    sharding = NamedSharding(mesh, spec)
    count = math.prod(mesh.shape[axis] for axis in host.axes)
    if count != host.count or kept_encoding(host.encoding) is None:
        return shard(host, sharding, parts=host.parts)
    placed = jax.tree.map(
        lambda array, own: jax.device_put(array, NamedSharding(mesh, own)), host, host.specs
    )
    return dataclasses.replace(placed, sharding=sharding)


def _check(host: ShardedMatrix) -> None:
    """Raises a ValueError unless the arrays, from a file of a stranger, make a matrix in shards."""
    check_metadata(host.shape, host.encoding, host.lanes)
    _check_parts(host)
    rows = host.shape[0]
    if host.scales is not None and host.scales.shape != (rows,):
        raise ValueError(f"scales must be [{rows}], got {list(host.scales.shape)}")
    for name in ARRAYS:
        shape = getattr(host, name).shape
        if shape[:1] != (host.count,):
            raise ValueError(f"{name} must be [{host.count}, ...], one of each shard, got {shape}")
    for own in host.shards():
        validate(own)


def dimension_of(spec: PartitionSpec) -> int:
    """Which dimension a PartitionSpec of a matrix splits, the rows or the columns."""
    return ROWS if len(spec) and spec[0] else COLUMNS


def _check_sharding(sharding) -> None:
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"shard takes a jax.sharding.NamedSharding, got {type(sharding).__name__}; write "
            "jax.NamedSharding(mesh, jax.P(axis, None)) for rows, jax.P(None, axis) for columns"
        )
    if len(sharding.spec) > 2 or sum(bool(entry) for entry in sharding.spec) != 1:
        raise ValueError(
            f"shard splits a matrix by rows, P(axis, None), or by columns, P(None, axis), got "
            f"{sharding.spec}; to have it whole on every device, jax.device_put(matrix, sharding)"
        )


def _check_parts(matrix: ShardedMatrix) -> None:
    """Raises a ValueError unless the parts make up the dimension and each can be split."""
    size, count = matrix.shape[matrix.dimension], matrix.count
    what = ("rows", "columns")[matrix.dimension]
    if sum(matrix.parts) != size or min(matrix.parts, default=0) < 0:
        raise ValueError(
            f"parts are the lengths that make up the {size} {what}, got {list(matrix.parts)}"
        )
    for part in matrix.parts:
        if part % count:
            padding = [(0, 0), (0, 0)]
            padding[matrix.dimension] = (0, -part % count)
            of = "" if len(matrix.parts) == 1 else " of a part"
            raise ValueError(
                f"{part} {what}{of} cannot be split evenly over {count} devices; split over a "
                f"number of devices that divides them, or append {what} of zeros first: "
                f"numpy.pad(weight, {padding})"
            )


def _raw(weight, dtype):
    """The dense values as they are to be stored, and the scales of 8-bit ones or None."""
    if isinstance(weight, MackoMatrix):
        if weight.values.ndim != 1:
            raise ValueError(
                "shard takes one matrix, and this MackoMatrix is a stack; shard its matrices one "
                "by one with the same capacity"
            )
        values = dense_values(weight)
        same = dtype is None or jnp.dtype(dtype) == weight.values.dtype
        if same and weight.scales is not None:
            return values, weight.scales
        weight = values
        if weight.dtype in QUANTIZED:
            raise ValueError(
                f"the values of this MackoMatrix are {weight.dtype} and stay so; to store them as "
                f"{jnp.dtype(dtype)}, shard macko_jax.decompress(matrix)"
            )
    else:
        weight = check_weight(weight, "shard")
    return stored_values(weight, dtype)


def _pieces(dense, matrix: ShardedMatrix) -> list:
    """The dense shards: where they lie already, or slices of the whole."""
    shape, count, dimension = matrix.shape, matrix.count, matrix.dimension
    size = shape[dimension] // count
    if (
        isinstance(dense, jax.Array)
        and len(matrix.parts) == 1
        and dense.sharding.is_equivalent_to(matrix.sharding, 2)
    ):
        found = {s.index[dimension].start or 0: s.data for s in dense.addressable_shards}
        return [found[i * size] for i in range(count)]
    if not isinstance(dense, jax.Array) or len(dense.sharding.device_set) > 1:
        dense = np.asarray(dense)
    order = _order(matrix.parts, count).reshape(count, size)
    whole = len(matrix.parts) == 1
    return [
        (dense[own[0] : own[-1] + 1] if dimension == ROWS else dense[:, own[0] : own[-1] + 1])
        if whole and size
        else (dense[own] if dimension == ROWS else dense[:, own])
        for own in order
    ]


def _order(parts: Sequence[int], count: int) -> np.ndarray:
    """The rows (or columns) of the whole matrix in the order in which the shards have them."""
    begins = np.cumsum([0, *parts[:-1]])
    shares = [
        np.arange(part).reshape(count, part // count) + begin for begin, part in zip(begins, parts)
    ]
    return np.concatenate(shares, axis=1).reshape(-1)


def _place(leaves: Sequence, matrix: ShardedMatrix) -> jax.Array:
    """The leaves of all shards, each on its devices, as one array with a leading axis."""
    axis = matrix.sharding.spec[matrix.dimension]
    sharding = NamedSharding(matrix.sharding.mesh, PartitionSpec(axis))
    shape = (len(leaves), *leaves[0].shape)
    indices: Any = sharding.addressable_devices_indices_map(shape)
    arrays = [
        jax.device_put(leaves[index[0].start or 0][None], device)
        for device, index in indices.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
