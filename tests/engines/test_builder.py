"""What is asked of TensorRT 10.3, 10.16 and 11.4, in which order, and what becomes of their answers."""

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
from spmdeploy.engines.build import EngineOptions, EnginePlan, EngineResult, build_engines
from spmdeploy.engines.pack import pack
from spmdeploy.engines.precision import inspected_fp16_share
from spmdeploy.engines.progress import BuildMonitor
from spmdeploy.engines.record import BatchRange, EngineHost, Gpu, SourceFile
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


def plan(library: Any, batch: BatchRange = BatchRange(1, 2, 8)) -> EnginePlan:  # noqa: B008 (it is frozen)
    return EnginePlan("tensorrt", library, GPU, (), batch, "for a test")


def build(bundle: Bundle, library: Any, **options: Any) -> EngineResult:
    (result,) = build_engines(bundle, EngineOptions(graph="edit", **options), plan(library))
    return result


def called(library: Any, *members: str) -> list[tuple[Any, ...]]:
    return [(name, *arguments) for name, arguments in library.calls if not members or name in members]


def left(bundle: Bundle) -> list[str]:
    return sorted(file.name for file in (bundle.path / ENGINES).iterdir())


# ------------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_what_is_called_in_which_order(bundle: Bundle, apis: Any, version: str, precision: Any) -> None:
    library = recording_tensorrt(version, apis[version])
    result = build(bundle, library, precision=precision)
    strongly = 1 << library.NetworkDefinitionCreationFlag["STRONGLY_TYPED"]
    maps = [(size, 256, 256) for size in (1, 2, 8)]
    pictures = [(*shape, 3) for shape in maps]
    assert called(library)[:12] == [
        ("Builder.create_network", strongly),
        ("OnnxParser.parse_from_file", f"edit.{precision}.onnx"),
        ("IOptimizationProfile.set_shape", "image", *pictures),
        ("IOptimizationProfile.set_shape", "labels", *maps),
        ("IOptimizationProfile.set_shape", "instances", *maps),
        ("IOptimizationProfile.set_shape", "mask", *maps),
        ("IBuilderConfig.add_optimization_profile",),
        ("IBuilderConfig.clear_flag", "TF32"),
        ("IBuilderConfig.profiling_verbosity", library.ProfilingVerbosity.DETAILED),
        ("IBuilderConfig.progress_monitor", library.calls[9][1][0]),
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


def test_the_engine_file_is_nothing_but_the_engine(bundle: Bundle, apis: Any, version: str) -> None:
    result = build(bundle, recording_tensorrt(version, apis[version]))
    assert result.path.read_bytes() == b'{"fake engine": "Half"}' and result.path.name == "edit.fp16.engine"
    host = EngineHost.with_gpu(Gpu("Orin", "8.7"), {"tensorrt": version})
    (found,) = find_engines(bundle, host)
    assert found.fit and found.record == result.record and found.path == result.path


def test_options_reach_the_builder(bundle: Bundle, apis: Any, version: str) -> None:
    library = recording_tensorrt(version, apis[version])
    build(bundle, library, workspace_mb=512)
    assert called(library, "IBuilderConfig.set_memory_pool_limit") == [
        ("IBuilderConfig.set_memory_pool_limit", "WORKSPACE", 512 << 20)
    ]


def test_an_engine_that_is_there_is_not_built_again(bundle: Bundle, apis: Any, version: str) -> None:
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


def test_a_zip_is_read_from_a_private_folder_and_its_engines_go_into_the_cache(
    bundle: Bundle, apis: Any, version: str, tmp_path: Path
) -> None:
    zipped = open_bundle(pack(bundle, tmp_path / "street.spm.zip"))
    library = recording_tensorrt(version, apis[version])
    result = build(zipped, library)
    assert result.path.is_relative_to(tmp_path / "cache")
    assert called(library, "OnnxParser.parse_from_file") == [("OnnxParser.parse_from_file", "edit.fp16.onnx")]
    host = EngineHost.with_gpu(Gpu("Orin", "8.7"), {"tensorrt": version})
    assert [found.fit for found in find_engines(zipped, host)] == [True]


def test_weights_in_a_file_of_their_own_lie_beside_the_graph_and_count(apis: Any, version: str, tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------------------------------- timing cache


def test_timing_caches_are_kept_for_each_version_and_gpu(bundle: Bundle, apis: Any, tmp_path: Path) -> None:
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


def test_a_timing_cache_that_is_refused_starts_anew(bundle: Bundle, apis: Any, version: str, tmp_path: Path) -> None:
    file = tmp_path / f"tensorrt-{version}-orin-8.7.timing"
    file.write_bytes(b"of another driver")
    library = recording_tensorrt(version, apis[version], Behavior(takes_cache=False))
    assert not build(bundle, library, timing_cache=tmp_path).record.timing_cache
    assert file.read_bytes() == b"+"


def test_a_timing_cache_that_is_no_folder(bundle: Bundle, apis: Any, version: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be used for timing caches"):
        build(bundle, recording_tensorrt(version, apis[version]), timing_cache=tmp_path / "file")
    assert left(bundle) == []


# ---------------------------------------------------------------------------------------- the fallback of TensorRT 10


def test_where_the_typed_graph_does_not_build_tensorrt_10_may_choose(bundle: Bundle, apis: Any) -> None:
    library = recording_tensorrt("10.3", apis["10.3"], Behavior(typed_builds=False, messages=[("ERROR", "no types")]))
    heard: list[str] = []
    (result,) = build_engines(bundle, EngineOptions(), plan(library), lambda words, seconds: heard.append(words))
    assert called(library, "Builder.create_network") == [
        ("Builder.create_network", 1 << library.NetworkDefinitionCreationFlag["STRONGLY_TYPED"]),
        ("Builder.create_network", 0),
    ]
    assert [file for _, file in called(library, "OnnxParser.parse_from_file")] == ["edit.fp16.onnx", "edit.fp32.onnx"]
    assert called(library, "IBuilderConfig.set_flag") == [("IBuilderConfig.set_flag", "FP16")]
    record = result.record
    assert (record.precision, record.strongly_typed, record.flags) == ("fp16", False, ("FP16",))
    assert record.fallback is not None and "no types" in record.fallback and "10.3" in record.fallback
    assert any(str(record.fallback) in words for words in heard)  # nothing silent
    assert record.onnx.file == "graphs/edit.fp32.onnx" and record.engine.file == "edit.fp16.engine"
    assert (record.computes_in.fp16_share, record.computes_in.network_fp16_share) == (1.0, 0.0)
    host = EngineHost.with_gpu(Gpu("Orin", "8.7"), {"tensorrt": "10.3"})
    assert [found.fit for found in find_engines(bundle, host)] == [True]


@pytest.mark.parametrize(
    ("behavior", "words"),
    [
        (Behavior(typed_builds=False, chooses="Float"), "asked for FP16, but only 0% FP16 in the engine"),
        (Behavior(typed_builds=False, inspected=lambda kind: inspector_json("10.3", None)), "of none the type"),
        (Behavior(typed_builds=False, inspected=lambda kind: "no JSON"), "is not JSON"),
    ],
)
def test_fp32_under_the_name_of_fp16_is_an_error(bundle: Bundle, apis: Any, behavior: Behavior, words: str) -> None:
    library = recording_tensorrt("10.3", apis["10.3"], replace(behavior, messages=[("INFO", "hello")]))
    with pytest.raises(VerificationError, match=words) as caught:
        build(bundle, library)
    assert caught.value.exit_code == 5
    assert left(bundle) == ["edit.fp16.failed.log"]


def test_strongly_typed_engines_are_judged_too(bundle: Bundle, apis: Any, version: str) -> None:
    for precision, came_out in (("fp16", "Float"), ("fp32", "Half")):
        behavior = Behavior(inspected=lambda kind, came_out=came_out: inspector_json(version, came_out))
        library = recording_tensorrt(version, apis[version], behavior)
        with pytest.raises(VerificationError, match=f"asked for {precision.upper()}"):
            build(bundle, library, precision=precision)


def test_there_is_no_fallback_where_it_would_change_what_was_asked_for(bundle: Bundle, apis: Any) -> None:
    for version, precision in (("11.4", "fp16"), ("10.3", "fp32"), ("10.16", "fp32")):
        library = recording_tensorrt(version, apis[version], Behavior(typed_builds=False))
        with pytest.raises(UnavailableError):
            build(bundle, library, precision=precision)
        assert len(called(library, "Builder.create_network")) == 1


# ------------------------------------------------------------------------------------------------------------ failures


def test_messages_go_into_the_log_and_errors_into_the_error(bundle: Bundle, apis: Any, version: str) -> None:
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


@pytest.mark.parametrize(("behavior", "kind", "words"), FAILURES, ids=[words[:12] for _, _, words in FAILURES])
def test_failures_are_translated(
    bundle: Bundle, apis: Any, version: str, behavior: Behavior, kind: type[SpmDeployError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        build(bundle, recording_tensorrt(version, apis[version], behavior), precision="fp32")
    assert caught.value.hint
    assert [name for name in left(bundle) if not name.endswith(".failed.log")] == []


def test_an_engine_that_cannot_be_loaded_is_recorded_with_the_reason(bundle: Bundle, apis: Any, version: str) -> None:
    reading = build(bundle, recording_tensorrt(version, apis[version], Behavior(loads=False))).record.computes_in
    assert reading.fp16_share is None and reading.network_fp16_share == 1
    assert reading.unread == "the engine cannot be loaded here: no kernel image is available"


def test_an_inspector_that_fails_costs_no_engine(bundle: Bundle, apis: Any, version: str) -> None:
    def fail(kind: str) -> str:
        raise RuntimeError("no inspector")

    reading = build(bundle, recording_tensorrt(version, apis[version], Behavior(inspected=fail))).record.computes_in
    assert reading.fp16_share is None and "RuntimeError('no inspector')" in str(reading.unread)


# ------------------------------------------------------------------------------------------------ watching, cancelling


class Listener:
    """Hears what a build says; interrupts it, as Ctrl-C does, when it hears `interrupt`."""

    def __init__(self, interrupt: str = "") -> None:
        self.heard: list[str] = []
        self.interrupt = interrupt
        self.heartbeat = threading.Event()

    def __call__(self, words: str, seconds: float) -> None:
        assert seconds >= 0
        self.heard.append(words)
        if threading.current_thread() is threading.main_thread():
            self.heartbeat.set()
            if words == self.interrupt:
                self.interrupt = ""
                raise KeyboardInterrupt


def test_phases_and_heartbeats_are_told(apis: Any, version: str, tmp_path: Path) -> None:
    listener = Listener()

    def wait_for_heartbeat(monitor: Any) -> None:
        assert listener.heartbeat.wait(60)

    library = recording_tensorrt(version, apis[version], Behavior(during=wait_for_heartbeat))
    assert watched(library, listener, tmp_path) == b'{"fake engine": "Float"}'
    assert listener.heard[:2] == ["Timing tactics", "Timing tactics"]


def test_without_a_monitor_there_is_the_heartbeat(apis: Any, version: str, tmp_path: Path) -> None:
    listener = Listener()

    def wait_for_heartbeat(monitor: Any) -> None:
        assert monitor is None and listener.heartbeat.wait(60)

    library = recording_tensorrt(version, apis[version], Behavior(during=wait_for_heartbeat))
    del library.IProgressMonitor
    watched(library, listener, tmp_path)
    assert listener.heard[0] == "building"


def test_an_interrupt_cancels_the_build_at_its_next_step(apis: Any, version: str, tmp_path: Path) -> None:
    listener = Listener(interrupt="Timing tactics")
    library = recording_tensorrt(version, apis[version], Behavior(during=until_cancelled, builds=False))
    with pytest.raises(KeyboardInterrupt):
        watched(library, listener, tmp_path)
    assert listener.heard[-1] == "cancelling at the next step"


def test_a_second_interrupt_does_not_wait(apis: Any, version: str, tmp_path: Path) -> None:
    release = threading.Event()
    listener = Listener(interrupt="Timing tactics")
    cancelling: list[str] = []

    def interrupt_twice(words: str, seconds: float) -> None:
        if words == "cancelling at the next step":
            cancelling.append(words)
            listener.interrupt = "Timing tactics"
            return
        listener(words, seconds)

    library = recording_tensorrt(version, apis[version], Behavior(during=lambda monitor: release.wait(60)))
    with pytest.raises(KeyboardInterrupt):
        watched(library, interrupt_twice, tmp_path)
    assert cancelling
    release.set()


def until_cancelled(monitor: Any) -> None:
    while monitor.step_complete("Timing tactics", 0):
        pass


def watched(library: Any, tell: Callable[[str, float], None], folder: Path) -> bytes:
    from spmdeploy.engines.builder import BuildLog, BuildRequest, build_engine

    graph = folder / "edit.fp32.onnx"
    graph.write_bytes(b"graph")
    log = BuildLog(folder / "build.log", folder / "failed.log")
    watch = BuildMonitor(tell, heartbeat=0.01)
    return build_engine(library, BuildRequest(graph, BatchRange(1, 1, 1)), log, watch).content


# ---------------------------------------------------------------------------------------------------- the inspector


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
def test_reading_the_inspectors_answer(layers: list[Any], share: float | None) -> None:
    read, unread = inspected_fp16_share(json.dumps({"Layers": layers}))
    assert read == share and (unread is None) == (share is not None)


@pytest.mark.parametrize("text", ["", "[]", "[1", '"text"', "null", '{"Layers": []}'])
def test_an_inspector_that_says_nothing_of_use(text: str) -> None:
    share, unread = inspected_fp16_share(text)
    assert share is None and unread


# ---------------------------------------------------------------------------------------------- attributes of the API

PACKAGE = Path(to_engine.__file__).parents[1]
SOURCES = (
    *("engines/build.py", "engines/builder.py", "engines/precision.py", "engines/progress.py", "engines/library.py"),
)
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "fault": "ParserError",
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
"""What these variables hold, in the files that talk to the library through them."""
TALKERS = ("engines/builder.py", "engines/precision.py")
VALUES = {"serialized", "name"}
"""Variables that hold a plain value from the library."""

NOT_EVERYWHERE = {
    "BuilderFlag.FP16": "TensorRT 10 alone; behind hasattr in to_engine.py",
    "BuilderFlag.REQUIRE_USER_ALLOCATION": "TensorRT-RTX alone; behind hasattr",
    "ComputeCapability": "TensorRT-RTX alone; used with targets, which TensorRT refuses",
    "ComputeCapability.__members__": "the same",
    "IBuilderConfig.num_compute_capabilities": "the same",
    "IBuilderConfig.set_compute_capability": "the same",
}


def touched(source: str) -> Iterator[str]:
    """Class.member, or Class alone, of everything of the library that a file mentions."""
    tree = ast.parse((PACKAGE / source).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if is_library(node.value) and not node.attr.startswith("__"):
            yield node.attr
        if isinstance(node.value, ast.Attribute) and is_library(node.value.value):
            yield f"{node.value.attr}.{node.attr}"
        if source in TALKERS and isinstance(node.value, ast.Name) and node.value.id in OBJECTS:
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


def test_every_attribute_that_is_touched_exists_in_all_versions(apis: Any) -> None:
    members = {member for source in SOURCES for member in touched(source)}
    assert {"Builder", "BuilderFlag.TF32", "OnnxParser.parse_from_file", "EngineInspector.execution_context"} <= members
    missing = {(member, version) for member in members for version in VERSIONS if not exists(member, apis[version])}
    assert {member for member, _ in missing} == NOT_EVERYWHERE.keys() & members
    assert NOT_EVERYWHERE.keys() <= members | {"ComputeCapability.__members__"}  # no excuse outlives its reason


def test_every_attribute_exists_in_tensorrt_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    for member in {member for source in SOURCES for member in touched(source)} - {"BuilderFlag.FP16"}:
        owner, _, attribute = member.partition(".")
        assert hasattr(rtx, owner), member
        assert not attribute or hasattr(getattr(rtx, owner), attribute), member


@pytest.mark.parametrize("source", TALKERS)
def test_what_the_library_gives_is_held_under_names_that_are_checked(source: str) -> None:
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


def test_a_wrong_attribute_would_be_found(apis: Any) -> None:
    for member in ("BuilderFlag.INT8", "Builder.platform_has_fast_fp16", "NoSuchClass", "ILayer.precision"):
        assert not all(exists(member, api) for api in apis.values()), member
