"""The loop of a refinement: its steps watched over, timed, and kept on disk."""

import dataclasses
import time
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsf_jax.refinement import masks
from dsf_jax.refinement.checkpoints import Checkpoints
from dsf_jax.refinement.report import RefineProgress
from dsf_jax.refinement.settings import Settings
from dsf_jax.refinement.step import Objective, Part, State, Step
from dsf_jax.refinement.student import Student

WINDOW = 5  # steps, at least, after which losses are looked at
DIVERGED = 4.0  # times the mean loss of the first window
TINY = 1e-7  # a loss that is below it is not called diverged
# Steps that say how long one takes: at least so many, and so much of the time that there is.
TRIAL, TRIAL_SHARE = 3, 0.02


@dataclasses.dataclass
class Trained:
    """What came out of a training.

    Attributes:
      leaves: The trained leaves, of the types that the model holds them in.
      steps: How many there were to be.
      losses: By step.
      held_out: (step, loss) on batches that were not trained on.
      seconds: Of training, over all runs that it took.
      stopped: Why it ended before its time; None where it did not.
    """

    leaves: list[jax.Array]
    steps: int
    losses: list[float]
    held_out: list[tuple[int, float]]
    seconds: float
    stopped: str | None


class Trainer:
    """Trains the leaves of a student.

    Args:
      student: Which leaves.
      leaves: All leaves of the model; those that are trained as they are held.
      objective: What is made small.
      constants: Arrays that it needs, such as the dense model's.
      parts: What is trained on.
      held_out: What the loss is measured on beside it.
      settings: How.
      mark: Fingerprint of the run; None where nothing is kept on disk.
      name: What is trained, for messages; "" for a whole model.
      form: What the objective is known by: trainers of one form may share a step.
      steps: Those of earlier trainers, which are shared, by form; None shares none.
    """

    def __init__(
        self,
        student: Student,
        leaves: Sequence[jax.Array],
        objective: Objective,
        constants: Any,
        parts: Sequence[Part],
        held_out: Sequence[Part],
        settings: Settings,
        mark: str | None = None,
        name: str = "",
        form: Hashable = None,
        steps: dict[Hashable, Step] | None = None,
    ):
        self.began = time.perf_counter()
        self.settings, self.name = settings, name
        self.parts, self.held_out = list(parts), list(held_out)
        if settings.accumulate > 1 and len({part.form for part in self.parts}) > 1:
            raise ValueError(
                f"accumulate={settings.accumulate} joins batches to one step, which needs batches "
                "of one shape and structure"
            )
        self.mesh = None
        if settings.mesh is not None:  # its axes are the compiler's, whatever they were
            self.mesh = Mesh(settings.mesh.devices, settings.mesh.axis_names)
            self._check_mesh()
        start = [leaves[i] for i in student.trained]
        trained = set(student.trained)
        frozen = [None if i in trained else leaf for i, leaf in enumerate(leaves)]
        self.constants = self._everywhere((frozen, constants))
        self.step = self._step(student, start, objective, form, {} if steps is None else steps)
        self.state = self._everywhere(self.step.start(start))
        self.directory = None
        if settings.work_dir is not None and mark is not None:
            self.directory = Checkpoints(settings.work_dir, mark)

    def _step(
        self,
        student: Student,
        start: Sequence[jax.Array],
        objective: Objective,
        form: Hashable,
        steps: dict[Hashable, Step],
    ) -> Step:
        """The step, one that was made before if there is one of this form."""
        settings = self.settings
        changing = [masks.can_change(*pair) for pair in zip(start, student.matrices)]
        if settings.masks == "rechosen" and not any(changing):
            raise ValueError(
                "masks='rechosen' moves non-zeros freely within a matrix, and every compressed "
                "matrix has an N:M pattern; take masks='fixed'"
            )
        held = [leaf.dtype for leaf in start]
        key = (form, student.form, tuple(held), tuple(map(len, changing)), settings.form)
        if key not in steps:
            steps[key] = Step(student, held, changing, objective, settings, self.mesh)
        return steps[key]

    # Where arrays are.

    def _check_mesh(self) -> None:
        assert self.mesh is not None
        for part in [*self.parts, *self.held_out]:
            for array in part.arrays:
                if not array.ndim or array.shape[0] % self.mesh.size:
                    raise ValueError(
                        f"a batch has an array of shape {tuple(array.shape)}, whose first axis is "
                        f"to be shared out to {self.mesh.size} devices; give batches of a multiple"
                    )

    def _everywhere(self, tree: Any) -> Any:
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def _shared_out(self, tree: Any, axis: int) -> Any:
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.device_put(
            tree, NamedSharding(self.mesh, P(*[None] * axis, self.mesh.axis_names))
        )

    # All steps.

    def order(self, first: int, count: int) -> list[int]:
        """Which parts the `count` draws from the `first` on take: pass after pass, shuffled."""
        found = []
        for draw in range(first, first + count):
            turn, place = divmod(draw, len(self.parts))
            shuffled = np.random.default_rng([self.settings.seed, turn])
            found.append(int(shuffled.permutation(len(self.parts))[place]))
        return found

    def data(self, step: int) -> tuple[Part, Any]:
        """A part, for its form, and the arrays of a step."""
        count = self.settings.accumulate
        chosen = [self.parts[i] for i in self.order(step * count, count)]
        if count == 1:
            return chosen[0], self._shared_out(chosen[0].data, 0)
        stacked = jax.tree.map(
            lambda *x: np.stack([np.asarray(a) for a in x]), *(part.data for part in chosen)
        )
        return chosen[0], self._shared_out(stacked, 1)

    def advance(self, state: State, step: int, steps: int) -> tuple[State, Any, Any]:
        part, data = self.data(step)
        return self.step.advance(state, part, self.constants, data, steps)

    def run(self) -> Trained:
        """Trains, or goes on where an earlier run was."""
        known: dict[str, Any] = {"losses": [], "held_out": [], "seconds": 0.0, "stopped": None}
        found = None if self.directory is None else self.directory.load(self.state)
        if found is not None:
            self.state, known = found
        else:
            self._measure(known, 0)
            known["steps"] = self.settings.steps or self._steps_that_fit()
        earlier, saved = known["seconds"], time.perf_counter()
        steps, first = known["steps"], len(known["losses"])
        window = max(WINDOW, min(20, steps // 40))
        good, pending = self._snapshot(), []
        for step in range(first, steps if known["stopped"] is None else first):
            self.state, loss, finite = self.advance(self.state, step, steps)
            pending.append((loss, finite))
            if (step + 1) % window and step + 1 < steps:
                continue
            known["stopped"] = self._trouble(known["losses"], jax.device_get(pending), window)
            known["seconds"] = earlier + time.perf_counter() - self.began
            if known["stopped"] is not None:
                self._stop(known, good)
                break
            known["losses"] += [float(loss) for loss, _ in jax.device_get(pending)]
            good, pending = self._snapshot(), []
            self._measure_now_and_then(known, step + 1, window)
            self._say(known, step + 1, first)
            if time.perf_counter() - saved > self.settings.save_seconds and step + 1 < steps:
                self._save(known)
                saved = time.perf_counter()
        if first < steps:
            self._save(known)
        if self.directory is not None:
            self.directory.close()
        return Trained(self.step.result(self.state.parameters), **known)

    def _snapshot(self) -> State:
        """The state as it is, which the next step would consume."""
        return jax.tree.map(jnp.copy, self.state)

    def _trouble(self, losses: list[float], found: list, window: int) -> str | None:
        """Why the last steps were no good; None where they were."""
        for i, (loss, finite) in enumerate(found):
            if not np.isfinite(loss) or not (finite or self.step.is_half):
                what = "loss" if not np.isfinite(loss) else "gradient"
                return f"its {what} was NaN or infinite at step {len(losses) + i + 1}"
        if self.step.is_half and float(self.state.loss_scale) < 2.0**-10:
            return f"its gradients overflowed float16 up to step {len(losses) + len(found)}"
        mean = float(np.mean([loss for loss, _ in found]))
        first = float(np.mean(losses[:window])) if losses else None
        if first is not None and mean > max(DIVERGED * first, TINY):
            return (
                f"its loss diverged: {mean:.3g} on average up to step {len(losses) + len(found)}, "
                f"and {first:.3g} at first"
            )
        return None

    def _stop(self, known: dict[str, Any], good: State) -> None:
        """Goes back to the last good state, or refuses where there is none.

        Raises:
          FloatingPointError: There is none.
        """
        what = f"refinement of {self.name or 'the model'} stopped: {known['stopped']}"
        remedy = "lower the learning rate"
        if not known["losses"]:
            raise FloatingPointError(
                f"{what}, among its first; look at the batches and at the dense model's outputs on "
                f"them, or {remedy}"
            )
        self.state = good
        warnings.warn(
            f"{what}. The model as it was after step {len(known['losses'])} is what is returned; "
            f"{remedy}",
            RuntimeWarning,
            stacklevel=5,
        )

    def _steps_that_fit(self) -> int:
        """How many steps the seconds have room for, from some that are thrown away again."""
        assert self.settings.seconds is not None
        state, _, _ = self.advance(self._snapshot(), 0, 1)
        jax.block_until_ready(state)
        compiled, spent, count = time.perf_counter(), 0.0, 0
        while count < TRIAL or spent < TRIAL_SHARE * self.settings.seconds:
            state, _, _ = self.advance(state, count, TRIAL)
            jax.block_until_ready(state)
            spent, count = time.perf_counter() - compiled, count + 1
        left = self.settings.seconds - (compiled + spent - self.began)
        return max(1, int(left * count / spent))

    def _save(self, known: dict[str, Any]) -> None:
        if self.directory is not None:
            self.directory.save(len(known["losses"]), self.state, known)

    def _say(self, known: dict[str, Any], done: int, first: int) -> None:
        if self.settings.callback is not None:
            each = (time.perf_counter() - self.began) / (done - first)
            recent = known["losses"][-WINDOW:]
            left = each * (known["steps"] - done)
            self.settings.callback(
                RefineProgress(done, known["steps"], float(np.mean(recent)), left, self.name)
            )

    # Batches that are not trained on.

    def _measure_now_and_then(self, known: dict[str, Any], done: int, window: int) -> None:
        steps = known["steps"]
        quarter = -(-steps // (4 * window)) * window
        if done == steps or done % quarter == 0:
            self._measure(known, done)

    def _measure(self, known: dict[str, Any], done: int) -> None:
        if self.held_out:
            known["held_out"].append([done, self.measure(self.held_out)])

    def measure(self, parts: Sequence[Part]) -> float:
        """The loss over some parts, of the model as it is."""
        sums = []
        for part in parts:
            data = self._shared_out(part.data, 0)
            sums.append(self.step.measure(self.state, part, self.constants, data))
        total, count = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
        return float(total / max(count, np.finfo(np.float32).tiny))
