"""Tensor parallelism: matrices, heads and the KV cache of a model over several devices.

As in Megatron-LM (arXiv 1909.08053, section 3): `qkv` and `gate_up` are split by rows, in shares of
heads and of gated pairs; `out` and `down`, which take what these give, by columns, so that a layer
waits for two sums over the devices. The head is split by rows of the vocabulary. Packed matrices
are `macko_jax.ShardedMatrix`; dense ones are placed, and XLA partitions their products.
"""

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import macko_jax

AXIS = "model"
BY_ROWS, BY_COLUMNS = ("qkv", "gate_up", "head"), ("out", "down")
HEADS, LAST = P(None, AXIS), P(None, None, AXIS)  # of a cache [B, K, S, 2, D]; of [B, T, n]


def make_mesh(count, config=None):
    """A mesh of the first `count` devices, for a model that divides by them; None for one device.

    Raises:
      ValueError: there are fewer devices, or the model's heads do not divide.
    """
    if count == 1:
        return None
    if count > len(jax.devices()):
        raise ValueError(
            f"--tensor_parallel={count} needs as many devices, and there are "
            f"{len(jax.devices())}; on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    if config is not None:
        check(config, count)
    return jax.make_mesh((count,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:count])


def check(config, count):
    """Raises a ValueError unless a model can be shared out to so many devices."""
    sizes = {
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "intermediate features": config.intermediate_size,
    }
    for what, size in sizes.items():
        if size % count:
            able = [n for n in range(1, count) if all(s % n == 0 for s in sizes.values())]
            raise ValueError(
                f"--tensor_parallel={count} does not divide the model's {size} {what}; for this "
                f"model take one of {able}"
            )


def spec_of(path):
    """How a kernel [out, in] lies on the mesh, P(AXIS, None) or P(None, AXIS); None: everywhere.

    The factors of a pair alternate: what the right one gives in pieces the left one takes so.
    """
    names = set(map(str, path))
    if names & set(BY_COLUMNS):
        return P(None, AXIS)
    return P(AXIS, None) if names & set(BY_ROWS) else None


def parts_of(path, config):
    """Lengths of the matrices that the rows of a kernel, or a bias, join."""
    if "qkv" in path:
        dim = config.head_dim
        query, key = config.num_attention_heads * dim, config.num_key_value_heads * dim
        return query, key, key
    return (config.intermediate_size,) * 2 if "gate_up" in path else None


def place(tree, prefix, config, mesh):
    """The nested dicts of a part of a model with every leaf on the devices of a mesh.

    Args:
      tree: as `macko_jax.flax_nnx.to_pure_dict` gives it: Flax kernels [in, out], MackoMatrix.
      prefix: path of the part in the model, such as ("layers", 3).
      config, mesh: the model's shape, and the mesh.
    """
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(
        {path: _place_leaf(leaf, (*prefix, *path), config, mesh) for path, leaf in flat.items()}
    )


def _place_leaf(leaf, path, config, mesh):
    spec = spec_of(path)
    by_rows, is_kernel = spec == P(AXIS, None), path[-1] == "kernel"
    if spec is None or not (is_kernel or by_rows):
        return jax.device_put(leaf, NamedSharding(mesh, P()))
    count = mesh.shape[AXIS]
    packed = isinstance(leaf, macko_jax.MackoMatrix)
    if "head" in path and leaf.shape[0 if packed else -1] % count:  # the vocabulary is odd
        return jax.device_put(leaf, NamedSharding(mesh, P()))
    parts = parts_of(path, config) if by_rows and "right" not in path else None
    if packed:
        return macko_jax.shard(leaf, NamedSharding(mesh, spec), parts=parts)
    if parts is not None:
        leaf = np.asarray(leaf)[..., _order(parts, count)]
    spec = P(AXIS) if not is_kernel else P(*spec[::-1])
    return jax.device_put(leaf, NamedSharding(mesh, spec))


def _order(parts, count):
    """Rows in the order in which the devices have them, as `macko_jax.shard` orders them."""
    begins = np.cumsum([0, *parts])
    shares = [np.arange(n).reshape(count, -1) + begin for n, begin in zip(parts, begins)]
    return np.concatenate(shares, axis=1).reshape(-1)


def spread(model, mesh):
    """Tells a model, whose arrays are placed, over which mesh its heads go; the model."""
    for block in model.layers:
        block.mesh = block.attention.mesh = mesh
    return model


def by_device(mesh, function, in_specs, out_specs):
    """A function as the program of each device of a mesh; the function itself without a mesh."""
    if mesh is None:
        return function

    # Unchecked, since jax 0.11 refuses a kernel that changes an array in place, as attention does
    # with the cache, where arrays have types that say over which axes they vary.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
