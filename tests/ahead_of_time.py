"""Compiles every GPU kernel for a card that need not be there, and prints what ptxas says of each.

    MACKO_JAX_CARD="RTX 4090" python -m tests.ahead_of_time [--only=REGEX]

It needs jax 0.11 or newer and the extra `aot`: the CUDA plugin of the same version, and ptxas. A
process compiles for one card, since Mosaic GPU keeps the first target of a process. Every line is a
case, as JSON: its name and, for each kernel, its name, registers of a thread, spilled bytes, and
threads and bytes of shared memory of a block.
"""

import functools
import json
import os
import pathlib
import re
import tempfile

# There is no GPU, and none of CUDA's libraries has to be there.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
DUMP = pathlib.Path(tempfile.mkdtemp(prefix="macko-aot-"))
os.environ |= {"MOSAIC_GPU_DUMP_TO": str(DUMP), "MOSAIC_GPU_DUMP_PTXAS": "1"}
os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import topologies  # noqa: E402

import macko_jax  # noqa: E402
from examples.llama import decode_attention  # noqa: E402
from macko_jax.experimental import Step, fused_chain, fused_spmv  # noqa: E402
from macko_jax.format import cards  # noqa: E402
from macko_jax.format.codes import code_bytes  # noqa: E402
from macko_jax.format.layout import GROUP, start_dtype  # noqa: E402
from macko_jax.gpu import densify, device, sddmm, spmv_transposed  # noqa: E402

REGISTERS = 65_536  # of an SM
ONLY = flags.DEFINE_string("only", "", "Regular expression; cases whose names match it compile.")


def target(card: cards.Card) -> str:
    """A card as XLA describes one. Only the first lines matter to what is compiled."""
    major, minor = card.capability
    features = "ACCELERATED_FEATURES" if card.capability >= device.HOPPER else "NONE"
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{
            major: {major} minor: {minor} feature_extension: {features}
          }}
          core_count: {card.multiprocessors}
          shared_memory_per_block_optin: {card.shared_bytes}
          shared_memory_per_core: {card.shared_bytes + 1024}
          shared_memory_per_block: 49152
          registers_per_core_limit: {REGISTERS} registers_per_block_limit: {REGISTERS}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 1536
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          fpus_per_core: 128 clock_rate_ghz: 1.8 memory_bandwidth: 1000000000000
          l2_cache_size: 41943040 device_memory_size: 25000000000
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 1 patch: 0 }}
        device_description_str: "{card.name}"
    """


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def matrix_of(rows, cols, density, encoding, dtype="float16", lanes=16):
    """A MackoMatrix of that size, without contents."""
    groups = int(rows * cols * density) // GROUP
    size = code_bytes(encoding)
    codes = abstract((groups * size,), "uint8") if size % 4 else abstract((groups,), "uint32")
    return macko_jax.MackoMatrix(
        values=abstract((groups * GROUP,), dtype),
        codes=codes,
        row_offsets=abstract((rows + 1,), "int32"),
        starts=abstract((rows, lanes), start_dtype(cols)),
        shape=(rows, cols),
        encoding=encoding,
        lanes=lanes,
        scales=abstract((rows,), "float16") if jnp.dtype(dtype).itemsize == 1 else None,
    )


def product(density, encoding, dtype="float16", batch=1, shape=(11008, 4096), x_dtype="float16"):
    """Product with `batch` vectors, by passes over the matrix; 8-bit values with their scales."""
    matrix = matrix_of(*shape, density, encoding, dtype)
    return macko_jax.spmv, (matrix, abstract((batch, shape[1]), x_dtype))


def backward(density, encoding, cols=4096):
    """The two gradients of a product."""
    matrix = matrix_of(4096, cols, density, encoding)

    def gradients(values, positions, x, y):
        turned = spmv_transposed.spmv_transposed(
            matrix.layout, values, positions, y, out_dtype=jnp.float32
        )
        by_values = sddmm.sddmm(matrix.layout, positions, x, y, values, out_dtype=jnp.float16)
        return turned, by_values

    vectors = abstract((1, cols), "float16"), abstract((1, 4096), "float16")
    return gradients, (matrix.values, matrix.positions, *vectors)


def dense(density, encoding):
    """The dense matrix."""
    matrix = matrix_of(4096, 11008, density, encoding)
    call = functools.partial(densify.densify, matrix.layout, dtype=jnp.float16)
    return call, (matrix.values, matrix.positions)


def normed(density, encoding):
    """A product with a norm before it and a sum after it."""
    matrix = matrix_of(4096, 4096, density, encoding)
    call = lambda matrix, x, scale, add: fused_spmv(matrix, x, norm=(scale, 1e-5), add=add)
    return call, (matrix, *[abstract((4096,), "float16")] * 3)


def chained(density, encoding, hidden=2048, wide=5504):
    """The products of a transformer's block after attention."""
    shapes = [(hidden, hidden), (2 * wide, hidden), (hidden, wide)]
    matrices = [matrix_of(*shape, density, encoding) for shape in shapes]

    def call(matrices, x, residual, scale):
        out, gate_up, down = matrices
        steps = [Step(out, add=residual), Step(gate_up, norm=(scale, 1e-5))]
        return fused_chain(x, [*steps, Step(down, gated=True, add=0)])

    return call, (matrices, *[abstract((hidden,), "float16")] * 3)


def attention(heads=32, kv_heads=8, slots=4096):
    """The attention of a decode step of Llama-3-8B."""
    dim = decode_attention.HEAD_DIM
    rows = abstract((1, (heads + 2 * kv_heads) * dim), "float16")
    angles = abstract((1, dim // 2), "float32")
    cache = abstract((1, kv_heads, slots, 2, dim), "float16")
    call = functools.partial(decode_attention.attend, heads=heads, window=None, blanks=8)
    return call, (rows, (angles, angles), cache, abstract((1,), "int32"))


# Every kernel; every encoding and type of values; x twice, narrow and by several vectors.
CASES = {
    "spmv delta4 float32": product(0.5, "delta4", "float32", x_dtype="float32"),
    "spmv delta5, 4 vectors": product(0.1, "delta5", "bfloat16", 4, x_dtype="bfloat16"),
    "spmv two_bank int8": product(0.5, "two_bank", "int8"),
    "spmv delta4 float8": product(0.5, "delta4", "float8_e4m3fn"),
    "spmv narrow": product(0.5, "delta4", shape=(2048, 40_000)),
    "normed two_bank": normed(0.5, "two_bank"),
    "gradients delta4": backward(0.5, "delta4"),
    "densify delta5": dense(0.1, "delta5"),
    "chain": chained(0.5, "two_bank"),
    "attention": attention(),
}


def compile_case(call, arguments, gpu) -> None:
    here = jax.sharding.SingleDeviceSharding(gpu)
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
    jax.jit(call).trace(*jax.tree.map(place, arguments)).lower().compile()


def kernels_dumped() -> list[dict]:
    """What the dump says of each kernel; it is empty afterwards."""
    found = []
    for path in sorted(DUMP.glob("*.ptxas")):
        said, ptx = path.read_text(), path.with_suffix(".ptx").read_text()
        resources = path.with_suffix(".resources.txt").read_text()
        number = lambda pattern, text: int(re.search(pattern, text)[1])
        found.append(
            {
                "kernel": path.stem.rpartition("_")[0],
                "registers": number(r"Used (\d+) registers", said),
                "spilled": number(r"(\d+) bytes spill stores", said),
                "threads": number(r"\.maxntid (\d+)", ptx),
                "shared": number(r"smem_scratch_bytes=(\d+)", resources),
            }
        )
    for path in DUMP.iterdir():
        path.unlink()
    return found


def main(_):
    card = cards.here()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target(card), topology="1x1x1"
    )
    [gpu] = topology.devices
    for name, case in CASES.items():
        if re.search(ONLY.value, name):
            compile_case(*case, gpu)
            print(json.dumps({"case": name, "kernels": kernels_dumped()}), flush=True)
    DUMP.rmdir()


if __name__ == "__main__":
    app.run(main)
