"""What became of a refinement: progress lines, a table, JSON."""

import dataclasses
from typing import Any

from dsf_jax.pipeline.report import format_seconds


@dataclasses.dataclass(frozen=True)
class RefineProgress:
    """Where a refinement stands: `step` of `steps`, counted from 1.

    Attributes:
      step: The last step that is done.
      steps: All there will be.
      loss: Mean of the last losses.
      seconds_left: An estimate from the steps so far.
      block: Path of the block that is refined; "" for a whole model.
    """

    step: int
    steps: int
    loss: float
    seconds_left: float
    block: str = ""

    def __str__(self):
        block = f"{self.block} " if self.block else ""
        return (
            f"{block}[{self.step}/{self.steps}] loss {self.loss:.4g}, "
            f"{format_seconds(self.seconds_left)} left"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What became of one block.

    Attributes:
      path: Of its module.
      before: Relative error of its output over all batches before it was refined,
        sum ||target - output||^2 / sum ||target||^2.
      after: The same afterwards.
      losses: By step.
      seconds: That it took.
      stopped: Why it ended before its time; None where it did not.
    """

    path: str
    before: float
    after: float
    losses: tuple[float, ...]
    seconds: float
    stopped: str | None = None

    def __str__(self):
        return (
            f"{self.path}: error {self.before:.3e} -> {self.after:.3e} in "
            f"{len(self.losses)} steps, {format_seconds(self.seconds)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return dataclasses.asdict(self) | {"losses": list(self.losses)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineReport:
    """What became of a refinement; `print(report)` shows a summary.

    Attributes:
      stage: "model" or "block".
      steps: How many steps there were to be, for each block where blocks were refined.
      losses: By step; of blocks one after the other.
      held_out: (step, loss) on batches that were not trained on.
      blocks: What became of each block; empty for stage="model".
      parameters: How many numbers were trained, zeros that stay not counted.
      nonzeros: Of the compressed layers, before and after.
      seconds: Of the whole.
      stopped: Why it ended before its time; None where it did not.
    """

    stage: str
    steps: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    parameters: int
    nonzeros: tuple[int, int]
    seconds: float
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "stage": self.stage,
            "steps": self.steps,
            "losses": list(self.losses),
            "held_out": [list(point) for point in self.held_out],
            "blocks": [block.to_dict() for block in self.blocks],
            "parameters": self.parameters,
            "nonzeros": list(self.nonzeros),
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def __str__(self):
        lines = [str(block) for block in self.blocks]
        if self.losses and not self.blocks:
            ends = f"loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}"
            if self.held_out:
                ends += f", held out {self.held_out[0][1]:.4g} -> {self.held_out[-1][1]:.4g}"
            lines.append(ends)
        lines.append(
            f"{self.stage}: {len(self.losses)} steps in {format_seconds(self.seconds)}, "
            f"{self.parameters} parameters trained, {self.nonzeros[1]} non-zeros "
            f"({self.nonzeros[0]} before)"
        )
        if self.stopped:
            lines.append(f"stopped early: {self.stopped}")
        return "\n".join(lines)
