"""How long a run will still take, told from the layers solved so far."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple


class Task(NamedTuple):
    """One layer to be solved.

    Attributes:
      method: The method that solves it.
      program: What it is compiled for: its shape, method, options and device.
      work: Multiplications, up to a factor that layers of one method share.
      device: Where it is solved; devices work side by side.
    """

    method: str
    program: Hashable
    work: float
    device: Hashable


class _First(NamedTuple):
    """The layers with which a program was compiled, and their seconds."""

    leader: str
    layers: list[tuple[Task, float]]


class Pace:
    """The time that layers have taken, with what compilation took apart from it.

    The first layer of a program compiles it, which takes far longer than a small layer itself. Its
    seconds are therefore not taken for those of the layers to come: a layer of a program that has
    run before takes what it took then, one of a new program what its work takes at the rate of the
    others, and the seconds by which the first layers of programs exceeded that rate.

    Args:
      stages: For each stage its layers' tasks by path.
    """

    def __init__(self, stages: Sequence[Mapping[str, Task]]):
        self._left = [dict(stage) for stage in stages]
        self._kinds = [frozenset(task.program for task in stage.values()) for stage in stages]
        self._first: dict[Hashable, _First] = {}
        self._later: list[tuple[Task, float]] = []
        self._passes: list[float] = []
        self._compiled: dict[frozenset, float] = {}

    def calibrated(self, seconds: float, compile_seconds: float) -> None:
        """Records that the calibration of the next stage took `seconds`, compilation included."""
        kind = self._kinds[len(self._passes)]
        self._passes.append(max(seconds - compile_seconds, 0.0))
        self._compiled.setdefault(kind, compile_seconds)

    def solved(self, path: str, seconds: float, leader: str | None = None) -> None:
        """Records that a layer took `seconds`.

        Args:
          path: The layer.
          seconds: Its share of the time, where several layers went through a program together.
          leader: The first of those; None where the layer was alone.
        """
        task, leader = self._take(path), leader or path
        first = self._first.setdefault(task.program, _First(leader, []))
        (first.layers if first.leader == leader else self._later).append((task, seconds))

    def resumed(self, path: str) -> None:
        """Records that a layer need not be solved."""
        self._take(path)

    def _take(self, path: str) -> Task:
        stage = next(stage for stage in self._left if path in stage)
        return stage.pop(path)

    def seconds_left(self) -> float | None:
        """An estimate of the time left; None before there is one."""
        if not any(self._left):
            return 0.0
        solving = self._solving()
        return None if solving is None else solving + self._calibrating()

    def _calibrating(self) -> float:
        left = self._kinds[len(self._passes) :]
        # The first pass has small programs to compile that are not counted as compilation.
        passes = self._passes[1:] or self._passes
        seconds = len(left) * sum(passes) / max(len(passes), 1)
        new = set(left) - self._compiled.keys()
        return seconds + len(new) * sum(self._compiled.values()) / max(len(self._compiled), 1)

    def _rates(self) -> dict[str | None, float]:
        """Seconds per unit of work, of each method and (None) of all, without compilation."""
        spent: dict[str | None, tuple[float, float]] = {}
        for task, seconds in self._later:
            for method in (task.method, None):
                total, work = spent.get(method, (0.0, 0.0))
                spent[method] = total + seconds, work + task.work
        return {method: seconds / work for method, (seconds, work) in spent.items()}

    def _solving(self) -> float | None:
        if not self._first:
            return None
        rates = self._rates()

        def at_rate(task: Task) -> float:
            # Without a rate, all that a first layer took is taken for compilation.
            return rates.get(task.method, rates.get(None, 0.0)) * task.work

        excess = [
            max(sum(seconds - at_rate(task) for task, seconds in first.layers), 0.0)
            for first in self._first.values()
        ]
        compilation = sum(excess) / len(excess)
        known, total = set(self._first), 0.0
        for stage in self._left:
            loads: dict[Hashable, float] = {}
            for task in stage.values():
                same = [seconds for other, seconds in self._later if other.program == task.program]
                if not same and task.program in self._first and not rates:
                    return None
                load = sum(same) / len(same) if same else at_rate(task)
                if task.program not in known:
                    known.add(task.program)
                    load += compilation
                loads[task.device] = loads.get(task.device, 0.0) + load
            total += max(loads.values(), default=0.0)
        return total
