"""What comes out of a compressed model: packing it, and training it on."""
