"""Flax models on MACKO matrices."""
