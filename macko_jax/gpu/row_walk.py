"""Walking the rows of a matrix in lane chunks, the layout of `format.MackoMatrix`.

A block owns a share of the rows and deals them to its warps; `lanes` lanes work on a row, so a warp
works on 32 / lanes rows at a time. Every lane owns a contiguous chunk of its row whose first column
is stored, which spares a prefix sum over the lanes. It reads its chunk `ahead` groups of eight
elements at a time: the loads of so many are issued before the arithmetic of those before them, also
across rows.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from macko_jax.format import two_bank
from macko_jax.format.codes import PLANES, prefix_bytes
from macko_jax.format.layout import GROUP, WORD, Layout, start_dtype
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import STREAM, Lanes, prefetch_range

ENCODINGS = ("delta4", "delta5", "two_bank")  # those that the walk reads
SLACK = 2 * WORD  # columns past the last one that idle lanes may name; their values are zero


class Chunk(NamedTuple):
    """What a lane still has to read of its row.

    Attributes:
      row: the row's index; beyond the block's share when there is no row left.
      group: memory index of the lane's next group.
      end: memory index after the row's last group.
      column: the next column times the walk's scale.
    """

    row: Any
    group: Any
    end: Any
    column: Any


class Group(NamedTuple):
    """One group of a lane's chunk.

    Attributes:
      row: that of the chunk.
      index: memory index of the group.
      live: whether the lane has such a group; if not, its values are zero.
      values: the words of its eight values, none if they are not read.
      columns: its eight columns times the walk's scale.
    """

    row: Any
    index: Any
    live: Any
    values: Any
    columns: Any


class RowWalk:
    """Every lane's way through its chunks of the block's rows.

    Rows are counted in the order in which blocks share them out: that of the matrix or, where
    they are `paired`, one row of its first half and one of its second half in turn, so that a block
    has both of a pair or none; `index` gives a row's index in the matrix.

    Attributes:
      lane: which of the row's chunks the lane owns.
      first_row: the first row of the block's share, where rows are not spread.
      end_row: the row after the block's share; after all rows, where they are spread.
      busy: whether the lane works on rows at all.
      buffer: which of the rows that the block works on at a time is the lane's, if it is busy.
    """

    def __init__(
        self,
        ops: Lanes,
        layout: Layout,
        dtype,
        *,
        block,
        blocks: int,
        warps: int,
        ahead: int,
        scale: int = 1,
        read_values: bool = True,
        rows_per_warp: int | None = None,
        together: int = 1,
        paired: bool = False,
        spread: bool = False,
        two_copies: bool = False,
        suffix: str = "",
    ):
        """The walk of the lanes of `block` of `blocks`.

        Args:
          layout, dtype: those of the matrix and of its values.
          warps: the first so many of the block work.
          ahead: the prefetch distance in groups.
          scale: what columns come multiplied by.
          rows_per_warp: rows that a warp works on at a time, by default as many as it has lanes
            for.
          together: groups of a row that a lane visits at a time: where few warps fit on an SM, what
            they do for one group has to hide the latencies of another.
          paired: see above.
          spread: whether shares are not contiguous: all blocks are at work in one region of memory.
          two_copies: whether columns lead to one of two copies of x, see `format.two_bank`.
          suffix: what the names of the matrix's arrays end with.
        """
        self.ops, self.layout, self.ahead, self.scale = ops, layout, ahead, scale
        self.suffix, self.read_copies = suffix, two_bank.reader(ops) if two_copies else None
        self.together = together
        words = GROUP * jnp.dtype(dtype).itemsize // 4 if read_values else 0
        self.loads = [min(words, 4)] * (-(-words // 4))  # words of each load of a group's values
        rows_per_warp = rows_per_warp or WARP // layout.lanes
        self._halves = 2 if paired else 1
        share, rest = divmod(layout.shape[0] // self._halves, blocks)
        first = block * share + ops.select(block < rest, block, ops.integer(rest))
        end = first + share + ops.select(block < rest, ops.integer(1), ops.integer(0))
        self.first_row, self.end_row = first * self._halves, end * self._halves
        thread = ops.thread()
        lane = thread & (WARP - 1)
        self.lane = lane & (layout.lanes - 1)
        slot = lane >> (layout.lanes.bit_length() - 1)
        self.busy = (slot < rows_per_warp) & (thread < warps * WARP)
        self.buffer = (thread >> 5) * rows_per_warp + slot
        start, self._stride = self.first_row + self.buffer, warps * rows_per_warp
        self._dealt = (block, blocks, rows_per_warp) if spread else None
        if spread:  # over blocks first, and then over their warps
            self.end_row = ops.integer(layout.shape[0])
            start = ((thread >> 5) * blocks + block) * rows_per_warp + slot
            self._stride *= blocks
        self._first = ops.select(self.busy, start, self.end_row)

    def index(self, row):
        """The index in the matrix of a row in the order in which blocks share them out."""
        if self._halves == 1:
            return row
        return (row >> 1) + (row & 1) * (self.layout.shape[0] // 2)

    def share_row(self, index):
        """The row that is number `index` of the block's share."""
        if self._dealt is None:
            return self.first_row + index
        block, blocks, together = self._dealt
        return ((index // together) * blocks + block) * together + (index & (together - 1))

    def share_index(self, row):
        """The inverse of `share_row`."""
        if self._dealt is None:
            return row - self.first_row
        _, blocks, together = self._dealt
        return row // (blocks * together) * together + (row & (together - 1))

    def prefetch(self) -> None:
        """Asks for what `open` reads of the block's rows: their offsets and starts."""
        start_bytes = start_dtype(self.layout.shape[1]).itemsize
        rows = (self.end_row - self.first_row) // self._halves
        for half in range(self._halves):
            first = self.index(self.first_row + half)
            for name, size, each in (
                ("row_offsets", 4, 1),
                ("starts", start_bytes, self.layout.lanes),
            ):
                name = name + self.suffix
                prefetch_range(self.ops, name, first * each, (first + rows) * each, size)

    def start(self):
        """Issues the first loads; what `run` begins with."""
        return self.read(self.open())

    def open(self):
        """Issues the loads that tell where the first rows lie."""
        return self._open(self._first), self._open(self._first + self._stride)

    def read(self, opened):
        """Issues the first loads of what `open` found; what `run` begins with."""
        chunk, upcoming = opened
        return chunk, self._read(chunk), upcoming

    def run(self, started, begin_row, visit, end_row) -> None:
        """Goes through all rows of the block.

        Args:
          started: what `start` gave.
          begin_row: gives the state before a row.
          visit: takes the state and a list of at most `together` Groups; gives the state after
            them.
          end_row: is called with the row and the state after it; all lanes of a row are there.
        """
        ops = self.ops
        chunk, data, upcoming = started

        def iterate(carried):
            chunk, upcoming, data, state = carried
            after = chunk._replace(group=chunk.group + self.ahead * self.layout.lanes)
            done = ops.all(after.group >= after.end)
            next_data = self._read(ops.select(done, upcoming, after))
            column = chunk.column
            loaded = [(*group, *some) for group, some in zip(self._groups(chunk), data)]
            for first in range(0, self.ahead, self.together):

                def visit_some(
                    some=loaded[first : first + self.together], column=column, state=state
                ):
                    groups = []
                    for index, live, code, values in some:
                        columns, column = self._columns(code, column)
                        groups.append(Group(chunk.row, index, live, values, columns))
                    return column, visit(state, groups)

                # Rows rarely fill the last of the groups that are read at a time.
                column, state = (
                    visit_some()
                    if first == 0
                    else ops.branch(ops.any(loaded[first][1]), visit_some, (column, state))
                )

            def next_row():
                end_row(chunk.row, state)
                return upcoming, self._open(upcoming.row + self._stride), begin_row()

            chunk_after, upcoming, state = ops.branch(
                done, next_row, (after._replace(column=column), upcoming, state)
            )
            return chunk_after, upcoming, next_data, state

        # Not unrolled: by two, no loaded register is copied, but the longer loop is slower.
        ops.loop(
            lambda carried: ops.any(carried[0].row < self.end_row),
            iterate,
            (chunk, upcoming, data, begin_row()),
        )

    def _open(self, row) -> Chunk:
        """Issues the loads that tell where a row lies, if the lane has one."""
        ops, inside = self.ops, row < self.end_row
        safe = ops.select(inside, self.index(row), ops.integer(0))
        begin = ops.load_integer("row_offsets" + self.suffix, safe)
        end = ops.load_integer("row_offsets" + self.suffix, safe + 1)
        end = ops.select(inside, end, begin)
        start = ops.load_integer("starts" + self.suffix, safe * self.layout.lanes + self.lane)
        return Chunk(row, begin + self.lane, end, start * self.scale)

    def _read(self, chunk: Chunk) -> list:
        """Issues the loads of the next `ahead` groups: the code and the values of each."""
        return [
            (self._code(group, live), self._values(group, live))
            for group, live in self._groups(chunk)
        ]

    def _groups(self, chunk: Chunk) -> list:
        """Memory index of each of the next groups, and whether the lane has it."""
        groups = [chunk.group + u * self.layout.lanes for u in range(self.ahead)]
        return [(group, group < chunk.end) for group in groups]

    def _code(self, group, live) -> list:
        """Issues the loads of a group's code: its units in all planes."""
        name, units = "codes" + self.suffix, []
        for plane in PLANES[self.layout.encoding]:
            if plane.size == 4:  # lies first
                units += self.ops.load_words(name, group, 1, live, how=STREAM)
            else:
                at = group * plane.size + plane.before * (self.layout.stored // GROUP)
                units.append(self.ops.load_small(name, at, plane.size, live))
        return units

    def _values(self, group, live) -> list:
        """Issues the loads of the words of a group's values."""
        return [
            word
            for i, words in enumerate(self.loads)
            for word in self.ops.load_words(
                "values" + self.suffix, group * len(self.loads) + i, words, live, how=STREAM
            )
        ]

    def _columns(self, code, column):
        """The columns of a group's elements, and the column after the group, all times `scale`."""
        ops, scale, encoding = self.ops, self.scale, self.layout.encoding
        end = self.layout.shape[1] * scale
        prefixes = prefix_bytes(tuple(code), encoding)
        after = ops.add_byte(prefixes[1], GROUP // 2 - 1, scale, column) + GROUP * scale
        # A lane whose row is done must not run away while its warp goes on with longer rows.
        after = ops.select(after < end, after, ops.integer(end))
        unit = scale
        if self.read_copies:  # bytes count words of shared memory then
            prefixes, unit = self.read_copies(*prefixes, *code), scale // two_bank.WORDS
        columns = [
            ops.add_byte(prefix, j, unit, column) + (2 * j + half) * scale
            for j in range(GROUP // 2)
            for half, prefix in enumerate(prefixes)
        ]
        return columns, after


def halves(words) -> list:
    """The 16-bit values of words, each in the lower half of a word."""
    return [half for word in words for half in (word, word >> 16)]


def unpack(ops: Lanes, words, dtype) -> list:
    """The eight values of a group as float32."""
    unpack_word = {
        1: lambda word: ops.four(word, dtype),
        2: lambda word: ops.pair(word, dtype),
        4: lambda word: [ops.as_real(word)],
    }[jnp.dtype(dtype).itemsize]
    return [real for word in words for real in unpack_word(word)]


def convert(ops: Lanes, words, dtype, kind) -> list:
    """The words of a group's eight values as those of a type that represents them exactly."""
    if jnp.dtype(dtype) == jnp.dtype(kind):
        return words
    reals = unpack(ops, words, dtype)
    if jnp.dtype(kind).itemsize == 4:
        return [ops.as_word(real) for real in reals]
    return [ops.pack(low, high, kind) for low, high in zip(reals[::2], reals[1::2])]
