"""Two factors in the place of one matrix, W = A B: a leaf of linen variables and of files."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax

from macko_jax.format.sharded import Matrix


@functools.partial(jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class FactorizedKernel:
    """Two factors in the place of a linen layer's `kernel`, each dense with zeros or packed.

    Where layers are stacked, all arrays have the leading axes of the stack. A factor of a layer
    with groups (a grouped convolution) has its blocks one below the other when it is packed.

    Attributes:
        left: A, `[groups, out / groups, k]`, or a matrix packed `[out, k]`.
        right: B, `[groups, k, in]`, or a MackoMatrix `[groups * k, in]`.
    """

    left: jax.Array | Matrix
    right: jax.Array | Matrix

    @property
    def inner(self) -> int:
        """The inner dimension k, of each group."""
        return self.left.shape[-1]

    @property
    def groups(self) -> int:
        """The number of groups; for dense factors that of one layer of a stack."""
        if isinstance(self.right, Matrix):
            return self.right.shape[0] // self.inner
        return self.right.shape[-3]

    def check(self) -> None:
        """Raise a ValueError if the two factors do not fit each other."""
        for factor in (self.left, self.right):
            if not isinstance(factor, Matrix) and getattr(factor, "ndim", 0) < 3:
                raise ValueError(f"a factor must have 3 axes or be packed, got {factor!r}")
        shapes = [
            (*factor.stack, *factor.shape) if isinstance(factor, Matrix) else factor.shape
            for factor in self.matrices
        ]
        (*stack, rows, inner), (*other, joined, _) = shapes
        groups = joined // inner if inner else 0
        if stack != other or groups * inner != joined or not groups or rows % groups:
            raise ValueError(
                f"the factors [out, k] = {list(shapes[0])} and [groups * k, in] = "
                f"{list(shapes[1])} do not fit each other"
            )

    @property
    def matrices(self) -> tuple[jax.Array | Matrix, jax.Array | Matrix]:
        """`[*stack, out, k]` and `[*stack, groups * k, in]`, whatever the factors are."""
        left, right = (
            factor if isinstance(factor, Matrix) else join_groups(factor)
            for factor in (self.left, self.right)
        )
        return left, right


def join_groups(factor: jax.Array) -> jax.Array:
    """A dense factor [*stack, groups, rows, cols] with its groups one below the other."""
    *stack, groups, rows, cols = factor.shape
    return factor.reshape(*stack, math.prod((groups, rows)), cols)
