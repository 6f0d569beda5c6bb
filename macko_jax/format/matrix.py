"""The MACKO matrix on the device: its arrays, their invariants, packing and unpacking."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax.format import layout, quantization
from macko_jax.format import pack as packing
from macko_jax.format import unpack as positions
from macko_jax.format.layout import GROUP, WORD
from macko_jax.format.pack import ENCODINGS, LANES

DTYPES = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32))
QUANTIZED = tuple(quantization.LARGEST)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "codes", "row_offsets", "starts", "scales"),
    meta_fields=("shape", "encoding", "lanes"),
)
@dataclasses.dataclass(frozen=True)
class MackoMatrix:
    """A sparse matrix [rows, cols] in a MACKO layout for GPUs; a pytree. Made by `compress`.

    The stored elements lie in groups of eight, and every row begins a group. `values` alone, or
    `scales`, is differentiated. The encoding says where the elements sit: "bitmask" has a bit for
    every column; "delta4" has four bits for every element, the number of zeros skipped before it,
    and stores an explicit zero for every 16 of a longer gap, as the paper does; "delta5" five
    bits, and a zero for every 32, which is smaller below 0.17; "two_bank" three bits, with a zero
    for every 8, and a bit that says from which of two copies of x a GPU reads, see two_bank.py. The row's groups are cut in column
    order into `lanes` contiguous chunks, the first ones a group longer where they do not divide
    evenly, and the chunks are interleaved: slot t * lanes + l of the row's groups is the t-th group
    of lane l. So the lanes of a GPU read neighbouring addresses.

    Invariants (checked by `validate`):
      - elements are in column order within a chunk, and the slots that fill up a row's last group
        hold zero (delta 0);
      - starts[r, l] is the column after the last element before lane l's chunk, 0 for the first
        chunk, `cols` for an empty one;
      - groups beyond row_offsets[-1] are spare room and never read.
    But in a "bitmask", a slot that holds zero counts as padding: it stays zero in training. A
    "bitmask" keeps the structure whatever the values.

    Any leaf may carry the same leading axes (a stack of matrices, for `vmap` and `scan`).

    Attributes:
      values: [8 * groups] float16, bfloat16 or float32; or int8 or float8_e4m3fn, times `scales`.
      codes: uint32; bitmask: [rows * ceil(cols / 32)], bit b of a row's word w is column 32 w + b;
        delta4: [groups], eight deltas in order from the low bits; two_bank: the same, the highest
        bit of the four is the choice, which no product depends on. delta5: uint8
        [5 * groups], the low four bits of every group's deltas as in delta4, then a byte of their
        highest bits for each group, those of elements 0, 2, 4, 6 below those of 1, 3, 5, 7.
      row_offsets: [rows + 1] int32, each row's first group.
      starts: [rows, lanes] uint16, uint32 for more than 65535 columns.
      shape: (rows, cols).
      encoding: "bitmask", "delta4", "delta5" or "two_bank".
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
    def dtype(self):
        """Type of the matrix's elements: of the values, or of the scales of 8-bit values."""
        return (self.values if self.scales is None else self.scales).dtype

    @property
    def stored(self) -> int:
        """Number of slots of one matrix, elements and padding: the length of `values`."""
        return self.values.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def nnz(self) -> int:
        """Number of elements kept, of all matrices of a stack; needs concrete arrays.

        In "bitmask" by structure; else the slots that do not hold zero.
        """
        array = self.codes if self.encoding == "bitmask" else self.values
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                "nnz and density of a MackoMatrix depend on the contents of its arrays, which are "
                "not known while tracing (jit, vmap, grad). Read them outside and close over them"
            )
        if self.encoding == "bitmask":
            return int(np.bitwise_count(np.asarray(array)).sum(dtype=np.int64))
        return int(np.count_nonzero(np.asarray(array)))

    @property
    def density(self) -> float:
        """nnz over the number of positions."""
        stack = int(np.prod(self.values.shape[:-1], dtype=np.int64))
        return self.nnz / max(1, stack * self.shape[0] * self.shape[1])

    def __repr__(self) -> str:
        kind = getattr(self.values, "dtype", type(self.values).__name__)
        return (
            f"MackoMatrix(shape={self.shape}, dtype={kind}, encoding={self.encoding!r}, "
            f"lanes={self.lanes}, stored={getattr(self.values, 'shape', ('?',))[-1]})"
        )


def compress(
    weight,
    *,
    dtype=None,
    encoding: str | None = None,
    lanes: int | None = None,
    capacity: packing.Capacity = None,
) -> MackoMatrix:
    """Packs a dense matrix; zeros are dropped.

    NumPy arrays are packed on the host, arrays on an accelerator by jitted code there. +0.0 and
    -0.0 are zeros; NaN, infinities and subnormals are elements.

    Args:
      weight: [rows, cols], float16, bfloat16 or float32; anything that `numpy.asarray` takes.
      dtype: in which the values are stored; None keeps the weight's. int8 and float8_e4m3fn are
        scaled row by row, see `quantization.quantize`. What it rounds to zero is dropped.
      encoding: one of those of `MackoMatrix`; None chooses by measured rules, see
        `packing.choose_encoding`.
      lanes: how many GPU lanes share a row, 1, 2, 4, 8, 16 or 32; None chooses by the number of
        rows and their length, see `packing.choose_lanes`.
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
    if isinstance(weight, jax.core.Tracer):
        raise TypeError(
            "compress needs a concrete array: the sizes of the result depend on where the zeros "
            "are. Call it outside jit, vmap and grad, and pass the MackoMatrix in"
        )
    if not isinstance(weight, jax.Array):
        weight = np.asarray(weight)
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"compress takes {_names(DTYPES)} values, got {weight.dtype}; convert first, for "
            "example with weight.astype('float32')"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"compress takes a matrix [rows, cols], got shape {list(weight.shape)}; reshape it, or "
            "compress a stack one by one with the same capacity"
        )
    if weight.shape[1] > packing.MAX_COLS:
        raise ValueError(
            f"compress takes at most {packing.MAX_COLS} columns, got {weight.shape[1]}; split the "
            "matrix by columns"
        )
    if encoding is not None and encoding not in ENCODINGS:
        raise ValueError(f"encoding must be None or one of {list(ENCODINGS)}, got {encoding!r}")
    if lanes is not None and lanes not in LANES:
        raise ValueError(f"lanes must be None or one of {list(LANES)}, got {lanes!r}")
    scales, dtype = None, jnp.dtype(dtype or weight.dtype)
    if dtype in QUANTIZED:
        weight, scales = quantization.quantize(weight, dtype)
        scales = jnp.asarray(scales)
    elif dtype not in DTYPES:
        raise ValueError(f"dtype must be None, {_names(DTYPES + QUANTIZED)}, got {dtype}")
    elif dtype != weight.dtype:
        weight = weight.astype(dtype)
    arrays, encoding, lanes = packing.pack(weight, encoding, lanes, capacity)
    rows, cols = map(int, weight.shape)
    return MackoMatrix(*map(jnp.asarray, arrays), (rows, cols), encoding, lanes, scales)


@jax.jit
def decompress(matrix: MackoMatrix) -> jax.Array:
    """The dense matrix, exactly.

    Args:
      matrix: a packed matrix, or a stack of them.

    Returns:
      [..., rows, cols] of the values' type.
    """
    if matrix.row_offsets.ndim > 1:
        return jax.vmap(decompress)(matrix)
    dense = positions.decode_dense(
        matrix.values,
        matrix.codes,
        matrix.row_offsets,
        matrix.starts,
        shape=matrix.shape,
        encoding=matrix.encoding,
        lanes=matrix.lanes,
    )
    return dense if matrix.scales is None else quantization.dequantize(dense, matrix.scales)


def validate(matrix: MackoMatrix) -> None:
    """Checks that the arrays of a matrix make one, as read from a file that may be broken.

    After it no product reads out of range. Works on the host, on NumPy or JAX arrays without
    leading axes.

    Raises:
      ValueError: says what is wrong.
    """
    rows, cols = _check_metadata(matrix)
    values, codes, offsets, starts = map(
        np.asarray, (matrix.values, matrix.codes, matrix.row_offsets, matrix.starts)
    )
    if values.dtype not in DTYPES + QUANTIZED:
        raise ValueError(f"values must be {_names(DTYPES + QUANTIZED)}, got {values.dtype}")
    _check_scales(matrix.scales, values.dtype, rows)
    if values.ndim != 1 or values.size % GROUP:
        raise ValueError(f"values must be [8 * groups], got shape {list(values.shape)}")
    groups = values.size // GROUP
    if matrix.encoding == "bitmask":
        codes_of = (rows * layout.words_per_row(cols),), np.uint32
    elif layout.PLANES[matrix.encoding] == layout.ONE_WORD:
        codes_of = (groups,), np.uint32
    else:
        codes_of = (layout.code_bytes(matrix.encoding) * groups,), np.uint8
    for name, array, shape, dtype in (
        ("codes", codes, *codes_of),
        ("row_offsets", offsets, (rows + 1,), np.int32),
        ("starts", starts, (rows, matrix.lanes), layout.start_dtype(cols)),
    ):
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} must be {np.dtype(dtype)} {list(shape)} for a {matrix.encoding} matrix "
                f"[{rows}, {cols}] of {groups} groups and {matrix.lanes} lanes, got {array.dtype} "
                f"{list(array.shape)}"
            )
    count = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or (count < 0).any() or offsets[-1] > groups:
        raise ValueError(
            f"row_offsets must rise from 0 to at most {groups} groups; they go from {offsets[0]} "
            f"to {offsets[-1]}, with {int((count < 0).sum())} decreasing steps"
        )
    bitmask = matrix.encoding == "bitmask"
    check = _check_bitmask if bitmask else functools.partial(_check_deltas, matrix.encoding)
    chunk = layout.lane_chunks(count, matrix.lanes)
    expected = check(values.reshape(-1, GROUP), codes, offsets, count, chunk, cols)
    expected = np.where(chunk < count[:, None], expected, cols)
    if (wrong := (starts != expected).any(axis=1)).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"starts do not agree with the {'bits' if bitmask else 'deltas'}: row {row} has "
            f"{starts[row].tolist()}, its elements say {expected[row].tolist()}"
        )


def _check_scales(scales, dtype, rows: int) -> None:
    if (scales is not None) != (dtype in QUANTIZED):
        raise ValueError(
            f"values of {_names(QUANTIZED)} have scales, others have none; got values "
            f"of {dtype} {'without' if scales is None else 'with'} scales"
        )
    if scales is None:
        return
    scales = np.asarray(scales)
    if scales.shape != (rows,) or scales.dtype not in DTYPES:
        raise ValueError(
            f"scales must be [{rows}] of {_names(DTYPES)}, got {scales.dtype} {list(scales.shape)}"
        )
    if (wrong := ~np.isfinite(scales.astype(np.float32))).any():
        raise ValueError(f"the scale of row {int(wrong.argmax())} is {scales[wrong.argmax()]}")


def _check_metadata(matrix: MackoMatrix) -> tuple[int, int]:
    shape = matrix.shape
    if (
        not isinstance(shape, tuple)
        or len(shape) != 2
        or not all(isinstance(n, int) and n >= 0 for n in shape)
        or shape[1] > packing.MAX_COLS
    ):
        raise ValueError(
            f"shape must be two sizes, with at most {packing.MAX_COLS} columns; got {shape!r}"
        )
    if matrix.encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {list(ENCODINGS)}, got {matrix.encoding!r}")
    if matrix.lanes not in LANES:
        raise ValueError(f"lanes must be one of {list(LANES)}, got {matrix.lanes!r}")
    return shape


def _check_bitmask(values, codes, offsets, count, chunk, cols) -> np.ndarray:
    """Checks bits against row lengths; returns the starts [rows, lanes] that they imply."""
    words = codes.reshape(count.size, layout.words_per_row(cols))
    if cols % WORD and (words[:, -1] >> np.uint32(cols % WORD)).any():
        raise ValueError(f"codes have bits beyond the last of {cols} columns")
    ones = np.bitwise_count(words)
    nnz = ones.sum(axis=1, dtype=np.int64)
    if (wrong := -(-nnz // GROUP) != count).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row} has {nnz[row]} bits set, but row_offsets give it {count[row]} groups of 8"
        )
    _check_tail(values, offsets, count, nnz, chunk)
    # A lane starts after the bit before its first element: that word, and the bit within it.
    inside = (chunk > 0) & (chunk < count[:, None])
    rank = ((np.cumsum(nnz) - nnz)[:, None] + GROUP * chunk - 1)[inside]
    through = np.cumsum(ones, dtype=np.int64)
    word = np.searchsorted(through, rank, side="right")
    bits = np.unpackbits(codes[word].astype("<u4").view(np.uint8), bitorder="little")
    seen = np.cumsum(bits.reshape(-1, WORD), axis=1, dtype=np.uint8)
    sought = rank - through[word] + ones.reshape(-1)[word] + 1
    start = np.zeros_like(chunk)
    start[inside] = word % words.shape[1] * WORD + (seen == sought[:, None]).argmax(axis=1) + 1
    return start


def _check_deltas(encoding, values, codes, offsets, count, chunk, cols) -> np.ndarray:
    """Checks that deltas stay within the columns; returns the starts that they imply.

    Most groups need only the sum of their deltas; those that pass the last column are looked into.
    """
    row = np.repeat(np.arange(count.size), count)
    local = np.arange(row.size) - offsets[row]
    memory = np.empty_like(local)  # index in memory of the groups in column order
    memory[offsets[row] + layout.logical_group(local, count[row], chunk.shape[1])] = np.arange(
        row.size
    )
    parts = tuple(part[memory] for part in layout.split_parts(codes, encoding))
    passed = np.concatenate([[0], np.cumsum(layout.delta_totals(parts, encoding), dtype=np.int64)])
    base = passed[offsets[:-1]]

    [last] = np.nonzero(passed[1:] - base[row] > cols)
    within = np.stack(layout.delta_prefixes(tuple(part[last] for part in parts), encoding), axis=1)
    column = (passed[last] - base[row[last]])[:, None] + within
    beyond = column >= cols
    if (wrong := beyond & (values[memory[last]] != 0)).any():
        slot = np.unravel_index(wrong.argmax(), wrong.shape)
        raise ValueError(
            f"the deltas of row {row[last[slot[0]]]} run to column {column[slot]}; it has {cols}"
        )
    elements = GROUP * count - np.bincount(
        row[last], beyond.sum(axis=1), minlength=count.size
    ).astype(np.int64)
    if (wrong := -(-elements // GROUP) != count).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row} has {elements[row]} elements within its {cols} columns, but row_offsets "
            f"give it {count[row]} groups of 8"
        )
    return passed[offsets[:-1, None] + chunk] - base[:, None]


def _check_tail(values, offsets, count, nnz, chunk) -> None:
    """The slots that fill up a row's last group must hold zero."""
    [rows] = np.nonzero(nnz % GROUP)
    lanes = chunk.shape[1]
    lane = np.minimum(count[rows], lanes) - 1  # of the last group in column order
    turn = count[rows] - 1 - chunk[rows, lane]
    last = values[offsets[rows] + turn * lanes + lane]
    tail = np.arange(GROUP) >= (nnz[rows] % GROUP)[:, None]
    if (wrong := (tail & (last != 0)).any(axis=1)).any():
        row = int(rows[wrong.argmax()])
        raise ValueError(f"row {row} has values other than zero after its {nnz[row]} elements")


def _names(dtypes) -> str:
    return ", ".join(d.name for d in dtypes[:-1]) + f" or {dtypes[-1].name}"
