"""The code of two dense models, which is all that a process that serves them has beside macko_jax.

    python -m tests.served_models FOLDER

loads FOLDER/nnx.safetensors and FOLDER/linen.safetensors and writes what the models make of
FOLDER/inputs.npy to nnx.npy and linen.npy.
"""

import pathlib
import sys

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

import macko_jax


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 24, rngs=rngs)
        self.down = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Net(nnx.Module):
    """Each kind of layer that can be packed, [B, 6, 6, 4] -> [B, 5]."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (2, 2), feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.blocks = nnx.vmap(Block)(nnx.Rngs(0).split(3))
        self.heads = nnx.LinearGeneral(8, (2, 6), rngs=rngs)
        self.query = nnx.Einsum("BD,NDH->BNH", (2, 8, 6), (2, 6), rngs=rngs)
        self.value = nnx.Einsum("BD,DNH->BNH", (8, 2, 6), rngs=rngs)
        self.merge = nnx.LinearGeneral((2, 6), 10, axis=(-2, -1), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.plain = nnx.Linear(10, 10, rngs=rngs)
        self.head = nnx.Linear(10, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.grouped(nnx.relu(self.conv(nnx.relu(self.stem(x))))))
        x = x.mean((1, 2))
        x = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.blocks, x
        )
        x = self.merge(nnx.relu(self.heads(x) + self.query(x) * self.value(x)))
        return self.head(self.plain(self.dropout(x)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(24, name="up")(x))), None


class LinenNet(nn.Module):
    """The same of linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, use_bias=False, name="conv")(x))
        x = nn.Conv(8, (2, 2), feature_group_count=2, name="grouped")(x).mean((1, 2))
        x, _ = nn.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )(name="blocks")(x, None)
        query = nn.Einsum((2, 8, 6), "BD,NDH->BNH", name="query")(x)
        value = nn.Einsum((8, 2, 6), "BD,DNH->BNH", use_bias=False, name="value")(x)
        x = nn.DenseGeneral((2, 6), name="heads")(x) + query * value
        x = nn.DenseGeneral(10, axis=(-2, -1), name="merge")(nn.relu(x))
        return nn.Dense(5, use_bias=False, name="head")(nn.Dense(10, name="plain")(x))


def make() -> Net:
    return Net(nnx.Rngs(0))


def main(folder: pathlib.Path):
    x = np.load(folder / "inputs.npy")
    model = macko_jax.load_model(folder / "nnx.safetensors", make)
    np.save(folder / "nnx.npy", nnx.jit(lambda model, x: model(x))(model, x))
    variables = macko_jax.load_model(folder / "linen.safetensors")
    apply = jax.jit(lambda variables, x: macko_jax.flax_linen.apply(LinenNet(), variables, x))
    np.save(folder / "linen.npy", apply(variables, x))
    assert "dsf_jax" not in sys.modules


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
