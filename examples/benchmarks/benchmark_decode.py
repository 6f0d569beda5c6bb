"""Speed and memory of decoding, dense and packed, for models of published shapes.

    python -m examples.benchmarks.benchmark_decode --config=llama2_7b
    python -m examples.benchmarks.benchmark_decode --config=tiny --new_tokens=32
    python -m examples.benchmarks.benchmark_decode --checkpoint=DENSE --checkpoint=PACKED

Without checkpoints, weights are random and made on the device, layer by layer: the speed of a
product depends on where the non-zeros are, not on what they are. Masks are random. Embedding and
output head stay dense. A time per token is that of one call of --chunk tokens, divided by --chunk;
percentiles are over the calls, not over single tokens. Memory is what the compiled programs of
prefill and decode take: arguments, results and temporaries, all weights and the whole cache
included.
"""

import dataclasses
import datetime
import functools
import gzip
import importlib.metadata
import json
import pathlib
import platform
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx, traverse_util

import macko_jax
import macko_jax.flax_nnx
from examples import llama
from examples.llama import checkpoint, generation
from examples.llama.cache import Cache, final_slots, widen
from examples.llama.split import SplitModel
from examples.records import write_json
from macko_jax.format.codes import ENCODINGS

CONFIG = flags.DEFINE_enum("config", "tiny", list(llama.CONFIGS), "Shape of the model.")
LAYERS = flags.DEFINE_integer("layers", None, "Decoder layers; by default the model's.", 1)
CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint",
    [],
    "Directory of a dense or packed model, in the place of random ones; repeatable.",
)
DENSITY = flags.DEFINE_multi_float(
    "density",
    [1.0, 0.5, 0.3, 0.1],
    "Share of weights kept, 1 for the dense model; repeatable.",
    lower_bound=0.0,
    upper_bound=1.0,
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of weights and computation; by default float16, or as a checkpoint is stored; on a CPU "
    "float32.",
)
ENCODING = flags.DEFINE_enum(
    "encoding", None, list(ENCODINGS), "Of random packed matrices; by default the library's choice."
)
PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of the prompt.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "Tokens per generation.", lower_bound=1)
CHUNK = flags.DEFINE_integer("chunk", 32, "Tokens per call of the device.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed generations.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "Sequences at a time.", lower_bound=1)
BANDWIDTH = flags.DEFINE_float(
    "bandwidth", None, "The device's memory bandwidth in TB/s, to compare with; H200: 4.8."
)
PROFILE = flags.DEFINE_bool(
    "profile", False, "Show the kernels of a decode step and of the prefill, and their times."
)
SEED = flags.DEFINE_integer("seed", 0, "Of weights, masks and prompt.")
OUT = flags.DEFINE_string(
    "out", None, "File of the record; by default docs/results/decode_CONFIG_DEVICE.json."
)


@functools.partial(jax.jit, static_argnames=("rows", "cols", "dtype"))
def random_weight(key, density, rows, cols, dtype):
    """[rows, cols] normal weights, each kept with probability `density`."""
    of_values, of_mask = jax.random.split(key)
    weight = 0.02 * jax.random.normal(of_values, (rows, cols), dtype)
    return jnp.where(jax.random.uniform(of_mask, (rows, cols)) < density, weight, 0)


def pack(weight, layouts):
    """A packed matrix whose arrays have the shapes of all packed matrices of its shape.

    The first matrix of a shape decides, with room for a little more than it holds; layers of one
    shape then share compiled kernels. The room is never read.
    """
    if weight.shape not in layouts:
        packed = macko_jax.compress(weight, encoding=ENCODING.value)
        groups = packed.stored // 8
        layouts[weight.shape] = {
            "encoding": packed.encoding,
            "lanes": packed.lanes,
            "capacity": groups + groups // 512 + 64,  # of random masks, five deviations and more
        }
    return macko_jax.compress(weight, **layouts[weight.shape])


def random_model(config, density, dtype, seed):
    """A model of random weights whose decoder layers are packed if the density is below 1."""
    began = time.perf_counter()
    abstract = checkpoint.abstract_model(config, dtype=dtype, param_dtype=dtype)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(abstract)))
    key = jax.random.key(seed)
    tree, layouts = {}, {}
    for i, (path, leaf) in enumerate(flat.items()):
        if leaf.ndim == 1:
            tree[path] = jnp.ones(leaf.shape, dtype)
            continue
        sparse = path[0] == "layers" and density < 1
        rows, cols = leaf.shape[::-1]
        weight = random_weight(
            jax.random.fold_in(key, i), density if sparse else 1.0, rows, cols, dtype
        )
        tree[path] = pack(weight, layouts) if sparse else weight.T
        jax.block_until_ready(tree[path])
        if sys.stdout.isatty():
            print(f"\r  built {i + 1} of {len(flat)} arrays", end="", flush=True)
    print(f"\r  built {len(flat)} arrays on the device in {time.perf_counter() - began:.1f} s")
    return macko_jax.flax_nnx.from_pure_dict(abstract, traverse_util.unflatten_dict(tree))


def array_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def added_bytes(compiled):
    """Device memory that a compiled program needs beside its arguments; None if XLA does not say."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def peak_bytes(decoder):
    """Device memory of prefill and of decode by what their programs add to all weights and caches.

    None where XLA does not say.
    """
    split, arguments = decoder.split, decoder.decode_arguments()
    decode = added_bytes(generation.decode.lower(*arguments).compile())
    if decode is None:
        return {"prefill_bytes": None, "decode_bytes": None}
    x = generation.embed.eval_shape(split.ends, decoder.prompt)
    layer_caches, calls = [], {}  # layers that are alike share a program
    for piece in split.layers:
        more = generation.read.eval_shape(piece, x, split.config)[1]
        layer_caches += more
        kind = piece.structure, tuple(leaf.shape for leaf in piece.arrays)
        if kind not in calls:
            calls[kind] = generation.read.lower(piece, x, split.config), more
    kv_cache = Cache(tuple(layer_caches), decoder.lengths)
    ending = generation.first_token.lower(split.ends, x, kv_cache, decoder.key, decoder.sampling)
    beside = max(  # of one call, but for its caches
        added_bytes(lowered.compile()) - array_bytes(caches)
        for lowered, caches in [*calls.values(), (ending, ())]
    )
    return {
        "prefill_bytes": array_bytes((split, x, kv_cache)) + beside,
        "decode_bytes": array_bytes(arguments[:2]) + decode,
    }


class Decoder:
    """A model taken apart, with a prompt to continue."""

    def __init__(self, model):
        self.split = SplitModel.of(model)
        rng = np.random.default_rng(SEED.value)
        shape = (BATCH.value, PROMPT.value)
        self.prompt = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
        self.lengths = np.full(BATCH.value, PROMPT.value, np.int32)
        self.key = jax.random.key(SEED.value)
        self.sampling = llama.Sampling()

    def draw(self):
        return generation.draw(
            self.split,
            self.prompt,
            self.lengths,
            NEW_TOKENS.value + 1,
            self.key,
            self.sampling,
            CHUNK.value,
        )

    def prefill_arguments(self):
        return self.split, self.prompt, self.lengths, self.key, self.sampling

    def decode_arguments(self):
        """Those of the last call of a generation, with its widest cache."""
        begun = generation.prefill(*self.prefill_arguments())
        slots = final_slots(PROMPT.value, NEW_TOKENS.value + 1, CHUNK.value)
        cache = dataclasses.replace(
            widen(begun.cache, slots),
            lengths=jnp.asarray(self.lengths + NEW_TOKENS.value - CHUNK.value),
        )
        return self.split, dataclasses.replace(begun, cache=cache), CHUNK.value, self.sampling


def time_prefills(decoder):
    """Seconds of each prefill, [REPEATS]."""
    seconds = []
    for _ in range(REPEATS.value + 1):
        began = time.perf_counter()
        jax.block_until_ready(next(decoder.draw()))
        seconds.append(time.perf_counter() - began)
    return np.array(seconds[1:])  # the first warms up


def time_generations(decoder):
    """Seconds per token of each call after the prefill, [REPEATS, calls].

    As in `llama.generate`, the device is given a call while the one before it runs. A CPU would run
    the second call before the host can note when the first one ended; it is given one at a time.
    """
    in_turn = iter if jax.default_backend() == "cpu" else generation.one_ahead
    rows = []
    for _ in range(REPEATS.value + 1):
        ready = []
        for tokens in in_turn(decoder.draw()):
            jax.block_until_ready(tokens)
            ready.append(time.perf_counter())
        rows.append(np.diff(ready))
    return np.array(rows[1:]) / CHUNK.value


def kernel_times(function, arguments, calls=1):
    """Microseconds of each kernel on the device, largest first, by name, divided by `calls`.

    Read from the trace that JAX's profiler writes; empty where it has no rows of a GPU.
    """
    jax.block_until_ready(arguments)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(function(*arguments))
        (path,) = pathlib.Path(directory).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("name") in ("process_name", "thread_name")
    }
    totals = {}
    for event in events:
        if event.get("ph") != "X":
            continue
        process = names.get(("process_name", event["pid"], None), "")
        thread = names.get(("thread_name", event["pid"], event["tid"]), "")
        if "/device:GPU" in process and thread.startswith("Stream"):
            totals[event["name"]] = totals.get(event["name"], 0.0) + event["dur"] / calls
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def chosen_dtype():
    default = "float16"
    if jax.default_backend() == "cpu":
        default = "float32"
    elif CHECKPOINT.value:
        default = checkpoint.stored_dtype(CHECKPOINT.value[0])
    return jnp.dtype(DTYPE.value or default)


def chosen_config():
    config = llama.CONFIGS[CONFIG.value]
    return dataclasses.replace(config, num_hidden_layers=LAYERS.value or config.num_hidden_layers)


def check_positions():
    """Refuses generations that are longer than a model's positions."""
    configs = {directory: checkpoint.load_config(directory) for directory in CHECKPOINT.value}
    for name, config in (configs or {CONFIG.value: chosen_config()}).items():
        if PROMPT.value + NEW_TOKENS.value > config.max_position_embeddings:
            raise ValueError(
                f"--prompt={PROMPT.value} and --new_tokens={NEW_TOKENS.value} exceed the "
                f"{config.max_position_embeddings} positions of {name}; shorten one of them"
            )


def models():
    """(name, density, function that makes the model) of every model, the smallest first."""
    if not CHECKPOINT.value:
        for density in sorted(DENSITY.value):
            make = functools.partial(
                random_model, chosen_config(), density, chosen_dtype(), SEED.value
            )
            yield f"density {density:g}", density, make
    for directory in CHECKPOINT.value:
        make = functools.partial(
            checkpoint.load_any, directory, dtype=chosen_dtype(), param_dtype=chosen_dtype()
        )
        yield directory, checkpoint.density(directory), make


def measure(name, density, make):
    print(name, flush=True)
    model = make()
    weights = array_bytes(nnx.state(model))
    # A decode step reads everything but the embedding table, of which it takes a row.
    tied = model.head is None
    streamed = weights - (0 if tied else model.embed.embedding.nbytes)
    decoder = Decoder(model)
    prefill, per_token = time_prefills(decoder), time_generations(decoder)
    speed = BATCH.value / float(np.median(per_token.mean(axis=1)))
    sizes = peak_bytes(decoder)
    record = {
        "name": name,
        "density": density,
        "tokens_per_second": speed,
        "milliseconds_per_token": {
            f"p{q}": 1e3 * float(np.percentile(per_token, q)) for q in (5, 50, 95, 99)
        },
        "prefill_seconds": float(np.median(prefill)),
        "weight_bytes": weights,
        **sizes,
        "peak_bytes": None if None in sizes.values() else max(sizes.values()),
        "streamed_bytes_per_second": streamed * speed / BATCH.value,
    }
    if BANDWIDTH.value:
        record["share_of_bandwidth"] = record["streamed_bytes_per_second"] / BANDWIDTH.value / 1e12
    if PROFILE.value:
        record["kernel_microseconds"] = {
            "decode_step": kernel_times(generation.decode, decoder.decode_arguments(), CHUNK.value),
            "prefill": kernel_times(generation.prefill, decoder.prefill_arguments()),
        }
    print_record(record)
    return record


def print_record(record):
    percentiles = record["milliseconds_per_token"]
    gigabytes = [
        f"{what} {record[field] / 1e9:.2f} GB"
        for what, field in (
            ("weights", "weight_bytes"),
            ("prefill", "prefill_bytes"),
            ("decode", "decode_bytes"),
        )
        if record[field] is not None
    ]
    share = record.get("share_of_bandwidth")
    print(
        f"  {record['tokens_per_second']:.1f} tokens/s; ms per token "
        + ", ".join(f"{name} {value:.3f}" for name, value in percentiles.items())
        + f"; prefill of {PROMPT.value} tokens {1e3 * record['prefill_seconds']:.1f} ms\n  "
        + ", ".join(gigabytes)
        + f"; weights read at {record['streamed_bytes_per_second'] / 1e12:.2f} TB/s"
        + (f", {share:.0%} of the bandwidth" if share else ""),
        flush=True,
    )
    for what, times in record.get("kernel_microseconds", {}).items():
        print(f"  {what.replace('_', ' ')}, {sum(times.values()):.1f} us of kernels")
        for name, microseconds in list(times.items())[:12]:
            print(f"  {microseconds:10.1f} us  {name[:100]}")


def print_table(records):
    dense = next((record for record in records if record["density"] == 1), None)
    print(
        "density  tokens/s  of dense  prefill ms  of dense  weights GB  peak GB"
        + ("  checkpoint" if CHECKPOINT.value else "")
    )
    for record in reversed(records):
        for field, ratio in (("tokens_per_second", "speed"), ("prefill_seconds", "prefill")):
            record[f"{ratio}_over_dense"] = record[field] / dense[field] if dense else None
        over = [record["speed_over_dense"] or np.nan, record["prefill_over_dense"] or np.nan]
        print(
            f"{record['density']:7.2f}  {record['tokens_per_second']:8.1f}  {over[0]:8.2f}  "
            f"{1e3 * record['prefill_seconds']:10.1f}  {over[1]:8.2f}  "
            f"{record['weight_bytes'] / 1e9:10.2f}  {(record['peak_bytes'] or np.nan) / 1e9:7.2f}"
            + (f"  {record['name']}" if CHECKPOINT.value else "")
        )


def describe(device, records):
    return {
        "config": {"name": CONFIG.value} | dataclasses.asdict(chosen_config())
        if not CHECKPOINT.value
        else None,
        "dtype": chosen_dtype().name,
        "batch": BATCH.value,
        "prompt": PROMPT.value,
        "new_tokens": NEW_TOKENS.value,
        "chunk": CHUNK.value,
        "encoding": ENCODING.value,
        "repeats": REPEATS.value,
        "seed": SEED.value,
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(
            ["python -m examples.benchmarks.benchmark_decode"]
            + [argument for argument in sys.argv[1:] if not argument.startswith("--out")]
        ),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "results": records,
    }


def main(_):
    check_positions()
    device = jax.devices()[0]
    what = "checkpoints" if CHECKPOINT.value else CONFIG.value
    print(
        f"{what}, {chosen_dtype()}, batch {BATCH.value}, prompt {PROMPT.value}, on "
        f"{device.device_kind}",
        flush=True,
    )
    name = f"decode_{what}_{device.device_kind.replace(' ', '_')}.json"
    out = pathlib.Path(OUT.value or pathlib.Path("docs") / "results" / name)
    out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for model in models():
        records.append(measure(*model))
        write_json(out, describe(device, records))
    print_table(records)
    write_json(out, describe(device, records))
    print(f"written: {out}")


if __name__ == "__main__":
    app.run(main)
