"""Runs a benchmark: from options to a record, and to its files."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from spmdeploy import default_model
from spmdeploy.backends.registry import bench_names
from spmdeploy.bench import schedule
from spmdeploy.bench.backends import (
    REFERENCE_BACKEND,
    default_precisions,
    has_torch,
    is_on_server,
    skip_by_default,
)
from spmdeploy.bench.machine import BackgroundLoad, LoadMeter, State, describe_machine, read_state
from spmdeploy.bench.results import Methodology, ModelInfo, Record, Result, Scope, record_text
from spmdeploy.bench.roofline import PeakRates, fastest, numpy_rates, roofline_bound
from spmdeploy.bench.runner import BackendUnderTest, Case, CaseRunner, Progress, without_folders
from spmdeploy.bench.schedule import StopCondition
from spmdeploy.bench.tables import markdown
from spmdeploy.bench.worker import Worker
from spmdeploy.bench.workloads import MASK_RULE, edit_batch
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.errors import InputError, SpmDeployError, UnavailableError, VerificationError
from spmdeploy.files import EXISTS_HINT, atomic_write
from spmdeploy.types import Precision
from spmdeploy.version import __version__

T = TypeVar("T")

SECONDS = 10.0
ITERATIONS: dict[Scope, int] = {"engine": 200, "cached-layout": 200, "edit": 200, "cold-start": 20}
"""Minimum iterations without --duration. A cold start takes about a second."""
MAX_RATE_SECONDS = 1.0
"""Time for measuring each peak rate of the machine; less in shorter runs."""
HOST_BOUND_RATIO = 0.8
"""Share of the GPU's time above which launching makes an edit host-bound: trtexec's threshold."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    bundle: Path | None = None
    """None: the built-in model, unless a preset is given."""
    preset: str | None = None
    """Random weights of this size instead of a bundle."""
    backends: tuple[str, ...] = ()
    """Empty: all that make sense here."""
    precisions: tuple[str, ...] = ()
    """Empty: those of `default_precisions` for each backend."""
    device: str = "auto"
    url: str | None = None
    """Of the servers, for backends that compute there."""
    scopes: tuple[Scope, ...] = ("engine",)
    batches: tuple[int, ...] = (1,)
    streams: tuple[int, ...] = (1,)
    sizes: tuple[int, ...] = (512,)
    """Sides of the photos of the scopes edit and cold-start; the others use the graph's size."""
    masks: tuple[str, ...] = ("small", "medium", "large")
    seconds: float | None = None
    baseline: str = REFERENCE_BACKEND
    profile: bool = False

    def stop_condition(self, scope: Scope) -> StopCondition:
        """When a case has run long enough; `seconds` alone decides where it is given."""
        return StopCondition(SECONDS, ITERATIONS[scope]) if self.seconds is None else StopCondition(self.seconds, 0)

    def device_of(self, backend: str) -> str:
        """The device that a backend is opened on."""
        return self.url if self.url is not None and is_on_server(backend) else self.device

    def command(self) -> str:
        """The command that repeats the run, without folders."""
        repeated: dict[str, Iterable[object]] = {
            "preset": [self.preset] if self.preset else [],
            "backend": self.backends,
            "precision": self.precisions,
            "device": [self.device],
            "url": [self.url] if self.url else [],
            "scope": self.scopes,
            "batch": self.batches,
            "streams": self.streams,
            "size": self.sizes,
            "mask": self.masks,
            "duration": [] if self.seconds is None else [f"{self.seconds:g}"],
            "baseline": [self.baseline],
        }
        arguments = ["spmdeploy bench", *([self.bundle.name] if self.bundle else [])]
        arguments += [f"--{name} {value}" for name, values in repeated.items() for value in values]
        return " ".join(arguments + ["--profile"] * self.profile)


def run_bench(options: Options, progress: Progress = lambda step, share: None) -> Record:
    """Measures all cases; failures of one backend go into its rows.

    Raises:
        BundleError: The bundle cannot be read.
        UnavailableError: The extra `bench` is not installed.
    """
    machine, meter, before = describe_machine(), LoadMeter(), read_state()
    rows: list[Result] = []
    with ExitStack() as stack:
        bundle = _open_bundle(options, progress, stack)
        seconds = min(MAX_RATE_SECONDS, options.seconds or MAX_RATE_SECONDS)
        with ExitStack() as workers:
            backends = list(_open_backends(bundle, options, progress, workers))
            any_opened = any(backend.worker is not None for backend in backends)
            progress("measuring peak rates", 0.0)
            rates = _cpu_rates(seconds) if any_opened else []
            reference = _reference(bundle, backends, workers) if any_opened else None
            for case in cases(bundle, options):
                runner = CaseRunner(bundle, case, backends, reference, options.baseline, options.device)
                rows += runner.measure(options.stop_condition(case.scope), progress)
            if options.profile:
                rows = [_profile(row, bundle, backends, progress) for row in rows]
        rates += _gpu_rates(rows, seconds)
        others, after = meter.other_load(), read_state()  # our processes have ended: their CPU time is known
        rows = [_add_roofline(row, bundle, rates) for row in rows]
        return Record(
            spmdeploy=__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            subject=_subject(bundle, options.preset),
            protocol=_methodology(options),
            machine=machine,
            before=before,
            after=after,
            others=others,
            rates=tuple(rates),
            rows=tuple(rows),
            warnings=tuple(reader_warnings(rows, options.baseline, (before, after), others)),
        )


def exit_error(record: Record) -> SpmDeployError | None:
    """The error a run ends with; None if something was measured and no result was wrong."""
    differing = [f"{row.backend}: {row.reason}" for row in record.rows if row.status == "differs"]
    crashed = [f"{row.backend}: {row.reason}" for row in record.rows if row.status == "crashed"]
    if differing:
        return VerificationError("; ".join(dict.fromkeys(differing)), "do not use this backend with this bundle")
    if crashed:
        return SpmDeployError("; ".join(dict.fromkeys(crashed)), "run `spmdeploy verify` with this backend")
    if not any(row.status == "measured" for row in record.rows):
        reasons = dict.fromkeys(f"{row.backend}: {row.reason}" for row in record.rows)
        return UnavailableError(f"nothing could be measured: {'; '.join(reasons)}", "see `spmdeploy doctor`")
    return None


def cases(bundle: Bundle, options: Options) -> Iterator[Case]:
    """The cases of a run. Scopes are never mixed: ratios stay within a case."""
    for scope, mask in itertools.product(options.scopes, options.masks):
        if scope in ("engine", "cached-layout"):
            for batch, streams in itertools.product(options.batches, options.streams):
                yield Case(scope, bundle.manifest.native_size, mask, batch, streams)
        else:
            for size in options.sizes:
                yield Case(scope, size, mask)


def reader_warnings(
    rows: Sequence[Result], baseline: str, states: Sequence[State], others: BackgroundLoad
) -> Iterator[str]:
    """Reasons not to trust the figures, one sentence each.

    Args:
        rows: All rows of the record.
        baseline: Name of the backend that ratios refer to.
        states: Of the machine, in order; GPUs are read from the last.
        others: Load of other processes during the run.
    """
    measured = [row for row in rows if row.status == "measured"]
    if others.is_significant:
        yield f"other processes used {others.cpu_share:.0%} of the cores during the run: do not publish these figures"
    if measured and baseline not in {row.backend for row in measured}:
        yield f"no ratios: the baseline {baseline} was not measured"
    for row in measured:
        name = f"{row.backend} ({row.scope}, {row.size}×{row.size}, {row.mask} mask, batch {row.batch})"
        if row.warm_up is not None and not row.warm_up.steady:
            yield f"{name} was not stable after {row.warm_up.seconds:.0f} s of warm-up"
        if row.latency_ms is not None and row.latency_ms.unstable:
            interval = row.latency_ms.p50_interval
            width = (interval.high - interval.low) / row.latency_ms.p50
            yield f"{name} is unstable: the 95% interval of its median is {width:.1%} wide"
        if row.latency_ms is not None and row.phases_ms.get("launch", 0) > HOST_BOUND_RATIO * row.latency_ms.p50:
            yield f"{name} is host-bound: launching takes {row.phases_ms['launch']:.2f} ms"
    for gpu in states[-1].gpus:
        if gpu.throttled:
            yield f"the GPU was slowed down at the end: {', '.join(gpu.slowed_by)}"


def _open_bundle(options: Options, progress: Progress, stack: ExitStack) -> Bundle:
    if options.preset is None:
        return open_bundle(options.bundle or default_model())
    if not has_torch():
        raise UnavailableError("exporting random weights needs torch and onnx", 'pip install "spmdeploy[export]"')
    progress(f"exporting random weights of the {options.preset} preset", 0.0)
    rows = set(rows_to_measure(options))
    precisions = tuple(name for name in ("fp32", "fp16") if name == "fp32" or any(name in row for row in rows))
    folder = Path(stack.enter_context(TemporaryDirectory()))
    return open_bundle(_in_process(_export_random, options.preset, folder, precisions))


def _export_random(preset: str, folder: Path, precisions: tuple[Precision, ...]) -> Path:
    from spmdeploy.bench.seeded_bundles import export_random

    return export_random(preset, folder, precisions)


def _open_backends(
    bundle: Bundle, options: Options, progress: Progress, stack: ExitStack
) -> Iterator[BackendUnderTest]:
    for backend, precision in rows_to_measure(options):
        progress(f"opening {backend}", 0.0)
        try:
            if not options.backends:
                skip_by_default(backend)
            if options.preset is not None and backend in ("tensorrt", "tensorrt-rtx"):
                progress(f"building engines for {backend} {precision}", 0.0)
                _in_process(_build_engines, bundle.path, backend, precision)
            worker = stack.enter_context(Worker(bundle.path, backend, options.device_of(backend), precision))
            golden = tuple(worker.verify()) if bundle.manifest.golden else ()
            yield BackendUnderTest(backend, precision, worker, worker.describe(), golden)
        except SpmDeployError as exc:
            yield BackendUnderTest(backend, precision, failure=exc)


def _build_engines(path: Path, runtime: str, precision: str) -> None:
    """Builds the engines of a preset's bundle, which has none. Raises UnavailableError, BundleError."""
    from spmdeploy.engines.build import build_engines
    from spmdeploy.engines.plan import EngineOptions

    chosen = "fp32" if precision == "fp32" else "fp16"
    build_engines(open_bundle(path), EngineOptions(runtime=runtime, precision=chosen, place="bundle"))  # type: ignore[arg-type]


def rows_to_measure(options: Options) -> Iterator[tuple[str, str]]:
    """Backend and precision of each row of a case."""
    for backend in options.backends or bench_names():
        named = options.precisions or default_precisions(backend, options.device)
        yield from ((backend, precision) for precision in named)


def _reference(bundle: Bundle, backends: Sequence[BackendUnderTest], stack: ExitStack) -> Worker | None:
    """Eager PyTorch in FP32: a measured one, or a further worker; None if unavailable."""
    for backend in backends:
        if backend.backend == REFERENCE_BACKEND and backend.ran is not None and backend.ran.precision == "fp32":
            return backend.worker
    if not has_torch():
        return None
    try:
        return stack.enter_context(Worker(bundle.path, REFERENCE_BACKEND, "auto", "fp32"))
    except SpmDeployError:  # a bundle without FP32 graphs: its golden edits are the reference
        return None


def _profile(row: Result, bundle: Bundle, backends: Sequence[BackendUnderTest], progress: Progress) -> Result:
    """Adds time by part and activation memory, where the library reports them."""
    if row.scope != "engine" or row.memory is None:
        return row
    worker = next(it.worker for it in backends if (it.backend, it.precision) == (row.backend, row.asked_precision))
    assert worker is not None
    progress(f"profiling {row.backend}, {row.mask} mask, batch {row.batch}", 0.0)
    try:
        profile = worker.profile(edit_batch(bundle.manifest.classes, row.size, row.mask, row.batch))
    except SpmDeployError as exc:
        return replace(row, notes=row.notes | {"profile": without_folders(exc.problem)})
    return replace(row, parts=profile.parts, memory=replace(row.memory, activations=profile.activation_bytes))


def _cpu_rates(seconds: float) -> list[PeakRates]:
    """Measured in separate processes, so that no library stays loaded in this one."""
    rates = [_in_process(numpy_rates, seconds)]
    if has_torch():
        rates.append(_in_process(_torch_rates, "cpu", "fp32", seconds))
    return [fastest(rates)]


def _gpu_rates(rows: Sequence[Result], seconds: float) -> list[PeakRates]:
    """Rates of every GPU and precision that was measured; only torch can measure them."""
    ran = [row.ran for row in rows if row.ran is not None and row.ran.device.startswith("cuda:")]
    places = {(one.device, one.precision) for one in ran}
    return [_in_process(_torch_rates, *place, seconds) for place in sorted(places)] if has_torch() else []


def _torch_rates(device: str, precision: str, seconds: float) -> PeakRates:
    from spmdeploy.bench.torch_backends import torch_rates

    return torch_rates(device, precision, seconds)


def _in_process(work: Callable[..., T], *arguments: object) -> T:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _add_roofline(row: Result, bundle: Bundle, rates: Sequence[PeakRates]) -> Result:
    """The bound applies to the engine scope, whose work is counted in the graph."""
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


def _methodology(options: Options) -> Methodology:
    return Methodology(
        command=options.command(),
        masks=MASK_RULE,
        warm_up=(
            f"{schedule.WARM_UP_SECONDS:g} s and until the medians of the last {schedule.STABLE_WINDOWS} windows agree "
            f"within {schedule.STABLE_TOLERANCE:.0%}, at most {schedule.MAX_WARM_UP_SECONDS:g} s"
        ),
        measuring=(f"interleaved, in turns of {schedule.TURN_SECONDS:g} s or one iteration; no sample removed"),
        seconds=options.seconds,
    )


def check_outputs(record: Path | None, chart: Path | None, report: Path | None, overwrite: bool) -> None:
    """Checks the paths of output files before the run.

    Args:
        record: Path of the record, .json; None for each that is not wanted.
        chart: Path of the chart, .png.
        report: Path of the report, .md.
        overwrite: Whether existing files may be replaced.

    Raises:
        InputError: A path has the wrong suffix or exists, or its folder does not.
    """
    for path, suffix in ((record, ".json"), (chart, ".png"), (report, ".md")):
        if path is not None:
            _check_output(path, suffix, overwrite)


def write_outputs(record: Record, text: Path | None, chart: Path | None, report: Path | None) -> None:
    """Writes the record, a report and a chart, each to its path if given.

    Args:
        record: What was measured.
        text: Path of the record, .json.
        chart: Path of the chart, .png.
        report: Path of the report, .md.

    Raises:
        InputError: A file cannot be written.
        UnavailableError: matplotlib, which draws the chart, is missing.
    """
    if text is not None:
        _write(text, record_text(record).encode())
    if report is not None:
        _write(report, markdown(record).encode())
    if chart is not None:
        from spmdeploy.bench.plot import plot_record

        _write(chart, plot_record(record))


def _check_output(path: Path, suffix: str, overwrite: bool) -> None:
    if path.suffix != suffix:
        raise InputError(f"{path} does not end in {suffix}", f"name it {path.with_suffix(suffix).name}")
    if not path.parent.is_dir():
        raise InputError(f"the folder of {path} does not exist", f"mkdir -p {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already", EXISTS_HINT)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as stream:
        stream.write(content)
