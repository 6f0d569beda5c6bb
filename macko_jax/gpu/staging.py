"""Vectors in the shared memory of a block: x, gathered by column, and the block's share of y."""

import functools
import math

import jax.numpy as jnp

from macko_jax.format import two_bank
from macko_jax.gpu import tuning
from macko_jax.gpu.row_walk import SLACK
from macko_jax.lanes.vocabulary import FRESH, Lanes

BLANK = 0xFFFF  # 16 bits in the place of an element that no block has published yet
PER_LOAD = 8  # elements of a published vector that a thread reads at a time


def deal_blocks(ops: Lanes, passes: int, vectors: int):
    """The block in its pass, and its first vector, on a grid with as many blocks for each pass.

    The passes of one share of the rows run at about the same time, and may find it in a cache.
    """
    if passes == 1:
        return ops.block(), ops.integer(0)
    block = ops.block() // passes
    return block, (ops.block() - block * passes) * vectors


def _has_blank(word):
    """Whether one half of a word, or both, is `BLANK`."""
    return ((word & BLANK) == BLANK) | ((word >> 16) == BLANK)


def _any(conditions):
    return functools.reduce(lambda a, b: a | b, conditions)


def gate(ops: Lanes, a, b):
    """silu(a) * b."""
    grown = ops.exp2(a * -math.log2(math.e))
    return a * b * ops.reciprocal(grown + ops.real(1))


class Vectors:
    """`count` vectors side by side in shared memory, to be gathered from by column.

    16-bit vectors keep their type, two to a word, so that a gather of two of them costs what
    one of a float32 costs; an odd one, and other types, become float32. Gathering from shared
    memory is what limits the products, not converting.

    What is staged may be a function of what is read, `before`: "norm", elements times those of the
    array `scale`, while their squares are added up; "gate", silu(a) * b of rows that hold a and b.

    A single 16-bit vector may be `narrow`: it keeps its type, and takes half the room of a float32.

    Vectors that lie there in `two_copies`, of which each element names one (see `format.two_bank`),
    have three words for each column. They hold the same, so they are written two or four at a time.

    Attributes:
      scale: what columns are multiplied by in `at`: bytes between two of them in shared memory.
      slots: 32-bit words of shared memory that they take.
    """

    def __init__(
        self,
        dtype,
        *,
        length: int,
        count: int,
        batch: int,
        before: str | None = None,
        first_slot: int = 0,
        two_copies: bool = False,
        narrow: bool = False,
    ):
        self.dtype, self.length, self.count, self.batch = jnp.dtype(dtype), length, count, batch
        self.before, self._columns = before, length + SLACK
        self._base = 4 * first_slot
        self.packed = self.dtype.itemsize == 2 and count % 2 == 0
        self._words = count // 2 if self.packed else count
        if two_copies and self._words != 1:
            raise ValueError(f"{count} vectors of {self.dtype} cannot lie twice in shared memory")
        if narrow and (two_copies or before or count != 1 or self.dtype.itemsize != 2):
            raise ValueError(
                f"{count} vectors of {self.dtype} cannot be narrow"
                f"{' in two copies' * two_copies}{f' after a {before}' if before else ''}"
            )
        self.two_copies, self._times = two_copies, two_bank.WORDS if two_copies else 1
        self.narrow = narrow
        self.scale = 2 if narrow else 4 * self._words * self._times
        self.slots = -(-self._columns * self.scale // 4)
        # Columns of 16 bits are read two at a time, if nothing has to be computed of them.
        pairs = self.dtype.itemsize == 2 and length % 2 == 0 and before is None
        self._together = 2 if pairs else 1
        self._rounds = tuning.ELEMENTS_IN_FLIGHT
        if pairs:
            self._rounds = tuning.PAIRS_IN_FLIGHT.get(count, self._rounds)

    def begin(self, ops: Lanes, name, first, threads: int, scale="scale"):
        """Issues the first loads of the array `name` [batch, length], from vector `first` on.

        `scale` is the name of the norm's array.
        """
        self.ops, self.name, self.first, self.threads = ops, name, first, threads
        self._scale = scale
        self._head = self._read(ops.thread())

    def finish(self):
        """Fills shared memory; the block's barrier has to follow.

        Returns:
          A list of the sum of the squares of what the thread read, empty if there is no norm.
        """
        squares = [self.ops.real(0)] if self.before == "norm" else []
        squares = self._write(self._head, squares)

        def copy(state):
            number, squares = state
            return number + self._swept, self._write(self._read(number), squares)

        start = self.ops.thread() + self._swept
        return self.ops.loop(lambda state: state[0] < self._units, copy, (start, squares))[1]

    def at(self, column) -> list:
        """The elements of all vectors at a column times `scale`, as float32."""
        ops = self.ops
        if self.narrow:
            return [ops.pair(ops.load_shared_half(column + self._base), self.dtype)[0]]
        if self.packed:
            words = ops.load_shared_words(column + self._base, self._words)
            return [half for word in words for half in ops.pair(word, self.dtype)]
        return ops.load_shared(column + self._base, self.count)

    @property
    def _units(self) -> int:
        """Number of units that threads read one after the other: columns, or pairs of them."""
        return self._columns // self._together

    @property
    def _swept(self) -> int:
        """Units that the threads have in flight together."""
        return self._rounds * self.threads

    def _read(self, number):
        """Issues the loads of a thread from a unit on: [(unit, loads of all vectors)]."""
        load = self._load_pair if self._together == 2 else self._loads
        rounds = min(self._rounds, -(-self._units // self.threads))
        units = [number + i * self.threads for i in range(rounds)]
        return [(at, [load(k, at) for k in range(self.count)]) for at in units]

    def _load_pair(self, k: int, at):
        """The word of two elements of vector k."""
        where = (at < self.length // 2) & (self.first + k < self.batch)
        index = (self.first + k) * (self.length // 2) + at
        return self.ops.load_words(self.name, index, 1, where)[0]

    def _loads(self, k: int, at) -> list:
        """What has to be read for the element of vector k at a column."""

        def load(name, index):
            where = (at < self.length) & (self.first + k < self.batch)
            return self.ops.load_real(name, index, where)

        if self.before == "gate":
            row = (self.first + k) * (2 * self.length)
            return [load(self.name, row + at), load(self.name, row + self.length + at)]
        element = load(self.name, (self.first + k) * self.length + at)
        return [element, load(self._scale, at)] if self.before == "norm" else [element]

    def _write(self, loaded, squares):
        ops = self.ops
        if self._together == 2:
            for pair, words in loaded:
                self._write_pair(pair, words)
            return squares
        for column, elements in loaded:
            squares = [ops.fma(x, x, total) for total, (x, _) in zip(squares, elements)]
            values = [self._element(*loads) for loads in elements]
            if self.narrow:
                half = ops.pack(values[0], ops.real(0), self.dtype)
                offset = column * self.scale + self._base
                ops.store_shared_half(offset, half, column < self._columns)
                continue
            if self.packed:
                words = [ops.pack(a, b, self.dtype) for a, b in zip(values[::2], values[1::2])]
            else:
                words = [ops.as_word(value) for value in values]
            offset = column * self.scale + self._base
            for i in range(self._times):
                ops.store_shared_words(offset + 4 * i, words, column < self._columns)
        return squares

    def _store(self, offset, columns: list, where):
        """Writes the words of neighbouring columns, each as often as it lies there."""
        words = [word for column in columns for word in column * self._times]
        each = 4 if len(words) % 4 == 0 else 2
        for i in range(0, len(words), each):
            self.ops.store_shared_words(offset + 4 * i, words[i : i + each], where)

    def _write_pair(self, pair, words):
        """Stages two columns of all vectors, of each of which `words` has both elements."""
        ops, offset = self.ops, pair * (2 * self.scale) + self._base
        inside = pair < self._units
        if self.narrow:
            self.ops.store_shared_words(offset, words, inside)
            return
        if not self.packed:
            [word] = words
            staged = [[ops.as_word(element)] for element in ops.pair(word, self.dtype)]
            self._store(offset, staged, inside)
            return
        both = list(zip(words[::2], words[1::2]))
        first = [(a & 0xFFFF) | (b << 16) for a, b in both]
        second = [(a >> 16) | (b & 0xFFFF0000) for a, b in both]
        if len(both) < 4:
            self._store(offset, [first, second], inside)
            return
        # Every other four lanes begin with the second column, so that eight lanes meet all banks.
        other = (ops.thread() & 4) == 4
        shift = ops.select(other, ops.integer(self.scale), ops.integer(0))
        ops.store_shared_words(offset + shift, ops.select(other, second, first), inside)
        offset = offset + self.scale - shift
        ops.store_shared_words(offset, ops.select(other, first, second), inside)

    def receive(self, ops: Lanes, name, first: int, scale, threads: int) -> list:
        """Fills shared memory with a vector as soon as the blocks that compute it have written it.

        It is one 16-bit vector of whole `PER_LOAD`s, published as elements from `first` on of the
        array `name`, which is all `BLANK` before. `scale` is the name of the norm's array. The
        block's barrier has to follow.

        Returns:
          What `finish` returns.
        """
        self.ops, normed = ops, self.before == "norm"
        firsts = [first, first + self.length] if self.before == "gate" else [first]
        rounds = range(-(-self._columns // (PER_LOAD * threads)))
        units = [ops.thread() + i * threads for i in rounds]
        whole = [unit < self.length // PER_LOAD for unit in units]
        scales = [ops.load_words(scale, *at) for at in self._at(units, 0, whole)] if normed else []

        def look(where):
            """The words of all units, of each part one after the other; zero where not `where`."""
            return [
                [ops.load_words(name, *at, how=FRESH) for at in self._at(units, part, where)]
                for part in firsts
            ]

        def missing(parts):
            return [_any(_has_blank(w) for words in unit for w in words) for unit in zip(*parts)]

        def look_again(parts):
            gone = missing(parts)
            return [
                [ops.select(where, new, old) for where, new, old in zip(gone, news, olds)]
                for news, olds in zip(look(gone), parts)
            ]

        parts = ops.loop(lambda parts: _any(missing(parts)), look_again, look(whole))
        squares = [ops.real(0)] if normed else []
        for i, unit in enumerate(units):
            rows = [self._numbers(words[i]) for words in (*parts, *([scales] if normed else []))]
            for x in rows[0]:
                squares = [ops.fma(x, x, total) for total in squares]
            staged = [[ops.as_word(self._element(*loads))] for loads in zip(*rows)]
            offset = unit * (PER_LOAD * self.scale) + self._base
            self._store(offset, staged, unit < self._columns // PER_LOAD)
        return squares

    @staticmethod
    def _at(units, first: int, where):
        """The operands of `load_words` for each unit of a vector that begins at element `first`."""
        return [(unit + first // PER_LOAD, PER_LOAD // 2, w) for unit, w in zip(units, where)]

    def _numbers(self, words):
        return [number for word in words for number in self.ops.pair(word, self.dtype)]

    def _element(self, first, *second):
        """The value that is staged, from the loads of an element."""
        if self.before == "norm":
            return first * second[0]
        return gate(self.ops, first, *second) if self.before == "gate" else first


class Share:
    """The elements of `count` vectors [batch, rows] that belong to a block's rows, as float32.

    Attributes:
      slots: 32-bit words of shared memory that they take.
    """

    def __init__(self, *, rows: int, blocks: int, count: int, batch: int, together: int = 1):
        """Rows are dealt to blocks one by one, or so many `together`."""
        self.rows, self.count, self.batch = rows, count, batch
        self.size = -(-rows // (blocks * together)) * together
        self.slots = self.size * count

    def begin(self, ops: Lanes, name, walk, *, first_vector, first_slot: int, threads: int):
        """Issues the first loads of the share of `walk`'s block."""
        self.ops, self.walk, self.name, self.threads = ops, walk, name, threads
        self.first_vector, self.first_slot = first_vector, first_slot
        self._head = self._read(ops.thread())

    def finish(self):
        """Fills shared memory; the block's barrier has to follow."""

        def copy(index):
            self._write(index, self._read(index))
            return index + self.threads

        self._write(self.ops.thread(), self._head)
        if self.size > self.threads:
            self.ops.loop(lambda index: index < self.size, copy, self.ops.thread() + self.threads)

    def _read(self, index) -> list:
        row = self.walk.share_row(index)
        vectors = [self.first_vector + k for k in range(self.count)]
        return [
            self.ops.load_real(
                self.name,
                vector * self.rows + row,
                (row < self.walk.end_row) & (vector < self.batch),
            )
            for vector in vectors
        ]

    def _write(self, index, values: list) -> None:
        for k, value in enumerate(values):
            slot = index + (self.first_slot + k * self.size)
            self.ops.store_shared(slot, value, index < self.size)

    def at(self, row, where) -> list:
        """The elements of all vectors at a row of the block; anything where not `where`."""
        index = self.ops.select(where, self.walk.share_index(row), self.ops.integer(0))
        return [
            self.ops.load_shared((index + (self.first_slot + k * self.size)) * 4, 1)[0]
            for k in range(self.count)
        ]
