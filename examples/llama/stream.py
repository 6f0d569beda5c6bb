"""The residual stream of windows of tokens, which goes through a model block by block.

At any time there is the stream before one block, batch by batch, on the device where a quarter of
its memory holds what waits there, and on the host otherwise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsf_jax.solvers.compiler import COMPILER_OPTIONS
from examples.llama.config import Config
from examples.llama.rope import rotation


@dataclasses.dataclass(frozen=True)
class Stream:
    """The stream before a block.

    Attributes:
      parts: batches [B, T, E], all of one shape; NumPy arrays where they are kept on the host.
      config: of the model.
      keep: "device" or "host".
    """

    parts: list
    config: Config
    keep: str

    @classmethod
    def of(cls, windows, embed, config, batch, device=None):
        """The embedded windows.

        Args:
          windows: [N, T] tokens.
          embed: the model's embedding.
          config: the model's.
          batch: most windows at a time; the batches are as large as divide them evenly.
          device: on which blocks run; None takes the first.
        """
        count = len(windows)
        size = next(size for size in range(min(batch, count), 0, -1) if count % size == 0)
        keep = _where_to_keep(windows, embed, config, device or jax.local_devices()[0])
        parts = [embed(part) for part in np.split(windows, count // size)]
        return cls([_held(part, keep) for part in parts], config, keep)

    def behind(self, block):
        """The stream behind a block."""
        split = nnx.split(block)
        parts = [_held(_run(*split, self.config, part), self.keep) for part in self.parts]
        return dataclasses.replace(self, parts=parts)


def run_block(config, block, hidden):
    """What a block makes of a batch of the stream, [B, T, E]."""
    positions = jnp.arange(hidden.shape[1])[None]
    rotary = rotation(positions, config)
    return block(hidden, positions, rotary, None, None)[0]


@functools.partial(jax.jit, static_argnames=("graph", "config"), compiler_options=COMPILER_OPTIONS)
def _run(graph, state, config, hidden):
    return run_block(config, nnx.merge(graph, state), hidden)


def _held(array, keep):
    return np.asarray(array) if keep == "host" else array


def _where_to_keep(windows, embed, config, device):
    """Where activations wait.

    At most what waits is the stream and the results of the two widest projections.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    widths = 3 * config.hidden_size + heads * config.head_dim + 2 * config.intermediate_size
    needed = windows.size * widths * jnp.dtype(embed.dtype).itemsize
    return "device" if needed < limit / 4 else "host"
