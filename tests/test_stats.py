"""Figures against numpy and against values worked out by hand, and what must hold whatever the samples are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.stats import (
    RESAMPLES,
    SAMPLES_FOR_P99,
    bootstrap_medians,
    bootstrap_weights,
    ratio_of_medians,
    ratio_of_runs,
    summarize,
)

times = st.floats(0.001, 1e5)
turns_of = st.lists(st.lists(times, min_size=1, max_size=6), min_size=2, max_size=12)


def test_by_hand() -> None:
    figures = summarize([[1.0, 2.0], [3.0], [4.0, 10.0]])
    assert (figures.n, figures.mean, figures.min, figures.p50, figures.max) == (5, 4.0, 1.0, 3.0, 10.0)
    assert figures.std == pytest.approx(12.5**0.5)  # (9 + 4 + 1 + 0 + 36) / 4
    assert figures.cv == pytest.approx(12.5**0.5 / 4)
    assert figures.p90 == pytest.approx(4 + 0.6 * 6) and figures.p95 == pytest.approx(4 + 0.8 * 6)
    assert figures.unstable


@given(turns_of)
def test_against_numpy(turns: list[list[float]]) -> None:
    samples = np.concatenate([np.array(turn) for turn in turns])
    figures = summarize(turns)
    assert (figures.p50, figures.p90, figures.p95) == pytest.approx(tuple(np.quantile(samples, (0.5, 0.9, 0.95))))
    assert figures.std == pytest.approx(np.std(samples, ddof=1))
    assert figures.p50_interval.low <= figures.p50_interval.high
    assert samples.min() <= figures.p50_interval.low and figures.p50_interval.high <= samples.max()


def test_p99_needs_enough_samples() -> None:
    samples = [float(value) for value in range(1, SAMPLES_FOR_P99 + 1)]
    assert summarize([samples[:-1]]).p99 is None
    assert summarize([samples]).p99 == pytest.approx(99.01)


@pytest.mark.parametrize(("spread", "unstable"), [(0.024, False), (0.026, True)])
def test_unstable_is_above_two_and_a_half_per_cent(spread: float, unstable: bool) -> None:
    # two values at 1 ± d have a standard deviation of d times the square root of 2
    figures = summarize([[1 - spread / 2**0.5], [1 + spread / 2**0.5]])
    assert figures.cv == pytest.approx(spread) and figures.unstable is unstable


@given(turns_of, st.integers(0, 3))
@settings(max_examples=30)
def test_a_resample_is_a_draw_of_whole_turns(turns: list[list[float]], seed: int) -> None:
    draws = bootstrap_weights(len(turns), seed)[:50]
    assert (draws.sum(axis=1) == len(turns)).all()
    expected = [
        np.median(np.concatenate([turn * times for turn, times in zip(turns, row, strict=True) if times]))
        for row in draws
    ]
    assert bootstrap_medians(turns, draws) == pytest.approx(np.array(expected))


def test_resampling_in_pieces_changes_nothing() -> None:
    noise = np.random.default_rng(3)
    turns = [list(noise.random(1000)) for _ in range(5)]
    draws = bootstrap_weights(5, 1)
    assert len(draws) == RESAMPLES and RESAMPLES * 5000 > 2 * 4_000_000  # more than one piece
    whole = [np.median(np.concatenate([turn * times for turn, times in zip(turns, row, strict=True)])) for row in draws]
    assert bootstrap_medians(turns, draws) == pytest.approx(np.array(whole))


def test_the_interval_of_the_median_covers_the_truth_about_19_times_in_20() -> None:
    noise = np.random.default_rng(11)
    covered = [
        summarize([[value] for value in noise.lognormal(0, 0.3, 60)], seed=trial).p50_interval.holds(1.0)
        for trial in range(200)
    ]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_pairing_cancels_what_hit_both() -> None:
    """Both get three times slower half way: the ratio stays sharp, that of independent runs does not."""
    noise = np.random.default_rng(5)
    weather = [1.0] * 20 + [3.0] * 20
    slow = [[200 * factor * noise.uniform(0.99, 1.01)] for factor in weather]
    fast = [[100 * factor * noise.uniform(0.99, 1.01)] for factor in weather]
    paired, unpaired = ratio_of_medians(slow, fast, "slow"), ratio_of_runs(slow, fast, "slow")
    assert paired.baseline == "slow" and paired.value == pytest.approx(2, abs=0.05)
    widths = [ratio.interval.high - ratio.interval.low for ratio in (paired, unpaired)]
    assert widths[0] < 0.2 < 1 < widths[1]
    assert paired.interval.holds(2)


@given(turns_of)
@settings(max_examples=30)
def test_nothing_is_faster_than_itself(turns: list[list[float]]) -> None:
    ratio = ratio_of_medians(turns, turns, "it")
    assert (ratio.value, ratio.interval.low, ratio.interval.high) == (1, 1, 1)


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(AssertionError):
        ratio_of_medians([[1.0]] * 3, [[1.0]] * 4, "it")


def test_no_sample_is_dropped() -> None:
    """One of every size is enough to see it in the mean and the maximum."""
    for place in range(4):
        turns = [[1.0, 1.0], [1.0, 1.0]]
        turns[place // 2][place % 2] = 1e4
        figures = summarize(turns)
        assert (figures.n, figures.max) == (4, 1e4)
        assert figures.mean == pytest.approx(sum(itertools.chain(*turns)) / 4)
