"""Trains the byte-level language model that the demo prunes.

    python -m examples.stdlib_text --out=.corpus/stdlib.npz
    python -m examples.train_lm --corpus=.corpus/stdlib.npz --out=runs/lm

The whole corpus lies on the device, and many steps run in one call. Written are a Hugging Face
model directory (config.json, model.safetensors in bfloat16) and record.json: loss curve, bits per
byte on the held-out modules, versions, device, seconds and every flag.
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from examples import cli, llama
from examples.llama import checkpoint, evaluation
from examples.records import write_json
from examples.stdlib_text import HELD_OUT

flags.DEFINE_string("corpus", ".corpus/stdlib.npz", "Written by examples.stdlib_text.")
flags.DEFINE_string("out", "runs/lm", "Directory for the checkpoint and the record.")
flags.DEFINE_float(
    "minutes", 5.0, "Wall time for training, compilation included; sets the number of steps."
)
flags.DEFINE_integer("steps", None, "Number of steps, instead of --minutes.")
flags.DEFINE_integer("chunk", 100, "Steps per call of the device.", lower_bound=1)
flags.DEFINE_integer("batch", 64, "Sequences per step.")
flags.DEFINE_integer("length", 1024, "Tokens of a sequence, which are bytes.")
flags.DEFINE_integer("hidden", 320, "Hidden size.")
flags.DEFINE_integer("intermediate", 832, "Hidden size of the MLP.")
flags.DEFINE_integer("layers", 7, "Decoder layers.")
flags.DEFINE_integer("heads", 6, "Query heads.")
flags.DEFINE_integer("kv_heads", 2, "Key-value heads.")
flags.DEFINE_integer("head_dim", 64, "Size of a head.")
flags.DEFINE_float("learning_rate", 2e-3, "Peak learning rate.")
flags.DEFINE_integer("warmup", 200, "Steps of linear warm-up.")
flags.DEFINE_float("weight_decay", 0.1, "AdamW's weight decay, on matrices.")
flags.DEFINE_float("dropout", 0.1, "Share of each branch's features dropped.")
flags.DEFINE_integer("seed", 0, "Seed of the initial weights, the data order and dropout.")

START = 0  # the byte before every document


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained and how; the flags of the same names say what each is."""

    corpus: str
    out: str
    minutes: float
    steps: int | None
    chunk: int
    batch: int
    length: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    learning_rate: float
    warmup: int
    weight_decay: float
    dropout: float
    seed: int

    def windowing(self):
        """How the held-out text is cut."""
        return {"length": self.length, "stride": self.length // 2}


def model_config(settings):
    return llama.Config(
        vocab_size=256,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.length,
    )


class ProductEmbed(nnx.Embed):
    """A lookup written as a product with one-hot rows, so that its gradient is a product too.

    The gradient of a plain lookup adds 65536 rows into 256: a scatter whose atomic additions to
    the same few rows wait for each other, and round in bfloat16.
    """

    def __call__(self, tokens):
        rows = jax.nn.one_hot(tokens, self.num_embeddings, dtype=self.dtype)
        return rows @ self.embedding[...].astype(self.dtype)


def initial_model(config, seed):
    """A fresh model with float32 parameters that computes in bfloat16.

    The two projections that write to the residual stream start smaller by the square root of
    their number (Radford et al., 2019).
    """
    rngs = nnx.Rngs(seed)
    model = llama.Llama(config, dtype=jnp.bfloat16, rngs=rngs)
    model.embed = ProductEmbed(
        config.vocab_size,
        config.hidden_size,
        dtype=jnp.bfloat16,
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )
    for block in model.layers:
        for linear in (block.attention.out, block.mlp.down):
            linear.kernel.set_value(linear.kernel[...] / (2 * config.num_hidden_layers) ** 0.5)
    return model


def learning_rate(step, total, settings):
    """Linear warm-up, then a cosine to a hundredth of the peak; both arguments may be traced."""
    warm = (step + 1) / settings.warmup
    progress = jnp.clip((step - settings.warmup) / jnp.maximum(total - settings.warmup, 1), 0, 1)
    cosine = 0.01 + 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return settings.learning_rate * jnp.minimum(warm, cosine)


def branch_dropout(key, rate):
    """Dropout whose mask is shared along the sequence: cheap to draw, as strong per feature."""
    drawn = 0

    def drop(branch):
        nonlocal drawn
        drawn += 1
        batch, _, features = branch.shape
        keep = jax.random.bernoulli(jax.random.fold_in(key, drawn), 1 - rate, (batch, 1, features))
        return branch * (keep / (1 - rate)).astype(branch.dtype)

    return drop if rate else lambda branch: branch


def optimizer(settings):
    matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(settings.weight_decay, mask=matrices),
    )


@functools.partial(jax.jit, static_argnames=("graph", "chunk", "settings"), donate_argnums=(1, 2))
def train_chunk(graph, params, moments, corpus, first, total, key, chunk, settings):
    """`chunk` optimizer steps on random stretches of the corpus.

    Returns:
      Parameters, optimizer state, and the loss of each step in bits per byte.
    """

    def loss(params, tokens, key):
        model = nnx.merge(graph, params)
        logits = model(tokens[:, :-1], dropout=branch_dropout(key, settings.dropout))
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(tokens[:, 1:], 256)).mean()

    def step(carry, i):
        params, moments = carry
        order, masks = jax.random.split(jax.random.fold_in(key, i))
        stretch = settings.length + 1
        starts = jax.random.randint(order, settings.batch, 0, corpus.size - stretch + 1)
        tokens = jax.vmap(lambda at: jax.lax.dynamic_slice(corpus, (at,), (stretch,)))(starts)
        nats, gradients = jax.value_and_grad(loss)(params, tokens.astype(jnp.int32), masks)
        updates, moments = optimizer(settings).update(gradients, moments, params)
        rate = learning_rate(i, total, settings)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, moments), nats / jnp.log(2.0)

    steps = first + jnp.arange(chunk)
    (params, moments), bits = jax.lax.scan(step, (params, moments), steps)
    return params, moments, bits


def train(graph, params, corpus, held_out, settings):
    """Trains until the steps or the minutes are used up.

    The first chunk compiles, the second is timed; what is left of the minutes then gives the
    number of steps. The learning rate does not depend on it before the warm-up is over.

    Returns:
      Parameters, and the record: steps, curves of (step, bits per byte), seconds. The held-out
      curve is for the reader alone; nothing is chosen by it.
    """
    begun = time.monotonic()
    moments = optimizer(settings).init(params)
    key = jax.random.key(settings.seed)
    total, done, curve, held_out_curve, stamps = settings.steps or 2**30, 0, [], [], [begun]
    while done < total:
        chunk = min(settings.chunk, total - done)
        params, moments, bits = train_chunk(
            graph, params, moments, corpus, done, float(total), key, chunk, settings
        )
        bits = np.asarray(bits)
        if not np.isfinite(bits).all():
            raise FloatingPointError(f"the loss is not finite after {done} steps; lower the rate")
        done += chunk
        stamps.append(time.monotonic())
        if settings.steps is None and len(stamps) == 3:
            per_chunk = stamps[2] - stamps[1]
            # A reserve, as the last chunk must not be cut off before the rate has come down.
            left = 0.98 * (60 * settings.minutes - (stamps[2] - begun))
            total = done + settings.chunk * max(0, int(left / per_chunk))
            if total < 2 * settings.warmup:
                print(f"warning: --minutes={settings.minutes} allows for only {total} steps")
        curve.append((done, round(float(bits.mean()), 4)))
        elapsed = stamps[-1] - begun
        per_step = (stamps[-1] - stamps[1]) / max(done - settings.chunk, 1)
        left = "" if total == 2**30 else f", {(total - done) * per_step:.0f} s left"
        of = "" if total == 2**30 else f" of {total}"
        print(
            f"step {done}{of}: {curve[-1][1]:.4f} bits per byte, {elapsed:.0f} s{left}", flush=True
        )
        if done % (10 * settings.chunk) == 0:
            bits = evaluation.bits_per_token(
                nnx.merge(graph, params), held_out, batch=32, limit=64, **settings.windowing()
            )
            held_out_curve.append((done, round(bits, 4)))
            print(f"step {done}: {bits:.4f} bits per byte on 64 held-out windows", flush=True)
    return params, {
        "steps": done,
        "curve_bits_per_byte": curve,
        "held_out_curve_bits_per_byte": held_out_curve,
        "seconds": round(stamps[-1] - begun, 1),
        "seconds_first_chunk": round(stamps[1] - begun, 1),
        "milliseconds_per_step": round(1e3 * per_step, 3),
    }


def main(_):
    began = time.monotonic()
    settings = cli.settings(Settings)
    with np.load(settings.corpus) as corpus:
        text, held_out = jnp.asarray(corpus["train"]), corpus["held_out"]
        libraries = corpus["libraries"].tolist()
    config = model_config(settings)
    graph, params = nnx.split(initial_model(config, settings.seed))
    size = sum(p.size for p in jax.tree.leaves(params))
    print(
        f"{size / 1e6:.2f} M parameters, {text.size / 1e6:.1f} MB to train on, "
        f"{held_out.size / 1e6:.2f} MB held out, {jax.devices()[0].device_kind}",
        flush=True,
    )
    params, record = train(graph, params, text, held_out, settings)

    model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    checkpoint.save(settings.out, model, jnp.bfloat16, extra={"bos_token_id": START})
    loaded = checkpoint.load(settings.out)
    with jax.default_matmul_precision("highest"):
        bits = evaluation.bits_per_token(loaded, held_out, batch=16, **settings.windowing())
    print(f"{bits:.4f} bits per byte on the held-out modules, weights in bfloat16", flush=True)

    record |= {
        "held_out_bits_per_byte": round(bits, 4),
        "held_out_modules": HELD_OUT,
        "held_out_bytes": held_out.size,
        "windowing": settings.windowing(),
        "train_libraries": libraries,
        "train_bytes": text.size,
        "bytes_read": record["steps"] * settings.batch * settings.length,
        "parameters": size,
        "seconds_in_all": round(time.monotonic() - began, 1),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "flags": {
            name: value
            for name, value in dataclasses.asdict(settings).items()
            if name not in ("corpus", "out")
        },
    }
    write_json(pathlib.Path(settings.out) / "record.json", record)
    print(f"written: {settings.out}")


if __name__ == "__main__":
    cli.run(main)
