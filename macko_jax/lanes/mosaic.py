"""Emits lane programs as MLIR inside a Pallas Mosaic GPU kernel, and runs them on a grid.

`vocabulary.Lanes` says what the operations mean; here is what they become: operations of MLIR's
dialects arith, scf, llvm, nvvm and gpu, and inline PTX for what these lack, which is mostly loads
under a predicate. All use of Mosaic GPU, of its utilities and of MLIR's Python bindings, none of
which is stable, is in this file.
"""

import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf

from macko_jax.format import cards
from macko_jax.format.layout import WARP
from macko_jax.lanes.vocabulary import CACHED, FRESH, STREAM, How, Lanes, State

WARPGROUP = 4  # warps; blocks of Mosaic GPU consist of whole warpgroups
FULL_WARP = 0xFFFFFFFF  # the mask of all lanes of a warp
# The state space and the cache operator of a load in PTX.
LOAD = {CACHED: ".global", STREAM: ".global.cs", FRESH: ".relaxed.gpu.global"}


if cards.named() is not None and hasattr(mosaic_utils, "_infer_arch"):
    # Mosaic GPU asks for the compute capability here, and else emits for the GPU of this process,
    # or for an H200. (That of jax 0.10 emits the same for all, and asks elsewhere.)
    typing.cast(typing.Any, mosaic_utils)._infer_arch = lambda: cards.here().capability


class Register:
    """A `vocabulary.Register`: an SSA value of MLIR's type i32, f32 or i1.

    An integer is kept as a base and a constant offset until their sum is needed, since loads and
    stores take a constant offset for free.
    """

    def __init__(self, base: ir.Value, offset: int = 0):
        self.base, self.offset = base, offset

    @property
    def value(self) -> ir.Value:
        """The SSA value of base and offset together."""
        if not self.offset:
            return self.base
        return arith.addi(self.base, _constant(self.base.type, self.offset))

    def _operand(self, other: "Register | float") -> ir.Value:
        """The SSA value of what is on the right of an operator."""
        if isinstance(other, Register):
            return other.value
        return _constant(self.base.type, other)

    def _apply(self, other, integer: Callable, floating: Callable | None = None):
        """The result of an operation, of which `integer` and `floating` are the two forms."""
        operation = integer
        if isinstance(self.base.type, ir.F32Type):
            if floating is None:
                raise TypeError(f"{integer.__name__} takes integers, not float32")
            operation = floating
        return Register(operation(self.value, self._operand(other)))

    def _compare(self, predicate: arith.CmpIPredicate, other):
        return Register(arith.cmpi(predicate, self.value, self._operand(other)))

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
        return self._compare(arith.CmpIPredicate.ult, other)

    def __ge__(self, other):
        return self._compare(arith.CmpIPredicate.uge, other)

    def __eq__(self, other) -> typing.Any:
        return self._compare(arith.CmpIPredicate.eq, other)


class MosaicLanes:
    """Emits a lane program at the place in a kernel where MLIR's insertion point is.

    Args:
      arrays: name -> (memref, dtype) of the global arrays.
      shared: memref of the shared array.
      block: i32 with the block's index in the grid.
    """

    def __init__(
        self, arrays: dict[str, tuple[ir.Value, DTypeLike]], shared: ir.Value, block: ir.Value
    ):
        self._pointers = {name: mosaic_utils.memref_ptr(ref) for name, (ref, _) in arrays.items()}
        self._dtypes = {name: jnp.dtype(dtype) for name, (_, dtype) in arrays.items()}
        self._shared = mosaic_utils.memref_ptr(shared)
        self._block = Register(block)

    # Registers

    def block(self) -> Register:
        return self._block

    def thread(self) -> Register:
        return Register(mosaic_utils.thread_idx())

    def integer(self, number: int) -> Register:
        return Register(_constant(_integer_type(32), number))

    def real(self, number: float) -> Register:
        return Register(_constant(ir.F32Type.get(), number))

    def select(self, condition: Register, yes: State, no: State) -> State:
        def choose(a, b):
            return Register(arith.select(condition.value, a.value, b.value))

        return jax.tree.map(choose, yes, no)

    # Arithmetic

    def fma(self, a: Register, b: Register, c: Register) -> Register:
        return Register(llvm.intr_fma(a.value, b.value, c.value))

    def maximum(self, a: Register, b: Register) -> Register:
        return Register(arith.maximumf(a.value, b.value))

    def exp2(self, a: Register) -> Register:
        return self._approximate("ex2", a)

    def reciprocal(self, a: Register) -> Register:
        return self._approximate("rcp", a)

    def reciprocal_sqrt(self, a: Register) -> Register:
        return self._approximate("rsqrt", a)

    @staticmethod
    def _approximate(function: str, a):
        text = f"{function}.approx.ftz.f32 $0, $1;"
        [out] = _assembly(text, a.value, results=[ir.F32Type.get()], pure=True)
        return Register(out)

    def add_byte(self, word: Register, number: int, scale: int, total: Register) -> Register:
        if scale > 255:
            return ((word >> (8 * number)) & 0xFF) * scale + total
        # The scalar product of the word's four bytes with four weights, three of which are 0.
        weights = _constant(_integer_type(32), scale << (8 * number))
        [out] = _assembly(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            word.value,
            weights,
            total.value,
            results=[_integer_type(32)],
            pure=True,
        )
        return Register(out)

    # Conversions

    def pair(self, word: Register, dtype: DTypeLike) -> tuple[Register, Register]:
        if dtype == jnp.float16:
            halves = llvm.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), word.value)
            first, second = (
                Register(arith.extf(ir.F32Type.get(), half)) for half in _elements(halves, 2)
            )
            return first, second
        # A bfloat16 is the upper half of a float32.
        return self.as_real(word << 16), self.as_real(word & 0xFFFF0000)

    def four(self, word: Register, dtype: DTypeLike) -> list[Register]:
        if jnp.dtype(dtype) != jnp.int8:
            halves = [self._widen_float8(word), self._widen_float8(word >> 16)]
            return [real for half in halves for real in self.pair(half, jnp.float16)]
        # With the sign bit flipped, a byte is the number plus 128; in the lowest bits of 2**23 it
        # makes a float32 without a conversion.
        biased, out = word ^ 0x80808080, []
        for i in range(4):
            text = f"prmt.b32 $0, $1, 0x4B000000, {0x7440 + i:#x};"
            [bits] = _assembly(text, biased.value, results=[_integer_type(32)], pure=True)
            out.append(self.as_real(Register(bits)) - (2.0**23 + 128))
        return out

    @staticmethod
    def _widen_float8(word):
        """The word of two float16 that equal the two float8_e4m3fn in the lower half of `word`."""
        lower = arith.trunci(_integer_type(16), word.value)
        text = "cvt.rn.f16x2.e4m3x2 $0, $1;"
        [out] = _assembly(text, lower, results=[_integer_type(32)], pure=True)
        return Register(out)

    def pack(self, low: Register, high: Register, dtype: DTypeLike) -> Register:
        kind = _float_type(dtype)

        def bits(real):
            half = arith.bitcast(_integer_type(16), arith.truncf(kind, real.value))
            return Register(arith.extui(_integer_type(32), half))

        first, second = bits(low), bits(high)
        return first | (second << 16)

    def as_word(self, real: Register) -> Register:
        return Register(arith.bitcast(_integer_type(32), real.value))

    def as_real(self, word: Register) -> Register:
        return Register(arith.bitcast(ir.F32Type.get(), word.value))

    # Warp, block and cluster

    def all(self, condition: Register) -> Register:
        return self._vote(condition, nvvm.VoteSyncKind.all)

    def any(self, condition: Register) -> Register:
        return self._vote(condition, nvvm.VoteSyncKind.any)

    @staticmethod
    def _vote(condition, kind: nvvm.VoteSyncKind):
        mask = _constant(_integer_type(32), FULL_WARP)
        return Register(nvvm.vote_sync(mask, condition.value, kind, results=[_integer_type(1)]))

    def exchange(self, value: Register, distance: int) -> Register:
        word = _integer_type(32)
        return Register(
            nvvm.shfl_sync(
                _constant(word, FULL_WARP),
                value.value,
                _constant(word, distance),
                _constant(word, WARP - 1),
                nvvm.ShflKind.bfly,
            )
        )

    def warp_barrier(self) -> None:
        nvvm.bar_warp_sync(_constant(_integer_type(32), FULL_WARP))

    def barrier(self) -> None:
        gpu.barrier()

    def cluster_barrier(self) -> None:
        _assembly(
            "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
            memory=True,
        )

    def load_peer(self, offset: Register, peer: int) -> Register:
        own = llvm.ptrtoint(_integer_type(32), self._shared_byte(offset))
        [out] = _assembly(
            "{.reg .u32 a; mapa.shared::cluster.u32 a, $1, $2; ld.shared::cluster.f32 $0, [a];}",
            own,
            _constant(_integer_type(32), peer),
            results=[ir.F32Type.get()],
            memory=True,
        )
        return Register(out)

    # Global memory. Loads are PTX under a predicate: a branch around each would keep the compiler
    # from having several in flight.

    def load_words(
        self, name: str, index: Register, count: int, where: Register, *, how: How = CACHED
    ) -> list[Register]:
        word = _integer_type(32)
        kind = ir.VectorType.get((count,), word) if count > 1 else word
        place = self._element(name, index, kind)
        names = [f"${i}" for i in range(count)]
        form, listed = (f".v{count}", "{" + ",".join(names) + "}") if count > 1 else ("", "$0")
        preset = "".join(f"mov.u32 {each}, 0x0;" for each in names)
        text = f"{preset} @p ld{LOAD[how]}{form}.b32 {listed}, [${count}];"
        words = _assembly(_predicated(text, count + 1), place, _flag(where), results=[word] * count)
        return [Register(value) for value in words]

    def load_integer(self, name: str, index: Register) -> Register:
        kind = _integer_type(8 * self._dtypes[name].itemsize)
        value = llvm.load(kind, self._element(name, index, kind))
        if kind == _integer_type(32):
            return Register(value)
        return Register(arith.extui(_integer_type(32), value))

    def load_small(self, name: str, offset: Register, size: int, where: Register) -> Register:
        place = self._element(name, offset, _integer_type(8))
        text = _predicated(f"mov.u32 $0, 0; @p ld.global.cs.u{8 * size} $0, [$1];", 2)
        [out] = _assembly(text, place, _flag(where), results=[_integer_type(32)])
        return Register(out)

    def load_real(self, name: str, index: Register, where: Register) -> Register:
        kind, bits = _float_type(self._dtypes[name]), 8 * self._dtypes[name].itemsize
        place = self._element(name, index, kind)
        text = _predicated(f"mov.b{bits} $0, 0; @p ld.global.b{bits} $0, [$1];", 2)
        [loaded] = _assembly(text, place, _flag(where), results=[_integer_type(bits)])
        value = arith.bitcast(kind, loaded)
        return Register(value if bits == 32 else arith.extf(ir.F32Type.get(), value))

    def store_real(self, name: str, index: Register, value: Register, where: Register) -> None:
        kind = _float_type(self._dtypes[name])
        with mosaic_utils.when(where.value):
            rounded = value.value if kind == ir.F32Type.get() else arith.truncf(kind, value.value)
            llvm.store(rounded, self._element(name, index, kind))

    def store_words(
        self, name: str, index: Register, words: list[Register], where: Register
    ) -> None:
        vector = _join(words)
        with mosaic_utils.when(where.value):
            place = self._element(name, index, vector.type)
            llvm.store(vector, place, alignment=4 * len(words))

    def store_half(self, name: str, index: Register, word: Register, where: Register) -> None:
        half = _integer_type(16)
        with mosaic_utils.when(where.value):
            llvm.store(arith.trunci(half, word.value), self._element(name, index, half))

    def publish(
        self, name: str, index: Register, value: Register, dtype: DTypeLike, where: Register
    ) -> None:
        half = _integer_type(16)
        word = arith.bitcast(half, arith.truncf(_float_type(dtype), value.value))
        word = arith.minui(word, arith.constant(half, -2))
        place = self._element(name, index, half)
        text = _predicated("@p st.relaxed.gpu.global.b16 [$0], $1;", 2)
        _assembly(text, place, word, _flag(where), memory=True)

    def prefetch(self, name: str, index: Register, where: Register) -> None:
        kind = _integer_type(8 * self._dtypes[name].itemsize)
        place = self._element(name, index, kind)
        _assembly(_predicated("@p prefetch.global.L2 [$0];", 1), place, _flag(where))

    def _element(self, name: str, index: Register, kind: ir.Type) -> ir.Value:
        """The pointer to element `index` of a global array that is taken as one of type `kind`."""
        return _element_pointer(self._pointers[name], index, kind)

    # Shared memory of the block

    def load_shared_words(self, offset: Register, count: int) -> list[Register]:
        return self._load_shared(_integer_type(32), offset, count)

    def load_shared(self, offset: Register, count: int) -> list[Register]:
        return self._load_shared(ir.F32Type.get(), offset, count)

    def load_shared_half(self, offset: Register) -> Register:
        half = llvm.load(_integer_type(16), self._shared_byte(offset))
        return Register(arith.extui(_integer_type(32), half))

    def _load_shared(self, kind: ir.Type, offset, count: int) -> list[Register]:
        vector = ir.VectorType.get((count,), kind) if count > 1 else kind
        loaded = llvm.load(vector, self._shared_byte(offset), alignment=4 * count)
        values = _elements(loaded, count) if count > 1 else [loaded]
        return [Register(value) for value in values]

    def store_shared_words(self, offset: Register, words: list[Register], where: Register) -> None:
        vector = _join(words)
        with mosaic_utils.when(where.value):
            llvm.store(vector, self._shared_byte(offset), alignment=4 * len(words))

    def store_shared_half(self, offset: Register, word: Register, where: Register) -> None:
        with mosaic_utils.when(where.value):
            half = arith.trunci(_integer_type(16), word.value)
            llvm.store(half, self._shared_byte(offset))

    def store_shared(self, index: Register, value: Register, where: Register) -> None:
        with mosaic_utils.when(where.value):
            llvm.store(value.value, _element_pointer(self._shared, index, ir.F32Type.get()))

    def _shared_byte(self, offset: Register) -> ir.Value:
        """The pointer to a byte of shared memory."""
        return _element_pointer(self._shared, offset, _integer_type(8))

    # Control flow

    def loop(
        self, condition: Callable[[State], Register], body: Callable[[State], State], state: State
    ) -> State:
        leaves, tree = jax.tree.flatten(state)
        kinds = [leaf.value.type for leaf in leaves]
        op = scf.WhileOp(kinds, [leaf.value for leaf in leaves])

        def state_of(block):
            return jax.tree.unflatten(tree, [Register(a) for a in block.arguments])

        before, after = op.before.blocks.append(*kinds), op.after.blocks.append(*kinds)
        with ir.InsertionPoint(before):
            scf.condition(condition(state_of(before)).value, list(before.arguments))
        with ir.InsertionPoint(after):
            scf.yield_([leaf.value for leaf in jax.tree.leaves(body(state_of(after)))])
        return jax.tree.unflatten(tree, [Register(r) for r in op.results])

    def branch(self, condition: Register, yes: Callable[[], State], otherwise: State) -> State:
        leaves, tree = jax.tree.flatten(otherwise)
        op = scf.IfOp(condition.value, [leaf.value.type for leaf in leaves], has_else=True)
        with ir.InsertionPoint(op.then_block):
            scf.yield_([leaf.value for leaf in jax.tree.leaves(yes())])
        with ir.InsertionPoint(op.elseRegion.blocks[0]):
            scf.yield_([leaf.value for leaf in leaves])
        return jax.tree.unflatten(tree, [Register(r) for r in op.results])


# Types, constants and instructions of MLIR


def _integer_type(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)


def _float_type(dtype: DTypeLike) -> ir.Type:
    types = {"float16": ir.F16Type, "bfloat16": ir.BF16Type, "float32": ir.F32Type}
    return types[jnp.dtype(dtype).name].get()


def _constant(kind: ir.Type, number: float) -> ir.Value:
    """A constant of type f32, i32 or i1; integers are taken modulo 2**32."""
    if isinstance(kind, ir.F32Type):
        return arith.constant(kind, float(number))
    number = int(number) & 0xFFFFFFFF
    return arith.constant(kind, number - (1 << 32) if number >> 31 else number)


def _flag(condition: Register) -> ir.Value:
    """A truth value as an i32, since inline PTX takes no i1."""
    return arith.extui(_integer_type(32), condition.value)


def _element_pointer(array: ir.Value, index: Register, kind: ir.Type) -> ir.Value:
    """The pointer to element `index` of an array of elements of type `kind`."""

    def advance(pointer, dynamic: list, static: list):
        return llvm.getelementptr(
            pointer.type,
            pointer,
            dynamic,
            static,
            elem_type=kind,
            no_wrap_flags=llvm.GEPNoWrapFlags.none,
        )

    first = advance(array, [index.base], [mosaic_utils.DYNAMIC32])
    return advance(first, [], [index.offset]) if index.offset else first


def _elements(vector: ir.Value, count: int) -> Iterator[ir.Value]:
    for i in range(count):
        yield llvm.extractelement(vector, _constant(_integer_type(32), i))


def _join(words: list[Register]) -> ir.Value:
    """One word as it is, or several as a vector."""
    if len(words) == 1:
        return words[0].value
    vector = llvm.mlir_undef(ir.VectorType.get((len(words),), _integer_type(32)))
    for i, word in enumerate(words):
        vector = llvm.insertelement(vector, word.value, _constant(_integer_type(32), i))
    return vector


def _predicated(text: str, flag: int) -> str:
    """PTX in which the predicate p says whether the operand ${flag} is not 0."""
    return f"{{.reg .pred p; setp.ne.u32 p, ${flag}, 0; {text}}}"


def _assembly(
    text: str,
    *operands: ir.Value,
    results: Sequence[ir.Type] = (),
    pure: bool = False,
    memory: bool = False,
) -> list[ir.Value]:
    """Inline PTX, in which $0, $1 and so on are the results and, after them, the operands.

    Args:
      text: the instructions.
      operands: pointers, and values of type i16, i32 or f32.
      results: their types.
      pure: whether the compiler may move, merge or drop the instructions as it likes.
      memory: whether it must not move loads and stores across them.

    Returns:
      The results.
    """
    if len(results) > 1:
        kind = llvm.StructType.get_literal(list(results))
    else:
        kind = results[0] if results else ir.Type.parse("!llvm.void")
    constraints = ["=" + _constraint(result) for result in results]
    constraints += [_constraint(operand.type) for operand in operands]
    constraints += ["~{memory}"] * memory
    out = typing.cast(
        ir.Value,
        llvm.inline_asm(
            kind, list(operands), text, ",".join(constraints), has_side_effects=not pure
        ),
    )
    if len(results) > 1:
        return [llvm.extractvalue(result, out, [i]) for i, result in enumerate(results)]
    return [out] if results else []


def _constraint(kind: ir.Type) -> str:
    """The letter for the PTX register that holds a value of a type."""
    if isinstance(kind, ir.F32Type):
        return "f"
    if isinstance(kind, ir.IntegerType):
        return {16: "h", 32: "r"}[kind.width]
    return "l"  # a pointer


# Kernels


def run(
    name: str,
    program: Callable[[Lanes[Register]], None],
    names: Sequence[str],
    operands: Sequence[jax.Array],
    result,
    *,
    blocks: int,
    warps: int,
    shared_slots: int,
    cluster: int = 1,
    changed: Sequence[jax.Array] = (),
) -> typing.Any:
    """Runs a lane program on a grid.

    Args:
      name: the name of the kernel, for profilers.
      program: is called with the operations, and finds all arrays under `names`.
      names: the names of the operands, of the arrays that are changed, and of the results, in this
        order.
      operands: arrays in GPU memory.
      result: a `jax.ShapeDtypeStruct` of the result, or a list of them.
      blocks: how many blocks the grid has, a multiple of `cluster`.
      warps: how many warps a block has, a multiple of `WARPGROUP`.
      shared_slots: how many words of shared memory a block has.
      cluster: how many consecutive blocks, up to 8, run at once and may read each other's shared
        memory.
      changed: arrays that the program reads and writes in place. XLA copies one first that is
        read elsewhere.

    Returns:
      The result or results; where arrays are changed, a pair of that and the list of them.
    """
    dtypes = [a.dtype for a in (*operands, *changed, *jax.tree.leaves(result))]

    def body(*references):
        block = jax.lax.axis_index("block")
        if cluster > 1:
            block = block * cluster + jax.lax.axis_index("peer")

        def with_shared(shared):
            _emit(program, dict(zip(names, zip(references, dtypes))), shared, block)

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
    # Inside `shard_map` results vary over the mesh's axes as the operands do.
    varying = jax.typeof(operands[0]).manual_axis_type
    result = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=varying), result
    )
    in_place = [jax.new_ref(array) for array in changed]
    kernel = pl.kernel(body, out_type=result, mesh=mesh, compiler_params=params, name=name)
    out = kernel(*operands, *in_place)
    return (out, [ref[...] for ref in in_place]) if changed else out


def _emit(program: Callable[[Lanes[Register]], None], arrays: dict, shared, block) -> None:
    """Emits a lane program inside the body of a Pallas kernel.

    Args:
      arrays: name -> (reference, dtype) of the global arrays.
      shared: the reference of the shared array.
      block: the block's index in the grid.
    """
    references = [reference for reference, _ in arrays.values()]

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * (len(arrays) + 1), plgpu.Layout.WG_SPLAT(()))
    )
    def inline(_, *arguments):
        *memory, shared, index = arguments
        typed = {name: (ref, dtype) for ref, (name, (_, dtype)) in zip(memory, arrays.items())}
        program(MosaicLanes(typed, shared, index.registers.item()))

    inline(*references, shared, block)
