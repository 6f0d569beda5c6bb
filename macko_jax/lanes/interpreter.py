"""Executes lane programs with NumPy, for every lane of the grid at once.

It runs the very program that `mosaic` emits, so that a machine without a GPU can check arithmetic,
control flow and addresses. What `vocabulary.Lanes` forbids is an `InterpreterError`: an access out
of range or misaligned, a load of shared memory that nothing wrote, two lanes that store to the same
element, and votes, exchanges and barriers that not all lanes reach. All lanes are in step, so it
finds no missing barrier, and no race.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from macko_jax.format.layout import WARP
from macko_jax.lanes.vocabulary import CACHED, How, Lanes, State

SHARED = "shared memory"  # its name in errors


class InterpreterError(AssertionError):
    """A lane program did what the language forbids."""


class NumpyLanes:
    """Lanes of a grid, all in step; a register is an array with an element for each of them.

    Args:
      arrays: name -> global array, contiguous; stores write into it.
      blocks: how many blocks the grid has.
      threads: how many lanes a block has, whole warps.
      shared_slots: how many words of shared memory a block has.
      cluster: how many consecutive blocks are a cluster.

    Attributes:
      arrays: name -> global array, flat.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        blocks: int,
        threads: int,
        shared_slots: int,
        cluster: int = 1,
    ):
        self.arrays = {name: array.reshape(-1) for name, array in arrays.items()}
        self._blocks, self._threads, self._cluster = blocks, threads, cluster
        # Shared memory as halves of words, since that is the least that is written.
        self._shared = np.zeros((blocks, 2 * shared_slots), np.uint16)
        self._written = np.zeros(self._shared.shape, bool)
        self._active = np.ones(blocks * threads, bool)  # lanes that execute the operation
        self._lane_block = np.repeat(np.arange(blocks, dtype=np.uint32), threads)

    # Registers

    def block(self) -> np.ndarray:
        return self._lane_block.copy()

    def thread(self) -> np.ndarray:
        return np.tile(np.arange(self._threads, dtype=np.uint32), self._blocks)

    def integer(self, number: int) -> np.ndarray:
        return np.full(self._active.size, number, np.uint32)

    def real(self, number: float) -> np.ndarray:
        return np.full(self._active.size, number, np.float32)

    def select(self, condition: np.ndarray, yes: State, no: State) -> State:
        return jax.tree.map(lambda a, b: np.where(condition, a, b), yes, no)

    # Arithmetic

    def fma(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        # The product is exact in float64. The sum is rounded twice, which seldom matters.
        with np.errstate(all="ignore"):
            return (a.astype(np.float64) * b + c).astype(np.float32)

    def maximum(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum(a, b)

    def exp2(self, a: np.ndarray) -> np.ndarray:
        return np.exp2(a)

    def reciprocal(self, a: np.ndarray) -> np.ndarray:
        return 1 / a

    def reciprocal_sqrt(self, a: np.ndarray) -> np.ndarray:
        return (1 / np.sqrt(a)).astype(np.float32)

    def add_byte(self, word: np.ndarray, number: int, scale: int, total: np.ndarray) -> np.ndarray:
        return total + scale * ((word >> (8 * number)) & 0xFF)

    # Conversions

    def pair(self, word: np.ndarray, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
        halves = np.ascontiguousarray(word).view(jnp.dtype(dtype)).astype(np.float32)
        return halves[0::2], halves[1::2]

    def four(self, word: np.ndarray, dtype: DTypeLike) -> list[np.ndarray]:
        numbers = np.ascontiguousarray(word).view(jnp.dtype(dtype)).astype(np.float32)
        return [numbers[i::4] for i in range(4)]

    def pack(self, low: np.ndarray, high: np.ndarray, dtype: DTypeLike) -> np.ndarray:
        rounded = np.stack([low, high], axis=-1).astype(jnp.dtype(dtype))
        return rounded.view(np.uint32).reshape(-1)

    def as_word(self, real: np.ndarray) -> np.ndarray:
        return real.view(np.uint32)

    def as_real(self, word: np.ndarray) -> np.ndarray:
        return word.view(np.float32)

    # Warp, block and cluster

    def all(self, condition: np.ndarray) -> np.ndarray:
        return self._vote("all", condition, np.all)

    def any(self, condition: np.ndarray) -> np.ndarray:
        return self._vote("any", condition, np.any)

    def _vote(self, operation: str, condition, reduce: Callable):
        self._demand_whole_warps(operation)
        return np.repeat(reduce(condition.reshape(-1, WARP), axis=1), WARP)

    def exchange(self, value: np.ndarray, distance: int) -> np.ndarray:
        self._demand_whole_warps("exchange")
        return value.reshape(-1, WARP)[:, np.arange(WARP) ^ distance].reshape(-1)

    def warp_barrier(self) -> None:
        self._demand_whole_warps("warp_barrier")

    def barrier(self) -> None:
        self._demand_all_lanes("barrier")

    def cluster_barrier(self) -> None:
        self._demand_all_lanes("cluster_barrier")

    def load_peer(self, offset: np.ndarray, peer: int) -> np.ndarray:
        if not 0 <= peer < self._cluster:
            raise InterpreterError(f"load_peer of block {peer} in a cluster of {self._cluster}")
        first = self._lane_block // self._cluster * self._cluster
        [word] = self._load_shared(first + np.uint32(peer), offset, 1)
        return word.view(np.float32)

    def _demand_whole_warps(self, operation: str) -> None:
        warps = self._active.reshape(-1, WARP)
        torn = np.flatnonzero(warps.any(1) & ~warps.all(1))
        if torn.size:
            lanes = np.flatnonzero(warps[torn[0]])
            raise InterpreterError(
                f"{operation} that only lanes {lanes} of a warp of {WARP} reach, warp {torn[0]} of"
                " the grid"
            )

    def _demand_all_lanes(self, operation: str) -> None:
        if not self._active.all():
            raise InterpreterError(
                f"{operation} that {self._active.sum()} of the grid's {self._active.size} lanes"
                " reach"
            )

    # Global memory

    def load_words(
        self, name: str, index: np.ndarray, count: int, where: np.ndarray, *, how: How = CACHED
    ) -> list[np.ndarray]:
        del how
        return list(self._load(name, self._words(name, count), index, where).T.copy())

    def load_integer(self, name: str, index: np.ndarray) -> np.ndarray:
        return self._load(name, self.arrays[name], index, self._active).astype(np.uint32)

    def load_small(self, name: str, offset: np.ndarray, size: int, where: np.ndarray) -> np.ndarray:
        self._demand_aligned(name, offset, size, where & self._active)
        small = self._whole(name, size).view(f"u{size}")
        return self._load(name, small, offset // size, where).astype(np.uint32)

    def load_real(self, name: str, index: np.ndarray, where: np.ndarray) -> np.ndarray:
        return self._load(name, self.arrays[name], index, where).astype(np.float32)

    def store_real(
        self, name: str, index: np.ndarray, value: np.ndarray, where: np.ndarray
    ) -> None:
        self._store(name, self.arrays[name], index, value, where)

    def store_words(
        self, name: str, index: np.ndarray, words: list[np.ndarray], where: np.ndarray
    ) -> None:
        values = np.stack(words, axis=1)
        self._store(name, self._words(name, len(words)), index, values, where)

    def store_half(self, name: str, index: np.ndarray, word: np.ndarray, where: np.ndarray) -> None:
        self._store(name, self.arrays[name].view(np.uint16), index, word & 0xFFFF, where)

    def publish(
        self, name: str, index: np.ndarray, value: np.ndarray, dtype: DTypeLike, where: np.ndarray
    ) -> None:
        with np.errstate(over="ignore"):
            bits = value.astype(dtype).view(np.uint16)
        self.store_half(name, index, np.minimum(bits, 0xFFFE), where)

    def prefetch(self, name: str, index: np.ndarray, where: np.ndarray) -> None:
        array = self.arrays[name]
        self._in_range(name, index, where & self._active, array.size, array.itemsize)

    def _whole(self, name: str, size: int) -> np.ndarray:
        """The bytes of a global array, as far as they are whole units of `size`."""
        array = self.arrays[name].view(np.uint8)
        return array[: array.size // size * size]

    def _words(self, name: str, count: int) -> np.ndarray:
        """A global array as words, [n, count]."""
        return self._whole(name, 4 * count).view(np.uint32).reshape(-1, count)

    def _load(self, name: str, array: np.ndarray, index, where) -> np.ndarray:
        """The elements or rows of an array at an index, and 0 where not `where`."""
        where = where & self._active
        at = self._in_range(name, index, where, len(array), _row_bytes(array))[where]
        out = np.zeros((where.size, *array.shape[1:]), array.dtype)
        out[where] = array[at]
        return out

    def _store(self, name: str, array: np.ndarray, index, value, where) -> None:
        """Writes elements or rows of an array where `where` holds."""
        where = where & self._active
        at = self._in_range(name, index, where, len(array), _row_bytes(array))[where]
        places, stores = np.unique(at, return_counts=True)
        if (stores > 1).any():
            raise InterpreterError(
                f"several lanes store to index {places[stores > 1][0]} of {name}"
            )
        array[at] = value[where].astype(array.dtype)

    # Shared memory of the block

    def load_shared_words(self, offset: np.ndarray, count: int) -> list[np.ndarray]:
        return self._load_shared(self._lane_block, offset, count)

    def load_shared(self, offset: np.ndarray, count: int) -> list[np.ndarray]:
        return [word.view(np.float32) for word in self.load_shared_words(offset, count)]

    def load_shared_half(self, offset: np.ndarray) -> np.ndarray:
        return self._load_shared_halves(self._lane_block, offset, 2)[:, 0].astype(np.uint32)

    def store_shared_words(
        self, offset: np.ndarray, words: list[np.ndarray], where: np.ndarray
    ) -> None:
        halves = np.stack(words, axis=1).view(np.uint16)
        self._store_shared(offset, 4 * len(words), halves, where)

    def store_shared_half(self, offset: np.ndarray, word: np.ndarray, where: np.ndarray) -> None:
        self._store_shared(offset, 2, (word & 0xFFFF).astype(np.uint16)[:, None], where)

    def store_shared(self, index: np.ndarray, value: np.ndarray, where: np.ndarray) -> None:
        self.store_shared_words(4 * index, [value.view(np.uint32)], where)

    def _load_shared(self, block, offset, count: int) -> list[np.ndarray]:
        """The `count` words at a byte offset in the shared memory of a block."""
        words = self._load_shared_halves(block, offset, 4 * count).view(np.uint32)
        return [np.ascontiguousarray(word) for word in words.T]

    def _load_shared_halves(self, block, offset, size: int) -> np.ndarray:
        """The halves of `size` bytes at a byte offset, [lanes, size / 2]."""
        place = block[:, None], self._shared_halves(offset, size, self._active)
        blank = self._active & ~self._written[place].all(axis=1)
        if blank.any():
            raise InterpreterError(
                f"load of {size} bytes of {SHARED} that nothing wrote, at offset"
                f" {offset[blank][0]} in block {block[blank][0]}"
            )
        return np.ascontiguousarray(self._shared[place])

    def _store_shared(self, offset, size: int, halves, where) -> None:
        where = where & self._active
        place = self._lane_block[where][:, None], self._shared_halves(offset, size, where)[where]
        self._shared[place], self._written[place] = halves[where], True

    def _shared_halves(self, offset, size: int, where) -> np.ndarray:
        """The indices of the halves of `size` bytes at an offset, [lanes, size / 2]."""
        self._demand_aligned(SHARED, offset, size, where)
        count = self._shared.shape[1] * 2 // size
        index = self._in_range(SHARED, offset // size, where, count, size)
        return index[:, None] * (size // 2) + np.arange(size // 2)

    # Demands on addresses

    @staticmethod
    def _demand_aligned(name: str, offset, size: int, where) -> None:
        crooked = where & (offset % size != 0)
        if crooked.any():
            raise InterpreterError(
                f"access to {size} bytes of {name} at offset {offset[crooked][0]}, which is not a"
                f" multiple of {size}"
            )

    @staticmethod
    def _in_range(name: str, index, where, count: int, size: int) -> np.ndarray:
        """The index of one of `count` elements of `size` bytes, and 0 where not `where`."""
        outside = where & (index >= count)
        if outside.any():
            raise InterpreterError(
                f"index {index[outside][0]} of {name} is out of range: it has {count} elements of"
                f" {size} bytes ({outside.sum()} lanes are wrong)"
            )
        return np.where(where, index, 0).astype(np.int64)

    # Control flow

    def loop(
        self, condition: Callable[[State], np.ndarray], body: Callable[[State], State], state: State
    ) -> State:
        outer = self._active
        while True:
            going = condition(state) & self._active
            if not going.any():
                break
            self._active = going
            state = self.select(going, body(state), state)
        self._active = outer
        return state

    def branch(self, condition: np.ndarray, yes: Callable[[], State], otherwise: State) -> State:
        outer = self._active
        self._active = outer & condition
        result = yes()
        self._active = outer
        return self.select(condition & outer, result, otherwise)


def _row_bytes(array: np.ndarray) -> int:
    return array.itemsize * math.prod(array.shape[1:])


def run(
    program: Callable[[Lanes[np.ndarray]], None],
    arrays: Mapping[str, np.ndarray],
    *,
    blocks: int,
    warps: int,
    shared_slots: int,
    cluster: int = 1,
) -> dict[str, np.ndarray]:
    """Executes a lane program on a grid.

    Args:
      program: is called with the operations, and finds all arrays under their names.
      arrays: name -> array, of operands and results; results usually are full of NaN.
      blocks, warps, shared_slots, cluster: as of `mosaic.run`.

    Returns:
      name -> array of the same shape, after the program.
    """
    lanes = NumpyLanes(
        arrays, blocks=blocks, threads=WARP * warps, shared_slots=shared_slots, cluster=cluster
    )
    program(lanes)
    return {name: lanes.arrays[name].reshape(array.shape) for name, array in arrays.items()}
