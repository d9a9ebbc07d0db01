"""A group with backends that only pretend: who is judged, who is timed, and what a row then says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import spmdeploy
from spmdeploy.backends.verify import Deviation, GoldenResult
from spmdeploy.bench.fidelity import GOLDEN, IN_THIS_RUN
from spmdeploy.bench.group import BackendUnderTest, Case, Group, limits_of, without_folders
from spmdeploy.bench.racer import BackendCrashedError, FirstRun, MemoryUsage
from spmdeploy.bench.results import BackendInfo, Result
from spmdeploy.bench.run import failure
from spmdeploy.bench.schedule import Round, StopCondition
from spmdeploy.bench.worker import Worker
from spmdeploy.bench.workloads import EditBatch
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.errors import OutOfMemoryError, SpmDeployError, UnavailableError, VerificationError

from .conftest import record_of

BUNDLE = open_bundle(spmdeploy.default_model())
CASE = Case("engine", 256, "small")
GOOD = GoldenResult("car", Deviation(1, 0.01, 60.0), True, ())
BAD = GoldenResult("car", Deviation(99, 9.0, 20.0), True, ("largest difference 99 > 48",))


@dataclass
class PretendingWorker:
    """Answers at once; `paint` is what it makes of a photo, `milliseconds` what it says an edit takes."""

    paint: Callable[[EditBatch], np.ndarray]
    milliseconds: float = 100.0
    log: list[str] = field(default_factory=list)
    name: str = ""
    joules: float | None = None
    fails: SpmDeployError | None = None

    def prepare_engine(self, batch: EditBatch, streams: int) -> FirstRun:
        if self.fails is not None:
            raise self.fails
        return FirstRun(batch.image, self.paint(batch), 1.5, {})

    def turn(self, seconds: float, iterations: int) -> Round:
        count = max(iterations, round(seconds * 1000 / self.milliseconds))
        self.log.append(self.name)
        return Round((self.milliseconds,) * count, count * self.milliseconds / 1000, self.joules)

    def forget(self) -> None:
        self.log.append(f"{self.name} forgets")

    def medians(self) -> dict[str, float]:
        return {"launch": 0.25}

    def memory(self) -> MemoryUsage:
        return MemoryUsage(100, 200, None)


def painted(level: int, outside: bool = False) -> Callable[[EditBatch], np.ndarray]:
    def paint(batch: EditBatch) -> np.ndarray:
        picture = batch.image.copy()
        picture[np.ones_like(batch.mask) > 0 if outside else batch.mask > 0] = level
        return picture

    return paint


def entrant(backend: str, worker: PretendingWorker | None, **changes: Any) -> BackendUnderTest:
    ran = None if worker is None else BackendInfo("cpu", "fp32", f"{backend} 1", None, None, 1000)
    fields: dict[str, Any] = {"ran": ran, "golden": (GOOD,)} | changes
    return BackendUnderTest(backend, "auto", cast(Worker, worker), **fields)


def rows_of(*entrants: BackendUnderTest, reference: PretendingWorker | None = None, case: Case = CASE) -> list[Result]:
    group = Group(BUNDLE, case, entrants, cast(Worker, reference), "torch", "auto")
    return group.measure(StopCondition(1.0, 0), lambda what, share: None)


def test_one_that_draws_the_same_is_timed() -> None:
    torch = PretendingWorker(painted(100), 200.0, name="torch")
    other = PretendingWorker(painted(101), 50.0, name="other", joules=2.0)
    baseline, row = rows_of(entrant("torch", torch), entrant("onnxruntime", other), reference=torch)
    assert row.status == baseline.status == "measured" and row.parity is not None and row.parity.max_grey == 1
    assert row.parity.against == IN_THIS_RUN
    assert row.latency_ms is not None and row.latency_ms.p50 == 50.0
    assert row.ratio is not None and (row.ratio.value, row.ratio.baseline) == (4.0, "torch")
    assert baseline.ratio is None
    assert row.edits_per_second == pytest.approx(20)
    assert row.megapixels_per_second == pytest.approx(20 * 0.065536)
    turns = len(row.samples_ms)
    assert row.joules_per_edit == pytest.approx(2.0 * turns / (4 * turns)) and baseline.joules_per_edit is None
    assert (row.first_ms, row.memory and row.memory.peak, row.phases_ms) == (1500.0, 200, {"launch": 0.25})
    assert row.warm_up is not None and row.warm_up.steady
    assert row.masked_share == pytest.approx(0.05, abs=0.005)


def test_they_are_warmed_up_one_by_one_and_timed_in_turns() -> None:
    log: list[str] = []
    workers = [PretendingWorker(painted(9), 500.0, log, name) for name in ("a", "b")]
    rows_of(*(entrant(name, worker) for name, worker in zip(("torch", "onnxruntime"), workers, strict=True)))
    start = log.index("b forgets") + 1
    warming, racing = log[:start], log[start:]
    assert warming == ["a"] * (len(warming) // 2 - 1) + ["a forgets"] + ["b"] * (len(warming) // 2 - 1) + ["b forgets"]
    assert racing == ["a", "b"] * (len(racing) // 2) and len(racing) == 6


@pytest.mark.parametrize("paint", [painted(200), painted(100, outside=True)], ids=["another picture", "known pixels"])
def test_a_wrong_picture_gets_no_speed(paint: Callable[[EditBatch], np.ndarray]) -> None:
    torch = PretendingWorker(painted(100))
    wrong = PretendingWorker(paint)
    _, row = rows_of(entrant("torch", torch), entrant("onnxruntime", wrong), reference=torch)
    assert row.status == "differs" and row.reason is not None and row.parity is not None and row.parity.faults
    without_speed = (row.latency_ms, row.ratio, row.edits_per_second, row.first_ms, row.warm_up, row.memory, row.floor)
    assert without_speed == (None,) * 7 and row.samples_ms == () and row.phases_ms == {}
    assert wrong.log == []  # nobody even started its clock
    assert isinstance(failure(record_of(row)), VerificationError)


def test_a_wrong_golden_edit_gets_no_speed_either() -> None:
    torch = PretendingWorker(painted(100))
    (row,) = rows_of(entrant("onnxruntime", torch, golden=(GOOD, BAD)), reference=torch)
    assert row.status == "differs" and "golden edit car: largest difference 99 > 48" in (row.reason or "")


def test_without_torch_the_golden_edits_judge() -> None:
    (row,) = rows_of(entrant("onnxruntime", PretendingWorker(painted(3))))
    assert row.status == "measured" and row.parity is not None
    assert (row.parity.against, row.parity.max_grey, row.parity.psnr_db) == (GOLDEN, 1, 60.0)
    (row,) = rows_of(entrant("onnxruntime", PretendingWorker(painted(3)), golden=(BAD,)))
    assert row.status == "differs"


def test_without_anything_to_compare_with_there_is_no_speed() -> None:
    (row,) = rows_of(entrant("onnxruntime", PretendingWorker(painted(3)), golden=()))
    assert row.status == "unavailable" and "nothing to compare its pictures with" in (row.reason or "")


def test_one_that_could_not_be_opened_has_its_reason() -> None:
    closed = entrant("tensorrt", None, failure=UnavailableError("no driver", "install one"), golden=())
    torch = entrant("torch", PretendingWorker(painted(1)))
    row, other = rows_of(closed, torch)
    assert (row.status, row.reason, row.ran) == ("unavailable", "no driver (install one)", None)
    assert other.status == "measured" and failure(record_of(row, other)) is None
    told = failure(record_of(row))
    assert isinstance(told, UnavailableError) and "tensorrt: no driver" in told.problem


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OutOfMemoryError("no memory"), "unavailable", 4),
        (BackendCrashedError("its process ended with signal 11"), "crashed", 1),
    ],
)
def test_one_that_fails_does_not_stop_the_others(error: SpmDeployError, status: str, code: int) -> None:
    failing = entrant("onnxruntime", PretendingWorker(painted(1), fails=error))
    row, other = rows_of(failing, entrant("torch", PretendingWorker(painted(1))))
    assert (row.status, other.status) == (status, "measured") and error.problem in (row.reason or "")
    told = failure(record_of(row))
    assert told is not None and told.exit_code == code


def test_what_edit_does_not_offer_has_no_cold_start() -> None:
    compiled = entrant("torch-compile", PretendingWorker(painted(1)))
    (row,) = rows_of(compiled, case=Case("cold-start", 256, "small"))
    assert row.status == "unavailable" and "does not offer it" in (row.reason or "")


def test_limits_are_the_bundle_s_own() -> None:
    assert limits_of(BUNDLE, "fp32") == BUNDLE.manifest.limits["fp32"]
    with pytest.raises(UnavailableError, match="no limits for fp16"):
        limits_of(BUNDLE, "fp16")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/a/folder/street.spm: no graph", "street.spm: no graph"),
        ("'/a/b/y.onnx' and fp16/fp32 and 3/4", "'y.onnx' and fp16/fp32 and 3/4"),
        ("no driver (libcuda.so.1: cannot open)", "no driver (libcuda.so.1: cannot open)"),
    ],
)
def test_reasons_name_no_folders(text: str, told: str) -> None:
    assert without_folders(text) == told


def test_the_bundle_is_not_written_to() -> None:
    assert BUNDLE.path == Path(spmdeploy.default_model())
