"""A kernel that only reads: the floor that the products are measured against."""

import jax
import jax.numpy as jnp

from macko_jax.gpu import device
from macko_jax.lanes import mosaic as lanes
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import STREAM

AHEAD = 4  # 16-byte loads in flight for every lane
WARPS = 16
BLOCKS_PER_SM = 4


def program(ops, chunks: int, blocks: int) -> None:
    """Reads `chunks` 16-byte chunks of the array x; y[0] gets a sum that depends on every word."""
    stride = blocks * WARPS * WARP

    def step(state):
        chunk, total = state
        words = [
            word
            for i in range(AHEAD)
            for word in ops.load_words(
                "x", chunk + i * stride, 4, chunk + i * stride < chunks, how=STREAM
            )
        ]
        for word in words:
            total = total + word
        return chunk + AHEAD * stride, total

    thread = ops.block() * (WARPS * WARP) + ops.thread()
    _, total = ops.loop(lambda state: state[0] < chunks, step, (thread, ops.integer(0)))
    # Practically never true, but the compiler cannot know.
    ops.store_real("y", thread - thread, ops.real(1), (total == 0x5EED5EED) & (thread == 0))


def read(x: jax.Array) -> jax.Array:
    """Reads a float array of a multiple of 16 bytes from GPU memory, and returns one element."""
    blocks = BLOCKS_PER_SM * device.multiprocessors()
    chunks = x.size * x.dtype.itemsize // 16
    return lanes.run(
        "macko_read",
        lambda ops: program(ops, chunks, blocks),
        ("x", "y"),
        [x],
        jax.ShapeDtypeStruct((1,), jnp.float32),
        blocks=blocks,
        warps=WARPS,
        shared_slots=1,
    )
