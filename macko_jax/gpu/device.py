"""What the kernels may use of the card that is planned for; its facts are in `format.cards`."""

import jax
import jax.numpy as jnp

from macko_jax.format import cards

AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
# Compute capabilities that a record under docs/results covers. On others a kernel checks itself,
# see `ops.self_check`.
MEASURED = (HOPPER,)
GUARDING_JAX = (0, 11)  # the first that emits instructions of Hopper's on Hopper and later alone


def multiprocessors() -> int:
    """Number of SMs."""
    return cards.here().multiprocessors


def shared_bytes() -> int:
    """Bytes of shared memory that a block's plan can use."""
    return cards.here().plan_bytes


def compute_capability() -> str:
    """The compute capability, such as "9.0"."""
    return ".".join(map(str, cards.here().capability))


def is_measured() -> bool:
    """Whether a record under docs/results is of this compute capability."""
    return cards.here().capability in MEASURED


def has_clusters() -> bool:
    """Whether blocks can read each other's shared memory."""
    return cards.here().capability >= HOPPER


def why_no_kernels() -> str | None:
    """None if the device runs what Pallas makes for Mosaic GPU, or the reason why it does not."""
    capability, version = cards.here().capability, compute_capability()
    if capability < AMPERE:
        return f"the kernels are for compute capability 8.0 and later, not {version}"
    if capability < HOPPER and jax.__version_info__ < GUARDING_JAX:
        return (
            f"for compute capability {version} the kernels need jax 0.11 or newer, and this is jax "
            f"{jax.__version__}, which emits instructions of 9.0 always"
        )
    return None


def why_no_values(dtype) -> str | None:
    """None if the kernels can read values of a type, or the reason why they cannot."""
    if jnp.dtype(dtype) == jnp.float8_e4m3fn and cards.here().capability < ADA:
        return (
            "float8_e4m3fn is converted by compute capability 8.9 and later, not "
            f"{compute_capability()}; macko_jax.compress(weight, dtype='int8') gives 8-bit values "
            "that have kernels here"
        )
    return None
