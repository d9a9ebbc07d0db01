"""The backends that a benchmark compares: how each is opened, described and run on a device.

A backend named by the user is opened or refused with the reason, never replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends import registry
from spmdeploy.backends.base import Backend, check_device
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.openvino import OpenVinoSession, bf16_support
from spmdeploy.backends.openvino_graph import import_openvino
from spmdeploy.backends.tensorrt import TensorRtSession
from spmdeploy.backends.threads import available_threads
from spmdeploy.bench.results import BackendInfo
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, ON_CPU, GraphRecord
from spmdeploy.errors import UnavailableError
from spmdeploy.gpu.arrays import DeviceArray
from spmdeploy.gpu.device import Device
from spmdeploy.gpu.driver import visible_gpus
from spmdeploy.types import ModelInput

REFERENCE_BACKEND = "torch"
"""The plain generator in eager PyTorch; in FP32 it is the reference for results and the baseline for ratios."""
_COMPARISONS = ("torch-compile", "onnxruntime-plain", "openvino-plain")
"""Backends that `spmdeploy edit` does not offer."""


def _is_gpu_only(name: str) -> bool:
    return name.endswith("-cuda") or (
        name in registry.backend_names() and registry.backend_entry(name).devices == ("cuda",)
    )


def is_on_server(name: str) -> bool:
    """Whether its device is the URL of a server."""
    return name in registry.backend_names() and registry.backend_entry(name).on_server


def open_backend(bundle: Bundle, name: str, device: str, precision: str) -> Backend:
    """Opens a backend for a benchmark.

    Args:
        bundle: Holds the graphs.
        name: One of those that `bench --backend` takes.
        device: auto, cpu or cuda:N; the URL of a server.
        precision: auto, fp32, tf32, fp16 or bf16.

    Raises:
        UnavailableError: This machine cannot run it; gives the reason.
        BundleError: The bundle lacks the graph.
    """
    chosen = _device_of(name, device)
    if name in (REFERENCE_BACKEND, "torch-compile"):
        return _open_torch(bundle, name, chosen, precision)
    if name == "onnxruntime-plain":
        return _open_plain_onnxruntime(bundle, precision)
    if name == "openvino-plain":
        return _open_plain_openvino(bundle, precision)
    return registry.open_backend(bundle, name.removesuffix("-cuda"), chosen, precision).session


def default_precisions(name: str, device: str) -> tuple[str, ...]:
    """Precisions that are compared when none is named."""
    on_gpu = _is_gpu_only(name) or (name in (REFERENCE_BACKEND, "torch-compile") and device != "cpu" and has_gpu())
    if name in (REFERENCE_BACKEND, "torch-compile"):
        return ("fp32", "fp16") if on_gpu else ("fp32", "bf16")
    if on_gpu:
        offered = registry.backend_entry(name).precisions if name in registry.backend_names() else ("fp16", "fp32")
        return tuple(precision for precision in ("fp16", "fp32") if precision in offered)
    backend = name.removesuffix("-plain")
    offered = registry.backend_entry(backend).precisions if backend in registry.backend_names() else ()
    return ("fp32", "bf16") if "bf16" in offered else ("auto",)


def has_gpu() -> bool:
    """Whether the driver shows a GPU."""
    try:
        return visible_gpus() > 0
    except OSError:
        return False


def skip_by_default(name: str) -> None:
    """Raises UnavailableError for backends that are only measured when named."""
    if is_on_server(name):
        raise UnavailableError("left out: no server is named", f"name it: --backend {name} --url HOST:PORT")
    if name == "torch-compile" and not has_gpu():
        raise UnavailableError("left out: compiling for a CPU takes minutes", "name it: --backend torch-compile")


def cold_start_options(name: str, device: str, precision: str) -> list[str]:
    """Options of `spmdeploy edit` for a backend. Raises UnavailableError where it does not offer it."""
    if name in _COMPARISONS:
        raise UnavailableError("`spmdeploy edit` does not offer it", "leave it out of --scope cold-start")
    place = "--url" if is_on_server(name) else "--device"
    return ["--backend", name.removesuffix("-cuda"), place, _device_of(name, device), "--precision", precision]


def has_torch() -> bool:
    """Whether the reference is available here; imports nothing."""
    return not registry.backend_entry(REFERENCE_BACKEND).missing()


def describe(session: Backend, bundle: Bundle) -> BackendInfo:
    """Facts of an opened session for the record."""
    threads = (
        available_threads() if session.device == "cpu" and session.backend in ("onnxruntime", "openvino") else None
    )
    if session.backend in (REFERENCE_BACKEND, "torch-compile"):
        from spmdeploy.bench.torch_backends import threads_of

        threads = threads_of(session.device)
    return BackendInfo(
        device=session.device,
        precision=session.precision,
        provider=session.provider,
        threads=threads,
        file_bytes=loaded_bytes(session, bundle),
        weights_bytes=bundle.manifest.generator.parameters * (4 if session.precision in ("fp32", "tf32") else 2),
    )


def loaded_bytes(session: Backend, bundle: Bundle) -> int | None:
    """Bytes of the graphs or engines loaded so far, shared weights counted once; None for backends without files."""
    if isinstance(session, TensorRtSession):
        return session.engine_bytes
    if isinstance(session, OpenVinoSession):
        graphs: Iterable[GraphRecord] = session.loaded
    elif isinstance(session, OnnxRuntimeSession):
        graphs = filter(None, (_record_of(session, bundle, name) for name in session.loaded))
    else:
        return None
    return sum(bundle.files()[name] for name in {name for graph in graphs for name in graph.files})


def graph_of(session: Backend, bundle: Bundle) -> GraphRecord | None:
    """The record of the edit graph that a session has loaded; only ONNX Runtime is profiled."""
    return _record_of(session, bundle, EDIT) if session.backend == "onnxruntime" else None


def _record_of(session: Backend, bundle: Bundle, name: str) -> GraphRecord | None:
    names = (ON_CPU[name], name) if session.device == "cpu" else (name,)
    if isinstance(session, PlainOnnxRuntimeSession):
        names = (name,)
    records = {record.graph: record for record in bundle.manifest.graphs if record.precision == session.precision}
    return next((records[name] for name in names if name in records), None)


def _device_of(name: str, device: str) -> str:
    if is_on_server(name):
        return device
    if device != "auto":
        check_device(device)
    if _is_gpu_only(name):
        if device == "cpu":
            raise UnavailableError(f"{name} runs on GPUs only, but --device is cpu", "leave --device out")
        return "cuda:0" if device == "auto" else device
    if name in ("onnxruntime", "onnxruntime-plain", "openvino", "openvino-plain"):
        if device not in ("auto", "cpu"):
            raise UnavailableError(
                f"{name} means the CPU here, but --device is {device}", "on a GPU: --backend onnxruntime-cuda"
            )
        return "cpu"
    return device


def _open_torch(bundle: Bundle, name: str, device: str, precision: str) -> Backend:
    registry.backend_entry(REFERENCE_BACKEND).require_installed()
    from spmdeploy.bench.torch_backends import open_baseline

    return open_baseline(bundle, name, device, precision)


class PlainOnnxRuntimeSession(OnnxRuntimeSession):
    """The graph as exported, without the optimizations of the bundle's graph for CPUs: a baseline."""


def _open_plain_onnxruntime(bundle: Bundle, precision: str) -> Backend:
    if precision not in ("auto", "fp32"):
        raise UnavailableError("onnxruntime-plain computes in fp32 on CPUs", "leave --precision out")
    return PlainOnnxRuntimeSession(bundle.read_graph(bundle.graph(EDIT, "fp32")), "fp32")


def _open_plain_openvino(bundle: Bundle, precision: str) -> Backend:
    registry.backend_entry("openvino").require_installed()
    library = import_openvino()
    feature, problem = bf16_support()
    if precision == "bf16" and not feature:
        raise UnavailableError(f"bf16 is refused: {problem}", "use --precision fp32")
    if precision not in ("auto", "fp32", "bf16"):
        raise UnavailableError("openvino-plain computes in fp32 and bf16", "leave --precision out")
    return OpenVinoSession(library, library.Core(), bundle, "bf16" if precision == "bf16" else "fp32", as_exported=True)


class DeviceRun(Protocol):
    """One batch whose inputs and output stay in the GPU's memory.

    The engine scope times it by events on `stream`. ONNX Runtime computes on a stream of its own and waits for it
    before it returns: there the events enclose the call.
    """

    stream: int

    def launch(self) -> None:
        """Enqueues the edit on the stream; need not wait for it."""

    def fetch(self) -> NDArray[np.uint8]:
        """The edited images of the last launch, uint8 (B, S, S, 3). Call after the stream is synchronized."""


def device_run(
    session: Backend, batch: ModelInput, device: Device, stack: ExitStack, cuda_graphs: bool = True
) -> DeviceRun:
    """Copies a batch to the session's GPU until the stack is closed.

    Args:
        session: On a GPU.
        batch: Arrays (B, S, S[, 3]).
        device: The session's GPU.
        stack: Frees the memory when it is closed.
        cuda_graphs: Whether engines may replay CUDA graphs.

    Raises:
        UnavailableError: The session takes no inputs in GPU memory.
    """
    if isinstance(session, TensorRtSession | OnnxRuntimeSession):
        return _DeviceArrays(session, batch, device, stack, cuda_graphs)
    if session.backend.startswith("torch"):
        from spmdeploy.bench.torch_backends import BaselineSession, TorchDeviceRun

        assert isinstance(session, BaselineSession)
        return TorchDeviceRun(session, batch)
    raise UnavailableError(f"{session.backend} accepts no inputs in the GPU's memory", "use --scope edit")


def time_on_device(run: DeviceRun, device: Device) -> tuple[float, float]:
    """Milliseconds of one edit on the device, and milliseconds of its launch on the host."""
    with device.current():
        with device.timed(run.stream) as passed:
            called = time.perf_counter()
            run.launch()
            launched = time.perf_counter()
        return passed[0], (launched - called) * 1000


class _DeviceArrays:
    """`DeviceRun` for libraries that take device addresses."""

    def __init__(
        self,
        session: TensorRtSession | OnnxRuntimeSession,
        batch: ModelInput,
        device: Device,
        stack: ExitStack,
        cuda_graphs: bool,
    ) -> None:
        self._device = device
        self._stack = stack
        with device.current():
            self.stream = device.stream()
            stack.callback(self._release, device.destroy_stream, self.stream)
            self._inputs = {name: self._upload(array, name) for name, array in batch._asdict().items()}
            self._edited = self._allocate(batch.image, "edited")
            device.synchronize(self.stream)
        if isinstance(session, TensorRtSession):
            self._launch: Callable[[], None] = partial(
                session.run_device, self._inputs, {"edited": self._edited}, self.stream, cuda_graphs=cuda_graphs
            )
            stack.callback(session.synchronize)
        else:
            self._launch = session.bound(self._inputs, {"edited": self._edited})

    def launch(self) -> None:
        self._launch()

    def fetch(self) -> NDArray[np.uint8]:
        edited = np.empty(self._edited.shape, np.uint8)
        with self._device.current():
            pinned = self._device.pinned(edited.nbytes, "the edited images")
            try:
                self._device.copy_out(pinned, self._edited.address, self.stream)
                self._device.synchronize(self.stream)
                edited[:] = pinned.reshape(edited.shape)
            finally:
                self._device.free_pinned(pinned)
        return edited

    def _upload(self, array: NDArray[Any], name: str) -> DeviceArray:
        allocated = self._allocate(array, name)
        pinned = self._device.pinned(array.nbytes, name)
        try:
            pinned[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            self._device.copy_in(allocated.address, pinned, self.stream)
            self._device.synchronize(self.stream)
        finally:
            self._device.free_pinned(pinned)
        return allocated

    def _allocate(self, like: NDArray[Any], name: str) -> DeviceArray:
        address = self._device.allocate(like.nbytes, name)
        self._stack.callback(self._release, self._device.free, address)
        return DeviceArray(address, like.shape, like.dtype.name)

    def _release(self, release: Callable[[int], None], handle: int) -> None:
        with self._device.current():
            release(handle)
