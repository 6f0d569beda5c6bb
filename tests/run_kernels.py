"""Runs every GPU kernel once at odd shapes, and nothing else on the GPU: for compute-sanitizer.

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m tests.run_kernels [--part=0/4] [--only=REGEX]

With that allocator every array is an allocation of its own, so that a read past its end is found.
The parts split the work among processes. Results are compared with dense products. racecheck takes
minutes for the larger matrices: give it --only="37, 301|attention|chain.*136".
"""

import dataclasses
import functools
import itertools
import re
import sys

import jax
import numpy as np
from absl import app, flags

import macko_jax
from examples.llama import decode_attention
from macko_jax.experimental import fused_chain, fused_spmv
from macko_jax.gpu import densify, sddmm, select, spmv, spmv_transposed
from tests import test_chain, test_fused
from tests import test_llama_decode_attention as attention
from tests.kernels import ENCODINGS, ask

PART = flags.DEFINE_string("part", "0/1", "Which part of how many.")
ONLY = flags.DEFINE_string("only", "", "Regular expression; cases whose names match it are run.")

# rows, cols, density
SHAPES = [
    (1, 1, 1.0),
    (5, 1, 0.6),
    (1, 700, 0.5),
    (9, 33, 1.0),
    (37, 301, 0.5),
    (140, 1000, 0.02),
    (600, 2051, 0.3),
    (33, 55000, 0.02),
]
DTYPES = "float16", "float32", "int8", "float8_e4m3fn"


def products(encoding, shape, dtype, batch):
    """(name, result, exact result) of every product of one matrix that has a kernel."""
    rows, cols, density = shape
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < density)
    narrow = dtype in ("int8", "float8_e4m3fn")
    with on_host():
        matrix = macko_jax.compress(
            weight.astype(np.float32 if narrow else dtype), dtype=dtype, encoding=encoding
        )
        matrix = jax.tree.map(np.asarray, dataclasses.replace(matrix, scales=None))
        dense = np.asarray(macko_jax.decompress(matrix)).astype(np.float32)
    x, y = (rng.standard_normal((batch, n)).astype(np.float16) for n in (cols, rows))
    wide_x, wide_y = x.astype(np.float32), y.astype(np.float32)
    values, positions = matrix.values, matrix.positions

    def run(product, *operands, **options):
        call = functools.partial(product, matrix.layout, **options)
        return np.asarray(jax.jit(call)(*operands))

    found = run(spmv.spmv, values, positions, x, out_dtype="float32")
    yield "spmv", found, wide_x @ dense.T
    if spmv_transposed.why_not(ask("spmv_transposed", matrix, y)) is None:
        found = run(spmv_transposed.spmv_transposed, values, positions, y, out_dtype="float32")
        yield "transposed", found, wide_y @ dense
    dense_dtype = select.dense_dtype(matrix.dtype, x.dtype)
    if densify.why_not(densify.problem_for(matrix.layout, matrix.dtype, dense_dtype)) is None:
        found = run(densify.densify, values, positions, dtype=dense_dtype)
        yield "densify", found.astype(np.float32), dense
    if not narrow and sddmm.why_not(ask("sddmm", matrix, x, matrix.dtype)) is None:
        found = run(sddmm.sddmm, positions, x, y, values, out_dtype=matrix.dtype)
        with on_host():
            found = macko_jax.decompress(dataclasses.replace(matrix, values=found))
        kept = dense != 0
        yield "sddmm", np.asarray(found).astype(np.float32) * kept, wide_y.T @ wide_x * kept


def fused(encoding, shape, kind):
    """As `products`, of a product with a norm or a gate before it and a sum after it."""
    with on_host():
        dense, x, scale, add = test_fused.make(*shape, kind, True)
        matrix = jax.tree.map(np.asarray, macko_jax.compress(dense, encoding=encoding))
        given = test_fused.options(kind, scale, add)
        wanted = np.asarray(fused_spmv(matrix, x, **given))
    found = jax.jit(lambda m, x: fused_spmv(m, x, **given))(matrix, x)
    yield "fused", np.asarray(found).astype(np.float32), wanted.astype(np.float32)


def chained(encoding, shape):
    """As `products`, of a chain of products."""
    with on_host():
        arguments = jax.tree.map(np.asarray, test_chain.make(*shape, encoding=encoding))
        wanted = test_chain.exact(*arguments)
    found = jax.jit(lambda m, x, *rest: fused_chain(x, test_chain.steps(m, *rest)))(*arguments)
    for name, a, b in zip(("stream", "last"), found, wanted):
        yield name, np.asarray(a).astype(np.float64)[0], b


def attend(heads, kv_heads, slots, live, window):
    """As `products`, of the attention of a decode step."""
    with on_host():
        arguments = jax.tree.map(np.asarray, attention.make(heads, kv_heads, slots, live))
    call = functools.partial(decode_attention.attend, heads=heads, window=window)
    found, cache, _ = jax.jit(call)(*arguments)
    rows, rotation, before, positions = arguments
    wanted = attention.expected(rows, rotation, cache, positions, heads, window)
    yield "attention", np.asarray(found).astype(np.float32), wanted
    wanted = attention.with_own_tokens(rows, rotation, before, positions, heads)
    yield "cache", np.nan_to_num(cache), np.nan_to_num(wanted)


def on_host():
    return jax.default_device(jax.devices("cpu")[0])


def cases():
    """(name, function that runs it)."""
    for encoding, shape, (dtype, batch) in itertools.product(
        ENCODINGS, SHAPES, [*zip(DTYPES, (1, 3, 2, 5)), ("float16", 16)]
    ):
        yield (
            f"{encoding} {shape} {dtype} {batch}",
            functools.partial(products, encoding, shape, dtype, batch),
        )
    for encoding, shape, kind in itertools.product(ENCODINGS, SHAPES[:-1], ("norm", "gated")):
        yield f"fused {kind} {encoding} {shape}", functools.partial(fused, encoding, shape, kind)
    for encoding, shape in itertools.product(ENCODINGS, [(136, 272, 144), (1000, 2744, 2008)]):
        yield f"chain {encoding} {shape}", functools.partial(chained, encoding, shape)
    for name, case in attention.CASES.items():
        yield f"attention {name}", functools.partial(attend, *case)


def main(_):
    part, parts = map(int, PART.value.split("/"))
    wrong = []
    chosen = [case for case in cases() if re.search(ONLY.value, case[0])]
    for name, run in chosen[part::parts]:
        errors = []
        for product, found, wanted in run():
            error = np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30)
            errors.append(f"{product} {error:.0e}")
            if not error < 5e-3:
                wrong.append(f"{name} {product}")
        print(f"{name}: {', '.join(errors)}", flush=True)
    if wrong:
        sys.exit(f"wrong results: {wrong}")
    print("all right")


if __name__ == "__main__":
    app.run(main)
