"""A product with many vectors, by tensor cores that get their tiles from the packed matrix.

No dense matrix is written to memory, as `decode.py` does. Two blocks, a cluster, have the same 128
rows, and 256 vectors each. Two warpgroups of a block multiply; a third decodes half of the rows,
64 columns at a time, into shared memory (`tiles.py`), and sends them to the other block.

All steps of all tiles, in a row, are cut into equal pieces, one for each cluster. A tile that
several clusters work on is added up by the one that has its first step, which is the last that this
cluster does; the others have theirs done before.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from macko_jax.format.layout import GROUP
from macko_jax.gpu import row_walk as strips
from macko_jax.gpu import tiles
from macko_jax.gpu import tuning as config
from macko_jax.gpu.tiles import COLUMNS, PEERS, ROW_BYTES, ROWS, STEPS, THREADS
from macko_jax.lanes import mosaic as lanes
from macko_jax.lanes.mosaic import Register, act, address

VECTORS = 256  # of a block
X_STEPS = 3  # for whose vectors shared memory has room
MULTIPLYING, DECODING = 2, 1  # warpgroups of a block
REGISTERS = {"multiply": 200, "decode": 104}  # of their threads, of 168 that each begins with
OUT = 32  # vectors of the result that leave by one copy
SUMS = plgpu.Layout.WGMMA  # of the sums [64 rows, 256 vectors] of a warpgroup

# Where this is faster than a decode and a dense product (docs/kernel.md, "Many vectors"): a cluster
# is full or nearly so; there is little to decode, the less the fewer tiles a cluster has; and the
# lines of memory of all rows at work stay in the L2 cache until every strip has had its part.
FASTER_VECTORS = range(433, PEERS * VECTORS + 1)
FASTER_DENSITY = 0, 0.35, 0.55  # of what is stored, by tiles of a cluster: none, one, more
FASTER_BYTES = 24 << 20  # of those lines


@dataclasses.dataclass(frozen=True)
class Plan:
    """One product of a matrix with `vectors` vectors, by so many clusters."""

    matrix: strips.Matrix
    vectors: int
    clusters: int

    @property
    def steps(self) -> int:
        """Of a tile."""
        return self.matrix.shape[1] // COLUMNS

    @property
    def across(self) -> int:
        """Tiles of the same rows."""
        return -(-self.vectors // (PEERS * VECTORS))

    @property
    def tiles(self) -> int:
        return self.across * -(-self.matrix.shape[0] // ROWS)

    def first(self, cluster):
        """The first of a cluster's steps, among those of all tiles, as all numbers of steps."""
        return cluster * (self.tiles * self.steps) // self.clusters

    def last_cluster(self, tile):
        """The cluster that has the last step of a tile."""
        return ((tile + 1) * (self.steps * self.clusters) - 1) // (self.tiles * self.steps)

    def column(self, step):
        """The first column of a tile's step: those of the halves of the columns come in turn."""
        return ((step >> 1) + (step & 1) * -(-self.steps // 2)) * COLUMNS


def plan(matrix: strips.Matrix, vectors: int) -> Plan:
    """By all clusters that the GPU has room for, or one for each step."""
    most = Plan(matrix, vectors, most_clusters())
    return dataclasses.replace(most, clusters=min(most.clusters, most.tiles * most.steps))


def most_clusters() -> int:
    """That run at a time."""
    return config.multiprocessors() // PEERS


def why_not(matrix: strips.Matrix) -> str | None:
    """None if the kernel multiplies by the matrix, or the reason why it does not."""
    rows, cols = matrix.shape
    if (capability := config.compute_capability()) != config.HOPPER:
        return (
            f"its instructions for tensor cores are those of compute capability "
            f"{config.HOPPER}, not {capability}"
        )
    if jnp.dtype(matrix.dtype).name not in ("float16", "bfloat16"):
        return f"its tensor cores take values of 16 bits, not {jnp.dtype(matrix.dtype).name}"
    if matrix.encoding not in strips.DELTA_BITS:
        return f"it does not decode {matrix.encoding}"
    if rows % COLUMNS or cols % COLUMNS:
        return f"rows and columns must be multiples of {COLUMNS}, not {rows} and {cols}"
    return None


def is_faster(matrix: strips.Matrix, vectors: int) -> bool:
    """Whether it is, than a decode and a dense product."""
    rows, cols = matrix.shape
    at_work = ROWS * most_clusters()  # rows
    # A strip's groups have a line of values each, and one of codes, which 32 of the row's share.
    groups = matrix.stored / (rows * matrix.lanes * GROUP)
    lines = groups * (1 + matrix.lanes / 32)
    return (
        vectors in FASTER_VECTORS
        and at_work * lines * lanes.LINE <= FASTER_BYTES
        and matrix.stored <= FASTER_DENSITY[min(rows // at_work, 2)] * rows * cols
    )


def matmul(values, x, codes, row_offsets, starts, *, shape, encoding, lanes, stored):
    """x [vectors, cols] times the transposed matrix: [vectors, rows] in the type of both."""
    chosen = plan(strips.Matrix(shape, encoding, lanes, stored, values.dtype), x.shape[0])
    return run(chosen, x, values, codes, row_offsets, starts)


def run(plan: Plan, x, values, codes, row_offsets, starts) -> jax.Array:
    """The product by a given plan."""
    # A copy out of x that reaches beyond its end is slow at times: 264 vectors took 260 instead of
    # 168 us, 320 took 166 or 231. Into y such copies are fine, of a multiple of eight vectors.
    x = jnp.pad(x, ((0, -plan.vectors % (PEERS * VECTORS)), (0, 0)))
    operands = dict(values=values, codes=codes, row_offsets=row_offsets, starts=starts)
    blocks = plan.clusters * PEERS

    def body(x, *refs):
        *arrays, done, y, parts = refs
        memory = {name: (ref, operands[name].dtype) for name, ref in zip(operands, arrays)}
        _body(plan, x, memory, parts, done, y)

    mesh = plgpu.Mesh(
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(PEERS,),
        cluster_names=("peer",),
        num_threads=MULTIPLYING + DECODING,
        thread_name="warpgroup",
    )
    params = plgpu.CompilerParams(lowering_semantics=mosaic_gpu.LoweringSemantics.Lane)
    y, parts = lanes.results(
        [
            jax.ShapeDtypeStruct((-(-plan.vectors // 8) * 8, plan.matrix.shape[0]), x.dtype),
            jax.ShapeDtypeStruct((blocks * ROWS * VECTORS,), jnp.float32),
        ],
        x,
    )
    # Zeros that vary as the operands do.
    done = jax.new_ref(jnp.broadcast_to(row_offsets[0], (blocks * MULTIPLYING,)) & 0)
    kernel = pl.kernel(
        body, out_type=[y, parts], mesh=mesh, compiler_params=params, name="macko_matmul"
    )
    return kernel(x, *operands.values(), done)[0][: plan.vectors]


def _body(plan: Plan, x, memory, parts, done, y) -> None:
    depth, rows = plan.steps, ROWS // MULTIPLYING
    cluster, peer = jax.lax.axis_index("cluster"), jax.lax.axis_index("peer")
    warpgroup = jax.lax.axis_index("warpgroup")
    begin, end = plan.first(cluster), plan.first(cluster + 1)
    swizzled = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(ROW_BYTES))

    def place(tile):
        """The block's first vector and row."""
        return (
            (jax.lax.rem(tile, plan.across) * PEERS + peer) * VECTORS,
            jax.lax.div(tile, plan.across) * ROWS,
        )

    def with_memory(xs, ws, out, ring, barriers, full, empty):
        arrays = {**memory, "ring": (ring, jnp.float32), "barriers": (barriers, jnp.float32)}

        def emit(program, number=cluster, first_thread=0):
            """A lane program, which is called with the vocabulary and a number."""
            lanes.emit(
                lambda ops: program(ops, ops.block()), arrays, ws, number, first_thread, swizzled
            )

        def load(step):
            """Brings the vectors of the step."""
            tile = step // depth
            first, _ = place(tile)
            slot = jax.lax.rem(step - begin, X_STEPS)
            columns = pl.ds(plan.column(step - tile * depth), COLUMNS)
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(first, VECTORS), columns], xs.at[slot], full.at[slot]
            )

        def add_up(sums, tile, low, high):
            """Adds the products of some of the tile's steps."""

            def one(k, _):
                step = tile * depth + k
                number = step - begin
                slot, before = (jax.lax.rem(number + i, X_STEPS) for i in (0, X_STEPS - 1))
                plgpu.barrier_wait(full.at[slot])
                emit(tiles.wait_for, number)
                mine = pl.ds(warpgroup * rows, rows)
                plgpu.wgmma(sums, ws.at[jax.lax.rem(number, STEPS), mine], xs.at[slot].T)
                plgpu.wgmma_wait(1)

                @pl.when(number > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[before])
                    emit(tiles.free, number - 1)

                    @pl.when((warpgroup == 0) & (step + X_STEPS - 1 < end))
                    def _():
                        plgpu.barrier_wait(empty.at[before])
                        load(step + X_STEPS - 1)

            jax.lax.fori_loop(low, high, one, None)
            return sums[...]

        def one_piece(i, _):
            """A tile, or what the cluster has of it."""
            tile = begin // depth + i
            low = jnp.maximum(begin - tile * depth, 0)
            high = jnp.minimum(end - tile * depth, depth)
            sums = pl.run_scoped(
                functools.partial(add_up, tile=tile, low=low, high=high),
                plgpu.ACC((rows, VECTORS), jnp.float32),
            )

            def part(of):
                return (of * PEERS + peer) * MULTIPLYING + warpgroup

            @pl.when(low > 0)
            def _():
                _put_part(sums, parts, done, part(cluster))

            @pl.when(low == 0)
            def _():
                total = jax.lax.fori_loop(
                    cluster + 1,
                    plan.last_cluster(tile) + 1,
                    lambda of, sums: _add_part(sums, parts, done, part(of)),
                    sums,
                )
                store(total.astype(y.dtype), tile)

        def store(sums, tile):
            vector, row = place(tile)
            row += warpgroup * rows
            for at in range(0, VECTORS, OUT):
                # A copy that begins outside may end up inside, where a dimension is one tile.
                @pl.when((vector + at < y.shape[0]) & (row < y.shape[1]))
                def _(at=at):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    _transpose(sums, at, out, warpgroup, swizzled)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out.at[warpgroup], y.at[pl.ds(vector + at, OUT), pl.ds(row, rows)]
                    )

        @emit
        def _(ops, _):
            tiles.make_barriers(ops, MULTIPLYING)
            ops.cluster_barrier()

        @pl.when(warpgroup < MULTIPLYING)
        def _():
            plgpu.set_max_registers(REGISTERS["multiply"], action="increase")

            @pl.when(warpgroup == 0)
            def _():
                for i in range(X_STEPS):
                    pl.when(begin + i < end)(functools.partial(load, begin + i))

            jax.lax.fori_loop(0, (end - 1) // depth - begin // depth + 1, one_piece, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == MULTIPLYING)
        def _():
            plgpu.set_max_registers(REGISTERS["decode"], action="decrease")
            emit(
                lambda ops, _: tiles.program(ops, plan),
                cluster * PEERS + peer,
                MULTIPLYING * THREADS,
            )

        emit(lambda ops, _: ops.cluster_barrier())  # the other block may still send

    pl.run_scoped(
        with_memory,
        plgpu.SMEM((X_STEPS, VECTORS, COLUMNS), y.dtype, transforms=swizzled),
        plgpu.SMEM((STEPS, ROWS, COLUMNS), y.dtype, transforms=swizzled),
        plgpu.SMEM((MULTIPLYING, OUT, rows), y.dtype, transforms=swizzled),
        plgpu.SMEM((tiles.Ring(plan.matrix).size // 4,), jnp.float32),
        plgpu.SMEM((2 * tiles.BARRIERS,), jnp.float32),
        plgpu.Barrier(num_arrivals=1, num_barriers=X_STEPS),
        plgpu.Barrier(num_arrivals=MULTIPLYING, num_barriers=X_STEPS),
        collective_axes="warpgroup",
    )


# What the threads of a warpgroup do with the registers that hold its sums.

_PART = plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


def _thread() -> Register:
    return Register(mosaic.thread_idx())


def _pieces(parts, index: Register, count: int):
    """Addresses and type of a thread's pieces of four sums, in the part at an index."""
    base, kind = mosaic.memref_ptr(parts), ir.VectorType.get((4,), ir.F32Type.get())
    first = index * (count * THREADS) + (_thread() & (THREADS - 1))
    return kind, [address(base, first + i * THREADS, kind) for i in range(count)]


def _flag(done, index: Register):
    """The address of what says whether a part is there."""
    return address(mosaic.memref_ptr(done), index, ir.IntegerType.get_signless(32))


def _put_part(sums, parts, done, index) -> None:
    """Writes a warpgroup's sums for the cluster that adds them up, and says so."""

    @plgpu.inline_mgpu(arg_types=(SUMS, *_PART))
    def put(_, sums, parts, done, index):
        index, pairs = Register(index.registers.item()), list(sums.registers.flat)
        _, addresses = _pieces(parts, index, len(pairs) // 2)
        for place, low, high in zip(addresses, pairs[::2], pairs[1::2]):
            llvm.store(vector.shuffle(low, high, [0, 1, 2, 3]), place, alignment=16)
        act("fence.acq_rel.gpu;")
        mosaic.warpgroup_barrier()
        with mosaic.when(((_thread() & (THREADS - 1)) == 0).value):
            act(
                "{.reg .b32 a; mov.b32 a, 1; st.release.gpu.global.b32 [$0], a;}",
                _flag(done, index),
            )

    put(sums, parts, done, index)


def _add_part(sums, parts, done, index) -> jax.Array:
    """The sums and those that another cluster has put there, as soon as it has."""

    @plgpu.inline_mgpu(
        arg_types=(SUMS, *_PART),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=SUMS),
    )
    def add(_, sums, parts, done, index):
        index = Register(index.registers.item())
        act(
            "{.reg .b32 a; .reg .pred p; again${:uid}: ld.acquire.gpu.global.b32 a, [$0];"
            " setp.eq.u32 p, a, 0; @p bra again${:uid};}",
            _flag(done, index),
        )
        pairs = sums.registers.copy()
        kind, addresses = _pieces(parts, index, pairs.size // 2)
        for i, place in enumerate(addresses):
            four = llvm.load(kind, place, alignment=16)
            for j in (0, 1):
                two = vector.shuffle(four, four, [2 * j, 2 * j + 1])
                pairs.flat[2 * i + j] = arith.addf(pairs.flat[2 * i + j], two)
        return mosaic_gpu.FragmentedArray(_registers=pairs, _layout=sums.layout, _is_signed=None)

    return add(sums, parts, done, index)


def transposed_place(thread, warpgroup):
    """Where the thread writes 16 bytes of the first 16 vectors of `out`; registers or numbers.

    Of four 8 x 8 matrices, of 16 rows and 16 vectors, a lane writes vector l mod 8 of matrix l / 8.
    """
    line = (thread & 7) + ((thread & 16) >> 1)
    piece = (((thread & 96) >> 4) + ((thread & 8) >> 3)) ^ (thread & 7)  # as `tiles.py` permutes
    return (warpgroup * OUT + line) * ROW_BYTES + piece * 16


def _transpose(sums, first: int, out, warpgroup, swizzled) -> None:
    """Writes `OUT` columns of 16-bit sums, from one on, as rows of the warpgroup's `out`.

    A register pair holds element [l / 4, 2 (l mod 4)] and the next of an 8 x 8 matrix in lane l;
    `stmatrix` writes four of them transposed.
    """

    @plgpu.inline_mgpu(arg_types=(SUMS, plgpu.RefType(swizzled), plgpu.Layout.WG_SPLAT(())))
    def put(_, sums, out, warpgroup):
        i32 = ir.IntegerType.get_signless(32)
        pairs = [llvm.bitcast(i32, pair) for pair in sums.registers.flat]
        place = transposed_place(_thread(), Register(warpgroup.registers.item()))
        base = arith.addi(llvm.ptrtoint(i32, mosaic.memref_ptr(out)), place.value)
        for block in range(0, OUT // 8, 2):
            at = 2 * (first // 8 + block)
            act(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
                f" [$0+{block * 8 * ROW_BYTES}], {{$1, $2, $3, $4}};",
                base,
                *pairs[at : at + 4],
            )

    put(sums, out, warpgroup)
