"""The product with many vectors that decodes its own tiles."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import macko_jax
from macko_jax.gpu import matmul, tiles
from macko_jax.gpu import row_walk as strips
from macko_jax.lanes import interpreter as emulation
from tests.test_kernels import abstract, arrays_of, needs_gpu, sparse, vectors

PLANNED = st.builds(
    lambda rows, steps, vectors, clusters: matmul.Plan(
        strips.Matrix((64 * rows, 64 * steps), "delta4", 32, 8, "float16"), vectors, clusters
    ),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 1500),
    st.integers(1, 70),
).filter(lambda plan: plan.clusters <= plan.tiles * plan.steps)


def uneven(rows, cols, density, dtype):
    """With rows that are full, empty, begin late and have long gaps, beside each other."""
    dense = sparse(rows, cols, density, dtype).copy()
    full = sparse(rows, cols, 1.0, dtype, seed=1)
    dense[::7] = full[::7]
    dense[3::11] = 0
    dense[5::13, : cols // 2 + 9] = 0
    dense[6::17, 40:-3] = 0
    return dense


@jax.jit
def multiply(matrix, x):
    """The product, by the kernel."""
    return matmul.matmul(
        matrix.values,
        x,
        matrix.codes,
        matrix.row_offsets,
        matrix.starts,
        shape=matrix.shape,
        encoding=matrix.encoding,
        lanes=matrix.lanes,
        stored=matrix.stored,
    )


def executed(matrix, plan, vocabulary=emulation.NumpyLanes):
    """The vocabulary after the program that decodes tiles, for all blocks of a plan."""
    ops = vocabulary(
        arrays_of(matrix, "values", "codes", "row_offsets", "starts"),
        blocks=plan.clusters * tiles.PEERS,
        threads=tiles.THREADS,
        cluster=tiles.PEERS,
        shared_slots=tiles.STEPS * tiles.ROWS * tiles.COLUMNS // 2,
        rings={"ring": tiles.Ring(plan.matrix).size},
    )
    tiles.program(ops, plan)
    return ops


def decoded(matrix, vectors, clusters):
    """The matrix, put together from the tiles in the shared memory of all clusters' blocks."""
    plan = matmul.Plan(abstract(matrix), vectors, clusters)
    most = max(plan.first(c + 1) - plan.first(c) for c in range(clusters))
    assert most <= tiles.STEPS, "a place is used twice, and the emulation does not wait"
    ops, tile_halves = executed(matrix, plan), tiles.ROWS * tiles.COLUMNS
    rows, cols = matrix.shape
    out = np.full((plan.tiles // plan.across * tiles.ROWS, cols), np.nan)
    for block in range(clusters * tiles.PEERS):
        first = plan.first(block // tiles.PEERS)
        for step in range(first, plan.first(block // tiles.PEERS + 1)):
            tile, k = divmod(step, plan.steps)
            place = slice((step - first) * tile_halves, (step - first + 1) * tile_halves)
            assert ops._written[block, place].all()
            halves = ops._shared[block, place].view(jnp.dtype(matrix.dtype))
            pieces = halves.reshape(tiles.ROWS, 8, 8)  # of 16 bytes
            row = np.arange(tiles.ROWS)[:, None]
            values = pieces[row, np.arange(8) ^ (row & 7)].reshape(tiles.ROWS, tiles.COLUMNS)
            at = (
                slice(tile // plan.across * tiles.ROWS, (tile // plan.across + 1) * tiles.ROWS),
                slice(plan.column(k), plan.column(k) + tiles.COLUMNS),
            )
            fresh = np.isnan(out[at]).all()
            assert fresh or np.array_equal(out[at], values.astype(np.float64))
            out[at] = values
    assert not out[rows:].any()
    return out[:rows]


@pytest.mark.parametrize("encoding", ["delta4", "delta3", "delta5", "choice"])
@pytest.mark.parametrize(
    "rows,cols,density,lanes,count,clusters",
    [
        (64, 64, 0.5, None, 512, 1),
        (192, 320, 0.3, 8, 300, 2),
        (256, 1088, 0.5, 32, 512, 6),
        (128, 704, 0.02, 1, 512, 3),
        (64, 192, 0.9, 4, 1000, 1),
        (128, 2048, 0.1, 16, 600, 11),
    ],
)
def test_tiles_are_the_matrix(rows, cols, density, lanes, count, clusters, encoding):
    dtype = jnp.bfloat16 if rows == 192 else jnp.float16
    dense = uneven(rows, cols, density, dtype)
    matrix = macko_jax.compress(dense, encoding=encoding, lanes=lanes)
    np.testing.assert_array_equal(decoded(matrix, count, clusters), dense.astype(np.float64))


def test_tiles_of_a_matrix_with_fewer_groups_than_strips():
    matrix = macko_jax.compress(np.eye(64, 128, dtype=np.float16), encoding="delta4", lanes=32)
    np.testing.assert_array_equal(decoded(matrix, 512, 1), np.eye(64, 128))


@given(PLANNED)
def test_every_step_has_a_cluster_and_every_tile_a_last_one(plan):
    first = [plan.first(c) for c in range(plan.clusters + 1)]
    assert first[0] == 0 and first[-1] == plan.tiles * plan.steps
    assert all(a < b for a, b in zip(first, first[1:]))
    for tile in range(plan.tiles):
        step = (tile + 1) * plan.steps - 1
        last = plan.last_cluster(tile)
        assert first[last] <= step < first[last + 1]
    columns = [plan.column(k) for k in range(plan.steps)]
    assert sorted(columns) == list(range(0, plan.matrix.shape[1], tiles.COLUMNS))
    for part in range(tiles.PARTS):  # a thread goes on where it was
        assert all(
            b - a == tiles.COLUMNS
            for a, b in zip(
                columns[part :: tiles.PARTS], columns[part + tiles.PARTS :: tiles.PARTS]
            )
        )


class Recorder(emulation.NumpyLanes):
    """Also keeps what every warp does at barriers: `events` of each warp of the grid."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.events = [[] for _ in range(self._active.size // 32)]

    def _record(self, kind, where, *registers):
        for warp, active in enumerate((where & self._active).reshape(-1, 32)):
            if active.any():
                lane = 32 * warp + int(np.argmax(active))
                self.events[warp].append((kind, *(int(r[lane]) for r in registers)))

    def wait(self, name, index, parity):
        self._record("wait", True, index, parity)

    def make_barrier(self, name, index, arrivals, where):
        self._record("make", where, index, self.integer(arrivals))

    def arrive(self, name, index, peer, where):
        self._record("arrive", where, index, peer)

    def arrive_expecting(self, name, index, size, where):
        self._record("expect", where, index, self.integer(size))

    def send(self, offset, size, name, index, peer, where):
        self._record("send", where, index, peer, self.integer(size))


class Barrier:
    """As `mbarrier` in the PTX manual: a phase ends with all arrivals and all bytes expected."""

    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.bytes = self.phases = 0

    def count(self, arrivals=0, expected=0, sent=0):
        self.bytes += expected - sent
        self.pending -= arrivals
        assert self.pending >= 0
        if self.pending == self.bytes == 0:
            self.phases, self.pending = self.phases + 1, self.arrivals

    def opens(self, parity):
        return self.phases % 2 != parity


@pytest.mark.parametrize(
    "rows,cols,seed",
    [(128, 64 * 40, 0), (640, 64 * 7, 1), (384, 64 * 5, 2), (1280, 64, 3), (256, 64 * 13, 4)],
)
def test_barriers_keep_steps_apart(rows, cols, seed):
    """What decoding and multiplying warps do at barriers, in any order, for one cluster."""
    matrix = macko_jax.compress(sparse(rows, cols, 0.1, jnp.float16), encoding="delta4")
    plan = matmul.Plan(abstract(matrix), 512, 1)
    decoding = executed(matrix, plan, Recorder)
    total, two_blocks = plan.tiles * plan.steps, dict(blocks=2, shared_slots=0)
    multiplying = Recorder({}, threads=2 * tiles.THREADS, **two_blocks)
    for step in range(total):
        tiles.wait_for(multiplying, multiplying.integer(step))
        tiles.free(multiplying, multiplying.integer(step))
    made = Recorder({}, threads=32, **two_blocks)
    tiles.make_barriers(made, 2)
    barriers = [{index: Barrier(n) for _, index, n in events} for events in made.events]

    actors = {
        ("decode", warp // 4, warp % 4): iter(events) for warp, events in enumerate(decoding.events)
    }
    actors |= {
        ("multiply", warp // 8, warp % 8 // 4): iter(events)
        for warp, events in enumerate(multiplying.events)
        if warp % 4 == 0
    }
    steps = {
        actor: [
            step
            for step in range(total)
            if actor[0] == "multiply" or step % plan.steps % tiles.PARTS == actor[2] // 2
        ]
        for actor in actors
    }
    turn = dict.fromkeys(actors, 0)
    content, freed, sending = {}, dict.fromkeys(actors, -1), []
    ahead = {actor: event for actor, events in actors.items() if (event := next(events, None))}
    rng = np.random.default_rng(seed)
    while ahead or sending:
        ready = [
            actor
            for actor, (kind, *at) in ahead.items()
            if kind != "wait" or barriers[actor[1]][at[0]].opens(at[1])
        ]
        assert ready or sending, "nobody can go on"
        if sending and (not ready or rng.random() < 0.1):
            block, place, step, index, size = sending.pop(rng.integers(len(sending)))
            content[block, place] = step
            barriers[block][index].count(sent=size)
            continue
        actor = ready[rng.integers(len(ready))]
        (job, block, number), (kind, index, *more) = actor, ahead[actor]
        step = steps[actor][turn[actor]]
        slot = step % tiles.STEPS
        mine = slot, block, number % 2  # the lines of a tile that a warp decodes
        if job == "decode" and kind == "wait":
            assert all(freed[a] >= step - tiles.STEPS for a in actors if a[0] == "multiply")
            assert not any(place == mine and at != block for at, place, *_ in sending)
            content[block, mine] = "half done"
        elif job == "decode" and kind == "expect":
            content[block, mine] = step
            barriers[block][index].count(arrivals=1, expected=more[0])
        elif kind == "send":
            sending.append((more[0], mine, step, index, more[1]))
            turn[actor] += 1
        elif kind == "wait":
            halves = [(slot, b, warp) for b in (0, 1) for warp in (0, 1)]
            assert all(content[block, half] == step for half in halves)
        else:
            freed[actor] = step
            barriers[more[0]][index].count(arrivals=1)
            turn[actor] += more[0]  # after having told both blocks
        if event := next(actors[actor], None):
            ahead[actor] = event
        else:
            del ahead[actor]
    assert all(turn[actor] == len(steps[actor]) for actor in actors)


def test_results_are_transposed_into_swizzled_lines():
    """What lane l writes of the matrices that `stmatrix` transposes lies where copies expect it."""
    written = set()
    for warpgroup in range(matmul.MULTIPLYING):
        for thread in range(tiles.THREADS):
            warp, lane = divmod(thread, 32)
            half, block = lane // 8 % 2, lane // 16  # of the warp's 16 rows, of 16 vectors
            line, piece = 8 * block + lane % 8, 2 * warp + half
            expected = (warpgroup * matmul.OUT + line) * 128 + (piece ^ line % 8) * 16
            assert matmul.transposed_place(thread, warpgroup) == expected
            written.add(expected)
    assert len(written) == matmul.MULTIPLYING * tiles.THREADS


def lowered(rows=8448, density=0.3, count=512, dtype=jnp.float16, encoding="delta4"):
    matrix = macko_jax.compress(sparse(rows, 256, density, jnp.float16), encoding=encoding)
    product = jax.jit(lambda m, x: macko_jax.spmv(m, x))
    x = jax.ShapeDtypeStruct((count, 256), dtype)
    return product.trace(matrix, x).lower(lowering_platforms=("cuda",)).as_text()


def test_is_chosen_where_it_is_faster():
    assert "dot_general" not in lowered()
    assert "dot_general" not in lowered(count=451, density=0.1)  # and padded
    assert "dot_general" not in lowered(rows=16896, density=0.5)
    for other in (
        dict(rows=8320),
        dict(density=0.5),
        dict(rows=16896, density=0.6),
        dict(count=513),
        dict(count=432),
        dict(dtype=jnp.bfloat16),
        dict(dtype=jnp.float32),
        dict(encoding="banked"),
    ):
        assert "dot_general" in lowered(**other), other


def test_is_chosen_where_it_was_measured_to_be_faster():
    record = pathlib.Path(__file__).parents[1] / "docs/results/ideas_h200.json"
    name = "products that decode their own tiles, codes copied by sixteen bytes"
    for rows, cols, density, encoding, lanes, by_tiles, by_decode, _ in json.loads(
        record.read_text()
    )[name]["rows"]:
        stored = int(1.01 * density * rows * cols)
        matrix = strips.Matrix((rows, cols), encoding, lanes, stored, jnp.dtype("float16"))
        assert matmul.is_faster(matrix, 512) == (by_tiles < by_decode), (rows, cols, density)


def test_explains_why_not():
    known = strips.Matrix((128, 128), "delta4", 32, 8, "float16")
    assert matmul.why_not(known) is None
    for change, said in (
        (dict(dtype="int8"), "16 bits, not int8"),
        (dict(encoding="bitmask"), "bitmask"),
        (dict(shape=(100, 128)), "64, not 100 and 128"),
    ):
        assert said in matmul.why_not(dataclasses.replace(known, **change))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("encoding", ["delta4", "delta3", "delta5", "choice"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "rows,cols,density,count",
    [
        (64, 64, 0.5, 512),
        (192, 320, 0.3, 300),
        (256, 1088, 0.5, 1),
        (1024, 704, 0.02, 511),
        (4096, 4096, 0.1, 512),
        (128, 2048, 0.9, 1300),
        (8448, 4096, 0.3, 512),
    ],
)
def test_on_gpu(rows, cols, density, count, dtype, encoding):
    dense = uneven(rows, cols, density, dtype)
    matrix, x = macko_jax.compress(dense, encoding=encoding), vectors(count, cols, dtype=dtype)
    y = np.asarray(multiply(matrix, x)).astype(np.float32)
    assert y.shape == (count, rows)
    wide, x_wide = jnp.asarray(dense, jnp.float32), jnp.asarray(x, jnp.float32)
    exact = np.asarray(jnp.matmul(x_wide, wide.T, precision="highest"))
    size = np.asarray(jnp.matmul(jnp.abs(x_wide), jnp.abs(wide.T), precision="highest"))
    # Sums of exact products in float32, those of the comparison too, and one rounding at the end,
    # which is as coarse below the smallest normal number as at it.
    info = jnp.finfo(dtype)
    rounding = float(info.eps) * np.maximum(np.abs(exact), float(info.smallest_normal))
    bound = 2 * (cols + 2) * 2.0**-24 * size + rounding
    assert np.all(np.abs(y - exact) <= bound)
    np.testing.assert_array_equal(y, np.asarray(multiply(matrix, x)).astype(np.float32))
