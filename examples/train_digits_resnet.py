"""Trains a small ResNet on scikit-learn's digits and compresses it by several methods.

Every method keeps the same number of non-zeros in every convolution, is calibrated on the same
training images, and is then fine-tuned for the same number of steps with its zeros held fixed.
Printed and recorded for each: accuracy and cross-entropy on held-out digits before and after
fine-tuning, and the bytes of the packed convolutions. Takes some minutes on two CPU cores.

    python -m examples.train_digits_resnet --density=0.2 --density=0.1
"""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from sklearn.datasets import load_digits

import dsf_jax
from dsf_jax import export
from dsf_jax.pipeline.solve import METHODS
from examples import cli
from examples.records import write_json

flags.DEFINE_multi_float(
    "density", [0.2, 0.1], "Kept non-zeros over size, in each layer; repeatable.", 0, 1
)
flags.DEFINE_multi_enum(
    "method", ["magnitude", "sparsegpt", "admm", "dsf"], [*METHODS], "How to compress; repeatable."
)
flags.DEFINE_integer("epochs", 20, "Epochs of training the dense network.")
flags.DEFINE_integer("finetune_epochs", 6, "Epochs of fine-tuning each compressed network.")
flags.DEFINE_integer("width", 16, "Channels of the first stage; then 2 and 4 times as many.")
flags.DEFINE_integer("batch", 64, "Images per step.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of weights, data order and split.")
flags.DEFINE_string("out", "runs/digits_resnet.json", "File of the record.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run compares; the flags of the same names say what each is."""

    density: tuple[float, ...]
    method: tuple[str, ...]
    epochs: int
    finetune_epochs: int
    width: int
    batch: int
    seed: int
    out: str


def batch_norm(size, rngs):
    # Few steps are taken, so the running statistics must follow within some dozens of them.
    return nnx.BatchNorm(size, momentum=0.9, rngs=rngs)


class ResidualBlock(nnx.Module):
    """Two 3 x 3 convolutions with batch norm, added to the input or to a 1 x 1 shortcut of it."""

    def __init__(self, inputs, outputs, stride, rngs):
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), stride, use_bias=False, rngs=rngs)
        self.norm1 = batch_norm(outputs, rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = batch_norm(outputs, rngs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nnx.Conv(inputs, outputs, (1, 1), stride, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A stem, three residual blocks of rising width and a linear head."""

    def __init__(self, width, rngs):
        self.stem = nnx.Conv(1, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = batch_norm(width, rngs)
        self.blocks = nnx.List(
            [
                ResidualBlock(width, width, 1, rngs),
                ResidualBlock(width, 2 * width, 2, rngs),
                ResidualBlock(2 * width, 4 * width, 2, rngs),
            ]
        )
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def load_split(seed):
    """Digits as [n, 8, 8, 1] in [0, 1], shuffled: two thirds to train on, one third held out."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = (digits.images / 16).astype(np.float32)[order, ..., None]
    labels = digits.target.astype(np.int32)[order]
    cut = 2 * len(order) // 3
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss(model):
        return cross_entropy(model(images), labels)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def logits_of(model, images):
    return model(images)


def train(model, data, optimizer, epochs, batch, seed):
    """Trains in place on images shifted by up to one pixel."""
    images, labels = data
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    model.train()
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            shift = tuple(rng.integers(-1, 2, 2))
            train_step(model, optimizer, np.roll(images[chosen], shift, (1, 2)), labels[chosen])
    model.eval()


def evaluate(model, data):
    """Accuracy and cross-entropy on held-out images."""
    logits = logits_of(model, data[0])
    accuracy = float((logits.argmax(-1) == data[1]).mean())
    return {"accuracy": accuracy, "cross_entropy": float(cross_entropy(logits, data[1]))}


def schedule(peak, epochs, images, batch):
    return optax.cosine_decay_schedule(peak, epochs * (images // batch))


def compress(model, batches, method, density, training, held_out, settings):
    """Compresses, fine-tunes and packs the network; a row of the record."""
    # The stem has 9 inputs and 0.1 % of the weights; like the head it stays dense.
    rules = [dsf_jax.Rule("stem", skip=True)]
    start = time.time()
    new, report = dsf_jax.compress_model(
        model, batches, method=method, density=density, rules=rules
    )
    seconds = time.time() - start
    new.eval()
    before = evaluate(new, held_out)
    rate = schedule(1e-3, settings.finetune_epochs, len(training[1]), settings.batch)
    train(
        new,
        training,
        dsf_jax.keep_sparsity(optax.adam(rate)),
        settings.finetune_epochs,
        settings.batch,
        settings.seed + 1,
    )
    after = evaluate(new, held_out)
    packed, packing = export.pack(new)
    packed.eval()
    agreement = float(jnp.abs(logits_of(packed, held_out[0]) - logits_of(new, held_out[0])).max())
    return {
        "density": density,
        "method": method,
        "nonzeros": report.nonzeros,
        "mean_relative_error": float(np.mean([layer.error for layer in report.layers])),
        "before": before,
        "after": after,
        "dense_bytes": sum(p.bytes_before for p in packing.packed),
        "packed_bytes": sum(p.bytes_after for p in packing.packed),
        "packed_logits_differ_by": agreement,
        "compression_seconds": round(seconds, 1),
    }


def main(_):
    began = time.time()
    settings = cli.settings(Settings)
    training, held_out = load_split(settings.seed)
    count = len(training[1])
    model = ResNet(settings.width, nnx.Rngs(settings.seed))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"ResNet of {size} parameters, {count} digits to train on, {len(held_out[1])} held out")
    rate = schedule(3e-3, settings.epochs, count, settings.batch)
    optimizer = optax.adamw(rate, weight_decay=1e-3)
    train(model, training, optimizer, settings.epochs, settings.batch, settings.seed)
    dense = evaluate(model, held_out)
    print(f"dense: {dense}  ({time.time() - began:.0f} s)", flush=True)

    batches = np.array_split(training[0], 8)[:-1]
    batches = [batch[: len(batches[-1])] for batch in batches]
    record = {
        "dense": dense,
        "parameters": size,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"},
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "rows": [],
    }
    for density, method in itertools.product(settings.density, settings.method):
        row = compress(model, batches, method, density, training, held_out, settings)
        record["rows"].append(row)
        print(format_row(row), flush=True)
        write_json(settings.out, record)  # after each row: a run that is cut short leaves some

    print("\n" + format_table(dense, record["rows"]))
    print(f"\nwritten: {settings.out}  ({time.time() - began:.0f} s in all)")


def format_row(row):
    before, after = row["before"], row["after"]
    return (
        f"{row['density']:7.2f}  {row['method']:10}  {row['nonzeros']:9d}  "
        f"{row['mean_relative_error']:9.4f}  "
        f"{100 * before['accuracy']:7.2f} {before['cross_entropy']:7.4f}  "
        f"{100 * after['accuracy']:7.2f} {after['cross_entropy']:7.4f}  "
        f"{row['packed_bytes'] / 1e3:9.0f}"
    )


def format_table(dense, rows):
    header = (
        "density  method      non-zeros  rel.error   acc.% and loss   fine-tuned acc.%, loss  "
        "packed kB"
    )
    first = f"{'dense':47}{100 * dense['accuracy']:7.2f} {dense['cross_entropy']:7.4f}"
    return "\n".join([header, first, *map(format_row, rows)])


if __name__ == "__main__":
    cli.run(main)
