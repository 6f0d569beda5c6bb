"""A Llama-architecture language model in Flax NNX."""
