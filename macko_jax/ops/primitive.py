"""The JAX primitives of a MACKO matrix: three products that are each other's derivatives.

With s over the stored slots and k over a batch of vectors, of any number of axes, the trilinear
form

    T(values, x, y) = sum_k sum_s values[s] x[k, column(s)] y[k, row(s)]

has one product per role: `spmv` is its derivative by y, `spmv_transposed` by x, and `sddmm`, a
sampled dense-dense product, by the values. Each is linear in its two operands, and the transpose in
either operand is again one of the three, so derivatives of every order stay within them.

Slots that are padding are left out of the sum. Where an encoding does not tell them, they are those
where the array `pattern`, the matrix's own values, is zero; else that is a scalar. If the operand
in the role of the values is the pattern itself, nothing has to be left out, which `own` says.
"""

import functools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from macko_jax.format.layout import Positions, masked
from macko_jax.format.promotion import own_promotion
from macko_jax.gpu.kernel import Problem
from macko_jax.ops import dispatch, mesh
from macko_jax.ops.reference import accumulator

# Result role -> (name, roles of the two linear operands, the second of which are vectors). Four
# arrays follow the operands: codes, row_offsets, starts, pattern.
PRODUCTS = {
    "y": ("spmv", ("values", "x")),
    "x": ("spmv_transposed", ("values", "y")),
    "values": ("sddmm", ("x", "y")),
}
STATIC = ("layout", "out_dtype", "own", "implementation")


def contract(result: str, operands: dict, structure, *, out_dtype, **static) -> jax.Array:
    """The product whose result has the role `result`, from a dict of its two operands by role.

    Vectors are [*batch, cols] in the role x and [*batch, rows] in the role y.
    """
    _, roles = PRODUCTS[result]
    arrays = mesh.vary_alike(*(operands[role] for role in roles), *structure)
    operands, structure = dict(zip(roles, arrays)), arrays[2:]
    mesh.check_replicated(dict(zip((*Positions._fields, "values"), structure)))
    batch_spec = None  # that of the first vectors, which two of them have in common
    for role in roles:
        if role == "values":
            mesh.check_replicated({role: operands[role]})
        else:
            operands[role] = mesh.whole_vectors(operands[role], batch_spec)
            batch_spec = tuple(jax.typeof(operands[role]).sharding.spec)[:-1]
    primitive = PRIMITIVES[result]
    return primitive.bind(*operands.values(), *structure, out_dtype=np.dtype(out_dtype), **static)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def multiply(matrix, x: jax.Array, implementation: str | None = None) -> jax.Array:
    """y = x A^T, [..., cols] -> [..., rows], of a MackoMatrix and a real x that fit."""
    out_dtype = jnp.promote_types(matrix.dtype, x.dtype)
    if matrix.scales is None:
        return _multiply("y", matrix, {"x": x}, out_dtype, implementation)
    return scaled(matrix, multiply_wide(matrix, x, implementation), x.dtype)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def multiply_wide(matrix, x: jax.Array, implementation: str | None = None) -> jax.Array:
    """The same before the scales of 8-bit values, in the type that sums are kept in."""
    out_dtype = accumulator(jnp.promote_types(matrix.dtype, x.dtype))
    return _multiply("y", matrix, {"x": x}, out_dtype, implementation)


@own_promotion()
def scaled(matrix, y: jax.Array, x_dtype) -> jax.Array:
    """What `multiply` makes of the result of `multiply_wide`."""
    if matrix.scales is not None:
        y = y * matrix.scales.astype(y.dtype)
    return y.astype(jnp.promote_types(matrix.dtype, x_dtype))


@functools.partial(jax.jit, inline=True)
def multiply_transposed(matrix, y: jax.Array) -> jax.Array:
    """x = y A, [..., rows] -> [..., cols], of a MackoMatrix and a real y that fit."""
    out_dtype = jnp.promote_types(matrix.dtype, y.dtype)
    if matrix.scales is not None:
        exact = accumulator(out_dtype)
        with own_promotion():
            y = y.astype(exact) * matrix.scales.astype(exact)
    return _multiply("x", matrix, {"y": y}, out_dtype, None)


def _multiply(result, matrix, vectors: dict, out_dtype, implementation) -> jax.Array:
    """A product by the values of a matrix, without its scales."""
    values = matrix.values if matrix.scales is None else jax.lax.stop_gradient(matrix.values)
    # Without a bitmask a slot is known to be padding by its value, and it must stay zero.
    tells = matrix.encoding == "bitmask" or matrix.scales is not None
    pattern = jnp.zeros((), values.dtype) if tells else jax.lax.stop_gradient(values)
    [(role, array)] = vectors.items()
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(out_dtype)
    return contract(
        result,
        {"values": values, role: array},
        (*matrix.positions, pattern),
        own=True,
        layout=matrix.layout,
        out_dtype=out_dtype,
        implementation=implementation,
    )


def _abstract(result, *avals, layout, out_dtype, **_):
    rows, cols = layout.shape
    batch, batch_spec = avals[1].shape[:-1], tuple(avals[1].sharding.spec)[:-1]
    shape, spec = {
        "y": ((*batch, rows), (*batch_spec, None)),
        "x": ((*batch, cols), (*batch_spec, None)),
        "values": ((layout.stored,), (None,)),
    }[result]
    sharding = NamedSharding(mesh.mesh_of(avals), PartitionSpec(*spec))
    return avals[0].update(shape=shape, dtype=out_dtype, weak_type=False, sharding=sharding)


def _lower(result, platform, ctx, *operands, **params):
    batch_spec = tuple(ctx.avals_in[1].sharding.spec)[:-1]
    function = mesh.on_each_device(
        functools.partial(_compute, result, platform, **params),
        ctx.avals_in,
        ctx.avals_out[0].sharding.spec,
        sum_over=batch_spec if result == "values" else (),
    )
    return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)


@own_promotion()
def _compute(result, platform, *operands, layout, out_dtype, own, implementation):
    """One product on one device, by the implementation that serves it."""
    name, roles = PRODUCTS[result]
    by_role = dict(zip(roles, operands))
    batch = operands[1].shape[:-1]
    count = math.prod(batch)
    for role in roles:
        if role != "values":
            by_role[role] = by_role[role].reshape(count, by_role[role].shape[-1])
    problem = Problem(
        product=name,
        platform=platform,
        layout=layout,
        batch=None if jax.export.is_symbolic_dim(count) else count,
        dtypes=tuple(a.dtype for a in by_role.values()),
        out_dtype=out_dtype,
    )
    product = functools.partial(
        dispatch.implement(problem, implementation), layout, out_dtype=out_dtype
    )
    first, second = by_role.values()
    *arrays, pattern = operands[2:]
    positions = Positions(*arrays)
    if result == "values":
        return product(positions, first, second, pattern)
    out = product(first if own else masked(first, pattern), positions, second)
    return out.reshape(*batch, out.shape[-1])


def _tangent(result, role, tangent, *primals, out_dtype, own, **static):
    roles = PRODUCTS[result][1]
    operands = dict(zip(roles, primals)) | {role: tangent}
    own = own and role != "values"
    return contract(result, operands, primals[2:], out_dtype=out_dtype, own=own, **static)


def _transpose(result, cotangent, *operands, out_dtype, own, **static):
    del out_dtype  # a cotangent has the type of its operand
    roles = PRODUCTS[result][1]
    structure = operands[2:]
    linear, known = (0, 1) if ad.is_undefined_primal(operands[0]) else (1, 0)
    aval = operands[linear].aval
    if type(cotangent) is ad.Zero:
        term = ad.Zero(aval)
    else:
        term = contract(
            roles[linear],
            {result: cotangent, roles[known]: operands[known]},
            structure,
            out_dtype=aval.dtype,
            own=own and "values" not in (result, roles[linear]),
            **static,
        )
    terms: list = [None] * len(operands)
    terms[linear] = term
    return terms


def _batch(result, operands, dims, **params):
    mapped = [i for i, d in enumerate(dims) if d is not None]
    moved = [o if d is None else jnp.moveaxis(o, d, 0) for o, d in zip(operands, dims)]
    product = functools.partial(PRIMITIVES[result].bind, **params)
    if result != "values" and mapped == [1]:  # more vectors for one matrix: one larger batch
        return product(*moved), 0

    def every(*arrays):  # matrices that differ: one after the other, which bounds the memory
        def one(parts):
            full = list(arrays)
            for i, part in zip(mapped, parts):
                full[i] = part
            return product(*full)

        return jax.lax.map(one, [arrays[i] for i in mapped])

    entry = jax.typeof(moved[mapped[0]]).sharding.spec[0]
    if entry is not None:  # every device has matrices of its own
        avals = [jax.typeof(a) for a in moved]
        every = mesh.on_each_device(every, avals, (entry,), axes=frozenset(mesh.axes_of(entry)))
    return every(*moved), 0


def define_impl(primitive: Primitive, static_argnames) -> None:
    """Makes a primitive compute what it is lowered to, also where `jax.disable_jit` holds."""
    compiled = jax.jit(primitive.bind, static_argnames=static_argnames)

    @primitive.def_impl
    def _(*operands, **params):
        with jax.disable_jit(False):
            return compiled(*operands, **params)


def _define(result) -> Primitive:
    name, roles = PRODUCTS[result]
    primitive = Primitive(f"macko_{name}")
    define_impl(primitive, STATIC)
    primitive.def_abstract_eval(functools.partial(_abstract, result))
    ad.defjvp(
        primitive,
        *(functools.partial(_tangent, result, role) for role in roles),
        None,
        None,
        None,
        None,
    )
    ad.primitive_transposes[primitive] = functools.partial(_transpose, result)
    batching.primitive_batchers[primitive] = functools.partial(_batch, result)
    mlir.register_lowering(primitive, functools.partial(_lower, result, "any"))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(
            primitive, functools.partial(_lower, result, platform), platform=platform
        )
    return primitive


PRIMITIVES = {result: _define(result) for result in PRODUCTS}
macko_spmv_p = PRIMITIVES["y"]
macko_spmv_transposed_p = PRIMITIVES["x"]
macko_sddmm_p = PRIMITIVES["values"]
