"""Flax NNX models on MACKO matrices."""

from macko_jax.nn.flax_nnx import (
    MackoIndex,
    MackoLinear,
    chain,
    from_pure_dict,
    substitute,
    to_pure_dict,
)

__all__ = ["MackoIndex", "MackoLinear", "chain", "from_pure_dict", "substitute", "to_pure_dict"]
