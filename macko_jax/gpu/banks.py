"""Walking the rows of a matrix in the encoding "banked" (see `macko_jax.banked`).

As `strips.Walk`, but a lane's next group lies where the lanes before it that still have one leave
off: a ballot and two population counts for each group. In return every lane gathers from its own
bank of shared memory.
"""

from typing import Any, NamedTuple

from macko_jax.format.banked import LANES
from macko_jax.gpu import row_walk as strips


class Strip(NamedTuple):
    """What a lane still has to read of its row.

    Attributes:
      row: the row's index; beyond the block's share when there is no row left.
      step: index of the lane's next group.
      count: number of the lane's groups.
      cursor: memory index of the first group, of any lane, that is not read yet.
      place: the next column that an element may have, times the walk's scale.
    """

    row: Any
    step: Any
    count: Any
    cursor: Any
    place: Any


class Walk(strips.RowWalk):
    """Every lane's way through its columns of the block's rows."""

    def _open(self, row) -> Strip:
        ops = self.ops
        live = row < self.end_row
        safe = ops.select(live, self.index(row), ops.integer(0))
        begin = ops.load_integer("row_offsets" + self.suffix, safe)
        count = ops.load_integer("starts" + self.suffix, safe * LANES + self.part)
        count = ops.select(live, count, ops.integer(0))
        return Strip(row, ops.integer(0), count, begin, self.part * self.scale)

    def _advance(self, strip: Strip):
        after = strip._replace(step=strip.step + self.unroll)
        return after, after.step >= after.count

    def _read(self, strip: Strip):
        ops, out, cursor = self.ops, [], strip.cursor
        below = (ops.integer(1) << self.part) - 1
        for u in range(self.unroll):
            live = strip.step + u < strip.count
            votes = ops.ballot(live)
            index = cursor + ops.population(votes & below)
            cursor = cursor + ops.population(votes)
            code = strips.read_code(ops, self.matrix, "codes" + self.suffix, index, live)
            out.append((index, live, code, self._values(index, live)))
        return out, {"cursor": cursor}

    def _loaded(self, strip: Strip, data):
        del strip
        return data

    def _columns(self, code, place, live):
        """The columns of a group's elements times the walk's scale, and the place after it.

        The sums of deltas are at most 56.
        """
        ops, step = self.ops, LANES * self.scale
        prefixes = strips.read_prefixes(code, "banked")
        after = strips.pass_group(ops, prefixes, place, step)
        return strips.add_up(ops, prefixes, place, step), ops.select(live, after, place)
