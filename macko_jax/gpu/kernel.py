"""What every kernel is, and what it is asked for."""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp

from macko_jax.format.layout import Layout
from macko_jax.lanes.vocabulary import Lanes

PRODUCTS = ("spmv", "spmv_transposed", "sddmm", "densify")


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What is done around a product of one vector: y = add + row_scales * (A f(x)).

    Attributes:
      eps: f(x) = x / sqrt(mean(x^2) + eps) * scale, or None for no norm.
      gated: whether f(x) = silu(x[:cols]) * x[cols:].
      add: whether something is added.
      added: in a chain, the number of the earlier product whose result is added; None if what is
        added is an operand.
      scaled: whether `row_scales`, those of 8-bit values, are an operand.
      kept: whether, in a chain, the result is one of the chain's.
    """

    eps: float | None = None
    gated: bool = False
    add: bool = False
    added: int | None = None
    scaled: bool = False
    kept: bool = False

    @property
    def before(self) -> str | None:
        """What is done to x; see `staging.Vectors`."""
        return "norm" if self.eps is not None else "gate" if self.gated else None

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands that come on top of the matrix and x, in their order."""
        named = {
            "scale": self.eps is not None,
            "add": self.add and self.added is None,
            "row_scales": self.scaled,
        }
        return tuple(name for name, there in named.items() if there)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a product is asked for: everything that may decide between implementations.

    Attributes:
      product: one of `PRODUCTS`.
      platform: what it is lowered for, "cpu" or "cuda", or "any" for every other.
      layout: that of the matrix.
      batch: the number of vectors; None where it is symbolic, in what `jax.export` makes.
      dtypes: the types of the two operands, in the product's order: of (values, x), (values, y),
        (x, y), or of the values alone.
      out_dtype: the type of the result.
      fusion: what is done around the product.
    """

    product: str
    platform: str
    layout: Layout
    batch: int | None
    dtypes: tuple
    out_dtype: Any
    fusion: Fusion = Fusion()

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the values, which are an operand or, of "sddmm", the result."""
        return jnp.dtype(self.out_dtype if self.product == "sddmm" else self.dtypes[0])

    @property
    def known_batch(self) -> int:
        """The number of vectors, for what is reached only where it is known."""
        assert self.batch is not None, "no kernel is made for a symbolic number of vectors"
        return self.batch

    @property
    def x_dtype(self) -> jnp.dtype:
        """The type of the vectors."""
        return jnp.dtype(self.dtypes[0 if self.product == "sddmm" else -1])


def problem_of(product: str, layout: Layout, values, vectors, out_dtype, **more) -> Problem:
    """The problem, on CUDA, of arrays: values and vectors [batch, ...], or x and y of "sddmm"."""
    return Problem(
        product=product,
        platform="cuda",
        layout=layout,
        batch=vectors.shape[0],
        dtypes=(values.dtype, vectors.dtype),
        out_dtype=jnp.dtype(out_dtype),
        **more,
    )


class Kernel(Protocol):
    """A kernel: the module's functions, of which each takes what the one before it gives.

    What a kernel is asked for is a `Problem`; a chain is asked for a tuple of them.
    """

    def why_not(self, problem: Any, /) -> str | None:
        """None if the kernel serves the problem, or the reason why it does not."""
        ...

    def plan(self, problem: Any, /) -> Any:
        """How the problem is laid out on the device, where `why_not` has no objection."""
        ...

    def program(self, ops: Lanes, plan: Any, /) -> None:
        """The lane program, which an interpreter can run as well."""
        ...

    def run(self, plan: Any, /, *operands) -> Any:
        """The results of the program on a GPU."""
        ...
