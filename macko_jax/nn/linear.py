"""Packed NNX layers: what they have in common, the linear one, and chains of linear ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from macko_jax.format.matrix import MackoMatrix
from macko_jax.format.sharded import Matrix, ShardedMatrix
from macko_jax.nn.absent import AbsentKernel
from macko_jax.nn.projection import project
from macko_jax.ops.fused import Step, fused_chain, in_turn

INDEX_NAMES = ("codes", "row_offsets", "starts")
ARRAY_NAMES = ("values", *INDEX_NAMES, "scales")


class MackoIndex(nnx.Variable):
    """Integers, and 8-bit values, of a packed layer; no gradient and no optimizer touches them."""


class PackedLayer(nnx.Module):
    """A layer whose kernel is held as one MACKO matrix.

    `values` is an `nnx.Param`: `nnx.grad` differentiates it and `nnx.Optimizer` updates it, and
    since there is no entry for a zero, the pattern of non-zeros stays as it is. 8-bit values are
    fixed, and their `scales` are the `nnx.Param`. The other arrays are `MackoIndex` variables. In a
    vmapped or scanned stack all of them have the stack's leading axes, so a `nnx.StateAxes` that
    names `nnx.Param` has to name `MackoIndex` as well.

    Args:
        matrix: [out, in], the transpose of the kernel with its axes flattened; whole or in shards.
        bias: an `nnx.Param` that the layer takes over, or None.
        kernel_shape: of the kernel that was here, without the axes of a stack.
    """

    def __init__(self, matrix: Matrix, bias: nnx.Param | None, kernel_shape: tuple[int, ...]):
        scaled = matrix.scales is not None
        self.values = (MackoIndex if scaled else nnx.Param)(matrix.values)
        self.scales = nnx.data(nnx.Param(matrix.scales) if scaled else None)
        self.codes = MackoIndex(matrix.codes)
        self.row_offsets = MackoIndex(matrix.row_offsets)
        self.starts = MackoIndex(matrix.starts)
        self.bias = nnx.data(bias)
        self.kernel_shape = kernel_shape
        self.shape = matrix.shape
        self.encoding = matrix.encoding
        self.lanes = matrix.lanes
        self.shards = (matrix.sharding, matrix.parts) if isinstance(matrix, ShardedMatrix) else None

    @property
    def kernel(self) -> AbsentKernel:
        """The shape and dtype of the kernel that was here; there are no numbers to read."""
        held = self.values if self.scales is None else self.scales
        return AbsentKernel(
            self.kernel_shape,
            held.dtype,
            f"a {type(self).__name__} has no 'kernel': it holds `matrix`, [out, in], whose dense "
            "form macko_jax.decompress(layer.matrix) gives. To keep the layer dense, pack the "
            "model with a Rule of its path and skip=True",
        )

    @property
    def matrix(self) -> Any:
        """The kernel's transpose, [out, in], a MackoMatrix or a ShardedMatrix."""
        arrays = [getattr(self, name).get_value() for name in ("values", *INDEX_NAMES)]
        described = {"shape": self.shape, "encoding": self.encoding, "lanes": self.lanes}
        scales = None if self.scales is None else self.scales.get_value()
        if self.shards is None:
            return MackoMatrix(*arrays, **described, scales=scales)
        sharding, parts = self.shards
        return ShardedMatrix(*arrays, **described, sharding=sharding, parts=parts, scales=scales)


class MackoLinear(PackedLayer):
    """A linear layer whose kernel is a MACKO matrix.

    It computes y = x W^T + b as the `nnx.Linear` or `nnx.LinearGeneral` that it replaces, with the
    same promotion of dtypes; sums are accumulated in float32 whatever the layer's `precision`. What
    of it is trained: see `PackedLayer`.

    Args:
        matrix: [out, in], the product of the output by the product of the input features.
        bias: [*out_features], an `nnx.Param` that the layer takes over, or None.
        in_features: int, or a tuple for several contracted axes.
        out_features: int, or a tuple for several output axes.
        axis: the contracted axes of the input.
        dtype: dtype of the computation, None to promote that of input, values and bias.
        promote_dtype: as in `nnx.Linear`.
    """

    def __init__(
        self,
        matrix: Matrix,
        bias: nnx.Param | None = None,
        *,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        axis: int | tuple[int, ...] = -1,
        dtype: Any = None,
        promote_dtype=promote_dtype,
    ):
        inputs, outputs = as_tuple(in_features), as_tuple(out_features)
        expected = (math.prod(outputs), math.prod(inputs))
        if matrix.shape != expected:
            raise ValueError(
                f"The matrix has shape {matrix.shape}; a layer from {in_features} to "
                f"{out_features} features needs [out, in] = {expected}"
            )
        super().__init__(matrix, bias, inputs + outputs)
        self.in_features = in_features
        self.out_features = out_features
        self.axis = axis
        self.dtype = dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Multiply by the kernel and add the bias.

        Args:
            inputs: array whose axes `axis` hold the input features, by default the last one.
            out_sharding: only None; accepted for the sake of callers written for `nnx.Linear`.

        Returns:
            [*other axes of inputs, *out_features].
        """
        if out_sharding is not None:
            raise ValueError(
                f"out_sharding={out_sharding} was given to a packed layer, which supports None "
                "only; leave this layer dense with a rule, Rule(path, skip=True)"
            )
        return self.fused(inputs)

    def fused(
        self,
        inputs: jax.Array,
        *,
        norm: tuple[jax.Array, float] | None = None,
        gated: bool = False,
        add: jax.Array | None = None,
    ) -> jax.Array:
        """add + what the layer makes of f(inputs); on a GPU one kernel, where there is one token.

        Args:
            inputs: as the layer takes them; where `gated`, twice as wide.
            norm: (scale, eps), f divides by the root mean square and multiplies by the scale.
            gated: f(gate, x) = silu(gate) * x, of the two halves of the inputs.
            add: of the shape of the result, such as the residual stream.

        Returns:
            [*other axes of inputs, *out_features]; see `macko_jax.experimental.fused_spmv`.
        """
        return project(
            self.matrix,
            inputs,
            None if self.bias is None else self.bias[...],
            axis=self.axis,
            out_features=self.out_features,
            promote=lambda arrays: self.promote_dtype(arrays, dtype=self.dtype),
            norm=norm,
            gated=gated,
            add=add,
        )


class MackoLoRALinear(MackoLinear):
    """A packed linear layer beside an adapter of low rank, in the place of an `nnx.LoRALinear`.

    y = x W^T + b + x A B. The adapter, `lora`, stays dense, and is the layer's own `nnx.LoRA`.
    """

    lora: Any

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Multiply by the kernel, and add the bias and what the adapter gives."""
        return super().__call__(inputs, out_sharding) + self.lora(inputs)


def chain(
    x: jax.Array, steps: Sequence[Step], *, blank: jax.Array | None = None
) -> list[jax.Array]:
    """Layers of which each takes the result of the one before; see `experimental.fused_chain`.

    Two chains at once on one GPU can wait for each other for ever: `macko_jax.experimental`.

    Layers of another type than x, that contract other axes than the last, or that add something to
    a bias, make it a kernel for each layer.

    Args:
        x: the first layer's inputs.
        steps: `macko_jax.experimental.Step`s of `MackoLinear`s.
        blank: see `macko_jax.experimental.fused_chain`.

    Returns:
        The results of the steps that are `kept`, and of the last.
    """
    products = [_matrix_step(step, x.dtype) for step in steps]
    whole = [product for product in products if product is not None]
    if len(whole) == len(products):
        return fused_chain(x, whole, blank=blank)
    return in_turn(
        x,
        steps,
        lambda x, step: step.linear.fused(x, norm=step.norm, gated=step.gated, add=step.add),
    )


def _matrix_step(step: Step, dtype) -> Step | None:
    """The step with its layer's matrix, for inputs of a dtype; None if the layer is more."""
    layer = step.linear
    kind = layer.matrix.dtype
    alike = jnp.dtype(dtype) == kind == jnp.dtype(layer.dtype or dtype)
    simple = isinstance(layer.in_features, int) and isinstance(layer.out_features, int)
    if not (alike and simple and layer.axis in (-1, (-1,))):
        return None
    if layer.bias is not None:
        if step.add is not None or layer.bias.dtype != kind:
            return None
        step = step._replace(add=layer.bias[...])
    return step._replace(linear=layer.matrix)


def as_tuple(features: int | Sequence[int]) -> tuple[int, ...]:
    """The features of a layer as a tuple, where a single number means one axis."""
    return (features,) if isinstance(features, int) else tuple(features)
