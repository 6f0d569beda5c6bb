"""The GPU kernels: programs in the language of `macko_jax.lanes`, on raw arrays."""
