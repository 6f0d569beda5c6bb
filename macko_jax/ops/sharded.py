"""Products with a matrix in shards: each device multiplies by its own, inside `jax.shard_map`.

A product is the program of one device. Inside `shard_map` over the matrix's axes it runs as it
is; elsewhere a `shard_map` is put around it. What a device has to wait for:

| the product of | takes an x that is | gives a y that is | waits for |
|---|---|---|---|
| a matrix split by rows | whole | split | nothing |
| a matrix split by columns | split | whole | a sum over the devices |

Between products of a chain a split result is gathered where the next product takes it whole, and of
a whole one each device takes its piece.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from macko_jax.format.promotion import own_promotion
from macko_jax.format.sharded import COLUMNS, ROWS, ShardedMatrix
from macko_jax.ops import mesh as meshes
from macko_jax.ops import primitive
from macko_jax.ops.activations import rms_norm, swiglu
from macko_jax.ops.reference import accumulator


def multiply(matrix: ShardedMatrix, x: jax.Array, implementation: str | None = None) -> jax.Array:
    """y = x A^T, [..., cols] -> [..., rows], of a matrix and a real x that fit."""

    def local(matrix, x):
        if matrix.dimension == ROWS:
            return primitive.multiply(matrix.local(), x, implementation)
        return _summed_product(matrix.local(), x, matrix.axes, implementation)

    return _one_product(local, matrix, x, splits_x=matrix.dimension == COLUMNS)


def multiply_transposed(matrix: ShardedMatrix, y: jax.Array) -> jax.Array:
    """x = y A, [..., rows] -> [..., cols], of a matrix and a real y that fit."""

    def local(matrix, y):
        x = primitive.multiply_transposed(matrix.local(), y)
        if matrix.dimension == COLUMNS:
            return x
        return jax.lax.psum(x.astype(accumulator(x.dtype)), matrix.axes).astype(x.dtype)

    return _one_product(local, matrix, y, splits_x=matrix.dimension == ROWS)


def chain(x: jax.Array, steps: Sequence[Any], local: Callable, blank: jax.Array | None) -> list:
    """The results of a chain of products with matrices in shards; see `fused.fused_chain`.

    Args:
      x: of the first product. Where that is split by columns each device has its piece, and with a
        gate that is a gate of its own and what it lets through.
      steps: `fused.Step`s. What is added to the result of a matrix split by rows is split, too.
      local: `local(x, steps, blank)` gives the results of a chain on one device.
      blank: `blanks(steps)` elements, split over the devices; or None.
    """
    matrix = steps[0].linear
    axis, batch = _entry(matrix), _batch_spec(x, matrix.axes)
    kinds = [step.linear.dimension for step in steps]
    devices = Devices(matrix.axes, matrix.count)

    def place(split):
        return PartitionSpec(*batch, axis if split else None)

    operands = [(s.linear, s.norm and s.norm[0], None if _is_int(s.add) else s.add) for s in steps]
    specs = [
        (
            linear.specs,
            None if scale is None else PartitionSpec(),
            None if add is None else _add_spec(add, place(linear.dimension == ROWS)),
        )
        for linear, scale, add in operands
    ]

    def program(x, operands, blank):
        mine = [
            step._replace(
                linear=linear.local(),
                norm=None if scale is None else (scale, step.norm[1]),
                add=step.add if add is None else add,
            )
            for step, (linear, scale, add) in zip(steps, operands)
        ]
        return _walk(x, mine, kinds, devices, local, blank)

    given = [*(i for i, step in enumerate(steps[:-1]) if step.kept), len(steps) - 1]
    return on_devices(
        program,
        matrix,
        (x, operands, blank),
        (
            place(_takes_split(steps[0], kinds[0])),
            specs,
            blank if blank is None else PartitionSpec(axis),
        ),
        [place(kinds[i] == ROWS) for i in given],
    )


def blanks(steps: Sequence[Any]) -> int:
    """Length of the array `blank` of a chain: what each device needs, on all of them together."""
    _check_alike(steps)
    first = [group[0] for group in _groups(steps, [s.linear.dimension for s in steps]) if group[1:]]
    return sum(steps[i].linear.shape[0] for i in first)


def on_devices(function: Callable, matrix: ShardedMatrix, operands, in_specs, out_specs) -> Any:
    """`function(*operands)` as the program of each device over which a matrix is split."""
    here = jax.sharding.get_abstract_mesh()
    manual = frozenset(here.manual_axes)
    if manual.issuperset(matrix.axes):
        return function(*operands)
    mesh = here if manual else matrix.sharding.mesh
    if meshes.explicit_axes(mesh):
        operands = jax.tree.map(lambda a, spec: _laid(a, mesh, spec), operands, in_specs)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(mesh.axis_names) - manual,
    )(*operands)


def _laid(array, mesh, spec: PartitionSpec) -> jax.Array:
    """An array as a PartitionSpec says, where the mesh's axes are Explicit."""
    array = jnp.asarray(array)
    wanted = (*spec, *[None] * (array.ndim - len(spec)))
    if tuple(jax.typeof(array).sharding.spec) == wanted:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*wanted)))


def _one_product(local: Callable, matrix: ShardedMatrix, x: jax.Array, *, splits_x: bool):
    """`local(matrix, x)`, whose result is split where x is whole, and whole where x is split."""
    axis, batch = _entry(matrix), _batch_spec(x, matrix.axes)
    x_spec = PartitionSpec(*batch, axis if splits_x else None)
    y_spec = PartitionSpec(*batch, None if splits_x else axis)
    return on_devices(local, matrix, (matrix, x), (matrix.specs, x_spec), y_spec)


def _entry(matrix: ShardedMatrix):
    """The entry of a PartitionSpec that splits an axis of an array as the matrix is split."""
    return matrix.sharding.spec[matrix.dimension]


def _batch_spec(x: jax.Array, axes: Sequence[str]) -> tuple:
    """How the leading axes of vectors lie on a mesh, but for the axes that split the matrix."""
    entries = tuple(jax.typeof(x).sharding.spec)[:-1]
    return tuple(None if set(meshes.axes_of(e)) & set(axes) else e for e in entries)


def _add_spec(add, whole: PartitionSpec) -> PartitionSpec:
    """How what is added to a result lies on the mesh: as the result, but where it broadcasts."""
    shape = jnp.shape(add)
    entries = tuple(whole)[len(whole) - len(shape) :]
    return PartitionSpec(*(e if size > 1 else None for e, size in zip(entries, shape)))


def _check_alike(steps: Sequence[Any]) -> None:
    """Raises a ValueError unless all matrices of a chain are in shards over the same devices."""
    places = {
        (step.linear.axes, step.linear.sharding.mesh)
        if isinstance(step.linear, ShardedMatrix)
        else None
        for step in steps
    }
    if len(places) > 1:
        raise ValueError(
            "the matrices of a chain are all whole, or all in shards over the same axes of one "
            f"mesh, got {[step.linear for step in steps]}; shard all of them, or none"
        )


# The program of one device


class Devices(NamedTuple):
    """The mesh axes over which a program runs, and the number of devices along them."""

    axes: tuple[str, ...]
    count: int


def _walk(x, steps, kinds, devices: Devices, local: Callable, blank) -> list:
    """The results of a chain that are kept, and the last, as each device has them."""
    results: list = []
    split = _takes_split(steps[0], kinds[0])
    for group in _groups(steps, kinds):
        *before, last = [_with_sum(i, steps, kinds, results) for i in group]
        if before:
            x, before[0] = _enter(x, split, before[0], kinds[group[0]], devices)
        else:
            x, last = _enter(x, split, last, kinds[group[0]], devices)
        split = kinds[group[-1]] == ROWS
        if split:
            [x] = local(x, [last], None)
        else:
            *found, x = _whole(x, before, last, devices, local, blank)
            results += found if len(found) == len(before) else [None]
            blank = None if blank is None else blank[sum(s.linear.shape[0] for s in before) :]
        results.append(x)
    return [y for step, y in zip(steps[:-1], results) if step.kept] + [x]


def _whole(x, before, last, devices: Devices, local: Callable, blank) -> list:
    """The results of steps of which the last is split by columns, its sum over the devices too."""
    added, last = last.add, last._replace(add=None)
    if not before and not last.gated:
        y = _summed_product(last.linear, x, devices.axes, None)
        found = []
    else:
        needed = sum(step.linear.shape[0] for step in before)
        mine = None if blank is None or not before else blank[:needed]
        *found, y = local(x, [*before, last], mine)
        y = jax.lax.psum(y, devices.axes)  # a kernel of several products gives 16 bits
    if added is not None:
        with own_promotion():
            y = (added + y).astype(y.dtype)
    return [*found, y]


def _groups(steps: Sequence[Any], kinds: Sequence[int]) -> list[tuple[int, ...]]:
    """The steps that one kernel can compute, with nothing from other devices between them."""
    groups, i = [], 0
    while i < len(steps):
        pair = kinds[i : i + 2] == [ROWS, COLUMNS] and steps[i + 1].norm is None
        groups.append((i, i + 1) if pair else (i,))
        i += len(groups[-1])
    return groups


def _takes_split(step: Any, kind: int) -> bool:
    """Whether a chain that begins with a step takes its x split over the devices."""
    return kind == COLUMNS and step.norm is None


def _with_sum(i: int, steps, kinds, results) -> Any:
    """A step with the array that it adds, and kept where a later one adds its result."""
    step = steps[i]
    named = any(_is_int(later.add) and later.add == i for later in steps[i + 1 :])
    if not _is_int(step.add):
        return step._replace(kept=step.kept or named)
    if kinds[step.add] != kinds[i]:
        raise ValueError(
            f"step {i} of a chain adds the result of step {step.add}, of which one is split over "
            "the devices and one is whole; add results of matrices that are split alike"
        )
    return step._replace(add=results[step.add], kept=step.kept or named)


def _enter(x, split: bool, step: Any, kind: int, devices: Devices):
    """x as a step takes it, whole or this device's piece, and the step without what is done."""
    if kind == ROWS and not split:
        return x, step
    if kind == COLUMNS and split and step.norm is None:
        return x, step
    if step.gated:
        x, step = swiglu(x), step._replace(gated=False)
    if split:
        x = jax.lax.all_gather(x, devices.axes, axis=x.ndim - 1, tiled=True)
    if kind == ROWS:
        return x, step
    if step.norm is not None:
        x, step = rms_norm(x, *step.norm), step._replace(norm=None)
    size = x.shape[-1] // devices.count
    begin = jax.lax.axis_index(devices.axes) * size
    return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=-1), step


def _summed_product(matrix, x, axes, implementation) -> jax.Array:
    """The sum over the devices of products with shards by columns, rounded once."""
    y = jax.lax.psum(primitive.multiply_wide(matrix, x, implementation), axes)
    return primitive.scaled(matrix, y, x.dtype)


def _is_int(add) -> bool:
    return isinstance(add, int)
