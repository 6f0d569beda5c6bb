"""The packages' own arithmetic, whatever a program forbids to its own.

`jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` find slips in the code
of users, who should not have to do without them for the sake of a library's code.
"""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def own_promotion() -> Iterator[None]:
    """A context, and a decorator of functions that JAX traces, with JAX's default promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
