"""Imports OpenVINO, and compiles and runs single graphs in it, with cached compiled graphs and checks before and after.

The plain graphs are compiled for one image: with a batch of unknown size OpenVINO takes longer (2026.4), and
batches of a fixed size are no faster by the image (two cores with AMX). Compiled graphs are cached, because compiling
takes seconds.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.graph_cache import cache_key, open_cached
from spmdeploy.backends.threads import available_threads
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, LAYOUT, PICTURE, REFINE, GraphRecord
from spmdeploy.errors import BundleError, OutOfMemoryError, SpmDeployError, UnavailableError
from spmdeploy.types import ModelInput

logger = logging.getLogger("spmdeploy")

CpuPrecision = Literal["fp32", "bf16"]


MIN_VERSION = (2026, 4)
"""The oldest version that this was run with."""


_OPENVINO_NAMES: dict[str, str] = {"fp32": "f32", "bf16": "bf16"}


_PORTS = {"image": "u8", "labels": "u8", "instances": "i32", "mask": "u8", "coarse": "f32"}


_COMPILED = "compiled.blob"


MAX_VALUE_BYTES = 4 << 30
"""Limit on all values that a graph computes for one image, in total; 1.7 GiB in the paper's size (7,000 values)."""


Tensors = Mapping[str, Any]
"""OpenVINO tensors by name."""


def import_openvino() -> Any:
    """The openvino module.

    Raises:
        UnavailableError: It is not installed; names the command that installs it.
    """
    install = 'pip install "spmdeploy[openvino]"'
    try:
        with _without_telemetry():
            import openvino
    except ImportError as exc:
        raise UnavailableError(f"OpenVINO cannot be imported: {exc}", f"install it: {install}") from exc
    version = short_version(openvino)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < MIN_VERSION:
        needed = ".".join(map(str, MIN_VERSION))
        raise UnavailableError(f"OpenVINO {version} is too old, {needed} is needed", f"{install} --upgrade")
    return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hides the package `openvino_telemetry` from the import of openvino.

    With it, each import is reported to a server, and an id of the user is stored in the home folder.
    """
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        yield
    finally:
        del sys.modules[name]


def short_version(library: Any) -> str:
    """The version without the number of the build: 2026.4.1."""
    version: str = library.__version__.partition("-")[0]
    return version


class CompiledGraph:
    """A graph compiled for one image, which computes in the precision that it was compiled for."""

    def __init__(self, library: Any, compiled: Any, record: GraphRecord, precision: CpuPrecision) -> None:
        """Raises UnavailableError if a convolution computes in another precision."""
        self.record = record
        self._library, self._compiled = library, compiled
        self._request: Any = compiled.create_infer_request()
        self._running = threading.Lock()
        self._inputs = [port.get_any_name() for port in compiled.inputs]
        self._outputs = [port.get_any_name() for port in compiled.outputs]
        self.read_back = _check_precision(compiled, record, precision)

    def run(self, inputs: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
        """One output for a batch, computed image by image."""
        results = []
        with self._running, _translated_errors(self.record):
            for given in single_images(inputs):
                self._set(self._request, given)
                self._request.infer()
                results.append(np.array(self._request.get_tensor(output).data))
        return np.concatenate(results)

    def compute(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """All outputs for one image, as tensors of OpenVINO: numpy has no bf16."""
        with self._running, _translated_errors(self.record):
            self._set(self._request, {name: value for name, value in inputs.items() if name in self._inputs})
            self._request.infer()
            return {name: self._copy(self._request.get_tensor(name)) for name in self._outputs}

    def own_inputs(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Those of the arrays that the graph reads, as tensors of OpenVINO."""
        return {name: self._tensor(value) for name, value in inputs.items() if name in self._inputs}

    def bind(self, tensors: Tensors) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
        """A function from an image, uint8 (1, S, S, 3), to the edited one, with all other inputs given."""
        if missing := set(self._inputs) - {*tensors, "image"}:
            raise BundleError(
                f"the picture graph reads {min(missing)}, which the layout graph does not compute",
                "export the bundle again",
            )
        request = self._compiled.create_infer_request()
        for name, tensor in tensors.items():
            request.set_tensor(name, tensor)

        def run(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
            with self._running, _translated_errors(self.record):
                self._set(request, {"image": image})
                request.infer()
                return np.array(request.get_tensor("edited").data)

        return run

    def _set(self, request: Any, inputs: Mapping[str, NDArray[Any]]) -> None:
        for name, value in inputs.items():
            request.set_tensor(name, self._tensor(value))

    def _tensor(self, value: NDArray[Any]) -> Any:
        return self._library.Tensor(np.ascontiguousarray(value))

    def _copy(self, tensor: Any) -> Any:
        copy = self._library.Tensor(tensor.get_element_type(), tensor.get_shape())
        tensor.copy_to(copy)
        return copy


def single_images(inputs: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """The images of a batch, each a batch of one."""
    for index in range(len(next(iter(inputs.values())))):
        yield {name: value[index : index + 1] for name, value in inputs.items()}


class GraphLoader:
    """Compiles graphs of a bundle, or takes them from the cache."""

    def __init__(self, library: Any, core: Any, bundle: Bundle, precision: CpuPrecision, as_exported: bool) -> None:
        self._library, self._core, self._bundle, self._precision = library, core, bundle, precision
        self._as_exported = as_exported
        self._mapped: list[NDArray[np.uint8]] = []  # cached graphs: OpenVINO does not keep their memory alive
        self._config = {
            "INFERENCE_PRECISION_HINT": _OPENVINO_NAMES[precision],  # bf16 by default where the processor has it
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": available_threads(),
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        }

    def load(self, record: GraphRecord) -> CompiledGraph:
        """Compile a graph, or take it from the cache.

        Raises:
            BundleError: The file holds another graph.
            UnavailableError: OpenVINO refuses it, or computes in another precision.
            OutOfMemoryError: There is too little memory.
        """
        digests = self._bundle.graph_digests(record)
        facts = ("openvino", self._library.__version__, record.graph, self._precision, digests)
        with _translated_errors(record):
            if self._as_exported:
                compiled = self._compile(record)
            else:
                compiled = open_cached(
                    cache_key(*facts),
                    load=self._import,
                    make=lambda folder: self._make(record, folder),
                    plain=lambda: self._compile(record),
                )
            return CompiledGraph(self._library, compiled, record, self._precision)

    def _import(self, folder: Path) -> Any:
        content = np.memmap(folder / _COMPILED, np.uint8, mode="c")  # a tensor takes writable memory only
        self._mapped.append(content)
        return self._core.import_model(self._library.Tensor(content, shared_memory=True), "CPU", self._config)

    def _make(self, record: GraphRecord, folder: Path) -> Any:
        compiled = self._compile(record)
        exported = compiled.export_model()
        (folder / _COMPILED).write_bytes(exported if isinstance(exported, bytes) else exported.getvalue())
        return compiled

    def _compile(self, record: GraphRecord) -> Any:
        logger.warning("compiling the %s graph for OpenVINO in %s, once", record.graph, self._precision)
        with self._path(record) as path:
            model = self._core.read_model(str(path))
            self._check_ports(model, record)
            single = model.clone() if self._as_exported else model
            single.reshape({port.get_any_name(): [1, *_item_shape(port)] for port in single.inputs})
            _check_value_sizes(single, record)
            if self._precision == "bf16" and record.graph in (LAYOUT, PICTURE):
                model = self._with_bf16_cache(model)
            return self._core.compile_model(model, "CPU", self._config)

    @contextmanager
    def _path(self, record: GraphRecord) -> Iterator[Path]:
        """The path of a graph with its weights beside it, which OpenVINO reads from files alone; a zip is unpacked."""
        if self._bundle.is_on_disk(record):
            yield self._bundle.path_of_graph(record)
            return
        graph = self._bundle.read_graph(record)
        with tempfile.TemporaryDirectory(prefix="spmdeploy-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "graph.onnx"
            path.write_bytes(graph.content)
            for name, content in graph.weights.items():
                (Path(folder) / name).write_bytes(content)
            yield path

    def _check_ports(self, model: Any, record: GraphRecord) -> None:
        """Raises BundleError if it is another graph than the one in the manifest."""
        if record.graph not in (EDIT, REFINE):
            return
        size = self._bundle.manifest.native_size
        shapes = {"image": [size, size, 3], "labels": [size, size], "instances": [size, size], "mask": [size, size]}
        if record.graph == REFINE:
            shapes["coarse"] = [size // 2, size // 2, 3]
        expected = {name: (_PORTS[name], shape) for name, shape in shapes.items()}
        inputs = {
            port.get_any_name(): (port.get_element_type().get_type_name(), _item_shape(port)) for port in model.inputs
        }
        outputs = {port.get_any_name(): port.get_element_type().get_type_name() for port in model.outputs}
        if inputs != expected or outputs != {"edited": "u8", "unrounded": "f32"}:
            raise BundleError(
                f"the graph is no {record.graph} graph: it takes {inputs} and gives {outputs}",
                "export the bundle again",
            )

    def _with_bf16_cache(self, model: Any) -> Any:
        """The layout or picture graph with cached tensors in bf16, which they are computed in: half the memory."""
        from openvino.preprocess import PrePostProcessor

        steps = PrePostProcessor(model)
        given = (*ModelInput._fields, "edited", "unrounded")
        for ports, step in ((model.inputs, steps.input), (model.outputs, steps.output)):
            for name in (port.get_any_name() for port in ports):
                if name not in given:
                    step(name).tensor().set_element_type(self._library.Type.bf16)
        return steps.build()


def _item_shape(port: Any) -> list[int]:
    """The shape of a port without the batch."""
    return [side.get_length() if side.is_static else -1 for side in list(port.get_partial_shape())[1:]]


def _check_value_sizes(model: Any, record: GraphRecord) -> None:
    """Raises BundleError unless the sizes of all values are known and within `MAX_VALUE_BYTES` in total.

    OpenVINO allocates as much as a graph asks for, some of it already when it compiles.
    """
    total = 0
    for node in model.get_ops():
        if node.get_type_name() in ("If", "Loop", "TensorIterator"):  # their graphs have values of their own
            raise BundleError(f"the {record.graph} graph has a {node.get_type_name()}", "export the bundle again")
        for port in node.outputs():
            shape = port.get_partial_shape()
            if shape.is_dynamic:
                problem = f"the size of {node.get_friendly_name()} in the {record.graph} graph is not known"
                raise BundleError(f"{problem}: {shape}", "export the bundle again")
            total += math.prod(side.get_length() for side in shape) * port.get_element_type().size
    if total > MAX_VALUE_BYTES:
        problem = f"the {record.graph} graph computes values of {total / 2**30:.1f} GiB for one image"
        raise BundleError(f"{problem}, more than {MAX_VALUE_BYTES >> 30} GiB", "export the bundle again")


def _check_precision(compiled: Any, record: GraphRecord, precision: CpuPrecision) -> str:
    """What the convolutions compute in, read from the compiled graph. Raises UnavailableError if not `precision`."""
    found = convolution_precisions(compiled)
    wanted = _OPENVINO_NAMES[precision]
    count = sum(found.values())
    counts = ", ".join(f"{number} in {name}" for name, number in found.most_common())
    if found[wanted] != count or not count:
        raise UnavailableError(
            f"{precision} was asked for, but OpenVINO computes the convolutions of the {record.graph} graph otherwise: "
            f"{counts or 'it has none'}",
            "choose another --precision or --backend",
        )
    return f"all {count} convolutions compute in {precision}"


def convolution_precisions(compiled: Any) -> Counter[str]:
    """Convolutions of a compiled graph by the precision that they execute in, as OpenVINO names it."""
    layers = (node.rt_info for node in compiled.get_runtime_model().get_ops())
    return Counter(
        info["runtimePrecision"].astype(str) for info in layers if info["layerType"].astype(str) == "Convolution"
    )


@contextmanager
def _translated_errors(record: GraphRecord) -> Iterator[None]:
    """OpenVINO's exceptions as ours; all are RuntimeErrors, only the messages differ."""
    try:
        yield
    except SpmDeployError:
        raise
    except MemoryError as exc:
        raise _out_of_memory(str(exc)) from exc
    except Exception as exc:
        text = shorten_message(str(exc))
        if any(sign in text.lower() for sign in ("allocate", "bad_alloc", "out of memory")):
            raise _out_of_memory(text) from exc
        raise UnavailableError(
            f"OpenVINO refuses the {record.graph} graph: {text}", "use --backend onnxruntime"
        ) from exc


def _out_of_memory(text: str) -> OutOfMemoryError:
    return OutOfMemoryError(f"OpenVINO ran out of memory: {text}", "close other programs")


def shorten_message(text: str) -> str:
    """The message of an exception of OpenVINO without the places in its sources, in at most 300 characters."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not re.match(r"(Exception from|Check '.*' failed at) ", line)]
    return " ".join(kept or lines)[:300]
