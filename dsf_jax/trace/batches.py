"""Calibration batches: their arrays, whatever else is in them, and the weights of their tokens."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Where the weights of a batch's tokens are: a key of a dict, a position in a tuple, or a function.
TokenWeights = str | int | Callable[[Any], Any] | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch taken apart, so that its arrays can be traced and all else stays as it is.

    Attributes:
      arrays: Its arrays, in the order of its leaves.
      form: Structure, shapes, dtypes, and what is no array: batches of equal form share programs.
      fill: `fill(arrays)` is the batch with other arrays, and the same flags, strings and numbers.
      static: What is no array.
      token_weights: A weight for each token, `[*tokens]`; None where all count alike.
    """

    arrays: list[Any]
    form: Hashable
    fill: Callable[[Sequence[Any]], Any]
    static: tuple[Any, ...]
    token_weights: Any = None

    @classmethod
    def of(cls, batch: Any, name: str = "the batch", token_weights: TokenWeights = None) -> "Batch":
        """Takes a batch apart.

        Args:
          batch: A pytree of arrays and of what stays fixed: flags, strings, numbers, None.
          name: What to call it in an error.
          token_weights: Where the weights of its tokens are.

        Returns:
          The `Batch`.

        Raises:
          ValueError: It holds no array, an empty one, or what cannot stay fixed; or its weights are
            not where they should be, or are no weights.
        """
        with_paths, tree = jax.tree_util.tree_flatten_with_path(batch, is_leaf=_is_list_of_numbers)
        leaves = [leaf for _, leaf in with_paths]
        is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
        for path, leaf in with_paths:
            _check_leaf(leaf, f"{name}{jax.tree_util.keystr(path)}")
        if not any(is_array):
            raise ValueError(f"{name} holds no array; it is a {type(batch).__name__}")
        weights = None
        if token_weights is not None:
            weights = _find_weights(batch, token_weights, name)

        def fill(arrays: Sequence[Any]) -> Any:
            given = iter(arrays)
            filled = [next(given) if here else leaf for here, leaf in zip(is_array, leaves)]
            return jax.tree.unflatten(tree, filled)

        arrays = [leaf for here, leaf in zip(is_array, leaves) if here]
        static = tuple(leaf for here, leaf in zip(is_array, leaves) if not here)
        measured = arrays if weights is None else [*arrays, weights]
        form = (
            tree,
            tuple(is_array),
            tuple((type(leaf), leaf) for leaf in static),  # True is not the number 1 here
            tuple((array.shape, str(array.dtype)) for array in measured),
        )
        return cls(arrays, form, fill, static, weights)


def read_batches(batches: Iterable[Any], token_weights: TokenWeights = None) -> list[Batch]:
    """Takes batches apart, those that are not yet.

    Raises:
      ValueError: There are none, one holds what cannot be used, or no token has a weight.
    """
    if isinstance(batches, (dict, str)) or hasattr(batches, "dtype"):
        raise ValueError("batches must be a sequence of batches, got a single one; give [batch]")
    read = [
        batch if isinstance(batch, Batch) else Batch.of(batch, f"batch {i}", token_weights)
        for i, batch in enumerate(batches)
    ]
    if not read:
        raise ValueError("batches is empty; give at least one batch of calibration inputs")
    weights = [batch.token_weights for batch in read if batch.token_weights is not None]
    if weights and not any(np.any(array > 0) for array in weights):
        raise ValueError("token_weights are zero for every token of every batch; none would count")
    return read


def _is_list_of_numbers(node: Any) -> bool:
    return isinstance(node, list) and any(isinstance(item, int | float) for item in node)


def _check_leaf(leaf: Any, name: str) -> None:
    """Raises a ValueError where a leaf is neither an array with entries nor something fixed."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        if math.prod(leaf.shape) == 0:
            raise ValueError(f"{name} is empty: an array of shape {tuple(leaf.shape)}")
        return
    if _is_list_of_numbers(leaf):
        raise ValueError(f"{name} is a list of numbers; make it an array, by numpy.asarray")
    try:
        hash(leaf)
    except TypeError:
        raise ValueError(
            f"{name} is a {type(leaf).__name__}; a batch holds arrays, and beside them what stays "
            "fixed while the model is traced: flags, strings, numbers and None"
        ) from None


def _find_weights(batch: Any, where: str | int | Callable[[Any], Any], name: str) -> np.ndarray:
    """The weights of a batch's tokens, float32."""
    if callable(where):
        found, place = where(batch), "token_weights(batch)"
    elif isinstance(where, str) and isinstance(batch, Mapping) and where in batch:
        found, place = batch[where], f"[{where!r}]"
    elif isinstance(where, int) and isinstance(batch, Sequence) and -1 < where < len(batch):
        found, place = batch[where], f"[{where}]"
    else:
        raise ValueError(
            f"{name} has no {where!r}, where token_weights={where!r} looks for the weights of its "
            f"tokens; it is a {_describe(batch)}. Give a key of a dict, a position in a tuple, or "
            "a function of the batch"
        )
    if not hasattr(found, "shape") or not len(found.shape):
        raise ValueError(
            f"{name}: {place} has to be an array with a weight for each token, got {found!r}"
        )
    weights = np.asarray(found, np.float32)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError(f"{name}: {place} has weights that are negative, NaN or infinite")
    return weights


def _describe(batch: Any) -> str:
    name = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{name} with the keys {', '.join(map(repr, batch))}"
    return f"{name} of {len(batch)}" if isinstance(batch, Sequence) else name


@dataclasses.dataclass(frozen=True)
class Weighing:
    """How the weights of tokens are laid over the input vectors of a layer.

    The vectors have axes of their own, `free`: all of a layer's input but those that are summed.
    Among them the axes of the tokens are looked for, in their order; the weights are the same along
    all others.

    Attributes:
      free: Sizes of the axes of the input vectors.
      axes: Which of them are axes of the tokens.
      flat: Whether the first of them is all axes of the tokens in one.
    """

    free: tuple[int, ...]
    axes: tuple[int, ...]
    flat: bool = False

    @classmethod
    def of(cls, tokens: Sequence[int], free: Sequence[int]) -> "Weighing":
        """Finds the axes of weights `[*tokens]` among those of a layer's input vectors."""
        tokens, free, axes, start = tuple(tokens), tuple(free), [], 0
        for size in tokens:
            if size not in free[start:]:
                break
            axes.append(free.index(size, start))
            start = axes[-1] + 1
        if len(axes) < len(tokens):
            if free[:1] == (math.prod(tokens),):
                return cls(free, (0,), flat=True)
            if axes[:1] != [0]:  # a size that happens to be elsewhere says nothing
                axes = []
        return cls(free, tuple(axes))

    def remark(self, tokens: Sequence[int]) -> str | None:
        """What to say of a layer where tokens are not told apart; None where they are."""
        if self.flat or len(self.axes) == len(tokens):
            return None
        shape = " x ".join(map(str, self.free)) or "one vector"
        if not self.axes:
            return f"all its inputs count ({shape}), which token_weights do not fit"
        return f"its inputs ({shape}) have the largest weight of the tokens of their sequence"

    def spread(self, weights: jax.Array) -> jax.Array:
        """The weight of each input vector, `[n]`, from those of the tokens."""
        if self.flat:
            weights = weights.reshape(-1)
        elif len(self.axes) < weights.ndim:
            weights = jnp.max(weights, axis=tuple(range(len(self.axes), weights.ndim)))
        if not self.axes:
            return jnp.ones(math.prod(self.free), weights.dtype)
        others = [axis for axis in range(len(self.free)) if axis not in self.axes]
        return jnp.broadcast_to(jnp.expand_dims(weights, others), self.free).reshape(-1)
