"""What is read of JAX's programs beyond its public API, in one place.

Names of primitives, of their parameters and of fields of equations are no promise of JAX's. Those
below hold for jax 0.10 to 0.12; `tests/test_calibration.py` runs through each of them.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jax.extend.core import Literal

__all__ = [
    "CASTS",
    "LIGHT",
    "LOOPS",
    "PRODUCTS",
    "VIEWS",
    "Device",
    "Literal",
    "bind",
    "called_program",
    "holds_product",
    "picks_entries",
    "programs",
    "scan_layout",
]


class Device(Protocol):
    """What is read of a `jax.Device`, which type checkers take for a variable and no type."""

    @property
    def platform(self) -> str: ...

    @property
    def process_index(self) -> int: ...


# Primitives that only wrap another program, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
# Primitives that rearrange or select entries; a cast counts, since it changes no position.
VIEWS = frozenset(["reshape", "transpose", "squeeze", "rev", "slice", "split", "broadcast_in_dim"])
CASTS = frozenset(["convert_element_type", "copy", "copy_p", "sharding_constraint"])
PRODUCTS = frozenset(["dot_general", "conv_general_dilated"])
LOOPS = frozenset(["scan", "while", "cond"])
# Primitives that cost no more than writing their result.
LIGHT = (
    VIEWS
    | CASTS
    | frozenset(["concatenate", "expand_dims", "iota", "pad", "select_n", "clamp"])
    | frozenset(["and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge", "is_finite"])
    | frozenset(["add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "rem", "floor"])
    | frozenset(["pow", "integer_pow", "square", "sqrt", "rsqrt", "exp", "exp2", "log"])
    | frozenset(["sin", "cos", "stop_gradient"])
)


def called_program(eqn: Any) -> Any | None:
    """The program that an equation only wraps; None where it does more."""
    return eqn.params.get(_CALLS.get(eqn.primitive.name))


def bind(eqn: Any, *values: jax.Array) -> list[jax.Array]:
    """Runs an equation on values, in the context that it was traced in."""
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def programs(eqn: Any) -> list[Any]:
    """The programs that an equation holds: a loop's body, the branches of a conditional."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple) else (p,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def holds_product(program: Any) -> bool:
    """Whether a program, or one inside it, multiplies matrices."""
    jaxpr = getattr(program, "jaxpr", program)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            return True
        if any(holds_product(inner) for inner in programs(eqn)):
            return True
    return False


def picks_entries(eqn: Any) -> bool:
    """Whether no entry is repeated: a broadcast that only adds axes of length 1 is a view."""
    sizes = [math.prod(v.aval.shape) for v in (eqn.invars[0], *eqn.outvars)]
    return eqn.primitive.name != "broadcast_in_dim" or sizes[0] == sizes[1]


def scan_layout(params: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = params["ft_in"].unpack()  # jax 0.11 and newer
    return len(consts), len(carries)
