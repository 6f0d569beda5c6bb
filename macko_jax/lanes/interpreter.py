"""The lane vocabulary executed with NumPy, every lane of the grid at once.

It runs the very program that `lanes.py` emits, so that a machine without a GPU can check decode
arithmetic, control flow and addresses: a load or store outside an array, or of a shared slot that
nothing wrote, is an error. It does not model races within a block.
"""

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax.lanes.mosaic import WARP


class NumpyLanes:
    """Lanes of `blocks` blocks of `threads` threads, all in step; registers are NumPy arrays.

    Attributes:
      arrays: name -> NumPy array; stores write into them.
    """

    def __init__(self, arrays, *, blocks, threads, shared_slots, cluster=1):
        self.arrays = {name: a.reshape(-1) for name, a in arrays.items()}
        self._blocks, self._threads, self._cluster = blocks, threads, cluster
        self._shared = np.zeros((blocks, 2 * shared_slots), np.uint16)
        self._written = np.zeros(self._shared.shape, bool)
        self._active = np.ones(blocks * threads, bool)
        self._lane_block = np.repeat(np.arange(blocks, dtype=np.uint32), threads)

    # Registers

    def block(self):
        return self._lane_block.copy()

    def thread(self):
        return np.tile(np.arange(self._threads, dtype=np.uint32), self._blocks)

    def integer(self, number):
        return np.full(self._active.size, number, np.uint32)

    def real(self, number):
        return np.full(self._active.size, number, np.float32)

    def select(self, condition, yes, no):
        return jax.tree.map(lambda a, b: np.where(condition, a, b), yes, no)

    def fma(self, a, b, c):
        with np.errstate(all="ignore"):
            return (a.astype(np.float64) * b + c).astype(np.float32)

    def maximum(self, a, b):
        return np.maximum(a, b)

    def exp2(self, a):
        return np.exp2(a)

    def reciprocal(self, a):
        return 1 / a

    def reciprocal_sqrt(self, a):
        return (1 / np.sqrt(a)).astype(np.float32)

    def add_byte(self, word, number, scale, total):
        return total + scale * ((word >> (8 * number)) & 0xFF)

    def pair(self, word, dtype):
        halves = np.ascontiguousarray(word).view(jnp.dtype(dtype)).astype(np.float32)
        return halves[0::2], halves[1::2]

    def four(self, word, dtype):
        bytes_ = np.ascontiguousarray(word).view(jnp.dtype(dtype)).astype(np.float32)
        return [bytes_[i::4] for i in range(4)]

    def pack(self, low, high, dtype):
        rounded = np.stack([low, high], axis=-1).astype(jnp.dtype(dtype))
        return rounded.view(np.uint32).reshape(-1)

    def as_real(self, word):
        return word.view(np.float32)

    def as_word(self, real):
        return real.view(np.uint32)

    # Warp

    def all(self, condition):
        return self._vote(condition | ~self._active, np.all)

    def any(self, condition):
        return self._vote(condition & self._active, np.any)

    def _vote(self, condition, reduce):
        return np.repeat(reduce(condition.reshape(-1, WARP), axis=1), WARP)

    def exchange(self, value, distance):
        self._whole_warps()
        return value.reshape(-1, WARP)[:, np.arange(WARP) ^ distance].reshape(-1)

    def barrier(self):
        assert self._active.all(), "barrier that not every lane reaches"

    def warp_barrier(self):
        self._whole_warps()

    # Cluster: its blocks are in step, too

    def cluster_barrier(self):
        self.barrier()

    def load_peer(self, offset, peer):
        assert peer < self._cluster, f"block {peer} of a cluster of {self._cluster}"
        first = self._lane_block // self._cluster * self._cluster
        [word] = self._load_shared(first + np.uint32(peer), offset, 1)
        return word.view(np.float32)

    def _whole_warps(self):
        warps = self._active.reshape(-1, WARP)
        assert (warps.all(1) | ~warps.any(1)).all(), "a warp with inactive lanes"

    # Memory

    def load_words(self, name, index, count, where, *, how=None):
        del how
        array, where = self.arrays[name].view(np.uint8), where & self._active
        words = array[: array.size // 4 * 4].view(np.uint32)
        at = self._in_range(name, index.astype(np.int64) * count, where, words.size - count + 1)
        return [
            np.where(where, words[at + i] if words.size else 0, 0).astype(np.uint32)
            for i in range(count)
        ]

    def load_integer(self, name, index):
        array = self.arrays[name]
        at = self._in_range(name, index.astype(np.int64), self._active, array.size)
        return array[at].astype(np.uint32)

    def load_small(self, name, offset, size, where):
        array, where = self.arrays[name].view(np.uint8), where & self._active
        array = array[: array.size // size * size].view(f"u{size}")
        assert (offset % size == 0)[where].all(), f"misaligned load of {name}"
        at = self._in_range(name, offset.astype(np.int64) // size, where, array.size)
        return np.where(where, array[at], 0).astype(np.uint32)

    def load_real(self, name, index, where):
        array, where = self.arrays[name], where & self._active
        at = self._in_range(name, index.astype(np.int64), where, array.size)
        return np.where(where, array[at], 0).astype(np.float32)

    def store_real(self, name, index, value, where):
        array, where = self.arrays[name], where & self._active
        at = self._in_range(name, index.astype(np.int64), where, array.size)[where]
        assert np.unique(at).size == at.size, f"two lanes store the same element of {name}"
        array[at] = value[where].astype(array.dtype)

    def publish(self, name, index, value, dtype, where):
        bits = value.astype(dtype).view(np.uint16)
        self.store_half(name, index, np.minimum(bits, 0xFFFE), where)

    def store_words(self, name, index, words, where):
        array, where = self.arrays[name].view(np.uint32), where & self._active
        at = index.astype(np.int64) * len(words)
        at = self._in_range(name, at, where, array.size - len(words) + 1)[where]
        assert np.unique(at).size == at.size, f"two lanes store the same words of {name}"
        for i, word in enumerate(words):
            array[at + i] = word[where]

    def store_half(self, name, index, word, where):
        array, where = self.arrays[name].view(np.uint16), where & self._active
        at = self._in_range(name, index.astype(np.int64), where, array.size)[where]
        array[at] = word[where] & 0xFFFF

    def prefetch(self, name, index, where):
        self._in_range(name, index.astype(np.int64), where & self._active, self.arrays[name].size)

    # Shared memory

    def load_shared_words(self, offset, count):
        return self._load_shared(self._lane_block, offset, count)

    def load_shared(self, offset, count):
        return [w.view(np.float32) for w in self.load_shared_words(offset, count)]

    def _load_shared(self, block, offset, count):
        at = self._shared_at(offset, 4 * count, self._active)[:, None] + np.arange(2 * count)
        place = block[:, None], at
        assert self._written[place][self._active].all(), "shared slot never written"
        words = np.ascontiguousarray(self._shared[place]).view(np.uint32)
        return [np.ascontiguousarray(w) for w in words.T]

    def store_shared_words(self, offset, words, where):
        halves = np.stack(words, axis=1).view(np.uint16)
        self._store_shared(offset, 4 * len(words), halves, where)

    def store_shared_half(self, offset, word, where):
        self._store_shared(offset, 2, (word & 0xFFFF).astype(np.uint16)[:, None], where)

    def store_shared(self, index, value, where):
        self.store_shared_words(4 * index, [value.view(np.uint32)], where)

    def _store_shared(self, offset, size, halves, where):
        where = where & self._active
        at = self._shared_at(offset, size, where)[where][:, None] + np.arange(size // 2)
        place = self._lane_block[where][:, None], at
        self._shared[place], self._written[place] = halves[where], True

    def _shared_at(self, offset, size, where):
        assert (offset % size == 0)[where].all(), "misaligned access of shared memory"
        return self._in_range(
            "shared", offset.astype(np.int64) // 2, where, self._shared.shape[1] - size // 2 + 1
        )

    @staticmethod
    def _in_range(name, index, where, size):
        outside = where & ((index < 0) | (index >= size))
        assert not outside.any(), f"{name}[{index[outside][:4]}] of {size} elements"
        return np.where(where, index, 0)

    # Control flow

    def loop(self, condition, body, state):
        outer = self._active
        while True:
            going = condition(state) & self._active
            if not going.any():
                break
            self._active = going
            state = self.select(going, body(state), state)
        self._active = outer
        return state

    def branch(self, condition, yes, otherwise):
        outer = self._active
        self._active = outer & condition
        result = yes()
        self._active = outer
        return self.select(condition & outer, result, otherwise)
