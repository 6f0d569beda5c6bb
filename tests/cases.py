"""One table of matrices for all tests of products and transforms, and slow, plain oracles."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import macko_jax


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix to test with.

    Attributes:
      structure: "random", "empty_rows" (every other row), "gaps" (all elements in the last
        columns), "skewed" (first row dense, the others sparse).
    """

    rows: int
    cols: int
    density: float
    dtype: str = "float32"
    encoding: str = "bitmask"
    lanes: int = 1
    structure: str = "random"

    def __str__(self):
        return (
            f"{self.rows}x{self.cols}-{self.density}-{self.dtype}-{self.encoding}-"
            f"{self.lanes}-{self.structure}"
        )

    def weight(self) -> np.ndarray:
        rng = np.random.default_rng([self.rows, self.cols, int(1000 * self.density)])
        keep = rng.random((self.rows, self.cols)) < self.density
        if self.structure == "empty_rows":
            keep[::2] = False
        if self.structure == "gaps":
            keep[:, : self.cols - 3] = False
        if self.structure == "skewed":
            keep[0] = True
        weight = np.where(keep, rng.standard_normal(keep.shape) + 0.1, 0)
        return weight.astype(jnp.dtype(self.dtype))

    def matrix(self) -> macko_jax.MackoMatrix:
        return macko_jax.compress(self.weight(), encoding=self.encoding, lanes=self.lanes)

    def vectors(self, *batch: int, dtype=None) -> np.ndarray:
        rng = np.random.default_rng(len(batch))
        return rng.standard_normal((*batch, self.cols)).astype(jnp.dtype(dtype or self.dtype))


CASES = (
    Case(1, 1, 1.0),
    Case(1, 1, 0.0, "float16", "delta4"),
    Case(5, 1, 0.5, "bfloat16", "delta4"),
    Case(3, 7, 1.0, "float16", "bitmask", 2),
    Case(16, 96, 0.0, "float32", "bitmask", 4),
    Case(16, 96, 1.0, "float32", "delta4", 4),
    Case(33, 301, 0.5, "float16", "bitmask", 8),
    Case(33, 301, 0.5, "bfloat16", "delta4", 8),
    Case(33, 301, 0.05, "float32", "delta4", 2),
    Case(33, 301, 0.05, "bfloat16", "bitmask", 4),
    Case(40, 256, 0.3, "float32", "bitmask", 32, "empty_rows"),
    Case(40, 256, 0.3, "float16", "delta4", 4, "empty_rows"),
    Case(9, 517, 1.0, "float32", "delta4", 2, "gaps"),
    Case(9, 517, 0.02, "float32", "bitmask", 16, "skewed"),
    Case(2, 70001, 0.1, "float16", "delta4", 32),
    Case(300, 4100, 0.2, "float32", "bitmask", 16),
    Case(33, 301, 0.02, "float16", "delta5", 4),
    Case(9, 517, 1.0, "bfloat16", "delta5", 2, "gaps"),
    Case(12, 1900, 0.1, "float16", "delta5", 32, "skewed"),
    Case(1, 5, 0.0, "float32", "delta5"),
    Case(40, 256, 0.3, "float32", "delta5", 8, "empty_rows"),
    Case(33, 301, 0.5, "float16", "two_bank", 4),
    Case(12, 700, 0.5, "float16", "two_bank", 32, "skewed"),
    Case(40, 256, 0.3, "float32", "two_bank", 8, "empty_rows"),
)
BITS = {"bitmask": None, "delta4": 4, "delta5": 5, "two_bank": 3}  # of a delta
LAYOUTS = [(encoding, 2) for encoding in BITS]  # encoding, lanes


def error_bound(weight: np.ndarray, x: np.ndarray, out_dtype) -> np.ndarray:
    """How far y = x A^T may lie from its exact value, elementwise.

    n products and sums in float32, in any order, err by at most about n 2^-24 |x| |A|^T (Higham,
    Accuracy and Stability, section 3.1), and the result is rounded once to its own type.
    """
    size = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T
    info = jnp.finfo(out_dtype)
    rounding = float(info.eps) * size + float(info.smallest_subnormal)
    return (weight.shape[1] + 1) * 2.0**-24 * size + rounding


def stored_columns(row: np.ndarray, bits: int | None) -> list[int]:
    """Columns of a row's stored elements, with the explicit zeros that deltas of `bits` need."""
    columns, previous = [], -1
    for column in np.flatnonzero(row):
        while bits and column - previous > 2**bits:
            previous += 2**bits
            columns.append(previous)
        columns.append(int(column))
        previous = column
    return columns


def delta_slots(row, most: int) -> list[tuple]:
    """(value, delta) of a row's stored elements, an explicit zero after `most` skipped places."""
    slots, skipped, last = [], 0, 0
    for value in row:
        if value != 0:
            slots.append((value, skipped))
            skipped, last = 0, len(slots)
        elif skipped == most:
            slots.append((0, most))
            skipped = 0
        else:
            skipped += 1
    return slots[:last]


def words_of(deltas: list, bits: int) -> list[int]:
    """Of every group, its deltas one after the other from the lowest bits."""
    return [sum(delta << bits * i for i, delta in enumerate(group)) for group in deltas]


def five_bytes(deltas: list) -> np.ndarray:
    """A word of low nibbles per group, then a byte of highest bits each, even elements first."""
    nibbles = np.array(words_of([[d & 15 for d in group] for group in deltas], 4), "<u4")
    highest = words_of([[d >> 4 for d in (*group[::2], *group[1::2])] for group in deltas], 1)
    return np.concatenate([nibbles.view(np.uint8), np.array(highest, np.uint8)])


# Of the deltas of all groups, or the words of a bitmask, the array `codes`.
CODES = {
    "bitmask": lambda words: np.array(words, np.uint32),
    "delta4": lambda deltas: np.array(words_of(deltas, 4), np.uint32),
    "delta5": five_bytes,
    "two_bank": lambda deltas: np.array(words_of(deltas, 4), np.uint32),
}


def pack_slowly(weight: np.ndarray, encoding: str, lanes: int) -> list[np.ndarray]:
    """values, codes, row_offsets and starts, element by element as MackoMatrix's docstring says."""
    values, codes, offsets, starts = [], [], [0], []
    cols, turns = weight.shape[1], {}
    for number, row in enumerate(weight):
        columns = stored_columns(row, BITS[encoding])
        groups = [columns[i : i + 8] for i in range(0, len(columns), 8)]
        offsets.append(offsets[-1] + len(groups))
        chunks, rest = [], list(range(len(groups)))
        for lane in range(lanes):
            size = len(groups) // lanes + (lane < len(groups) % lanes)
            chunks.append(rest[:size])
            rest = rest[size:]
        starts.append(
            [
                cols if not chunk else (groups[chunk[0] - 1][-1] + 1 if chunk[0] else 0)
                for chunk in chunks
            ]
        )
        if encoding == "bitmask":
            words = np.zeros(-(-cols // 32), np.uint32)
            for column in columns:
                words[column // 32] |= np.uint32(1 << (column % 32))
            codes.extend(words)
        for step in range(max(map(len, chunks))):
            for lane, chunk in enumerate(chunks, start=number * lanes):
                if step < len(chunk):
                    group = groups[chunk[step]]
                    values.append([row[c] for c in group] + [0] * (8 - len(group)))
                    if BITS[encoding]:
                        previous = groups[chunk[step] - 1][-1] if chunk[step] else -1
                        delta = [0] * 8
                        for i, column in enumerate(group):
                            delta[i] = column - previous - 1
                            previous = column
                        codes.append(delta)
                        slots = group + [previous + 1 + i for i in range(8 - len(group))]
                        turn = turns.setdefault((lane // 32, step), [])
                        turn.append((lane % 32, delta, slots))
    if encoding == "two_bank":
        choose_slowly(turns.values())
    start_dtype = np.uint16 if cols < 65536 else np.uint32
    return [
        np.array(values, weight.dtype).reshape(-1),
        CODES[encoding](codes),
        np.array(offsets, np.int32),
        np.array(starts, start_dtype),
    ]


def choose_slowly(turns) -> None:
    """Adds choices to deltas, as two_bank.py says; a turn has (lane, deltas, columns) of groups."""
    for turn in turns:
        for j in range(8):
            read, mine = [0] * 32, {}  # from each bank, not counted beyond 3; and the lanes' banks
            for lane, delta, columns in turn * 2:
                if anew := lane in mine:
                    read[mine[lane]] -= 1
                copies = 3 * columns[j] % 32, (3 * columns[j] + 1 + lane % 2) % 32
                a, b = (read[bank] for bank in copies)
                chosen = b < a or (anew and b == a)
                delta[j] = delta[j] & 7 | chosen << 3
                mine[lane] = copies[chosen]
                read[mine[lane]] = min(read[mine[lane]] + 1, 3)


def pack_as_paper(weight: np.ndarray):
    """values, deltas, row_indices of the paper's layout, element by element as design says."""
    values, deltas, row_indices = [], [], [0]
    for row in weight:
        slots = delta_slots(row, most=15)
        values += [value for value, _ in slots]
        deltas += [delta for _, delta in slots]
        row_indices.append(len(values))
    fill = -len(values) % 8
    values, deltas = values + [0] * fill, deltas + [0] * fill
    packed = [deltas[i] | deltas[i + 1] << 4 for i in range(0, len(deltas), 2)]
    return (
        np.array(values, weight.dtype),
        np.array(packed, np.uint8),
        np.array(row_indices, np.int32),
    )
