"""Fine-tuning of sparse models: any optax optimizer, with the pattern of zeros held exactly."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class KeepSparsityState(NamedTuple):
    """Masks as they were at `init`, beside the inner optimizer's state.

    Attributes:
      masks: For each parameter, bool of its shape; a scalar True where it is free.
      inner: State of the wrapped optimizer.
    """

    masks: Any
    inner: Any


def keep_sparsity(
    optimizer: optax.GradientTransformation,
    is_sparse: Callable[[tuple, jax.Array], bool] = lambda path, parameter: parameter.ndim > 1,
) -> optax.GradientTransformation:
    """Wraps an optimizer so that entries which are zero at `init` stay exactly zero.

    Gradients are masked before the optimizer sees them, so that no moment, norm or clipping is
    moved by a removed weight, and updates are masked after it, so that neither weight decay nor
    noise revives one. Masks live in the optimizer's state: they are saved and restored with it.

    Args:
      optimizer: Any optax optimizer.
      is_sparse: `is_sparse(path, parameter)` says which parameters have a pattern to keep, `path`
        being JAX's key path; the default takes all with two axes or more, so that biases and norm
        scales that happen to start at zero can move. A parameter that is zero everywhere is free.

    Returns:
      An optax optimizer with state `KeepSparsityState`.
    """

    def init(params: Any) -> KeepSparsityState:
        def mask(path: tuple, parameter: jax.Array) -> jax.Array:
            if not is_sparse(path, parameter):
                return jnp.ones((), bool)
            kept = parameter != 0
            return jnp.where(kept.any(), kept, True)

        return KeepSparsityState(
            jax.tree_util.tree_map_with_path(mask, params), optimizer.init(params)
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, KeepSparsityState]:
        updates = _apply(state.masks, updates)
        updates, inner = optax.with_extra_args_support(optimizer).update(
            updates, state.inner, params, **extra
        )
        return _apply(state.masks, updates), state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _apply(masks: Any, updates: Any) -> Any:
    """Sets the updates of masked entries to zero."""
    return jax.tree.map(lambda mask, u: jnp.where(mask, u, jnp.zeros_like(u)), masks, updates)
