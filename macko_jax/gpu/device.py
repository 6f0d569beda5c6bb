"""Facts of the device: those of the first GPU here, or of an H200 where there is none.

A product that is lowered for CUDA on a machine without a GPU is planned for an H200; on another GPU
it gives the same results at another speed.
"""

import functools

import jax

from macko_jax.format.choose import MULTIPROCESSORS

HOPPER = "9.0"  # the compute capability of an H100 and an H200
HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a block of an H200 can have
RESERVED = 7 * 1024  # bytes of these that are left to the compiler


def multiprocessors() -> int:
    """Number of SMs."""
    return _of_gpu("core_count", MULTIPROCESSORS)


def shared_bytes() -> int:
    """Bytes of shared memory that a block's plan can use."""
    there = _of_gpu("shared_memory_per_block_optin", HOPPER_SHARED)
    return min(there, HOPPER_SHARED) - RESERVED


def compute_capability() -> str:
    """The compute capability, such as "9.0"."""
    return _of_gpu("compute_capability", HOPPER)


def why_no_kernels() -> str | None:
    """None if the device runs what Pallas makes for Mosaic GPU, or the reason why it does not."""
    version = compute_capability()
    if int(version.split(".")[0]) < int(HOPPER.split(".")[0]):
        return f"the kernels are for compute capability {HOPPER} and later, not {version}"
    return None


@functools.cache
def _of_gpu(attribute: str, otherwise):
    gpus = [d for d in jax.local_devices() if d.platform == "gpu"]
    return getattr(gpus[0], attribute, otherwise) if gpus else otherwise
