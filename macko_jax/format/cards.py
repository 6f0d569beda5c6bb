"""Facts about GPUs, which matrices are packed for and kernels are planned for.

They are those of the first GPU here; those of an H200 where there is none, so that what is lowered
for CUDA on a machine without a GPU is meant for an H200; or those of the card that the environment
variable MACKO_JAX_CARD names, one of `CARDS`. On a CPU matrices are packed for a GPU only where a
card is named, see `choose`. A matrix that is packed for one card, and a product that is planned for
one, give the same results on others.
"""

import dataclasses
import functools
import os

import jax

VARIABLE = "MACKO_JAX_CARD"
RESERVED = 7 * 1024  # bytes of a block's shared memory that are left to the compiler


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU. Every SM since Ampere has 65,536 registers and 1,024 threads of a block at least.

    Attributes:
      name: what its maker calls it.
      capability: its compute capability (major, minor).
      multiprocessors: the number of SMs.
      shared_bytes: bytes of shared memory that one block can have.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @property
    def plan_bytes(self) -> int:
        """Bytes of shared memory that the plan of a block can use."""
        return self.shared_bytes - RESERVED


H200 = Card("H200", (9, 0), 132, 227 * 1024)
CARDS = {
    card.name: card
    for card in (
        Card("A100", (8, 0), 108, 163 * 1024),
        Card("RTX A6000", (8, 6), 84, 99 * 1024),
        Card("RTX 4090", (8, 9), 128, 99 * 1024),
        H200,
        Card("B200", (10, 0), 148, 227 * 1024),
        Card("RTX 5090", (12, 0), 170, 99 * 1024),
    )
}


def here() -> Card:
    """The card that is packed and planned for.

    One that is named is taken to have no more SMs and shared memory than the GPU here, if there is
    one, so that what is planned for it can run.
    """
    card, gpu = named(), live()
    if card is None:
        return gpu or H200
    if gpu is None:
        return card
    return dataclasses.replace(
        card,
        multiprocessors=min(card.multiprocessors, gpu.multiprocessors),
        shared_bytes=min(card.shared_bytes, gpu.shared_bytes),
    )


def named() -> Card | None:
    """The card that the environment variable names."""
    name = os.environ.get(VARIABLE)
    if name and name not in CARDS:
        raise ValueError(f"{VARIABLE} names a card, one of {list(CARDS)}, got {name!r}")
    return CARDS[name] if name else None


@functools.cache
def live() -> Card | None:
    """The first GPU here; None if there is none, or none of NVIDIA's."""
    gpus = [d for d in jax.local_devices() if d.platform == "gpu"]
    capability = getattr(gpus[0], "compute_capability", "") if gpus else ""
    if not capability.replace(".", "").isdigit():  # "gfx942" is one of AMD's
        return None
    major, _, minor = capability.partition(".")
    return Card(
        gpus[0].device_kind,
        (int(major), int(minor or 0)),
        getattr(gpus[0], "core_count", H200.multiprocessors),
        getattr(gpus[0], "shared_memory_per_block_optin", H200.shared_bytes),
    )
