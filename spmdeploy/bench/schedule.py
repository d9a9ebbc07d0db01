"""Warm-up and interleaved measurement of several backends.

All timing rules are in this module. It measures any `Timeable`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

WARM_UP_SECONDS = 2.0
MAX_WARM_UP_SECONDS = 30.0
"""No further warm-up window begins after this, stable or not."""
WINDOW_SECONDS = 0.5
WINDOW_ITERATIONS = 3
"""Minimum duration and iteration count of a warm-up window."""
STABLE_WINDOWS = 3
STABLE_TOLERANCE = 0.05
"""Largest difference between the medians of the last `STABLE_WINDOWS` windows, relative to the smallest: the rule of
perf_analyzer with half its tolerance."""
TURN_SECONDS = 0.2
"""Minimum duration of a turn: one edit on a CPU, hundreds on a GPU. Shorter turns would measure process switches."""
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Round:
    """One backend's turn in one round."""

    samples: tuple[float, ...]
    """Milliseconds of every iteration."""
    seconds: float
    """Wall-clock time from the first to the last iteration."""
    joules: float | None = None
    """Energy used by the device; None if unavailable."""


class Timeable(Protocol):
    def turn(self, seconds: float, iterations: int) -> Round:
        """Runs until both `seconds` have passed and `iterations` are done."""


@dataclass(frozen=True)
class WarmUp:
    """Record of a warm-up."""

    seconds: float
    iterations: int
    windows: tuple[float, ...]
    """Median of each window in milliseconds."""
    steady: bool
    """Whether the last windows agreed; if not, `MAX_WARM_UP_SECONDS` ended it."""


@dataclass(frozen=True)
class StopCondition:
    """Minimum duration and iteration count of every backend."""

    seconds: float
    iterations: int

    def reached(self, turns: Sequence[Round]) -> bool:
        """Whether the turns of one backend are enough."""
        return (
            len(turns) >= MIN_ROUNDS
            and sum(turn.seconds for turn in turns) >= self.seconds
            and sum(len(turn.samples) for turn in turns) >= self.iterations
        )


def warm_up(backend: Timeable) -> WarmUp:
    """Runs a backend for `WARM_UP_SECONDS` and until its last windows agree, at most `MAX_WARM_UP_SECONDS`."""
    turns: list[Round] = []
    window: list[Round] = []
    windows: list[float] = []
    while True:
        turn = backend.turn(WINDOW_SECONDS, 1)
        turns.append(turn)
        window.append(turn)
        seconds = sum(turn.seconds for turn in turns)
        samples = [sample for turn in window for sample in turn.samples]
        if len(samples) >= WINDOW_ITERATIONS:
            windows.append(statistics.median(samples))
            window = []
        steady = is_stable(windows)
        if (seconds >= WARM_UP_SECONDS and steady) or seconds >= MAX_WARM_UP_SECONDS:
            iterations = sum(len(turn.samples) for turn in turns)
            return WarmUp(seconds, iterations, tuple(windows), steady)


def is_stable(windows: Sequence[float]) -> bool:
    """Whether the last `STABLE_WINDOWS` medians agree within `STABLE_TOLERANCE`."""
    last = windows[-STABLE_WINDOWS:]
    return len(last) == STABLE_WINDOWS and max(last) - min(last) <= STABLE_TOLERANCE * min(last)


def run_interleaved(
    backends: Sequence[Timeable], stop: StopCondition, progress: Callable[[float], None] = lambda share: None
) -> list[list[Round]]:
    """Runs rounds in which every backend has one turn, in the same order, until all have reached `stop`.

    Args:
        backends: What takes turns.
        stop: Minimum duration and iteration count of each.
        progress: Called with the share done, 0..1.

    Returns:
        The turns of each backend; turn i of all of them belongs to round i.
    """
    turns: list[list[Round]] = [[] for _ in backends]
    while not all(stop.reached(own) for own in turns):
        for backend, own in zip(backends, turns, strict=True):
            own.append(backend.turn(TURN_SECONDS, 1))
        progress(min(_share_done(own, stop) for own in turns))
    return turns


def _share_done(turns: Sequence[Round], stop: StopCondition) -> float:
    seconds, iterations = sum(turn.seconds for turn in turns), sum(len(turn.samples) for turn in turns)
    return min(
        1.0,
        len(turns) / MIN_ROUNDS,
        seconds / stop.seconds if stop.seconds else 1.0,
        iterations / stop.iterations if stop.iterations else 1.0,
    )
