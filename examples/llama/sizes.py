"""How many bytes a packed model takes at a density, and which density takes how many bytes."""

import dataclasses
import functools
import math
from collections.abc import Container, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from dsf_jax.solvers.budget import count_nonzeros, plan_pair
from dsf_jax.solvers.factorize import choose_options
from dsf_jax.solvers.methods import METHODS
from macko_jax.format.choose import choose_lanes, shared_capacity
from macko_jax.format.layout import GROUP, start_dtype
from macko_jax.format.matrix import compress
from macko_jax.nn.rules import BREAK_EVEN_DENSITY

LEAST, MOST = 0.04, 0.78  # densities that a target may lead to
# Densities of which the bytes are worked out; from that of the last but one on, matrices are dense.
POINTS = np.append(np.linspace(LEAST, MOST, 20), [BREAK_EVEN_DENSITY, 1.0])
SAMPLE = 256  # rows that are packed to learn what all take
HEADER = 4096  # bytes of a block's file beside its arrays, about
END_HEADER = 512  # and of the embedding's, the norm's and the head's


class PackedSizes:
    """Bytes of packed layers by density, from random masks of the layers' shapes.

    Args:
      recipe: the `Recipe`: methods, values, encoding and options.
      dtype: type of the weights.
    """

    def __init__(self, recipe, dtype):
        self.recipe, self.dtype = recipe, jnp.dtype(dtype)
        self._curve = functools.cache(self._work_out)

    def layer(self, shape, method, density):
        """Bytes of a layer [out, in] by a method at a density; interpolated."""
        return float(np.interp(density, POINTS, self._curve(shape, method)))

    def _work_out(self, shape, method):
        return [
            sum(self._matrix(*matrix) for matrix in self._matrices(shape, method, density))
            for density in POINTS
        ]

    def _matrices(self, shape, method, density):
        """(rows, cols, non-zeros) of what a layer is stored as."""
        solver = METHODS[method]
        if not solver.gives_pairs:
            return [(*shape, count_nonzeros(density, shape))]
        options = choose_options(solver.preset, self.recipe.options_of(method))
        inner, left, right = plan_pair(density, shape, width=options.width, split=options.split)
        return [(shape[0], inner, left), (inner, shape[1], right)]

    def _matrix(self, rows, cols, nonzeros):
        """Bytes of a matrix with a random mask, from a sample of its rows."""
        density = nonzeros / (rows * cols)
        if density >= BREAK_EVEN_DENSITY:
            return rows * cols * self.dtype.itemsize
        sample = min(rows, SAMPLE)
        kept = np.random.default_rng(0).permutation(sample * cols) < round(density * sample * cols)
        packed = compress(
            kept.reshape(sample, cols).astype(self.dtype),
            dtype=self.recipe.values,
            encoding=self.recipe.encoding,
        )
        groups = math.ceil(packed.stored / GROUP * rows / sample)
        per_group = packed.values.dtype.itemsize * GROUP
        codes = packed.codes.nbytes * rows / sample
        size = shared_capacity(groups) * per_group + codes + 4 * (rows + 1)
        lanes = packed.lanes if packed.encoding == "bitmask" else choose_lanes(rows, groups)
        size += rows * lanes * start_dtype(cols).itemsize
        return size + (0 if packed.scales is None else rows * self.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class Densities:
    """The density of each layer, so that the model has the size that was asked for.

    Without a target they are the shares that were given. With one, shares are multiplied by a
    common factor, but where a rule names the density. The factor is found anew before each block
    from the bytes that are left, and by how much the blocks before it came out larger or smaller
    than expected.

    Attributes:
      shares: density of each layer by path, before the factor; those that are skipped have none.
      fixed: paths whose density stays.
      layers: for each block the (path, shape, method) of its layers with a density.
      dense_bytes: for each block the bytes of what stays as it is, and the header's.
      target: bytes of all blocks together; None leaves the shares as they are.
      sizes: `PackedSizes`; needed with a target.

    Raises:
      ValueError: the target is out of reach.
    """

    shares: Mapping[str, float]
    fixed: Container[str]
    layers: Sequence[Sequence[tuple[str, tuple[int, int], str]]]
    dense_bytes: Sequence[int] = ()
    target: int | None = None
    sizes: PackedSizes | None = None

    def __post_init__(self):
        if self.target is None:
            return
        blocks = range(len(self.layers))
        least, most = (self._expect(blocks, factor) for factor in (0.0, math.inf))
        if not least <= self.target <= most:
            raise ValueError(
                f"the blocks of the packed model take {least / 1e6:.2f} MB at density {LEAST:g} "
                f"and {most / 1e6:.2f} MB at {MOST:g}; the target leaves "
                f"{self.target / 1e6:.2f} MB for them"
            )

    def _density(self, path, factor):
        if path in self.fixed:
            return self.shares[path]
        return float(np.clip(self.shares[path] * factor, LEAST, MOST))

    def _expect(self, blocks, factor):
        """Bytes of some blocks with shares multiplied by a factor."""
        return sum(self._block(i, lambda path: self._density(path, factor)) for i in blocks)

    def _block(self, index, density_of):
        """Bytes of a block, whose layers have densities by path."""
        return self.dense_bytes[index] + sum(
            self.sizes.layer(shape, method, density_of(path))
            for path, shape, method in self.layers[index]
        )

    def common(self):
        """The factor with which all blocks are expected to have the target's size."""
        return self._solve(range(len(self.layers)), self.target)

    def _solve(self, blocks, room):
        low, high = 0.0, 1 / min(min(self.shares.values(), default=1.0), 1.0)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._expect(blocks, middle) <= room else (low, middle)
        return low

    def of_block(self, index, written):
        """Densities by path of a block's layers.

        Args:
          index: the block's number.
          written: of each block before it the densities it was given, and the bytes of its file.
        """
        here = [path for path, _, _ in self.layers[index]]
        if self.target is None:
            return {path: self.shares[path] for path in here}
        spent = sum(size for _, size in written)
        expected = sum(self._block(i, given.__getitem__) for i, (given, _) in enumerate(written))
        larger = spent / expected if written else 1.0
        # Two thousandths are kept for the last block's difference from what is expected of it.
        room = 0.998 * (self.target - spent) / larger
        factor = self._solve(range(index, len(self.layers)), room)
        return {path: self._density(path, factor) for path in here}
