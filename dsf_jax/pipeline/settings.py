"""How `compress_model` calibrates and where it works: its grouped arguments, and former names."""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from dsf_jax.trace.jaxprs import Device


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the layers of a model are fitted to.

    Args:
      mode: "sequential" fits each layer on the inputs that it sees once all layers before it are
        compressed. "one-pass" fits every layer on the inputs that the dense model gives it, with
        all Gram matrices held at once.
      target: What a layer's output is matched to. "layer" is what its dense weights give on the
        inputs that it now sees. "dense" is what it gave in the dense model, so that a layer also
        makes up for the errors of those before it: W is replaced by W (C + c I)(G + c I)^-1 first,
        where C = sum x y^T of dense inputs x and present ones y, and c is
        `solve.CORRECTION_DAMPING` of G's mean diagonal. It costs a second forward pass, in step
        with the first; in "one-pass" mode the two are the same.
      blocks: Regular expression. Layers whose path begins with a match, and for which the matched
        text is the same, are one stage, calibrated together: r"layers/\\d+" halts once per
        transformer block. It costs a second pass through what lies between such layers, and is for
        "sequential" mode only. None lets the data flow decide.
      grams: Gram matrices as `gram_matrices` gives them, to compress one model in several ways
        without calibrating again; "one-pass" only. Of the batches only the shapes then count.

    Raises:
      ValueError: A value is not allowed, or does not go with the mode.
    """

    mode: Literal["sequential", "one-pass"] = "sequential"
    target: Literal["layer", "dense"] = "layer"
    blocks: str | None = None
    grams: Mapping[str, jax.Array] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_choice("calibration mode", self.mode, ("sequential", "one-pass"))
        check_choice("calibration target", self.target, ("layer", "dense"))
        if self.blocks is not None:
            try:
                re.compile(self.blocks)
            except re.error as error:
                raise ValueError(
                    f"blocks={self.blocks!r} is no valid regular expression: {error}"
                ) from error
            if self.mode != "sequential":
                raise ValueError(
                    f"blocks={self.blocks!r} says what is calibrated together in "
                    f"mode='sequential'; leave it out where mode={self.mode!r}"
                )
        if self.grams is not None and self.mode != "one-pass":
            raise ValueError(
                "grams are those of the dense model's inputs: they need mode='one-pass', got "
                f"{self.mode!r}"
            )


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where the work is done, and where what it needs waits; the result does not depend on it.

    Args:
      devices: Devices over which layers are spread; those of other processes of
        `jax.distributed` may be among them, if every process makes the same call (each calibrates
        for itself, and layers are shared out). None takes the first of this process.
      keep_activations: Where each batch's values wait between stages: "device", "host", or
        "nowhere", which runs every stage from the batch again: as many passes as stages.
      work_dir: Directory for finished layers. A run that was killed reads them back and goes on;
        results of another model, batches or settings are refused. None keeps nothing.
      work_key: What the model, the batches and given Gram matrices are known by in `work_dir`, for
        a caller who knows them by something shorter than a hash of all that they hold, which is
        what None takes.

    Raises:
      ValueError: A value is not allowed.
    """

    devices: Sequence[Device] | None = None
    keep_activations: Literal["device", "host", "nowhere"] = "device"
    work_dir: str | os.PathLike[str] | None = None
    work_key: str | None = None

    def __post_init__(self) -> None:
        check_choice("keep_activations", self.keep_activations, ("device", "host", "nowhere"))
        if self.devices is not None and not len(self.devices):
            raise ValueError("devices is empty; give at least one, or None for the first")

    @property
    def solvers(self) -> list[Device]:
        """The devices over which layers are spread."""
        return list(self.devices or jax.local_devices()[:1])

    @property
    def local(self) -> list[Device]:
        """The devices of this process, on which it runs the forward pass."""
        here = [d for d in self.solvers if d.process_index == jax.process_index()]
        return here or jax.local_devices()[:1]


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises a ValueError where a value is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


_SETTINGS = {"calibration": Calibration, "execution": Execution}
# Which of them a keyword of the former spelling is a field of.
_FORMER = {
    "target": "calibration",
    "blocks": "calibration",
    "grams": "calibration",
    "devices": "execution",
    "keep_activations": "execution",
    "work_dir": "execution",
}


def read_settings(
    calibration: Calibration | str | None, execution: Execution | None, former: Mapping[str, Any]
) -> tuple[Calibration, Execution]:
    """The grouped arguments of `compress_model`, from the grouped or the former spelling.

    Args:
      calibration: The calibration, or formerly its mode.
      execution: The execution.
      former: Keywords that are fields of one of them now.

    Returns:
      Both, checked.

    Raises:
      TypeError: A keyword or a type is unknown, or one field is given in both ways.
      ValueError: A value is not allowed.
    """
    given: dict[str, Any] = {"calibration": calibration, "execution": execution}
    fields: dict[str, dict[str, Any]] = {"calibration": {}, "execution": {}}
    if isinstance(calibration, str):
        given["calibration"], fields["calibration"]["mode"] = None, calibration
    for name, value in former.items():
        if name not in _FORMER:
            raise TypeError(
                f"compress_model() got an unexpected keyword argument {name!r}; beside method, "
                "density, rules, options, budget, values, variables, rngs, forward, token_weights "
                "and callback it takes "
                f"{' and '.join(map(_signature, _SETTINGS))}"
            )
        fields[_FORMER[name]][name] = value
    result = []
    for name, group in _SETTINGS.items():
        if fields[name] and given[name] is not None:
            raise TypeError(f"give {', '.join(fields[name])} inside {name}={group.__name__}(...)")
        if given[name] is not None and not isinstance(given[name], group):
            raise TypeError(f"{name} must be a dsf_jax.{group.__name__}, got {given[name]!r}")
        result.append(given[name] or group(**fields[name]))
    used = {name: values for name, values in fields.items() if values}
    if used:
        spelling = ", ".join(
            f"{name}=dsf_jax.{_SETTINGS[name].__name__}({', '.join(f'{f}=...' for f in values)})"
            for name, values in used.items()
        )
        warnings.warn(
            f"these arguments of compress_model are grouped now, and their former spelling goes "
            f"with the next version; write {spelling}",
            DeprecationWarning,
            stacklevel=3,
        )
    return result[0], result[1]


def _signature(name: str) -> str:
    """How an argument of `compress_model` is written, with its fields."""
    group = _SETTINGS[name]
    fields = ", ".join(field.name for field in dataclasses.fields(group))
    return f"{name}={group.__name__}({fields})"
