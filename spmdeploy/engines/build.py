"""Builds engines from a bundle's graphs: builds, measures the precision, records and stores.

Runs on the device itself, without torch and onnx.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath

from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, PARTS, REFINE, GraphRecord
from spmdeploy.engines.builder import BuildLog, BuildRequest, BuiltEngine, build_engine
from spmdeploy.engines.plan import ALL_GRAPHS, CACHED_LAYOUT, EngineOptions, EnginePlan, plan_engines
from spmdeploy.engines.precision import engine_fp16_share
from spmdeploy.engines.progress import BuildMonitor, BuildStatus
from spmdeploy.engines.record import (
    ENGINE_SUFFIX,
    BuilderFacts,
    EngineFile,
    EngineHost,
    EngineRecord,
    MeasuredPrecision,
    SourceFile,
    operating_system,
    slug,
)
from spmdeploy.engines.store import find_engines
from spmdeploy.engines.writer import EnginePlace, EngineWriter, choose_place
from spmdeploy.errors import BundleError, InputError, UnavailableError, VerificationError
from spmdeploy.files import atomic_write, user_cache
from spmdeploy.version import __version__

MIN_FP16_SHARE = 0.5
"""Share of the floating-point layers that must compute in FP16 in an FP16 engine. The typed graphs have 0.88 and more;
where TensorRT may choose, it leaves some layers in FP32, but never most of a convolutional network."""

logger = logging.getLogger("spmdeploy")


@dataclass(frozen=True)
class EngineResult:
    """A stored engine."""

    path: Path
    record: EngineRecord
    built: bool
    """False: it existed already."""
    warnings: int
    """Number of the library's warnings, which are in build.log next to the engine."""


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
            bundle.add_graphs,
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
                folder = user_cache() / "timing"
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
