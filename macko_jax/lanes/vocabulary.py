"""The language of the GPU kernels: what one lane of a warp can say.

A kernel is a *lane program*: a Python function that is called once with an object `ops` of type
`Lanes`, and describes by calls on it what each lane (thread) of the grid does. There are two
implementations: `mosaic.MosaicLanes` emits the program as code of a Pallas Mosaic GPU kernel, and
`interpreter.NumpyLanes` executes it with NumPy, for all lanes of the grid at once, and checks the
demands that are written here. The docstrings of `Lanes` are the specification of both.

- **Registers** hold one 32-bit unsigned integer, one float32, or one truth value a lane; see
  `Register`. What is a Python `int` or `float` in a signature is a constant of the program.
- **Pytrees** of registers are what `select`, `loop` and `branch` take and give: tuples, lists,
  named tuples and registers alone.
- **Memory** is a set of global arrays, each known by the name that the kernel gives it, and one
  array in the shared memory of a block. An index counts elements, an offset counts bytes. Only
  lanes whose `where` holds touch memory; the others may give any index, which is not looked at.
- **Convergence.** Lanes of a warp may take different ways through `loop` and `branch`. Votes,
  `exchange` and `warp_barrier` must be reached by all lanes of a warp or by none, `barrier` by all
  lanes of the block, `cluster_barrier` by all lanes of the cluster.
- **Order.** A lane sees its own writes to shared memory. Other lanes of its warp see them after a
  `warp_barrier`, those of its block after a `barrier`, and blocks of its cluster after a
  `cluster_barrier`. Loads from global memory may be moved across stores to it, so a program must
  not read what it has stored itself; `publish` and loads that are `FRESH` are the exception.
"""

import typing
from collections.abc import Callable

from jax.typing import DTypeLike

LINE = 128  # bytes of a line of the L2 cache

# How `Lanes.load_words` reads global memory.
How = typing.Literal["cached", "stream", "fresh"]
CACHED: How = "cached"  # what other blocks may read again
STREAM: How = "stream"  # what is read once, and then spares the caches
FRESH: How = "fresh"  # what other blocks write meanwhile with `Lanes.publish`


class Register(typing.Protocol):
    """One value a lane: a 32-bit unsigned integer, a float32 or a truth value.

    Both operands of an operator are of the same kind; a Python number on the right becomes a
    constant. Integers are counted modulo 2**32, and `>>`, `//` and comparisons take them as
    unsigned. Integers have all operators, float32 has `+`, `-` and `*` (rounded to nearest), and
    truth values have `&`, `|` and `^`. A comparison gives a truth value.
    """

    def __add__(self, other: typing.Any, /) -> typing.Any: ...
    def __sub__(self, other: typing.Any, /) -> typing.Any: ...
    def __mul__(self, other: typing.Any, /) -> typing.Any: ...
    def __floordiv__(self, other: typing.Any, /) -> typing.Any: ...
    def __and__(self, other: typing.Any, /) -> typing.Any: ...
    def __or__(self, other: typing.Any, /) -> typing.Any: ...
    def __xor__(self, other: typing.Any, /) -> typing.Any: ...
    def __lshift__(self, other: typing.Any, /) -> typing.Any: ...
    def __rshift__(self, other: typing.Any, /) -> typing.Any: ...
    def __lt__(self, other: typing.Any, /) -> typing.Any: ...
    def __ge__(self, other: typing.Any, /) -> typing.Any: ...
    def __eq__(self, other: typing.Any, /) -> typing.Any: ...


R = typing.TypeVar("R", bound=Register)  # the registers of one implementation
State = typing.TypeVar("State")  # a pytree of registers


class Lanes(typing.Protocol[R]):
    """The operations of a lane. Parameters and results of type `R` are registers."""

    # Registers

    def block(self) -> R:
        """The index of the lane's block in the grid."""
        ...

    def thread(self) -> R:
        """The index of the lane in its block. Lanes 32 i to 32 i + 31 are warp i."""
        ...

    def integer(self, number: int) -> R:
        """A constant integer, at least 0 and less than 2**32."""
        ...

    def real(self, number: float) -> R:
        """A constant float32."""
        ...

    def select(self, condition: R, yes: State, no: State) -> State:
        """The pytree `yes` in lanes where the condition holds, and `no` in the others.

        Both have the same structure and are computed in any case.
        """
        ...

    # Arithmetic

    def fma(self, a: R, b: R, c: R) -> R:
        """a * b + c of float32, rounded once."""
        ...

    def maximum(self, a: R, b: R) -> R:
        """The greater of two float32; NaN if one of them is."""
        ...

    def exp2(self, a: R) -> R:
        """2**a within 2 units in the last place; a result below 2**-126 may become 0."""
        ...

    def reciprocal(self, a: R) -> R:
        """1 / a within 1 unit in the last place; a result below 2**-126 may become 0."""
        ...

    def reciprocal_sqrt(self, a: R) -> R:
        """1 / sqrt(a) within 2 units in the last place."""
        ...

    def add_byte(self, word: R, number: int, scale: int, total: R) -> R:
        """total + scale * (byte `number` of the integer `word`), where byte 0 is the lowest.

        It is one instruction where `scale` is at most 255.
        """
        ...

    # Conversions

    def pair(self, word: R, dtype: DTypeLike) -> tuple[R, R]:
        """The two float16 or bfloat16 in a word, the lower half first, as float32."""
        ...

    def four(self, word: R, dtype: DTypeLike) -> list[R]:
        """The four int8 or float8_e4m3fn in a word, the lowest byte first, as float32."""
        ...

    def pack(self, low: R, high: R, dtype: DTypeLike) -> R:
        """The word of two float32 that are rounded to float16 or bfloat16; see `pair`."""
        ...

    def as_word(self, real: R) -> R:
        """The integer with the bits of a float32."""
        ...

    def as_real(self, word: R) -> R:
        """The float32 with the bits of an integer."""
        ...

    # Warp, block and cluster

    def all(self, condition: R) -> R:
        """Whether the condition holds in all lanes of the warp, which must all be here."""
        ...

    def any(self, condition: R) -> R:
        """Whether the condition holds in a lane of the warp. All its lanes must be here."""
        ...

    def exchange(self, value: R, distance: int) -> R:
        """The value of the lane whose index in the warp is this one's xor `distance`.

        The value is an integer or a float32, `distance` is less than 32, and all lanes of the warp
        must be here.
        """
        ...

    def warp_barrier(self) -> None:
        """Waits for all lanes of the warp; they then see each other's writes to shared memory."""
        ...

    def barrier(self) -> None:
        """Waits for all lanes of the block; they then see each other's writes to shared memory."""
        ...

    def cluster_barrier(self) -> None:
        """Waits for all lanes of the cluster, for `load_peer`.

        A block whose shared memory others read must not end before they have, so one comes after
        the last `load_peer`, too.
        """
        ...

    def load_peer(self, offset: R, peer: int) -> R:
        """The float32 at a byte offset, a multiple of 4, in the shared memory of block `peer`.

        Blocks of a cluster are numbered from 0. A `cluster_barrier` comes between write and read.
        """
        ...

    # Global memory

    def load_words(
        self, name: str, index: R, count: int, where: R, *, how: How = CACHED
    ) -> list[R]:
        """The `count` (1, 2 or 4) words from word `index * count` on; 0 where not `where`.

        The array may be of any type, and is read as its bytes. Words that are `FRESH` have in each
        16-bit half what was there before a `publish` or after it. Nothing is said of the order in
        which several publications are seen.
        """
        ...

    def load_integer(self, name: str, index: R) -> R:
        """One element of an array of unsigned integers of at most 32 bits.

        The index must be in range in every lane that is here.
        """
        ...

    def load_small(self, name: str, offset: R, size: int, where: R) -> R:
        """The integer of `size` (1 or 2) bytes at a byte offset, a multiple of `size`.

        The array may be of any type. The bytes are read once, as by `STREAM`; the integer is 0
        where not `where`.
        """
        ...

    def load_real(self, name: str, index: R, where: R) -> R:
        """One element of an array of floats of 16 or 32 bits as float32; 0 where not `where`."""
        ...

    def store_real(self, name: str, index: R, value: R, where: R) -> None:
        """Writes a float32 to an array of floats, rounded to its type.

        No two lanes of the grid may write the same element, here and in the other stores.
        """
        ...

    def store_words(self, name: str, index: R, words: list[R], where: R) -> None:
        """Writes 1, 2 or 4 words from word `index * len(words)` on, to an array of any type."""
        ...

    def store_half(self, name: str, index: R, word: R, where: R) -> None:
        """Writes the lower 16 bits of a word as element `index` of an array of 16-bit elements."""
        ...

    def publish(self, name: str, index: R, value: R, dtype: DTypeLike, where: R) -> None:
        """Writes a float32 as element `index` of a 16-bit array, for other blocks that wait for it.

        It is rounded to `dtype`, float16 or bfloat16. It is never 0xFFFF, a NaN, for which 0xFFFE
        is written, so that this can stand for "not yet there". Loads that are `FRESH` see it in
        the end.
        """
        ...

    def prefetch(self, name: str, index: R, where: R) -> None:
        """Asks for the element of an array to be brought to the L2 cache, and does not wait."""
        ...

    # Shared memory of the block

    def load_shared_words(self, offset: R, count: int) -> list[R]:
        """The `count` (1, 2 or 4) words at a byte offset, a multiple of 4 * count.

        Offsets must be in range, and the words written before, in every lane that is here.
        """
        ...

    def load_shared(self, offset: R, count: int) -> list[R]:
        """The same as `load_shared_words`, as float32."""
        ...

    def load_shared_half(self, offset: R) -> R:
        """The 16 bits at an even byte offset, in the lower half of a word; conditions as above."""
        ...

    def store_shared_words(self, offset: R, words: list[R], where: R) -> None:
        """Writes 1, 2 or 4 words at a byte offset, a multiple of 4 * len(words)."""
        ...

    def store_shared_half(self, offset: R, word: R, where: R) -> None:
        """Writes the lower 16 bits of a word at an even byte offset."""
        ...

    def store_shared(self, index: R, value: R, where: R) -> None:
        """Writes a float32 at the byte offset 4 * index."""
        ...

    # Control flow

    def loop(
        self, condition: Callable[[State], R], body: Callable[[State], State], state: State
    ) -> State:
        """Repeats `state = body(state)` in each lane while `condition(state)` holds there.

        The structure of the state and the kinds of its registers stay the same.
        """
        ...

    def branch(self, condition: R, yes: Callable[[], State], otherwise: State) -> State:
        """`yes()`, executed by lanes where the condition holds, and `otherwise` in the others.

        Both have the same structure.
        """
        ...


def sum_over_lanes(ops: Lanes[R], values: list[R], count: int) -> list[R]:
    """Sums each value over aligned groups of `count` lanes, a power of two, in all their lanes.

    All lanes of the warp must be here.
    """
    distance = count // 2
    while distance:
        values = [value + ops.exchange(value, distance) for value in values]
        distance //= 2
    return values


def prefetch_range(ops: Lanes[R], name: str, first: R | int, end: R, size: int) -> None:
    """Asks for the elements of `size` bytes from `first` up to `end`, one line for each thread."""
    index = ops.thread() * (LINE // size) + first
    ops.prefetch(name, index, index < end)
