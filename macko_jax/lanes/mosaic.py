"""The lane vocabulary, emitted as MLIR inside a Pallas Mosaic GPU kernel.

A lane program sees registers (one 32-bit integer, float32 or truth value a lane), global arrays,
one shared array of float32, warp votes and shuffles, and structured control flow. Integers are
unsigned. Control flow may differ between warps, and where no vote, shuffle or barrier is inside,
between lanes. Carried state is any pytree of registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf

from macko_jax.format.layout import WARP

WARPGROUP = 4  # warps; the granularity of Mosaic GPU's blocks
FULL_WARP = 0xFFFFFFFF
LINE = 128  # bytes of a line of the L2 cache
# How global memory is read.
CACHED, STREAM, FRESH = ".global", ".global.cs", ".relaxed.gpu.global"


class Register:
    """One lane's SSA value with Python's operators; Python numbers become constants.

    Integers that are added are kept apart until the sum is needed, since loads and stores take a
    constant offset for free.
    """

    def __init__(self, value: ir.Value, offset: int = 0):
        self.base, self.offset = value, offset

    @property
    def value(self) -> ir.Value:
        if not self.offset:
            return self.base
        return arith.addi(self.base, _constant(self.base.type, self.offset))

    def _coerce(self, other):
        if isinstance(other, Register):
            return other
        return Register(_constant(self.base.type, other))

    def _apply(self, other, integer, floating=None):
        operation = floating if isinstance(self.base.type, ir.F32Type) else integer
        return Register(operation(self.value, self._coerce(other).value))

    def _compare(self, predicate, other):
        kind = getattr(arith.CmpIPredicate, predicate)
        return Register(arith.cmpi(kind, self.value, self._coerce(other).value))

    def __add__(self, other):
        if isinstance(other, int) and not isinstance(self.base.type, ir.F32Type):
            return Register(self.base, self.offset + other)
        return self._apply(other, arith.addi, arith.addf)

    def __sub__(self, other):
        return self._apply(other, arith.subi, arith.subf)

    def __mul__(self, other):
        if isinstance(other, int) and self.offset:
            return Register(self.base) * other + self.offset * other
        return self._apply(other, arith.muli, arith.mulf)

    def __floordiv__(self, other):
        return self._apply(other, arith.divui)

    def __and__(self, other):
        return self._apply(other, arith.andi)

    def __or__(self, other):
        return self._apply(other, arith.ori)

    def __xor__(self, other):
        return self._apply(other, arith.xori)

    def __lshift__(self, other):
        return self._apply(other, arith.shli)

    def __rshift__(self, other):
        return self._apply(other, arith.shrui)

    def __lt__(self, other):
        return self._compare("ult", other)

    def __ge__(self, other):
        return self._compare("uge", other)

    def __eq__(self, other):
        return self._compare("eq", other)

    __hash__ = None


def _i1():
    return ir.IntegerType.get_signless(1)


def _i16():
    return ir.IntegerType.get_signless(16)


def _i32():
    return ir.IntegerType.get_signless(32)


def _constant(kind: ir.Type, number) -> ir.Value:
    if isinstance(kind, ir.F32Type):
        return arith.constant(kind, float(number))
    number = int(number) & FULL_WARP
    return arith.constant(kind, number - (1 << 32) if number >> 31 else number)


class MosaicLanes:
    """Emits a lane program for the block that the surrounding kernel runs in.

    Attributes:
      arrays: name -> (memref, dtype) of the global arrays.
      shared: memref of the shared float32 array.
      block: register with the block's index in the grid.
    """

    def __init__(self, arrays, shared, block):
        self._pointers = {name: mosaic.memref_ptr(ref) for name, (ref, _) in arrays.items()}
        self._dtypes = {name: jnp.dtype(dtype) for name, (_, dtype) in arrays.items()}
        self._shared = mosaic.memref_ptr(shared)
        self._block = Register(block)

    # Registers

    def block(self):
        return self._block

    def thread(self):
        return Register(mosaic.thread_idx())

    def integer(self, number):
        return Register(_constant(_i32(), number))

    def real(self, number):
        return Register(_constant(ir.F32Type.get(), number))

    def select(self, condition, yes, no):
        """Of two pytrees of registers, the first where the condition holds."""
        return jax.tree.map(
            lambda a, b: Register(arith.select(condition.value, a.value, b.value)), yes, no
        )

    def fma(self, a, b, c):
        return Register(llvm.intr_fma(a.value, b.value, c.value))

    def maximum(self, a, b):
        return Register(arith.maximumf(a.value, b.value))

    def exp2(self, a):
        """2**a within 2 units in the last place; 0 for very negative a."""
        return self._special("ex2.approx.ftz.f32", a)

    def reciprocal(self, a):
        """1/a within 1 unit in the last place."""
        return self._special("rcp.approx.ftz.f32", a)

    def reciprocal_sqrt(self, a):
        """1/sqrt(a) within 2 units in the last place."""
        return self._special("rsqrt.approx.ftz.f32", a)

    @staticmethod
    def _special(instruction, a):
        return Register(
            llvm.inline_asm(
                ir.F32Type.get(),
                [a.value],
                f"{instruction} $0, $1;",
                "=f,f",
                has_side_effects=False,
            )
        )

    def add_byte(self, word, number, scale, total):
        """total + scale * (byte `number` of word), one instruction where `scale` is at most 255."""
        if scale > 255:
            return ((word >> (8 * number)) & 0xFF) * scale + total
        weights = _constant(_i32(), scale << (8 * number))
        return Register(
            llvm.inline_asm(
                _i32(),
                [word.value, weights, total.value],
                "dp4a.u32.u32 $0, $1, $2, $3;",
                "=r,r,r,r",
                has_side_effects=False,
            )
        )

    def pair(self, word, dtype):
        """The two 16-bit floats of a 32-bit word, the lower half first, as float32."""
        if dtype == jnp.float16:
            halves = llvm.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), word.value)
            return tuple(
                Register(
                    arith.extf(ir.F32Type.get(), llvm.extractelement(halves, _constant(_i32(), i)))
                )
                for i in (0, 1)
            )
        return self.as_real(word << 16), self.as_real(word & 0xFFFF0000)

    def four(self, word, dtype):
        """The four int8 or float8_e4m3fn of a 32-bit word, the lowest first, as float32."""
        if jnp.dtype(dtype) != jnp.int8:
            halves = [self._narrow(word), self._narrow(word >> 16)]
            return [a for half in halves for a in self.pair(half, jnp.float16)]
        # With the sign bit flipped, a byte is the number plus 128; in the lowest bits of 2**23 it
        # makes a float32 without a conversion.
        biased, out = word ^ 0x80808080, []
        for i in range(4):
            bits = llvm.inline_asm(
                _i32(),
                [biased.value],
                f"prmt.b32 $0, $1, 0x4B000000, {0x7440 + i:#x};",
                "=r,r",
                has_side_effects=False,
            )
            out.append(self.as_real(Register(bits)) - (2.0**23 + 128))
        return out

    @staticmethod
    def _narrow(word):
        """Two float8_e4m3fn in the lower half of a word as two float16."""
        return Register(
            llvm.inline_asm(
                _i32(),
                [arith.trunci(_i16(), word.value)],
                "cvt.rn.f16x2.e4m3x2 $0, $1;",
                "=r,h",
                has_side_effects=False,
            )
        )

    def pack(self, low, high, dtype):
        """The 32-bit word of two float32 rounded to a 16-bit type."""
        kind = _float_type(dtype)
        halves = [
            arith.extui(_i32(), arith.bitcast(_i16(), arith.truncf(kind, a.value)))
            for a in (low, high)
        ]
        return Register(halves[0]) | (Register(halves[1]) << 16)

    def as_word(self, real):
        """The bits of a float32."""
        return Register(arith.bitcast(_i32(), real.value))

    def as_real(self, word):
        """The float32 with the bits of `word`."""
        return Register(arith.bitcast(ir.F32Type.get(), word.value))

    # Warp

    def all(self, condition):
        return self._vote(condition, nvvm.VoteSyncKind.all)

    def any(self, condition):
        return self._vote(condition, nvvm.VoteSyncKind.any)

    def _vote(self, condition, kind):
        mask = _constant(_i32(), FULL_WARP)
        return Register(nvvm.vote_sync(mask, condition.value, kind, results=[_i1()]))

    def exchange(self, value, distance):
        """The value of the lane whose index differs by the bit `distance`."""
        return Register(
            nvvm.shfl_sync(
                _constant(_i32(), FULL_WARP),
                value.value,
                _constant(_i32(), distance),
                _constant(_i32(), WARP - 1),
                nvvm.ShflKind.bfly,
            )
        )

    def barrier(self):
        gpu.barrier()

    def warp_barrier(self):
        nvvm.bar_warp_sync(_constant(_i32(), FULL_WARP))

    # Cluster

    def cluster_barrier(self):
        """A barrier of all threads of the cluster's blocks, for their shared memory."""
        act("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;")

    def load_peer(self, offset, peer):
        """The float32 at a byte offset in the shared memory of block `peer` of the cluster."""
        address = llvm.ptrtoint(_i32(), self._shared_at(offset))
        return Register(
            llvm.inline_asm(
                ir.F32Type.get(),
                [address, _constant(_i32(), peer)],
                "{.reg .u32 a; mapa.shared::cluster.u32 a, $1, $2;"
                " ld.shared::cluster.f32 $0, [a];}",
                "=f,r,r,~{memory}",
                has_side_effects=True,
            )
        )

    # Memory

    def load_words(self, name, index, count, where, *, how=CACHED):
        """`count` consecutive 32-bit words at word index `index * count`; 0 where not `where`.

        `how` is `STREAM` for data that is read once, which then spares the caches, and `FRESH` for
        data that other blocks write meanwhile; each 16-bit half is then old or new.
        """
        vector = ir.VectorType.get((count,), _i32()) if count > 1 else _i32()
        address = self._address(self._pointers[name], index, vector)
        form, outs = (f".v{count}", [f"${i}" for i in range(count)]) if count > 1 else ("", ["$0"])
        listed = "{" + ",".join(outs) + "}" if count > 1 else "$0"
        preset = "".join(f"mov.u32 {out}, 0x0;" for out in outs)
        asm = (
            f"{{.reg .pred p; setp.ne.u32 p, ${count + 1}, 0; {preset}"
            f" @p ld{how}{form}.b32 {listed}, [${count}];}}"
        )
        kinds = [_i32()] * count
        result = kinds[0] if count == 1 else llvm.StructType.get_literal(kinds)
        out = llvm.inline_asm(
            result,
            [address, self._flag(where)],
            asm,
            ",".join(["=r"] * count + ["l", "r"]),
            has_side_effects=True,
        )
        if count == 1:
            return [Register(out)]
        return [Register(llvm.extractvalue(_i32(), out, [i])) for i in range(count)]

    def load_integer(self, name, index):
        """One unsigned element of an integer array; the index must be in range."""
        kind = ir.IntegerType.get_signless(8 * self._dtypes[name].itemsize)
        value = llvm.load(kind, self._address(self._pointers[name], index, kind))
        return Register(arith.extui(_i32(), value) if kind != _i32() else value)

    def load_small(self, name, offset, size, where):
        """1 or 2 bytes, read once, at a byte offset of whole `size`s; 0 where not `where`."""
        address = self._address(self._pointers[name], offset, ir.IntegerType.get_signless(8))
        asm = (
            "{.reg .pred p; setp.ne.u32 p, $2, 0; mov.u32 $0, 0;"
            f" @p ld.global.cs.u{8 * size} $0, [$1];}}"
        )
        return Register(
            llvm.inline_asm(
                _i32(), [address, self._flag(where)], asm, "=r,l,r", has_side_effects=True
            )
        )

    def load_real(self, name, index, where):
        """One element of a float array as float32; 0 where not `where`."""
        kind = _float_type(self._dtypes[name])
        address, flag = self._address(self._pointers[name], index, kind), self._flag(where)
        bits = self._dtypes[name].itemsize * 8
        asm = (
            f"{{.reg .pred p; setp.ne.u32 p, $2, 0; mov.b{bits} $0, 0;"
            f" @p ld.global.b{bits} $0, [$1];}}"
        )
        word = _i32() if bits == 32 else _i16()
        loaded = llvm.inline_asm(
            word, [address, flag], asm, f"={'r' if bits == 32 else 'h'},l,r", has_side_effects=True
        )
        value = arith.bitcast(kind, loaded)
        return Register(value if bits == 32 else arith.extf(ir.F32Type.get(), value))

    def store_real(self, name, index, value, where):
        """Writes float32 registers to a float array, rounded to its dtype, where `where` holds."""
        kind = _float_type(self._dtypes[name])
        with mosaic.when(where.value):
            rounded = value.value if kind == ir.F32Type.get() else arith.truncf(kind, value.value)
            llvm.store(rounded, self._address(self._pointers[name], index, kind))

    def publish(self, name, index, value, dtype, where):
        """Writes a float32 as 16 bits of `dtype` for other blocks, which read it meanwhile.

        Never 0xFFFF, which is no number in either type: 0xFFFE stands for it.
        """
        word = arith.bitcast(_i16(), arith.truncf(_float_type(dtype), value.value))
        word = arith.minui(word, arith.constant(_i16(), -2))
        address = self._address(self._pointers[name], index, _i16())
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, word, self._flag(where)],
            "{.reg .pred p; setp.ne.u32 p, $2, 0; @p st.relaxed.gpu.global.b16 [$0], $1;}",
            "l,h,r,~{memory}",
            has_side_effects=True,
        )

    def store_words(self, name, index, words, where):
        """Writes consecutive 32-bit words at word index `index * len(words)`, where told."""
        value, kind = self._vector(words)
        with mosaic.when(where.value):
            llvm.store(
                value, self._address(self._pointers[name], index, kind), alignment=4 * len(words)
            )

    def store_half(self, name, index, word, where):
        """Writes the lower 16 bits of `word` as element `index` of a 16-bit array."""
        with mosaic.when(where.value):
            llvm.store(
                arith.trunci(_i16(), word.value), self._address(self._pointers[name], index, _i16())
            )

    def prefetch(self, name, index, where):
        """Asks for an element of an array to be brought to the L2 cache, and does not wait."""
        kind = ir.IntegerType.get_signless(8 * self._dtypes[name].itemsize)
        address = self._address(self._pointers[name], index, kind)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, self._flag(where)],
            "{.reg .pred p; setp.ne.u32 p, $1, 0; @p prefetch.global.L2 [$0];}",
            "l,r",
            has_side_effects=True,
        )

    # Shared memory, by byte offsets

    def load_shared_words(self, offset, count):
        """`count` (1, 2 or 4) consecutive 32-bit words at an offset of whole `count`s."""
        return [Register(r) for r in self._load_shared(_i32(), offset, count)]

    def load_shared(self, offset, count):
        """The same as float32."""
        return [Register(r) for r in self._load_shared(ir.F32Type.get(), offset, count)]

    def _load_shared(self, kind, offset, count):
        return _load(self._shared_at(offset), kind, count)

    def store_shared_words(self, offset, words, where):
        """Writes 1, 2 or 4 words at an offset that is a multiple of their bytes."""
        value, _ = self._vector(words)
        with mosaic.when(where.value):
            llvm.store(value, self._shared_at(offset), alignment=4 * len(words))

    def store_shared_half(self, offset, word, where):
        """Writes the lower 16 bits of `word` at an even offset."""
        with mosaic.when(where.value):
            llvm.store(arith.trunci(_i16(), word.value), self._shared_at(offset))

    def store_shared(self, index, value, where):
        """Writes a float32 at the offset 4 * index."""
        with mosaic.when(where.value):
            llvm.store(value.value, self._address(self._shared, index, ir.F32Type.get()))

    def _shared_at(self, offset):
        byte = ir.IntegerType.get_signless(8)
        return self._address(self._shared, offset, byte)

    @staticmethod
    def _vector(words):
        if len(words) == 1:
            return words[0].value, _i32()
        kind = ir.VectorType.get((len(words),), _i32())
        vector = llvm.mlir_undef(kind)
        for i, word in enumerate(words):
            vector = llvm.insertelement(vector, word.value, _constant(_i32(), i))
        return vector, kind

    @staticmethod
    def _flag(condition):
        return arith.extui(_i32(), condition.value)

    @staticmethod
    def _address(pointer, index, kind):
        return address(pointer, index, kind)

    # Control flow

    def loop(self, condition, body, state):
        """Repeats `state = body(state)` while `condition(state)` holds."""
        leaves, tree = jax.tree.flatten(state)
        kinds = [leaf.value.type for leaf in leaves]
        op = scf.WhileOp(kinds, [leaf.value for leaf in leaves])

        def unflatten(block):
            return jax.tree.unflatten(tree, [Register(a) for a in block.arguments])

        before, after = op.before.blocks.append(*kinds), op.after.blocks.append(*kinds)
        with ir.InsertionPoint(before):
            scf.condition(condition(unflatten(before)).value, list(before.arguments))
        with ir.InsertionPoint(after):
            scf.yield_([leaf.value for leaf in jax.tree.leaves(body(unflatten(after)))])
        return jax.tree.unflatten(tree, [Register(r) for r in op.results])

    def branch(self, condition, yes, otherwise):
        """`yes()` where the condition holds, else the state `otherwise`, a like pytree."""
        leaves, tree = jax.tree.flatten(otherwise)
        op = scf.IfOp(condition.value, [leaf.value.type for leaf in leaves], has_else=True)
        with ir.InsertionPoint(op.then_block):
            scf.yield_([leaf.value for leaf in jax.tree.leaves(yes())])
        with ir.InsertionPoint(op.else_block):
            scf.yield_([leaf.value for leaf in leaves])
        return jax.tree.unflatten(tree, [Register(r) for r in op.results])


def act(asm: str, *operands: ir.Value) -> None:
    """An instruction without a result, whose operands are 32-bit integers and pointers."""
    constraints = ["r" if isinstance(a.type, ir.IntegerType) else "l" for a in operands]
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        list(operands),
        asm,
        ",".join([*constraints, "~{memory}"]),
        has_side_effects=True,
    )


def address(pointer: ir.Value, index: Register, kind: ir.Type) -> ir.Value:
    """Of element `index` of an array of the given kind."""
    at = functools.partial(
        llvm.getelementptr, pointer.type, elem_type=kind, no_wrap_flags=llvm.GEPNoWrapFlags.none
    )
    first = at(pointer, [index.base], [mosaic.DYNAMIC32])
    return at(first, [], [index.offset]) if index.offset else first


def _load(address, kind: ir.Type, count: int) -> list:
    """`count` consecutive words of 32 bits."""
    vector = ir.VectorType.get((count,), kind) if count > 1 else kind
    loaded = llvm.load(vector, address, alignment=4 * count)
    if count == 1:
        return [loaded]
    return [llvm.extractelement(loaded, _constant(_i32(), i)) for i in range(count)]


def _float_type(dtype) -> ir.Type:
    return {"float16": ir.F16Type, "bfloat16": ir.BF16Type, "float32": ir.F32Type}[
        jnp.dtype(dtype).name
    ].get()


def sum_over_lanes(ops, values: list, count: int) -> list:
    """Each value added up over `count` neighbouring lanes, a power of two, in all of them."""
    distance = count // 2
    while distance:
        values = [value + ops.exchange(value, distance) for value in values]
        distance //= 2
    return values


def prefetch_range(ops, name, first, end, size: int) -> None:
    """Asks for the elements of `size` bytes from `first` up to `end`, a line for each thread."""
    index = ops.thread() * (LINE // size) + first
    ops.prefetch(name, index, index < end)


def emit(program, arrays, shared, block) -> None:
    """A lane program inside the body of a kernel.

    Args:
      program: called with the vocabulary.
      arrays: name -> (reference, dtype) of the global arrays.
      shared: reference of the shared array.
      block: what the program takes for its block's index.
    """
    refs = [ref for ref, _ in arrays.values()]

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * len(refs), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
    )
    def inline(_, *arguments):
        *memory, shared, index = arguments
        typed = {name: (ref, dtype) for ref, (name, (_, dtype)) in zip(memory, arrays.items())}
        program(MosaicLanes(typed, shared, index.registers.item()))

    inline(*refs, shared, block)


def run(
    name,
    program,
    names,
    operands,
    result,
    *,
    blocks: int,
    warps: int,
    shared_slots: int,
    cluster: int = 1,
    changed=(),
):
    """Runs a lane program on a grid of `blocks` blocks of `warps` warps.

    Args:
      name: of the kernel, for profilers.
      program: called with the vocabulary; finds all arrays under `names`.
      names: of the operands, of the arrays that are changed, and of the results, in this order.
      operands: arrays in GPU memory.
      result: shape and dtype of the result, or a list of them.
      shared_slots: float32 elements of shared memory of a block.
      cluster: consecutive blocks, up to 8, that run together and read each other's shared memory.
      changed: arrays that the program reads and writes in place. XLA copies one first that is
        read elsewhere.

    Returns:
      The result or results; where arrays are changed, a pair of that and the list of them.
    """
    dtypes = [a.dtype for a in (*operands, *changed, *jax.tree.leaves(result))]

    def body(*refs):
        block = jax.lax.axis_index("block")
        if cluster > 1:
            block = block * cluster + jax.lax.axis_index("peer")

        def with_shared(shared):
            arrays = {name: typed for name, *typed in zip(names, refs, dtypes)}
            emit(program, arrays, shared, block)

        pl.run_scoped(
            with_shared, plgpu.SMEM((shared_slots,), jnp.float32), collective_axes="warpgroup"
        )

    mesh = plgpu.Mesh(
        grid=(blocks // cluster,),
        grid_names=("block",),
        num_threads=warps // WARPGROUP,
        thread_name="warpgroup",
        **({"cluster": (cluster,), "cluster_names": ("peer",)} if cluster > 1 else {}),
    )
    params = plgpu.CompilerParams(
        lowering_semantics=mosaic_gpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
    )
    result = results(result, operands[0])
    changed = [jax.new_ref(array) for array in changed]
    kernel = pl.kernel(body, out_type=result, mesh=mesh, compiler_params=params, name=name)
    out = kernel(*operands, *changed)
    return (out, [ref[...] for ref in changed]) if changed else out


def results(of, operand):
    """The types of a kernel's results, which inside `shard_map` vary as all its operands do."""
    varying = jax.typeof(operand).manual_axis_type
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varying), of
    )
