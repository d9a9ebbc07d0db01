"""Statistics against numpy, against values computed by hand, and properties of any samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.stats import (
    MIN_SAMPLES_FOR_P99,
    RESAMPLES,
    bootstrap_medians,
    bootstrap_weights,
    ratio_of_medians,
    ratio_of_runs,
    summarize,
)

times = st.floats(0.001, 1e5)
turns_of = st.lists(st.lists(times, min_size=1, max_size=6), min_size=2, max_size=12)


def test_summarize_five_samples_match_by_hand() -> None:
    figures = summarize([[1.0, 2.0], [3.0], [4.0, 10.0]])
    assert (figures.n, figures.mean, figures.min, figures.p50, figures.max) == (5, 4.0, 1.0, 3.0, 10.0)
    assert figures.std == pytest.approx(12.5**0.5)  # (9 + 4 + 1 + 0 + 36) / 4
    assert figures.cv == pytest.approx(12.5**0.5 / 4)
    assert figures.p90 == pytest.approx(4 + 0.6 * 6) and figures.p95 == pytest.approx(4 + 0.8 * 6)
    assert figures.unstable


@given(turns_of)
def test_summarize_any_samples_match_numpy(turns: list[list[float]]) -> None:
    samples = np.concatenate([np.array(turn) for turn in turns])
    figures = summarize(turns)
    assert (figures.p50, figures.p90, figures.p95) == pytest.approx(tuple(np.quantile(samples, (0.5, 0.9, 0.95))))
    assert figures.std == pytest.approx(np.std(samples, ddof=1))
    assert figures.p50_interval.low <= figures.p50_interval.high
    assert samples.min() <= figures.p50_interval.low and figures.p50_interval.high <= samples.max()


def test_summarize_p99_needs_enough_samples() -> None:
    samples = [float(value) for value in range(1, MIN_SAMPLES_FOR_P99 + 1)]
    assert summarize([samples[:-1]]).p99 is None
    assert summarize([samples]).p99 == pytest.approx(99.01)


@pytest.mark.parametrize(("spread", "unstable"), [(0.02, False), (0.06, True)])
def test_summarize_wide_interval_of_median_is_unstable(spread: float, unstable: bool) -> None:
    turns = [[1.0], [1.0 + spread]] * 4  # resampled medians reach both values
    figures = summarize(turns)
    width = figures.p50_interval.high - figures.p50_interval.low
    assert width == pytest.approx(spread) and figures.unstable is unstable


def test_summarize_outliers_beside_certain_median_are_stable() -> None:
    figures = summarize([[1.0, 1.0, 3.0]] * 10)
    assert figures.cv > 0.5 and not figures.unstable


@given(turns_of, st.integers(0, 3))
@settings(max_examples=30)
def test_bootstrap_medians_draw_whole_turns(turns: list[list[float]], seed: int) -> None:
    draws = bootstrap_weights(len(turns), seed)[:50]
    assert (draws.sum(axis=1) == len(turns)).all()
    expected = [
        np.median(np.concatenate([turn * times for turn, times in zip(turns, row, strict=True) if times]))
        for row in draws
    ]
    assert bootstrap_medians(turns, draws) == pytest.approx(np.array(expected))


def test_bootstrap_medians_in_chunks_are_equal() -> None:
    noise = np.random.default_rng(3)
    turns = [list(noise.random(1000)) for _ in range(5)]
    draws = bootstrap_weights(5, 1)
    assert len(draws) == RESAMPLES and RESAMPLES * 5000 > 2 * 4_000_000  # more than one chunk
    whole = [np.median(np.concatenate([turn * times for turn, times in zip(turns, row, strict=True)])) for row in draws]
    assert bootstrap_medians(turns, draws) == pytest.approx(np.array(whole))


def test_summarize_interval_covers_true_median_in_95_percent() -> None:
    noise = np.random.default_rng(11)
    covered = [
        summarize([[value] for value in noise.lognormal(0, 0.3, 60)], seed=trial).p50_interval.contains(1.0)
        for trial in range(200)
    ]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_ratio_of_medians_cancels_common_disturbance() -> None:
    """Both become three times slower halfway: the paired ratio stays narrow, the unpaired one does not."""
    noise = np.random.default_rng(5)
    load = [1.0] * 20 + [3.0] * 20
    slow = [[200 * factor * noise.uniform(0.99, 1.01)] for factor in load]
    fast = [[100 * factor * noise.uniform(0.99, 1.01)] for factor in load]
    paired, unpaired = ratio_of_medians(slow, fast, "slow"), ratio_of_runs(slow, fast, "slow")
    assert paired.baseline == "slow" and paired.value == pytest.approx(2, abs=0.05)
    widths = [ratio.interval.high - ratio.interval.low for ratio in (paired, unpaired)]
    assert widths[0] < 0.2 < 1 < widths[1]
    assert paired.interval.contains(2)


@given(turns_of)
@settings(max_examples=30)
def test_ratio_of_medians_with_itself_is_one(turns: list[list[float]]) -> None:
    ratio = ratio_of_medians(turns, turns, "it")
    assert (ratio.value, ratio.interval.low, ratio.interval.high) == (1, 1, 1)


def test_ratio_of_medians_different_rounds_are_refused() -> None:
    with pytest.raises(AssertionError):
        ratio_of_medians([[1.0]] * 3, [[1.0]] * 4, "it")


def test_summarize_outlier_is_kept() -> None:
    for place in range(4):
        turns = [[1.0, 1.0], [1.0, 1.0]]
        turns[place // 2][place % 2] = 1e4
        figures = summarize(turns)
        assert (figures.n, figures.max) == (4, 1e4)
        assert figures.mean == pytest.approx(sum(itertools.chain(*turns)) / 4)
