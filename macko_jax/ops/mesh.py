"""Meshes of devices, as the products' rules see them.

Where a mesh has Explicit axes, every type says how its array lies on them. A product keeps a
batch of vectors on the axes over which it is sharded, and every device multiplies its own part by
the whole matrix. Inside `jax.shard_map` axes are Manual, and an array's type says over which of
them it varies.
"""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from macko_jax.ops import reference


def without_varying(rule: Callable) -> Callable:
    """A lowering rule that takes types as if nothing varied over mesh axes.

    Inside shard_map, arrays have types that say over which axes they vary, and jax 0.11 refuses a
    kernel that changes such an array in place. What is lowered there is the program of one device.
    """
    plain = jax.typeof(0.0).manual_axis_type

    def lower(ctx, *operands, **parameters):
        strip = lambda avals: [aval.update(manual_axis_type=plain) for aval in avals]
        ctx = ctx.replace(avals_in=strip(ctx.avals_in), avals_out=strip(ctx.avals_out))
        return rule(ctx, *operands, **parameters)

    return lower


def vary_alike(*arrays):
    """Inside shard_map: marks every operand as varying over the mesh axes that any varies over.

    The transpose of that mark is the sum over devices that a replicated matrix's gradient needs.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(sorted(union - v)), to="varying") if union - v else a
        for a, v in zip(arrays, varying)
    ]


def mesh_of(avals: Sequence):
    """The mesh on which arrays of these types lie; the empty one if they lie on none."""
    meshes = [aval.sharding.mesh for aval in avals]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def axes_of(entry) -> tuple[str, ...]:
    """The axes that an entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def explicit_axes(mesh) -> frozenset[str]:
    """The names of a mesh's Explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return frozenset(name for name, kind in kinds if kind == AxisType.Explicit)


def spread(arrays: Sequence) -> bool:
    """Whether the arrays lie on several devices of a mesh with Explicit axes."""
    mesh = mesh_of([jax.typeof(array) for array in arrays])
    return math.prod(mesh.shape[axis] for axis in explicit_axes(mesh)) > 1


def whole_vectors(vectors, batch_spec=None):
    """Vectors [*batch, length] of which no device has only a piece.

    Args:
      vectors: they are gathered where they are cut, as in `x @ w.T` with a replicated w.
      batch_spec: how the batch is to lie on the mesh; by default as it does.
    """
    sharding = jax.typeof(vectors).sharding
    found = tuple(sharding.spec)
    wanted = (*(found[:-1] if batch_spec is None else batch_spec), None)
    if found == wanted:
        return vectors
    return jax.sharding.reshard(vectors, NamedSharding(sharding.mesh, PartitionSpec(*wanted)))


def check_replicated(arrays: dict) -> None:
    """Raises a ValueError unless every device has all of a matrix's arrays, given by name."""
    for name, array in arrays.items():
        if any(jax.typeof(array).sharding.spec):
            raise ValueError(
                f"{name} of a MackoMatrix are {jax.typeof(array).str_short()}, cut over the axes "
                "of a mesh; a product takes a matrix that is whole on every device. Replicate it "
                "with jax.device_put(matrix, jax.NamedSharding(mesh, jax.P())), or give every "
                "device rows of its own, as in the guide's page on several devices"
            )


def on_each_device(
    function: Callable,
    avals: Sequence,
    out_spec: Sequence,
    *,
    axes: frozenset[str] | None = None,
    sum_over: Sequence = (),
) -> Callable:
    """`function` on what each device has, where arrays of these types lie on a mesh.

    Args:
      function: takes arrays and gives one; it sees those parts of them that a device has.
      avals: the types of the arrays.
      out_spec: how the result lies on the mesh.
      axes: those of the mesh that are meant; by default all Explicit ones.
      sum_over: entries of a PartitionSpec, over whose axes results are added up.
    """
    mesh = mesh_of(avals)
    axes = explicit_axes(mesh) if axes is None else axes
    if not axes:
        return function
    added = tuple(name for entry in sum_over for name in axes_of(entry))

    def local(*arrays):
        result = function(*vary_alike(*arrays))
        if not added:
            return result
        wide = result.astype(reference.accumulator(result.dtype))
        return jax.lax.psum(wide, added).astype(result.dtype)

    def of_axes(spec):
        return PartitionSpec(*(e if axes.issuperset(axes_of(e)) else None for e in spec))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(of_axes(aval.sharding.spec) for aval in avals),
        out_specs=of_axes(out_spec),
        axis_names=axes,
    )
