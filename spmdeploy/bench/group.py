"""One case and every backend: same pictures in, judged first, warmed up, then timed in turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.verify import GoldenResult
from spmdeploy.bench.backends import cold_start_options
from spmdeploy.bench.cold_start import ColdStart
from spmdeploy.bench.fidelity import Parity, check_golden_parity, judge
from spmdeploy.bench.racer import BackendCrashedError, FirstRun, Measurable, MemoryUsage
from spmdeploy.bench.results import BackendInfo, Result, RowMemoryUsage, Scope, Status
from spmdeploy.bench.schedule import Round, StopCondition, run_interleaved, warm_up
from spmdeploy.bench.worker import Worker
from spmdeploy.bench.workloads import EditBatch, edit_batch, edit_case, stacked, write_case
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import ParityLimits
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.stats import Turns, ratio_of_medians, summarize

Progress = Callable[[str, float], None]
"""Told what is going on, and which share of it is done, 0..1."""


@dataclass(frozen=True)
class Case:
    """What every backend of a group does."""

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
    """A backend in one precision: its process and what it is, or why there is none."""

    backend: str
    precision: str
    worker: Worker | None = None
    ran: BackendInfo | None = None
    golden: tuple[GoldenResult, ...] = ()
    failure: SpmDeployError | None = None


@dataclass(frozen=True)
class Group:
    """A case, who takes part, and what their pictures are compared with."""

    bundle: Bundle
    case: Case
    entrants: Sequence[BackendUnderTest]
    reference: Worker | None
    """Eager PyTorch in FP32, where torch is installed."""
    baseline: str
    device: str

    def measure(self, enough: StopCondition, talk: Progress) -> list[Result]:
        """A row for each entrant, in their order."""
        rows: dict[BackendUnderTest, Result] = {}
        racers: dict[BackendUnderTest, Measurable] = {}
        with ExitStack() as stack:
            inputs = self._inputs()
            expected = None if self.reference is None else self._first(self.reference).picture
            for entrant in self.entrants:
                talk(f"{self.case}: warming up {entrant.backend}", 0.0)
                rows[entrant] = replace(_blank(self.case, entrant), masked_share=round(inputs.masked_share, 4))
                try:
                    racer, first = self._prepared(entrant, stack)
                    parity = self._judged(entrant, first, inputs.mask, expected)
                    rows[entrant] = replace(
                        rows[entrant], parity=parity, first_ms=first.seconds * 1000, notes=first.notes
                    )
                    if parity.passed:
                        rows[entrant] = replace(rows[entrant], warm_up=warm_up(racer))
                        racer.forget()
                        racers[entrant] = racer
                    else:
                        rows[entrant] = _differing(rows[entrant])
                except SpmDeployError as error:
                    rows[entrant] = _failed(rows[entrant], error)
            if racers:
                turns = run_interleaved(
                    list(racers.values()), enough, lambda share: talk(f"{self.case}: measuring", share)
                )
                rows |= self._measured(rows, racers, dict(zip(racers, turns, strict=True)))
        return list(rows.values())

    def _measured(
        self,
        rows: dict[BackendUnderTest, Result],
        racers: dict[BackendUnderTest, Measurable],
        turns: dict[BackendUnderTest, list[Round]],
    ) -> dict[BackendUnderTest, Result]:
        base = next((entrant for entrant in racers if entrant.backend == self.baseline), None)
        measured = {}
        for entrant, racer in racers.items():
            row = _timed(rows[entrant], turns[entrant], racer.medians(), racer.memory())
            if base is not None and entrant is not base:
                ratio = ratio_of_medians(_samples(turns[base]), _samples(turns[entrant]), self.baseline)
                row = replace(row, ratio=ratio)
            measured[entrant] = row
        return measured

    # -- what is edited, by whom

    def _inputs(self) -> EditBatch:
        table, case = self.bundle.manifest.classes, self.case
        if case.scope in ("engine", "frame"):
            return edit_batch(table, case.size, case.mask, case.batch)
        return stacked([edit_case(table, case.size, case.mask)])

    def _first(self, worker: Worker) -> FirstRun:
        """The case's first run in a worker; afterwards it can be timed."""
        if self.case.scope == "engine":
            return worker.prepare_engine(self._inputs(), self.case.streams)
        if self.case.scope == "frame":
            return worker.prepare_frame(self._inputs(), self.case.streams)
        return worker.prepare_edit(edit_case(self.bundle.manifest.classes, self.case.size, self.case.mask))

    def _prepared(self, entrant: BackendUnderTest, stack: ExitStack) -> tuple[Measurable, FirstRun]:
        if entrant.worker is None:
            assert entrant.failure is not None
            raise entrant.failure
        if self.case.scope != "cold-start":
            return entrant.worker, self._first(entrant.worker)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        case = edit_case(self.bundle.manifest.classes, self.case.size, self.case.mask)
        choice = cold_start_options(entrant.backend, self.device, entrant.precision)
        start = ColdStart(write_case(case, folder), ["--model", str(self.bundle.path.resolve()), *choice])
        return start, start.first()

    def _judged(
        self, entrant: BackendUnderTest, first: FirstRun, mask: NDArray[np.uint8], expected: NDArray[np.uint8] | None
    ) -> Parity:
        """Raises UnavailableError where nothing says how far a picture may be off, or what it should be."""
        assert entrant.ran is not None
        limits = limits_of(self.bundle, entrant.ran.precision)
        if expected is not None:
            return judge(first.picture, expected, first.photo, mask, limits, entrant.golden)
        if not entrant.golden:
            raise UnavailableError(
                "nothing to compare its pictures with: the bundle holds no golden edits, and torch is not installed",
                'pip install "spmdeploy[export]"',
            )
        return check_golden_parity(entrant.golden)


def limits_of(bundle: Bundle, precision: str) -> ParityLimits:
    """How far pictures may be off in a precision. Raises UnavailableError when the bundle does not say."""
    for name, limits in bundle.manifest.limits.items():
        if name == precision:
            return limits
    raise UnavailableError(
        f"the bundle states no limits for {precision}, so that its pictures cannot be judged",
        f"export it with --precision {precision}",
    )


# ---------------------------------------------------------------------------------------------------------------- rows


def _blank(case: Case, entrant: BackendUnderTest) -> Result:
    return Result(
        scope=case.scope,
        backend=entrant.backend,
        asked_precision=entrant.precision,
        size=case.size,
        mask=case.mask,
        batch=case.batch,
        streams=case.streams,
        status="unavailable",
        reason=None,
        ran=entrant.ran,
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
    """Every absolute path in the text cut down to its last part: records say nothing of where they were made."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text)


def _differing(row: Result) -> Result:
    """A speed beside a wrong picture is worth nothing, so there is none."""
    assert row.parity is not None
    reason = f"its picture is not PyTorch's: {'; '.join(row.parity.faults)}"
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
        memory=RowMemoryUsage(memory.ready, memory.peak, memory.device, memory.activations, memory.loaded),
        phases_ms={name: round(value, 4) for name, value in phases.items()},
        samples_ms=tuple(tuple(round(sample, 4) for sample in turn.samples) for turn in turns),
    )


def _samples(turns: Sequence[Round]) -> Turns:
    return [turn.samples for turn in turns]
