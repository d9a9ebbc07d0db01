"""The graphs of a bundle to engines: which library, for what, built, read back, judged, recorded and put in place.

Runs on the device itself: no torch, no onnx.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any

from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, REFINE, GraphRecord
from spmdeploy.engines.builder import CURRENT, BuildLog, BuildRequest, BuiltEngine, build_engine
from spmdeploy.engines.library import import_engine_library, is_installed
from spmdeploy.engines.precision import engine_fp16_share
from spmdeploy.engines.progress import BuildMonitor, Tell
from spmdeploy.engines.record import (
    ENGINE_RUNTIMES,
    ENGINE_SUFFIX,
    BatchRange,
    BuilderFacts,
    EngineFile,
    EngineHost,
    EngineRecord,
    EngineRuntime,
    Gpu,
    MeasuredPrecision,
    SourceFile,
    operating_system,
    slug,
)
from spmdeploy.engines.store import EnginePlace, EngineWriter, Place, choose_place, find_engines
from spmdeploy.errors import BundleError, InputError, UnavailableError, UsageError, VerificationError
from spmdeploy.files import atomic_write
from spmdeploy.gpu.driver import GpuFacts, gpu_facts
from spmdeploy.types import Precision
from spmdeploy.version import __version__

ALL_GRAPHS = "all"
MAX_BATCH = 64
"""The graphs are exported for batches up to this."""

FP16_SHARE = 0.5
"""Least share of the floating-point layers that must compute in FP16 for an engine to be called FP16. The typed graphs
state 0.88 and more; where TensorRT may choose, it leaves in FP32 what is faster so, but that is never most of a
convolutional network."""


@dataclass(frozen=True)
class EngineOptions:
    """What to build. None and `auto` leave the choice to `plan_engines` and `choose_place`."""

    runtime: str = "auto"
    precision: Precision = "fp16"
    graph: str = ALL_GRAPHS
    max_batch: int = 8
    opt_batch: int = 1
    """The engine is optimized for this: one edit at a time is what people wait for."""
    targets: Sequence[str] = ()
    timing_cache: Path | None = None
    """A folder: a file in it for each library version and GPU."""
    workspace_mb: int | None = None
    place: Place | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class EnginePlan:
    """With which library, for which GPU: known before any graph is looked at, and the same for all of them."""

    runtime: EngineRuntime
    library: Any
    gpu: GpuFacts | None
    """The GPU at hand."""
    targets: tuple[str, ...]
    """As sm86; empty: for the GPU at hand."""
    batch: BatchRange
    why: str

    @property
    def version(self) -> str:
        return str(self.library.__version__)

    @property
    def built_for(self) -> Gpu | None:
        """The one GPU that the engines will be bound to."""
        return None if self.targets or self.gpu is None else Gpu(self.gpu.name, self.gpu.compute_capability)

    @property
    def words(self) -> str:
        made_for = self.built_for or ", ".join(self.targets)
        return f"{self.runtime} {self.version} for {made_for}: {self.why}"


@dataclass(frozen=True)
class EngineResult:
    """An engine that is in place."""

    path: Path
    record: EngineRecord
    built: bool
    """False: it was there already."""
    warnings: int
    """Of the library; they are in the log beside the engine."""


# ---------------------------------------------------------------------------------------------------------- planning


def plan_engines(options: EngineOptions) -> EnginePlan:
    """Settles what can be settled before the work. Raises UsageError, UnavailableError."""
    if not 1 <= options.opt_batch <= options.max_batch <= MAX_BATCH:
        raise UsageError(
            f"batches of 1 to {options.max_batch}, best at {options.opt_batch}, cannot be",
            f"the best one must be among them, and the graphs take at most {MAX_BATCH}",
        )
    try:
        gpu, no_gpu = gpu_facts(), ""
    except OSError as exc:
        gpu, no_gpu = None, str(exc)
    runtime, library, why = _choose_library(options, gpu, no_gpu)
    if options.timing_cache is not None and runtime == "tensorrt-rtx":
        raise UsageError(
            "TensorRT-RTX keeps no timing cache", "leave --timing-cache out: it does not measure when it builds"
        )
    targets = _targets(library, options.targets, gpu) if runtime == "tensorrt-rtx" else ()
    return EnginePlan(runtime, library, gpu, targets, BatchRange(1, options.opt_batch, options.max_batch), why)


def _choose_library(options: EngineOptions, gpu: GpuFacts | None, no_gpu: str) -> tuple[EngineRuntime, Any, str]:
    """The library, imported, and why it is this one."""
    if options.runtime != "auto" and options.runtime not in ENGINE_RUNTIMES:
        raise UsageError(f"unknown runtime {options.runtime!r}", f"choose from auto, {', '.join(ENGINE_RUNTIMES)}")
    if options.runtime == "tensorrt-rtx":
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), "as asked"
    if options.runtime == "tensorrt":
        if options.targets:
            raise UsageError("TensorRT builds for the GPU at hand alone", "leave --target out, or use tensorrt-rtx")
        library = import_engine_library("tensorrt")
        if gpu is None:
            raise UnavailableError(
                f"TensorRT builds for the GPU at hand, and there is none: {no_gpu}",
                "build on the device itself, or with --runtime tensorrt-rtx --target ...",
            )
        return "tensorrt", library, "as asked"
    if options.targets:
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), "TensorRT-RTX alone builds for listed targets"
    why = "TensorRT is not installed" if gpu else f"TensorRT needs a GPU ({no_gpu})"
    if gpu is not None and is_installed("tensorrt"):
        try:
            library = import_engine_library("tensorrt")
            return "tensorrt", library, "TensorRT is installed, and it optimizes for this very GPU"
        except UnavailableError as exc:
            if not is_installed("tensorrt-rtx"):
                raise
            why = exc.problem
    if is_installed("tensorrt-rtx"):
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), why
    raise UnavailableError(
        "neither TensorRT nor TensorRT-RTX is installed",
        'pip install "spmdeploy[tensorrt-rtx]", or "spmdeploy[tensorrt]" on a machine with the GPU',
    )


def _targets(library: Any, wanted: Sequence[str], gpu: GpuFacts | None) -> tuple[str, ...]:
    """Names of compute capabilities to build for, each known to the library; empty: for the GPU at hand as it is."""
    known = sorted((name.lower() for name in library.ComputeCapability.__members__ if name[:2] == "SM"), key=_number)
    there = f"TensorRT-RTX {library.__version__} builds for {', '.join(known)}"
    unknown = [target for target in wanted if target not in known]
    if unknown:
        raise UsageError(
            f"no target {unknown[0]!r}: {there}",
            "engines for Jetson and for data-center GPUs are built on the device itself, with --runtime tensorrt",
        )
    if wanted:
        return tuple(sorted(set(wanted), key=_number))
    if gpu is None:
        raise UsageError("there is no GPU here to build for", f"name what to build for, as in --target sm86; {there}")
    here = Gpu(gpu.name, gpu.compute_capability).target
    return (here,) if here in known else ()


def _number(target: str) -> int:
    return int(target[2:])


# ---------------------------------------------------------------------------------------------------------- building


def build_engines(
    bundle: Bundle, options: EngineOptions, plan: EnginePlan | None = None, tell: Tell = lambda words, seconds: None
) -> list[EngineResult]:
    """Builds what is asked for and not there yet; `tell` hears of every step and, in long ones, that it goes on.

    Raises BundleError (no such graph, or one that does not parse), UnavailableError (this machine or library cannot),
    VerificationError (another precision came out than was asked for), OutOfMemory, InputError (nowhere to write).
    """
    plan = plan or plan_engines(options)
    graphs = _graphs(bundle, options)
    place = choose_place(bundle, options.place)
    tell(plan.words, 0.0)
    tell(place.summary, 0.0)
    results = []
    for graph in graphs:
        present = None if options.overwrite else _present(bundle, graph, plan)
        results.append(present or _EngineBuild(bundle, graph, options, plan, place, tell).run())
    return results


def _graphs(bundle: Bundle, options: EngineOptions) -> list[GraphRecord]:
    """The graphs to build from. Raises BundleError when there is none, saying why and what to do."""
    usable = [graph for graph in bundle.manifest.graphs if graph.graph in (EDIT, REFINE)]
    if not usable:
        raise BundleError(
            f"{bundle.path}: holds only the graph for CPUs, whose shapes depend on the mask: no engine can be built",
            f"add the graphs for GPUs: spmdeploy export {bundle.path} --output NEW.spm",
        )
    if options.graph != ALL_GRAPHS:
        return [bundle.graph(options.graph, options.precision)]
    chosen = [graph for graph in usable if graph.precision == options.precision]
    return chosen or [bundle.graph(usable[0].graph, options.precision)]  # which says what there is


def _present(bundle: Bundle, graph: GraphRecord, plan: EnginePlan) -> EngineResult | None:
    """An intact engine that is what would be built."""
    wanted = (graph.graph, graph.precision, plan.runtime, plan.version, plan.built_for, plan.targets, plan.batch)
    here = EngineHost.with_gpu(plan.built_for, {plan.runtime: plan.version})
    for found in find_engines(bundle, here):
        if found.record is None or found.problems:
            continue
        record = found.record
        made = (
            record.graph,
            record.precision,
            record.runtime,
            record.version,
            record.gpu,
            record.targets,
            record.batch,
        )
        if made == wanted and (record.targets or found.fit):
            return EngineResult(found.path, record, built=False, warnings=0)
    return None


class _EngineBuild:
    """One graph on its way to an engine."""

    def __init__(
        self,
        bundle: Bundle,
        graph: GraphRecord,
        options: EngineOptions,
        plan: EnginePlan,
        place: EnginePlace,
        tell: Tell,
    ) -> None:
        self._bundle, self._graph, self._options, self._plan, self._place = bundle, graph, options, plan, place
        self._name = f"{graph.graph}.{graph.precision}"
        self._watch = BuildMonitor(lambda words, seconds: tell(f"{self._name}: {words}", seconds))

    def run(self) -> EngineResult:
        started = time.perf_counter()
        with EngineWriter(self._place, self._name) as writer:
            log = BuildLog(writer.log, kept_as=writer.failed_log)
            source, built, fallback = self._build(log)
            self._keep_timing_cache(built)
            seconds = time.perf_counter() - started
            self._watch.say("reading back the precision")
            reading = self._read_back(built)
            _check_precision(self._graph, reading, fallback)
            record = self._record(source, built, fallback, reading, seconds)
            path = writer.finish(record, built.content)
        return EngineResult(path, record, built=True, warnings=len(log.warnings))

    def _build(self, log: BuildLog) -> tuple[GraphRecord, BuiltEngine, str | None]:
        """The graph that the engine was built from, the engine, and why it is not strongly typed, if it is not."""
        try:
            return self._graph, self._build_from(self._graph, log), None
        except (BundleError, UnavailableError) as exc:
            fp32 = self._fallback_graph()
            if fp32 is None:
                raise
            fallback = f"the typed graph does not build with {self._plan.runtime} {self._plan.version}: {exc.problem}"
        self._watch.say(f"{fallback}; building from {fp32.file} with FP16 allowed")
        log.errors.clear()
        return fp32, self._build_from(fp32, log, weakly_typed=True), fallback

    def _fallback_graph(self) -> GraphRecord | None:
        """The FP32 graph, where the library can be allowed to compute it in FP16: TensorRT 10 (JetPack 6 has 10.3)."""
        if self._graph.precision != "fp16" or not hasattr(self._plan.library.BuilderFlag, "FP16"):
            return None
        wanted = (self._graph.graph, "fp32")
        return next((g for g in self._bundle.manifest.graphs if (g.graph, g.precision) == wanted), None)

    def _build_from(self, graph: GraphRecord, log: BuildLog, weakly_typed: bool = False) -> BuiltEngine:
        plan, options = self._plan, self._options
        current = (CURRENT,) if plan.runtime == "tensorrt-rtx" and not plan.targets else ()
        with _graph_on_disk(self._bundle, graph) as path:
            request = BuildRequest(
                graph=path,
                batch=plan.batch,
                targets=plan.targets or current,
                weakly_typed=weakly_typed,
                workspace=None if options.workspace_mb is None else options.workspace_mb << 20,
                timing_cache=self._read_timing_cache(),
            )
            return build_engine(plan.library, request, log, self._watch)

    def _read_back(self, built: BuiltEngine) -> MeasuredPrecision:
        network_share = round(built.network_fp16_share, 4)
        if self._plan.gpu is None:
            no_gpu = f"there is no GPU here, and {self._plan.runtime} loads engines only where there is one"
            return MeasuredPrecision(None, no_gpu, network_share)
        share, unread = engine_fp16_share(self._plan.library, built.content, self._plan.batch.opt)
        return MeasuredPrecision(None if share is None else round(share, 4), unread, network_share)

    def _record(
        self, source: GraphRecord, built: BuiltEngine, fallback: str | None, reading: MeasuredPrecision, seconds: float
    ) -> EngineRecord:
        plan, graph = self._plan, self._graph
        os_name, architecture = operating_system()
        driver, cuda = (plan.gpu.driver, plan.gpu.cuda) if plan.gpu else (None, None)
        digest = hashlib.sha256(built.content).hexdigest()
        onnx, *weights = (SourceFile(name, self._bundle.digest(name)) for name in source.files)
        assert len(weights) <= 1, source.files
        return EngineRecord(
            bundle=self._bundle.manifest.name,
            graph=graph.graph,
            precision=graph.precision,
            runtime=plan.runtime,
            version=plan.version,
            gpu=plan.built_for,
            targets=plan.targets,
            builder=BuilderFacts(os_name, architecture, driver, cuda, __version__),
            strongly_typed=fallback is None,
            fallback=fallback,
            flags=built.flags,
            batch=plan.batch,
            inputs=built.inputs,
            outputs=built.outputs,
            computes_in=reading,
            onnx=onnx,
            weights=weights[0] if weights else None,
            engine=EngineFile(f"{self._name}{ENGINE_SUFFIX}", len(built.content), digest),
            build_seconds=round(seconds, 2),
            timing_cache=built.timing_cache_used,
            created=date.today(),
        )

    # -- timing cache

    def _timing_cache_file(self) -> Path | None:
        """Caches are of one library version and GPU: each pair has its own file."""
        if self._options.timing_cache is None or self._plan.gpu is None:
            return None
        words = (self._plan.runtime, self._plan.version, self._plan.gpu.name, self._plan.gpu.compute_capability)
        return self._options.timing_cache / f"{slug(*words)}.timing"

    def _read_timing_cache(self) -> bytes | None:
        file = self._timing_cache_file()
        if file is None:
            return None
        try:
            return file.read_bytes() if file.exists() else b""
        except OSError as exc:
            raise _unusable_cache(self._options.timing_cache, exc) from exc

    def _keep_timing_cache(self, built: BuiltEngine) -> None:
        file = self._timing_cache_file()
        if file is None or built.timing_cache is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise _unusable_cache(self._options.timing_cache, exc) from exc
        with atomic_write(file) as stream:
            stream.write(built.timing_cache)


def _unusable_cache(folder: Path | None, exc: OSError) -> InputError:
    return InputError(f"{folder}: cannot be used for timing caches: {exc}", "give a folder that you may write to")


@contextmanager
def _graph_on_disk(bundle: Bundle, graph: GraphRecord) -> Iterator[Path]:
    """The graph as a file, its weights beside it where they are a file of their own; all hashed just now.

    Parsers need a path, and files of a zip have none: they are written to a folder that only this user can read.
    """
    if bundle.is_on_disk(graph):
        yield bundle.path_of_graph(graph)
        return
    content, weights = bundle.read_graph(graph)
    with tempfile.TemporaryDirectory(prefix="spmdeploy-") as folder:
        path = Path(folder) / PurePosixPath(graph.file).name
        path.write_bytes(content)
        for name, held in weights.items():
            path.with_name(name).write_bytes(held)
        yield path


def _check_precision(graph: GraphRecord, reading: MeasuredPrecision, fallback: str | None) -> None:
    """Raises VerificationError when the engine does not compute in what was asked for, or that cannot be shown."""
    share = reading.fp16_share if reading.fp16_share is not None else reading.network_fp16_share
    if graph.precision == "fp16" and share < FP16_SHARE:
        unread = f" ({reading.unread})" if reading.unread and fallback else ""
        raise VerificationError(
            f"asked for FP16, but only {reading}{unread}: {share:.0%} of the layers, less than {FP16_SHARE:.0%}",
            "ask for --precision fp32, or use a library that keeps to the graph's types: TensorRT from 10.12 on",
        )
    if graph.precision == "fp32" and share > 0:
        raise VerificationError(f"asked for FP32, but {reading}", "export the bundle again")
