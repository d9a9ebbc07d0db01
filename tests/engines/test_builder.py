"""Builds with the recorded API of TensorRT 10.3, 10.16 and 11.4: calls, records, progress and errors."""

from __future__ import annotations

import ast
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.bundle.storage import ENGINES
from spmdeploy.engines import build as to_engine
from spmdeploy.engines.build import EngineResult, build_engines
from spmdeploy.engines.pack import pack
from spmdeploy.engines.plan import EngineOptions, EnginePlan, batch_profiles
from spmdeploy.engines.precision import inspected_fp16_share
from spmdeploy.engines.progress import BuildMonitor
from spmdeploy.engines.record import BatchRange, EngineHost, EngineRecord, Gpu, SourceFile
from spmdeploy.engines.store import find_engines
from spmdeploy.errors import (
    BundleError,
    InputError,
    OutOfMemoryError,
    SpmDeployError,
    UnavailableError,
    VerificationError,
)
from spmdeploy.gpu.driver import GpuFacts
from tests.bundle.conftest import WEIGHTS, with_weights_beside, write_street
from tests.simulators.recording_tensorrt import Behavior, inspector_json, recording_tensorrt

VERSIONS = ("10.3", "10.16", "11.4")
GPU = GpuFacts("Orin", "8.7", "12.6", "540.4.0")


@pytest.fixture(scope="module")
def apis(shared: Path) -> dict[str, dict[str, list[str]]]:
    """Every class and member of the real bindings, by version."""
    folder = shared / "tensorrt-api"
    return {version: json.loads((folder / f"tensorrt-{version}.json").read_text()) for version in VERSIONS}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_street(tmp_path / "street.spm")


def plan(library: Any, *profiles: BatchRange) -> EnginePlan:
    return EnginePlan("tensorrt", library, GPU, (), profiles or (BatchRange(1, 2, 8),), "for a test")


def build(bundle: Bundle, library: Any, **options: Any) -> EngineResult:
    (result,) = build_engines(bundle, EngineOptions(graph="edit", **options), plan(library))
    return result


def called(library: Any, *members: str) -> list[tuple[Any, ...]]:
    return [(name, *arguments) for name, arguments in library.calls if not members or name in members]


def left(bundle: Bundle) -> list[str]:
    return sorted(file.name for file in (bundle.path / ENGINES).iterdir())


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_build_calls_the_library_in_order(bundle: Bundle, apis: Any, version: str, precision: Any) -> None:
    library = recording_tensorrt(version, apis[version])
    result = build(bundle, library, precision=precision)
    strongly = 1 << library.NetworkDefinitionCreationFlag["STRONGLY_TYPED"]
    maps = [(size, 256, 256) for size in (1, 2, 8)]
    images = [(*shape, 3) for shape in maps]
    assert called(library)[:14] == [
        ("Builder.create_network", strongly),
        ("OnnxParser.parse_from_file", f"edit.{precision}.onnx"),
        ("IOptimizationProfile.set_shape", "image", *images),
        ("IOptimizationProfile.set_shape", "labels", *maps),
        ("IOptimizationProfile.set_shape", "instances", *maps),
        ("IOptimizationProfile.set_shape", "mask", *maps),
        ("IBuilderConfig.add_optimization_profile",),
        ("IBuilderConfig.clear_flag", "TF32"),
        ("IBuilderConfig.profiling_verbosity", library.ProfilingVerbosity.DETAILED),
        ("IBuilderConfig.create_timing_cache", b""),
        ("IBuilderConfig.set_timing_cache", b"", False),
        ("IBuilderConfig.progress_monitor", library.calls[11][1][0]),
        ("Builder.build_serialized_network", "engine build"),
        ("IExecutionContext.set_input_shape", "image", (2, 256, 256, 3)),
    ]
    record = result.record
    assert (record.runtime, record.version, record.gpu) == ("tensorrt", version, Gpu("Orin", "8.7"))
    assert (record.flags, record.strongly_typed, record.fallback, record.targets) == ((), True, None, ())
    assert record.computes_in.fp16_share == record.computes_in.network_fp16_share == (precision == "fp16")
    assert record.computes_in.unread is None
    assert (record.builder.driver, record.builder.cuda) == ("540.4.0", "12.6")
    assert {port.name: (port.dtype, port.shape) for port in (*record.inputs, *record.outputs)} == {
        "image": ("uint8", (-1, 256, 256, 3)),
        "labels": ("uint8", (-1, 256, 256)),
        "instances": ("int32", (-1, 256, 256)),
        "mask": ("uint8", (-1, 256, 256)),
        "edited": ("uint8", (-1, 256, 256, 3)),
    }
    assert record.onnx.sha256 == bundle.graph("edit", precision).sha256


def test_build_finished_writes_the_engine_alone(bundle: Bundle, apis: Any, version: str) -> None:
    result = build(bundle, recording_tensorrt(version, apis[version]))
    assert result.path.read_bytes() == b'{"fake engine": "Half"}' and result.path.name == "edit.fp16.engine"
    host = EngineHost.with_gpu(Gpu("Orin", "8.7"), {"tensorrt": version})
    (found,) = find_engines(bundle, host)
    assert found.fit and found.record == result.record and found.path == result.path


def test_build_with_options_sets_them(bundle: Bundle, apis: Any, version: str) -> None:
    library = recording_tensorrt(version, apis[version])
    build(bundle, library, workspace_mb=512, opt_level=5)
    assert called(library, "IBuilderConfig.builder_optimization_level")[-1][1] == 5
    assert called(library, "IBuilderConfig.set_memory_pool_limit") == [
        ("IBuilderConfig.set_memory_pool_limit", "WORKSPACE", 512 << 20)
    ]


def test_build_with_several_profiles_adds_them_in_order(bundle: Bundle, apis: Any, version: str) -> None:
    library = recording_tensorrt(version, apis[version])
    profiles = batch_profiles(8)
    (result, *_) = build_engines(bundle, EngineOptions(graph="edit"), plan(library, *profiles))
    shapes = [call[1:] for call in called(library, "IOptimizationProfile.set_shape") if call[1] == "mask"]
    assert [tuple(shape[0] for shape in call[1:]) for call in shapes] == [(1, 1, 1), (2, 4, 4), (5, 8, 8)]
    assert len(called(library, "IBuilderConfig.add_optimization_profile")) == 3
    record = result.record
    assert record.profiles == record.batch_profiles == profiles and record.batch == BatchRange(1, 1, 8)
    assert EngineRecord.from_bytes(record.to_bytes(), "engine.json") == record
    assert record.key != replace(record, profiles=()).key


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1,), [(1, 1, 1)]),
        ((4,), [(1, 1, 1), (2, 4, 4)]),
        ((6,), [(1, 1, 1), (2, 4, 4), (5, 6, 6)]),
        ((64,), [(1, 1, 1), (2, 4, 4), (5, 8, 8), (9, 64, 64)]),
        ((8, 2), [(1, 2, 8)]),
    ],
)
def test_batch_profiles_cover_all_batch_sizes(arguments: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    assert batch_profiles(*arguments) == tuple(BatchRange(*sizes) for sizes in expected)


def test_build_of_an_existing_engine_is_skipped(bundle: Bundle, apis: Any, version: str) -> None:
    first = build(bundle, recording_tensorrt(version, apis[version]))
    idle = recording_tensorrt(version, apis[version])
    again = build(bundle, idle)
    assert (first.built, again.built) == (True, False) and again.path == first.path and not idle.calls
    assert build(bundle, recording_tensorrt(version, apis[version]), overwrite=True).built
    first.path.write_bytes(b"")
    assert build(bundle, recording_tensorrt(version, apis[version])).built
    (other,) = build_engines(
        bundle, EngineOptions(), plan(recording_tensorrt(version, apis[version]), BatchRange(1, 1, 4))
    )
    assert other.built and other.path != first.path


def test_build_from_a_zip_writes_to_the_cache(bundle: Bundle, apis: Any, version: str, tmp_path: Path) -> None:
    zipped = open_bundle(pack(bundle, tmp_path / "street.spm.zip"))
    library = recording_tensorrt(version, apis[version])
    result = build(zipped, library)
    assert result.path.is_relative_to(tmp_path / "cache")
    assert called(library, "OnnxParser.parse_from_file") == [("OnnxParser.parse_from_file", "edit.fp16.onnx")]
    host = EngineHost.with_gpu(Gpu("Orin", "8.7"), {"tensorrt": version})
    assert [found.fit for found in find_engines(zipped, host)] == [True]


def test_build_with_external_data_has_it_next_to_the_graph(apis: Any, version: str, tmp_path: Path) -> None:
    bundle = with_weights_beside(tmp_path / "beside.spm")
    beside: list[bool] = []
    for source in (bundle, open_bundle(pack(bundle, tmp_path / "street.spm.zip"))):
        library = recording_tensorrt(version, apis[version])
        parse = library.OnnxParser.parse_from_file

        def parse_beside(self: Any, path: str, parse: Any = parse) -> bool:
            beside.append(Path(path).with_name("shared.weights").read_bytes() == WEIGHTS)
            return bool(parse(self, path))

        library.OnnxParser.parse_from_file = parse_beside
        record = build(source, library, overwrite=True).record
        assert record.weights == SourceFile("graphs/shared.weights", hashlib.sha256(WEIGHTS).hexdigest())
        assert record.key != replace(record, weights=None).key
    assert beside == [True, True]


def test_timing_cache_is_kept_by_version_and_gpu(bundle: Bundle, apis: Any, tmp_path: Path) -> None:
    folder = tmp_path / "timing"
    for version in VERSIONS:
        library = recording_tensorrt(version, apis[version])
        assert not build(bundle, library, timing_cache=folder).record.timing_cache
        assert called(library, "IBuilderConfig.set_timing_cache") == [("IBuilderConfig.set_timing_cache", b"", False)]
    files = sorted(file.name for file in folder.iterdir())
    assert files == [f"tensorrt-{version}-orin-8.7.timing" for version in sorted(VERSIONS)]
    library = recording_tensorrt("10.3", apis["10.3"])
    assert build(bundle, library, timing_cache=folder, overwrite=True).record.timing_cache
    assert called(library, "IBuilderConfig.set_timing_cache") == [("IBuilderConfig.set_timing_cache", b"+", False)]
    assert (folder / files[1]).read_bytes() == b"++" or (folder / files[0]).read_bytes() == b"++"


def test_timing_cache_refused_is_started_again(bundle: Bundle, apis: Any, version: str, tmp_path: Path) -> None:
    file = tmp_path / f"tensorrt-{version}-orin-8.7.timing"
    file.write_bytes(b"of another driver")
    library = recording_tensorrt(version, apis[version], Behavior(takes_cache=False))
    assert not build(bundle, library, timing_cache=tmp_path).record.timing_cache
    assert file.read_bytes() == b"+"


def test_timing_cache_in_a_file_is_an_input_error(bundle: Bundle, apis: Any, version: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be used for timing caches"):
        build(bundle, recording_tensorrt(version, apis[version]), timing_cache=tmp_path / "file")
    assert left(bundle) == []


def test_build_of_a_typed_graph_failed_falls_back_to_weak_typing(bundle: Bundle, apis: Any) -> None:
    library = recording_tensorrt("10.3", apis["10.3"], Behavior(typed_builds=False, messages=[("ERROR", "no types")]))
    reports: list[str] = []
    (result,) = build_engines(bundle, EngineOptions(), plan(library), lambda status, seconds: reports.append(status))
    assert called(library, "Builder.create_network") == [
        ("Builder.create_network", 1 << library.NetworkDefinitionCreationFlag["STRONGLY_TYPED"]),
        ("Builder.create_network", 0),
    ]
    assert [file for _, file in called(library, "OnnxParser.parse_from_file")] == ["edit.fp16.onnx", "edit.fp32.onnx"]
    assert called(library, "IBuilderConfig.set_flag") == [("IBuilderConfig.set_flag", "FP16")]
    record = result.record
    assert (record.precision, record.strongly_typed, record.flags) == ("fp16", False, ("FP16",))
    assert record.fallback is not None and "no types" in record.fallback and "10.3" in record.fallback
    assert any(str(record.fallback) in status for status in reports)  # the fallback is reported
    assert record.onnx.file == "graphs/edit.fp32.onnx" and record.engine.file == "edit.fp16.engine"
    assert (record.computes_in.fp16_share, record.computes_in.network_fp16_share) == (1.0, 0.0)
    host = EngineHost.with_gpu(Gpu("Orin", "8.7"), {"tensorrt": "10.3"})
    assert [found.fit for found in find_engines(bundle, host)] == [True]


@pytest.mark.parametrize(
    ("behavior", "message"),
    [
        (Behavior(typed_builds=False, chooses="Float"), "FP16 was requested, but only 0% FP16 in the engine"),
        (Behavior(typed_builds=False, inspected=lambda kind: inspector_json("10.3", None)), "not in which type"),
        (Behavior(typed_builds=False, inspected=lambda kind: "no JSON"), "is not JSON"),
    ],
)
def test_build_that_computes_in_fp32_is_a_verification_error(
    bundle: Bundle, apis: Any, behavior: Behavior, message: str
) -> None:
    library = recording_tensorrt("10.3", apis["10.3"], replace(behavior, messages=[("INFO", "hello")]))
    with pytest.raises(VerificationError, match=message) as caught:
        build(bundle, library)
    assert caught.value.exit_code == 5
    assert left(bundle) == ["edit.fp16.failed.log"]


def test_build_strongly_typed_with_another_precision_is_an_error(bundle: Bundle, apis: Any, version: str) -> None:
    for precision, came_out in (("fp16", "Float"), ("fp32", "Half")):
        behavior = Behavior(inspected=lambda kind, came_out=came_out: inspector_json(version, came_out))
        library = recording_tensorrt(version, apis[version], behavior)
        with pytest.raises(VerificationError, match=f"{precision.upper()} was requested"):
            build(bundle, library, precision=precision)


def test_build_without_a_weak_fallback_fails(bundle: Bundle, apis: Any) -> None:
    for version, precision in (("11.4", "fp16"), ("10.3", "fp32"), ("10.16", "fp32")):
        library = recording_tensorrt(version, apis[version], Behavior(typed_builds=False))
        with pytest.raises(UnavailableError):
            build(bundle, library, precision=precision)
        assert len(called(library, "Builder.create_network")) == 1


def test_build_failed_has_the_librarys_errors(bundle: Bundle, apis: Any, version: str) -> None:
    messages = [("VERBOSE", "noise"), ("INFO", "hello"), ("WARNING", "slow\npath"), ("ERROR", "no such\n kernel")]
    good = build(bundle, recording_tensorrt(version, apis[version], Behavior(messages=messages)))
    assert good.warnings == 1
    log = good.path.with_name("build.log").read_text()
    assert "[INFO] hello" in log and "[WARNING] slow" in log and "noise" not in log
    bad = recording_tensorrt(version, apis[version], Behavior(builds=False, messages=messages))
    with pytest.raises(UnavailableError, match=r"cannot build from edit\.fp32\.onnx: no such kernel") as caught:
        build(bundle, bad, precision="fp32")
    failed = bundle.path / ENGINES / "edit.fp32.failed.log"
    assert str(failed) in str(caught.value.hint) and "no such" in failed.read_text()


FAILURES: list[tuple[Behavior, type[SpmDeployError], str]] = [
    (Behavior(builds=False), UnavailableError, "no reason given"),
    (Behavior(parses=False), BundleError, r"kernel is of the wrong size at the node enc1/Conv \(Conv\)"),
    (Behavior(starts=False), UnavailableError, "does not start: CUDA initialization failure"),
    (Behavior(profile_index=-1), UnavailableError, "batch sizes 1 to 8, best at 2 are refused"),
    (
        Behavior(builds=False, messages=[("ERROR", "Cuda Runtime (out of memory)")]),
        OutOfMemoryError,
        "ran out of memory building from edit",
    ),
]


@pytest.mark.parametrize(("behavior", "kind", "message"), FAILURES, ids=[message[:12] for _, _, message in FAILURES])
def test_build_failed_raises_the_error_of_its_cause(
    bundle: Bundle, apis: Any, version: str, behavior: Behavior, kind: type[SpmDeployError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        build(bundle, recording_tensorrt(version, apis[version], behavior), precision="fp32")
    assert caught.value.hint
    assert [name for name in left(bundle) if not name.endswith(".failed.log")] == []


def test_build_of_an_engine_that_does_not_load_records_why(bundle: Bundle, apis: Any, version: str) -> None:
    reading = build(bundle, recording_tensorrt(version, apis[version], Behavior(loads=False))).record.computes_in
    assert reading.fp16_share is None and reading.network_fp16_share == 1
    assert reading.unread == "the engine cannot be loaded here: no kernel image is available"


def test_build_with_a_failing_inspector_keeps_the_engine(bundle: Bundle, apis: Any, version: str) -> None:
    def fail(kind: str) -> str:
        raise RuntimeError("no inspector")

    reading = build(bundle, recording_tensorrt(version, apis[version], Behavior(inspected=fail))).record.computes_in
    assert reading.fp16_share is None and "RuntimeError('no inspector')" in str(reading.unread)


class Listener:
    """Collects the reports of a build, and interrupts it, as Ctrl-C does, at the report `interrupt`."""

    def __init__(self, interrupt: str = "") -> None:
        self.reports: list[str] = []
        self.interrupt = interrupt
        self.interval = threading.Event()

    def __call__(self, status: str, seconds: float) -> None:
        assert seconds >= 0
        self.reports.append(status)
        if threading.current_thread() is threading.main_thread():
            self.interval.set()
            if status == self.interrupt:
                self.interrupt = ""
                raise KeyboardInterrupt


def test_monitor_of_a_long_build_reports_repeatedly(apis: Any, version: str, tmp_path: Path) -> None:
    listener = Listener()

    def wait_for_interval(monitor: Any) -> None:
        assert listener.interval.wait(60)

    library = recording_tensorrt(version, apis[version], Behavior(during=wait_for_interval))
    assert watched(library, listener, tmp_path) == b'{"fake engine": "Float"}'
    assert listener.reports[:2] == ["Timing tactics", "Timing tactics"]


def test_monitor_without_the_librarys_reports_repeatedly(apis: Any, version: str, tmp_path: Path) -> None:
    listener = Listener()

    def wait_for_interval(monitor: Any) -> None:
        assert monitor is None and listener.interval.wait(60)

    library = recording_tensorrt(version, apis[version], Behavior(during=wait_for_interval))
    del library.IProgressMonitor
    watched(library, listener, tmp_path)
    assert listener.reports[0] == "building"


def test_monitor_interrupted_cancels_at_the_next_step(apis: Any, version: str, tmp_path: Path) -> None:
    listener = Listener(interrupt="Timing tactics")
    library = recording_tensorrt(version, apis[version], Behavior(during=until_canceled, builds=False))
    with pytest.raises(KeyboardInterrupt):
        watched(library, listener, tmp_path)
    assert listener.reports[-1] == "canceling at the next step"


def test_monitor_interrupted_twice_does_not_wait(apis: Any, version: str, tmp_path: Path) -> None:
    release = threading.Event()
    listener = Listener(interrupt="Timing tactics")
    canceling: list[str] = []

    def interrupt_twice(status: str, seconds: float) -> None:
        if status == "canceling at the next step":
            canceling.append(status)
            listener.interrupt = "Timing tactics"
            return
        listener(status, seconds)

    library = recording_tensorrt(version, apis[version], Behavior(during=lambda monitor: release.wait(60)))
    with pytest.raises(KeyboardInterrupt):
        watched(library, interrupt_twice, tmp_path)
    assert canceling
    release.set()


def until_canceled(monitor: Any) -> None:
    while monitor.step_complete("Timing tactics", 0):
        pass


def watched(library: Any, report: Callable[[str, float], None], folder: Path) -> bytes:
    from spmdeploy.engines.builder import BuildLog, BuildRequest, build_engine

    graph = folder / "edit.fp32.onnx"
    graph.write_bytes(b"graph")
    log = BuildLog(folder / "build.log", folder / "failed.log")
    request = BuildRequest(graph, (BatchRange(1, 1, 1),))
    return build_engine(library, request, log, BuildMonitor(report, interval=0.01)).content


@pytest.mark.parametrize(
    ("layers", "share"),
    [
        ([{"Weights": {"Type": "Half"}}, {"Weights": {"Type": "Float"}}], 0.5),
        ([{"Weights": {"Type": "Half"}, "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}], 1.0),
        ([{"Outputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]}], 1.0),
        ([{"Outputs": [{"Format/Datatype": "Row major linear FP32"}]}, {"Outputs": []}], 0.0),
        ([{"Outputs": [{"DataType": "Half"}]}, {"Outputs": [{"DataType": "Float"}]}, "a name"], 0.5),
        ([{"Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}], None),
        ([{"LayerType": "Reformat", "Outputs": [{"DataType": "Float"}]}], None),
        ([{"Outputs": [{"DataType": "BFloat16"}, {"DataType": "Int64"}]}], None),
        (["only", "names"], None),
        ([], None),
    ],
)
def test_inspected_fp16_share_of_layers_is_their_share(layers: list[Any], share: float | None) -> None:
    read, unread = inspected_fp16_share(json.dumps({"Layers": layers}))
    assert read == share and (unread is None) == (share is not None)


@pytest.mark.parametrize("text", ["", "[]", "[1", '"text"', "null", '{"Layers": []}'])
def test_inspected_fp16_share_of_other_text_is_unknown(text: str) -> None:
    share, unread = inspected_fp16_share(text)
    assert share is None and unread


PACKAGE = Path(to_engine.__file__).parents[1]
SOURCES = (
    *("engines/build.py", "engines/builder.py", "engines/precision.py", "engines/progress.py", "engines/library.py"),
)
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
    "tensor": "ITensor",
    "cache": "ITimingCache",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "runtime": "Runtime",
}
"""Library class of each variable, in the files that use the library through them."""
USERS_OF_OBJECTS = ("engines/builder.py", "engines/precision.py")
VALUES = {"serialized", "name"}
"""Variables that hold a plain value from the library."""

NOT_EVERYWHERE = {
    "BuilderFlag.FP16": "TensorRT 10 only; behind hasattr in build.py",
    "BuilderFlag.REQUIRE_USER_ALLOCATION": "TensorRT-RTX only; behind hasattr",
    "ComputeCapability": "TensorRT-RTX alone; used with targets, which TensorRT refuses",
    "ComputeCapability.__members__": "the same",
    "IBuilderConfig.num_compute_capabilities": "the same",
    "IBuilderConfig.set_compute_capability": "the same",
}


def used_members(source: str) -> Iterator[str]:
    """Yield Class.member, or Class alone, for every use of the library in a file."""
    tree = ast.parse((PACKAGE / source).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if is_library(node.value) and not node.attr.startswith("__"):
            yield node.attr
        if isinstance(node.value, ast.Attribute) and is_library(node.value.value):
            yield f"{node.value.attr}.{node.attr}"
        if source in USERS_OF_OBJECTS and isinstance(node.value, ast.Name) and node.value.id in OBJECTS:
            yield f"{OBJECTS[node.value.id]}.{node.attr}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            target, name = node.args
            assert isinstance(name, ast.Constant)
            yield f"{target.attr}.{name.value}" if isinstance(target, ast.Attribute) else str(name.value)


def is_library(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "library") or (
        isinstance(node, ast.Attribute) and node.attr == "library"
    )


def exists(member: str, api: dict[str, list[str]]) -> bool:
    name, _, attribute = member.partition(".")
    return name in api and (attribute in ("", "__members__", "__name__", "__init__") or attribute in api[name])


def test_attributes_used_exist_in_all_versions(apis: Any) -> None:
    members = {member for source in SOURCES for member in used_members(source)}
    assert {"Builder", "BuilderFlag.TF32", "OnnxParser.parse_from_file", "EngineInspector.execution_context"} <= members
    missing = {(member, version) for member in members for version in VERSIONS if not exists(member, apis[version])}
    assert {member for member, _ in missing} == NOT_EVERYWHERE.keys() & members
    assert NOT_EVERYWHERE.keys() <= members | {"ComputeCapability.__members__"}  # no exception is obsolete


def test_attributes_used_exist_in_tensorrt_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    for member in {member for source in SOURCES for member in used_members(source)} - {"BuilderFlag.FP16"}:
        owner, _, attribute = member.partition(".")
        assert hasattr(rtx, owner), member
        assert not attribute or hasattr(getattr(rtx, owner), attribute), member


@pytest.mark.parametrize("source", USERS_OF_OBJECTS)
def test_attributes_used_belong_to_known_variables(source: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / source).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        function = node.value.func
        if not isinstance(function, ast.Attribute):
            continue
        holder = function.value
        if is_library(holder) or (isinstance(holder, ast.Name) and holder.id in OBJECTS):
            for target in node.targets:
                assert isinstance(target, ast.Name) and target.id in OBJECTS.keys() | VALUES, ast.unparse(node)


def test_attributes_removed_are_missing_somewhere(apis: Any) -> None:
    for member in ("BuilderFlag.INT8", "Builder.platform_has_fast_fp16", "NoSuchClass", "ILayer.precision"):
        assert not all(exists(member, api) for api in apis.values()), member
