"""The lane program of a chain of products: each takes the result of the one before.

All blocks run at once, one on each SM (a persistent kernel), and every block owns a share of the
rows of every matrix. A product needs the whole result of the one before, so between them the blocks
have to wait for each other. They do so in the data: a block publishes its share of a result in the
array `exchange`, which is all `BLANK` at first, and reads the whole vector again until no element
of it is missing. That takes a write and a read or two of the L2 cache, and no barrier of the grid,
no counter and no start of a kernel. (NCCL's protocol LL sends a flag with every word in the same
manner.)
"""

import dataclasses
import functools
import itertools

import jax

from macko_jax.format import two_bank
from macko_jax.format.layout import Layout, Positions
from macko_jax.gpu import device, occupancy, row_walk, spmv, tuning
from macko_jax.gpu.kernel import Problem
from macko_jax.gpu.staging import PER_LOAD, Share, Vectors, gate
from macko_jax.lanes import mosaic
from macko_jax.lanes.mosaic import WARP
from macko_jax.lanes.vocabulary import Lanes, prefetch_range, sum_over_lanes

WARPS = tuning.MOST_WARPS
THREADS = WARPS * WARP


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a chain is computed.

    Attributes:
      problems: the products, all of one 16-bit type of vectors, with what is around each.
      blocks: the number of blocks, all of which must run at once.
    """

    problems: tuple[Problem, ...]
    blocks: int

    @property
    def dtype(self):
        """The type of x and of all results."""
        return self.problems[0].x_dtype

    def layout(self, i: int) -> Layout:
        """The layout of matrix i."""
        return self.problems[i].layout

    def x(self, i: int) -> Vectors:
        """The vector that product i gathers from."""
        gated = i > 0 and self.gates(i - 1)  # already, by those who publish it
        return Vectors(
            self.dtype,
            length=self.layout(i).shape[1],
            count=1,
            batch=1,
            before=None if gated else self.problems[i].fusion.before,
            first_slot=self.slot("x", i),
            two_copies=self.two_copies(i),
        )

    def two_copies(self, i: int) -> bool:
        """Whether the vector of product i lies in shared memory twice, see `format.two_bank`."""
        return self._has_two(i, self._longest_two)

    def share(self, i: int) -> Share:
        """The elements of result i that belong to a block's rows."""
        return Share(rows=self.layout(i).shape[0], blocks=self.blocks, count=1, batch=1)

    def gates(self, i: int) -> bool:
        """Whether of result i, with its halves a and b, only silu(a) * b is needed.

        Then blocks own rows in pairs and publish that, half as much to read for every block.
        """
        fusions = [problem.fusion for problem in self.problems]
        needed = fusions[i].kept or any(fusion.added == i for fusion in fusions)
        follows = i + 1 < len(fusions) and fusions[i + 1].gated
        return follows and not needed and not fusions[i].add

    def published(self, i: int) -> int:
        """The number of elements that are published of result i."""
        rows = self.layout(i).shape[0]
        return rows // 2 if self.gates(i) else rows

    def early(self, i: int) -> bool:
        """Whether each warp asks for weights of matrix i + 1 as soon as it is done with matrix i.

        That is better where warps take several rows one after the other, and then wait long for
        each other. Else what they ask for holds up the vector, since an SM gets what it loads in
        order (tuning_h200.json, "gate and up in pairs").
        """
        return occupancy.rounds(self.layout(i), self.blocks) > 1

    def slot(self, what: str, i: int) -> int:
        """The first slot in shared memory of `what` of product i.

        That is "x", "squares" (a sum of them for each warp), "add" (an operand) or "result".
        """
        return self._slots[what, i]

    @property
    def shared_slots(self) -> int:
        return self._slots["end", 0]

    def _has_two(self, i: int, longest: int) -> bool:
        layout = self.layout(i)
        return layout.encoding == "two_bank" and layout.shape[1] <= longest

    @functools.cached_property
    def _longest_two(self) -> int:
        """The length up to which vectors lie twice: as many of them as there is room for."""
        lengths = sorted({problem.layout.shape[1] for problem in self.problems}, reverse=True)
        fits = lambda longest: 4 * self._allocate(longest)["end", 0] <= device.shared_bytes()
        return next(filter(fits, lengths), 0)

    @functools.cached_property
    def _slots(self) -> dict:
        return self._allocate(self._longest_two)

    def _allocate(self, longest: int) -> dict:
        """The first slot of everything, where vectors up to so long lie twice."""
        sizes, count = {}, len(self.problems)
        for i in range(count):
            sizes["squares", i] = WARPS
            sizes["add", i] = self.share(i).slots
            sizes["result", i] = self.share(i).slots + self.gates(i)  # a pair has two
        # Two buffers in turn: while one x is written, only that of the product before may be read.
        buffers = [0, 0]
        for i in range(count):
            columns = self.layout(i).shape[1] + row_walk.SLACK
            words = two_bank.WORDS if self._has_two(i, longest) else 1
            buffers[i % 2] = max(buffers[i % 2], columns * words)
        sizes |= {("x", i): size for i, size in enumerate(buffers)}
        ends = itertools.accumulate((-(-size // 4) * 4 for size in sizes.values()), initial=0)
        slots = dict(zip([*sizes, ("end", 0)], ends))
        return slots | {("x", i): slots["x", i % 2] for i in range(count)}

    def first(self, i: int) -> int:
        """The index in the array `exchange` of the first published element of result i."""
        return sum(self.published(j) for j in range(i))

    @property
    def exchanged(self) -> int:
        """The number of elements of the array `exchange`."""
        return self.first(len(self.problems) - 1)

    @property
    def names(self) -> list[str]:
        """The names of the operands."""
        each = [("values", *Positions._fields, *p.fusion.operands) for p in self.problems]
        return ["x", *(f"{name}{i}" for i, names in enumerate(each) for name in names)]

    @property
    def kept(self) -> list[int]:
        """The products whose results are the chain's, in order; named y and the number."""
        return [i for i, problem in enumerate(self.problems) if problem.fusion.kept]


def why_not(problems: tuple[Problem, ...]) -> str | None:
    """None if the kernel computes the chain, or the reason why it does not."""
    chain = plan(problems)
    if chain.dtype.itemsize != 2:
        return f"the vectors are {chain.dtype.name}, not of a 16-bit type"
    for i, problem in enumerate(problems):
        rows, cols = problem.layout.shape
        if chain.published(i) < chain.blocks:
            return f"a matrix of {rows} rows has too few for {chain.blocks} blocks"
        if rows % PER_LOAD or cols % PER_LOAD:
            return f"rows and columns of a {rows} x {cols} matrix are not multiples of {PER_LOAD}"
    if 4 * chain.shared_slots > device.shared_bytes():
        return "shared memory has no room for the vectors"
    return None


def plan(problems: tuple[Problem, ...]) -> Plan:
    """The plan of a chain, which only serves where `why_not` has no reason."""
    return Plan(tuple(problems), device.multiprocessors())


def program(ops: Lanes, plan: Plan) -> None:
    """Computes the results on the arrays of `plan.names`, exchange, and one for each result."""
    xs = [plan.x(i) for i in range(len(plan.problems))]
    walks = [
        row_walk.RowWalk(
            ops,
            problem.layout,
            problem.dtype,
            block=ops.block(),
            blocks=plan.blocks,
            warps=occupancy.busy_warps(problem.layout, plan.blocks),
            ahead=occupancy.prefetch_distance(problem.layout, problem.dtype, plan.blocks),
            scale=x.scale,
            two_copies=x.two_copies,
            paired=plan.gates(i),
            suffix=str(i),
        )
        for i, (problem, x) in enumerate(zip(plan.problems, xs))
    ]
    started = None
    for i, (problem, walk, x) in enumerate(zip(plan.problems, walks, xs)):
        fusion, cols = problem.fusion, problem.layout.shape[1]
        add = plan.share(i) if "add" in fusion.operands else None
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
            _prefetch(ops, plan, walks)
        else:
            opened = None if plan.early(i - 1) else walk.open()
            squares = x.receive(ops, "exchange", plan.first(i - 1), f"scale{i}", THREADS)
            ops.barrier()  # all have the vector before weights may hold it up
            if opened is not None:
                started = walk.read(opened)
        if add:
            add.finish()
        inverse = None
        if fusion.eps is not None:
            spmv.share_squares(ops, squares, plan.slot("squares", i))
        ops.barrier()
        if fusion.eps is not None:
            inverse = spmv.inverse_norm(ops, plan.slot("squares", i), WARPS, cols, fusion.eps)
        walk.run(
            started,
            lambda: [ops.real(0)],
            functools.partial(spmv.multiply, ops, problem.dtype, x),
            functools.partial(_finish, ops, plan, i, walk, inverse),
        )
        if i < len(plan.problems) - 1:
            if plan.early(i):
                started = walks[i + 1].start()
            ops.barrier()
            _publish(ops, plan, i, walk)


def _prefetch(ops: Lanes, plan: Plan, walks: list) -> None:
    """Asks for the small arrays of later products, which would hold up what the block waits for."""
    for i, (problem, walk) in enumerate(zip(plan.problems, walks)):
        if i > 0:
            walk.prefetch()
            if problem.fusion.eps is not None:
                prefetch_range(ops, f"scale{i}", 0, problem.layout.shape[1], 2)


def _finish(ops: Lanes, plan: Plan, i: int, walk, inverse, row, sums: list) -> None:
    """Puts an element of result i where it belongs."""
    fusion, inside = plan.problems[i].fusion, row < walk.end_row
    number = ops.select(inside, row - walk.first_row, ops.integer(0))
    row_scale = None
    if fusion.scaled:
        row_scale = ops.load_real(f"row_scales{i}", walk.index(row), inside)
    [total] = sum_over_lanes(ops, sums, plan.layout(i).lanes)
    if row_scale is not None:
        total = total * row_scale
    if inverse is not None:
        total = total * inverse
    if fusion.add:
        added = fusion.added
        slot = plan.slot("add", i) if added is None else plan.slot("result", added)
        total = total + ops.load_shared((number + slot) * 4, 1)[0]
    mine = inside & (walk.lane == 0)
    if fusion.kept:
        ops.store_real(f"y{i}", row, total, mine)
    if i < len(plan.problems) - 1:
        ops.store_shared(number + plan.slot("result", i), total, mine)


def _publish(ops: Lanes, plan: Plan, i: int, walk) -> None:
    """Writes the block's share of result i for all blocks, in as few stores as it takes."""
    together = 2 if plan.gates(i) else 1  # rows of an element
    first, end = walk.first_row // together, walk.end_row // together

    def store(element):
        slot = (element - first) * together + plan.slot("result", i)
        rows = [ops.load_shared((slot + j) * 4, 1)[0] for j in range(together)]
        value = gate(ops, *rows) if plan.gates(i) else rows[0]
        ops.publish("exchange", element + plan.first(i), value, plan.dtype, element < end)
        return element + THREADS

    ops.loop(lambda element: element < end, store, first + ops.thread())


def run(plan: Plan, exchange, *operands) -> list[jax.Array]:
    """The results, each [rows], of the array `exchange` and the operands `plan.names`."""
    results = [jax.ShapeDtypeStruct((plan.layout(i).shape[0],), plan.dtype) for i in plan.kept]
    out, _ = mosaic.run(
        "macko_chain",
        lambda ops: program(ops, plan),
        [*plan.names, "exchange", *(f"y{i}" for i in plan.kept)],
        operands,
        results,
        blocks=plan.blocks,
        warps=WARPS,
        shared_slots=plan.shared_slots,
        changed=[exchange],
    )
    return out
