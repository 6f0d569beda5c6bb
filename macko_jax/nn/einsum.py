"""Einsum layers that are plain contractions, y = x W^T over some axes, as most attention has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from macko_jax.format.sharded import Matrix
from macko_jax.nn.linear import PackedLayer
from macko_jax.nn.projection import project


class Contraction(NamedTuple):
    """An einsum of an input with a kernel that is a product with one matrix.

    The kernel's axes that are summed with the input's are the columns of the matrix, its others the
    rows, both in the order that they have in the kernel.

    Attributes:
        given: labels of the input's axes; an ellipsis may be among them.
        kernel: labels of the kernel's axes.
        result: labels of the result's axes.
    """

    given: str
    kernel: str
    result: str

    @classmethod
    def of(cls, subscripts: str | None) -> Self:
        """Read subscripts such as "BTD,NDH->BTNH".

        Raises:
            ValueError: if it is no such einsum; see `why_no_contraction`.
        """
        reason = why_no_contraction(subscripts)
        if subscripts is None or reason:
            raise ValueError(reason)
        return cls(*_split(subscripts))

    @property
    def summed(self) -> str:
        """Labels of the kernel's axes that are summed, in its order."""
        return "".join(label for label in self.kernel if label in self.given)

    @property
    def outputs(self) -> str:
        """Labels of the kernel's other axes, in its order."""
        return "".join(label for label in self.kernel if label not in self.given)

    @property
    def kept(self) -> str:
        """Labels of the input's axes that are not summed."""
        return "".join(label for label in self.given if label not in self.kernel)

    @property
    def order(self) -> tuple[int, ...]:
        """The kernel's axes, those that are summed first."""
        return tuple(map(self.kernel.index, self.summed + self.outputs))

    def sizes(self, labels: str, kernel_shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of some axes of a kernel."""
        return tuple(kernel_shape[self.kernel.index(label)] for label in labels)

    def pair(self, kernel_shape: Sequence[int], inner: int) -> tuple[Factor, Factor]:
        """The einsums that do the same by two factors, B and then A.

        Args:
            kernel_shape: of the kernel that they stand for.
            inner: the inner dimension k.

        Returns:
            The one from the input to the inner dimension, and the one from there to the result.
        """
        label = next(c for c in "rabcdefghijklmnopqstuvwxyz" if c not in self.given + self.kernel)
        inputs, outputs = (
            self.sizes(labels, kernel_shape) for labels in (self.summed, self.outputs)
        )
        hidden = self.kept + label
        return (
            Factor(Contraction(self.given, self.summed + label, hidden), (*inputs, inner)),
            Factor(Contraction(hidden, label + self.outputs, self.result), (inner, *outputs)),
        )

    def apply(
        self,
        matrix: Matrix | jax.Array,
        inputs: jax.Array,
        bias: jax.Array | None,
        *,
        kernel_shape: Sequence[int],
        promote: Callable,
        precision=None,
    ) -> jax.Array:
        """The einsum, as Flax's Einsum computes it.

        Args:
            matrix: [out, in], packed or dense, in the place of the kernel.
            inputs: array with the axes `given`.
            bias: array with the axes of `outputs` in the order that they have in the result.
            kernel_shape: shape of the kernel.
            promote: as in `project`.
            precision: as in `project`.

        Returns:
            Array with the axes `result`, in the dtype of the computation.
        """
        summed, outputs, kept = self.summed, self.outputs, self.kept
        if bias is not None:
            in_result = "".join(label for label in self.result if label in outputs)
            bias = bias.reshape(self.sizes(in_result, kernel_shape))
            bias = jnp.einsum(f"{in_result}->{outputs}", bias)
        product = project(
            matrix,
            jnp.einsum(f"{self.given}->{kept}{summed}", jnp.asarray(inputs)),
            bias,
            axis=range(-len(summed), 0),
            out_features=self.sizes(outputs, kernel_shape),
            promote=promote,
            precision=precision,
        )
        return jnp.einsum(f"{kept}{outputs}->{self.result}", product)

    def __str__(self) -> str:
        return f"{self.given},{self.kernel}->{self.result}"


class Factor(NamedTuple):
    """The einsum of one of two factors, and the shape of its kernel."""

    contraction: Contraction
    kernel_shape: tuple[int, ...]


def why_no_contraction(subscripts: str | None) -> str | None:
    """Why an einsum of an input with a kernel is no product with one matrix; None if it is."""
    if subscripts is None:
        return "its einsum is given by each call"
    given, kernel, result = _split(subscripts)
    parts = [part.replace("...", "") for part in (given, kernel, result)]
    axes = set("".join(parts))
    shared = [label for label in kernel if label in given]
    lonely = [label for label in axes if sum(label in part for part in parts) < 2]
    batch = [label for label in shared if label in result]
    reason = None
    if "." in kernel:
        reason = "has an ellipsis in its kernel"
    elif any(len(set(part)) < len(part) for part in parts):
        reason = "names an axis twice in one operand"
    elif batch:
        reason = f"has a matrix for each entry of axis {', '.join(map(repr, batch))}"
    elif lonely or ("." in given) != ("." in result):
        reason = "sums an axis that only one operand has"
    elif not shared or len(shared) == len(kernel):
        reason = "has no matrix: " + ("all" if shared else "none") + " of its kernel is summed"
    return f"its einsum {subscripts!r} {reason}" if reason else None


def why_no_einsum(layer: nnx.Einsum | nn.Einsum) -> str | None:
    """Why a Flax Einsum is more than a plain contraction; None if it is one."""
    base = nnx.Einsum if isinstance(layer, nnx.Einsum) else nn.Einsum
    if type(layer).__call__ is not base.__call__:
        return f"{type(layer).__name__} has a __call__ of its own"
    if layer.preferred_element_type is not None:
        return "it sets preferred_element_type"
    if isinstance(layer, nnx.Einsum) and layer.einsum_op is not jnp.einsum:
        return "it has an einsum_op of its own"
    return why_no_contraction(layer.einsum_str)


class MackoEinsum(PackedLayer):
    """An einsum of its input with a kernel that is held as a MACKO matrix.

    It computes y = einsum(subscripts, x, kernel) + b as the `nnx.Einsum` that it replaces, with the
    same promotion of dtypes; sums are accumulated in float32. What of it is trained: see
    `PackedLayer`.

    Args:
        einsum: the layer that it replaces, whose bias it takes over; it may be abstract.
        matrix: [out, in]: the kernel's axes that are summed are `in`, the others `out`.
    """

    def __init__(self, einsum: nnx.Einsum, matrix: Matrix):
        super().__init__(matrix, einsum.bias, tuple(einsum.kernel_shape))
        self.einsum_str = einsum.einsum_str
        self.dtype = einsum.dtype
        self.promote_dtype = einsum.promote_dtype

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding=None
    ) -> jax.Array:
        """Contract the inputs with the kernel and add the bias.

        Args:
            inputs: as the layer replaced takes them.
            einsum_str: only None, or that of the layer.
            out_sharding: only None; accepted for the sake of callers written for `nnx.Einsum`.
        """
        if out_sharding is not None or einsum_str not in (None, self.einsum_str):
            raise ValueError(
                f"einsum_str={einsum_str!r} and out_sharding={out_sharding} were given to a packed "
                f"layer, which computes {self.einsum_str!r} without sharding; leave this layer "
                "dense with a rule, Rule(path, skip=True)"
            )
        return Contraction.of(self.einsum_str).apply(
            self.matrix,
            inputs,
            None if self.bias is None else self.bias[...],
            kernel_shape=self.kernel_shape,
            promote=lambda arrays: self.promote_dtype(arrays, dtype=self.dtype),
        )


def _split(subscripts: str) -> tuple[str, str, str]:
    """Labels of the input, the kernel and the result."""
    operands, _, result = subscripts.replace(" ", "").partition("->")
    given, _, kernel = operands.partition(",")
    return given, kernel, result
