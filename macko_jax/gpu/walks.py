"""Which walk reads which encoding."""

from macko_jax.gpu import banks
from macko_jax.gpu import row_walk as strips

WALKS = dict.fromkeys(strips.DECODERS, strips.Walk) | {"banked": banks.Walk}


def make(ops, matrix: strips.Matrix, **options):
    """The way of every lane through the matrix; for the options see `strips.RowWalk`."""
    return WALKS[matrix.encoding](ops, matrix, **options)
