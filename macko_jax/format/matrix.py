"""The MACKO matrix on the device: `MackoMatrix`, `compress` and `decompress`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from macko_jax.format import quantization
from macko_jax.format.codes import ENCODINGS
from macko_jax.format.layout import MAX_COLS, Layout, Positions
from macko_jax.format.operators import PackedMatrix
from macko_jax.format.pack import Capacity, pack
from macko_jax.format.promotion import own_promotion
from macko_jax.format.rows import take_rows
from macko_jax.format.unpack import densify
from macko_jax.format.validate import DTYPES, QUANTIZED, check_lanes, name_dtypes, validate

__all__ = ["DTYPES", "QUANTIZED", "MackoMatrix", "compress", "decompress", "validate"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "codes", "row_offsets", "starts", "scales"),
    meta_fields=("shape", "encoding", "lanes"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class MackoMatrix(PackedMatrix):
    """A sparse matrix [rows, cols] in a MACKO layout for GPUs; a pytree, made by `compress`.

    A matrix is an array of values and what says where each of them sits. Values lie in *slots*,
    eight of which make a *group*; every row begins a group, and zeros fill up its last one. The
    groups of a row are cut in column order into `lanes` contiguous *lane chunks*, the first ones a
    group longer where they do not divide evenly, and the chunks are interleaved in memory: group
    t * lanes + l of a row is the t-th one of lane l. So the lanes of a GPU read neighbouring
    addresses. Products differentiate by `values`, or by `scales` where values have 8 bits.

    Encodings, by what `codes` holds:

      - "delta4", uint32 [groups]: for each slot a nibble, the first one lowest, with the number of
        columns skipped since the slot before. Every 16th zero of a gap is stored, with value 0.
      - "delta5", uint8 [5 * groups]: five bits for each slot, so that every 32nd zero of a gap is
        stored. A word of low nibbles for every group, as in "delta4", and after all of these a byte
        of the fifth bits for every group, elements 0, 2, 4, 6 below 1, 3, 5, 7. The smallest one
        below a density of 0.17.
      - "two_bank", uint32 [groups]: nibbles of a three-bit delta, so that every 8th zero of a gap
        is stored, and above it a bit that says from which of two copies of x a GPU reads, see
        two_bank.py; no result depends on that bit. The fastest one for dense rows.
      - "bitmask", uint32 [rows * ceil(cols / 32)]: bit b of a row's word w is set where column
        32 w + b is stored. For XLA, on CPUs above all; GPU kernels do not read it.

    Invariants, which `validate` checks:

      - elements are in column order within a chunk; slots that fill up a row hold zero, delta 0;
      - starts[r, l] is the column after the last element before lane l's chunk, 0 for the first
        chunk, `cols` for an empty one;
      - groups beyond row_offsets[-1] are spare room and never read.

    A slot that holds zero counts as padding, and stays zero in training; but a "bitmask" keeps its
    structure whatever the values are. All leaves may carry the same leading axes, which makes a
    stack of matrices for `vmap` and `scan`.

    Attributes:
      values: [8 * groups] float16, bfloat16 or float32; or int8 or float8_e4m3fn, times `scales`.
      codes: where the elements sit, as above.
      row_offsets: [rows + 1] int32, each row's first group.
      starts: [rows, lanes] uint16, uint32 for more than 65535 columns.
      shape: (rows, cols).
      encoding: "delta4", "delta5", "two_bank" or "bitmask".
      lanes: 1, 2, 4, 8, 16 or 32.
      scales: [rows] factors of 8-bit values, float16, bfloat16 or float32; None for other values.

    References:
      MACKO: Sparse Matrix-Vector Multiplication for Low Sparsity, arXiv 2511.13061.
    """

    values: jax.Array
    codes: jax.Array
    row_offsets: jax.Array
    starts: jax.Array
    shape: tuple[int, int]
    encoding: str
    lanes: int
    scales: jax.Array | None = None

    @property
    def layout(self) -> Layout:
        """The description that kernels are compiled for."""
        return Layout(self.shape, self.encoding, self.lanes, self.stored)

    @property
    def positions(self) -> Positions:
        """The arrays that say where the values sit."""
        return Positions(self.codes, self.row_offsets, self.starts)

    @property
    def nnz(self) -> int:
        """Number of elements kept, of all matrices of a stack; needs concrete arrays.

        In "bitmask" by structure; else the slots that do not hold zero.
        """
        array = self.codes if self.encoding == "bitmask" else self.values
        if isinstance(array, Tracer):
            raise TypeError(
                "nnz and density of a MackoMatrix depend on the contents of its arrays, which are "
                "not known while tracing (jit, vmap, grad). Read them outside and close over them"
            )
        if self.encoding == "bitmask":
            return int(np.bitwise_count(np.asarray(array)).sum(dtype=np.int64))
        return int(np.count_nonzero(np.asarray(array)))

    def __getitem__(self, index) -> "MackoMatrix":
        """Rows `matrix[start:stop]`, as a matrix; outside of JAX's transformations."""
        if not isinstance(index, slice) or index.step not in (None, 1):
            raise TypeError(
                f"a MackoMatrix gives rows matrix[start:stop], got {index!r}; for anything else "
                "take macko_jax.decompress(matrix)[...]"
            )
        if self.values.ndim > 1:
            raise TypeError(
                "this MackoMatrix is a stack; take one with jax.tree.map(lambda a: a[i], matrix)"
            )
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)):
            raise TypeError(
                "the size of matrix[start:stop] depends on where the zeros are, which is not known "
                "while tracing (jit, vmap, grad); slice outside and pass the MackoMatrix in"
            )
        start, stop, _ = index.indices(self.shape[0])
        return take_rows(self, start, max(start, stop))

    def __repr__(self) -> str:
        kind = getattr(self.values, "dtype", type(self.values).__name__)
        return (
            f"MackoMatrix(shape={self.shape}, dtype={kind}, encoding={self.encoding!r}, "
            f"lanes={self.lanes}, stored={getattr(self.values, 'shape', ('?',))[-1]})"
        )


# Weights of a matrix that is packed on the accelerator where it lies; NumPy packs fewer in less
# time than the programs for their shape take to compile.
WORTH_COMPILING = 1 << 22


def compress(
    weight,
    *,
    dtype=None,
    encoding: str | None = None,
    lanes: int | None = None,
    capacity: Capacity = None,
) -> MackoMatrix:
    """Packs a dense matrix; zeros are dropped.

    NumPy arrays are packed on the host, and so are small arrays on an accelerator; large ones by
    jitted code there. +0.0 and -0.0 are zeros; NaN, infinities and subnormals are elements.

    Args:
      weight: [rows, cols], float16, bfloat16 or float32; anything that `numpy.asarray` takes, or
        a sparse matrix of SciPy or of `jax.experimental.sparse`, which is made dense first.
      dtype: in which the values are stored; None keeps the weight's. int8 and float8_e4m3fn are
        scaled row by row, see `quantization.quantize`. What it rounds to zero is dropped.
      encoding: one of those of `MackoMatrix`; None chooses by measured rules, see
        `choose.choose_encoding`.
      lanes: how many GPU lanes share a row, 1, 2, 4, 8, 16 or 32; None chooses by the number of
        rows and their length, see `choose.choose_lanes`.
      capacity: room for this many groups of eight, so that matrices with different numbers of
        elements stack; or a function that gives it for how many are needed; None takes just those.

    Returns:
      The packed matrix; `decompress` gives the same matrix back, but for the rounding to `dtype`.

    Raises:
      TypeError: the weight's type is not one of the three, or it is being traced.
      ValueError: the weight is not two-dimensional, an option is out of range, or a weight to be
        scaled is not finite.

    References:
      arXiv 2511.13061, section 3 (the storage format).
    """
    weight = check_weight(weight, "compress")
    encoding = check_layout(encoding, lanes)
    put = _placement(weight)
    if weight.size < WORTH_COMPILING:
        weight = np.asarray(weight)
    weight, scales = stored_values(weight, dtype)
    arrays, encoding, lanes = pack(weight, encoding, lanes, capacity)
    values, codes, row_offsets, starts = map(put, arrays)
    scales = None if scales is None else put(scales)
    rows, cols = map(int, weight.shape)
    return MackoMatrix(values, codes, row_offsets, starts, (rows, cols), encoding, lanes, scales)


def _placement(weight) -> Callable:
    """What puts arrays on the device to which a weight is bound, if it is bound to one."""
    if isinstance(weight, jax.Array) and weight.committed and len(weight.devices()) == 1:
        return functools.partial(jax.device_put, device=next(iter(weight.devices())))
    return jnp.asarray


def check_weight(weight, caller: str):
    """A dense matrix to pack as a NumPy or JAX array; raises as `compress` does."""
    if hasattr(weight, "todense"):
        weight = weight.todense()
    if isinstance(weight, Tracer):
        raise TypeError(
            f"{caller} needs a concrete array: the sizes of the result depend on where the zeros "
            "are. Call it outside jit, vmap and grad, and pass the MackoMatrix in"
        )
    if not isinstance(weight, jax.Array):
        weight = np.asarray(weight)
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"{caller} takes {name_dtypes(DTYPES)} values, got {weight.dtype}; convert first, for "
            "example with weight.astype('float32')"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"{caller} takes a matrix [rows, cols], got shape {list(weight.shape)}; reshape it, or "
            f"{caller} a stack one by one with the same capacity"
        )
    if weight.shape[1] > MAX_COLS:
        raise ValueError(
            f"{caller} takes at most {MAX_COLS} columns, got {weight.shape[1]}; split the "
            "matrix by columns"
        )
    return weight


def check_layout(encoding: str | None, lanes: int | None) -> str | None:
    """The encoding by its name of today; raises ValueError where there is none, or for the lanes.

    The former name of "two_bank" goes with the next version.
    """
    if encoding == "choice":
        message = "the encoding 'choice' is now called 'two_bank'"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        encoding = "two_bank"
    if encoding is not None and encoding not in ENCODINGS:
        raise ValueError(f"encoding must be None or one of {list(ENCODINGS)}, got {encoding!r}")
    if lanes is not None:
        check_lanes(lanes)
    return encoding


def stored_values(weight, dtype):
    """A dense matrix's values as they are stored in a type, and the scales of 8-bit ones."""
    dtype = jnp.dtype(dtype or weight.dtype)
    if dtype in QUANTIZED:
        return quantization.quantize(weight, dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be None, {name_dtypes(DTYPES + QUANTIZED)}, got {dtype}")
    return (weight if dtype == weight.dtype else weight.astype(dtype)), None


def decompress(matrix: MackoMatrix) -> jax.Array:
    """The dense matrix, exactly.

    Args:
      matrix: a packed matrix, or a stack of them.

    Returns:
      [..., rows, cols] of the values' type.
    """
    if not isinstance(matrix, MackoMatrix):
        raise TypeError(
            f"decompress takes a MackoMatrix, got {type(matrix).__name__}; the join() of a "
            "ShardedMatrix gives one"
        )
    return _decompress(matrix)


@jax.jit
@own_promotion()
def dense_values(matrix: MackoMatrix) -> jax.Array:
    """The dense values [..., rows, cols], without the scales of 8-bit ones."""
    if matrix.row_offsets.ndim > 1:
        return jax.vmap(dense_values)(matrix)
    return densify(matrix.layout, matrix.values, matrix.positions)


@jax.jit
@own_promotion()
def _decompress(matrix: MackoMatrix) -> jax.Array:
    if matrix.row_offsets.ndim > 1:
        return jax.vmap(_decompress)(matrix)
    dense = dense_values(matrix)
    return dense if matrix.scales is None else quantization.dequantize(dense, matrix.scales)
