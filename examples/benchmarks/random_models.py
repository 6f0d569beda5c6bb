"""Models of random weights, made where they lie, for measurements of speed and memory."""

import functools
import math
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dsf_jax
import macko_jax
import macko_jax.flax_nnx
from dsf_jax.solvers.budget import plan_pair
from examples.llama import checkpoint, parallel


def random_weight(key, density, rows, cols, dtype, sharding=None):
    """[rows, cols] normal weights, each kept with probability `density`, made where they lie."""
    return _drawing(sharding)(key, density, rows, cols, dtype)


@functools.cache
def _drawing(sharding):
    static = ("rows", "cols", "dtype")
    return jax.jit(_draw_weight, static_argnames=static, out_shardings=sharding)


def _draw_weight(key, density, rows, cols, dtype):
    of_values, of_mask = jax.random.split(key)
    weight = 0.02 * jax.random.normal(of_values, (rows, cols), dtype)
    return jnp.where(jax.random.uniform(of_mask, (rows, cols)) < density, weight, 0)


def pack(weight, layouts, encoding, values, sharding=None):
    """A packed matrix whose arrays have the shapes of all packed matrices of its shape.

    The first matrix of a shape decides, with room for a little more than it holds; layers of one
    shape then share compiled kernels. The room is never read. With a sharding it is in shards.
    """
    compress = macko_jax.compress
    if sharding is not None:
        compress = functools.partial(macko_jax.shard, sharding=sharding)
    kind = weight.shape, sharding
    if kind not in layouts:
        packed = compress(weight, dtype=values, encoding=encoding)
        groups = packed.stored // 8
        layouts[kind] = {
            "dtype": values,
            "encoding": packed.encoding,
            "lanes": packed.lanes,
            "capacity": groups + groups // 512 + 64,  # of random masks, five deviations and more
        }
    return compress(weight, **layouts[kind])


def factors_of(density, rows, cols):
    """(shape, density) of the left and of the right factor of a layer, as DSF would choose them."""
    options = dsf_jax.Options()
    inner, *counts = plan_pair(density, (rows, cols), width=options.width, split=options.split)
    shapes = (rows, inner), (inner, cols)
    return [(shape, count / math.prod(shape)) for shape, count in zip(shapes, counts)]


class RandomModel:
    """A maker of models of random weights, whose decoder layers are packed at densities below 1.

    Args:
      config, dtype: the shape of the models, and what they are held in.
      seed: of weights and masks.
      encoding, values: of packed matrices; None for the library's choice, and for `dtype`.
      pairs: whether packed layers are two factors each.
      tensor_parallel: devices that share a model.
    """

    def __init__(
        self, config, dtype, *, seed=0, encoding=None, values=None, pairs=False, tensor_parallel=1
    ):
        self.config, self.dtype, self.pairs = config, dtype, pairs
        self.encoding, self.values, self.devices = encoding, values, tensor_parallel
        self.mesh = parallel.make_mesh(tensor_parallel, config)
        self.key = jax.random.key(seed)

    def __call__(self, density):
        """The model of a density."""
        began = time.perf_counter()
        abstract = checkpoint.abstract_model(self.config, dtype=self.dtype, param_dtype=self.dtype)
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(abstract)))
        kernels = {path[:-1] for path in flat if path[-1] == "kernel"}
        tree, layouts = {}, {}
        for i, (path, leaf) in enumerate(flat.items()):
            sparse = path[0] == "layers" and path[:-1] in kernels and density < 1
            made = self._leaf(i, path, leaf.shape, density if sparse else 1.0, layouts, len(flat))
            tree |= jax.block_until_ready(made)
            if sys.stdout.isatty():
                print(f"\r  built {i + 1} of {len(flat)} arrays", end="", flush=True)
        print(f"\r  built {len(flat)} arrays in place in {time.perf_counter() - began:.1f} s")
        tree = traverse_util.unflatten_dict(tree)
        model = macko_jax.flax_nnx.from_pure_dict(abstract, tree)
        return model if self.mesh is None else parallel.spread(model, self.mesh)

    def _leaf(self, i, path, shape, density, layouts, count):
        """The arrays in the place of one, by path."""
        *layer, name = path
        pairs = self.pairs and density < 1
        if len(shape) == 1:
            place = (*layer, "left", name) if pairs else path
            ones = jnp.ones(shape, self.dtype)
            spec = parallel.spec_of(path) if name == "bias" else None
            return {
                place: ones if self.mesh is None else jax.device_put(ones, self._place(spec, 1))
            }
        if density == 1:
            return {path: self._draw(i, path, shape[::-1], 1.0).T}
        if not pairs:
            return {path: self._pack(i, path, shape[::-1], density, layouts)}
        sides = zip(("left", "right"), factors_of(density, *shape[::-1]))
        return {
            (*layer, side, name): self._pack(i + j * count, path, *factor, layouts)
            for j, (side, factor) in enumerate(sides)
        }

    def _place(self, spec, axes=2):
        """The sharding of a spec of [rows, cols], or of one axis as rows are split."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*(spec or ())[:axes]))

    def _draw(self, name, path, shape, density):
        key = jax.random.fold_in(self.key, name)
        spec = parallel.spec_of(path)
        even = spec and not any(n % self.devices for n, e in zip(shape, spec) if e)
        return random_weight(key, density, *shape, self.dtype, self._place(spec if even else None))

    def _pack(self, name, path, shape, density, layouts):
        weight = self._draw(name, path, shape, density)
        sharding = self._place(parallel.spec_of(path))
        return pack(weight, layouts, self.encoding, self.values, sharding)


def array_bytes(tree):
    """Bytes of a tree's arrays, on all devices together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
