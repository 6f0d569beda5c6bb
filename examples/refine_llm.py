"""Refines a packed language model: trains it towards the dense model that it was made from.

    python -m examples.refine_llm --checkpoint=PACKED --teacher=DENSE --out=DIR --stage=block \
        --steps=300 --calibration=FILE
    python -m examples.refine_llm --checkpoint=PACKED --teacher=DENSE --out=DIR --minutes=8 \
        --calibration=FILE --calibration=self --held_out=OTHER

The matrices of PACKED, of examples.compress_llm, are unpacked to dense ones with zeros, their
values are trained so that the outputs of its blocks, or the distributions of the model, come near
the dense model's (`dsf_jax.refine`), and the result is packed as PACKED was. No zero becomes
anything else. DIR serves whatever PACKED serves; its report.json has the loss by step. A run that
was killed goes on when the same command is given again. --stage=block needs the memory of one
block; examples.compress_llm --refine=block does the same as it compresses.
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import flags, logging

import dsf_jax
from dsf_jax.refinement.settings import LEARNING_RATE
from examples import cli
from examples.llama import checkpoint, refinement, texts
from macko_jax.format.quantization import NAMES

flags.DEFINE_string("checkpoint", None, "Required: directory of a packed model.", required=True)
flags.DEFINE_string("teacher", None, "Required: directory of the dense model.", required=True)
flags.DEFINE_string("out", None, "Required: directory of the refined model.", required=True)
flags.DEFINE_enum(
    "stage",
    "model",
    ["model", "block"],
    "What is trained towards the dense model: the whole model's distributions, or the outputs of "
    "one block after the other.",
)
flags.DEFINE_float("minutes", None, "How long; a few steps are timed to find how many fit.")
flags.DEFINE_integer(
    "steps", None, "How many steps in the place of --minutes, of each block.", lower_bound=1
)
flags.DEFINE_multi_string(
    "calibration",
    [],
    "Text file to calibrate on, in UTF-8, which is to train on it; or 'self' for text that the "
    "dense model writes, kept in the directory of the refined model; repeatable; by default what "
    "examples.compress_llm takes.",
)
flags.DEFINE_string("held_out", None, "Text file on which the loss is measured as well.")
flags.DEFINE_integer(
    "windows",
    256,
    "Windows to calibrate on, of each text; all of them are trained on.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "length",
    None,
    "Tokens of a window; by default the model's positions, at most 2048.",
    lower_bound=2,
)
flags.DEFINE_integer("batch", 4, "Windows per step.", lower_bound=1)
flags.DEFINE_integer("held_out_windows", 16, "Windows of --held_out.", lower_bound=1)
flags.DEFINE_float("learning_rate", LEARNING_RATE, "Largest learning rate.")
flags.DEFINE_enum(
    "masks", "fixed", ["fixed", "rechosen"], "Whether zeros stay, or their number alone."
)
flags.DEFINE_enum(
    "values", None, [*NAMES], "Train and store values in 8 bits; by default as PACKED has them."
)
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "What is computed in; by default bfloat16 for a whole model on a GPU, and float32 otherwise.",
)
flags.DEFINE_integer(
    "devices", 1, "Devices to which the windows of a step are shared out; 0 for all.", lower_bound=0
)
flags.DEFINE_bool("remat", False, "Save memory: compute parts of the forward pass twice.")
flags.DEFINE_integer("seed", 0, "Seed of the order of windows.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is refined and how; the flags of the same names say what each is."""

    checkpoint: str
    teacher: str
    out: str
    stage: str
    minutes: float | None
    steps: int | None
    calibration: tuple[str, ...]
    held_out: str | None
    windows: int
    length: int | None
    batch: int
    held_out_windows: int
    learning_rate: float
    masks: str
    values: str | None
    dtype: str | None
    devices: int
    remat: bool
    seed: int

    def compute_dtype(self):
        is_large = self.stage == "model" and jax.default_backend() == "gpu"
        return jnp.dtype(self.dtype or ("bfloat16" if is_large else "float32"))

    def mesh(self):
        """The devices that share a step; None for one."""
        here = jax.devices()
        count = self.devices or len(here)
        if count > len(here):
            raise ValueError(f"--devices={count}, and there are {len(here)}")
        if self.batch % count:
            raise ValueError(f"--batch={self.batch} windows cannot be shared by {count} devices")
        return None if count == 1 else jax.make_mesh((count,), ("data",), devices=here[:count])

    def batches(self, names, count):
        """Windows of texts, a step's each."""
        windows = texts.read_windows(names, self.teacher, self.out, count, self.length)
        return texts.split_steps(windows, self.batch)

    def training(self):
        """The keywords of `dsf_jax.refine`."""
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either --minutes or --steps")
        parts = 1
        if self.stage == "block":
            parts = checkpoint.load_config(self.checkpoint).num_hidden_layers
        return {
            "stage": self.stage,
            "steps": self.steps,
            "seconds": self.minutes and 60 * self.minutes / parts,
            "learning_rate": self.learning_rate,
            "masks": self.masks,
            "mesh": self.mesh(),
            "remat": self.remat,
            "seed": self.seed,
        }


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax tells all that it does
    settings = cli.settings(Settings)
    refinement.check(settings.checkpoint, settings.teacher, settings.out)
    training = settings.training()
    batches = settings.batches(settings.calibration, settings.windows)
    held_out = None
    if settings.held_out:
        held_out = settings.batches([settings.held_out], settings.held_out_windows)
    print(
        f"refining {settings.checkpoint} on {len(batches)} batches of {batches[0].shape[0]} "
        f"windows of {batches[0].shape[1]} tokens, in {settings.compute_dtype()}",
        flush=True,
    )
    report, size = refinement.refine_checkpoint(
        settings.checkpoint,
        settings.teacher,
        settings.out,
        batches,
        held_out=held_out,
        dtype=settings.compute_dtype(),
        values=settings.values,
        callback=dsf_jax.print_progress,
        text=settings.calibration,
        **training,
    )
    print(report)
    print(f"refined model: {settings.out}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
