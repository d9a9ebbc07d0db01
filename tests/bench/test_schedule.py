"""Warm-up and interleaving on a clock that only advances while a fake backend runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmdeploy.bench import schedule
from spmdeploy.bench.schedule import Round, StopCondition, is_stable, run_interleaved, warm_up


class FakeBackend:
    """Iterations take the scripted times, the last one repeated. Logs its turns."""

    def __init__(self, milliseconds: Iterable[float], name: str = "", log: list[str] | None = None) -> None:
        self._script = self._forever(list(milliseconds))
        self._name, self._log = name, log if log is not None else []
        self.asked: list[tuple[float, int]] = []

    @staticmethod
    def _forever(script: list[float]) -> Iterator[float]:
        yield from script
        while True:
            yield script[-1]

    def turn(self, seconds: float, iterations: int) -> Round:
        self._log.append(self._name)
        self.asked.append((seconds, iterations))
        samples: list[float] = []
        while len(samples) < iterations or sum(samples) < seconds * 1000:
            samples.append(next(self._script))
        return Round(tuple(samples), sum(samples) / 1000)


def test_run_interleaved_rounds_keep_order() -> None:
    log: list[str] = []
    runners = [FakeBackend([speed], name, log) for name, speed in (("a", 50), ("b", 700), ("c", 1))]
    turns = run_interleaved(runners, StopCondition(2, 0))
    assert log == ["a", "b", "c"] * len(turns[0]) and len({len(own) for own in turns}) == 1


def test_run_interleaved_stops_after_the_slowest() -> None:
    fast, slow = FakeBackend([1]), FakeBackend([500])
    turns = run_interleaved([fast, slow], StopCondition(1, 10))
    samples = [sum(len(turn.samples) for turn in own) for own in turns]
    assert samples == [10 * 200, 10]  # ten rounds: a turn of 0.2 s, and single iterations of half a second


def test_run_interleaved_needs_seconds_and_iterations() -> None:
    assert [len(own) for own in run_interleaved([FakeBackend([1000])], StopCondition(7, 2))] == [7]
    assert [len(own) for own in run_interleaved([FakeBackend([1000])], StopCondition(1, 9))] == [9]


def test_run_interleaved_short_limits_run_three_rounds() -> None:
    assert len(run_interleaved([FakeBackend([9000])], StopCondition(0.1, 0))[0]) == schedule.MIN_ROUNDS == 3


def test_run_interleaved_progress_ends_at_one() -> None:
    shares: list[float] = []
    run_interleaved([FakeBackend([300]), FakeBackend([100])], StopCondition(3, 5), shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 3


def test_run_interleaved_without_backends_returns_empty() -> None:
    assert run_interleaved([], StopCondition(1, 1)) == []


def test_warm_up_stable_backend_takes_two_seconds() -> None:
    result = warm_up(FakeBackend([100]))
    assert result.steady and result.seconds == pytest.approx(2.0, abs=0.5)
    assert set(result.windows) == {100}


def test_warm_up_compiling_backend_waits_for_three_windows() -> None:
    compiling = [20_000.0] + [400.0] * 4 + [300.0] * 4
    result = warm_up(FakeBackend([*compiling, 100.0]))
    assert result.steady and result.windows[-3:] == (100, 100, 100)
    assert result.windows[-4] > 105


def test_warm_up_unstable_backend_stops_at_limit() -> None:
    growing = [100 * 1.1**power for power in range(200)]
    result = warm_up(FakeBackend(growing))
    assert not result.steady
    assert schedule.MAX_WARM_UP_SECONDS <= result.seconds < schedule.MAX_WARM_UP_SECONDS * 1.2


def test_warm_up_slow_backend_exceeds_limit_by_one_iteration() -> None:
    result = warm_up(FakeBackend([25_000, 24_000, 23_000]))
    assert result.iterations == 2 and result.seconds == 49 and not result.steady


def test_warm_up_fast_backend_runs_many_iterations() -> None:
    runner = FakeBackend([1])
    result = warm_up(runner)
    assert result.iterations == 2000 and len(result.windows) == 4
    assert set(runner.asked) == {(schedule.WINDOW_SECONDS, 1)}


@pytest.mark.parametrize(
    ("windows", "steady"),
    [([100, 104, 105], True), ([100, 104, 105.1], False), ([100, 100], False), ([500, 100, 100, 100], True)],
)
def test_is_stable_windows_within_tolerance(windows: list[float], steady: bool) -> None:
    assert is_stable(windows) is steady


@given(st.lists(st.floats(1, 4000), min_size=1, max_size=30))
def test_warm_up_any_script_ends_and_counts_everything(script: list[float]) -> None:
    counted: list[float] = []

    class Counting(FakeBackend):
        def turn(self, seconds: float, iterations: int) -> Round:
            turn = super().turn(seconds, iterations)
            counted.extend(turn.samples)
            return turn

    result = warm_up(Counting(script))
    assert result.iterations == len(counted) and result.seconds == pytest.approx(sum(counted) / 1000)
    assert schedule.WARM_UP_SECONDS <= result.seconds < schedule.MAX_WARM_UP_SECONDS + 4.5
    assert result.steady is is_stable(result.windows)


def test_run_interleaved_error_is_raised() -> None:
    def failing(seconds: float, iterations: int) -> Round:
        raise MemoryError

    runner = FakeBackend([1])
    broken: Callable[[float, int], Round] = failing
    runner.turn = broken  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        run_interleaved([FakeBackend([1]), runner], StopCondition(1, 1))
