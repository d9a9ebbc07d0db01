"""Bootstrap intervals of medians and of ratios of medians. No sample is ever removed.

Samples come in turns: the backends take turns in rounds. Disturbances affect neighboring samples together, so the
bootstrap draws whole turns (block bootstrap). For a ratio it draws the same rounds for both sides (paired), so that a
disturbance of both cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_INTERVAL = 0.05
"""Width of the median's 95 % interval, relative to the median, above which a figure is unstable.

The coefficient of variation is not used: on a shared machine single samples vary by far more than 5 %, while the
median of many interleaved rounds is precise."""
MIN_SAMPLES_FOR_P99 = 100
"""With fewer samples the 99th percentile would be close to the maximum."""
RESAMPLES = 2000
"""Makes the ends of a 95 % interval reproducible in their second digit."""

Turns = Sequence[Sequence[float]]
"""Samples in order, one sequence for each turn."""


@dataclass(frozen=True)
class Interval:
    """A 95 % bootstrap interval (percentile method)."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether the value lies in the interval; its ends do."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Summary:
    """Statistics in the unit of the samples; quantiles are interpolated linearly."""

    n: int
    mean: float
    std: float
    """With n - 1 in the denominator."""
    min: float
    p50: float
    p50_interval: Interval
    p90: float
    p95: float
    p99: float | None
    """None for fewer than `MIN_SAMPLES_FOR_P99` samples."""
    max: float
    cv: float
    """Coefficient of variation: std / mean."""
    unstable: bool
    """Whether the median's interval is wider than `MAX_INTERVAL` of the median."""


@dataclass(frozen=True)
class Ratio:
    """Median of the baseline divided by the median of this one: above 1 is faster."""

    baseline: str
    value: float
    interval: Interval


def summarize(turns: Turns, seed: int = 0) -> Summary:
    """Summarizes at least two samples, all above 0."""
    samples = _flat(turns)
    p50, p90, p95, p99 = np.quantile(samples, (0.5, 0.9, 0.95, 0.99)).tolist()
    mean, std = float(samples.mean()), float(samples.std(ddof=1))
    interval = _interval(bootstrap_medians(turns, bootstrap_weights(len(turns), seed)))
    return Summary(
        n=len(samples),
        mean=mean,
        std=std,
        min=float(samples.min()),
        p50=p50,
        p50_interval=interval,
        p90=p90,
        p95=p95,
        p99=p99 if len(samples) >= MIN_SAMPLES_FOR_P99 else None,
        max=float(samples.max()),
        cv=std / mean,
        unstable=interval.high - interval.low > MAX_INTERVAL * p50,
    )


def ratio_of_medians(baseline: Turns, turns: Turns, name: str, seed: int = 0) -> Ratio:
    """Ratio of medians of two backends measured in the same rounds.

    Args:
        baseline: Samples of the baseline, one sequence per round.
        turns: Samples of the other backend for the same rounds in the same order.
        name: Name of the baseline.
        seed: Seed of the bootstrap.

    Returns:
        Median of `baseline` divided by median of `turns`, with a paired 95 % bootstrap interval.
    """
    assert len(baseline) == len(turns), (len(baseline), len(turns))
    rounds = bootstrap_weights(len(turns), seed)
    ratios = bootstrap_medians(baseline, rounds) / bootstrap_medians(turns, rounds)
    return Ratio(name, float(np.median(_flat(baseline)) / np.median(_flat(turns))), _interval(ratios))


def ratio_of_runs(before: Turns, after: Turns, name: str, seed: int = 0) -> Ratio:
    """Ratio of medians of two runs without common rounds, which are resampled independently.

    Args:
        before: Samples of one run, one sequence per turn.
        after: Samples of the other run, in the same unit.
        name: Name of the first run.
        seed: Seed of the bootstrap.

    Returns:
        Median of `before` divided by median of `after`, with a 95 % bootstrap interval.
    """
    first = bootstrap_medians(before, bootstrap_weights(len(before), seed))
    second = bootstrap_medians(after, bootstrap_weights(len(after), seed + 1))
    return Ratio(name, float(np.median(_flat(before)) / np.median(_flat(after))), _interval(first / second))


def bootstrap_weights(rounds: int, seed: int) -> NDArray[np.int64]:
    """Number of times that each resample draws each round: int (RESAMPLES, rounds), rows sum to `rounds`."""
    return np.random.default_rng(seed).multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES)


def bootstrap_medians(turns: Turns, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """The median of every resample.

    Args:
        turns: Samples, one sequence for each turn.
        draws: int64 (R, turns), how often each resample draws each turn.

    Returns:
        float64 (R,), in the unit of the samples.
    """
    samples = _flat(turns)
    order = np.argsort(samples, kind="stable")
    turn_of = np.repeat(np.arange(len(turns)), [len(turn) for turn in turns])[order]
    samples = samples[order]
    medians = np.empty(len(draws))
    step = max(1, 4_000_000 // len(samples))  # rows whose cumulative counts take about 30 MB
    for start in range(0, len(draws), step):
        reached = np.cumsum(draws[start : start + step, turn_of], axis=1)
        total = reached[:, -1:]
        middle = [samples[(reached <= place).sum(axis=1)] for place in ((total - 1) // 2, total // 2)]
        medians[start : start + step] = (middle[0] + middle[1]) / 2
    return medians


def _flat(turns: Turns) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(turn, np.float64) for turn in turns])


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return Interval(low, high)
