"""The command `export-triton`: the repository is complete, and the configuration matches the graph.

No server runs here. The configuration is parsed as Triton's own message, and the model is run by ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmdeploy import cli
from spmdeploy.backends.tensorrt import graph_ports as graph_ports_of
from spmdeploy.backends.verify import measure_deviation, read_golden
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.manifest import EDIT
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines.record import BatchRange, EngineFile, EngineRecord, SourceFile
from spmdeploy.engines.writer import EngineWriter, choose_place
from tests.backends.test_onnxruntime import graph_file
from tests.bundle.conftest import fill, manifest_of
from tests.simulators.records import SAMPLE, for_targets

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="session")
def messages() -> Any:
    """model_config_pb2 of tritonclient, loaded by itself: the package around it would need gRPC."""
    try:
        path = distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    except PackageNotFoundError:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def export(street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def export(*args: str, bundle: Path = street_bundle) -> tuple[int, dict[str, Any]]:
        code = cli.main(["export-triton", str(bundle), str(tmp_path / "models"), *args, "--json"])
        (line,) = capsys.readouterr().out.splitlines()
        return code, json.loads(line)

    return export


def read_config(messages: Any, model: Path) -> Any:
    from google.protobuf import text_format

    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), messages.ModelConfig())


def graph_ports(values: Any) -> dict[str, tuple[Any, list[int]]]:
    """dtype and dimensions behind the batch, by name."""
    kinds = {value.name: value.type.tensor_type for value in values}
    return {
        name: (onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type), [dim.dim_value for dim in kind.shape.dim[1:]])
        for name, kind in kinds.items()
    }


def config_ports(messages: Any, ports: Any) -> dict[str, tuple[Any, list[int]]]:
    """The same from the configuration. ports: by name."""
    dtypes = {"TYPE_UINT8": np.uint8, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}
    return {
        name: (np.dtype(dtypes[messages.DataType.Name(port.data_type)]), list(port.dims))
        for name, port in ports.items()
    }


def named(ports: Any) -> dict[str, Any]:
    return {port.name: port for port in ports}


@pytest.mark.parametrize(("graph_name", "name"), [("edit", "tiny"), ("refine", "tiny_refine")])
def test_export_triton_configuration_matches_the_graph(
    messages: Any, export: Any, tmp_path: Path, graph_name: str, name: str
) -> None:
    code, result = export("--max-batch", "4", "--instances", "2", "--graph", graph_name)
    assert code == 0 and result["schema"] == "spmdeploy.export-triton/1"
    model = tmp_path / "models" / name
    config, graph = read_config(messages, model), onnx.load(model / "1/model.onnx").graph
    assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 4)
    assert config_ports(messages, named(config.input)) == graph_ports(graph.input)
    assert config_ports(messages, named(config.output)) == graph_ports(graph.output)
    coarse = ["coarse"] if graph_name == "refine" else []
    assert list(graph_ports(graph.input)) == ["image", "labels", "instances", "mask", *coarse]
    assert [(group.kind, group.count) for group in config.instance_group] == [(messages.ModelInstanceGroup.KIND_GPU, 2)]
    assert config.HasField("dynamic_batching") and (model / "1" / config.default_model_filename).exists()
    assert result["files"].keys() == {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}


def test_export_triton_optimization_uses_fields_of_each_backend(
    messages: Any, export: Any, street_bundle: Path, tmp_path: Path
) -> None:
    export("--name", "gpu")
    config = read_config(messages, tmp_path / "models/gpu")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    chosen = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", chosen | {"prefer_nhwc": "1"})
    assert config.parameters["cudnn_conv_algo_search"].string_value == "1"  # HEURISTIC, by number
    export("--name", "exact", "--precision", "fp32")
    (accelerator,) = read_config(
        messages, tmp_path / "models/exact"
    ).optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(accelerator.parameters) == chosen
    export("--name", "cpu", "--device", "cpu")
    assert not read_config(messages, tmp_path / "models/cpu").HasField("optimization")
    add_engine(street_bundle, SAMPLE, batch=BatchRange(1, 1, 4))
    export("--name", "engine", "--engine", "tensorrt")
    assert read_config(messages, tmp_path / "models/engine").optimization.cuda.graphs


def test_export_triton_configuration_with_an_unknown_field_does_not_parse(
    messages: Any, export: Any, tmp_path: Path
) -> None:
    """What the other tests rely on: parsing checks the name and type of every field."""
    from google.protobuf.text_format import ParseError

    export()
    file = tmp_path / "models/tiny/config.pbtxt"
    written = file.read_text(encoding="utf-8")
    for old, new in (("max_batch_size: 8", "max_batches: 8"), ("count: 1", 'count: "1"'), ("KIND_GPU", "KIND_TPU")):
        assert old in written
        file.write_text(written.replace(old, new), encoding="utf-8")
        with pytest.raises(ParseError):
            read_config(messages, file.parent)


@pytest.mark.parametrize("batch", [1, 8])
def test_export_triton_warmup_holds_one_golden_edit(messages: Any, export: Any, tmp_path: Path, batch: int) -> None:
    assert export("--max-batch", str(batch))[0] == 0
    model = tmp_path / "models/tiny"
    config = read_config(messages, model)
    assert sorted(warmup.batch_size for warmup in config.model_warmup) == sorted({1, batch})
    ports = config_ports(messages, named(config.input))
    for warmup in config.model_warmup:
        assert config_ports(messages, warmup.inputs) == ports
        for name, given in warmup.inputs.items():
            dtype, dims = ports[name]
            assert (model / "warmup" / given.input_data_file).stat().st_size == dtype.itemsize * np.prod(dims)


@pytest.mark.parametrize(
    ("args", "precision"),
    [
        ([], "fp16"),
        (["--precision", "fp32"], "fp32"),
        (["--device", "cpu"], "fp32"),
        (["--graph", "refine"], "fp16"),
        (["--graph", "refine", "--device", "cpu"], "fp32"),
    ],
)
def test_export_triton_repository_gives_the_golden_result(
    messages: Any, export: Any, street_bundle: Path, tmp_path: Path, args: list[str], precision: Any
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    code, result = export(*args)
    assert code == 0 and result["source"].endswith(f".{precision}.onnx")
    assert ("_cpu" in result["source"]) == ("--device" in args) and ("refine" in result["source"]) == (
        "--graph" in args
    )
    weights = "1/float16.weights" if precision == "fp16" else "1/float32.weights"
    assert {"1/model.onnx", weights} == {name for name in result["files"] if name.startswith("1/")}
    model, bundle = Path(result["folder"]), open_bundle(street_bundle)
    config = read_config(messages, model)
    inputs = {}
    for name, (dtype, dims) in config_ports(messages, named(config.input)).items():
        content = (model / "warmup" / config.model_warmup[0].inputs[name].input_data_file).read_bytes()
        inputs[name] = np.frombuffer(content, dtype).reshape(1, *dims)
    session = onnxruntime.InferenceSession(
        model / "1" / config.default_model_filename, providers=["CPUExecutionProvider"]
    )
    edited, unrounded = session.run(["edited", "unrounded"], inputs)
    golden = read_golden(bundle, bundle.manifest.golden[0])
    expected = golden.refined if "refine" in args else golden.expected
    assert expected is not None
    if "refine" in args:
        edited = np.rint(unrounded).astype(np.uint8)
    assert not measure_deviation(edited, expected, golden.inputs.mask).problems(bundle.manifest.limits[precision])


def test_export_triton_graph_equals_that_of_the_bundle(export: Any, street_bundle: Path, tmp_path: Path) -> None:
    assert export()[0] == 0
    record = open_bundle(street_bundle).graph("edit", "fp16")
    assert hashlib.sha256((tmp_path / "models/tiny/1/model.onnx").read_bytes()).hexdigest() == record.sha256
    assert record.sha256 in (tmp_path / "models/tiny/config.pbtxt").read_text()


def test_export_triton_other_folders_are_not_changed(export: Any, tmp_path: Path) -> None:
    (tmp_path / "models/other").mkdir(parents=True)
    assert export()[0] == export("--name", "second", "--device", "cpu")[0] == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["other", "second", "tiny"]
    assert export()[0] == 7
    assert export("--overwrite", "--device", "cpu")[0] == 0
    assert "KIND_CPU" in (tmp_path / "models/tiny/config.pbtxt").read_text()
    (tmp_path / "models/tiny/2").mkdir()
    for name, message in (("tiny", "2 was not written"), ("other", "it was not written")):
        code, result = export("--overwrite", "--name", name)
        assert code == 7 and message in result["error"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["other", "second", "tiny"]


@pytest.mark.parametrize("name", ["../up", "", "a b", 'x"', ".hidden", "ü"])
def test_export_triton_invalid_name_exits_2(export: Any, tmp_path: Path, name: str) -> None:
    code, result = export("--name", name)
    assert code == 2 and "no name for a model" in result["error"] and not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("args", "code"), [(["--max-batch", "65"], 2), (["--max-batch", "0"], 2), (["--instances", "0"], 2)]
)
def test_export_triton_impossible_batch_or_instances_exits_2(
    export: Any, tmp_path: Path, args: list[str], code: int
) -> None:
    assert export(*args)[0] == code and not (tmp_path / "models").exists()


def test_export_triton_missing_precision_exits_6(
    export: Any, street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = tmp_path / "slim.spm"
    assert cli.main(["bundle", "slim", str(street_bundle), str(slim), "--keep", "edit_cpu"]) == 0
    capsys.readouterr()
    code, result = export(bundle=slim)
    assert code == 6 and "no graph 'edit' in fp16" in result["error"] and not (tmp_path / "models").exists()
    assert export("--device", "cpu", bundle=slim)[0] == 0


INJECTED = 'edited" }\nbackend: "python'


def hostile_bundle(folder: Path, kind: str) -> Path:
    """A bundle whose hashes are right, with a graph that is not to be served."""
    output = INJECTED if kind == "output" else "edited"
    graph = onnx.load(graph_file(folder / "graph.onnx", 256, output=output))
    if kind in ("path", "weights"):
        location = b"/etc/passwd" if kind == "path" else b"model.onnx"
        initializer = graph.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
        initializer.data_location = onnx.TensorProto.EXTERNAL
        initializer.external_data.add(key="location", value=location.decode())
    content = b"no graph" if kind == "garbage" else graph.SerializeToString()
    with BundleWriter(folder / "hostile.spm") as writer:
        if kind == "weights":
            writer.add_bytes("graphs/model.onnx", b"sixteen bytes...")
        records = fill(writer, dict.fromkeys(("fp32", "fp16"), content))
        if kind == "weights":
            records = tuple(dataclasses.replace(record, weights="graphs/model.onnx") for record in records)
        writer.finish(manifest_of(records, **({"golden": ()} if kind == "golden" else {})))
    return folder / "hostile.spm"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("output", "unlike the graphs of spmdeploy"),
        ("path", "asks for weights in '/etc/passwd'"),
        ("weights", "its weights have the name of the served graph"),
        ("garbage", "not a graph of spmdeploy"),
        ("golden", "holds no golden edit"),
        ("images", r"golden/tree/"),
    ],
)
def test_export_triton_hostile_bundle_exits_6_and_writes_nothing(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = hostile_bundle(tmp_path, kind)
    for precision in ("fp32", "fp16"):
        args = ["export-triton", str(bundle), str(tmp_path / "models"), "--precision", precision, "--json"]
        assert cli.main(args) == 6
        assert message in json.loads(capsys.readouterr().out)["error"]
    assert not (tmp_path / "models").exists()


def test_export_triton_engine_record_cannot_add_configuration(
    messages: Any, export: Any, street_bundle: Path, tmp_path: Path
) -> None:
    record = add_engine(street_bundle, SAMPLE, version='10.16.1\nbackend: "python" #')
    assert export("--engine", record.key)[0] == 0
    assert read_config(messages, tmp_path / "models/tiny").backend == "tensorrt"


CONTENT = b"not really an engine"


def add_engine(bundle: Path, record: EngineRecord, **changes: Any) -> EngineRecord:
    """Write an engine of the bundle's FP16 graph into the cache."""
    opened = open_bundle(bundle)
    ports = graph_ports_of(EDIT, 256)
    outputs = ("edited", "unrounded")
    record = dataclasses.replace(
        record,
        bundle="tiny",
        onnx=SourceFile("graphs/edit.fp16.onnx", opened.graph("edit", "fp16").sha256),
        engine=EngineFile("edit.fp16.engine", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
        inputs=tuple(port for port in ports.values() if port.name not in outputs),
        outputs=tuple(ports[name] for name in outputs),
        **changes,
    )
    with EngineWriter(choose_place(opened, "cache"), "edit.fp16") as writer:
        writer.finish(record, CONTENT)
    return record


def test_export_triton_engine_is_copied_unchanged(
    messages: Any, export: Any, street_bundle: Path, tmp_path: Path
) -> None:
    record = add_engine(street_bundle, SAMPLE, batch=BatchRange(1, 1, 4))
    code, result = export("--engine", "tensorrt")
    assert code == 0 and result["needs"] == "TensorRT 10.16.1 and NVIDIA GeForce RTX 3060 (sm86)"
    assert result["source"] == f"engines/{record.key}/edit.fp16.engine"
    model = tmp_path / "models/tiny"
    config = read_config(messages, model)
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("tensorrt", "model.plan", 4)
    assert (model / "1/model.plan").read_bytes() == CONTENT and len(list((model / "1").iterdir())) == 1
    for ports, written in ((record.inputs, config.input), (record.outputs, config.output)):
        assert config_ports(messages, named(written)) == {
            port.name: (np.dtype(port.dtype), list(port.shape[1:])) for port in ports
        }
    assert sorted(warmup.batch_size for warmup in config.model_warmup) == [1, 4]
    for args in (["--max-batch", "5"], ["--device", "cpu"], ["--precision", "fp32"]):
        assert export("--engine", record.key, "--name", "other", *args)[0] == 2, args
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]


def test_export_triton_unusable_engine_exits_2(export: Any, street_bundle: Path, tmp_path: Path) -> None:
    add_engine(street_bundle, for_targets("sm89"))
    code, result = export("--engine", "sm89")
    assert code == 2 and "is an engine for tensorrt-rtx" in result["error"]
    assert export("--engine", "sm90")[0] == 2
    add_engine(street_bundle, SAMPLE, batch=BatchRange(1, 1, 2))
    code, result = export("--engine", "fp16")
    assert code == 2 and "does not name one engine" in result["error"] and not (tmp_path / "models").exists()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
