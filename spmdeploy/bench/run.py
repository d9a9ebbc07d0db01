"""One run of the benchmark, from what was asked to a record."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from spmdeploy import default_model
from spmdeploy.bench import schedule as contest
from spmdeploy.bench.backends import BACKENDS, REFERENCE_BACKEND, has_torch, skip_by_default
from spmdeploy.bench.group import BackendUnderTest, Case, Group, Progress, without_folders
from spmdeploy.bench.machine import BackgroundLoad, LoadMeter, State, describe_machine, read_state
from spmdeploy.bench.results import ModelInfo, Protocol, Record, Result, Scope
from spmdeploy.bench.roofline import PeakRates, best_of, numpy_rates, roofline_bound
from spmdeploy.bench.schedule import StopCondition
from spmdeploy.bench.worker import Worker
from spmdeploy.bench.workloads import MASK_RULE, edit_batch
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.errors import SpmDeployError, UnavailableError, VerificationError
from spmdeploy.types import Precision
from spmdeploy.version import __version__

T = TypeVar("T")

SECONDS = 10.0
ITERATIONS: dict[Scope, int] = {"engine": 200, "frame": 200, "edit": 200, "cold-start": 20}
"""At least so many, unless a duration is asked for. A cold start takes a second or more."""
SHORTEST_RATE = 1.0
"""Seconds for which each rate of the machine is looked for; less when the whole run is shorter."""
ENQUEUED_ABOVE = 0.8
"""Share of the GPU's time that launching may take before the host is said to hold it up (trtexec's threshold)."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    bundle: Path | None = None
    """None: the built-in one, unless there is a preset."""
    preset: str | None = None
    """Random weights of this size instead of a bundle."""
    backends: tuple[str, ...] = ()
    """Empty: every one that makes sense here."""
    precisions: tuple[str, ...] = ("auto",)
    device: str = "auto"
    scopes: tuple[Scope, ...] = ("engine",)
    batches: tuple[int, ...] = (1,)
    streams: tuple[int, ...] = (1,)
    sizes: tuple[int, ...] = (512,)
    """Of the photos that are edited; the engine scope has the graph's size."""
    masks: tuple[str, ...] = ("small", "medium", "large")
    seconds: float | None = None
    baseline: str = REFERENCE_BACKEND
    profile: bool = False

    def enough(self, scope: Scope) -> StopCondition:
        return StopCondition(SECONDS, ITERATIONS[scope]) if self.seconds is None else StopCondition(self.seconds, 0)

    def command(self) -> str:
        """What to type for the same run, without the folders of anything."""
        repeated: dict[str, Iterable[object]] = {
            "preset": [self.preset] if self.preset else [],
            "backend": self.backends,
            "precision": self.precisions,
            "device": [self.device],
            "scope": self.scopes,
            "batch": self.batches,
            "streams": self.streams,
            "size": self.sizes,
            "mask": self.masks,
            "duration": [] if self.seconds is None else [f"{self.seconds:g}"],
            "baseline": [self.baseline],
        }
        words = ["spmdeploy bench", *([self.bundle.name] if self.bundle else [])]
        words += [f"--{name} {value}" for name, values in repeated.items() for value in values]
        return " ".join(words + ["--profile"] * self.profile)


def run_bench(options: Options, talk: Progress = lambda what, share: None) -> Record:
    """Measures. Raises BundleError; what goes wrong with one backend is written into its rows instead."""
    machine, meter, before = describe_machine(), LoadMeter(), read_state()
    rows: list[Result] = []
    with ExitStack() as stack:
        bundle = _opened(options, talk, stack)
        seconds = min(SHORTEST_RATE, options.seconds or SHORTEST_RATE)
        with ExitStack() as workers:
            entrants = list(_open_backends(bundle, options, talk, workers))
            there_are_any = any(entrant.worker is not None for entrant in entrants)
            talk("what this machine can do", 0.0)
            rates = _cpu_rates(seconds) if there_are_any else []
            reference = _reference(bundle, entrants, workers) if there_are_any else None
            for case in cases(bundle, options):
                group = Group(bundle, case, entrants, reference, options.baseline, options.device)
                rows += group.measure(options.enough(case.scope), talk)
            if options.profile:
                rows = [_profiled(row, bundle, entrants, talk) for row in rows]
        rates += _gpu_rates(rows, seconds)
        others, after = meter.other_load(), read_state()  # our processes have ended: their time is known
        rows = [_add_roofline(row, bundle, rates) for row in rows]
        return Record(
            spmdeploy=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            subject=_subject(bundle, options.preset),
            protocol=_protocol(options),
            machine=machine,
            before=before,
            after=after,
            others=others,
            rates=tuple(rates),
            rows=tuple(rows),
            warnings=tuple(warnings(rows, options.baseline, (before, after), others)),
        )


def failure(record: Record) -> SpmDeployError | None:
    """What a run ends with besides its record: nothing, if something was measured and no picture was wrong."""
    differing = [f"{row.backend}: {row.reason}" for row in record.rows if row.status == "differs"]
    crashed = [f"{row.backend}: {row.reason}" for row in record.rows if row.status == "crashed"]
    if differing:
        return VerificationError("; ".join(dict.fromkeys(differing)), "do not use this backend with this bundle")
    if crashed:
        return SpmDeployError("; ".join(dict.fromkeys(crashed)), "`spmdeploy verify` with this backend may tell more")
    if not any(row.status == "measured" for row in record.rows):
        reasons = dict.fromkeys(f"{row.backend}: {row.reason}" for row in record.rows)
        return UnavailableError(f"nothing could be measured: {'; '.join(reasons)}", "see `spmdeploy doctor`")
    return None


def cases(bundle: Bundle, options: Options) -> Iterator[Case]:
    """The groups of a run. Scopes are never mixed: each row says which it is, and ratios stay within a group."""
    for scope, mask in itertools.product(options.scopes, options.masks):
        if scope in ("engine", "frame"):
            for batch, streams in itertools.product(options.batches, options.streams):
                yield Case(scope, bundle.manifest.native_size, mask, batch, streams)
        else:
            for size in options.sizes:
                yield Case(scope, size, mask)


def warnings(rows: Sequence[Result], baseline: str, states: Sequence[State], others: BackgroundLoad) -> Iterator[str]:
    """What a reader of the figures must know before believing them."""
    measured = [row for row in rows if row.status == "measured"]
    if others.is_significant:
        yield f"other processes used {others.cpu_share:.0%} of the cores during the run: do not publish these figures"
    if measured and baseline not in {row.backend for row in measured}:
        yield f"no ratios: the baseline {baseline} was not measured"
    for row in measured:
        name = f"{row.backend} ({row.scope}, {row.size}×{row.size}, {row.mask} mask, batch {row.batch})"
        if row.warm_up is not None and not row.warm_up.steady:
            yield f"{name} was not steady after {row.warm_up.seconds:.0f} s of warm-up"
        if row.latency_ms is not None and row.latency_ms.unstable:
            yield f"{name} is unstable: its times vary by {row.latency_ms.cv:.1%} (standard deviation over mean)"
        if row.latency_ms is not None and row.phases_ms.get("launch", 0) > ENQUEUED_ABOVE * row.latency_ms.p50:
            yield f"{name} waits for the host: launching takes {row.phases_ms['launch']:.2f} ms"
    for gpu in states[-1].gpus:
        if gpu.throttled:
            yield f"the GPU was slowed down at the end: {', '.join(gpu.slowed_by)}"


# ------------------------------------------------------------------------------------------------------- who takes part


def _opened(options: Options, talk: Progress, stack: ExitStack) -> Bundle:
    if options.preset is None:
        return open_bundle(options.bundle or default_model())
    if not has_torch():
        raise UnavailableError("exporting random weights needs torch and onnx", 'pip install "spmdeploy[export]"')
    talk(f"exporting random weights of the {options.preset} preset", 0.0)
    precisions = tuple(name for name in ("fp32", "fp16") if name == "fp32" or name in options.precisions)
    folder = Path(stack.enter_context(TemporaryDirectory()))
    return open_bundle(_in_process(_export_random, options.preset, folder, precisions))


def _export_random(preset: str, folder: Path, precisions: tuple[Precision, ...]) -> Path:
    from spmdeploy.bench.random_bundle import export_random

    return export_random(preset, folder, precisions)


def _open_backends(bundle: Bundle, options: Options, talk: Progress, stack: ExitStack) -> Iterator[BackendUnderTest]:
    for backend, precision in itertools.product(options.backends or BACKENDS, options.precisions):
        talk(f"opening {backend}", 0.0)
        try:
            if not options.backends:
                skip_by_default(backend)
            worker = stack.enter_context(Worker(bundle.path, backend, options.device, precision))
            golden = tuple(worker.verify()) if bundle.manifest.golden else ()
            yield BackendUnderTest(backend, precision, worker, worker.describe(), golden)
        except SpmDeployError as error:
            yield BackendUnderTest(backend, precision, failure=error)


def _reference(bundle: Bundle, entrants: Sequence[BackendUnderTest], stack: ExitStack) -> Worker | None:
    """Eager PyTorch in FP32: the one that takes part, or one that only draws; None where it cannot be had."""
    taking_part = next(
        (it.worker for it in entrants if it.backend == REFERENCE_BACKEND and it.worker is not None), None
    )
    if taking_part is not None or not has_torch():
        return taking_part
    try:
        return stack.enter_context(Worker(bundle.path, REFERENCE_BACKEND, "auto", "fp32"))
    except SpmDeployError:  # a bundle without FP32 graphs: its golden edits remain
        return None


def _profiled(row: Result, bundle: Bundle, entrants: Sequence[BackendUnderTest], talk: Progress) -> Result:
    """With the time of its parts and the memory of its activations, where the backend's library tells."""
    if row.scope != "engine" or row.memory is None:
        return row
    worker = next(it.worker for it in entrants if (it.backend, it.precision) == (row.backend, row.asked_precision))
    assert worker is not None
    talk(f"profiling {row.backend}, {row.mask} mask, batch {row.batch}", 0.0)
    try:
        profile = worker.profile(edit_batch(bundle.manifest.classes, row.size, row.mask, row.batch))
    except SpmDeployError as error:
        return replace(row, notes=row.notes | {"profile": without_folders(error.problem)})
    return replace(row, parts=profile.parts, memory=replace(row.memory, activations=profile.activation_bytes))


# ------------------------------------------------------------------------------------------------------- what is beside


def _cpu_rates(seconds: float) -> list[PeakRates]:
    """Measured in processes of their own, so that no library stays behind in this one."""
    rates = [_in_process(numpy_rates, seconds)]
    if has_torch():
        rates.append(_in_process(_torch_rates, "cpu", "fp32", seconds))
    return [best_of(rates)]


def _gpu_rates(rows: Sequence[Result], seconds: float) -> list[PeakRates]:
    """Of every GPU and precision that took part; torch alone can measure them."""
    places = {(row.ran.device, row.ran.precision) for row in rows if row.ran is not None and row.ran.device != "cpu"}
    return [_in_process(_torch_rates, *place, seconds) for place in sorted(places)] if has_torch() else []


def _torch_rates(device: str, precision: str, seconds: float) -> PeakRates:
    from spmdeploy.bench.torch_backends import torch_rates

    return torch_rates(device, precision, seconds)


def _in_process(work: Callable[..., T], *arguments: object) -> T:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _add_roofline(row: Result, bundle: Bundle, rates: Sequence[PeakRates]) -> Result:
    """Only the engine scope is compared with the work counted in the graph."""
    if row.scope != "engine" or row.ran is None or row.latency_ms is None:
        return row
    place = row.ran.device, row.ran.precision
    measured = next((it for it in rates if (it.device, it.precision) == place), None)
    if measured is None:
        return row
    gflop, weights = bundle.manifest.generator.gflop, row.ran.weights_bytes
    return replace(row, floor=roofline_bound(gflop, weights, row.batch, row.size, measured, row.latency_ms.p50))


def _subject(bundle: Bundle, preset: str | None) -> ModelInfo:
    facts = bundle.manifest.generator
    return ModelInfo(
        name=bundle.manifest.name,
        weights="its own weights" if preset is None else "random weights",
        graphs={f"{it.graph} {it.precision}": it.sha256 for it in bundle.manifest.graphs},
        classes=facts.classes,
        width=facts.width,
        hidden=facts.hidden,
        parameters=facts.parameters,
        gflop=facts.gflop,
    )


def _protocol(options: Options) -> Protocol:
    return Protocol(
        command=options.command(),
        masks=MASK_RULE,
        warm_up=(
            f"{contest.WARM_UP_SECONDS:g} s and until the medians of the last {contest.STEADY_WINDOWS} windows agree "
            f"within {contest.STEADY_WITHIN:.0%}, at most {contest.WARM_UP_LIMIT:g} s"
        ),
        measuring=(
            f"in turns of {contest.TURN_SECONDS:g} s or one iteration, all backends in every round; nothing removed"
        ),
        seconds=options.seconds,
    )
