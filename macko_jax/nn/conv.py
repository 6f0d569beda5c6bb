"""A packed convolution, of NNX."""

from typing import Any

import jax
from flax import nnx

from macko_jax.format.matrix import MackoMatrix, decompress
from macko_jax.nn.linear import PackedLayer


class MackoConv(PackedLayer):
    """A convolution whose kernel is held as a MACKO matrix `[out, window * in]`.

    A convolution multiplies the same kernel with the patches of every position, far above the
    number of vectors where a sparse product pays; so the kernel is densified where it is used, and
    only memory is saved. What of it is trained: see `PackedLayer`.

    Args:
        conv: the `nnx.Conv` that it replaces, whose bias it takes over; it may be abstract.
        matrix: the packed kernel. In a vmapped or scanned stack its arrays have leading axes.
    """

    def __init__(self, conv: nnx.Conv, matrix: MackoMatrix):
        shape = conv.kernel.get_value().shape[-len(conv.kernel_size) - 2 :]
        super().__init__(matrix, conv.bias, shape)
        # All that a convolution is but its arrays: strides, padding, dtypes, groups.
        bare: Any = nnx.clone(conv)
        bare.kernel = nnx.data(None)
        bare.bias = nnx.data(None)
        self.graph, _ = nnx.split(bare)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Convolve as the `nnx.Conv` that it replaces."""
        conv = nnx.merge(self.graph, nnx.State({}))
        conv.kernel = nnx.Param(decompress(self.matrix).T.reshape(self.kernel_shape))
        conv.bias = self.bias
        return conv(inputs, out_sharding=out_sharding)
