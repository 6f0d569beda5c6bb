"""Matrix products and convolutions as one thing: matrices `[groups, out, in]` and input rows."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def matmul_matrix(x: jax.Array, dims) -> jax.Array:
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
    """How a convolution reads its input; every entry as in `lax.conv_general_dilated`."""

    input_spec: tuple[int, ...]  # axes of batch, channel, then space
    kernel_spec: tuple[int, ...]  # axes of out, in, then space
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def of(eqn, kernel_shape):
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

    def matrix(self, kernel):
        """Kernel to `[groups, out / groups, window * in / groups]`."""
        kernel = jnp.transpose(kernel, self.kernel_spec)  # out, in, space
        kernel = jnp.moveaxis(kernel, 1, -1)
        return kernel.reshape(self.groups, kernel.shape[0] // self.groups, -1)

    def rows(self, x):
        """Input to its patches (im2col), `[groups, n, window * in / groups]`."""
        x = jnp.moveaxis(jnp.transpose(x, self.input_spec), 1, -1)  # batch, space, channel
        edges = [(low, high, d - 1) for (low, high), d in zip(self.padding, self.input_dilation)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        space = len(self.window)
        reach = [d * (w - 1) + 1 for d, w in zip(self.kernel_dilation, self.window)]
        counts = [(x.shape[1 + i] - reach[i]) // self.strides[i] + 1 for i in range(space)]
        patches = []
        for offset in np.ndindex(*self.window):
            first = [o * d for o, d in zip(offset, self.kernel_dilation)]
            last = [f + (c - 1) * s + 1 for f, c, s in zip(first, counts, self.strides)]
            window = tuple(slice(f, l, s) for f, l, s in zip(first, last, self.strides))
            patch = x[(slice(None), *window)]
            patches.append(patch.reshape(-1, self.groups, x.shape[-1] // self.groups))
        patches = jnp.stack(patches, axis=2)  # n, groups, window, channel
        return jnp.moveaxis(patches, 1, 0).reshape(self.groups, patches.shape[0], -1)
