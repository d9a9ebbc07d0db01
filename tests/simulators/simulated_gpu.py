"""A GPU in Python, as strict as a real one where mistakes are made, behind PyCUDA, cuda-python and the driver itself.

Work that is queued happens when somebody waits for it and not before; memory holds rubbish until it is written and
after it is freed; host memory must be page-locked; nothing works without a current context; a stream that is captured
does nothing. Every call is written down in `calls`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from .simulated_ptx import Kernel, execute, read_module

Work = Callable[[], None]
RUBBISH = 0xCD


class Code(IntEnum):
    """The driver's codes that are simulated."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906


class Refused(Exception):
    """What a call answers instead of doing what it is asked."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


class Stream:
    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.done = 0  # how much of everything ever queued has been done
        self.capture: list[Work] | None = None
        self.broken = False

    def add(self, work: Work) -> None:
        (self.queue if self.capture is None else self.capture).append(work)

    @property
    def end(self) -> int:
        return self.done + len(self.queue)

    def drain(self, upto: int | None = None) -> None:
        while self.queue and (upto is None or self.done < upto):
            work = self.queue.pop(0)
            self.done += 1
            work()


class SimulatedGpu:
    """One device with `capacity` bytes. `fails` holds codes that calls answer, by the name of the driver's function."""

    PRIMARY = 0xC0

    def __init__(self, capacity: int = 1 << 30, name: str = "NVIDIA GeForce RTX 3060", capability: str = "8.6") -> None:
        self.capacity, self.name, self.capability = capacity, name, capability
        self.calls: list[str] = []
        self.fails: dict[str, Code] = {}
        self.retained = 0
        self.memory: dict[int, np.ndarray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, Any] = {}
        self.modules: dict[int, dict[str, Kernel]] = {}
        self.functions: dict[int, Kernel] = {}
        self.copied: list[tuple[str, int]] = []  # between host and device: function and bytes
        self.milliseconds = 1.5
        self._contexts = threading.local()
        self._next = 0x7F00_0000_0000

    # -- what tests look at

    @property
    def contexts(self) -> list[int]:
        """This thread's stack of current contexts."""
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        stack: list[int] = self._contexts.stack
        return stack

    @property
    def used(self) -> int:
        return sum(array.size for array in self.memory.values())

    @property
    def left_behind(self) -> dict[str, int]:
        """Everything that somebody made and did not give back."""
        kinds = {
            "memory": self.memory,
            "host": self.host,
            "streams": self.streams,
            "graphs": self.graphs,
            "events": self.events,
            "modules": self.modules,
        }
        return {name: len(kind) for name, kind in kinds.items() if kind}

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """A view of device memory; an address or a size that is not in one piece is illegal, as on the device."""
        for start, array in self.memory.items():
            if start <= address and address + size <= start + array.size:
                return array[address - start : address - start + size]
        raise Refused(Code.CUDA_ERROR_ILLEGAL_ADDRESS)

    # -- what the driver does

    def call(self, function: str, *, context: bool = True, unsafe: bool = False) -> None:
        """Writes a call down, and answers it with a code where there is a reason to."""
        self.calls.append(function)
        if function in self.fails:
            raise Refused(self.fails[function])
        if context and not self.contexts:
            raise Refused(Code.CUDA_ERROR_INVALID_CONTEXT)
        if unsafe:
            for stream in self.streams.values():
                if stream.capture is not None:
                    stream.broken = True
                    raise Refused(Code.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def address(self) -> int:
        self._next += 0x1000_0000
        return self._next

    def allocate(self, size: int) -> int:
        self.call("cuMemAlloc", unsafe=True)
        if size <= 0:
            raise Refused(Code.CUDA_ERROR_INVALID_VALUE)
        if self.used + size > self.capacity:
            raise Refused(Code.CUDA_ERROR_OUT_OF_MEMORY)
        address = self.address()
        self.memory[address] = np.full(size, RUBBISH, np.uint8)
        return address

    def free(self, address: int) -> None:
        self.call("cuMemFree", unsafe=True)
        if address not in self.memory:
            raise Refused(Code.CUDA_ERROR_INVALID_VALUE)
        assert not any(stream.queue for stream in self.streams.values()), "freed while somebody may work there"
        self.memory.pop(address)[:] = RUBBISH

    def pinned(self, size: int) -> np.ndarray:
        self.call("cuMemHostAlloc", unsafe=True)
        array = np.full(size, RUBBISH, np.uint8)
        self.host[array.ctypes.data] = array
        return array

    def free_pinned(self, address: int) -> None:
        self.call("cuMemFreeHost", unsafe=True)
        if address not in self.host:
            raise Refused(Code.CUDA_ERROR_INVALID_VALUE)
        self.host.pop(address)[:] = RUBBISH

    def new_stream(self, flags: int) -> int:
        self.call("cuStreamCreate")
        assert flags == 1, "a stream that waits for the legacy stream disturbs the host program"
        return self.foreign_stream()

    def foreign_stream(self) -> int:
        """A stream of the host program."""
        handle = self.address()
        self.streams[handle] = Stream()
        return handle

    def destroy_stream(self, handle: int) -> None:
        self.call("cuStreamDestroy")
        self.stream(handle)
        del self.streams[handle]

    def stream(self, handle: int) -> Stream:
        if handle not in self.streams:
            raise Refused(Code.CUDA_ERROR_INVALID_VALUE)
        return self.streams[handle]

    def copy(self, function: str, address: int, host: int, size: int, handle: int) -> None:
        self.call(function)
        if not any(start <= host and host + size <= start + array.size for start, array in self.host.items()):
            raise AssertionError("an asynchronous copy wants page-locked memory")

        self.copied.append((function, size))

        def work() -> None:
            device = self.bytes_at(address, size)
            if function == "cuMemcpyHtoDAsync":
                device[:] = np.frombuffer(ctypes.string_at(host, size), np.uint8)
            else:
                ctypes.memmove(host, device.tobytes(), size)

        self.stream(handle).add(work)

    def synchronize(self, handle: int) -> None:
        self.call("cuStreamSynchronize", unsafe=True)
        self.stream(handle).drain()

    def load_module(self, text: bytes) -> int:
        self.call("cuModuleLoadData", unsafe=True)
        handle = self.address()
        self.modules[handle] = read_module(text.decode())
        return handle

    def unload_module(self, module: int) -> None:
        self.call("cuModuleUnload", unsafe=True)
        del self.modules[module]

    def function(self, module: int, name: bytes) -> int:
        self.call("cuModuleGetFunction")
        handle = self.address()
        self.functions[handle] = self.modules[module][name.decode()]
        return handle

    def launch_kernel(self, function: int, *launch: Any) -> None:
        *shape, shared, stream, places, extra = launch
        kernel = self.functions[function]
        self.call(f"kernel {kernel.name}")
        assert shape[1:3] == [1, 1] and shape[4:] == [1, 1] and shared == 0 and extra is None
        values = kernel.values(places)  # the driver reads them now
        self.stream(stream.value).add(lambda: execute(kernel, values, shape[0], shape[3], self.bytes_at))

    def clear(self, address: int, value: int, size: int, handle: int) -> None:
        self.call("cuMemsetD8Async")
        self.stream(handle).add(lambda: self.bytes_at(address, size).fill(value))

    def copy_within(self, address: int, source: int, size: int, handle: int) -> None:
        self.call("cuMemcpyDtoDAsync")

        def work() -> None:
            self.bytes_at(address, size)[:] = self.bytes_at(source, size)

        self.stream(handle).add(work)

    def new_event(self) -> int:
        self.call("cuEventCreate")
        handle = self.address()
        self.events[handle] = None
        return handle

    def record(self, event: int, handle: int) -> None:
        self.call("cuEventRecord")
        stream = self.stream(handle)
        self.events[event] = (stream, stream.end)

    def wait(self, handle: int, event: int) -> None:
        self.call("cuStreamWaitEvent")
        other, upto = self.events[event]
        self.stream(handle).add(lambda: other.drain(upto))

    def destroy_event(self, event: int) -> None:
        self.call("cuEventDestroy")
        del self.events[event]

    def begin_capture(self, handle: int, mode: int) -> None:
        self.call("cuStreamBeginCapture")
        assert mode == 1, "a capture that other threads can spoil"
        stream = self.stream(handle)
        stream.capture, stream.broken = [], False

    def end_capture(self, handle: int) -> int:
        stream = self.stream(handle)
        captured, stream.capture = stream.capture, None  # whatever comes of it, the capture is over
        self.call("cuStreamEndCapture")
        if stream.broken or captured is None:
            raise Refused(Code.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        return self._new_graph(captured)

    def instantiate(self, template: int) -> int:
        self.call("cuGraphInstantiate")
        return self._new_graph(self.graphs[template])

    def _new_graph(self, work: list[Work]) -> int:
        handle = self.address()
        self.graphs[handle] = work
        return handle

    def launch(self, graph: int, handle: int) -> None:
        self.call("cuGraphLaunch")
        for work in self.graphs[graph]:
            self.stream(handle).add(work)

    def destroy_graph(self, function: str, graph: int) -> None:
        self.call(function)
        if graph not in self.graphs:
            raise Refused(Code.CUDA_ERROR_INVALID_VALUE)
        del self.graphs[graph]

    def retain(self, ordinal: int) -> int:
        self.call("cuDevicePrimaryCtxRetain", context=False)
        self.retained += 1
        return self.PRIMARY

    def release(self) -> None:
        self.call("cuDevicePrimaryCtxRelease", context=False)
        self.retained -= 1

    def push(self, context: int) -> None:
        self.call("cuCtxPushCurrent", context=False)
        self.contexts.append(context)

    def pop(self) -> int:
        self.call("cuCtxPopCurrent")
        return self.contexts.pop()

    def mem_info(self) -> tuple[int, int]:
        self.call("cuMemGetInfo")
        return self.capacity - self.used, self.capacity

    def pointer_attribute(self, attribute: int, address: int) -> int:
        self.call("cuPointerGetAttribute")
        if any(start <= address < start + array.size for start, array in self.memory.items()):
            return {2: 2, 9: 0}[attribute]
        if any(start <= address < start + array.size for start, array in self.host.items()):
            return {2: 1, 9: 0}[attribute]
        raise Refused(Code.CUDA_ERROR_INVALID_VALUE)

    def device(self, ordinal: int) -> int:
        self.call("cuDeviceGet", context=False)
        if ordinal != 0:
            raise Refused(Code.CUDA_ERROR_INVALID_DEVICE)
        return 0


# --------------------------------------------------------------------------------------------------- libcuda by ctypes


class Library:
    """libcuda as ctypes shows it: functions that take C values and return a code."""

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
            "cuPointerGetAttribute": lambda out, number, address: _write(
                out, gpu.pointer_attribute(number, address.value)
            ),
            "cuEventCreate": lambda out, flags: _write(out, gpu.new_event()),
            "cuEventRecord": lambda event, stream: gpu.record(event.value, stream.value),
            "cuStreamWaitEvent": lambda stream, event, flags: gpu.wait(stream.value, event.value),
            "cuEventDestroy_v2": lambda event: gpu.destroy_event(event.value),
            "cuStreamBeginCapture_v2": lambda stream, mode: gpu.begin_capture(stream.value, mode),
            "cuStreamEndCapture": lambda stream, out: _write(out, gpu.end_capture(stream.value)),
            "cuGraphInstantiateWithFlags": lambda out, graph, flags: _write(out, gpu.instantiate(graph.value)),
            "cuGraphDestroy": lambda graph: gpu.destroy_graph("cuGraphDestroy", graph.value),
            "cuGraphLaunch": lambda graph, stream: gpu.launch(graph.value, stream.value),
            "cuGraphExecDestroy": lambda graph: gpu.destroy_graph("cuGraphExecDestroy", graph.value),
            "cuModuleLoadData": lambda out, text: _write(out, gpu.load_module(text.value)),
            "cuModuleGetFunction": lambda out, module, name: _write(out, gpu.function(module.value, name.value)),
            "cuModuleUnload": lambda module: gpu.unload_module(module.value),
            "cuLaunchKernel": lambda function, *launch: gpu.launch_kernel(function.value, *launch),
            "cuMemsetD8Async": lambda address, value, size, stream: gpu.clear(
                address.value, value.value, size.value, stream.value
            ),
            "cuMemcpyDtoDAsync_v2": lambda address, source, size, stream: gpu.copy_within(
                address.value, source.value, size.value, stream.value
            ),
        }
        for name, function in wrapped.items():
            setattr(self, name, _returning_code(function))


def _write(out: Any, value: Any) -> None:
    getattr(out, "_obj", out).value = value


def _returning_code(function: Callable[..., Any]) -> Callable[..., int]:
    def answer(*arguments: Any) -> int:
        try:
            function(*arguments)
        except Refused as refused:
            return int(refused.code)
        return 0

    return answer


# -------------------------------------------------------------------------------------------------------- cuda-python


class CudaBindings:
    """`cuda.bindings.driver`: every function returns its code and then its values."""

    CUresult = Code
    CUstreamCaptureMode = IntEnum(
        "CUstreamCaptureMode",
        {f"CU_STREAM_CAPTURE_MODE_{name}": i for i, name in enumerate(("GLOBAL", "THREAD_LOCAL"))},
    )
    CUpointer_attribute = IntEnum(
        "CUpointer_attribute", {"CU_POINTER_ATTRIBUTE_MEMORY_TYPE": 2, "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": 9}
    )

    def __init__(self, gpu: SimulatedGpu) -> None:
        wrapped = {
            "cuInit": lambda flags: gpu.call("cuInit", context=False),
            "cuDeviceGet": gpu.device,
            "cuDevicePrimaryCtxRetain": gpu.retain,
            "cuDevicePrimaryCtxRelease": lambda device: gpu.release(),
            "cuCtxPushCurrent": gpu.push,
            "cuCtxPopCurrent": gpu.pop,
            "cuMemGetInfo": gpu.mem_info,
            "cuMemAlloc": gpu.allocate,
            "cuMemFree": gpu.free,
            "cuMemHostAlloc": lambda size, flags: gpu.pinned(size).ctypes.data,
            "cuMemFreeHost": gpu.free_pinned,
            "cuStreamCreate": gpu.new_stream,
            "cuStreamDestroy": gpu.destroy_stream,
            "cuStreamSynchronize": gpu.synchronize,
            "cuMemcpyHtoDAsync": lambda device, host, size, stream: gpu.copy(
                "cuMemcpyHtoDAsync", device, host, size, stream
            ),
            "cuMemcpyDtoHAsync": lambda host, device, size, stream: gpu.copy(
                "cuMemcpyDtoHAsync", device, host, size, stream
            ),
            "cuEventCreate": lambda flags: gpu.new_event(),
            "cuEventRecord": gpu.record,
            "cuEventElapsedTime": lambda start, end: gpu.milliseconds,
            "cuEventDestroy": gpu.destroy_event,
            "cuStreamWaitEvent": lambda stream, event, flags: gpu.wait(stream, event),
            "cuStreamBeginCapture": gpu.begin_capture,
            "cuStreamEndCapture": gpu.end_capture,
            "cuGraphInstantiate": lambda graph, flags: gpu.instantiate(graph),
            "cuGraphDestroy": lambda graph: gpu.destroy_graph("cuGraphDestroy", graph),
            "cuGraphLaunch": gpu.launch,
            "cuGraphExecDestroy": lambda graph: gpu.destroy_graph("cuGraphExecDestroy", graph),
            "cuPointerGetAttribute": gpu.pointer_attribute,
        }
        for name, function in wrapped.items():
            setattr(self, name, _returning_tuple(function))


def _returning_tuple(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def answer(*arguments: Any) -> tuple[Any, ...]:
        try:
            value = function(*arguments)
        except Refused as refused:
            return (refused.code, None)
        return (Code.CUDA_SUCCESS,) if value is None else (Code.CUDA_SUCCESS, *np.atleast_1d(value).tolist())

    return answer


# -------------------------------------------------------------------------------------------------------------- PyCUDA


class PyCuda:
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
            except Refused as refused:
                kind = outer.MemoryError if refused.code == Code.CUDA_ERROR_OUT_OF_MEMORY else outer.LogicError
                raise kind(f"{gpu.calls[-1]} failed: {refused.code.name.lower()}") from refused

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
                return Context(guarded(gpu.retain, self._ordinal))

        class Stream:
            def __init__(self, flags: int = 0) -> None:
                self.handle = guarded(gpu.new_stream, flags)

            def synchronize(self) -> None:
                guarded(gpu.synchronize, self.handle)

            def __del__(self) -> None:
                if getattr(self, "handle", None) in gpu.streams:
                    gpu.push(gpu.PRIMARY)  # PyCUDA makes its context current for this
                    gpu.destroy_stream(self.handle)
                    gpu.pop()

        class Event:
            def __init__(self, flags: int = 0) -> None:
                self.handle = guarded(gpu.new_event)

            def record(self, stream: Stream) -> Event:
                guarded(gpu.record, self.handle, stream.handle)
                return self

            def time_till(self, other: Event) -> float:
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

        self.Context, self.Device, self.Stream, self.Event = Context, Device, Stream, Event
        self.mem_alloc = DeviceAllocation
        self.pagelocked_empty = lambda size, dtype: guarded(gpu.pinned, size).view(Pinned)

    def init(self) -> None:
        self._guarded(lambda: self._gpu.call("cuInit", context=False))

    def mem_get_info(self) -> tuple[int, int]:
        free, total = self._guarded(self._gpu.mem_info)
        return free, total

    def memcpy_htod_async(self, address: int, array: np.ndarray, stream: Any) -> None:
        arguments = (address, array.ctypes.data, array.nbytes, stream.handle)
        self._guarded(self._gpu.copy, "cuMemcpyHtoDAsync", *arguments)

    def memcpy_dtoh_async(self, array: np.ndarray, address: int, stream: Any) -> None:
        arguments = (address, array.ctypes.data, array.nbytes, stream.handle)
        self._guarded(self._gpu.copy, "cuMemcpyDtoHAsync", *arguments)


# ---------------------------------------------------------------------------------------------------------- plugging in

PACKAGES = ("pycuda", "cuda-python")


def plug_in(monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, package: str = "cuda-python") -> None:
    """Makes `gpu` the machine's, with one of `PACKAGES` installed to talk to it, or neither for ""."""
    monkeypatch.setattr("spmdeploy.gpu.driver.ctypes.CDLL", lambda name: Library(gpu))
    for name in ("pycuda", "pycuda.driver", "cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)  # an import that fails
    if package == "pycuda":
        parent = ModuleType("pycuda")
        parent.VERSION_TEXT, parent.driver = "2025.1.2", PyCuda(gpu)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pycuda", parent)
        monkeypatch.setitem(sys.modules, "pycuda.driver", parent.driver)
        monkeypatch.setattr("spmdeploy.gpu.cuda_bindings.PyCuda._contexts", {})
    if package == "cuda-python":
        cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        cuda.bindings, bindings.driver = bindings, CudaBindings(gpu)  # type: ignore[attr-defined]
        bindings.__version__ = "13.5.0"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda", cuda)
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", bindings.driver)


@contextmanager
def host_context(gpu: SimulatedGpu, handle: int = 0xB0B) -> Iterator[None]:
    """A context of the host program's own, current while ours comes and goes."""
    gpu.contexts.append(handle)
    yield
    assert gpu.contexts == [handle], "the host program's context was disturbed"
    gpu.contexts.pop()
