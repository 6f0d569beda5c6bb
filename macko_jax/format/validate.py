"""Checks of a matrix whose arrays come from elsewhere, such as a file from a stranger."""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from macko_jax.format import quantization
from macko_jax.format.codes import (
    ENCODINGS,
    ONE_WORD,
    PLANES,
    code_bytes,
    delta_prefixes,
    delta_totals,
    split_parts,
)
from macko_jax.format.layout import (
    GROUP,
    LANES,
    MAX_COLS,
    MAX_STORED,
    WORD,
    lane_chunks,
    logical_group,
    start_dtype,
    words_per_row,
)

DTYPES = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32))
QUANTIZED = tuple(quantization.LARGEST)
AXES = {"values": 1, "codes": 1, "row_offsets": 1, "starts": 2, "scales": 1}  # of one matrix


def validate(matrix) -> None:
    """Checks that the arrays of a matrix, or of a stack, make one: no product reads out of range.

    Works on the host, on NumPy or JAX arrays. What holds of a valid matrix, who relies on it, and
    which function here checks it:

    | invariant | who relies on it | who checks it |
    |---|---|---|
    | allowed shape, encoding, lanes; lanes an int | compilation | `check_metadata` |
    | equal leading axes of all arrays | vmap, scan | `_check_stack` |
    | types and sizes of arrays, fewer than 2**31 slots | addresses | `_check_arrays` |
    | finite scales, for 8-bit values alone | scaled products | `_check_scales` |
    | row_offsets rise from 0 to at most the groups | loads of groups | `_check_offsets` |
    | bits lie within the columns and fill the groups | gathers of x | `_check_bitmask` |
    | padding of a bitmask holds zero | derivatives by values | `_check_tail` |
    | elements lie within the columns and fill the groups | gathers of x | `_check_deltas` |
    | slots past the columns hold zero with delta 0 | gathers of x | `_check_deltas` |
    | starts are the columns where lane chunks begin | walks of rows | `_check_starts` |

    Delta 0 keeps those slots less than a group past the columns; kernels have room for no more.
    Groups beyond row_offsets[-1] are spare room and never read; the bits that choose a bank in
    "two_bank" may be any.

    Args:
      matrix: a `MackoMatrix`, or a stack of them.

    Raises:
      ValueError: says what is wrong.
    """
    check_metadata(matrix.shape, matrix.encoding, matrix.lanes)
    leading = _check_stack(matrix)
    matrix = jax.tree.map(np.asarray, matrix)
    for index in np.ndindex(*leading):
        _check_one(jax.tree.map(operator.itemgetter(index), matrix))


def check_lanes(lanes) -> None:
    """Raises a ValueError unless `lanes` is a number of lanes that may share a row."""
    if type(lanes) is not int or lanes not in LANES:
        raise ValueError(f"lanes must be an integer, one of {list(LANES)}, got {lanes!r}")


def name_dtypes(dtypes) -> str:
    """The names of types as a list in a sentence."""
    return ", ".join(d.name for d in dtypes[:-1]) + f" or {dtypes[-1].name}"


def check_metadata(shape, encoding, lanes) -> None:
    """Raises a ValueError unless a matrix may have this shape, encoding and number of lanes."""
    if (
        not isinstance(shape, tuple)
        or len(shape) != 2
        or not all(type(n) is int and n >= 0 for n in shape)
        or shape[1] > MAX_COLS
    ):
        raise ValueError(f"shape must be two sizes, with at most {MAX_COLS} columns; got {shape!r}")
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {list(ENCODINGS)}, got {encoding!r}")
    check_lanes(lanes)


def _check_stack(matrix) -> tuple[int, ...]:
    """The leading axes, which all arrays must have in common."""
    shapes = {
        name: np.shape(array) for name in AXES if (array := getattr(matrix, name)) is not None
    }
    leading = {name: shape[: max(0, len(shape) - AXES[name])] for name, shape in shapes.items()}
    if len(set(leading.values())) > 1 or any(len(s) < AXES[n] for n, s in shapes.items()):
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            "all arrays of a stack must have the same leading axes, before two axes of starts and "
            f"one of each other array; got {found}"
        )
    return leading["values"]


def _check_one(matrix) -> None:
    """Checks one matrix with NumPy arrays and checked metadata."""
    _check_arrays(matrix)
    _check_scales(matrix.scales, matrix.values.dtype, matrix.shape[0])
    count = _check_offsets(matrix.row_offsets, matrix.stored // GROUP)
    check = _check_bitmask if matrix.encoding == "bitmask" else _check_deltas
    chunk = lane_chunks(count, matrix.lanes)
    _check_starts(matrix, count, chunk, check(matrix, count, chunk))


def _check_arrays(matrix) -> None:
    """Checks types and sizes of all arrays but the scales."""
    rows, cols = matrix.shape
    values, encoding = matrix.values, matrix.encoding
    if values.dtype not in DTYPES + QUANTIZED:
        raise ValueError(f"values must be {name_dtypes(DTYPES + QUANTIZED)}, got {values.dtype}")
    if values.size > MAX_STORED:
        raise ValueError(
            f"values has {values.size} slots; at most {MAX_STORED} fit 32-bit offsets. Split the "
            "matrix by rows"
        )
    if values.size % GROUP:
        raise ValueError(f"values must be [8 * groups], got shape {list(values.shape)}")
    groups = values.size // GROUP
    code_type = np.dtype(np.uint32)
    if encoding == "bitmask":
        codes = rows * words_per_row(cols)
    elif PLANES[encoding] == ONE_WORD:
        codes = groups
    else:
        codes, code_type = code_bytes(encoding) * groups, np.dtype(np.uint8)
    expected = {
        "codes": ((codes,), code_type),
        "row_offsets": ((rows + 1,), np.dtype(np.int32)),
        "starts": ((rows, matrix.lanes), start_dtype(cols)),
    }
    for name, (shape, dtype) in expected.items():
        array = getattr(matrix, name)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} for a {encoding} matrix "
                f"[{rows}, {cols}] of {groups} groups and {matrix.lanes} lanes, got {array.dtype} "
                f"{list(array.shape)}"
            )


def _check_scales(scales, dtype, rows: int) -> None:
    if (scales is not None) != (dtype in QUANTIZED):
        raise ValueError(
            f"values of {name_dtypes(QUANTIZED)} have scales, others have none; got values "
            f"of {dtype} {'without' if scales is None else 'with'} scales"
        )
    if scales is None:
        return
    if scales.shape != (rows,) or scales.dtype not in DTYPES:
        raise ValueError(
            f"scales must be [{rows}] of {name_dtypes(DTYPES)}, got {scales.dtype} "
            f"{list(scales.shape)}"
        )
    if (wrong := ~np.isfinite(scales.astype(np.float32))).any():
        raise ValueError(f"the scale of row {int(wrong.argmax())} is {scales[wrong.argmax()]}")


def _check_offsets(offsets, groups: int) -> np.ndarray:
    """Returns the number of groups of each row, [rows] int64."""
    count = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or (count < 0).any() or offsets[-1] > groups:
        raise ValueError(
            f"row_offsets must rise from 0 to at most {groups} groups; they go from {offsets[0]} "
            f"to {offsets[-1]}, with {int((count < 0).sum())} decreasing steps"
        )
    return count


def _check_starts(matrix, count, chunk, column) -> None:
    """Checks starts; `column` [rows, lanes] says where lane chunks that are not empty begin."""
    expected = np.where(chunk < count[:, None], column, matrix.shape[1])
    if (wrong := (matrix.starts != expected).any(axis=1)).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"starts do not agree with the codes: row {row} has {matrix.starts[row].tolist()}, its "
            f"elements say {expected[row].tolist()}"
        )


def _check_bitmask(matrix, count, chunk) -> np.ndarray:
    """Checks bits against row lengths; returns the starts [rows, lanes] that they imply."""
    cols = matrix.shape[1]
    words = matrix.codes.reshape(count.size, words_per_row(cols))
    if cols % WORD and (words[:, -1] >> np.uint32(cols % WORD)).any():
        raise ValueError(f"codes have bits beyond the last of {cols} columns")
    ones = np.bitwise_count(words)
    nnz = ones.sum(axis=1, dtype=np.int64)
    if (wrong := -(-nnz // GROUP) != count).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row} has {nnz[row]} bits set, but row_offsets give it {count[row]} groups of 8"
        )
    _check_tail(matrix, count, nnz, chunk)
    # A lane starts after the bit before its first element: that word, and the bit within it.
    inside = (chunk > 0) & (chunk < count[:, None])
    rank = ((np.cumsum(nnz) - nnz)[:, None] + GROUP * chunk - 1)[inside]
    through = np.cumsum(ones, dtype=np.int64)
    word = np.searchsorted(through, rank, side="right")
    bits = np.unpackbits(matrix.codes[word].astype("<u4").view(np.uint8), bitorder="little")
    seen = np.cumsum(bits.reshape(-1, WORD), axis=1, dtype=np.uint8)
    sought = rank - through[word] + ones.reshape(-1)[word] + 1
    start = np.zeros_like(chunk)
    start[inside] = word % words.shape[1] * WORD + (seen == sought[:, None]).argmax(axis=1) + 1
    return start


def _check_tail(matrix, count, nnz, chunk) -> None:
    """Checks that the slots that fill up a row's last group hold zero."""
    [rows] = np.nonzero(nnz % GROUP)
    lanes = chunk.shape[1]
    lane = np.minimum(count[rows], lanes) - 1  # of the last group in column order
    turn = count[rows] - 1 - chunk[rows, lane]
    last = matrix.values.reshape(-1, GROUP)[matrix.row_offsets[rows] + turn * lanes + lane]
    tail = np.arange(GROUP) >= (nnz[rows] % GROUP)[:, None]
    if (wrong := (tail & (last != 0)).any(axis=1)).any():
        row = int(rows[wrong.argmax()])
        raise ValueError(f"row {row} has values other than zero after its {nnz[row]} elements")


def _check_deltas(matrix, count, chunk) -> np.ndarray:
    """Checks that deltas stay within the columns; returns the starts that they imply.

    Most groups need only the sum of their deltas; those that pass the last column are looked into.
    """
    offsets, encoding, cols = matrix.row_offsets, matrix.encoding, matrix.shape[1]
    row = np.repeat(np.arange(count.size), count)
    memory = _memory_order(offsets, count, row, matrix.lanes)
    parts = tuple(part[memory] for part in split_parts(matrix.codes, encoding))
    passed = np.concatenate([[0], np.cumsum(delta_totals(parts, encoding), dtype=np.int64)])
    base = passed[offsets[:-1]]

    [last] = np.nonzero(passed[1:] - base[row] > cols)
    within = np.stack(delta_prefixes(tuple(part[last] for part in parts), encoding), axis=1)
    column = (passed[last] - base[row[last]])[:, None] + within
    beyond = column >= cols
    value = matrix.values.reshape(-1, GROUP)[memory[last]]
    if (wrong := beyond & (value != 0)).any():
        slot = np.unravel_index(wrong.argmax(), wrong.shape)
        raise ValueError(
            f"the deltas of row {row[last[slot[0]]]} run to column {column[slot]}; it has {cols}"
        )
    if (wrong := beyond & (np.diff(within, prepend=-1) != 1)).any():
        slot = np.unravel_index(wrong.argmax(), wrong.shape)
        raise ValueError(
            f"row {row[last[slot[0]]]} has a slot past its {cols} columns whose delta is not 0, at "
            f"column {column[slot]}; slots that fill up a row have delta 0"
        )
    outside = np.bincount(row[last], beyond.sum(axis=1), minlength=count.size)
    elements = GROUP * count - outside.astype(np.int64)
    if (wrong := -(-elements // GROUP) != count).any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row} has {elements[row]} elements within its {cols} columns, but row_offsets "
            f"give it {count[row]} groups of 8"
        )
    return passed[offsets[:-1, None] + chunk] - base[:, None]


def _memory_order(offsets, count, row, lanes: int) -> np.ndarray:
    """For every group in column order, its index in memory, [groups]."""
    local = np.arange(row.size) - offsets[row]
    memory = np.empty_like(local)
    memory[offsets[row] + logical_group(local, count[row], lanes)] = np.arange(row.size)
    return memory
