"""Speed and memory of decoding with a draft, for models of published shapes.

    python -m examples.benchmarks.benchmark_draft --config=llama2_7b
    python -m examples.benchmarks.benchmark_draft --config=tiny --new_tokens=64 --repeats=1

The model that verifies and the draft have random weights, which cannot agree: so a share of the
drafted tokens is accepted whatever they are. How often a real draft is right, examples.generate
says. Beside it stands the model without a draft, and the draft alone. Embedding, head and norms are
the same arrays in both. Times are medians over generations, without the prefill.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from examples import cli, llama
from examples.benchmarks import timing
from examples.benchmarks.random_models import RandomModel, array_bytes
from examples.llama import generation, speculation
from examples.llama.cache import Cache, round_up, widen
from examples.llama.split import SplitModel
from examples.records import write_json
from macko_jax.format.quantization import NAMES

flags.DEFINE_enum("config", "tiny", list(llama.CONFIGS), "Shape of the models.")
flags.DEFINE_integer("layers", None, "Decoder layers; by default the model's.", 1)
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "What weights are held in and computed in; by default float16, on a CPU float32.",
)
flags.DEFINE_float(
    "density", 1.0, "Share of weights that the verifying model keeps; 1 for a dense one."
)
flags.DEFINE_enum("values", None, [*NAMES], "Store its packed values in 8 bits.")
flags.DEFINE_float("draft_density", 0.3, "Share of weights that the draft keeps, below 1.")
flags.DEFINE_enum(
    "draft_values", "int8", ["stored", *NAMES], "Type of the draft's values; stored: --dtype."
)
flags.DEFINE_multi_integer("draft_tokens", [4], "Tokens of a draft; repeatable.", lower_bound=1)
flags.DEFINE_multi_float(
    "acceptance",
    [0.7, 0.8, 0.9],
    "Share of drafted tokens that are accepted; repeatable.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_integer("prompt_tokens", 16, "Tokens of the prompt.", lower_bound=1)
flags.DEFINE_integer("new_tokens", 256, "Tokens per generation.", lower_bound=2)
flags.DEFINE_integer("batch", 1, "Sequences at a time.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Timed generations.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of weights, masks and prompt.")
flags.DEFINE_string("out", "runs/draft.json", "File of the record.")

CHUNK = 64  # tokens between two visits to the host of a model without a draft
PASSES = 32  # of a model over the same tokens, in one call


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures; the flags of the same names say what each is."""

    config: str
    layers: int | None
    dtype: str | None
    density: float
    values: str | None
    draft_density: float
    draft_values: str
    draft_tokens: tuple[int, ...]
    acceptance: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    seed: int
    out: str

    def make(self):
        """The model, the draft, and the bytes of both together."""
        config = llama.CONFIGS[self.config]
        layers = self.layers or config.num_hidden_layers
        config = dataclasses.replace(config, num_hidden_layers=layers)
        default = "float32" if jax.default_backend() == "cpu" else "float16"
        dtype = jnp.dtype(self.dtype or default)
        values = None if self.draft_values == "stored" else self.draft_values
        model = RandomModel(config, dtype, seed=self.seed, values=self.values)(self.density)
        draft = RandomModel(config, dtype, seed=self.seed, values=values)(self.draft_density)
        saved = speculation.share_arrays(draft, model)
        return model, draft, array_bytes(nnx.state(model)), array_bytes(nnx.state(draft)) - saved


def time_rest(calls, count):
    """Seconds of each of `count` tokens but the first, which the first call has given."""
    jax.block_until_ready(next(calls))
    began = time.perf_counter()
    for tokens in calls:
        jax.block_until_ready(tokens)
    return (time.perf_counter() - began) / (count - 1)


def time_alone(model, prompts, settings):
    """Median seconds of a token of a model by itself."""
    seconds, count = [], settings.new_tokens
    padded, lengths = generation.pad_prompts(model.config, prompts, count)
    for _ in range(settings.repeats + 1):
        key = jax.random.key(settings.seed)
        calls = generation.draw(model, padded, lengths, count, key, generation.GREEDY, CHUNK)
        seconds.append(time_rest(calls, count))
    return float(np.median(seconds[1:]))  # the first compiles


@functools.partial(jax.jit, static_argnames="passes", donate_argnames="layers")
def read_again(split, tokens, layers, lengths, passes):
    """Reads as many tokens [B, T] after what a cache holds, `passes` times; the last ones."""

    def once(state, _):
        tokens, layers = state
        scores, layers = speculation.run(split, tokens, Cache(layers, lengths))
        return (jnp.argmax(scores, axis=-1).astype(jnp.int32), layers), None

    return jax.lax.scan(once, (tokens, layers), length=passes)[0]


def time_pass(model, prompts, count, settings):
    """Median seconds in which a model reads `count` tokens at once after the prompts."""
    padded, lengths = generation.pad_prompts(model.config, prompts, settings.new_tokens)
    begun = generation.prefill(model, padded, lengths, jax.random.key(0), generation.GREEDY)
    slots = round_up(settings.prompt_tokens + settings.new_tokens + count)
    layers, seconds = widen(begun.cache, slots).layers, []
    tokens = jnp.zeros((settings.batch, count), jnp.int32)
    for _ in range(settings.repeats + 1):
        began = time.perf_counter()
        tokens, layers = read_again(model, tokens, layers, lengths, PASSES)
        jax.block_until_ready(tokens)
        seconds.append((time.perf_counter() - began) / PASSES)
    return float(np.median(seconds[1:]))


def time_drafted(model, draft, prompts, count, acceptance, settings):
    """Median seconds of a token with a draft, tokens of a cycle, and seconds of a cycle."""
    seconds, accounts = [], []
    for i in range(settings.repeats + 1):
        calls = llama.speculate(
            model,
            draft,
            prompts,
            settings.new_tokens,
            draft_tokens=count,
            seed=settings.seed + i,
            forced=acceptance,
            accounts=accounts,
        )
        seconds.append(time_rest(calls, settings.new_tokens))
    (account,) = accounts
    return float(np.median(seconds[1:])), account.tokens / account.cycles, account.cycle_seconds


def describe(settings, alone, sizes, rows):
    """The record of a run, as it is stored."""
    return timing.environment() | {
        "settings": dataclasses.asdict(settings),
        "command": cli.command("benchmarks.benchmark_draft"),
        "milliseconds_of_a_token_alone": alone,
        "bytes": sizes,
        "rows": rows,
    }


def main(_):
    settings = cli.settings(Settings)
    if not 0 < settings.draft_density < 1:
        raise ValueError(f"--draft_density={settings.draft_density:g} has to be between 0 and 1")
    print(f"{settings.config}, on {jax.devices()[0].device_kind}", flush=True)
    model, draft, *sizes = settings.make()
    sizes = dict(zip(("model", "draft, what is its own"), sizes))
    model, draft = SplitModel.of(model), SplitModel.of(draft)
    rng = np.random.default_rng(settings.seed)
    prompts = rng.integers(0, model.config.vocab_size, (settings.batch, settings.prompt_tokens))
    alone = {
        name: 1e3 * time_alone(which, prompts, settings)
        for name, which in (("model", model), ("draft", draft))
    }
    for name, milliseconds in alone.items():
        print(f"{name} alone: {milliseconds:.3f} ms a token, {1e3 / milliseconds:.1f} tokens/s")
    first = 1e3 * time_pass(draft, prompts, 2, settings)
    print(
        "accepted  drafted  tokens/s  of alone  tokens a cycle  ms a cycle = first two of the "
        "draft + its others + verification + rest"
    )
    rows = []
    for count in settings.draft_tokens:
        verification = 1e3 * time_pass(model, prompts, count + 1, settings)
        for acceptance in settings.acceptance:
            seconds, tokens, cycle = time_drafted(
                model, draft, prompts, count, acceptance, settings
            )
            parts = {
                "first_two_of_the_draft": first,
                "others_of_the_draft": (count - 1) * alone["draft"],
                "verification": verification,
            }
            parts["rest"] = 1e3 * cycle - sum(parts.values())
            row = {
                "acceptance": acceptance,
                "draft_tokens": count,
                "tokens_per_second": 1 / seconds,
                "of_alone": alone["model"] / 1e3 / seconds,
                "tokens_of_a_cycle": tokens,
                "milliseconds_of_a_cycle": 1e3 * cycle,
                "milliseconds_of_its_parts": parts,
            }
            rows.append(row)
            print(
                f"{acceptance:8.2f}  {count:7}  {1 / seconds:8.1f}  {row['of_alone']:8.2f}  "
                f"{tokens:14.2f}  {1e3 * cycle:10.2f} = "
                + " + ".join(f"{part:.2f}" for part in parts.values()),
                flush=True,
            )
            write_json(settings.out, describe(settings, alone, sizes, rows))
    print(f"written: {settings.out}")


if __name__ == "__main__":
    cli.run(main)
