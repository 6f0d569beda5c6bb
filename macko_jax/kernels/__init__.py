"""Pallas Mosaic GPU kernels on raw arrays.

A kernel is a *lane program*: a Python function written once against a small vocabulary of per-lane
operations. `lanes.py` emits the vocabulary as GPU code, `emulation.py` executes it with NumPy for
every lane of the grid at once, so that the same program is tested on machines without a GPU. In
`matmul.py` some warps run one, `tiles.py`, and the others multiply what it decodes.
"""
