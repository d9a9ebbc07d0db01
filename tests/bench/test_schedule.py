"""Who runs when, on a clock that only moves when a contestant does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmdeploy.bench import schedule as contest
from spmdeploy.bench.schedule import Round, StopCondition, is_stable, run_interleaved, warm_up


class Runner:
    """Takes as long for each iteration as its script says, the last entry again and again. Logs its turns."""

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


def test_rounds_keep_their_order() -> None:
    log: list[str] = []
    runners = [Runner([speed], name, log) for name, speed in (("a", 50), ("b", 700), ("c", 1))]
    turns = run_interleaved(runners, StopCondition(2, 0))
    assert log == ["a", "b", "c"] * len(turns[0]) and len({len(own) for own in turns}) == 1


def test_it_goes_on_until_the_slowest_has_had_enough() -> None:
    fast, slow = Runner([1]), Runner([500])
    turns = run_interleaved([fast, slow], StopCondition(1, 10))
    samples = [sum(len(turn.samples) for turn in own) for own in turns]
    assert samples == [10 * 200, 10]  # ten rounds: a turn of 0.2 s, and single iterations of half a second


def test_both_seconds_and_iterations_count() -> None:
    assert [len(own) for own in run_interleaved([Runner([1000])], StopCondition(7, 2))] == [7]
    assert [len(own) for own in run_interleaved([Runner([1000])], StopCondition(1, 9))] == [9]


def test_there_are_three_rounds_however_little_is_asked() -> None:
    assert len(run_interleaved([Runner([9000])], StopCondition(0.1, 0))[0]) == contest.FEWEST_ROUNDS == 3


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    run_interleaved([Runner([300]), Runner([100])], StopCondition(3, 5), told.append)
    assert told == sorted(told) and told[-1] == 1 and len(told) > 3


def test_nobody_takes_part() -> None:
    assert run_interleaved([], StopCondition(1, 1)) == []


# ------------------------------------------------------------------------------------------------------------- warm-up


def test_a_steady_runner_is_warm_after_two_seconds() -> None:
    result = warm_up(Runner([100]))
    assert result.steady and result.seconds == pytest.approx(2.0, abs=0.5)
    assert set(result.windows) == {100}


def test_warming_up_lasts_until_three_windows_agree() -> None:
    compiling = [20_000.0] + [400.0] * 4 + [300.0] * 4
    result = warm_up(Runner([*compiling, 100.0]))
    assert result.steady and result.windows[-3:] == (100, 100, 100)
    assert result.windows[-4] > 105


def test_one_that_never_settles_is_stopped_and_told() -> None:
    growing = [100 * 1.1**power for power in range(200)]
    result = warm_up(Runner(growing))
    assert not result.steady
    assert contest.WARM_UP_LIMIT <= result.seconds < contest.WARM_UP_LIMIT * 1.2


def test_a_slow_one_overruns_the_limit_by_one_iteration_at_most() -> None:
    result = warm_up(Runner([25_000, 24_000, 23_000]))
    assert result.iterations == 2 and result.seconds == 49 and not result.steady


def test_a_fast_one_runs_many_iterations_in_a_window() -> None:
    runner = Runner([1])
    result = warm_up(runner)
    assert result.iterations == 2000 and len(result.windows) == 4
    assert set(runner.asked) == {(contest.WINDOW_SECONDS, 1)}


@pytest.mark.parametrize(
    ("windows", "steady"),
    [([100, 104, 105], True), ([100, 104, 105.1], False), ([100, 100], False), ([500, 100, 100, 100], True)],
)
def test_what_steady_means(windows: list[float], steady: bool) -> None:
    assert is_stable(windows) is steady


@given(st.lists(st.floats(1, 4000), min_size=1, max_size=30))
def test_warm_up_always_ends_and_counts_everything(script: list[float]) -> None:
    counted: list[float] = []

    class Counting(Runner):
        def turn(self, seconds: float, iterations: int) -> Round:
            turn = super().turn(seconds, iterations)
            counted.extend(turn.samples)
            return turn

    result = warm_up(Counting(script))
    assert result.iterations == len(counted) and result.seconds == pytest.approx(sum(counted) / 1000)
    assert contest.WARM_UP_SECONDS <= result.seconds < contest.WARM_UP_LIMIT + 4.5
    assert result.steady is is_stable(result.windows)


def test_what_a_runner_raises_is_not_swallowed() -> None:
    def failing(seconds: float, iterations: int) -> Round:
        raise MemoryError

    runner = Runner([1])
    broken: Callable[[float, int], Round] = failing
    runner.turn = broken  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        run_interleaved([Runner([1]), runner], StopCondition(1, 1))
