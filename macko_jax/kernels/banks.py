"""Walking the rows of a matrix in the encoding "banked" (see `macko_jax.banked`).

As `strips.Walk`, but a lane's next group lies where the lanes before it that still have one leave
off: a ballot and two population counts for each group. In return every lane gathers from its own
bank of shared memory.
"""
from typing import Any, NamedTuple

from macko_jax.banked import LANES
from macko_jax.kernels import strips
from macko_jax.layout import GROUP


class Strip(NamedTuple):
    """What a lane still has to read of its row.

    Attributes:
      row: the row's index; beyond the block's share when there is no row left.
      step: index of the lane's next group.
      count: number of the lane's groups.
      cursor: memory index of the first group, of any lane, that is not read yet.
      place: the next column that an element may have.
    """
    row: Any
    step: Any
    count: Any
    cursor: Any
    place: Any


class Walk(strips.RowShare):
    """Every lane's way through its columns of the block's rows; the interface of `strips.Walk`."""

    def start(self):
        """Issues the first loads; what `run` begins with."""
        strip = self._open(self._first)
        data, cursor = self._read(strip)
        return strip._replace(cursor=cursor), data, self._open(self._first + self._stride)

    def run(self, started, begin_row, each_group, end_row) -> None:
        """Goes through all rows, as `strips.Walk.run`."""
        ops = self.ops

        def step(carried):
            strip, upcoming, data, state = carried
            after = strip._replace(step=strip.step + self.unroll)
            done = ops.all(after.step >= strip.count)
            next_data, cursor = self._read(ops.select(done, upcoming, after))
            place = strip.place
            for u, (live, index, code, values) in enumerate(data):
                def group(live=live, index=index, code=code, values=values, place=place,
                          state=state):
                    columns, place = self._columns(code, place, live)
                    return place, each_group(
                        state, strips.Group(strip.row, index, live, values, columns))

                place, state = group() if u == 0 else ops.branch(
                    ops.any(live), group, (place, state))

            def next_row():
                end_row(strip.row, state)
                return upcoming, self._open(upcoming.row + self._stride), begin_row()

            strip, upcoming, state = ops.branch(
                done, next_row, (after._replace(place=place), upcoming, state))
            return strip._replace(cursor=cursor), upcoming, next_data, state

        strip, data, upcoming = started
        # Two steps a turn: their loads land in registers of their own, so that none is copied, and
        # the end of a row does not wait for the data of the next.
        ops.loop(lambda carried: ops.any(carried[0].row < self.end_row), lambda c: step(step(c)),
                 (strip, upcoming, data, begin_row()))

    def _open(self, row) -> Strip:
        ops = self.ops
        live = row < self.end_row
        safe = ops.select(live, row, ops.integer(0))
        begin = ops.load_integer("row_offsets", safe)
        count = ops.load_integer("starts", safe * LANES + self.part)
        return Strip(row, ops.integer(0), ops.select(live, count, ops.integer(0)), begin, self.part)

    def _read(self, strip: Strip):
        """Issues the loads of the next steps: (live, index, code, words of the values) of each."""
        ops, out, cursor = self.ops, [], strip.cursor
        below = (ops.integer(1) << self.part) - 1
        high_bytes = 2 * (self.matrix.stored // GROUP)
        for u in range(self.unroll):
            live = strip.step + u < strip.count
            votes = ops.ballot(live)
            index = cursor + ops.population(votes & below)
            cursor = cursor + ops.population(votes)
            low = ops.load_small("codes", index * 2, 2, live)
            high = ops.load_small("codes", index + high_bytes, 1, live)
            out.append((live, index, low | (high << 16), self._values(index, live)))
        return out, cursor

    def _columns(self, code, place, live):
        """The columns of a group's elements times the walk's scale, and the place after it.

        The 3-bit deltas are spread to bytes; then as in `strips.Delta4`, with sums of at most 56.
        """
        ops, scale = self.ops, self.scale
        spread = (code & 0xFFF) | ((code << 4) & 0x0FFF0000)
        spread = (spread & 0x003F003F) | ((spread << 2) & 0x3F003F00)
        low, high = spread & 0x07070707, (spread >> 3) & 0x07070707
        odd = (low + high) * 0x01010101
        even = odd - high
        base = place * scale
        columns = [
            ops.add_byte(prefix, j, LANES * scale, base) + (2 * j + half) * LANES * scale
            for j in range(GROUP // 2) for half, prefix in enumerate((even, odd))]
        after = place + ((odd >> 24) + GROUP) * LANES
        return columns, ops.select(live, after, place)
