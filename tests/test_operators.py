"""What Python's and NumPy's syntax does with a packed matrix: supported, or refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse

import macko_jax

RNG = np.random.default_rng(0)
WEIGHT = np.where(RNG.random((24, 40)) < 0.4, RNG.standard_normal((24, 40)), 0).astype(np.float32)
MATRIX = macko_jax.compress(WEIGHT, encoding="delta4", lanes=4)


def test_products_from_the_left():
    y = RNG.standard_normal((2, 3, 24)).astype(np.float32)
    found, back = jax.jit(jax.vjp, static_argnums=0)(lambda y: jnp.sin(y @ MATRIX), y)
    np.testing.assert_allclose(found, np.sin(y @ WEIGHT), rtol=1e-4, atol=1e-4)
    [by_y] = back(jnp.ones_like(found))
    np.testing.assert_allclose(by_y, np.cos(y @ WEIGHT) @ WEIGHT.T, rtol=1e-3, atol=1e-3)
    for left in (y[0, 0], jnp.asarray(y[0, 0]), list(y[0, 0])):
        np.testing.assert_allclose(left @ MATRIX, y[0, 0] @ WEIGHT, rtol=1e-4, atol=1e-4)
    scaled = macko_jax.compress(WEIGHT, dtype="int8", encoding="delta4", lanes=4)
    expected = y[0, 0] @ np.asarray(macko_jax.decompress(scaled))
    np.testing.assert_allclose(y[0, 0] @ scaled, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"x of shape \[\.\.\., 24\], got \[40\]"):
        np.ones(40, np.float32) @ MATRIX


@pytest.mark.parametrize("encoding", ["bitmask", "delta4", "delta5", "two_bank"])
def test_slices_of_rows(encoding):
    for dtype in (None, "int8"):
        options = dict(encoding=encoding, lanes=4, dtype=dtype)
        matrix = jax.tree.map(np.asarray, macko_jax.compress(WEIGHT, capacity=200, **options))
        for rows in (slice(3, 9), slice(-5, None), slice(9, 3)):
            part, packed = matrix[rows], macko_jax.compress(WEIGHT[rows], **options)
            macko_jax.validate(part)
            assert part.layout == packed.layout
            # The bits that choose banks are chosen anew for rows that lie together.
            deltas = np.uint32(0x77777777 if encoding == "two_bank" else 0xFFFFFFFF)
            for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(packed), strict=True):
                b = np.asarray(b)
                same = a & deltas == b & deltas if b.dtype == np.uint32 else a == b
                assert a.dtype == b.dtype and same.all()


@pytest.mark.parametrize(
    "make", [scipy.sparse.csr_matrix, scipy.sparse.coo_array, sparse.BCOO.fromdense]
)
def test_sparse_matrices_of_other_libraries_are_packed(make):
    found = macko_jax.compress(make(WEIGHT), encoding="delta4", lanes=4)
    assert found.layout == MATRIX.layout
    np.testing.assert_array_equal(found.values, MATRIX.values)


def test_what_is_not_supported_says_what_to_write():
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), MATRIX)
    for attempt, words in {
        lambda: macko_jax.compress(WEIGHT) == MATRIX: "jnp.array_equal",
        lambda: WEIGHT == MATRIX: "jnp.array_equal",
        lambda: jnp.asarray(WEIGHT) != MATRIX: "jnp.array_equal",
        lambda: np.asarray(MATRIX): "write macko_jax.decompress",
        lambda: jnp.asarray(MATRIX): "write macko_jax.decompress",
        lambda: MATRIX @ MATRIX: "write macko_jax.decompress",
        lambda: MATRIX[3]: r"rows matrix\[start:stop\], got 3",
        lambda: MATRIX[:, 3]: r"rows matrix\[start:stop\]",
        lambda: MATRIX[::2]: r"rows matrix\[start:stop\]",
        lambda: list(MATRIX): r"rows matrix\[start:stop\]",
        lambda: stack[0:1]: "is a stack",
        lambda: jax.jit(lambda m: m[0:2])(MATRIX): "slice outside",
        lambda: hash(MATRIX): "unhashable",
        lambda: jax.jit(lambda a: macko_jax.compress(sparse.BCOO.fromdense(a, nse=9)))(
            WEIGHT
        ): "concrete array",
        lambda: macko_jax.compress(scipy.sparse.csr_matrix(WEIGHT.astype(float))): "float64",
    }.items():
        with pytest.raises(TypeError, match=words):
            attempt()
    with pytest.raises(AttributeError, match="write x @ matrix"):
        MATRIX.T  # noqa: B018
    assert not hasattr(MATRIX, "T")
    assert MATRIX == MATRIX and MATRIX != None and MATRIX != "a"  # noqa: E711
