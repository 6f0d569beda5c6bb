"""What the tests of kernels share: matrices, problems, and programs executed by the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from macko_jax.format import quantization
from macko_jax.format.layout import Layout
from macko_jax.gpu import row_walk
from macko_jax.gpu.kernel import Problem
from macko_jax.lanes import interpreter

ENCODINGS = row_walk.ENCODINGS
# Encodings, and the types of their values, if those are not the vector's.
STORED = [
    *((encoding, None) for encoding in ENCODINGS),
    ("two_bank", "int8"),
    ("delta5", "float8_e4m3fn"),
]
ARRAYS = "values", "codes", "row_offsets", "starts"
HAS_GPU = any(d.platform == "gpu" for d in jax.local_devices())
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="JAX finds no GPU")


def sparse(rows, cols, density, dtype, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < density)
    return np.asarray(jnp.asarray(dense, dtype))


def held(dense, values=None):
    """What a matrix of `dense` holds, float64; 8-bit `values` with their scales, not rounded."""
    if values is None:
        return dense.astype(np.float64)
    values, scales = quantization.quantize(dense, values)
    return values.astype(np.float64) * scales.astype(np.float64)[:, None]


def vectors(batch, cols, seed=1, dtype=np.float32):
    x = np.random.default_rng(seed).standard_normal((batch, cols))
    return x.astype(jnp.dtype(dtype))


def ask(product, matrix, vectors, out_dtype="float32", **more) -> Problem:
    """The problem of a matrix and vectors [batch, ...], by default with a result in float32."""
    return ask_for(
        product,
        matrix.layout,
        matrix.values.dtype,
        vectors.dtype,
        len(vectors),
        out_dtype=out_dtype,
        **more,
    )


def ask_for(
    product,
    layout: Layout,
    dtype,
    x_dtype=None,
    batch=1,
    *,
    out_dtype="float32",
    platform="cuda",
    **more,
) -> Problem:
    """The problem of a matrix of the layout, with values of `dtype` and vectors of `x_dtype`."""
    x_dtype = jnp.dtype(x_dtype or dtype)
    dtypes = {"sddmm": (x_dtype, x_dtype), "densify": (jnp.dtype(dtype),)}.get(
        product, (jnp.dtype(dtype), x_dtype)
    )
    return Problem(product, platform, layout, batch, dtypes, jnp.dtype(out_dtype), **more)


def arrays_of(matrix, *names):
    return {name: np.asarray(getattr(matrix, name)) for name in names or ARRAYS}


def execute(program, plan, arrays, out, *, blocks, warps):
    """The result of a lane program, by the interpreter."""
    [name] = out
    results = interpreter.run(
        lambda ops: program(ops, plan),
        arrays | out,
        blocks=blocks,
        warps=warps,
        shared_slots=plan.shared_slots,
    )
    return results[name]


def assert_product(y, dense, x):
    """Within the bound of a float32 sum in any order: (terms + 2) eps sum |w x| (Higham, 4.2)."""
    exact = x.astype(np.float64) @ dense.astype(np.float64).T
    terms = (dense != 0).sum(1) + 2
    bound = (
        terms
        * np.finfo(np.float32).eps
        * (np.abs(x.astype(np.float64)) @ np.abs(dense.astype(np.float64)).T)
    )
    assert np.all(np.abs(y - exact) <= bound), np.abs(y - exact).max()
