"""Walking the rows of a matrix in the strip layout of `format.MackoMatrix`.

A block owns a share of the rows and deals them to its warps; `lanes` lanes work on a row, so a warp
works on 32 / lanes rows at a time. Every lane owns a contiguous strip of its row whose first column
is stored, which spares a prefix sum over the lanes. It reads its strip in steps of `unroll` groups
of eight elements; the loads of a step are issued before the arithmetic of the step before it, also
across rows.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from macko_jax.format import two_bank as choice
from macko_jax.format.codes import PLANES, prefix_bytes
from macko_jax.format.layout import GROUP, WORD, start_dtype
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import STREAM, prefetch_range

ENCODINGS = ("delta4", "delta5", "two_bank")  # that the walk reads
SLACK = 2 * WORD  # columns past the last one that idle lanes may name; their values are zero


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What a program knows of a matrix when it is compiled; see `format.MackoMatrix`."""

    shape: tuple[int, int]
    encoding: str
    lanes: int
    stored: int
    dtype: Any


class Strip(NamedTuple):
    """What a lane still has to read of its row.

    Attributes:
      row: the row's index; beyond the block's share when there is no row left.
      group: memory index of the lane's next group.
      end: memory index after the row's last group.
      place: the next column times the walk's scale.
    """

    row: Any
    group: Any
    end: Any
    place: Any


class Group(NamedTuple):
    """One group of a strip.

    Attributes:
      row: of the strip.
      index: memory index of the group.
      live: whether the lane has such a group; if not, its values are zero.
      values: the words of its eight values, zero if they are not read.
      columns: its eight columns times the walk's scale.
    """

    row: Any
    index: Any
    live: Any
    values: Any
    columns: Any


def read_code(ops, matrix: Matrix, codes: str, group, live) -> list:
    """Issues the loads of a group's code: its units in all planes."""
    units, groups = [], matrix.stored // GROUP
    for plane in PLANES[matrix.encoding]:
        if plane.size == 4:  # lies first
            units += ops.load_words(codes, group, 1, live, how=STREAM)
        else:
            at = group * plane.size + plane.before * groups
            units.append(ops.load_small(codes, at, plane.size, live))
    return units


def read_prefixes(code: list, encoding: str):
    """See `codes.prefix_bytes`; of a group's code as `read_code` gives it."""
    return prefix_bytes(tuple(code), encoding)


def add_up(ops, prefixes, base, step: int, unit: int | None = None) -> list:
    """Places of a group's elements, base + step * (their number) + unit * (their bytes).

    Args:
      prefixes: bytes of elements 0, 2, 4, 6 and of 1, 3, 5, 7, as from `layout.prefix_bytes`.
      unit: `step` by default, so that bytes and places both count columns.
    """
    return [
        ops.add_byte(prefix, j, unit or step, base) + (2 * j + half) * step
        for j in range(GROUP // 2)
        for half, prefix in enumerate(prefixes)
    ]


def pass_group(ops, prefixes, base, step: int):
    """The place after a group."""
    return ops.add_byte(prefixes[1], GROUP // 2 - 1, step, base) + GROUP * step


class RowWalk:
    """Every lane's way through the strips of its block's rows.

    Rows are counted in the order in which blocks share them out: that of the matrix or, where
    they are `paired`, one row of its first half and one of its second half in turn, so that a block
    has both of a pair or none; `index` gives a row's index in the matrix.

    Attributes:
      part: which strip of its row the lane owns.
      first_row: of the block's share, where rows are not spread.
      end_row: row after the block's share; after all, where rows are spread.
      busy: whether the lane works on rows at all.
      buffer: which of the rows that the block works on at a time is the lane's, if it is busy.
    """

    def __init__(
        self,
        ops,
        matrix: Matrix,
        *,
        block,
        blocks: int,
        warps: int,
        unroll: int,
        scale: int = 1,
        read_values: bool = True,
        rows_per_warp: int | None = None,
        together: int = 1,
        paired: bool = False,
        spread: bool = False,
        chooses: bool = False,
        suffix: str = "",
    ):
        """`block` of `blocks` is the lane's share of the rows; columns come multiplied by `scale`.

        The first `warps` of the block work. A warp works on `rows_per_warp` rows at a time, by
        default as many as it has lanes for. It visits `together` groups of a row at a time: where
        few warps fit on a multiprocessor, what they do for one group has to hide the latencies of
        another. For `paired` see above; `suffix` ends the names of the matrix's arrays. Where rows
        are `spread`, shares are not contiguous: all blocks are at work in one region of memory.
        Where a lane `chooses`, columns lead to one of two copies of x, see `choice.py`.
        """
        self.ops, self.matrix, self.unroll, self.scale = ops, matrix, unroll, scale
        self.suffix, self.read_copies = suffix, choice.reader(ops) if chooses else None
        self.together = together
        words = GROUP * jnp.dtype(matrix.dtype).itemsize // 4 if read_values else 0
        self.loads = [min(words, 4)] * (-(-words // 4))  # words of each load of a group's values
        rows_per_warp = rows_per_warp or WARP // matrix.lanes
        self._halves = 2 if paired else 1
        share, rest = divmod(matrix.shape[0] // self._halves, blocks)
        first = block * share + ops.select(block < rest, block, ops.integer(rest))
        end = first + share + ops.select(block < rest, ops.integer(1), ops.integer(0))
        self.first_row, self.end_row = first * self._halves, end * self._halves
        thread = ops.thread()
        lane = thread & (WARP - 1)
        self.part = lane & (matrix.lanes - 1)
        slot = lane >> (matrix.lanes.bit_length() - 1)
        self.busy = (slot < rows_per_warp) & (thread < warps * WARP)
        self.buffer = (thread >> 5) * rows_per_warp + slot
        start, self._stride = self.first_row + self.buffer, warps * rows_per_warp
        self._dealt = (block, blocks, rows_per_warp) if spread else None
        if spread:  # over blocks first, and then over their warps
            self.end_row = ops.integer(matrix.shape[0])
            start = ((thread >> 5) * blocks + block) * rows_per_warp + slot
            self._stride *= blocks
        self._first = ops.select(self.busy, start, self.end_row)

    def _values(self, group, live) -> list:
        """Issues the loads of the words of a group's values."""
        return [
            word
            for i, words in enumerate(self.loads)
            for word in self.ops.load_words(
                "values" + self.suffix, group * len(self.loads) + i, words, live, how=STREAM
            )
        ]

    def start(self):
        """Issues the first loads; what `run` begins with."""
        return self.read(self.open())

    def index(self, row):
        """In the matrix, of a row in the order in which blocks share them out."""
        if self._halves == 1:
            return row
        return (row >> 1) + (row & 1) * (self.matrix.shape[0] // 2)

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
        start_bytes = start_dtype(self.matrix.shape[1]).itemsize
        rows = (self.end_row - self.first_row) // self._halves
        for half in range(self._halves):
            first = self.index(self.first_row + half)
            for name, size, each in (
                ("row_offsets", 4, 1),
                ("starts", start_bytes, self.matrix.lanes),
            ):
                name = name + self.suffix
                prefetch_range(self.ops, name, first * each, (first + rows) * each, size)

    def open(self):
        """Issues the loads that say where the first rows lie."""
        return self._open(self._first), self._open(self._first + self._stride)

    def read(self, opened):
        """Issues the first loads of what `open` found; what `run` begins with."""
        strip, upcoming = opened
        return strip, self._read(strip), upcoming

    def _open(self, row) -> Strip:
        """Issues the loads that say where a row lies, if the lane has one."""
        ops, inside = self.ops, row < self.end_row
        safe = ops.select(inside, self.index(row), ops.integer(0))
        begin = ops.load_integer("row_offsets" + self.suffix, safe)
        end = ops.load_integer("row_offsets" + self.suffix, safe + 1)
        end = ops.select(inside, end, begin)
        start = ops.load_integer("starts" + self.suffix, safe * self.matrix.lanes + self.part)
        return Strip(row, begin + self.part, end, start * self.scale)

    def _read(self, strip: Strip):
        """Issues the loads of a step's groups: the code and the values of each."""
        name = "codes" + self.suffix
        return [
            (read_code(self.ops, self.matrix, name, group, live), self._values(group, live))
            for group, live in self._groups(strip)
        ]

    def _groups(self, strip: Strip):
        """Memory index of each group of a step, and whether the lane has it."""
        groups = [strip.group + u * self.matrix.lanes for u in range(self.unroll)]
        return [(group, group < strip.end) for group in groups]

    def _columns(self, code, place):
        """The columns of a group's elements times `scale`, and the place after the group."""
        ops, scale = self.ops, self.scale
        end = self.matrix.shape[1] * scale
        prefixes = read_prefixes(code, self.matrix.encoding)
        # A lane whose row is done must not run away while its warp goes on with longer rows.
        after = pass_group(ops, prefixes, place, scale)
        after = ops.select(after < end, after, ops.integer(end))
        if self.read_copies:
            copies = self.read_copies(*prefixes, *code)
            return add_up(ops, copies, place, scale, unit=scale // choice.WORDS), after
        return add_up(ops, prefixes, place, scale), after

    def run(self, started, begin_row, visit, end_row) -> None:
        """Goes through all rows of the block.

        Args:
          started: from `start`.
          begin_row: gives the state before a row.
          visit: of (state, list of at most `together` Groups), gives the state after them.
          end_row: called with the row and the state after it; all lanes of a row are there.
        """
        ops = self.ops
        strip, data, upcoming = started

        def step(carried):
            strip, upcoming, data, state = carried
            after = strip._replace(group=strip.group + self.unroll * self.matrix.lanes)
            done = ops.all(after.group >= after.end)
            next_data = self._read(ops.select(done, upcoming, after))
            place = strip.place
            loaded = [(*group, *some) for group, some in zip(self._groups(strip), data)]
            for first in range(0, self.unroll, self.together):

                def visit_some(
                    some=loaded[first : first + self.together], place=place, state=state
                ):
                    groups = []
                    for index, live, code, values in some:
                        columns, place = self._columns(code, place)
                        groups.append(Group(strip.row, index, live, values, columns))
                    return place, visit(state, groups)

                # Rows rarely fill the last steps.
                place, state = (
                    visit_some()
                    if first == 0
                    else ops.branch(ops.any(loaded[first][1]), visit_some, (place, state))
                )

            def next_row():
                end_row(strip.row, state)
                return upcoming, self._open(upcoming.row + self._stride), begin_row()

            strip, upcoming, state = ops.branch(
                done, next_row, (after._replace(place=place), upcoming, state)
            )
            return strip, upcoming, next_data, state

        # One step a turn: with two, no loaded register is copied, but the longer loop is slower.
        ops.loop(
            lambda carried: ops.any(carried[0].row < self.end_row),
            step,
            (strip, upcoming, data, begin_row()),
        )


def halves(words) -> list:
    """The 16-bit values of words, each in the lower half of a word."""
    return [half for word in words for half in (word, word >> 16)]


def unpack(ops, words, dtype) -> list:
    """The eight values of a group as float32."""
    unpack_word = {
        1: lambda word: ops.four(word, dtype),
        2: lambda word: ops.pair(word, dtype),
        4: lambda word: [ops.as_real(word)],
    }[jnp.dtype(dtype).itemsize]
    return [real for word in words for real in unpack_word(word)]


def convert(ops, words, dtype, kind) -> list:
    """The words of a group's eight values as those of a type that represents them exactly."""
    if jnp.dtype(dtype) == jnp.dtype(kind):
        return words
    reals = unpack(ops, words, dtype)
    if jnp.dtype(kind).itemsize == 4:
        return [ops.as_word(real) for real in reals]
    return [ops.pack(low, high, kind) for low, high in zip(reals[::2], reals[1::2])]
