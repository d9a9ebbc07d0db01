"""Measures one case with every backend: same inputs, parity check, warm-up, interleaved timing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.verify import GoldenResult, limits_of
from spmdeploy.bench.backend_process import BackendCrashedError, FirstRun, Measurable
from spmdeploy.bench.backends import cold_start_options, is_on_server
from spmdeploy.bench.cold_start import ColdStart
from spmdeploy.bench.parity import Parity, check_golden_parity, check_parity
from spmdeploy.bench.results import BackendInfo, MemoryUsage, Result, Scope, Status
from spmdeploy.bench.schedule import Round, StopCondition, run_interleaved, warm_up
from spmdeploy.bench.worker import Worker
from spmdeploy.bench.workloads import edit_batch, edit_case, masked_share, stack_cases, write_case
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.stats import Turns, ratio_of_medians, summarize
from spmdeploy.types import ModelInput

Progress = Callable[[str, float], None]
"""Called with the current step and the share of it that is done, 0..1."""


@dataclass(frozen=True)
class Case:
    """One workload, the same for all backends."""

    scope: Scope
    size: int
    mask: str
    batch: int = 1
    streams: int = 1

    def __str__(self) -> str:
        more = f", batch {self.batch}" * (self.batch > 1) + f", {self.streams} streams" * (self.streams > 1)
        return f"{self.scope}, {self.size}×{self.size}, {self.mask} mask{more}"


@dataclass(frozen=True, eq=False)
class BackendUnderTest:
    """A backend in one precision: its worker, or the reason why there is none."""

    backend: str
    precision: str
    worker: Worker | None = None
    ran: BackendInfo | None = None
    golden: tuple[GoldenResult, ...] = ()
    failure: SpmDeployError | None = None


@dataclass(frozen=True)
class CaseRunner:
    """Measures one case with several backends."""

    bundle: Bundle
    case: Case
    backends: Sequence[BackendUnderTest]
    reference: Worker | None
    """Eager PyTorch in FP32, where torch is installed."""
    baseline: str
    device: str

    def measure(self, stop: StopCondition, progress: Progress) -> list[Result]:
        """One row for each backend, in their order."""
        rows: dict[BackendUnderTest, Result] = {}
        measurables: dict[BackendUnderTest, Measurable] = {}
        with ExitStack() as stack:
            inputs = self._inputs()
            expected = None if self.reference is None else self._first(self.reference).edited
            for backend in self.backends:
                progress(f"{self.case}: warming up {backend.backend}", 0.0)
                rows[backend] = replace(_blank(self.case, backend), masked_share=round(masked_share(inputs), 4))
                try:
                    measurable, first = self._prepare(backend, stack)
                    parity = self._check(backend, first, inputs.mask, expected)
                    rows[backend] = replace(
                        rows[backend], parity=parity, first_ms=first.seconds * 1000, notes=first.notes
                    )
                    if parity.passed:
                        rows[backend] = replace(rows[backend], warm_up=warm_up(measurable))
                        measurable.reset()
                        measurables[backend] = measurable
                    else:
                        rows[backend] = _differing(rows[backend])
                except SpmDeployError as exc:
                    rows[backend] = _failed(rows[backend], exc)
            if measurables:
                turns = run_interleaved(
                    list(measurables.values()), stop, lambda share: progress(f"{self.case}: measuring", share)
                )
                rows |= self._measured(rows, measurables, dict(zip(measurables, turns, strict=True)))
        return list(rows.values())

    def _measured(
        self,
        rows: dict[BackendUnderTest, Result],
        measurables: dict[BackendUnderTest, Measurable],
        turns: dict[BackendUnderTest, list[Round]],
    ) -> dict[BackendUnderTest, Result]:
        base = next((backend for backend in self.backends if backend.backend == self.baseline), None)
        measured = {}
        for backend, measurable in measurables.items():
            row = _timed(rows[backend], turns[backend], measurable.phase_medians(), measurable.memory())
            if base in measurables and backend is not base:
                ratio = ratio_of_medians(_samples(turns[base]), _samples(turns[backend]), self.baseline)
                row = replace(row, ratio=ratio)
            measured[backend] = row
        return measured

    def _inputs(self) -> ModelInput:
        table, case = self.bundle.manifest.classes, self.case
        if case.scope in ("engine", "cached-layout"):
            return edit_batch(table, case.size, case.mask, case.batch)
        return stack_cases([edit_case(table, case.size, case.mask)])

    def _first(self, worker: Worker) -> FirstRun:
        """First run of the case in a worker, which can then be timed."""
        if self.case.scope == "engine":
            return worker.prepare_engine(self._inputs(), self.case.streams)
        if self.case.scope == "cached-layout":
            return worker.prepare_cached_layout(self._inputs(), self.case.streams)
        return worker.prepare_edit(edit_case(self.bundle.manifest.classes, self.case.size, self.case.mask))

    def _prepare(self, backend: BackendUnderTest, stack: ExitStack) -> tuple[Measurable, FirstRun]:
        if backend.worker is None:
            assert backend.failure is not None
            raise backend.failure
        if self.case.scope != "cold-start":
            return backend.worker, self._first(backend.worker)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        case = edit_case(self.bundle.manifest.classes, self.case.size, self.case.mask)
        device = backend.ran.device if backend.ran is not None and is_on_server(backend.backend) else self.device
        options = cold_start_options(backend.backend, device, backend.precision)
        start = ColdStart(write_case(case, folder), ["--model", str(self.bundle.path.resolve()), *options])
        return start, start.first()

    def _check(
        self, backend: BackendUnderTest, first: FirstRun, mask: NDArray[np.uint8], expected: NDArray[np.uint8] | None
    ) -> Parity:
        """Raises UnavailableError without limits or without a reference."""
        assert backend.ran is not None
        limits = limits_of(self.bundle, backend.ran.precision)
        if expected is not None:
            return check_parity(first.edited, expected, first.photo, mask, limits, backend.golden)
        if not backend.golden:
            raise UnavailableError(
                "no reference: the bundle holds no golden edits, and torch is not installed",
                'pip install "spmdeploy[export]"',
            )
        return check_golden_parity(backend.golden)


def _blank(case: Case, backend: BackendUnderTest) -> Result:
    return Result(
        scope=case.scope,
        backend=backend.backend,
        asked_precision=backend.precision,
        size=case.size,
        mask=case.mask,
        batch=case.batch,
        streams=case.streams,
        status="unavailable",
        reason=None,
        ran=backend.ran,
        masked_share=None,
        parity=None,
        first_ms=None,
        warm_up=None,
        latency_ms=None,
        ratio=None,
        edits_per_second=None,
        megapixels_per_second=None,
        joules_per_edit=None,
        memory=None,
        floor=None,
        phases_ms={},
        notes={},
        parts=(),
        samples_ms=(),
    )


def _failed(row: Result, error: SpmDeployError) -> Result:
    status: Status = "crashed" if isinstance(error, BackendCrashedError) else "unavailable"
    reason = without_folders(error.problem + (f" ({error.hint})" if error.hint else ""))
    return replace(row, status=status, reason=reason, first_ms=None, warm_up=None)


def without_folders(text: str) -> str:
    """Shortens absolute paths in the text to their last part: records do not identify the machine."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text)


def _differing(row: Result) -> Result:
    """No time is reported for wrong results."""
    assert row.parity is not None
    reason = f"its results differ from PyTorch's: {'; '.join(row.parity.faults)}"
    return replace(row, status="differs", reason=reason, first_ms=None)


def _timed(row: Result, turns: Sequence[Round], phases: dict[str, float], memory: MemoryUsage) -> Result:
    edits = sum(len(turn.samples) for turn in turns) * row.batch
    seconds = sum(turn.seconds for turn in turns)
    joules = [turn.joules for turn in turns if turn.joules is not None]
    return replace(
        row,
        status="measured",
        latency_ms=summarize(_samples(turns)),
        edits_per_second=edits / seconds,
        megapixels_per_second=edits / seconds * row.size**2 / 1e6,
        joules_per_edit=sum(joules) / edits if len(joules) == len(turns) else None,
        memory=memory,
        phases_ms={name: round(value, 4) for name, value in phases.items()},
        samples_ms=tuple(tuple(round(sample, 4) for sample in turn.samples) for turn in turns),
    )


def _samples(turns: Sequence[Round]) -> Turns:
    return [turn.samples for turn in turns]
