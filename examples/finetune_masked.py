"""Fine-tunes a packed model with its sparsity fixed: handwritten digits, from dense to packed.

    python -m examples.finetune_masked --density=0.05

A dense classifier is trained on scikit-learn's digits, its hidden layers are pruned by magnitude
and packed, and the packed model is trained on. The optimizer sees only the stored values, so no
mask is applied anywhere: a weight that was pruned away has no entry and cannot come back.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import dsf_jax
import macko_jax
import macko_jax.flax_nnx
from examples import cli

flags.DEFINE_float(
    "density", 0.05, "Kept share of the hidden layers' weights.", lower_bound=0.0, upper_bound=1.0
)
flags.DEFINE_integer("hidden", 256, "Width of the two hidden layers.", lower_bound=1)
flags.DEFINE_integer("epochs", 30, "Passes over the data, before and after pruning.")
flags.DEFINE_integer("batch", 128, "Images per step.", lower_bound=1)
flags.DEFINE_float("learning_rate", 1e-3, "AdamW's learning rate.")
flags.DEFINE_float("weight_decay", 1e-2, "AdamW's weight decay.")
flags.DEFINE_integer("seed", 0, "Seed of the weights, the split and the order of the data.")
flags.DEFINE_string("out", None, "File of the packed model; by default none is written.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the classifier is trained and pruned; the flags of the same names say what each is."""

    density: float
    hidden: int
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    seed: int
    out: str | None


class Classifier(nnx.Module):
    """A perceptron with two hidden layers."""

    def __init__(self, inputs: int, hidden: int, classes: int, rngs: nnx.Rngs):
        self.hidden = nnx.List(
            [nnx.Linear(inputs, hidden, rngs=rngs), nnx.Linear(hidden, hidden, rngs=rngs)]
        )
        self.head = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.head(x)


def cross_entropy(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    loss, grads = nnx.value_and_grad(cross_entropy)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def evaluate(model, images, labels):
    """Cross entropy and accuracy."""
    correct = jnp.argmax(model(images), axis=-1) == labels
    return cross_entropy(model, images, labels), jnp.mean(correct)


def train(model, images, labels, name, settings):
    optimizer = nnx.Optimizer(
        model,
        optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay),
        wrt=nnx.Param,
    )
    rng = np.random.default_rng(settings.seed)
    begin = time.perf_counter()
    for epoch in range(1, settings.epochs + 1):
        order = rng.permutation(len(images))
        losses = [
            train_step(
                model,
                optimizer,
                images[order[i : i + settings.batch]],
                labels[order[i : i + settings.batch]],
            )
            for i in range(0, len(order) - settings.batch + 1, settings.batch)
        ]
        if epoch % 10 == 0 or epoch == settings.epochs:
            seconds = time.perf_counter() - begin
            print(
                f"{name}: epoch {epoch} of {settings.epochs}, "
                f"training loss {np.mean(jax.device_get(losses)):.4f}, {seconds:.1f} s"
            )


def prune(model, density):
    """Prune the hidden layers in place; the small output layer stays dense."""
    for layer in model.hidden:
        weight = layer.kernel[...].T  # [out, in]
        layer.kernel[...] = dsf_jax.prune(weight, density=density, method="magnitude").T


def zero_patterns(model):
    return [np.asarray(macko_jax.decompress(layer.matrix)) == 0 for layer in model.hidden]


def main(_):
    settings = cli.settings(Settings)
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.25, random_state=settings.seed, stratify=digits.target
    )

    def report(name, model):
        loss, accuracy = evaluate(model, test_images, test_labels)
        rows.append((name, float(loss), float(accuracy)))

    rows = []
    model = Classifier(images.shape[1], settings.hidden, 10, nnx.Rngs(settings.seed))
    train(model, train_images, train_labels, "dense", settings)
    report("dense", model)

    prune(model, settings.density)
    packed, layers = macko_jax.flax_nnx.substitute(model, "hidden/.*")
    report(f"packed at density {settings.density:g}", packed)
    print(f"\n{layers}\n")

    before = zero_patterns(packed)
    train(packed, train_images, train_labels, "packed", settings)
    report("packed and fine-tuned", packed)
    after = zero_patterns(packed)

    print(f"\n{'test set':<28}{'loss':>8}{'accuracy':>10}")
    for name, loss, accuracy in rows:
        print(f"{name:<28}{loss:>8.4f}{accuracy:>10.2%}")
    moved = sum(int((a != b).sum()) for a, b in zip(before, after))
    zeros, total = sum(int(a.sum()) for a in after), sum(a.size for a in after)
    print(f"\n{zeros} of {total} hidden weights are zero, {moved} of them other than before")
    if moved:
        raise RuntimeError("Fine-tuning changed the pattern of zeros")
    if settings.out:
        macko_jax.save(settings.out, macko_jax.flax_nnx.to_pure_dict(packed))
        print(f"Saved to {settings.out}")


if __name__ == "__main__":
    cli.run(main)
