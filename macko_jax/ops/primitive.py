"""The JAX primitives of a MACKO matrix: three products that are each other's derivatives.

With s over the stored slots and k over a batch of vectors, the trilinear form

    T(values, x, y) = sum_k sum_s values[s] x[k, column(s)] y[k, row(s)]

has one product per role: `spmv` is its derivative by y, `spmv_transposed` by x, and `sddmm`, a
sampled dense-dense product, by the values. Each is linear in its two operands, and the transpose in
either operand is again one of the three, so derivatives of every order stay within them.

Slots that are padding are left out of the sum. Where an encoding does not tell them, they are those
where the array `pattern`, the matrix's own values, is zero; else it is empty. If the operand in the
role of the values is the pattern itself, nothing has to be left out: `own` tells the products so.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from macko_jax.format.layout import Positions, masked
from macko_jax.gpu.kernel import Problem
from macko_jax.ops import dispatch

# Result role -> (name, roles of the two linear operands). Four arrays follow the operands: codes,
# row_offsets, starts, pattern.
PRODUCTS = {
    "y": ("spmv", ("values", "x")),
    "x": ("spmv_transposed", ("values", "y")),
    "values": ("sddmm", ("x", "y")),
}
STATIC = ("layout", "out_dtype", "own", "implementation")


def contract(result: str, operands: dict, structure, *, out_dtype, **static) -> jax.Array:
    """The product whose result has the role `result`, from a dict of its two operands by role."""
    _, roles = PRODUCTS[result]
    arrays = vary_alike(*(operands[role] for role in roles), *structure)
    return PRIMITIVES[result].bind(*arrays, out_dtype=np.dtype(out_dtype), **static)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def multiply(matrix, x: jax.Array, implementation: str | None = None) -> jax.Array:
    """y = x A^T, [..., cols] -> [..., rows], of a MackoMatrix and a real x that fit."""
    out_dtype = jnp.promote_types(matrix.dtype, x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(out_dtype)
    values = matrix.values
    # Without a bitmask a slot is known to be padding by its value, and it must stay zero.
    tells = matrix.encoding == "bitmask" or matrix.scales is not None
    pattern = jnp.zeros(0, values.dtype) if tells else jax.lax.stop_gradient(values)
    batch, (rows, cols) = x.shape[:-1], matrix.shape
    product_dtype = out_dtype
    if matrix.scales is not None:
        values = jax.lax.stop_gradient(values)
        product_dtype = jnp.promote_types(out_dtype, "float32")
    y = contract(
        "y",
        {"values": values, "x": x.reshape(math.prod(batch), cols)},
        (*matrix.positions, pattern),
        own=True,
        layout=matrix.layout,
        out_dtype=product_dtype,
        implementation=implementation,
    )
    if matrix.scales is not None:
        y = (y * matrix.scales.astype(product_dtype)).astype(out_dtype)
    return y.reshape(*batch, rows)


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


def _abstract(result, *avals, layout, out_dtype, **_):
    rows, cols = layout.shape
    batch = next(a.shape[0] for a, role in zip(avals, PRODUCTS[result][1]) if role != "values")
    out = {"y": (batch, rows), "x": (batch, cols), "values": (layout.stored,)}[result]
    return avals[0].update(shape=out, dtype=out_dtype, weak_type=False)


def _lower(result, platform, ctx, *operands, layout, out_dtype, own, implementation):
    name, roles = PRODUCTS[result]
    avals = dict(zip(roles, ctx.avals_in))
    problem = Problem(
        product=name,
        platform=platform,
        layout=layout,
        batch=avals["x" if "x" in avals else "y"].shape[0],
        dtypes=tuple(a.dtype for a in avals.values()),
        out_dtype=out_dtype,
    )
    product = functools.partial(
        dispatch.implement(problem, implementation), layout, out_dtype=out_dtype
    )

    def function(first, second, *structure):
        *arrays, pattern = structure
        positions = Positions(*arrays)
        if result == "values":
            return product(positions, first, second, pattern)
        return product(first if own else masked(first, pattern), positions, second)

    return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)


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
    batched = [i for i, d in enumerate(dims) if d is not None]
    moved = [o if d is None else jnp.moveaxis(o, d, 0) for o, d in zip(operands, dims)]
    primitive = PRIMITIVES[result]
    if result != "values" and batched == [1]:  # more vectors for one matrix: one larger batch
        vectors = moved[1]
        size, batch, length = vectors.shape
        moved[1] = vectors.reshape(size * batch, length)
        out = primitive.bind(*moved, **params)
        return out.reshape(size, batch, out.shape[-1]), 0

    def one(arrays):  # matrices that differ: one after the other, which bounds the memory
        full = list(moved)
        for i, a in zip(batched, arrays):
            full[i] = a
        return primitive.bind(*full, **params)

    return jax.lax.map(one, [moved[i] for i in batched]), 0


def _define(result) -> Primitive:
    name, roles = PRODUCTS[result]
    primitive = Primitive(f"macko_{name}")
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=STATIC))
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
