"""What packed matrices have in common, whole or in shards: their sizes, and Python's operators."""

import math
from typing import Any

import jax
import numpy as np


class PackedMatrix:
    """The sizes of a packed matrix, its products, and errors that say what to write instead.

    The one import upward: operators belong to the class, and products to `macko_jax.ops`.
    """

    values: jax.Array
    scales: jax.Array | None

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of a stack of matrices, () for one."""
        return self.values.shape[:-1]

    @property
    def dtype(self):
        """Type of the matrix's elements: of the values, or of the scales of 8-bit values."""
        return (self.values if self.scales is None else self.scales).dtype

    @property
    def stored(self) -> int:
        """Number of slots, elements and padding, of one matrix or shard: the length of `values`."""
        return self.values.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held, on all devices together."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def density(self: Any) -> float:
        """nnz over the number of positions."""
        return self.nnz / max(1, math.prod((*self.stack, *self.shape)))

    def __matmul__(self: Any, x) -> jax.Array:
        """The product with x [cols] or [..., cols, n], shaped as by `jnp.matmul`."""
        from macko_jax.ops import api

        return api.matmul(self, x)

    def __rmatmul__(self: Any, x) -> jax.Array:
        """The product x @ A of x [rows] or [..., rows], shaped as by `jnp.matmul`."""
        from macko_jax.ops import api

        return api.matmul_from_left(x, self)

    __array_ufunc__ = None  # NumPy's arrays leave `x @ matrix` to the matrix

    def __eq__(self, other):
        if self is other:
            return True
        if isinstance(other, (PackedMatrix, jax.Array, np.ndarray)):
            raise TypeError(
                f"== of a {type(self).__name__} could mean its elements or all of it; write "
                "macko_jax.decompress(a) == macko_jax.decompress(b), or jnp.array_equal of the two"
            )
        return NotImplemented

    @property
    def T(self):
        """There is no transpose: `x @ matrix` is the product with it."""
        raise AttributeError(
            f"a {type(self).__name__} has no T: for A^T x write x @ matrix, and to pack the "
            "transpose macko_jax.compress(macko_jax.decompress(matrix).T)"
        )

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            f"a {type(self).__name__} is not made dense unasked; write "
            "macko_jax.decompress(matrix), or macko_jax.spmv(matrix, x) for a product"
        )
