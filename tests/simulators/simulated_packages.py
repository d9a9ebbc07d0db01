"""The simulated GPU behind the interfaces of libcuda (by ctypes), cuda.core with cuda.bindings, and PyCUDA.

The classes have no public members that the real ones do not have; tests/gpu/test_cuda_core.py compares them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.simulators.simulated_gpu import Code, SimulatedCudaError, SimulatedGpu

PACKAGES = ("pycuda", "cuda-core")


def plug_in(monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, package: str = "cuda-core") -> None:
    """Makes `gpu` the machine's, with one of `PACKAGES` installed, or neither for ""."""
    monkeypatch.setattr("spmdeploy.gpu.driver.ctypes.CDLL", lambda name: Libcuda(gpu))
    for name in ("pycuda", "pycuda.driver", "cuda", "cuda.core", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)  # an import that fails
    if package == "pycuda":
        parent = ModuleType("pycuda")
        parent.VERSION_TEXT, parent.driver = "2025.1.2", PyCudaDriver(gpu)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pycuda", parent)
        monkeypatch.setitem(sys.modules, "pycuda.driver", parent.driver)
        monkeypatch.setattr("spmdeploy.gpu.pycuda.PyCuda._contexts", {})
    if package == "cuda-core":
        cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        cuda.core, cuda.bindings = simulated_cuda_core(gpu), bindings  # type: ignore[attr-defined]
        bindings.driver = CudaBindings(gpu)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda", cuda)
        monkeypatch.setitem(sys.modules, "cuda.core", cuda.core)
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", bindings.driver)


class Libcuda:
    """The driver's library as ctypes shows it: functions that take C values and return a code."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        major, minor = map(int, gpu.capability.split("."))
        wrapped = {
            "cuInit": lambda flags: gpu.call("cuInit", context=False),
            "cuDriverGetVersion": lambda out: _write(out, 13000),
            "cuDeviceGetCount": lambda out: _write(out, 1),
            "cuDeviceGet": lambda out, ordinal: _write(out, gpu.device(ordinal)),
            "cuDeviceGetName": lambda name, size, device: _write(name, gpu.name.encode()),
            "cuDeviceGetAttribute": lambda out, number, device: _write(out, {75: major, 76: minor}[number]),
            "cuDeviceGetUuid": lambda out, device: ctypes.memmove(out._obj, bytes(range(16)), 16),
            "cuPointerGetAttribute": lambda out, number, address: _write(out, pointer_attribute(number, address.value)),
            "cuEventCreate": lambda out, flags: _write(out, gpu.new_event()),
            "cuEventRecord": lambda event, stream: gpu.record(event.value, stream.value or 0),
            "cuStreamWaitEvent": lambda stream, event, flags: gpu.wait(stream.value or 0, event.value),
            "cuEventDestroy_v2": lambda event: gpu.destroy_event(event.value),
            "cuStreamBeginCapture_v2": lambda stream, mode: _begin_capture(gpu, stream.value, mode),
            "cuStreamEndCapture": lambda stream, out: _write(out, gpu.end_capture(stream.value)),
            "cuGraphInstantiateWithFlags": lambda out, graph, flags: _write(out, gpu.instantiate(graph.value)),
            "cuGraphDestroy": lambda graph: gpu.destroy_graph("cuGraphDestroy", graph.value),
            "cuGraphLaunch": lambda graph, stream: gpu.launch(graph.value, stream.value or 0),
            "cuGraphExecDestroy": lambda graph: gpu.destroy_graph("cuGraphExecDestroy", graph.value),
        }

        def pointer_attribute(number: int, address: int) -> int:
            kind = gpu.memory_type(address)
            if not kind:
                raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_VALUE)
            return {2: kind, 9: 0}[number]

        for name, function in wrapped.items():
            setattr(self, name, _returning_code(function))


def _begin_capture(gpu: SimulatedGpu, stream: int, mode: int) -> None:
    assert mode == 1, "other threads can break this capture"
    gpu.begin_capture(stream)


def _write(out: Any, value: Any) -> None:
    getattr(out, "_obj", out).value = value


def _returning_code(function: Callable[..., Any]) -> Callable[..., int]:
    def answer(*arguments: Any) -> int:
        try:
            function(*arguments)
        except SimulatedCudaError as exc:
            return int(exc.code)
        return 0

    return answer


class CudaBindings:
    """The functions of `cuda.bindings.driver` that are used: each returns its code and then its values."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        wrapped = {
            "cuCtxGetCurrent": gpu.get_current,
            "cuCtxSetCurrent": gpu.set_current,
            "cuMemGetInfo": gpu.mem_info,
            "cuMemAlloc": gpu.allocate,
            "cuMemFree": gpu.free,
            "cuMemHostAlloc": lambda size, flags: gpu.pinned(size).ctypes.data,
            "cuMemFreeHost": gpu.free_pinned,
        }
        for name, function in wrapped.items():
            setattr(self, name, _returning_tuple(function))


def _returning_tuple(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def answer(*arguments: Any) -> tuple[Any, ...]:
        try:
            value = function(*arguments)
        except SimulatedCudaError as exc:
            return (exc.code, None)
        return (Code.CUDA_SUCCESS,) if value is None else (Code.CUDA_SUCCESS, *np.atleast_1d(value).tolist())

    return answer


def simulated_cuda_core(gpu: SimulatedGpu) -> Any:
    """The module `cuda.core` on this GPU."""
    core = ModuleType("cuda.core")
    initialized = threading.local()  # a Device must be made current in each thread

    class CUDAError(Exception):
        pass

    def do(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SimulatedCudaError as exc:
            raise CUDAError(f"{exc.code.name}: an explanation") from exc

    @dataclass
    class StreamOptions:
        nonblocking: bool = True
        priority: int | None = None

    @dataclass
    class EventOptions:
        timing_enabled: bool = False
        blocking_sync: bool = False
        ipc_enabled: bool = False

    @dataclass
    class LaunchConfig:
        grid: Any = None
        cluster: Any = None
        block: Any = None
        shmem_size: int | None = None

    class Event:
        def __init__(self, timing: bool) -> None:
            self._handle, self._timing = do(gpu.new_event), timing

        def close(self) -> None:
            do(gpu.destroy_event, self._handle)

        def sync(self) -> None:
            do(gpu.synchronize_event, self._handle)

        def __sub__(self, other: Event) -> float:
            assert self._timing and other._timing, "an event without timing"
            return gpu.milliseconds

    class Stream:
        def __init__(self, handle: int) -> None:
            self._handle = handle

        @property
        def handle(self) -> int:
            return self._handle

        @staticmethod
        def from_handle(handle: int) -> Stream:
            assert handle not in (0, 1, 2), "a default stream"
            return Stream(handle)

        def close(self) -> None:
            do(gpu.destroy_stream, self._handle)

        def sync(self) -> None:
            do(gpu.synchronize, self._handle)

        def record(self, event: Event | None = None, options: Any = None) -> Event:
            event = event or Event(False)
            do(gpu.record, event._handle, self._handle)
            return event

        def wait(self, event_or_stream: Event | Stream) -> None:
            if isinstance(event_or_stream, Event):
                do(gpu.wait, self._handle, event_or_stream._handle)
                return
            event = event_or_stream.record()
            do(gpu.wait, self._handle, event._handle)
            self._keep_until_waited(event)

        def _keep_until_waited(self, event: Event) -> None:
            """The driver destroys an event only when no stream waits for it any more."""
            del gpu.events[event._handle]

        def create_graph_builder(self) -> GraphBuilder:
            return GraphBuilder(self)

    class GraphBuilder:
        def __init__(self, stream: Stream) -> None:
            self._stream, self._capturing, self._template = stream, False, 0

        def begin_building(self, mode: str = "relaxed") -> GraphBuilder:
            assert mode == "thread_local", "other threads can break this capture"
            do(gpu.begin_capture, self._stream.handle)
            self._capturing = True
            return self

        def end_building(self) -> GraphBuilder:
            if gpu.stream(self._stream.handle).broken:
                raise RuntimeError("Build process encountered an error and has been invalidated.")
            self._template = do(gpu.end_capture, self._stream.handle)
            self._capturing = False
            return self

        def complete(self, options: Any = None) -> Graph:
            return Graph(do(gpu.instantiate, self._template))

        def close(self) -> None:
            if self._template:
                do(gpu.destroy_graph, "cuGraphDestroy", self._template)
                self._template = 0
            if self._capturing:
                self._capturing = False
                do(gpu.end_capture, self._stream.handle)

    class Graph:
        def __init__(self, handle: int) -> None:
            self._handle = handle

        def launch(self, stream: Stream) -> None:
            do(gpu.launch, self._handle, stream.handle)

        def close(self) -> None:
            do(gpu.destroy_graph, "cuGraphExecDestroy", self._handle)

    class Buffer:
        def __init__(self, address: int, size: int) -> None:
            self._address, self._size = address, size

        @staticmethod
        def from_handle(ptr: int, size: int, mr: Any = None, owner: Any = None, *, stream: Any = None) -> Buffer:
            return Buffer(ptr, size)

        @property
        def device_id(self) -> int:
            return 0

        @property
        def is_device_accessible(self) -> bool:
            return gpu.memory_type(self._address) != 0

        @property
        def is_host_accessible(self) -> bool:
            return gpu.memory_type(self._address) != 2

        @property
        def is_managed(self) -> bool:
            return False

        def copy_from(self, src: Buffer, *, stream: Stream, options: Any = None) -> None:
            assert src._size == self._size
            do(gpu.copy, self._address, src._address, self._size, stream.handle)

        def fill(self, value: int, *, stream: Stream) -> None:
            do(gpu.clear, self._address, value, self._size, stream.handle)

    class Device:
        def __init__(self, device_id: int) -> None:
            self._ordinal = do(gpu.device, device_id)

        def set_current(self, ctx: Any = None) -> None:
            do(gpu.set_current, gpu.PRIMARY)
            initialized.here = True

        def create_stream(self, obj: Any = None, options: StreamOptions | None = None) -> Stream:
            self._check()
            assert options is not None and options.nonblocking, "it would wait for the host program's legacy stream"
            return Stream(do(gpu.new_stream))

        def create_event(self, options: EventOptions | None = None) -> Event:
            self._check()
            return Event(bool(options and options.timing_enabled))

        def _check(self) -> None:
            if not hasattr(initialized, "here"):
                raise CUDAError("Device 0 is not yet initialized, perhaps you forgot to call .set_current() first?")

    class Kernel:
        def __init__(self, name: str) -> None:
            self._name = name

    class ObjectCode:
        @staticmethod
        def from_ptx(module: bytes, *, name: str = "", symbol_mapping: Any = None) -> ObjectCode:
            do(gpu.load_kernels, module)
            return ObjectCode()

        def get_kernel(self, name: str) -> Kernel:
            return Kernel(name)

    def launch(stream: Stream, config: LaunchConfig, kernel: Kernel, *kernel_args: Any) -> None:
        do(gpu.launch_kernel, kernel._name, config.grid, config.block, stream.handle, kernel_args)

    classes: list[Any] = [StreamOptions, EventOptions, LaunchConfig, Event, Stream, Buffer, Device, Kernel, ObjectCode]
    for kind in classes:
        setattr(core, kind.__name__, kind)
    core.launch, core.__version__ = launch, "1.2.2"  # type: ignore[attr-defined]
    core.LEGACY_DEFAULT_STREAM = core.PER_THREAD_DEFAULT_STREAM = Stream(0)  # type: ignore[attr-defined]
    core._graph_classes = [GraphBuilder, Graph]  # type: ignore[attr-defined] # in cuda.core.graph
    return core


class PyCudaDriver:
    """`pycuda.driver`, with its own stack of contexts and with objects that free themselves."""

    class Error(Exception):
        pass

    class MemoryError(Error, MemoryError):
        pass

    class LogicError(Error):
        pass

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        outer = self

        def guarded(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return function(*arguments)
            except SimulatedCudaError as exc:
                kind = outer.MemoryError if exc.code == Code.CUDA_ERROR_OUT_OF_MEMORY else outer.LogicError
                text = exc.code.name.removeprefix("CUDA_ERROR_").lower().replace("_", " ")
                raise kind(f"{gpu.calls[-1]} failed: {text}") from exc

        self._guarded = guarded
        stacks = threading.local()

        class Context:
            def __init__(self, handle: int) -> None:
                self.handle = handle

            def push(self) -> None:
                if Context.stack():
                    guarded(gpu.pop)
                guarded(gpu.push, self.handle)
                Context.stack().append(self)

            @staticmethod
            def pop() -> None:
                guarded(gpu.pop)
                Context.stack().pop()
                if Context.stack():
                    guarded(gpu.push, Context.stack()[-1].handle)

            @staticmethod
            def stack() -> list[Context]:
                return stacks.__dict__.setdefault("stack", [])

            def detach(self) -> None:
                raise AssertionError("detach leaves the primary context current")

        class Device:
            def __init__(self, ordinal: int) -> None:
                self._ordinal = guarded(gpu.device, ordinal)

            def retain_primary_context(self) -> Context:
                return Context(gpu.PRIMARY)

        class Stream:
            def __init__(self, flags: int = 0) -> None:
                assert flags == 1, "it would wait for the host program's legacy stream"
                self.handle = guarded(gpu.new_stream)

            def synchronize(self) -> None:
                guarded(gpu.synchronize, self.handle)

            def __del__(self) -> None:
                if getattr(self, "handle", None) in gpu.streams:
                    gpu.push(gpu.PRIMARY)  # PyCUDA makes its context current for this
                    gpu.destroy_stream(self.handle)
                    gpu.pop()

        class Event:
            def __init__(self, flags: int = 0) -> None:
                self.handle, self._timing = guarded(gpu.new_event), flags == 0

            def record(self, stream: Stream) -> Event:
                guarded(gpu.record, self.handle, stream.handle)
                return self

            def synchronize(self) -> None:
                guarded(gpu.synchronize_event, self.handle)

            def time_till(self, other: Event) -> float:
                assert self._timing and other._timing, "an event without timing"
                return gpu.milliseconds

            def __del__(self) -> None:
                gpu.events.pop(self.handle, None)

        class DeviceAllocation:
            def __init__(self, size: int) -> None:
                self._address = guarded(gpu.allocate, size)

            def __int__(self) -> int:
                return int(self._address)

            def free(self) -> None:
                guarded(gpu.free, self._address)

        class Pinned(np.ndarray):
            """An array whose `base` can be freed, as PyCUDA's."""

            @property
            def base(self) -> Any:  # type: ignore[override]
                return SimpleNamespace(free=lambda: guarded(gpu.free_pinned, self.ctypes.data))

        class Module:
            def get_function(self, name: str) -> Callable[..., None]:
                def function(*arguments: Any, grid: Any, block: Any, stream: Stream) -> None:
                    values = [value if isinstance(value, np.int32) else int(value) for value in arguments]
                    guarded(gpu.launch_kernel, name, grid, block[0], stream.handle, values)

                return function

        def module_from_buffer(buffer: bytes) -> Module:
            guarded(gpu.load_kernels, buffer)
            return Module()

        self.Context, self.Device, self.Stream, self.Event = Context, Device, Stream, Event
        self.mem_alloc, self.module_from_buffer = DeviceAllocation, module_from_buffer
        self.pagelocked_empty = lambda size, dtype: guarded(gpu.pinned, size).view(Pinned)

    def init(self) -> None:
        self._guarded(lambda: self._gpu.call("cuInit", context=False))

    def mem_get_info(self) -> tuple[int, int]:
        free, total = self._guarded(self._gpu.mem_info)
        return free, total

    def memcpy_htod_async(self, address: int, array: np.ndarray, stream: Any) -> None:
        self._guarded(self._gpu.copy, address, array.ctypes.data, array.nbytes, stream.handle)

    def memcpy_dtoh_async(self, array: np.ndarray, address: int, stream: Any) -> None:
        self._guarded(self._gpu.copy, array.ctypes.data, address, array.nbytes, stream.handle)

    def memcpy_dtod_async(self, address: int, source: int, size: int, stream: Any) -> None:
        self._guarded(self._gpu.copy, address, source, size, stream.handle)

    def memset_d8_async(self, address: int, value: int, size: int, stream: Any) -> None:
        self._guarded(self._gpu.clear, address, value, size, stream.handle)
