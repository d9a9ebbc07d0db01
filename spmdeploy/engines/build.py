"""Builds engines from a bundle's graphs: plans, builds, measures the precision, records and stores.

Runs on the device itself, without torch and onnx.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any

from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, PARTS, REFINE, GraphRecord
from spmdeploy.engines.builder import BuildLog, BuildRequest, BuiltEngine, build_engine
from spmdeploy.engines.library import import_engine_library, is_installed
from spmdeploy.engines.precision import engine_fp16_share
from spmdeploy.engines.progress import BuildMonitor, BuildStatus
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
from spmdeploy.engines.store import EnginePlace, EngineWriter, Place, cache_folder, choose_place, find_engines
from spmdeploy.errors import BundleError, InputError, UnavailableError, UsageError, VerificationError
from spmdeploy.files import atomic_write
from spmdeploy.gpu.driver import GpuFacts, gpu_facts
from spmdeploy.types import Precision
from spmdeploy.version import __version__

ALL_GRAPHS = "all"
CACHED_LAYOUT = "cached-layout"
"""The two graphs that together are `edit`, split so that a layout is computed once for many images."""

MAX_BATCH = 64
"""The graphs are exported for batches up to this."""

PROFILE_BATCHES = (1, 4, 8)
"""Batch sizes with an optimization profile each: one edit, the editor's batch of tiles, and the default maximum."""

MIN_FP16_SHARE = 0.5
"""Share of the floating-point layers that must compute in FP16 in an FP16 engine. The typed graphs have 0.88 and more;
where TensorRT may choose, it leaves some layers in FP32, but never most of a convolutional network."""

logger = logging.getLogger("spmdeploy")


@dataclass(frozen=True)
class EngineOptions:
    """Options of a build. None and `auto` leave the choice to `plan_engines` and `choose_place`."""

    runtime: str = "auto"
    precision: Precision = "fp16"
    graph: str = ALL_GRAPHS
    """edit, refine, `ALL_GRAPHS` (both) or `CACHED_LAYOUT`."""
    max_batch: int = 8
    opt_batch: int | None = None
    """One optimization profile for all batch sizes, best at this one. None: a profile for each of `PROFILE_BATCHES`."""
    opt_level: int | None = None
    """`builder_optimization_level`, 0 to 5; None: the library's default."""
    targets: Sequence[str] = ()
    timing_cache: Path | None = None
    """A folder with a file for each library version and GPU. None: in the cache folder."""
    workspace_mb: int | None = None
    place: Place | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class EnginePlan:
    """Library, GPU and batch sizes, which are the same for all graphs."""

    runtime: EngineRuntime
    library: Any
    gpu: GpuFacts | None
    """The GPU of this machine."""
    targets: tuple[str, ...]
    """As sm86; empty: for the GPU of this machine."""
    profiles: tuple[BatchRange, ...]
    why: str

    @property
    def version(self) -> str:
        return str(self.library.__version__)

    @property
    def batch(self) -> BatchRange:
        """All batch sizes of the profiles."""
        return BatchRange(self.profiles[0].min, self.profiles[0].opt, self.profiles[-1].max)

    @property
    def built_for(self) -> Gpu | None:
        """The GPU that the engines will be bound to; None for `targets`."""
        return None if self.targets or self.gpu is None else Gpu(self.gpu.name, self.gpu.compute_capability)

    @property
    def description(self) -> str:
        """For messages."""
        target = self.built_for or ", ".join(self.targets)
        return f"{self.runtime} {self.version} for {target}: {self.why}"


@dataclass(frozen=True)
class EngineResult:
    """A stored engine."""

    path: Path
    record: EngineRecord
    built: bool
    """False: it existed already."""
    warnings: int
    """Number of the library's warnings, which are in build.log next to the engine."""


def plan_engines(options: EngineOptions) -> EnginePlan:
    """Choose library, GPU and batch sizes.

    Raises:
        UsageError: Options contradict each other or the libraries.
        UnavailableError: There is no library or no GPU for them.
    """
    profiles = batch_profiles(options.max_batch, options.opt_batch)
    if options.opt_level is not None and not 0 <= options.opt_level <= 5:
        raise UsageError(f"there is no optimization level {options.opt_level}", "choose from 0 (quick to build) to 5")
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
    return EnginePlan(runtime, library, gpu, targets, profiles, why)


def batch_profiles(max_batch: int, opt_batch: int | None = None) -> tuple[BatchRange, ...]:
    """Return the optimization profiles for batches of 1 to `max_batch`.

    Args:
        max_batch: The largest batch size, 1 to 64.
        opt_batch: One profile, best at this batch size; None: one best at each of `PROFILE_BATCHES` and at the largest.

    Raises:
        UsageError: The batch sizes are not possible.
    """
    if not 1 <= (opt_batch or 1) <= max_batch <= MAX_BATCH:
        raise UsageError(
            f"batches of 1 to {max_batch}, best at {opt_batch or 1}, are not possible",
            f"the best one must be among them, and the graphs take at most {MAX_BATCH}",
        )
    if opt_batch is not None:
        return (BatchRange(1, opt_batch, max_batch),)
    ends = sorted({size for size in PROFILE_BATCHES if size < max_batch} | {max_batch})
    return tuple(BatchRange(before + 1, end, end) for before, end in zip((0, *ends), ends, strict=False))


def _choose_library(options: EngineOptions, gpu: GpuFacts | None, no_gpu: str) -> tuple[EngineRuntime, Any, str]:
    """The imported library, and why it was chosen."""
    if options.runtime != "auto" and options.runtime not in ENGINE_RUNTIMES:
        raise UsageError(f"unknown runtime {options.runtime!r}", f"choose from auto, {', '.join(ENGINE_RUNTIMES)}")
    if options.runtime == "tensorrt-rtx":
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), "as requested"
    if options.runtime == "tensorrt":
        if options.targets:
            raise UsageError(
                "TensorRT builds for the GPU of this machine only", "leave --target out, or use tensorrt-rtx"
            )
        library = import_engine_library("tensorrt")
        if gpu is None:
            raise UnavailableError(
                f"TensorRT builds for the GPU of this machine, and there is none: {no_gpu}",
                "build on the device itself, or with --runtime tensorrt-rtx --target ...",
            )
        return "tensorrt", library, "as requested"
    if options.targets:
        return "tensorrt-rtx", import_engine_library("tensorrt-rtx"), "only TensorRT-RTX builds for listed targets"
    why = "TensorRT is not installed" if gpu else f"TensorRT needs a GPU ({no_gpu})"
    if gpu is not None and is_installed("tensorrt"):
        try:
            library = import_engine_library("tensorrt")
            return "tensorrt", library, "TensorRT is installed, which optimizes for this GPU"
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
    """Names of compute capabilities to build for, each known to the library."""
    known = sorted((name.lower() for name in library.ComputeCapability.__members__ if name[:2] == "SM"), key=_number)
    supported = f"TensorRT-RTX {library.__version__} builds for {', '.join(known)}"
    unknown = [target for target in wanted if target not in known]
    if unknown:
        raise UsageError(
            f"no target {unknown[0]!r}: {supported}",
            "engines for Jetson and for data-center GPUs are built on the device itself, with --runtime tensorrt",
        )
    if wanted:
        return tuple(sorted(set(wanted), key=_number))
    if gpu is None:
        raise UsageError(
            "there is no GPU here to build for", f"name what to build for, as in --target sm86; {supported}"
        )
    here = Gpu(gpu.name, gpu.compute_capability)
    if here.target not in known:
        raise UnavailableError(
            f"{supported}, not for {here}", "build with --runtime tensorrt on this machine: TensorRT supports its GPU"
        )
    return (here.target,)


def _number(target: str) -> int:
    return int(target[2:])


def build_engines(
    bundle: Bundle,
    options: EngineOptions,
    plan: EnginePlan | None = None,
    report: BuildStatus = lambda status, seconds: None,
) -> list[EngineResult]:
    """Build engines that do not exist yet.

    Args:
        bundle: The graphs.
        options: Which engines, and where to store them.
        plan: Of `plan_engines` for these options; None: made here.
        report: Called with every step and, during long ones, repeatedly.

    Returns:
        All requested engines, including those that existed already.

    Raises:
        BundleError: There is no such graph, or it cannot be parsed.
        UnavailableError: This machine or library cannot build it.
        VerificationError: The engine computes in another precision than requested.
        OutOfMemoryError: The build needs more memory.
        InputError: The engines cannot be written.
    """
    plan = plan or plan_engines(options)
    graphs = _graphs(bundle, options)
    place = choose_place(bundle, options.place)
    report(plan.description, 0.0)
    report(place.summary, 0.0)
    results = []
    for graph in graphs:
        present = None if options.overwrite else _present(bundle, graph, plan)
        results.append(present or _EngineBuild(bundle, graph, options, plan, place, report).run())
    return results


def _graphs(bundle: Bundle, options: EngineOptions) -> list[GraphRecord]:
    """The graphs to build from. Raises BundleError if there is none."""
    usable = [graph for graph in bundle.manifest.graphs if graph.graph in (EDIT, REFINE)]
    if not usable:
        raise BundleError(
            f"{bundle.path}: holds only graphs for CPUs, whose shapes depend on the mask: no engine can be built",
            f"add the graphs for GPUs: spmdeploy export {bundle.path} --output NEW.spm",
        )
    if options.graph == CACHED_LAYOUT:
        return [bundle.graph(part, options.precision) for part in PARTS[EDIT]]
    if options.graph != ALL_GRAPHS:
        return [bundle.graph(options.graph, options.precision)]
    chosen = [graph for graph in usable if graph.precision == options.precision]
    return chosen or [bundle.graph(usable[0].graph, options.precision)]  # raises an error that lists the graphs


def _present(bundle: Bundle, graph: GraphRecord, plan: EnginePlan) -> EngineResult | None:
    """An intact engine that equals the one that would be built."""
    wanted = (graph.graph, graph.precision, plan.runtime, plan.version, plan.built_for, plan.targets, plan.profiles)
    here = EngineHost.with_gpu(plan.built_for, {plan.runtime: plan.version})
    for found in find_engines(bundle, here):
        if found.record is None or found.problems:
            continue
        record = found.record
        existing = (
            record.graph,
            record.precision,
            record.runtime,
            record.version,
            record.gpu,
            record.targets,
            record.batch_profiles,
        )
        if existing == wanted and (record.targets or found.fit):
            return EngineResult(found.path, record, built=False, warnings=0)
    return None


class _EngineBuild:
    """The build of one engine."""

    def __init__(
        self,
        bundle: Bundle,
        graph: GraphRecord,
        options: EngineOptions,
        plan: EnginePlan,
        place: EnginePlace,
        report: BuildStatus,
    ) -> None:
        self._bundle, self._graph, self._options, self._plan, self._place = bundle, graph, options, plan, place
        self._name = f"{graph.graph}.{graph.precision}"
        self._monitor = BuildMonitor(lambda status, seconds: report(f"{self._name}: {status}", seconds))

    def run(self) -> EngineResult:
        started = time.perf_counter()
        with EngineWriter(self._place, self._name) as writer:
            log = BuildLog(writer.log, kept_as=writer.failed_log)
            source, built, fallback = self._build(log)
            self._keep_timing_cache(built)
            seconds = time.perf_counter() - started
            self._monitor.report("measuring the precision")
            measured = self._measure_precision(built)
            _check_precision(self._graph, measured, fallback)
            record = self._record(source, built, fallback, measured, seconds)
            path = writer.finish(record, built.content)
        return EngineResult(path, record, built=True, warnings=len(log.warnings))

    def _build(self, log: BuildLog) -> tuple[GraphRecord, BuiltEngine, str | None]:
        """The graph that the engine was built from, the engine, and the reason if it is not strongly typed."""
        try:
            return self._graph, self._build_from(self._graph, log), None
        except (BundleError, UnavailableError) as exc:
            fp32 = self._fallback_graph()
            if fp32 is None:
                raise
            fallback = f"the typed graph does not build with {self._plan.runtime} {self._plan.version}: {exc.problem}"
        self._monitor.report(f"{fallback}; building from {fp32.file} with FP16 allowed")
        log.errors.clear()
        return fp32, self._build_from(fp32, log, weakly_typed=True), fallback

    def _fallback_graph(self) -> GraphRecord | None:
        """The FP32 graph, if the library may choose FP16 for it: TensorRT 10 (JetPack 6 has 10.3)."""
        if self._graph.precision != "fp16" or not hasattr(self._plan.library.BuilderFlag, "FP16"):
            return None
        wanted = (self._graph.graph, "fp32")
        return next((g for g in self._bundle.manifest.graphs if (g.graph, g.precision) == wanted), None)

    def _build_from(self, graph: GraphRecord, log: BuildLog, weakly_typed: bool = False) -> BuiltEngine:
        plan, options = self._plan, self._options
        with _graph_on_disk(self._bundle, graph) as path:
            request = BuildRequest(
                graph=path,
                profiles=plan.profiles,
                targets=plan.targets,
                weakly_typed=weakly_typed,
                opt_level=options.opt_level,
                workspace=None if options.workspace_mb is None else options.workspace_mb << 20,
                timing_cache=self._read_timing_cache(),
            )
            return build_engine(plan.library, request, log, self._monitor)

    def _measure_precision(self, built: BuiltEngine) -> MeasuredPrecision:
        network_share = round(built.network_fp16_share, 4)
        if self._plan.gpu is None:
            no_gpu = f"there is no GPU here, and {self._plan.runtime} loads engines only where there is one"
            return MeasuredPrecision(None, no_gpu, network_share)
        share, unread = engine_fp16_share(self._plan.library, built.content, self._plan.profiles[0].opt)
        return MeasuredPrecision(None if share is None else round(share, 4), unread, network_share)

    def _record(
        self, source: GraphRecord, built: BuiltEngine, fallback: str | None, measured: MeasuredPrecision, seconds: float
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
            computes_in=measured,
            onnx=onnx,
            weights=weights[0] if weights else None,
            engine=EngineFile(f"{self._name}{ENGINE_SUFFIX}", len(built.content), digest),
            build_seconds=round(seconds, 2),
            timing_cache=built.timing_cache_used,
            created=date.today(),
            profiles=plan.profiles if len(plan.profiles) > 1 else (),
        )

    def _timing_cache_file(self) -> Path | None:
        """The timing cache of the library version and GPU. TensorRT-RTX has none: it does not measure."""
        plan = self._plan
        if plan.runtime == "tensorrt-rtx" or plan.gpu is None:
            return None
        folder = self._options.timing_cache
        if folder is None:
            try:
                folder = cache_folder().parent / "timing"
            except UnavailableError:
                return None
        name = slug(plan.runtime, plan.version, plan.gpu.name, plan.gpu.compute_capability)
        return folder / f"{name}.timing"

    def _read_timing_cache(self) -> bytes | None:
        file = self._timing_cache_file()
        if file is None:
            return None
        try:
            return file.read_bytes() if file.exists() else b""
        except OSError as exc:
            self._unusable_timing_cache(file, exc)
            return None

    def _keep_timing_cache(self, built: BuiltEngine) -> None:
        file = self._timing_cache_file()
        if file is None or built.timing_cache is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as stream:
                stream.write(built.timing_cache)
        except (OSError, InputError) as exc:
            self._unusable_timing_cache(file, exc)

    def _unusable_timing_cache(self, file: Path, exc: Exception) -> None:
        """Raise InputError for a folder that the user named; log a warning for the default one."""
        problem = f"{file.parent}: cannot be used for timing caches: {exc}"
        if self._options.timing_cache is not None:
            raise InputError(problem, "give a folder that you may write to") from exc
        logger.warning(problem)


@contextmanager
def _graph_on_disk(bundle: Bundle, graph: GraphRecord) -> Iterator[Path]:
    """Yield the path of the graph, with its external data in the same folder, after checking their hashes.

    Parsers need a path. Files of a zip are written to a folder that only this user can read.
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


def _check_precision(graph: GraphRecord, measured: MeasuredPrecision, fallback: str | None) -> None:
    """Raise VerificationError if the engine computes in another precision than requested, or that is unknown."""
    share = measured.fp16_share if measured.fp16_share is not None else measured.network_fp16_share
    if graph.precision == "fp16" and share < MIN_FP16_SHARE:
        unread = f" ({measured.unread})" if measured.unread and fallback else ""
        raise VerificationError(
            f"FP16 was requested, but only {measured}{unread}: {share:.0%} of the layers, not {MIN_FP16_SHARE:.0%}",
            "use --precision fp32, or a library that keeps to the graph's types: TensorRT from 10.12 on",
        )
    if graph.precision == "fp32" and share > 0:
        raise VerificationError(f"FP32 was requested, but {measured}", "export the bundle again")
