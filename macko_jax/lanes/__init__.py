"""The language of the GPU kernels: operations of a lane, emitted by Mosaic GPU or run by NumPy."""
