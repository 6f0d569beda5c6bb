"""Speed and memory of decoding, dense and packed, for models of published shapes.

    python -m examples.benchmarks.benchmark_decode --config=llama2_7b
    python -m examples.benchmarks.benchmark_decode --config=tiny --new_tokens=32
    python -m examples.benchmarks.benchmark_decode --config=llama2_7b --density=1 --density=0.5 \
        --pairs --values=int8
    python -m examples.benchmarks.benchmark_decode --checkpoint=DENSE --checkpoint=PACKED
    python -m examples.benchmarks.benchmark_decode --config=llama2_70b --tensor_parallel=2 \
        --density=1 --density=0.5

Without checkpoints, weights are random and made on the device, layer by layer: the speed of a
product depends on where the non-zeros are, not on what they are. Masks are random. With --pairs
every layer is two factors, whose sizes and densities are those that the factorization would choose
for the density. Embedding and output head stay dense. A time per token is that of one call of
--chunk tokens, divided by --chunk; percentiles are over the calls, not over single tokens. Memory
is what the compiled programs of prefill and decode take: arguments, results and temporaries, all
weights and the whole cache included.

With --tensor_parallel=N, N devices share each model, as examples/llama/parallel.py says: packed
matrices in shards, dense ones partitioned by XLA. Every device makes its own shards, so that no
model need ever fit on one. Memory is then that of one device.
"""

import dataclasses
import functools
import gzip
import json
import math
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from examples import cli, llama
from examples.benchmarks import timing
from examples.benchmarks.random_models import RandomModel, array_bytes
from examples.llama import checkpoint, generation
from examples.llama.cache import Cache, final_slots, widen
from examples.llama.split import SplitModel
from examples.records import write_json
from macko_jax.format.codes import ENCODINGS
from macko_jax.format.quantization import NAMES

flags.DEFINE_enum("config", "tiny", list(llama.CONFIGS), "Shape of the model.")
flags.DEFINE_integer("layers", None, "Decoder layers; by default the model's.", 1)
flags.DEFINE_multi_string(
    "checkpoint",
    [],
    "Directory of a dense or packed model, in the place of random ones; repeatable.",
)
flags.DEFINE_multi_float(
    "density",
    [1.0, 0.5, 0.3, 0.1],
    "Share of weights kept, 1 for the dense model; repeatable.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "What weights are held in and computed in; by default float16, or as a checkpoint is stored; "
    "on a CPU float32.",
)
flags.DEFINE_enum(
    "encoding",
    None,
    list(ENCODINGS),
    "Encoding of random packed matrices; by default the library's choice.",
)
flags.DEFINE_enum(
    "values",
    None,
    [*NAMES],
    "Store values of random packed matrices in 8 bits, and round those of checkpoints; by default "
    "they are of --dtype, or as they are stored.",
)
flags.DEFINE_bool("pairs", False, "Make random packed layers of two factors each.")
flags.DEFINE_integer("prompt_tokens", 512, "Tokens of the prompt.", lower_bound=1)
flags.DEFINE_integer("new_tokens", 128, "Tokens per generation.", lower_bound=1)
flags.DEFINE_integer("chunk", 32, "Tokens per call of the device.", lower_bound=1)
flags.DEFINE_integer("repeats", 10, "Timed generations.", lower_bound=1)
flags.DEFINE_integer("batch", 1, "Sequences at a time.", lower_bound=1)
flags.DEFINE_integer(
    "tensor_parallel", 1, "Devices that share each model, heads and cache.", lower_bound=1
)
flags.DEFINE_float(
    "bandwidth", None, "The device's memory bandwidth in TB/s, to compare with; H200: 4.8."
)
flags.DEFINE_bool(
    "profile", False, "Show the kernels of a decode step and of the prefill, and their times."
)
flags.DEFINE_integer("seed", 0, "Seed of weights, masks and prompt.")
flags.DEFINE_string("out", "runs/decode.json", "File of the record.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures; the flags of the same names say what each is."""

    config: str
    layers: int | None
    checkpoint: tuple[str, ...]
    density: tuple[float, ...]
    dtype: str | None
    encoding: str | None
    values: str | None
    pairs: bool
    prompt_tokens: int
    new_tokens: int
    chunk: int
    repeats: int
    batch: int
    tensor_parallel: int
    bandwidth: float | None
    profile: bool
    seed: int
    out: str

    def model_config(self):
        """The shape of random models."""
        config = llama.CONFIGS[self.config]
        return dataclasses.replace(
            config, num_hidden_layers=self.layers or config.num_hidden_layers
        )

    def model_dtype(self):
        """What the models are held in and compute in."""
        default = "float16"
        if jax.default_backend() == "cpu":
            default = "float32"
        elif self.checkpoint:
            default = checkpoint.stored_dtype(self.checkpoint[0])
        return jnp.dtype(self.dtype or default)


def device_bytes(tree):
    """Bytes of a tree's arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def added_bytes(compiled):
    """Device memory that a program needs beside its arguments; None if XLA does not say."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def peak_bytes(decoder):
    """Memory of a device in prefill and decode, by what their programs add to weights and caches.

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
    share = decoder.settings.tensor_parallel  # devices among which the heads of a cache are
    beside = max(  # of one call, but for its caches
        added_bytes(lowered.compile()) - array_bytes(caches) // share
        for lowered, caches in [*calls.values(), (ending, ())]
    )
    return {
        "prefill_bytes": device_bytes(split)
        + array_bytes(x)
        + array_bytes(kv_cache) // share
        + beside,
        "decode_bytes": device_bytes(arguments[:2]) + decode,
    }


class Decoder:
    """A model taken apart, with a random prompt to continue as the settings say."""

    def __init__(self, model, settings):
        self.split = SplitModel.of(model)
        self.settings = settings
        rng = np.random.default_rng(settings.seed)
        shape = (settings.batch, settings.prompt_tokens)
        self.prompt = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
        self.lengths = np.full(settings.batch, settings.prompt_tokens, np.int32)
        self.key = jax.random.key(settings.seed)
        self.sampling = llama.Sampling()

    def draw(self):
        """The calls of one generation, prefill first."""
        return generation.draw(
            self.split,
            self.prompt,
            self.lengths,
            self.settings.new_tokens + 1,
            self.key,
            self.sampling,
            self.settings.chunk,
        )

    def prefill_arguments(self):
        return self.split, self.prompt, self.lengths, self.key, self.sampling

    def decode_arguments(self):
        """The arguments of the last call of a generation, with its widest cache."""
        settings = self.settings
        begun = generation.prefill(*self.prefill_arguments())
        slots = final_slots(settings.prompt_tokens, settings.new_tokens + 1, settings.chunk)
        cache = dataclasses.replace(
            widen(begun.cache, slots),
            lengths=jnp.asarray(self.lengths + settings.new_tokens - settings.chunk),
        )
        begun = dataclasses.replace(begun, cache=cache)
        return self.split, begun, settings.chunk, self.sampling


def time_prefills(decoder, repeats):
    """Seconds of each prefill, [repeats]."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(next(decoder.draw()))
        seconds.append(time.perf_counter() - began)
    return np.array(seconds[1:])  # the first warms up


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


def check_positions(settings):
    """Refuses generations that are longer than a model's positions."""
    configs = {directory: checkpoint.load_config(directory) for directory in settings.checkpoint}
    for name, config in (configs or {settings.config: settings.model_config()}).items():
        if settings.prompt_tokens + settings.new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"--prompt_tokens={settings.prompt_tokens} and --new_tokens={settings.new_tokens} "
                f"exceed the {config.max_position_embeddings} positions of {name}; shorten one of "
                "them"
            )


def models(settings):
    """(name, density, function that makes the model) of every model, the smallest first."""
    dtype = settings.model_dtype()
    if not settings.checkpoint:
        random = RandomModel(
            settings.model_config(),
            dtype,
            seed=settings.seed,
            encoding=settings.encoding,
            values=settings.values,
            pairs=settings.pairs,
            tensor_parallel=settings.tensor_parallel,
        )
        for density in sorted(settings.density):
            yield f"density {density:g}", density, functools.partial(random, density)
    for directory in settings.checkpoint:
        make = functools.partial(
            checkpoint.load_any,
            directory,
            dtype=dtype,
            param_dtype=dtype,
            values=settings.values,
            tensor_parallel=settings.tensor_parallel,
        )
        yield directory, checkpoint.density(directory), make


def measure(name, density, make, settings):
    """Times a model and weighs it; the record of both."""
    print(name, flush=True)
    model = make()
    weights = array_bytes(nnx.state(model))
    # A decode step reads everything but the embedding table, of which it takes a row.
    tied = model.head is None
    streamed = weights - (0 if tied else model.embed.embedding.nbytes)
    decoder = Decoder(model, settings)
    prefill = time_prefills(decoder, settings.repeats)
    per_token = timing.time_generations(decoder, settings.repeats) / settings.chunk
    speed = settings.batch / float(np.median(per_token.mean(axis=1)))
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
        "streamed_bytes_per_second": streamed * speed / settings.batch,
    }
    if settings.bandwidth:
        record["share_of_bandwidth"] = (
            record["streamed_bytes_per_second"]
            / settings.tensor_parallel
            / settings.bandwidth
            / 1e12
        )
    if settings.profile:
        record["kernel_microseconds"] = {
            "decode_step": kernel_times(
                generation.decode, decoder.decode_arguments(), settings.chunk
            ),
            "prefill": kernel_times(generation.prefill, decoder.prefill_arguments()),
        }
    print_record(record, settings.prompt_tokens)
    return record


def print_record(record, prompt_tokens):
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
        + f"; prefill of {prompt_tokens} tokens {1e3 * record['prefill_seconds']:.1f} ms\n  "
        + ", ".join(gigabytes)
        + f"; weights read at {record['streamed_bytes_per_second'] / 1e12:.2f} TB/s"
        + (f", {share:.0%} of the bandwidth" if share else ""),
        flush=True,
    )
    for what, times in record.get("kernel_microseconds", {}).items():
        print(f"  {what.replace('_', ' ')}, {sum(times.values()):.1f} us of kernels")
        for name, microseconds in list(times.items())[:12]:
            print(f"  {microseconds:10.1f} us  {name[:100]}")


def print_table(records, with_names):
    dense = next((record for record in records if record["density"] == 1), None)
    print(
        "density  tokens/s  of dense  prefill ms  of dense  weights GB  peak GB"
        + ("  checkpoint" if with_names else "")
    )
    for record in reversed(records):
        for field, ratio in (("tokens_per_second", "speed"), ("prefill_seconds", "prefill")):
            record[f"{ratio}_over_dense"] = record[field] / dense[field] if dense else None
        over = [record["speed_over_dense"] or np.nan, record["prefill_over_dense"] or np.nan]
        print(
            f"{record['density']:7.2f}  {record['tokens_per_second']:8.1f}  {over[0]:8.2f}  "
            f"{1e3 * record['prefill_seconds']:10.1f}  {over[1]:8.2f}  "
            f"{record['weight_bytes'] / 1e9:10.2f}  {(record['peak_bytes'] or np.nan) / 1e9:7.2f}"
            + (f"  {record['name']}" if with_names else "")
        )


def describe(settings, records):
    """The record of a run, as it is stored."""
    random = {"name": settings.config} | dataclasses.asdict(settings.model_config())
    return timing.environment() | {
        "config": None if settings.checkpoint else random,
        "dtype": settings.model_dtype().name,
        "batch": settings.batch,
        "tensor_parallel": settings.tensor_parallel,
        "prompt": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "chunk": settings.chunk,
        "encoding": settings.encoding,
        "values": settings.values,
        "pairs": settings.pairs,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "command": cli.command("benchmarks.benchmark_decode"),
        "results": records,
    }


def main(_):
    settings = cli.settings(Settings)
    check_positions(settings)
    print(
        f"{'checkpoints' if settings.checkpoint else settings.config}, {settings.model_dtype()}, "
        f"batch {settings.batch}, prompt {settings.prompt_tokens}, on {settings.tensor_parallel} x "
        f"{jax.devices()[0].device_kind}",
        flush=True,
    )
    records = []
    for model in models(settings):
        records.append(measure(*model, settings))
        write_json(settings.out, describe(settings, records))
    print_table(records, with_names=bool(settings.checkpoint))
    write_json(settings.out, describe(settings, records))
    print(f"written: {settings.out}")


if __name__ == "__main__":
    cli.run(main)
