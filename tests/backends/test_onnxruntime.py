"""Sessions on the device that they report, and golden edits that confirm it."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import spmdeploy
from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends import onnxruntime as ort
from spmdeploy.backends import onnxruntime_graph as ort_graph
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.verify import GoldenSample, read_golden, verify
from spmdeploy.bundle.bundle import Bundle, GraphFiles, open_bundle
from spmdeploy.engines.pack import pack
from spmdeploy.errors import BundleError, OutOfMemoryError, UnavailableError, UsageError
from spmdeploy.types import LayoutInput, ModelInput

CUDA = "CUDAExecutionProvider"
SQUARE = ["batch", 256, 256]


class FakeOnnxRuntime:
    """Stands in for the module `onnxruntime`: built with CUDA, and runs on `runs_on` whatever provider is requested."""

    __version__ = "9.9"

    def __init__(self, runs_on: str = "CPUExecutionProvider") -> None:
        self.runs_on = runs_on
        self.fails: Exception | None = None
        self.asked: list[Any] = []
        self.entries: dict[str, str] = {}
        self.RunOptions = lambda: SimpleNamespace(add_run_config_entry=lambda *_: None)
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self.run)

        # What limits the memory of the CPU provider.
        self.OrtAllocatorType = SimpleNamespace(ORT_ARENA_ALLOCATOR=0)
        self.OrtMemType = SimpleNamespace(DEFAULT=0)
        self.OrtMemoryInfo = self.OrtArenaCfg = lambda *_: None
        self.create_and_register_allocator = lambda *_: None

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def SessionOptions(self) -> Any:  # noqa: N802 (ONNX Runtime's name)
        return SimpleNamespace(add_session_config_entry=self.entries.__setitem__)

    def InferenceSession(self, graph: object, options: object, providers: list[Any], **_: Any) -> Any:  # noqa: N802
        self.asked = providers
        if self.fails:
            raise self.fails
        shapes = {"image": [*SQUARE, 3], "labels": SQUARE, "instances": SQUARE, "mask": SQUARE}
        return SimpleNamespace(
            get_providers=lambda: [self.runs_on],
            get_inputs=lambda: [
                SimpleNamespace(name=name, shape=shape, type=ort_graph._INPUTS[name]) for name, shape in shapes.items()
            ],
            get_outputs=lambda: [SimpleNamespace(name="edited", type="tensor(uint8)", shape=[*SQUARE, 3])],
            io_binding=lambda: None,
            run=self.run,
        )

    def run(self, *_: Any) -> list[Any]:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    fake = FakeOnnxRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[arg-type]
    return fake


def edit_on_cuda(bundle: Path, output: Path) -> int:
    sample = SAMPLE_EDITS[0]
    arguments = ["edit", sample.photo, "--labels", sample.labels, "--mask", sample.mask, "--output", output]
    return cli.main([str(argument) for argument in [*arguments, "--model", bundle, "--device", "cuda:0", "--json"]])


def test_session_moved_to_cpu_is_refused(
    street_bundle: Path, library: FakeOnnxRuntime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit_on_cuda(street_bundle, tmp_path / "edited.png") == 4
    printed = json.loads(capsys.readouterr().out)
    assert printed["exit_code"] == 4 and "would run on CPUExecutionProvider" in printed["error"]
    assert [provider for provider, _ in library.asked] == [CUDA]  # the CPU is not even offered
    assert library.entries["session.disable_cpu_ep_fallback"] == "1"
    assert not list(tmp_path.iterdir())


def test_session_failing_gpu_is_refused(
    street_bundle: Path, library: FakeOnnxRuntime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library.fails = RuntimeError("CUDA failure 35: driver version is insufficient")
    assert edit_on_cuda(street_bundle, tmp_path / "edited.png") == 4
    assert "driver version is insufficient" in json.loads(capsys.readouterr().out)["error"]
    library.fails, library.runs_on = None, CUDA
    assert edit_on_cuda(street_bundle, tmp_path / "edited.png") == 8  # it opens, but has no memory to run
    assert "ran out of memory on cuda:0" in json.loads(capsys.readouterr().out)["error"]
    assert not list(tmp_path.iterdir())


def test_session_reports_device_and_provider(street_bundle: Path, library: FakeOnnxRuntime) -> None:
    library.runs_on = CUDA
    opened = open_backend(open_bundle(street_bundle), device="cuda:3")
    session = opened.session
    assert library.asked[0][1]["device_id"] == 3
    assert (session.backend, session.device, session.precision, session.size) == ("onnxruntime", "cuda:3", "fp16", 256)
    assert session.provider == f"{CUDA} (onnxruntime 9.9)"
    assert [choice.split(":")[0] for choice in opened.choices] == ["backend onnxruntime", "precision fp16"]


def test_session_preloads_cuda_silently(library: FakeOnnxRuntime, capsys: pytest.CaptureFixture[str]) -> None:
    loaded: list[str] = []
    library.runs_on = CUDA
    library.preload_dlls = lambda: (loaded.append(library.runs_on), print("Failed to load libcudnn.so.9"))  # type: ignore[attr-defined]
    ort.OnnxRuntimeSession(GraphFiles(b""), "fp16", "cuda:0")
    assert loaded == [CUDA] and capsys.readouterr().out == ""
    library.runs_on = "CPUExecutionProvider"
    ort.OnnxRuntimeSession(GraphFiles(b""), "fp32", "cpu")
    assert loaded == [CUDA]


def test_session_build_without_cuda_is_refused(street_bundle: Path, library: FakeOnnxRuntime) -> None:
    library.get_available_providers = lambda: ["CPUExecutionProvider"]  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="cuda:0 was asked for, but this ONNX Runtime has only CPU"):
        open_backend(open_bundle(street_bundle), device="cuda:0")
    assert ort.best_device() == ("cpu", "this ONNX Runtime is built without CUDA")


@pytest.mark.parametrize(
    ("gpus", "device", "why"),
    [(2, "cuda:0", "first GPU"), (0, "cpu", "shows no GPU"), (OSError("no NVIDIA driver"), "cpu", "no NVIDIA driver")],
    ids=str,
)
def test_auto_device_depends_on_gpus(
    gpus: int | OSError, device: str, why: str, library: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def visible_gpus() -> int:
        if isinstance(gpus, OSError):
            raise gpus
        return gpus

    monkeypatch.setattr("spmdeploy.gpu.driver.visible_gpus", visible_gpus)
    chosen, reason = ort.best_device()
    assert chosen == device and why in reason


def test_auto_failing_gpu_uses_cpu_with_reason(
    street_bundle: Path, library: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spmdeploy.gpu.driver.visible_gpus", lambda: 1)
    bundle = open_bundle(street_bundle)
    opened = open_backend(bundle)  # the fake claims CUDA and runs on the CPU
    assert (opened.session.device, opened.session.precision) == ("cpu", "fp32")
    (notice,) = opened.notices
    assert notice in opened.choices and "cuda:0 was tried first" in notice and "would run on CPU" in notice

    library.runs_on = CUDA
    assert open_backend(bundle).session.device == "cuda:0"

    library.runs_on = "CPUExecutionProvider"
    graphs = tuple(record for record in bundle.manifest.graphs if record.graph == "edit_cpu")
    only = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs))
    assert "device cpu: the bundle holds a graph for CPUs only" in open_backend(only).choices
    with pytest.raises(BundleError, match="no graph 'edit'"):
        open_backend(only, device="cuda:0")


def test_open_backend_without_onnxruntime_names_command(street_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError) as error:
        spmdeploy.open_editor(street_bundle)
    assert 'pip install "spmdeploy[cpu]"' in str(error.value.hint)


def test_open_editor_edits_arrays(street_bundle: Path) -> None:
    with spmdeploy.open_editor(str(street_bundle), device="cpu", precision="fp32") as editor:
        assert isinstance(editor, spmdeploy.Editor)
        photo, labels, mask = SAMPLE_EDITS[1].read(editor.classes)
        result = editor.edit(photo, labels, mask)
    assert np.array_equal(result.image[~mask], photo[~mask]) and not np.array_equal(result.image, photo)
    assert (result.report.backend, result.report.device, result.report.precision) == ("onnxruntime", "cpu", "fp32")
    assert [choice.split(":")[0] for choice in editor.choices] == ["backend onnxruntime"]


def test_import_of_package_loads_nothing_heavy() -> None:
    code = "import sys, spmdeploy; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "spmdeploy" in modules and {"numpy", "PIL", "onnxruntime", "torch", "onnx", "typer"}.isdisjoint(modules)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend": "tensorflow"}, "'tensorflow'"),
        ({"device": "cuda"}, "'cuda'"),
        ({"device": "cuda:-1"}, "'cuda:-1'"),
        ({"device": "cuda:0\n"}, "device"),
        ({"device": "CPU"}, "'CPU'"),
        ({"precision": "int8"}, "'int8'"),
    ],
    ids=str,
)
def test_open_backend_unknown_option_is_refused(options: dict[str, str], text: str, street_bundle: Path) -> None:
    with pytest.raises(UsageError, match=text):
        spmdeploy.open_editor(street_bundle, **options)


def test_open_backend_precision_is_that_of_the_graph(street_bundle: Path) -> None:
    bundle = open_bundle(street_bundle)
    assert open_backend(bundle, device="cpu").session.precision == "fp32"
    assert open_backend(bundle, device="cpu", precision="fp16").session.precision == "fp16"
    halves = tuple(record for record in bundle.manifest.graphs if record.precision == "fp16")
    only = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=halves))
    opened = open_backend(only, device="cpu")
    assert opened.session.precision == "fp16" and "holds no fp32 graph" in opened.choices[-1]
    with pytest.raises(BundleError, match="no graph 'edit' in fp32"):
        open_backend(only, device="cpu", precision="fp32")


def test_run_zip_equals_folder(street_bundle: Path, tmp_path: Path) -> None:
    folder = open_bundle(street_bundle)
    zipped = open_bundle(pack(folder, tmp_path / "tiny.spm.zip"))
    sample = read_golden(folder, folder.manifest.golden[0])
    first, second = (open_backend(bundle, device="cpu").session.run(sample.inputs) for bundle in (folder, zipped))
    assert np.array_equal(first, second)


def coarse_edit(bundle: Bundle) -> tuple[GoldenSample, tuple[ModelInput, NDArray[np.float32]]]:
    """A golden edit, and what refines it."""
    golden = read_golden(bundle, bundle.manifest.golden[0])
    return golden, (golden.inputs, golden.coarse)


def test_refine_equals_torch_and_keeps_known_pixels(street_bundle: Path, tmp_path: Path) -> None:
    folder = open_bundle(street_bundle)
    golden, inputs = coarse_edit(folder)
    assert golden.refined is not None and golden.coarse.shape == (1, 128, 128, 3)
    for bundle in (folder, open_bundle(pack(folder, tmp_path / "tiny.spm.zip"))):
        session = open_backend(bundle, device="cpu").session
        assert session.refines
        refined = session.refine(*inputs)
        assert (refined.dtype, refined.shape) == (np.float32, (1, 256, 256, 3))
        assert np.array_equal(
            refined[golden.inputs.mask == 0], golden.inputs.image[golden.inputs.mask == 0].astype(np.float32)
        )
        assert np.abs(refined - golden.refined)[golden.inputs.mask != 0].max() < 2.5
        assert (refined[golden.inputs.mask != 0] % 1 != 0).any()


def test_run_unrounded_rounds_to_run(street_bundle: Path) -> None:
    bundle = open_bundle(street_bundle)
    _, inputs = coarse_edit(bundle)
    session = open_backend(bundle, device="cpu").session
    unrounded = session.run_unrounded(inputs[0])
    assert np.array_equal(np.rint(unrounded), session.run(inputs[0])) and (unrounded % 1 != 0).any()


def test_refine_graph_is_loaded_at_first_use(street_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Noting(ort_graph.LoadedGraph):
        def __init__(self, content: ort_graph.Graph, graph: str, *others: Any) -> None:
            loaded.append(graph)
            super().__init__(content, graph, *others)

    monkeypatch.setattr(ort, "LoadedGraph", Noting)
    bundle = open_bundle(street_bundle)
    _, inputs = coarse_edit(bundle)
    session = open_backend(bundle, device="cpu").session
    session.run(inputs[0])
    assert loaded == ["edit"]
    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(lambda _: session.refine(*inputs), range(3))
    assert loaded == ["edit", "refine"]
    assert all(np.array_equal(first, other) for other in others)
    session.close()
    session.close()
    for use in (lambda: session.run(inputs[0]), lambda: session.refine(*inputs)):
        with pytest.raises(UnavailableError, match="was closed"):
            use()


def test_refine_without_graph_is_refused(street_bundle: Path) -> None:
    bundle = open_bundle(street_bundle)
    _, inputs = coarse_edit(bundle)
    graphs = tuple(r for r in bundle.manifest.graphs if r.graph[:4] == "edit" or r.precision == "fp16")
    only = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs))
    session = open_backend(only, device="cpu", precision="fp32").session
    assert not session.refines and open_backend(only, device="cpu", precision="fp16").session.refines
    assert len(verify(session, only)) == 3
    with pytest.raises(BundleError, match="no refine graph in fp32 for cpu"):
        session.refine(*inputs)


def test_run_unrounded_without_output_is_refused(tmp_path: Path) -> None:
    session = ort.OnnxRuntimeSession(graph_file(tmp_path / "old.onnx", 64), "fp32")
    maps = np.zeros((1, 64, 64), np.uint8)
    inputs = ModelInput(np.zeros((1, 64, 64, 3), np.uint8), maps, maps.astype(np.int32), maps)
    assert session.run(inputs).shape == (1, 64, 64, 3)
    with pytest.raises(BundleError, match="no unrounded result"):
        session.run_unrounded(inputs)


def graph_file(path: Path, size: object = 256, instances: int = TensorProto.INT32, output: str = "edited") -> Path:
    """A graph that returns its image, with the inputs of the `edit` graph or some that are not."""
    byte = TensorProto.UINT8
    square = ["batch", size, size]
    image = helper.make_tensor_value_info("image", byte, [*square, 3])
    others = [
        helper.make_tensor_value_info(name, kind, square)
        for name, kind in (("labels", byte), ("instances", instances), ("mask", byte))
    ]
    result = helper.make_tensor_value_info(output, byte, [*square, 3])
    node = helper.make_node("Identity", ["image"], [output])
    graph = helper.make_graph([node], "g", [image, *others], [result])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def test_session_other_graph_is_refused(tmp_path: Path) -> None:
    assert ort.OnnxRuntimeSession(graph_file(tmp_path / "good.onnx", 64), "fp32").size == 64
    for changes in ({"size": "free"}, {"instances": TensorProto.INT64}, {"output": "image_out"}):
        with pytest.raises(BundleError, match="no edit graph"):
            ort.OnnxRuntimeSession(graph_file(tmp_path / "bad.onnx", **changes), "fp32")  # type: ignore[arg-type]
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(BundleError, match="refused the graph"):
        ort.OnnxRuntimeSession(tmp_path / "garbage.onnx", "fp32")


def test_cached_graph_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path))
    path = graph_file(tmp_path / "graph.onnx", 64)
    assert ort.OnnxRuntimeSession(lambda: path, "fp32", edit_key="digest").size == 64
    path.unlink()
    assert ort.OnnxRuntimeSession(lambda: path, "fp32", edit_key="digest").size == 64
    with pytest.raises(BundleError, match="refused the graph"):
        ort.OnnxRuntimeSession(lambda: path, "fp32", edit_key="another digest")


def test_onnxruntime_prints_nothing_to_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(BundleError):
        ort.OnnxRuntimeSession(tmp_path / "garbage.onnx", "fp32")
    ort_graph._preload_cuda(SimpleNamespace(preload_dlls=lambda: print("a library is missing")))
    assert capfd.readouterr().out == ""


def test_run_graph_that_asks_for_more_than_the_limit_is_out_of_memory(tmp_path: Path) -> None:
    model = onnx.load(graph_file(tmp_path / "hostile.onnx", 64))
    size = helper.make_tensor("size", TensorProto.INT64, [1], [ort_graph.MAX_MEMORY + 1])
    model.graph.initializer.append(size)
    ones = helper.make_tensor("one", TensorProto.UINT8, [1], [1])
    huge = helper.make_node("ConstantOfShape", ["size"], ["huge"], value=ones)
    maximum = helper.make_node("ReduceMax", ["huge"], ["maximum"], keepdims=0)
    result = helper.make_node("Max", ["image", "maximum"], ["edited"])
    del model.graph.node[:]
    model.graph.node.extend([huge, maximum, result])
    onnx.save(model, tmp_path / "hostile.onnx")
    graph = ort_graph.LoadedGraph(tmp_path / "hostile.onnx", "edit")
    square = np.zeros((1, 64, 64), np.uint8)
    inputs = {"image": np.zeros((1, 64, 64, 3), np.uint8), "labels": square, "instances": square.astype(np.int32)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OutOfMemoryError, match="ran out of memory"):
        graph.run(["edited"], {**inputs, "mask": square})
    plain = graph_file(tmp_path / "plain.onnx", 64)
    with pytest.raises(BundleError, match="the layout graph reads image"):
        ort_graph.CachedLayoutGraphs(tmp_path / "hostile.onnx", plain)
    model.graph.node[-1].input[0] = "labels"
    del model.graph.input[0]
    onnx.save(model, tmp_path / "hostile.onnx")
    parts = ort_graph.CachedLayoutGraphs(tmp_path / "hostile.onnx", plain)
    with pytest.raises(OutOfMemoryError, match="ran out of memory"):
        parts.bind(LayoutInput(square, square.astype(np.int32), square))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    ("error", "device", "becomes"),
    [
        (RuntimeError("std::bad_alloc"), "cpu", OutOfMemoryError),
        (RuntimeError("bad_alloc: Failed to allocate memory"), "cpu", OutOfMemoryError),
        (RuntimeError("CUDA out of memory"), "cuda:0", OutOfMemoryError),
        (MemoryError(), "cpu", OutOfMemoryError),
        (RuntimeError("CUDNN_STATUS_NOT_INITIALIZED"), "cuda:0", UnavailableError),
        (RuntimeError("INVALID_GRAPH"), "cpu", BundleError),
    ],
)
def test_errors_of_onnxruntime_are_translated(error: Exception, device: str, becomes: type[Exception]) -> None:
    assert type(ort_graph._to_package_error(error, device)) is becomes
