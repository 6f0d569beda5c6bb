"""How long a run will still take, told from the layers solved so far."""

import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax


class _Seconds(threading.local):
    """Seconds that the present thread has spent on compilation."""

    here = 0.0


_seconds = _Seconds()
_everywhere = [0.0]  # the same of all threads


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    # Tracing is not among them: one trace's duration holds those of the traces inside it.
    if event.startswith("/jax/core/compile/") and "trace" not in event:
        _seconds.here += duration_secs
        _everywhere[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


def compile_seconds(all_threads: bool = False) -> float:
    """Seconds that the present thread, or all of them, has spent on compilation so far."""
    return _everywhere[0] if all_threads else _seconds.here


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


class Pace:
    """The time that layers and passes have taken, with what compilation took apart from it.

    A layer of a program that has run before takes what that took; one of a new program what its
    work takes at the rate of its method, or of all, and the compilation of a program. So does the
    calibration pass before a stage.

    Args:
      stages: For each stage its layers' tasks by path.
    """

    def __init__(self, stages: Sequence[Mapping[str, Task]]):
        self._left = [dict(stage) for stage in stages]
        self._kinds = [frozenset(task.program for task in stage.values()) for stage in stages]
        self._solved: dict[Hashable, list[tuple[Task, float]]] = {}
        self._programs: dict[Hashable, float] = {}  # seconds that each took to compile
        self._passes: list[float] = []
        self._pass_programs: dict[Hashable, float] = {}

    def calibrated(self, seconds: float, compiling: float = 0.0) -> None:
        """Records that the pass before the next stage took `seconds`, and `compiling` of them."""
        kind = self._kinds[len(self._passes)]
        self._passes.append(max(seconds - compiling, 0.0))
        self._pass_programs[kind] = self._pass_programs.get(kind, 0.0) + compiling

    def solved(self, path: str, seconds: float, compiling: float = 0.0) -> None:
        """Records that a layer took `seconds`, and `compiling` of them."""
        task = self._take(path)
        net = max(seconds - compiling, 0.0)
        self._solved.setdefault(task.program, []).append((task, net))
        self._programs[task.program] = self._programs.get(task.program, 0.0) + compiling

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
        if not self._solved:
            return None
        return self._solving() + self._calibrating()

    def _calibrating(self) -> float:
        left = self._kinds[len(self._passes) :]
        passes = self._passes[1:] or self._passes  # the first is slowed by what is new
        new = set(left) - self._pass_programs.keys()
        return len(left) * _mean(passes) + len(new) * _mean(self._pass_programs.values())

    def _solving(self) -> float:
        rates, compiling = self._rates(), _mean(self._programs.values())
        known, total = set(self._programs), 0.0
        for stage in self._left:
            loads: dict[Hashable, float] = {}
            for task in stage.values():
                if task.program in self._solved:
                    load = _mean(_usual(self._solved[task.program]))
                else:
                    load = rates.get(task.method, rates[None]) * task.work
                if task.program not in known:
                    known.add(task.program)
                    load += compiling
                loads[task.device] = loads.get(task.device, 0.0) + load
            total += max(loads.values(), default=0.0)
        return total

    def _rates(self) -> dict[str | None, float]:
        """Seconds per unit of work, of each method and (None) of all."""
        spent: dict[str | None, tuple[float, float]] = {}
        for solved in self._solved.values():
            task, seconds = solved[0][0], _mean(_usual(solved))
            for method in (task.method, None):
                total, work = spent.get(method, (0.0, 0.0))
                spent[method] = total + seconds, work + task.work
        return {method: seconds / work for method, (seconds, work) in spent.items()}


def _usual(solved: Sequence[tuple[Task, float]]) -> list[float]:
    """Seconds of a program's layers, without the first where there are others: it warms up."""
    seconds = [seconds for _, seconds in solved]
    return seconds[1:] or seconds


def _mean(numbers: Iterable[float]) -> float:
    numbers = list(numbers)
    return sum(numbers) / max(len(numbers), 1)
