"""The lane program that decodes tiles of a packed matrix for `matmul.py`.

A tile of a step, 128 rows of 64 columns, lies in shared memory as tensor cores read it: a row takes
128 bytes, whose eight pieces of 16 bytes are permuted by the row's number. Each of a cluster's two
blocks decodes 64 rows, with two threads a row, one for each half of the columns, whose steps come
in turn. It sends them to the other block by a bulk copy.

A thread goes through its row strip after strip, whatever lies where in the rows beside it, and
through a group that crosses the end of a step's columns once more for the next one. It copies what
it will need into a ring in shared memory, since a register cannot wait for a load while a lane
beside it goes on to another group.
"""

from macko_jax.format.layout import GROUP, PLANES, code_bytes
from macko_jax.gpu import row_walk as strips
from macko_jax.lanes import mosaic as lanes

ROWS, COLUMNS = 128, 64  # of a tile; its rows are 128 bytes of 16-bit values
STEPS = 6  # whose tiles shared memory has room for
PEERS = 2  # blocks of a cluster
THREADS = lanes.WARPGROUP * lanes.WARP  # of a block, that decode
LINES = ROWS // PEERS  # rows that a block decodes
PARTS = THREADS // LINES  # threads of a row
AHEAD = 4  # groups that a thread has in shared memory, the one it decodes and those after it
ROW_BYTES = 2 * COLUMNS
WARP_BYTES = lanes.WARP * ROW_BYTES

# Barriers of a tile's place: the step's tile is there, and it is free again.
THERE, FREE, BARRIERS = 0, STEPS, 2 * STEPS


def make_barriers(ops, multiplying: int) -> None:
    """For as many warpgroups of each block that multiply; the cluster's barrier has to follow."""
    first = ops.thread() == 0
    for i in range(STEPS):
        ops.make_barrier("barriers", ops.integer(THERE + i), LINES // lanes.WARP, first)
        ops.make_barrier("barriers", ops.integer(FREE + i), PEERS * multiplying, first)


def wait_for(ops, step) -> None:
    """Waits for the tile of a step, by its number among the block's."""
    rounds, slot = _slot(step)
    ops.wait("barriers", slot + THERE, rounds & 1)


def free(ops, step) -> None:
    """Tells both blocks that a warpgroup does not need the tile of a step any more."""
    _, slot = _slot(step)
    first = (ops.thread() & (THREADS - 1)) == 0
    for peer in range(PEERS):
        ops.arrive("barriers", slot + FREE, ops.integer(peer), first)


def _slot(step):
    rounds = step // STEPS
    return rounds, step - rounds * STEPS


def program(ops, plan) -> None:
    """Decodes the block's half of the cluster's tiles, as soon as their places are free."""
    matrix, steps, thread = plan.matrix, plan.steps, ops.thread()
    cluster, peer = ops.block() // PEERS, ops.block() & (PEERS - 1)
    part, line = thread // LINES, (thread & (LINES - 1)) + peer * LINES
    begin, end = plan.first(cluster), plan.first(cluster + 1)
    swizzle = (line & 7) << 4
    leader, everyone = (thread & (lanes.WARP - 1)) == 0, thread >= 0
    zeros = [ops.integer(0)] * 4

    def one_piece(begun):
        """What the cluster has of a tile."""
        tile = begun // steps
        low, high = begun - tile * steps, end - tile * steps
        high = ops.select(high < steps, high, ops.integer(steps))
        first = low + ((part - low) & (PARTS - 1))  # of the thread's steps
        reader = Reader(ops, matrix, (tile // plan.across) * ROWS + line)

        def one_step(carried):
            k, state = carried
            rounds, slot = _slot(tile * steps + k - begin)
            ops.wait("barriers", slot + FREE, (rounds & 1) ^ 1)
            row = line * ROW_BYTES + slot * (ROWS * ROW_BYTES)
            for piece in range(0, ROW_BYTES, 16):
                ops.store_shared_words(row + (swizzle ^ piece), zeros, everyone)
            state = reader.decode(state, plan.column(k), row, swizzle)
            ops.publish_shared()
            ops.warp_barrier()
            ops.arrive_expecting("barriers", slot + THERE, WARP_BYTES, leader)
            ops.send(row, WARP_BYTES, "barriers", slot + THERE, peer ^ 1, leader)
            return k + PARTS, state

        ops.loop(
            lambda carried: carried[0] < high, one_step, (first, reader.start(plan.column(first)))
        )
        ops.wait_for_copies(0)
        return tile * steps + high

    ops.loop(lambda begun: begun < end, one_piece, begin)


class Ring:
    """Where in shared memory every thread has the groups of its row that it decodes next.

    Of a group's code there is what has its unit, for every plane.

    Attributes:
      size: its bytes.
    """

    def __init__(self, matrix: strips.Matrix):
        self._groups = matrix.stored // GROUP
        self._code_bytes = self._groups * code_bytes(matrix.encoding)
        self.size = AHEAD * THREADS * 16
        self._planes = []  # each with the bytes of a copy, and where its copies begin
        for plane in PLANES[matrix.encoding]:
            # Four bytes have a unit, but a copy of four goes through the L1 cache, which is slower.
            copied = 16 if plane.size == 4 else 4
            self._planes.append((plane, copied, self.size))
            self.size += AHEAD * THREADS * copied

    @staticmethod
    def _at(ops, number):
        return (number & (AHEAD - 1)) * THREADS + ops.thread()

    def _byte(self, plane, group):
        return group * plane.size + plane.before * self._groups

    def put(self, ops, number, group, live) -> None:
        """Begins to copy the group at a memory index, as the `number`th one of the thread."""
        at, nothing = self._at(ops, number), ops.integer(0)
        ops.copy_ahead(
            "values", group, 16, "ring", at * 16, ops.select(live, ops.integer(16), nothing)
        )
        for plane, copied, begin in self._planes:
            index, there = self._byte(plane, group) // copied, ops.integer(copied)
            pieces, rest = divmod(self._code_bytes, copied)
            if rest:  # of the last piece
                there = ops.select(index < pieces, there, ops.integer(rest))
            ops.copy_ahead(
                "codes",
                index,
                copied,
                "ring",
                at * copied + begin,
                ops.select(live, there, nothing),
            )
        ops.end_copies()

    def take(self, ops, number, group):
        """Units of the code, and the values, of the `number`th group, whose index is given."""
        ops.wait_for_copies(AHEAD - 1)
        at, units = self._at(ops, number), []
        values = ops.load_copied("ring", at * 16, 4)
        for plane, copied, begin in self._planes:
            byte = self._byte(plane, group)
            [word] = ops.load_copied("ring", at * copied + (byte & (copied - 4)) + begin, 1)
            if plane.size < 4:
                word = word >> ((byte & 3) << 3) & (256**plane.size - 1)
            units.append(word)
        return units, values


class Reader:
    """A thread's way through a row.

    Its state is the column after the groups that are done; (strip, memory index) of the next group,
    and of the next one to copy, with the row's end as the index when there is none; and the number
    of groups that are done.
    """

    def __init__(self, ops, matrix: strips.Matrix, row):
        self.ops, self.matrix, self.ring = ops, matrix, Ring(matrix)
        row, self._begin, self._end = strips.open_row(ops, row, row < matrix.shape[0])
        self._starts = row * matrix.lanes

    def start(self, column):
        """The state from which all elements of columns from that one on are found."""
        ops, strip, size = self.ops, self.ops.integer(0), self.matrix.lanes // 2
        while size:  # the last strip that does not begin after the column
            there = ops.load_integer("starts", self._starts + (strip + size))
            strip = ops.select(there < column + 1, strip + size, strip)
            size //= 2
        place = ops.load_integer("starts", self._starts + strip)
        current = ahead = strip, self._begin + strip
        for number in range(AHEAD):
            ahead = self._copy(ops.integer(number), ahead)
        return place, current, ahead, ops.integer(0)

    def _copy(self, number, at):
        self.ring.put(self.ops, number, at[1], at[1] < self._end)
        return self._after(at)

    def _after(self, at):
        """The group after one in the order of columns."""
        ops, strips_of_row = self.ops, self.matrix.lanes
        strip, index = at
        over = index + strips_of_row >= self._end
        strip = ops.select(over, strip + 1, strip)
        beyond = ops.select(strip < strips_of_row, self._begin + strip, self._end)
        return strip, ops.select(over, beyond, index + strips_of_row)

    def decode(self, state, column, row, swizzle):
        """Stores the elements of `COLUMNS` columns from one on in the tile's row at an offset."""
        ops, encoding, end = self.ops, self.matrix.encoding, column + COLUMNS

        def visit(carried):
            _, (place, current, ahead, number) = carried
            code, values = self.ring.take(ops, number, current[1])
            prefixes = strips.read_prefixes(code, encoding)
            offsets = strips.add_up(ops, prefixes, (place - column) * 2, 2)
            for offset, half in zip(offsets, strips.halves(values)):
                ops.store_shared_half((offset ^ swizzle) | row, half, offset < ROW_BYTES)
            after = strips.pass_group(ops, prefixes, place, 1)
            done = after < end + 1

            def go_on():
                return after, self._after(current), self._copy(number, ahead), number + 1

            state = ops.branch(done, go_on, (place, current, ahead, number))
            return done & self._has(state, end), state

        return ops.loop(lambda carried: carried[0], visit, (self._has(state, end), state))[1]

    def _has(self, state, end):
        """Whether there is a next group, and it begins before a column."""
        place, (_, index), _, _ = state
        return (index < self._end) & (place < end)
