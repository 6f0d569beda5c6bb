"""One step of a refinement, jitted with its state donated; models of one form share it.

Master weights and the optimizer's state are float32. In the forward pass a weight has the type that
the model holds it in, or `compute_dtype`, and with `values` it is rounded to 8 bits; the gradient
goes straight through the rounding (Bengio et al., arXiv 1308.3432).
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsf_jax.nn.finetune import keep_sparsity
from dsf_jax.refinement import masks
from dsf_jax.refinement.settings import Settings
from dsf_jax.refinement.student import Student
from dsf_jax.trace.dataflow import Layer
from macko_jax.format import quantization

CLIP = 1.0  # largest norm of a gradient that the default optimizer sees
WARM_UP = 0.05  # of all steps
LAST_RATE = 0.05  # of the learning rate is left at the end
LOSS_SCALE = 2.0**8  # of float16 at the start
STEADY = 200  # steps without overflow after which it doubles


class Part(NamedTuple):
    """One batch as the step takes it.

    Attributes:
      form: Parts of equal form share a program.
      fill: Puts the batch together from its arrays.
      arrays: Its arrays.
      weights: Of its tokens, or None.
      target: What the outputs are compared with where it is given and not computed, or None.
    """

    form: Hashable
    fill: Callable[[Sequence[Any]], Any]
    arrays: list[Any]
    weights: Any = None
    target: Any = None

    @property
    def data(self) -> tuple:
        return self.arrays, self.weights, self.target


class State(NamedTuple):
    """What a step changes.

    Attributes:
      step: int32, how many are done.
      parameters: The trained leaves, float32.
      optimizer: State of the optimizer, with the masks.
      loss_scale: By which the loss is multiplied where gradients are of 16 bits, float32.
      steady: int32, steps since it has changed.
    """

    step: jax.Array
    parameters: list[jax.Array]
    optimizer: Any
    loss_scale: jax.Array
    steady: jax.Array


# objective(leaves, constants, batch, weights, target) -> sum, and what it is divided by
Objective = Callable[[list, Any, Any, Any, Any], tuple[jax.Array, jax.Array]]


def default_optimizer(learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """Adam on clipped gradients; its rate warms up and then falls by a cosine.

    There is no weight decay, which would pull what is left of a pruned matrix to zero.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        rate = learning_rate * rate_at(extra["step"], extra["steps"])
        return jax.tree.map(lambda u: -rate * u, updates), state

    paced = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam(), paced)


def rate_at(step: jax.Array, steps: jax.Array) -> jax.Array:
    """The learning rate at a step, of its largest."""
    warm_up = jnp.maximum(1, jnp.ceil(WARM_UP * steps))
    progress = jnp.clip((step - warm_up) / jnp.maximum(1, steps - warm_up), 0, 1)
    cosine = LAST_RATE + (1 - LAST_RATE) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jnp.minimum((step + 1) / warm_up, cosine)


def _as_held(parameter: jax.Array, dtype: Any) -> jax.Array:
    """A parameter as the model holds it; one of float16 is float32 that is rounded to it.

    Its gradient would be float16 as well, which has no room for small ones.
    """
    if dtype != jnp.float16:
        return parameter.astype(dtype)
    rounded = parameter.astype(dtype).astype(parameter.dtype)
    return parameter + jax.lax.stop_gradient(rounded - parameter)


class Step:
    """The step of students of one form: it holds no array of theirs.

    Args:
      student: Which leaves are trained.
      held: The types in which the model holds them.
      changing: For each of them, the matrices whose masks may be re-chosen.
      objective: What is made small.
      settings: How.
      mesh: Over which batches are shared out; None for one device.
    """

    def __init__(
        self,
        student: Student,
        held: Sequence[np.dtype],
        changing: Sequence[Sequence[Layer]],
        objective: Objective,
        settings: Settings,
        mesh: Mesh | None,
    ):
        self.student, self.objective, self.settings = student, objective, settings
        self.held, self.changing = list(held), list(changing)
        self.is_half = settings.compute_dtype is not None and (
            jnp.dtype(settings.compute_dtype) == jnp.float16
        )
        inner = settings.optimizer or default_optimizer(settings.learning_rate)
        self.inner = optax.with_extra_args_support(inner)
        self.optimizer: Any = keep_sparsity(self.inner, lambda path, _: student.sparse[path[0].idx])
        self.options = quantization.COMPILER_OPTIONS if settings.values else {}
        self.placed: dict[str, Any] = (
            {} if mesh is None else {"out_shardings": NamedSharding(mesh, P())}
        )
        self.steps: dict[Hashable, Any] = {}
        self.losses: dict[Hashable, Any] = {}
        self.result = jax.jit(self._result, compiler_options=self.options)

    def start(self, leaves: Sequence[jax.Array]) -> State:
        """The state before the first step, with a copy of the leaves, since it is donated."""
        parameters = [jnp.array(leaf, jnp.float32) for leaf in leaves]
        scale = LOSS_SCALE if self.is_half else 1.0
        optimizer = self.optimizer.init(parameters)
        return State(jnp.int32(0), parameters, optimizer, jnp.float32(scale), jnp.int32(0))

    def advance(self, state: State, part: Part, constants: Any, data: Any, steps: int) -> tuple:
        """The next state, its loss, and whether the gradient was finite; the state is consumed.

        Args:
          state: Where the training stands.
          part: Any part of the form of the data.
          constants: Leaves that are not trained, and what the objective needs.
          data: Arrays of a part, or of several stacked.
          steps: All there will be.
        """
        if part.form not in self.steps:
            self.steps[part.form] = jax.jit(
                functools.partial(self._step, fill=part.fill),
                donate_argnums=0,
                compiler_options=self.options,
                **self.placed,
            )
        return self.steps[part.form](state, constants, data, jnp.int32(steps))

    def measure(self, state: State, part: Part, constants: Any, data: Any) -> tuple:
        """The sum of the objective over a part, and what it is divided by."""
        if part.form not in self.losses:
            self.losses[part.form] = jax.jit(
                functools.partial(self._loss, fill=part.fill), compiler_options=self.options
            )
        return self.losses[part.form](state.parameters, constants, data)

    def _result(self, parameters: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves as the model holds them."""
        if self.settings.values is not None:
            parameters = self.student.rounded(parameters, self.held, self.settings.values)
        return [x.astype(dtype) for x, dtype in zip(parameters, self.held)]

    def _forward(self, parameters: Sequence[jax.Array], frozen: Sequence[Any]) -> list[Any]:
        """All leaves of the model as the forward pass has them."""
        seen = list(parameters)
        if self.settings.values is not None:
            rounded = self.student.rounded(seen, self.held, self.settings.values)
            seen = [x + jax.lax.stop_gradient(r - x) for x, r in zip(seen, rounded)]
        seen = [_as_held(x, dtype) for x, dtype in zip(seen, self.held)]
        return self._cast(self.student.merge(frozen, seen))

    def _cast(self, tree: Any) -> Any:
        """Float arrays of a tree in the type that is computed in."""
        dtype = self.settings.compute_dtype
        if dtype is None:
            return tree
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def _loss(self, parameters: Any, constants: Any, data: Any, fill: Callable) -> tuple:
        """The sum of the objective over a part, and what it is divided by."""
        frozen, others = constants
        arrays, weights, target = data
        batch = fill(self._cast(arrays))
        leaves = self._forward(parameters, frozen)
        return self.objective(leaves, self._cast(others), batch, weights, target)

    def _step(
        self, state: State, constants: Any, data: Any, steps: jax.Array, *, fill: Callable
    ) -> tuple:
        """The next state, its loss, and whether the gradient was finite."""

        def scaled(parameters, part):
            total, count = self._loss(parameters, constants, part, fill)
            # The mean is scaled, not the sum, whose gradients would leave float16.
            return total * (state.loss_scale / jnp.maximum(count, tiny)), (total, count)

        def of_part(part):
            gradient, (total, count) = jax.grad(scaled, has_aux=True)(state.parameters, part)
            return jax.tree.map(lambda g: g * count, gradient), total, count

        tiny = jnp.finfo(jnp.float32).tiny
        if self.settings.accumulate == 1:
            gradient, total, count = of_part(data)
        else:
            zero = jnp.float32(0)
            sums = (jax.tree.map(jnp.zeros_like, state.parameters), zero, zero)
            add = lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None)
            (gradient, total, count), _ = jax.lax.scan(add, sums, data)
        count = jnp.maximum(count, tiny)
        gradient = jax.tree.map(lambda g: g / (count * state.loss_scale), gradient)
        new = self._moved(state, gradient, steps)
        finite = jnp.isfinite(total) & jnp.isfinite(optax.tree.norm(gradient))
        if self.is_half:
            new = self._rescaled(state, new, finite)
        return new, total / count, finite

    def _moved(self, state: State, gradient: list[jax.Array], steps: jax.Array) -> State:
        updates, optimizer = self.optimizer.update(
            gradient, state.optimizer, state.parameters, step=state.step, steps=steps
        )
        parameters: Any = optax.apply_updates(state.parameters, updates)
        if self.settings.masks == "rechosen":
            parameters, optimizer = jax.lax.cond(
                masks.is_time(state.step, steps),
                lambda: self._rechosen(parameters, optimizer, gradient, state.step, steps),
                lambda: (parameters, optimizer),
            )
        return state._replace(step=state.step + 1, parameters=parameters, optimizer=optimizer)

    def _rechosen(self, parameters, optimizer, gradient, step, steps):
        share = masks.share_at(step, steps)
        pairs = [
            masks.rechoose(*leaf, share) if leaf[-1] else (leaf[0], leaf[2])
            for leaf in zip(parameters, gradient, optimizer.masks, self.changing)
        ]
        new = [mask for _, mask in pairs]
        inner = masks.forget(self.inner, optimizer.inner, new)
        return [parameter for parameter, _ in pairs], optimizer._replace(masks=new, inner=inner)

    def _rescaled(self, old: State, new: State, finite: jax.Array) -> State:
        """The new state; after an overflow the old one, with half of the loss scale."""
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        steady = jnp.where(finite, old.steady + 1, 0)
        grown = jnp.where(steady >= STEADY, 2.0, 1.0)
        return kept._replace(
            step=new.step,
            loss_scale=old.loss_scale * jnp.where(finite, grown, 0.5),
            steady=jnp.where(steady >= STEADY, 0, steady),
        )
