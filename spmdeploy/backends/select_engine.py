"""Selects a compatible TensorRT engine of a bundle and verifies it with golden edits before its results are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from spmdeploy.backends.base import OpenedBackend, Unsupported
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, LAYOUT, PICTURE, REFINE
from spmdeploy.engines.library import import_engine_library, local_host
from spmdeploy.engines.record import EngineHost, EngineRecord, EngineRuntime, Gpu, Verification
from spmdeploy.engines.store import StoredEngine, find_engines
from spmdeploy.errors import BundleError, InputError, SpmDeployError, UnavailableError, VerificationError
from spmdeploy.files import quote_path, user_cache
from spmdeploy.gpu.driver import gpu_facts

if TYPE_CHECKING:
    from spmdeploy.backends.tensorrt_layout import StoredParts
    from spmdeploy.backends.verify import GoldenResult

NO_ENGINES = "no engine was built for this bundle"


def open_named_engine(bundle: Bundle, runtime: EngineRuntime, ordinal: int, precision: str) -> OpenedBackend:
    """The engine of one library that fits this machine.

    Args:
        bundle: Whose engines are looked for, in the bundle and in the cache.
        runtime: The library.
        ordinal: Number of the GPU.
        precision: auto, fp32 or fp16.

    Raises:
        UnavailableError: The library or the GPU is missing.
        BundleError: No engine fits; gives the reasons against each.
        OutOfMemoryError: The engine does not fit into the GPU's memory.
        VerificationError: The golden edits come out differently.
    """
    version = str(import_engine_library(runtime).__version__)
    try:
        facts = gpu_facts(ordinal)
    except OSError as exc:
        raise UnavailableError(f"{runtime} needs an NVIDIA GPU: {exc}", "see `spmdeploy doctor`") from exc
    host = EngineHost.with_gpu(Gpu(facts.name, facts.compute_capability), {runtime: version})
    there = [engine for engine in find_engines(bundle, host, hashing=False) if _speaks_of(engine, runtime)]
    fit = _fitting(there, precision)
    if not fit:
        raise BundleError(
            f"{bundle.path}: {_reasons(there, precision)}", _how_to_build(bundle, there, precision, runtime)
        )
    return _open(bundle, fit[0], there, ordinal, precision)


def open_compatible_engine(bundle: Bundle, ordinal: int, precision: str) -> tuple[OpenedBackend | None, str]:
    """A session on the best engine that fits and works, or why there is none: any failure is a reason."""
    there = find_engines(bundle, None if ordinal == 0 else local_host(ordinal), hashing=False)
    fit = _fitting(there, precision)
    if not fit:
        hint = f"; {_how_to_build(bundle, there, precision)}" if _fitting(there, precision, REFINE) else ""
        return None, _reasons(there, precision) + hint
    failures = []
    for engine in fit:
        try:
            opened = _open(bundle, engine, there, ordinal, precision)
        except SpmDeployError as exc:
            failures.append(exc.problem)
            continue
        tried = "".join(f"; tried first: {problem}" for problem in failures)
        choice = f"{opened.choices[0]}{tried}"
        return replace(opened, choices=(choice, *opened.choices[1:]), notices=(choice,) if failures else ()), ""
    return None, f"no engine for this bundle works here: {'; '.join(failures)}"


def compatible_engine(bundle: Bundle) -> tuple[StoredEngine | None, str]:
    """The engine that would be tried first on the first GPU, and what it is; or None, and why none fits."""
    there = find_engines(bundle, hashing=False)
    fit = _fitting(there, "auto")
    if not fit:
        return None, _reasons(there, "auto")
    refine = _refine_beside(bundle, fit[0], there)
    crops = f"; it cannot cascade, {refine.problem}" if isinstance(refine, Unsupported) else ""
    return fit[0], f"{fit[0].path.parent.name}, built for {fit[0].require_compatible().target}{crops}"


def _open(
    bundle: Bundle, engine: StoredEngine, there: list[StoredEngine], ordinal: int, precision: str
) -> OpenedBackend:
    from spmdeploy.backends.tensorrt import TensorRtSession
    from spmdeploy.backends.verify import verify_cached_layouts, verify_edits, verify_refinements

    record = engine.require_compatible()
    refine, parts = _refine_beside(bundle, engine, there), _parts_beside(bundle, engine, there)
    library = import_engine_library(record.runtime)
    session = TensorRtSession(library, engine, refine, bundle.manifest.native_size, ordinal, parts)
    try:
        proof = _verify_once(engine, lambda: verify_edits(session, bundle), ordinal)
        if not isinstance(refine, Unsupported):
            _verify_once(refine, lambda: verify_refinements(session, bundle), ordinal)
        if not isinstance(parts, Unsupported):
            for part in parts:
                _verify_once(part, lambda: verify_cached_layouts(session, bundle), ordinal)
    except BaseException:
        session.close()
        raise
    choices = [f"backend {record.runtime}: {engine.path} was built for {record.target}; {proof}"]
    if precision == "auto":
        why = "faster on a GPU, within the bundle's limits of FP32" if record.precision == "fp16" else "no other fits"
        choices.append(f"precision {record.precision}: {why}")
    return OpenedBackend(session, tuple(choices))


def _fitting(engines: Iterable[StoredEngine], precision: str, graph: str = EDIT) -> list[StoredEngine]:
    """Those that fit, the best first: FP16, TensorRT (which measured on this GPU) before RTX, larger batches, newer."""

    def rank(engine: StoredEngine) -> tuple[bool, bool, int, date]:
        record = engine.require_compatible()
        return record.precision == "fp16", record.runtime == "tensorrt", record.batch.max, record.created

    found = [engine for engine in engines if engine.fit and _is_of(engine, precision, graph)]
    return sorted(found, key=rank, reverse=True)


def _is_of(engine: StoredEngine, precision: str, graph: str) -> bool:
    record = engine.record
    return record is not None and record.graph == graph and precision in ("auto", record.precision)


def _speaks_of(engine: StoredEngine, runtime: EngineRuntime) -> bool:
    return engine.record is None or engine.record.runtime == runtime


def _same_library(one: StoredEngine, other: StoredEngine) -> bool:
    return one.require_compatible().runtime == other.require_compatible().runtime


def _reasons(engines: list[StoredEngine], precision: str) -> str:
    """Why no engine of the edit graph is taken."""
    against = _against(engines, EDIT, lambda record: f"it computes in {record.precision}, not {precision}")
    if against:
        return f"no engine fits this machine: {against}"
    if _fitting(engines, precision, REFINE):
        return "a refine engine fits this machine, but no edit engine was built, without which it is of no use"
    return NO_ENGINES


def _how_to_build(
    bundle: Bundle, there: list[StoredEngine], precision: str, runtime: EngineRuntime | None = None
) -> str:
    """What to do where no edit engine fits: the whole command."""
    graphs = [record.precision for record in bundle.manifest.graphs if record.graph == EDIT]
    if not graphs or precision not in ("auto", *graphs):
        return f"{bundle.add_graphs}; then build it"
    if precision == "auto" and "fp16" not in graphs:
        precision = "fp32"
    if _fitting(there, precision, REFINE):
        return f"build it too, on this machine: {_build_command(bundle, precision, runtime, EDIT)}"
    what = "the engines again" if there else "one"
    return f"build {what} on this machine: {_build_command(bundle, precision, runtime)}"


def _build_command(bundle: Bundle, precision: str, runtime: EngineRuntime | None, graph: str | None = None) -> str:
    """What builds the engines of a bundle. precision, runtime, graph: auto or None where `build` chooses."""
    options = {"--graph": graph, "--runtime": runtime, "--precision": None if precision == "auto" else precision}
    chosen = [f"{name} {value}" for name, value in options.items() if value is not None]
    return " ".join(["spmdeploy build", quote_path(bundle.path), *chosen])


def _refine_beside(bundle: Bundle, engine: StoredEngine, there: list[StoredEngine]) -> StoredEngine | Unsupported:
    """The refine engine that goes with an edit engine, or why none does and what to do about it."""
    edit = engine.require_compatible()
    for other in _fitting(there, edit.precision, REFINE):
        if _same_library(other, engine):
            return other
    if not any((graph.graph, graph.precision) == (REFINE, edit.precision) for graph in bundle.manifest.graphs):
        return Unsupported(
            f"the bundle holds no refine graph in {edit.precision}", f"{bundle.add_graphs}; then build it"
        )
    against = _against(
        there,
        REFINE,
        lambda other: (
            f"{other.runtime} in {other.precision}, beside an edit engine of {edit.runtime} in {edit.precision}"
        ),
    )
    problem = f"no refine engine fits: {against}" if against else "an edit engine was built, but no refine engine"
    command = _build_command(bundle, edit.precision, edit.runtime, REFINE)
    return Unsupported(problem, f"build one on this machine: {command}")


def _parts_beside(bundle: Bundle, engine: StoredEngine, there: list[StoredEngine]) -> StoredParts | Unsupported:
    """The engines for cached layouts that go with an edit engine, or why there are none and what to do about it."""
    from spmdeploy.backends.tensorrt_layout import StoredParts
    from spmdeploy.engines.plan import CACHED_LAYOUT

    edit = engine.require_compatible()
    found = [
        next((other for other in _fitting(there, edit.precision, part) if _same_library(other, engine)), None)
        for part in (LAYOUT, PICTURE)
    ]
    layout, picture = found
    if layout is not None and picture is not None:
        return StoredParts(layout, picture)
    missing = " and ".join(part for part, one in zip((LAYOUT, PICTURE), found, strict=True) if one is None)
    command = _build_command(bundle, edit.precision, edit.runtime, CACHED_LAYOUT)
    return Unsupported(
        f"there is no {missing} engine of {edit.runtime} in {edit.precision} that fits this machine",
        f"build it on this machine: {command}",
    )


def _against(engines: list[StoredEngine], graph: str, unwanted: Callable[[EngineRecord], str]) -> str:
    """Why each engine of a graph and each unreadable file is not used. unwanted:
    what does against one that fits this machine."""
    texts = []
    for engine in engines:
        if engine.record is None or _is_of(engine, "auto", graph):
            reasons = (unwanted(engine.require_compatible()),) if engine.fit else engine.reasons
            texts.append(f"{engine.path.parent.name}/{engine.path.name}: {', '.join(reasons)}")
    return "; ".join(texts)


def _verify_once(engine: StoredEngine, verify: Callable[[], list[GoldenResult]], ordinal: int) -> str:
    """Evidence for its results: the golden edits passed with this GPU and driver, now or before."""
    record = engine.require_compatible()
    facts = gpu_facts(ordinal)
    here = f"{facts.name}, driver {facts.driver or 'unknown'}"
    for known in (record, _kept(record)):
        proof = known and known.verification
        if proof and proof.passed and proof.gpu == here:
            return f"its golden edits passed here on {proof.on}"
    results = verify()
    verification = _verification(results, here)
    lost = _keep(engine, verification)
    faults = [f"{result.name}: {fault}" for result in results for fault in result.problems]
    if faults:
        raise VerificationError(
            f"{engine.path} gives wrong results: {'; '.join(faults)}",
            "build it again with --overwrite; if it stays so, use another backend and report it",
        )
    return "its golden edits passed just now" + (f", which cannot be noted: {lost}" if lost else "")


def _verification(results: list[GoldenResult], gpu: str) -> Verification:
    deviations = [result.deviation for result in results]
    worst = min(deviations, key=lambda it: it.psnr_db).to_json()["psnr_db"]
    return Verification(
        passed=all(result.passed for result in results),
        on=date.today(),
        gpu=gpu,
        max_grey=max(it.max_grey for it in deviations),
        mean_grey=max(it.mean_grey for it in deviations),
        psnr_db=worst,
    )


def _keep(engine: StoredEngine, verification: Verification) -> str | None:
    """Notes it in the engine's record, or in the cache where the bundle is not writable; or logs why not."""
    with suppress(InputError):
        engine.with_verification(verification)
        return None
    record = replace(engine.require_compatible(), verification=verification)
    try:
        path = _kept_path(record)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(record.to_bytes())
    except (OSError, UnavailableError) as exc:
        return str(exc)
    return None


def _kept(record: EngineRecord) -> EngineRecord | None:
    """The record as it was noted in the cache, if it is of this very engine."""
    with suppress(OSError, SpmDeployError):
        kept = EngineRecord.from_bytes(_kept_path(record).read_bytes(), "the cache")
        if replace(kept, verification=None) == replace(record, verification=None):
            return kept
    return None


def _kept_path(record: EngineRecord) -> Path:
    return user_cache() / "verified" / f"{record.key}.json"
