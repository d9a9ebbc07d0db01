"""Engines built by the real TensorRT-RTX without a GPU. Running them needs a GPU and is not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from spmdeploy import cli
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.bundle.storage import GOLDEN_IMAGES
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines import library as engine_library
from spmdeploy.engines import plan as engine_plan
from spmdeploy.engines.build import build_engines
from spmdeploy.engines.builder import BuildLog, BuildRequest, BuiltEngine, build_engine
from spmdeploy.engines.plan import EngineOptions, plan_engines
from spmdeploy.engines.progress import BuildMonitor
from spmdeploy.engines.record import BatchRange, EngineHost, EngineRecord, Gpu, Port
from spmdeploy.engines.store import StoredEngine, find_engines
from spmdeploy.errors import BundleError, UnavailableError
from tests.bundle.conftest import graph_record, manifest_of

RTX_3060, H100 = Gpu("NVIDIA GeForce RTX 3060", "8.6"), Gpu("NVIDIA H100", "9.0")

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: engines cannot be built here")
pytestmark = pytest.mark.xdist_group("engines")  # one process: what is exported and built here takes a while


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> Iterator[None]:
    """As in a CI job, also where the tests run on a machine with a GPU."""

    def fail(device: int = 0) -> None:
        raise OSError("no NVIDIA driver")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_plan, "gpu_facts", fail)
        patch.setattr(engine_library, "gpu_facts", fail)
        yield


@pytest.fixture(scope="module")
def golden_model(street_bundle: Path) -> onnx.ModelProto:
    """The FP32 graph of a very small generator."""
    return onnx.load(street_bundle / "graphs/edit.fp32.onnx")


@pytest.fixture(scope="module")
def golden_bundle(street_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of two exported graphs; its golden edits are placeholders, as no engine runs here."""
    records = []
    with BundleWriter(tmp_path_factory.mktemp("golden") / "golden.spm") as writer:
        for precision in ("fp32", "fp16"):
            name = f"graphs/edit.{precision}.onnx"
            onnx.save(onnx.load(street_bundle / name), writer.path(name))
            records.append(graph_record(precision, *writer.measure(name)))
        for image in GOLDEN_IMAGES:
            writer.add_bytes(f"golden/tree/{image}", b"")
        return writer.finish(manifest_of(tuple(records)))


@pytest.fixture(scope="module")
def golden_engines(golden_bundle: Bundle) -> dict[str, StoredEngine]:
    reports: list[str] = []
    for precision in ("fp16", "fp32"):
        options = EngineOptions(precision=precision, targets=("sm86", "sm120"), opt_batch=2)  # type: ignore[arg-type]
        (result,) = build_engines(golden_bundle, options, report=lambda status, seconds: reports.append(status))
        assert result.built and result.warnings == 0
    assert any("Building engine from subgraph" in status for status in reports)
    host = EngineHost.with_gpu(RTX_3060, {"tensorrt-rtx": rtx.__version__})
    return {engine.require_compatible().precision: engine for engine in find_engines(golden_bundle, host)}


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_real_engine_built_has_a_record(
    golden_bundle: Bundle, golden_engines: dict[str, StoredEngine], precision: Any
) -> None:
    engine = golden_engines[precision]
    record = engine.require_compatible()
    content = engine.read()
    assert (record.runtime, record.version, record.gpu) == ("tensorrt-rtx", rtx.__version__, None)
    assert (record.targets, record.batch) == (("sm86", "sm120"), BatchRange(1, 2, 8))
    assert record.flags == ("REQUIRE_USER_ALLOCATION",)  # a CUDA graph can be captured from it
    assert record.onnx.sha256 == golden_bundle.graph("edit", precision).sha256
    assert record.engine.bytes == len(content) > 1_000_000 and record.build_seconds > 0
    assert content[4:8] == bytes(4) and content[:4].isalpha()  # the library's own start, nothing put in front
    reading = record.computes_in
    assert reading.fp16_share is None and "no GPU here" in str(reading.unread)
    assert (
        reading.network_fp16_share == 0 if precision == "fp32" else 0.6 < reading.network_fp16_share < 0.7
    )  # not norms
    assert (record.builder.driver, record.builder.cuda, record.verification) == (None, None, None)
    assert EngineRecord.from_bytes(record.to_bytes(), "engine.json") == record


def test_real_engine_has_the_ports_of_the_graph(golden_bundle: Bundle, golden_engines: dict[str, StoredEngine]) -> None:
    for precision, engine in golden_engines.items():
        graph = onnx.load(golden_bundle.path / f"graphs/edit.{precision}.onnx", load_external_data=False).graph
        record = engine.require_compatible()
        for ports, values in ((record.inputs, graph.input), (record.outputs, graph.output)):
            assert [port.name for port in ports] == [value.name for value in values]
            for port, value in zip(ports, values, strict=True):
                tensor = value.type.tensor_type
                assert np.dtype(port.dtype) == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
                assert port.shape == tuple(dim.dim_value or -1 for dim in tensor.shape.dim)
        assert record.inputs[0] == Port("image", "uint8", (-1, 256, 256, 3))


@pytest.mark.parametrize(
    ("gpu", "version", "message"),
    [
        (RTX_3060, "1.6.0.10", f"tensorrt-rtx: built with {rtx.__version__}, here 1.6.0.10"),
        (H100, rtx.__version__, r"GPU: built for sm86, sm120, here NVIDIA H100 \(sm90\)"),
        (None, rtx.__version__, "GPU: built for sm86, sm120, here none"),
    ],
)
def test_real_engine_elsewhere_is_refused(
    golden_bundle: Bundle, golden_engines: dict[str, StoredEngine], gpu: Gpu | None, version: str, message: str
) -> None:
    for engine in find_engines(golden_bundle, EngineHost.with_gpu(gpu, {"tensorrt-rtx": version})):
        with pytest.raises(BundleError, match=message):
            engine.read()


def test_bundle_with_engines_is_unchanged(golden_bundle: Bundle, golden_engines: dict[str, StoredEngine]) -> None:
    again = open_bundle(golden_bundle.path)
    assert again.check_all() == () and again.files() == golden_bundle.files()


def test_real_engine_without_a_gpu_does_not_load(golden_engines: dict[str, StoredEngine]) -> None:
    """The recorded reason is the library's message; skipped if the library can load the engine."""
    from spmdeploy.engines.precision import engine_fp16_share
    from spmdeploy.gpu.driver import visible_gpus

    try:
        visible_gpus()
    except OSError:
        share, unread = engine_fp16_share(rtx, golden_engines["fp16"].read(), 1)
        assert share is None and "cannot be loaded here" in str(unread)
    else:
        pytest.skip("there is a driver here")


def test_build_imports_neither_torch_nor_onnx(golden_bundle: Bundle, golden_engines: object, tmp_path: Path) -> None:
    driver = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'safetensors'): sys.modules[name] = None\n"
        "import spmdeploy.cli\n"
        "spmdeploy.cli.entry()"
    )
    args = ["build", str(golden_bundle.path), "--target", "sm86", "--target", "sm120", "--opt-batch", "2", "--json"]
    done = subprocess.run([sys.executable, "-c", driver, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (engine,) = json.loads(done.stdout)["engines"]
    assert not engine["built"] and engine["precision"] == "fp16"


def test_inspect_of_real_engines_lists_them(
    golden_bundle: Bundle, golden_engines: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(golden_bundle.path), "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert [engine["record"]["precision"] for engine in engines] == ["fp16", "fp32"]
    assert all(engine["differences"] == ["GPU: built for sm86, sm120, here none"] for engine in engines)
    assert cli.main(["inspect", str(golden_bundle.path)]) == 0
    result = capsys.readouterr().out
    assert "does not fit: GPU: built for sm86, sm120, here none" in result and "read from the typed network" in result


def test_real_build_interrupted_stops(golden_bundle: Bundle, tmp_path: Path) -> None:
    reports: list[str] = []

    def interrupt(status: str, seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            reports.append(status)
            if len(reports) == 1:
                raise KeyboardInterrupt

    watch = BuildMonitor(interrupt, interval=0.001)
    log = BuildLog(tmp_path / "log", tmp_path / "log")
    graph = golden_bundle.path_of("graphs/edit.fp32.onnx")
    with pytest.raises(KeyboardInterrupt):
        build_engine(rtx, BuildRequest(graph, (BatchRange(1, 1, 1),), ("SM86",)), log, watch)
    assert watch.canceled and "canceled by user" in log.error_summary and reports[1] == "canceling at the next step"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"no graph", BundleError, r"cannot be parsed by tensorrt_rtx .*Failed to parse the ONNX model"),
        (b"", BundleError, "without inputs or outputs"),
    ],
)
def test_real_build_of_another_file_is_refused(
    content: bytes, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        build_file(tmp_path, content)


def test_real_build_of_an_unknown_node_names_it(golden_model: onnx.ModelProto, tmp_path: Path) -> None:
    from spmdeploy.export.cpu import specialize_for_mask

    cpu = specialize_for_mask(golden_model).SerializeToString()  # its shapes depend on the mask
    with pytest.raises(BundleError, match=r"at the node box/rows/first \(ArgMax\)"):
        build_file(tmp_path, cpu)


def test_real_build_for_the_current_gpu_fails_without_one(golden_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot build"):
        build_file(tmp_path, golden_bundle.read("graphs/edit.fp32.onnx"), targets=("CURRENT",))  # there is no GPU


def build_file(folder: Path, content: bytes, targets: tuple[str, ...] = ("SM86",)) -> BuiltEngine:
    graph = folder / "graph.onnx"
    graph.write_bytes(content)
    log = BuildLog(folder / "log", folder / "log")
    request = BuildRequest(graph, (BatchRange(1, 1, 8),), targets)
    return build_engine(rtx, request, log, BuildMonitor(lambda status, seconds: None))


def test_real_library_lists_its_targets(no_gpu: None) -> None:
    for target in ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"):
        assert plan_engines(EngineOptions(targets=(target,))).targets == (target,)


@pytest.fixture(scope="module")
def paper_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuiltEngine]:
    """Engines from the full-size graph with random weights, in both precisions."""
    import torch

    from spmdeploy.export.fp16 import to_fp16
    from spmdeploy.export.onnx import export_edit
    from spmdeploy.model.generator import Generator, GeneratorConfig

    folder = tmp_path_factory.mktemp("paper")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        generator = Generator(GeneratorConfig(34)).requires_grad_(False)  # as it comes from a checkpoint
    fp32 = export_edit(generator)
    engines = {}
    for precision, make in (("fp32", lambda: fp32), ("fp16", lambda: to_fp16(fp32))):
        path = folder / f"{precision}.onnx"
        onnx.save(make(), path)
        log = BuildLog(folder / f"{precision}.log", folder / f"{precision}.log")
        request = BuildRequest(path, (BatchRange(1, 1, 8),), ("SM86", "SM89"))
        engines[precision] = build_engine(rtx, request, log, BuildMonitor(lambda status, seconds: None))
        path.unlink()
        assert not log.errors and not log.warnings
    return engines


@pytest.mark.slow
def test_real_build_of_the_full_size_works_in_both_precisions(paper_engines: dict[str, BuiltEngine]) -> None:
    assert paper_engines["fp32"].network_fp16_share == 0
    assert 0.9 < paper_engines["fp16"].network_fp16_share < 1
    weights = 74.1e6
    assert 4 * weights < len(paper_engines["fp32"].content) < 6 * weights
    assert 2 * weights < len(paper_engines["fp16"].content) < 3 * weights  # stored as halves
