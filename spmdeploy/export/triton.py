"""Writes a model repository of the Triton Inference Server for a graph or TensorRT engine of a bundle.

    REPOSITORY/NAME/config.pbtxt    the model's configuration (model_config.proto, message ModelConfig); its parameters
                                    say which graph it is, for `backends.triton`
    REPOSITORY/NAME/1/model.onnx    the graph, and its external data files
    REPOSITORY/NAME/1/model.plan    or the TensorRT engine
    REPOSITORY/NAME/warmup/         a golden edit, which every instance computes before it serves requests

Inputs and outputs of the served model are those of the graph: bytes in, bytes out.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.onnxruntime_cuda import cuda_options
from spmdeploy.backends.triton import CONTENT, GRAPH, PRECISION
from spmdeploy.backends.verify import EXPORT_AGAIN, read_golden
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, ON_CPU, GraphRecord
from spmdeploy.engines.record import BATCH, Port
from spmdeploy.engines.store import named_engines
from spmdeploy.errors import BundleError, InputError, UsageError
from spmdeploy.files import atomic_replace_dir
from spmdeploy.serialization import shorten

TritonDevice = Literal["gpu", "cpu"]
CONFIG, VERSION, WARMUP = "config.pbtxt", "1", "warmup"
HEADING = "# Written by spmdeploy export-triton"
MAX_BATCH = 64
"""Largest batch of the exported graphs."""
QUEUE_DELAY = 1000
"""Microseconds that a request waits for others to share its batch: short compared with an edit."""

_TYPES = {"uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}

_OUTPUTS = ("edited", "unrounded")


@dataclass(frozen=True)
class TritonOptions:
    """Options of a served model."""

    name: str | None = None
    """Name of the model and its folder; None: that of the bundle, with the suffix _refine for `refine`."""
    graph: str = EDIT
    """`EDIT` or `REFINE`."""
    precision: str = "auto"
    device: TritonDevice = "gpu"
    engine: str | None = None
    """The key of a TensorRT engine, or an unambiguous part of it; None: serve the graph."""
    max_batch: int | None = None
    """None: the largest batch of the engine, or 8."""
    instances: int = 1
    """Copies of the model on each device, for concurrent requests."""
    overwrite: bool = False


@dataclass(frozen=True)
class TritonModel:
    """A model that was written."""

    folder: Path
    name: str
    backend: str
    """Name of Triton's backend."""
    source: str
    """The file of the bundle that is served."""
    needs: str
    """Requirements of the server, as text."""
    max_batch: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    files: dict[str, int]
    """Sizes in bytes, by path inside the folder."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class _ServedModel:
    """The files of the version folder, and their configuration."""

    backend: str
    precision: str
    file: str
    source: str
    sha256: str
    identity: Mapping[str, str]
    """Parameters of the configuration by which clients know the graph."""
    needs: str
    max_batch: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    contents: Mapping[str, bytes]


def export_triton(bundle: Bundle, repository: Path, options: TritonOptions) -> TritonModel:
    """Write a model into a repository, which is created if needed; other models in it are not changed.

    Args:
        bundle: The bundle of the graph or engine.
        repository: The folder of the model repository.
        options: Which graph or engine to serve, and how.

    Raises:
        UsageError: The options contradict each other or the bundle.
        BundleError: The graph cannot be batched by Triton.
        InputError: The repository cannot be written.
    """
    name = options.name
    if name is None:
        name = bundle.manifest.name if options.graph == EDIT else f"{bundle.manifest.name}_{options.graph}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(f"{name!r} is no name for a model", "give one of letters, digits, _ . and - with --name")
    if options.engine is None:
        served = _served_graph(bundle, _chosen_graph(bundle, options), options)
    else:
        served = _served_engine(bundle, options.engine, options)
    _check_outputs(served, bundle)
    sample = _warmup_sample(bundle, served.inputs, served.source)
    folder = repository / name
    _make_repository(repository)
    with atomic_replace_dir(folder, options.overwrite, _check_written_by_us) as building:
        for file, content in served.contents.items():
            _write_new(building / VERSION / file, content)
        for file, array in sample.items():
            _write_new(building / WARMUP / file, array.tobytes())
        _write_new(building / CONFIG, _config(name, bundle, served, options).encode())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return TritonModel(
        folder=folder,
        name=name,
        backend=served.backend,
        source=served.source,
        needs=served.needs,
        max_batch=served.max_batch,
        inputs=served.inputs,
        outputs=served.outputs,
        files=dict(sorted(files.items())),
    )


def _check_outputs(served: _ServedModel, bundle: Bundle) -> None:
    """Raise BundleError for outputs of other graphs: a name with quotes would become more configuration."""
    for port in served.outputs:
        if port.name not in _OUTPUTS or port.dtype not in _TYPES or port.shape[:1] != (BATCH,):
            shown = shorten(port.name)
            problem = f"{bundle.path}: {served.source} gives {shown} {port.dtype}{port.shape}"
            raise BundleError(f"{problem}, unlike the graphs of spmdeploy", EXPORT_AGAIN)


def _chosen_graph(bundle: Bundle, options: TritonOptions) -> GraphRecord:
    """The graph for the device: by default FP16 on GPUs, and on CPUs FP32 in the form for CPUs if there is one."""
    precision = options.precision
    if precision == "auto":
        precision = "fp32" if options.device == "cpu" else "fp16"
    for record in bundle.manifest.graphs:
        if (record.graph, record.precision, options.device) == (ON_CPU[options.graph], precision, "cpu"):
            return record
    return bundle.graph(options.graph, precision)


def _served_graph(bundle: Bundle, record: GraphRecord, options: TritonOptions) -> _ServedModel:
    max_batch = _batch(options, 8, MAX_BATCH, f"the graphs take 1 to {MAX_BATCH}")
    content, weights = bundle.read_graph(record)
    shown = bundle.path / record.file
    inputs, outputs = _read_graph(content, shown)
    for port in (*inputs, *outputs):
        if port.shape[:1] != (BATCH,) or BATCH in port.shape[1:] or port.dtype not in _TYPES:
            raise BundleError(f"{shown}: Triton cannot batch its {port.name} {port.dtype}{port.shape}", EXPORT_AGAIN)
    if "model.onnx" in weights:
        raise BundleError(f"{shown}: its weights have the name of the served graph, model.onnx", EXPORT_AGAIN)
    contents = {"model.onnx": content, **weights}
    needs = "the onnxruntime backend" + ("" if options.device == "cpu" else " and a GPU")
    return _ServedModel(
        backend="onnxruntime",
        precision=record.precision,
        file="model.onnx",
        source=record.file,
        sha256=record.sha256,
        identity={GRAPH: record.graph, PRECISION: record.precision, CONTENT: bundle.graph_digests(record)},
        needs=needs,
        max_batch=max_batch,
        inputs=inputs,
        outputs=outputs,
        contents=contents,
    )


def _served_engine(bundle: Bundle, name: str, options: TritonOptions) -> _ServedModel:
    named = named_engines(bundle, [name])
    found = [engine for engine in named if engine.record and engine.record.graph == options.graph]
    if len(found) != 1:
        keys = ", ".join(engine.record.key for engine in found if engine.record) or "none"
        raise UsageError(
            f"{name!r} does not name one engine of the {options.graph} graph, but {keys}", "give the whole key"
        )
    (engine,) = found
    record = engine.record
    assert record is not None
    if record.runtime != "tensorrt":
        raise UsageError(
            f"{record.key} is an engine for {record.runtime}, and Triton loads only those of TensorRT",
            "build one on the server (spmdeploy build BUNDLE --runtime tensorrt), or serve the graph, without --engine",
        )
    if options.device == "cpu" or options.precision not in ("auto", record.precision):
        asked = "a CPU" if options.device == "cpu" else options.precision
        raise UsageError(f"{record.key} is a {record.precision} engine for a GPU, and {asked} was requested", None)
    max_batch = _batch(options, record.batch.max, record.batch.max, f"the engine takes {record.batch}")
    sources = [source.sha256 for source in (record.onnx, record.weights) if source is not None]
    return _ServedModel(
        backend="tensorrt",
        precision=record.precision,
        file="model.plan",
        source=f"engines/{record.key}/{record.engine.file}",
        sha256=record.engine.sha256,
        identity={GRAPH: record.graph, PRECISION: record.precision, CONTENT: " ".join(sources)},
        needs=f"TensorRT {record.version} and {record.target}",
        max_batch=max_batch,
        inputs=record.inputs,
        outputs=record.outputs,
        contents={"model.plan": engine.content()},
    )


def _batch(options: TritonOptions, default: int, maximum: int, limits: str) -> int:
    max_batch = default if options.max_batch is None else options.max_batch
    if not 1 <= max_batch <= maximum or options.instances < 1:
        problem = f"batches up to {max_batch} on {options.instances} instances are not possible"
        raise UsageError(problem, f"{limits}, and there must be at least one instance")
    return max_batch


def _read_graph(content: bytes, shown: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs."""
    import onnx
    from onnx.helper import tensor_dtype_to_np_dtype

    def port(value: onnx.ValueInfoProto) -> Port:
        kind = value.type.tensor_type
        shape = tuple(BATCH if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
        return Port(value.name, str(tensor_dtype_to_np_dtype(kind.elem_type)), shape)

    try:
        graph = onnx.load_from_string(content).graph
        return tuple(map(port, graph.input)), tuple(map(port, graph.output))
    except Exception as exc:  # onnx and protobuf raise anything on bytes that are no graph
        raise BundleError(f"{shown}: not a graph of spmdeploy: {exc!r}", EXPORT_AGAIN) from exc


def _warmup_sample(bundle: Bundle, inputs: Sequence[Port], shown: str) -> dict[str, NDArray[Any]]:
    """The inputs of one golden edit by name, each (1, ...)."""
    if not bundle.manifest.golden:
        raise BundleError(f"{bundle.path}: holds no golden edit to warm a server up with", EXPORT_AGAIN)
    sample = read_golden(bundle, bundle.manifest.golden[0])
    golden = {**sample.inputs._asdict(), "coarse": sample.coarse}
    for port in inputs:
        there = golden.get(port.name)
        if there is None or Port(port.name, str(there.dtype), (BATCH, *there.shape[1:])) != port:
            raise BundleError(
                f"{bundle.path}: {shown} takes {port.name} {port.dtype}{port.shape}, unlike the graphs of spmdeploy",
                EXPORT_AGAIN,
            )
    return {port.name: np.ascontiguousarray(golden[port.name]) for port in inputs}


def _config(name: str, bundle: Bundle, served: _ServedModel, options: TritonOptions) -> str:
    """The content of config.pbtxt. Dimensions are without the batch (`max_batch_size`)."""
    kind = "KIND_CPU" if options.device == "cpu" else "KIND_GPU"
    warm_batches = sorted({1, served.max_batch})
    lines = [
        f"{HEADING}: {served.source} of the bundle {bundle.manifest.name},",
        " ".join(f"# SHA-256 {served.sha256}; the server needs {served.needs}".split()),
        f'name: "{name}"',
        f'backend: "{served.backend}"',
        f'default_model_filename: "{served.file}"',
        f"max_batch_size: {served.max_batch}",
        *_ports("input", served.inputs),
        *_ports("output", served.outputs),
        f"instance_group [ {{ kind: {kind} count: {options.instances} }} ]",
        *_optimization(served, options.device),
        f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY} }}",
        *(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
            for key, value in served.identity.items()
        ),
        *(line for batch in warm_batches for line in _warmup(batch, served.inputs)),
    ]
    return "".join(f"{line}\n" for line in lines)


def _optimization(served: _ServedModel, device: TritonDevice) -> Iterator[str]:
    """Options of Triton's backends: CUDA graphs for TensorRT, the provider's options for ONNX Runtime on GPUs.

    ONNX Runtime's CUDA graphs need inputs at the same addresses each time, which Triton's backend does not promise.
    """
    if served.backend == "tensorrt":  # small batches are bound by kernel launches
        yield "optimization { cuda { graphs: true } }"
    elif device == "gpu":
        options = {name: value for name, value in cuda_options(0, served.precision).items() if name != "device_id"}
        parameters = " ".join(f'parameters {{ key: "{name}" value: "{value}" }}' for name, value in options.items())
        accelerator = f'name: "cuda" {parameters}'
        yield f"optimization {{ execution_accelerators {{ gpu_execution_accelerator {{ {accelerator} }} }} }}"
        # Triton's backend reads this option of the model after those above, by number, and sets 0 where it is missing.
        yield 'parameters { key: "cudnn_conv_algo_search" value { string_value: "1" } }'


def _ports(field: str, ports: Sequence[Port]) -> Iterator[str]:
    for port in ports:
        yield f'{field} {{ name: "{port.name}" {_type_and_dims(port)} }}'


def _warmup(batch: int, inputs: Sequence[Port]) -> Iterator[str]:
    """The sample is one edit; Triton repeats it to fill the batch."""
    yield "model_warmup {"
    yield f'  name: "batch {batch}" batch_size: {batch}'
    for port in inputs:
        yield f'  inputs {{ key: "{port.name}" value {{ {_type_and_dims(port)} input_data_file: "{port.name}" }} }}'
    yield "}"


def _type_and_dims(port: Port) -> str:
    return f"data_type: {_TYPES[port.dtype]} dims: {list(port.shape[1:])}"


def _make_repository(repository: Path) -> None:
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InputError(f"{repository}: cannot be created: {exc.strerror}", "name another folder") from exc


def _check_written_by_us(folder: Path) -> None:
    """Raise InputError unless the folder is a model written by `export_triton` with no other files in it."""
    try:
        heading, names = (folder / CONFIG).read_bytes()[: len(HEADING)], set(os.listdir(folder))
    except OSError:
        heading, names = b"", set()
    unknown = sorted(names - {CONFIG, VERSION, WARMUP})
    if heading != HEADING.encode() or unknown:
        problem = f"{folder}: not replaced, {unknown[0] if unknown else 'it'} was not written by export-triton"
        raise InputError(problem, "remove it yourself, or give another --name")


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as stream:
        stream.write(content)
