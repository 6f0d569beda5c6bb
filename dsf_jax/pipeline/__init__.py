"""A whole model, layer by layer."""
