"""How a compressed model is trained on, checked before anything is computed."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dsf_jax.pipeline.settings import check_choice
from dsf_jax.solvers.rounding import check_values

LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `dsf_jax.refine` and `dsf_jax.refine_block` that say how to train.

    They are described there.

    Raises:
      ValueError: A value is not allowed.
    """

    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = LEARNING_RATE
    optimizer: optax.GradientTransformation | None = None
    masks: Literal["fixed", "rechosen"] = "fixed"
    values: str | None = None
    layers: Any = None
    train: str | Sequence[str] = "compressed"
    accumulate: int = 1
    temperature: float = 1.0
    hidden: str | None = None
    hidden_weight: float = 1.0
    blocks: str | None = None
    target: Literal["prefix", "dense"] = "dense"
    relative_to: Literal["token", "batch"] = "token"
    mesh: jax.sharding.Mesh | None = None
    remat: bool = False
    compute_dtype: Any = None
    seed: int = 0
    work_dir: str | os.PathLike[str] | None = None
    save_seconds: float = 60.0
    callback: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        self._check_length()
        check_choice("masks", self.masks, ("fixed", "rechosen"))
        check_choice("target", self.target, ("prefix", "dense"))
        check_choice("relative_to", self.relative_to, ("token", "batch"))
        check_values(self.values)
        for name, bound in (("learning_rate", 0), ("temperature", 0), ("accumulate", 0)):
            if not bound < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.hidden_weight < 0:
            raise ValueError(f"hidden_weight must not be negative, got {self.hidden_weight!r}")
        for name in ("hidden", "blocks"):
            _check_pattern(name, getattr(self, name))
        if isinstance(self.train, str):
            check_choice("train", self.train, ("compressed", "all"))
        if self.compute_dtype is not None and not jnp.issubdtype(self.compute_dtype, jnp.floating):
            raise ValueError(
                f"compute_dtype must be a float type or None, got {self.compute_dtype!r}"
            )

    def _check_length(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                f"give either steps or seconds, got steps={self.steps!r} and "
                f"seconds={self.seconds!r}"
            )
        length = self.steps if self.seconds is None else self.seconds
        if not length or length < 0 or (self.steps is not None and self.steps != int(self.steps)):
            raise ValueError(
                f"steps must be a positive integer, or seconds a positive number, got {length!r}"
            )

    @property
    def form(self) -> Hashable:
        """What of it decides what a step computes, or may."""
        return repr(self.recorded()), self.optimizer, self.mesh, self.remat

    def recorded(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that it continues."""
        free = ("work_dir", "save_seconds", "callback", "mesh", "remat", "optimizer", "layers")
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in free
        }
        return fields | {"own optimizer": self.optimizer is not None}


def _check_pattern(name: str, pattern: str | None) -> None:
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{name}={pattern!r} is no valid regular expression: {error}"
            ) from error
