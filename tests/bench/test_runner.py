"""CaseRunner with fake workers: parity, timing and the contents of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import spmdeploy
from spmdeploy.backends.verify import Deviation, GoldenResult, limits_of
from spmdeploy.bench.backend_process import BackendCrashedError, FirstRun
from spmdeploy.bench.parity import GOLDEN, IN_THIS_RUN
from spmdeploy.bench.results import BackendInfo, MemoryUsage, Result
from spmdeploy.bench.run import exit_error
from spmdeploy.bench.runner import BackendUnderTest, Case, CaseRunner, without_folders
from spmdeploy.bench.schedule import Round, StopCondition
from spmdeploy.bench.worker import Worker
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.errors import OutOfMemoryError, SpmDeployError, UnavailableError, VerificationError
from spmdeploy.types import ModelInput

from .conftest import record_of

BUNDLE = open_bundle(spmdeploy.default_model())
CASE = Case("engine", 256, "small")
GOOD = GoldenResult("car", Deviation(1, 0.01, 60.0), True, ())
BAD = GoldenResult("car", Deviation(99, 9.0, 20.0), True, ("largest difference 99 > 48",))


@dataclass
class FakeWorker:
    """Returns at once; `paint` makes its output, `milliseconds` is the reported time of an edit."""

    paint: Callable[[ModelInput], np.ndarray]
    milliseconds: float = 100.0
    log: list[str] = field(default_factory=list)
    name: str = ""
    joules: float | None = None
    fails: SpmDeployError | None = None

    def prepare_engine(self, batch: ModelInput, streams: int) -> FirstRun:
        if self.fails is not None:
            raise self.fails
        return FirstRun(batch.image, self.paint(batch), 1.5, {})

    def turn(self, seconds: float, iterations: int) -> Round:
        count = max(iterations, round(seconds * 1000 / self.milliseconds))
        self.log.append(self.name)
        return Round((self.milliseconds,) * count, count * self.milliseconds / 1000, self.joules)

    def reset(self) -> None:
        self.log.append(f"{self.name} reset")

    def phase_medians(self) -> dict[str, float]:
        return {"launch": 0.25}

    def memory(self) -> MemoryUsage:
        return MemoryUsage(100, 200, None)


def painted(level: int, outside: bool = False) -> Callable[[ModelInput], np.ndarray]:
    def paint(batch: ModelInput) -> np.ndarray:
        edited = batch.image.copy()
        edited[np.ones_like(batch.mask) > 0 if outside else batch.mask > 0] = level
        return edited

    return paint


def under_test(backend: str, worker: FakeWorker | None, **changes: Any) -> BackendUnderTest:
    ran = None if worker is None else BackendInfo("cpu", "fp32", f"{backend} 1", None, None, 1000)
    fields: dict[str, Any] = {"ran": ran, "golden": (GOOD,)} | changes
    return BackendUnderTest(backend, "auto", cast(Worker, worker), **fields)


def rows_of(*backends: BackendUnderTest, reference: FakeWorker | None = None, case: Case = CASE) -> list[Result]:
    runner = CaseRunner(BUNDLE, case, backends, cast(Worker, reference), "torch", "auto")
    return runner.measure(StopCondition(1.0, 0), lambda step, share: None)


def test_measure_same_results_are_timed() -> None:
    torch = FakeWorker(painted(100), 200.0, name="torch")
    other = FakeWorker(painted(101), 50.0, name="other", joules=2.0)
    baseline, row = rows_of(under_test("torch", torch), under_test("onnxruntime", other), reference=torch)
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


def test_measure_two_backends_warms_up_singly_and_interleaves() -> None:
    log: list[str] = []
    workers = [FakeWorker(painted(9), 500.0, log, name) for name in ("a", "b")]
    rows_of(*(under_test(name, worker) for name, worker in zip(("torch", "onnxruntime"), workers, strict=True)))
    start = log.index("b reset") + 1
    warming, measuring = log[:start], log[start:]
    assert warming == ["a"] * (len(warming) // 2 - 1) + ["a reset"] + ["b"] * (len(warming) // 2 - 1) + ["b reset"]
    assert measuring == ["a", "b"] * (len(measuring) // 2) and len(measuring) == 6


@pytest.mark.parametrize("paint", [painted(200), painted(100, outside=True)], ids=["other result", "known pixels"])
def test_measure_wrong_result_has_no_time(paint: Callable[[ModelInput], np.ndarray]) -> None:
    torch = FakeWorker(painted(100))
    wrong = FakeWorker(paint)
    _, row = rows_of(under_test("torch", torch), under_test("onnxruntime", wrong), reference=torch)
    assert row.status == "differs" and row.reason is not None and row.parity is not None and row.parity.faults
    without_speed = (row.latency_ms, row.ratio, row.edits_per_second, row.first_ms, row.warm_up, row.memory, row.floor)
    assert without_speed == (None,) * 7 and row.samples_ms == () and row.phases_ms == {}
    assert wrong.log == []  # never timed
    assert isinstance(exit_error(record_of(row)), VerificationError)


def test_measure_wrong_golden_edit_has_no_time() -> None:
    torch = FakeWorker(painted(100))
    (row,) = rows_of(under_test("onnxruntime", torch, golden=(GOOD, BAD)), reference=torch)
    assert row.status == "differs" and "golden edit car: largest difference 99 > 48" in (row.reason or "")


def test_measure_without_torch_compares_golden_edits() -> None:
    (row,) = rows_of(under_test("onnxruntime", FakeWorker(painted(3))))
    assert row.status == "measured" and row.parity is not None
    assert (row.parity.against, row.parity.max_grey, row.parity.psnr_db) == (GOLDEN, 1, 60.0)
    (row,) = rows_of(under_test("onnxruntime", FakeWorker(painted(3)), golden=(BAD,)))
    assert row.status == "differs"


def test_measure_without_reference_is_unavailable() -> None:
    (row,) = rows_of(under_test("onnxruntime", FakeWorker(painted(3)), golden=()))
    assert row.status == "unavailable" and "no reference" in (row.reason or "")


def test_measure_backend_not_opened_gives_reason() -> None:
    closed = under_test("tensorrt", None, failure=UnavailableError("no driver", "install one"), golden=())
    torch = under_test("torch", FakeWorker(painted(1)))
    row, other = rows_of(closed, torch)
    assert (row.status, row.reason, row.ran) == ("unavailable", "no driver (install one)", None)
    assert other.status == "measured" and exit_error(record_of(row, other)) is None
    printed = exit_error(record_of(row))
    assert isinstance(printed, UnavailableError) and "tensorrt: no driver" in printed.problem


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OutOfMemoryError("no memory"), "unavailable", 4),
        (BackendCrashedError("its process ended with signal 11"), "crashed", 1),
    ],
)
def test_measure_failing_backend_does_not_stop_others(error: SpmDeployError, status: str, code: int) -> None:
    failing = under_test("onnxruntime", FakeWorker(painted(1), fails=error))
    row, other = rows_of(failing, under_test("torch", FakeWorker(painted(1))))
    assert (row.status, other.status) == (status, "measured") and error.problem in (row.reason or "")
    printed = exit_error(record_of(row))
    assert printed is not None and printed.exit_code == code


def test_measure_cold_start_of_torch_compile_is_unavailable() -> None:
    compiled = under_test("torch-compile", FakeWorker(painted(1)))
    (row,) = rows_of(compiled, case=Case("cold-start", 256, "small"))
    assert row.status == "unavailable" and "does not offer it" in (row.reason or "")


def test_limits_of_bundle_are_used() -> None:
    assert limits_of(BUNDLE, "fp32") == BUNDLE.manifest.limits["fp32"]
    assert limits_of(BUNDLE, "bf16").min_psnr_db == 34  # reduced precisions have default limits
    with pytest.raises(UnavailableError, match="no limits for int8"):
        limits_of(BUNDLE, "int8")


@pytest.mark.parametrize(
    ("text", "shortened"),
    [
        ("/a/folder/street.spm: no graph", "street.spm: no graph"),
        ("'/a/b/y.onnx' and fp16/fp32 and 3/4", "'y.onnx' and fp16/fp32 and 3/4"),
        ("no driver (libcuda.so.1: cannot open)", "no driver (libcuda.so.1: cannot open)"),
    ],
)
def test_without_folders_shortens_paths(text: str, shortened: str) -> None:
    assert without_folders(text) == shortened


def test_bundle_is_the_builtin_model() -> None:
    assert BUNDLE.path == Path(spmdeploy.default_model())
