"""Factor pairs as Flax layers, packing and training them."""
