"""The MACKO matrix on the device: its arrays, their invariants, packing and unpacking."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax import layout, packing

ENCODINGS = ("bitmask", "delta4")
LANES = (1, 2, 4, 8, 16, 32)
DTYPES = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "codes", "row_offsets", "starts"),
    meta_fields=("shape", "encoding", "lanes"))
@dataclasses.dataclass(frozen=True)
class MackoMatrix:
    values: jax.Array
    codes: jax.Array
    row_offsets: jax.Array
    starts: jax.Array
    shape: tuple[int, int]
    encoding: str
    lanes: int

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def stored(self) -> int:
        return self.values.size

    @property
    def nbytes(self) -> int:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def nnz(self) -> int:
        if self.encoding == "bitmask":
            return int(np.bitwise_count(np.asarray(self.codes)).sum(dtype=np.int64))
        return int(jnp.count_nonzero(self.values))

    @property
    def density(self) -> float:
        return self.nnz / (self.shape[0] * self.shape[1])


def choose_packing(shape, dtype, bitmask_groups: int, delta4_groups: int) -> tuple[str, int]:
    rows, cols = shape
    group_bytes = layout.GROUP * jnp.dtype(dtype).itemsize
    size = {
        "bitmask": bitmask_groups * group_bytes + 4 * rows * layout.words_per_row(cols),
        "delta4": delta4_groups * (group_bytes + 4),
    }
    encoding = min(size, key=size.get)
    return encoding, choose_lanes(bitmask_groups if encoding == "bitmask" else delta4_groups, rows)


def choose_lanes(groups: int, rows: int) -> int:
    mean = groups // max(rows, 1)
    return max(lanes for lanes in LANES if lanes == 1 or 8 * lanes <= mean)


def compress(weight, *, encoding=None, lanes=None) -> MackoMatrix:
    weight = np.asarray(weight)

    def choose(bitmask_groups, delta4_groups):
        best, _ = choose_packing(weight.shape, weight.dtype, bitmask_groups, delta4_groups)
        chosen = encoding or best
        groups = bitmask_groups if chosen == "bitmask" else delta4_groups
        return chosen, lanes or choose_lanes(groups, weight.shape[0])

    *arrays, encoding, lanes = packing.pack(np.ascontiguousarray(weight), choose)
    return MackoMatrix(*map(jnp.asarray, arrays), weight.shape, encoding, lanes)


@jax.jit
def decompress(matrix: MackoMatrix) -> jax.Array:
    return layout.decode_dense(
        matrix.values, matrix.codes, matrix.row_offsets,
        shape=matrix.shape, encoding=matrix.encoding, lanes=matrix.lanes)
