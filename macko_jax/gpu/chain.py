"""The lane program of a chain of products: each takes the result of the one before.

All blocks run at once, one on each multiprocessor, and every block owns a share of the rows of
every matrix. A product needs the whole result of the one before, so between them the blocks have to
meet. They meet in the data: a block publishes its share of a result in the array `exchange`, which
is all `BLANK` at first, and reads the whole vector again until no element of it is missing. So a
meeting takes a write and a read or two of the L2 cache, and no barrier of the grid, no counter and
no start of a kernel. (The protocol "LL" of NCCL sends a flag with every word in the same manner.)
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from macko_jax.format import two_bank as choice
from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import spmv
from macko_jax.gpu import tuning as config
from macko_jax.gpu.staging import PIECE, Share, Vectors, gate
from macko_jax.lanes import mosaic as lanes
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import prefetch_range, sum_over_lanes

WARPS = 32
THREADS = WARPS * WARP


@dataclasses.dataclass(frozen=True)
class Step:
    """One product of a chain: y = add + A f(x).

    Attributes:
      added: which earlier step's result is added; None if it is an operand, or if `fusion` says
        that nothing is.
      kept: whether the result is one of the chain's results; the last step's always is.
    """

    matrix: strips.Matrix
    fusion: spmv.Fusion
    added: int | None = None
    kept: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a chain is computed.

    Attributes:
      dtype: of x and of all results, a 16-bit type.
      blocks: all of them, which must run at once.
    """

    steps: tuple[Step, ...]
    dtype: object
    blocks: int

    def x(self, i: int) -> Vectors:
        """The vector that step i gathers from."""
        step = self.steps[i]
        done = i > 0 and self.gates(i - 1)  # what comes before it, by those who publish it
        return Vectors(
            self.dtype,
            length=step.matrix.shape[1],
            count=1,
            batch=1,
            before=None if done else step.fusion.before,
            first_slot=self.slot("x", i),
            twice=self.twice(i),
        )

    def twice(self, i: int) -> bool:
        """Whether the vector of step i lies in shared memory twice, see `choice.py`."""
        return self._lies_twice(i, self._longest_twice)

    def share(self, i: int) -> Share:
        """The elements of step i's result that belong to a block's rows."""
        return Share(rows=self.steps[i].matrix.shape[0], blocks=self.blocks, count=1, batch=1)

    def gates(self, i: int) -> bool:
        """Whether of step i's result a and b, its halves, only silu(a) * b is needed.

        Then blocks own rows in pairs and publish that, half as much to read for every block.
        """
        needed = self.steps[i].kept or any(step.added == i for step in self.steps)
        follows = i + 1 < len(self.steps) and self.steps[i + 1].fusion.gated
        return follows and not needed and not self.steps[i].fusion.add

    def published(self, i: int) -> int:
        """Elements that step i publishes."""
        rows = self.steps[i].matrix.shape[0]
        return rows // 2 if self.gates(i) else rows

    def early(self, i: int) -> bool:
        """Whether each warp asks for weights of step i + 1 as soon as it is done with step i.

        That is better where warps take several rows one after the other, and then wait long for
        each other. Else what they ask for holds up the vector, since a multiprocessor gets what it
        loads in order.
        """
        return config.rounds(self.steps[i].matrix, self.blocks) > 1

    def slot(self, what: str, i: int) -> int:
        """Of shared memory, the first one of `what` of step i.

        That is "x", "squares" (a sum of them for each warp), "add" (an operand) or "result".
        """
        return self._places[what, i]

    @property
    def shared_slots(self) -> int:
        return self._places["end"]

    def _lies_twice(self, i: int, longest: int) -> bool:
        matrix = self.steps[i].matrix
        return matrix.encoding == "two_bank" and matrix.shape[1] <= longest

    @functools.cached_property
    def _longest_twice(self) -> int:
        """The length up to which vectors lie twice: as many of them as there is room for."""
        lengths = sorted({step.matrix.shape[1] for step in self.steps}, reverse=True)
        fits = lambda longest: 4 * self._place(longest)["end"] <= config.shared_bytes()
        return next(filter(fits, lengths), 0)

    @functools.cached_property
    def _places(self) -> dict:
        return self._place(self._longest_twice)

    def _place(self, longest: int) -> dict:
        """The first slot of everything, where vectors up to so long lie twice."""
        sizes = {}
        for i in range(len(self.steps)):
            sizes["squares", i] = WARPS
            sizes["add", i] = self.share(i).slots
            sizes["result", i] = self.share(i).slots + self.gates(i)  # a pair has two
        # While x of a step is written, only that of the step before may still be read.
        turns = [0, 0]
        for i, step in enumerate(self.steps):
            columns = step.matrix.shape[1] + strips.SLACK
            words = choice.WORDS if self._lies_twice(i, longest) else 1
            turns[i % 2] = max(turns[i % 2], columns * words)
        sizes |= {("x", i): size for i, size in enumerate(turns)}
        ends = itertools.accumulate((-(-size // 4) * 4 for size in sizes.values()), initial=0)
        places = dict(zip([*sizes, "end"], ends))
        return places | {("x", i): places["x", i % 2] for i in range(len(self.steps))}

    def first(self, i: int) -> int:
        """Index of the first element that step i publishes in the array `exchange`."""
        return sum(self.published(j) for j in range(i))

    @property
    def exchanged(self) -> int:
        """Elements of the array `exchange`."""
        return self.first(len(self.steps) - 1)

    @property
    def names(self) -> list[str]:
        """Of the operands."""
        out = []
        for i, step in enumerate(self.steps):
            extras = [name for name in step.fusion.names if name != "add" or step.added is None]
            out += [f"{name}{i}" for name in ("values", "codes", "row_offsets", "starts", *extras)]
        return ["x", *out]

    @property
    def kept(self) -> list[int]:
        """Steps whose results are the chain's, in this order; named y and the step's number."""
        return [i for i, step in enumerate(self.steps) if step.kept or i == len(self.steps) - 1]


def program(ops, plan: Plan) -> None:
    """Computes the results on the arrays of `plan.names`, exchange, and one for each result."""
    xs = [plan.x(i) for i in range(len(plan.steps))]
    ways = [
        strips.RowWalk(
            ops,
            step.matrix,
            block=ops.block(),
            blocks=plan.blocks,
            warps=config.busy_warps(step.matrix, plan.blocks),
            unroll=config.groups_ahead(step.matrix, plan.blocks),
            scale=x.scale,
            chooses=x.twice,
            paired=plan.gates(i),
            suffix=str(i),
        )
        for i, (step, x) in enumerate(zip(plan.steps, xs))
    ]
    for i, (step, walk, x) in enumerate(zip(plan.steps, ways, xs)):
        matrix, fusion = step.matrix, step.fusion
        add = plan.share(i) if fusion.add and step.added is None else None
        if i == 0:
            x.begin(ops, "x", ops.integer(0), THREADS, scale="scale0")
        if add:
            add.begin(
                ops,
                f"add{i}",
                walk,
                first_vector=ops.integer(0),
                first_slot=plan.slot("add", i),
                threads=THREADS,
            )
        if i == 0:
            started = walk.start()
            squares = x.finish()
            _prefetch(ops, plan, ways)
        else:
            if not plan.early(i - 1):
                opened = walk.open()
            squares = x.receive(ops, "exchange", plan.first(i - 1), f"scale{i}", THREADS)
            ops.barrier()  # all have the vector before weights may hold it up
            if not plan.early(i - 1):
                started = walk.read(opened)
        if add:
            add.finish()
        inverse = None
        if fusion.eps is not None:
            spmv.share_squares(ops, squares, plan.slot("squares", i))
        ops.barrier()
        if fusion.eps is not None:
            inverse = spmv.inverse_norm(
                ops, plan.slot("squares", i), WARPS, matrix.shape[1], fusion.eps
            )
        walk.run(
            started,
            lambda: [ops.real(0)],
            functools.partial(spmv.multiply, ops, matrix, x),
            functools.partial(_finish, ops, plan, i, walk, inverse),
        )
        if i < len(plan.steps) - 1:
            if plan.early(i):
                started = ways[i + 1].start()
            ops.barrier()
            _publish(ops, plan, i, walk)


def _prefetch(ops, plan: Plan, ways: list) -> None:
    """Asks for the small arrays of later steps, which would hold up what the block waits for."""
    for i in range(1, len(plan.steps)):
        ways[i].prefetch()
        if plan.steps[i].fusion.eps is not None:
            prefetch_range(ops, f"scale{i}", 0, plan.steps[i].matrix.shape[1], 2)


def _finish(ops, plan: Plan, i: int, walk, inverse, row, sums: list) -> None:
    """Puts an element of step i's result where it belongs."""
    step, inside = plan.steps[i], row < walk.end_row
    place = ops.select(inside, row - walk.first_row, ops.integer(0))
    if step.fusion.scaled:
        row_scale = ops.load_real(f"row_scales{i}", walk.index(row), inside)
    [total] = sum_over_lanes(ops, sums, step.matrix.lanes)
    if step.fusion.scaled:
        total = total * row_scale
    if inverse is not None:
        total = total * inverse
    if step.fusion.add:
        slot = plan.slot("add", i) if step.added is None else plan.slot("result", step.added)
        total = total + ops.load_shared((place + slot) * 4, 1)[0]
    mine = inside & (walk.part == 0)
    if i in plan.kept:
        ops.store_real(f"y{i}", row, total, mine)
    if i < len(plan.steps) - 1:
        ops.store_shared(place + plan.slot("result", i), total, mine)


def _publish(ops, plan: Plan, i: int, walk) -> None:
    """Writes the block's share of step i's result for all blocks, in as few stores as it takes."""
    together = 2 if plan.gates(i) else 1  # rows of an element
    first, end = walk.first_row // together, walk.end_row // together

    def store(element):
        slot = (element - first) * together + plan.slot("result", i)
        rows = [ops.load_shared((slot + j) * 4, 1)[0] for j in range(together)]
        value = gate(ops, *rows) if plan.gates(i) else rows[0]
        ops.publish("exchange", element + plan.first(i), value, plan.dtype, element < end)
        return element + THREADS

    ops.loop(lambda element: element < end, store, first + ops.thread())


def why_not(plan: Plan) -> str | None:
    """None if the kernel computes the chain, or the reason why it does not."""
    if jnp.dtype(plan.dtype).itemsize != 2:
        return f"the vectors are {jnp.dtype(plan.dtype).name}, not of a 16-bit type"
    for i, step in enumerate(plan.steps):
        rows, cols = step.matrix.shape
        if plan.published(i) < plan.blocks:
            return f"a matrix of {rows} rows has too few for {plan.blocks} blocks"
        if rows % PIECE or cols % PIECE:
            return f"a {rows} x {cols} matrix has not whole pieces of {PIECE} rows and columns"
    if 4 * plan.shared_slots > config.shared_bytes():
        return "shared memory has no room for the vectors"
    return None


def run(plan: Plan, exchange, *operands) -> list:
    """The results, each [rows]; operands as `plan.names`."""
    results = [
        jax.ShapeDtypeStruct((plan.steps[i].matrix.shape[0],), plan.dtype) for i in plan.kept
    ]
    names = [*plan.names, "exchange", *(f"y{i}" for i in plan.kept)]
    out, _ = lanes.run(
        "macko_chain",
        lambda ops: program(ops, plan),
        names,
        operands,
        results,
        blocks=plan.blocks,
        warps=WARPS,
        shared_slots=plan.shared_slots,
        changed=[exchange],
    )
    return out
