"""A forward pass that also gives what chosen modules are called with, and what they give."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import nnx

from dsf_jax.trace.batches import Batch
from macko_jax.nn.flax_linen import packed_kernels


class Call(NamedTuple):
    """One call of a module.

    Attributes:
      inputs: (args, kwargs).
      result: The first array that it gives.
      kind: The module's class.
    """

    inputs: tuple
    result: jax.Array
    kind: type


_calls: contextvars.ContextVar[tuple[dict, dict] | None] = contextvars.ContextVar("calls")


class Watcher:
    """`forward` of a model, and the calls of those of its modules that are chosen by path.

    Modules are watched where they are called, as `module(...)`: not inside `nnx.scan` or `nn.scan`,
    whose layers are one module, and not those whose other methods a model calls.

    Args:
      forward: `forward(model, batch)`.
      is_chosen: Whether the module at a path is watched.
    """

    def __init__(self, forward: Callable[[Any, Any], Any], is_chosen: Callable[[str], bool]):
        self.forward, self.is_chosen = forward, is_chosen

    def __call__(self, model: Any, batch: Any) -> tuple[Any, dict[str, list[Call]]]:
        """What `forward` gives, and the calls by path in the order of their ends."""
        calls: dict[str, list[Call]] = {}
        is_nnx = isinstance(model, nnx.Module)
        watching = (
            _watch_nnx(model, self.is_chosen, calls)
            if is_nnx
            else (_watch_linen(self.is_chosen, calls))
        )
        with watching:
            return self.forward(model, batch), calls


@contextlib.contextmanager
def _watch_nnx(model: nnx.Module, is_chosen: Callable[[str], bool], calls: dict) -> Iterator[None]:
    """Watches the modules of a model that nobody else holds: their classes are exchanged."""
    paths, originals = {}, {}
    for names, module in list(nnx.iter_modules(model)):
        path = "/".join(map(str, names))
        if path and is_chosen(path) and callable(module):
            paths[id(module)], originals[id(module)] = path, (module, type(module))
            object.__setattr__(module, "__class__", _watched(type(module)))
    token = _calls.set((paths, calls))
    try:
        yield
    finally:
        _calls.reset(token)
        for module, kind in originals.values():
            object.__setattr__(module, "__class__", kind)


@functools.cache
def _watched(kind: type) -> type:
    """The subclass of a module's class that notes its calls."""

    def call(self, *args, **kwargs):
        result = kind.__call__(self, *args, **kwargs)
        watching = _calls.get(None)
        if watching is not None and id(self) in watching[0]:
            _note(watching[1], watching[0][id(self)], (args, kwargs), result, kind)
        return result

    return type(kind)(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@contextlib.contextmanager
def _watch_linen(is_chosen: Callable[[str], bool], calls: dict) -> Iterator[None]:
    def intercept(next_function, args, kwargs, context):
        result = next_function(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and path and is_chosen(path):
            _note(calls, path, (args, kwargs), result, type(context.module))
        return result

    with nn.intercept_methods(intercept):
        yield


def _note(calls: dict, path: str, inputs: tuple, result: Any, kind: type) -> None:
    arrays = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
    if arrays:
        calls.setdefault(path, []).append(Call(inputs, arrays[0], kind))


def with_pairs(forward: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`forward` of models some of whose linen layers may have pairs of factors."""

    def run(model: Any, batch: Any) -> Any:
        if isinstance(model, nnx.Module):
            return forward(model, batch)
        # The innermost of all interceptors, since it calls no further one.
        with packed_kernels():
            return forward(model, batch)

    return run


def taken_apart(call: Call, path: str) -> Batch:
    """A call's arguments as a `Batch`: its arrays, and how they are put together again."""
    return Batch.of(call.inputs, f"what {path} is called with")
