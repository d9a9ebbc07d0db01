"""Who runs when: warm up each contestant until it is steady, then let them take turns.

The rules are here and nowhere else, and know nothing of what is measured: a contestant is whatever can run for a while
and say how long each iteration took.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

WARM_UP_SECONDS = 2.0
WARM_UP_LIMIT = 30.0
"""Seconds after which no further window is begun, steady or not."""
WINDOW_SECONDS = 0.5
WINDOW_ITERATIONS = 3
"""A window lasts so long and has so many iterations at least."""
STEADY_WINDOWS = 3
STEADY_WITHIN = 0.05
"""The medians of the last `STEADY_WINDOWS` windows may differ by this much of the smallest (perf_analyzer's rule with
half its tolerance)."""
TURN_SECONDS = 0.2
"""Length of a turn. An edit on a CPU takes longer and is a turn of its own; on a GPU a turn holds hundreds, because
changing the process for every one would measure the change."""
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Round:
    """What a contestant did in one go."""

    samples: tuple[float, ...]
    """Milliseconds of every iteration."""
    seconds: float
    """On the wall, from the first to the last."""
    joules: float | None = None
    """Spent by the device, where it tells."""


class Timeable(Protocol):
    def turn(self, seconds: float, iterations: int) -> Round:
        """Runs until both `seconds` have passed and `iterations` are done."""


@dataclass(frozen=True)
class WarmUp:
    """How a contestant was warmed up."""

    seconds: float
    iterations: int
    windows: tuple[float, ...]
    """Median of each window in milliseconds."""
    steady: bool
    """Whether the last windows agreed; if not, `WARM_UP_LIMIT` ended it."""


@dataclass(frozen=True)
class StopCondition:
    """When to stop: every contestant has run so long and so often."""

    seconds: float
    iterations: int

    def reached(self, turns: Sequence[Round]) -> bool:
        return (
            len(turns) >= FEWEST_ROUNDS
            and sum(turn.seconds for turn in turns) >= self.seconds
            and sum(len(turn.samples) for turn in turns) >= self.iterations
        )


def warm_up(contestant: Timeable) -> WarmUp:
    """Runs a contestant for `WARM_UP_SECONDS` and until its last windows agree, but not beyond `WARM_UP_LIMIT`."""
    turns: list[Round] = []
    window: list[Round] = []
    windows: list[float] = []
    while True:
        turn = contestant.turn(WINDOW_SECONDS, 1)
        turns.append(turn)
        window.append(turn)
        seconds = sum(turn.seconds for turn in turns)
        samples = [sample for turn in window for sample in turn.samples]
        if len(samples) >= WINDOW_ITERATIONS:
            windows.append(statistics.median(samples))
            window = []
        steady = is_stable(windows)
        if (seconds >= WARM_UP_SECONDS and steady) or seconds >= WARM_UP_LIMIT:
            iterations = sum(len(turn.samples) for turn in turns)
            return WarmUp(seconds, iterations, tuple(windows), steady)


def is_stable(windows: Sequence[float]) -> bool:
    last = windows[-STEADY_WINDOWS:]
    return len(last) == STEADY_WINDOWS and max(last) - min(last) <= STEADY_WITHIN * min(last)


def run_interleaved(
    contestants: Sequence[Timeable], enough: StopCondition, progress: Callable[[float], None] = lambda share: None
) -> list[list[Round]]:
    """Rounds in which every contestant has one turn, in the same order, until all of them have had enough.

    Returns each one's turns; turn i of all of them belongs to round i. progress is told the share done, 0..1.
    """
    turns: list[list[Round]] = [[] for _ in contestants]
    while not all(enough.reached(own) for own in turns):
        for contestant, own in zip(contestants, turns, strict=True):
            own.append(contestant.turn(TURN_SECONDS, 1))
        progress(min(_share(own, enough) for own in turns))
    return turns


def _share(turns: Sequence[Round], enough: StopCondition) -> float:
    seconds, iterations = sum(turn.seconds for turn in turns), sum(len(turn.samples) for turn in turns)
    return min(
        1.0,
        len(turns) / FEWEST_ROUNDS,
        seconds / enough.seconds if enough.seconds else 1.0,
        iterations / enough.iterations if enough.iterations else 1.0,
    )
