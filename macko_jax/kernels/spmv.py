"""The lane program of the matrix-vector product, for the strip layout of `format.MackoMatrix`.

One block runs on every multiprocessor and keeps x in shared memory as float32. The block owns a
contiguous share of the rows and deals them to its warps; `lanes` lanes work on a row, so a warp
works on 32 / lanes rows at a time. Every lane owns a contiguous strip of its row whose first
column is stored, which spares a prefix sum over the lanes. `unroll` groups of eight elements are in
flight for every lane: once a group is multiplied, its registers take the load of the group `unroll`
further on, also across rows.

The budget: at 4.3 TB/s an H200's multiprocessor gets about 17 bytes a clock, 6.6 elements of 2.5
bytes, and can issue 128 lane instructions and 32 shared words in that clock. The gather of x from
random banks takes about 3.6 turns for 32 lanes, so shared memory is nearly as tight as DRAM.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from macko_jax.kernels import config, lanes
from macko_jax.kernels.lanes import WARP
from macko_jax.layout import GROUP, WORD, words_per_row


X_AHEAD = 8  # elements of x per thread and vector that are in flight while x is staged


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about one product that is known when it is compiled.

    Attributes:
      shape, encoding, lanes, stored, dtype: of the matrix.
      batch: number of vectors.
      settings: how the work is laid out on the device.
    """
    shape: tuple[int, int]
    encoding: str
    lanes: int
    stored: int
    dtype: Any
    batch: int
    settings: config.Settings

    @property
    def passes(self) -> int:
        """How often the matrix is read: each time for `settings.vectors` vectors."""
        return -(-self.batch // self.settings.vectors)

    @property
    def slack(self) -> int:
        """Columns past the end that idle lanes may ask x for; their weight is zero."""
        return 2 * WORD

    @property
    def shared_slots(self) -> int:
        if not self.settings.stage_x:
            return 1
        return (self.shape[1] + self.slack) * self.settings.vectors


class Strip(NamedTuple):
    """What a lane still has to read of its row.

    Attributes:
      row: the row's index; beyond the block's share when there is no row left.
      group: memory index of the lane's next group.
      end: memory index after the row's last group.
      place: the decoder's position in the row.
    """
    row: Any
    group: Any
    end: Any
    place: Any


class Delta4:
    """Positions from eight 4-bit deltas in a word; the place is the next column."""

    reads_codes_by_group = True

    def __init__(self, ops, plan):
        self.ops, self.cols = ops, plan.shape[1]

    def open(self, row, start):
        del row
        return start

    def columns(self, code, place, scale):
        """Columns of a group's elements times `scale`, and the place after them.

        Bytes of `even` and `odd` hold the sums of the deltas up to elements 0, 2, 4, 6 and
        1, 3, 5, 7: the pairwise sums are at most 30, their prefix sums at most 120, so one
        multiplication by 0x01010101 adds them up without a carry between bytes.
        """
        low, high = code & 0x0F0F0F0F, (code >> 4) & 0x0F0F0F0F
        odd = (low + high) * 0x01010101
        even = odd - high
        columns = []
        for j in range(GROUP // 2):
            for half, prefix in enumerate((even, odd)):
                columns.append(
                    self.ops.add_byte(prefix, j, scale, place * scale) + (2 * j + half) * scale)
        # A lane whose row is done must not run away while its warp goes on with longer rows.
        after = place + (odd >> 24) + GROUP
        return columns, self.ops.select(after < self.cols, after, self.ops.integer(self.cols))


class Bits(NamedTuple):
    """A place in a row's bitmask.

    Attributes:
      word: index of the current word in the codes.
      column: column of that word's lowest bit.
      current: the word, without the bits already used.
      ahead: the word after it.
      end: index after the row's last word.
    """
    word: Any
    column: Any
    current: Any
    ahead: Any
    end: Any


class Bitmask:
    """Positions from a bitmask of the row, one bit after the other."""

    reads_codes_by_group = False

    def __init__(self, ops, plan):
        self.ops, self.words = ops, words_per_row(plan.shape[1])

    def open(self, row, start):
        word, bit = row * self.words + (start >> 5), start & (WORD - 1)
        end = row * self.words + self.words
        current = (self._load(word, end) >> bit) << bit
        return Bits(word, (start >> 5) * WORD, current, self._load(word + 1, end), end)

    def _load(self, word, end):
        # Past the row every bit is set, so that the search of an idle lane ends within the slack.
        return self.ops.load_words("codes", word, 1, word < end, fill=0xFFFFFFFF)[0]

    def _advance(self, place):
        inside = place.word < place.end
        step = self.ops.select(inside, self.ops.integer(1), self.ops.integer(0))
        return Bits(place.word + step, place.column + step * WORD, place.ahead,
                    self._load(place.word + 2, place.end), place.end)

    def columns(self, code, place, scale):
        del code
        ops, columns = self.ops, []
        for _ in range(GROUP):
            place = ops.loop(lambda p: p.current == 0, self._advance, place)
            columns.append((place.column + ops.trailing_zeros(place.current)) * scale)
            place = place._replace(current=place.current & (place.current - 1))
        return columns, place


DECODERS = {"delta4": Delta4, "bitmask": Bitmask}


def program(ops, plan: Plan) -> None:
    """Computes y = x A^T on the arrays values, codes, row_offsets, starts, x [batch, cols], y.

    Sums are in float32 in a fixed order, so that results are equal from run to run.
    """
    rows, cols = plan.shape
    settings, vectors = plan.settings, plan.settings.vectors
    decoder = DECODERS[plan.encoding](ops, plan)
    words_per_group = GROUP * jnp.dtype(plan.dtype).itemsize // 4
    x_scale = 4 * vectors if settings.stage_x else 1  # columns as byte offsets in shared memory
    threads = settings.warps * WARP

    thread = ops.thread()
    lane = thread & (WARP - 1)
    part = lane & (plan.lanes - 1)  # which strip of the row
    task = (thread >> 5) * (WARP // plan.lanes) + (lane >> (plan.lanes.bit_length() - 1))
    stride = settings.warps * (WARP // plan.lanes)
    first_vector, block = ops.integer(0), ops.block()
    for i in range(1, plan.passes):
        later = block >= settings.blocks
        block = ops.select(later, block - settings.blocks, block)
        first_vector = ops.select(later, ops.integer(i * vectors), first_vector)
    share, rest = divmod(rows, settings.blocks)
    first_row = block * share + ops.select(block < rest, block, ops.integer(rest))
    end_row = first_row + share + ops.select(block < rest, ops.integer(1), ops.integer(0))

    def open_row(row):
        live = row < end_row
        safe = ops.select(live, row, ops.integer(0))
        begin = ops.load_integer("row_offsets", safe)
        end = ops.select(live, ops.load_integer("row_offsets", safe + 1), begin)
        start = ops.load_integer("starts", safe * plan.lanes + part)
        return Strip(row, begin + part, end, decoder.open(safe, start))

    def read(strip, step):
        """Issues the loads of the lane's group `step` groups ahead: its code and its values."""
        group = strip.group + step * plan.lanes
        live = group < strip.end
        code = ops.integer(0)
        if decoder.reads_codes_by_group:
            [code] = ops.load_words("codes", group, 1, live, stream=True)
        values = []
        for i in range(words_per_group // 4):
            values += ops.load_words(
                "values", group * (words_per_group // 4) + i, 4, live, stream=True)
        return code, values

    def multiply(code, values, place, sums):
        columns, place = decoder.columns(code, place, x_scale)
        if words_per_group == GROUP:
            weights = [ops.as_real(word) for word in values]
        else:
            weights = [half for word in values for half in ops.pair(word, plan.dtype)]
        for column, weight in zip(columns, weights):
            sums = [ops.fma(weight, x, total) for x, total in zip(x_at(column), sums)]
        return place, sums

    def read_x(first_slot):
        """Issues a thread's loads of x for `X_AHEAD` rounds: [(slot, vector, value)]."""
        out = []
        for i in range(min(X_AHEAD, -(-(cols + plan.slack) // threads))):
            slot = first_slot + i * threads
            for k in range(vectors):
                vector = first_vector + k
                inside = (slot < cols) & (vector < plan.batch)
                out.append((slot, k, ops.load_real("x", vector * cols + slot, inside)))
        return out

    def write_x(loaded):
        for slot, k, value in loaded:
            index = slot * vectors + k
            ops.store_shared(index, value, index < plan.shared_slots)

    def stage_rest_of_x():
        def copy(slot):
            write_x(read_x(slot))
            return slot + X_AHEAD * threads

        ops.loop(lambda slot: slot < cols + plan.slack, copy, thread + X_AHEAD * threads)

    def x_at(column):
        if settings.stage_x:
            return ops.load_shared(column, vectors)
        return [ops.load_real("x", (first_vector + k) * cols + column,
                              (column < cols) & (first_vector + k < plan.batch))
                for k in range(vectors)]

    def finish(row, sums):
        distance = plan.lanes // 2
        while distance:
            sums = [total + ops.exchange(total, distance) for total in sums]
            distance //= 2
        for k, total in enumerate(sums):
            vector = first_vector + k
            ops.store_real("y", vector * rows + row, total,
                           (part == 0) & (row < end_row) & (vector < plan.batch))

    def step(state):
        strip, upcoming, data, sums = state
        after = strip.group + settings.unroll * plan.lanes
        done = ops.all(after >= strip.end)
        target = ops.select(done, upcoming, strip._replace(group=after))
        next_data = [read(target, u) for u in range(settings.unroll)]
        place = strip.place
        for u, (code, values) in enumerate(data):
            def run(code=code, values=values, place=place, sums=sums):
                return multiply(code, values, place, sums)

            if u == 0:
                place, sums = run()
            else:  # rows rarely fill the last steps
                used = ops.any(strip.group + u * plan.lanes < strip.end)
                place, sums = ops.branch(used, run, (place, sums))

        def next_row():
            finish(strip.row, sums)
            return upcoming, open_row(upcoming.row + stride), [ops.real(0)] * vectors

        strip, upcoming, sums = ops.branch(
            done, next_row, (strip._replace(group=after, place=place), upcoming, sums))
        return strip, upcoming, next_data, sums

    # All loads that depend on nothing come first: the start of a kernel is a chain of latencies.
    x_head = read_x(thread) if settings.stage_x else []
    strip = open_row(first_row + task)
    data = [read(strip, u) for u in range(settings.unroll)]
    upcoming = open_row(first_row + task + stride)
    write_x(x_head)
    if settings.stage_x:
        stage_rest_of_x()
    ops.barrier()
    ops.loop(lambda state: ops.any(state[0].row < end_row), step,
             (strip, upcoming, data, [ops.real(0)] * vectors))


def why_not(problem) -> str | None:
    """None if the kernel serves the `dispatch.Problem`, or the reason why it does not."""
    floats = ("float16", "bfloat16", "float32")
    if problem.product != "spmv":
        return f"there is no kernel for {problem.product}"
    for dtype in (*problem.dtypes, problem.out_dtype):
        if jnp.dtype(dtype).name not in floats:
            return f"the kernel takes {', '.join(floats)}, not {jnp.dtype(dtype).name}"
    if problem.stored == 0 or 0 in problem.shape or problem.batch == 0:
        return "the matrix or the batch is empty"
    rows, cols = problem.shape
    if max(rows * words_per_row(cols), problem.batch * max(rows, cols), problem.stored) >= 2**31:
        return "the arrays are too large for 32-bit indices"
    return None


def rather_not(problem) -> str | None:
    """None if the kernel is the fastest way, or the reason why a dense decode is faster."""
    if problem.batch > config.BREAK_EVEN_BATCH:
        return (f"{problem.batch} vectors are more than {config.BREAK_EVEN_BATCH}: "
                "decoding the matrix once and a dense product are faster")
    return None


def spmv(values, x, codes, row_offsets, starts, *, shape, encoding, lanes: int, stored, out_dtype):
    """y = x A^T, [batch, cols] -> [batch, rows], on the GPU; the signature of `reference.spmv`."""
    batch = x.shape[0]
    plan = Plan(shape=shape, encoding=encoding, lanes=lanes, stored=stored, dtype=values.dtype,
                batch=batch, settings=config.choose(shape, lanes, stored, batch))
    return _call(plan, out_dtype, values, codes, row_offsets, starts, x)


def _call(plan: Plan, out_dtype, *operands):
    return lanes.run(
        lambda ops: program(ops, plan), ("values", "codes", "row_offsets", "starts", "x", "y"),
        operands, jax.ShapeDtypeStruct((plan.batch, plan.shape[0]), out_dtype),
        blocks=plan.settings.blocks * plan.passes, warps=plan.settings.warps,
        shared_slots=plan.shared_slots)
