"""Matrix products and convolutions in one form: matrices `[groups, out, in]` and input rows.

The rows of a matrix product are its activation's vectors; those of a convolution are the patches of
its input (im2col).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def matmul_matrix(x: jax.Array, dims: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    """An operand of a `dot_general` as `[batch, free, contracted]`.

    A kernel becomes `[groups, out, in]` and an activation `[groups, n, in]`.

    Args:
      x: The operand.
      dims: Its contracted and its batch dimensions, two tuples.
    """
    contract, batch = dims
    free = [d for d in range(x.ndim) if d not in contract and d not in batch]
    sizes = [math.prod(x.shape[d] for d in group) for group in (batch, free, contract)]
    return x.transpose(*batch, *free, *contract).reshape(sizes)


class Convolution(NamedTuple):
    """How a convolution reads its input; every entry is as in `lax.conv_general_dilated`.

    Attributes:
      input_spec: Axes of batch, channel, then space of the input.
      kernel_spec: Axes of out, in, then space of the kernel.
      window: Size of the window along each axis of space.
      strides: Steps of the window.
      padding: Zeros before and behind each axis of space.
      input_dilation: Distance of neighbouring inputs.
      kernel_dilation: Distance of neighbouring entries of the window.
      groups: Groups of channels that do not mix.
    """

    input_spec: tuple[int, ...]
    kernel_spec: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def of(eqn: Any, kernel_shape: Sequence[int]) -> "Convolution":
        """The geometry of a `conv_general_dilated` equation."""
        params = eqn.params
        spec = params["dimension_numbers"]
        return Convolution(
            tuple(spec.lhs_spec),
            tuple(spec.rhs_spec),
            tuple(kernel_shape[d] for d in spec.rhs_spec[2:]),
            tuple(params["window_strides"]),
            tuple(map(tuple, params["padding"])),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            params["feature_group_count"],
        )

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """Turns a kernel into matrices `[groups, out / groups, window * in / groups]`."""
        kernel = jnp.transpose(kernel, self.kernel_spec)  # out, in, space
        kernel = jnp.moveaxis(kernel, 1, -1)
        return kernel.reshape(self.groups, kernel.shape[0] // self.groups, -1)

    def _reach(self) -> list[int]:
        """Inputs that the window covers along each axis of space, those it skips included."""
        return [d * (w - 1) + 1 for d, w in zip(self.kernel_dilation, self.window)]

    def free(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the batch and of each axis of positions, whose product is `n` of `rows`."""
        sizes = [shape[d] for d in self.input_spec[2:]]
        spread = [d * (size - 1) + 1 for d, size in zip(self.input_dilation, sizes)]
        padded = [low + size + high for (low, high), size in zip(self.padding, spread)]
        counts = [
            (size - reach) // stride + 1
            for size, reach, stride in zip(padded, self._reach(), self.strides)
        ]
        return (shape[self.input_spec[0]], *counts)

    def rows(self, x: jax.Array) -> jax.Array:
        """Turns an input into its patches (im2col), `[groups, n, window * in / groups]`."""
        counts = self.free(x.shape)[1:]
        x = jnp.moveaxis(jnp.transpose(x, self.input_spec), 1, -1)  # batch, space, channel
        margins = [(low, high, d - 1) for (low, high), d in zip(self.padding, self.input_dilation)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
        patches = []
        for offset in np.ndindex(*self.window):
            first = [o * d for o, d in zip(offset, self.kernel_dilation)]
            last = [f + (c - 1) * s + 1 for f, c, s in zip(first, counts, self.strides)]
            window = tuple(slice(*edges) for edges in zip(first, last, self.strides))
            patch = x[(slice(None), *window)]
            patches.append(patch.reshape(-1, self.groups, x.shape[-1] // self.groups))
        patches = jnp.stack(patches, axis=2)  # n, groups, window, channel
        return jnp.moveaxis(patches, 1, 0).reshape(self.groups, patches.shape[0], -1)
