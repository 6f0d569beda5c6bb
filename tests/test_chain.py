"""Chains of products: the kernel, and the products one after the other."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import macko_jax
from macko_jax.kernels import chain, emulation, spmv
from macko_jax.kernels.vectors import BLANK
from tests.test_kernels import ENCODINGS, abstract, sparse, vectors

EPS = 1e-5


def exact_chain(matrices, x, residual, scale):
    """x1 = r + A x; y = x1 + C swiglu(B norm(x1)), with every result rounded to float16."""
    a, b, c = (np.asarray(macko_jax.decompress(m), np.float64) for m in matrices)
    rounded = lambda v: v.astype(np.float16).astype(np.float64)
    x1 = rounded(a @ x + residual)
    gate, up = np.split(rounded(b @ (x1 / np.sqrt((x1 * x1).mean() + EPS) * scale)), 2)
    return x1 + c @ (gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_program(encoding):
    hidden, wide, blocks = 72, 136, 5
    matrices = [macko_jax.compress(sparse(rows, cols, 0.4, np.float16, seed=i), encoding=encoding)
                for i, (rows, cols) in enumerate([(hidden, 40), (2 * wide, hidden), (hidden, wide)])]
    fusions = (spmv.Fusion(add=True), spmv.Fusion(EPS), spmv.Fusion(gated=True, add=True))
    plan = chain.Plan(tuple(
        chain.Step(abstract(m), fusion, added) for m, fusion, added in
        zip(matrices, fusions, (None, None, 0))), jnp.dtype(jnp.float16), blocks)
    x, residual = vectors(1, 40, dtype=np.float16)[0], vectors(1, hidden, 1, dtype=np.float16)[0]
    scale = 1 + vectors(1, hidden, 2, dtype=np.float16)[0]
    arrays = {f"{name}{i}": np.asarray(getattr(m, name)) for i, m in enumerate(matrices)
              for name in ("values", "codes", "row_offsets", "starts")}
    arrays |= {"x": x, "add0": residual, "scale1": scale, "y": np.zeros(hidden, np.float16),
               "exchange": np.full(hidden + 2 * wide, BLANK, np.uint16)}
    assert set(plan.names) | {"y", "exchange"} == set(arrays)
    ops = emulation.NumpyLanes(
        arrays, blocks=blocks, threads=32 * chain.WARPS, shared_slots=plan.shared_slots)
    chain.program(ops, plan)
    exact = exact_chain(matrices, x.astype(np.float64), residual, scale)
    np.testing.assert_allclose(ops.arrays["y"], exact, rtol=1e-2, atol=1e-2 * np.abs(exact).max())
