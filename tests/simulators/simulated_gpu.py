"""A GPU in Python that is as strict as a real one where mistakes happen.

Queued work runs when the host waits for it and not before; memory holds garbage until it is written and after it is
freed; host memory must be page-locked; nothing works without a current context; a stream that is being captured runs
nothing. Kernels are those of kernels.cu, compiled for the host. Every call is recorded in `calls`.
`simulated_packages` puts it behind cuda.core, PyCUDA and the driver's library.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmdeploy.gpu.device import KERNELS

Work = Callable[[], None]
GARBAGE = 0xCD
ALIGNMENT = 256
_GUARD = 1024  # bytes before and after each allocation that a kernel must not write to
_HERE = Path(__file__).parent


class Code(IntEnum):
    """The driver's codes that are simulated."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906


class SimulatedCudaError(Exception):
    """A call that failed with a code."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


class Stream:
    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.done = 0  # number of all works ever queued that are done
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
    """One device with `capacity` bytes. `fails` holds codes that calls fail with, by the name of the function."""

    PRIMARY = 0xC0

    def __init__(self, capacity: int = 1 << 30, name: str = "NVIDIA GeForce RTX 3060", capability: str = "8.6") -> None:
        self.capacity, self.name, self.capability = capacity, name, capability
        self.calls: list[str] = []
        self.fails: dict[str, Code] = {}
        self.memory: dict[int, np.ndarray] = {}
        self._guarded: dict[int, np.ndarray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {}
        self.legacy_stream = Stream()
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, Any] = {}
        self.copied: list[tuple[str, int]] = []  # between host and device: function and bytes
        self.milliseconds = 1.5
        self._contexts = threading.local()
        self._next = 0x1000

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
        """Number of objects of each kind that were created and not freed."""
        created = {
            "memory": self.memory,
            "host": self.host,
            "streams": self.streams,
            "graphs": self.graphs,
            "events": self.events,
        }
        return {kind: len(objects) for kind, objects in created.items() if objects}

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """A view of device memory that lies in one allocation; anything else is an illegal address."""
        for start, array in self.memory.items():
            if start <= address and address + size <= start + array.size:
                return array[address - start : address - start + size]
        raise SimulatedCudaError(Code.CUDA_ERROR_ILLEGAL_ADDRESS)

    def call(self, function: str, *, context: bool = True, unsafe: bool = False) -> None:
        """Record a call, and fail where there is a reason to. unsafe: not allowed during a capture."""
        self.calls.append(function)
        if function in self.fails:
            raise SimulatedCudaError(self.fails[function])
        if context and not self.contexts:
            raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_CONTEXT)
        if unsafe:
            for stream in self.streams.values():
                if stream.capture is not None:
                    stream.broken = True
                    raise SimulatedCudaError(Code.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def handle(self) -> int:
        self._next += 0x10
        return self._next

    def allocate(self, size: int) -> int:
        self.call("cuMemAlloc", unsafe=True)
        if size <= 0:
            raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_VALUE)
        if self.used + size > self.capacity:
            raise SimulatedCudaError(Code.CUDA_ERROR_OUT_OF_MEMORY)
        return self.place(np.full(size, GARBAGE, np.uint8))

    def place(self, content: np.ndarray) -> int:
        """Put bytes into new device memory, at a real address, so that compiled kernels can work there."""
        whole = np.full(content.nbytes + 2 * _GUARD + ALIGNMENT, GARBAGE, np.uint8)
        start = _GUARD + -(whole.ctypes.data + _GUARD) % ALIGNMENT
        array = whole[start : start + content.nbytes]
        array[:] = content.reshape(-1).view(np.uint8)
        self.memory[array.ctypes.data] = array
        self._guarded[array.ctypes.data] = whole
        return array.ctypes.data

    def free(self, address: int) -> None:
        self.call("cuMemFree", unsafe=True)
        if address not in self.memory:
            raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_VALUE)
        assert not any(stream.queue for stream in self.streams.values()), "freed while work is queued that may use it"
        array, whole = self.memory.pop(address), self._guarded.pop(address)
        array[:] = GARBAGE
        assert (whole == GARBAGE).all(), "a kernel wrote outside its memory"

    def pinned(self, size: int) -> np.ndarray:
        self.call("cuMemHostAlloc", unsafe=True)
        array = np.full(size, GARBAGE, np.uint8)
        self.host[array.ctypes.data] = array
        return array

    def free_pinned(self, address: int) -> None:
        self.call("cuMemFreeHost", unsafe=True)
        if address not in self.host:
            raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_VALUE)
        self.host.pop(address)[:] = GARBAGE

    def new_stream(self) -> int:
        self.call("cuStreamCreate")
        return self.foreign_stream()

    def foreign_stream(self) -> int:
        """A stream of the host program."""
        handle = self.handle()
        self.streams[handle] = Stream()
        return handle

    def destroy_stream(self, handle: int) -> None:
        self.call("cuStreamDestroy")
        self.stream(handle)
        del self.streams[handle]

    def stream(self, handle: int) -> Stream:
        if handle == 0:
            return self.legacy_stream
        if handle not in self.streams:
            raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_VALUE)
        return self.streams[handle]

    def copy(self, to: int, source: int, size: int, handle: int) -> None:
        """Queue a copy; where from and where to follows from the addresses, as with unified addressing."""
        to_device, from_device = self._is_on_device(to), self._is_on_device(source)
        function = {
            (True, False): "cuMemcpyHtoDAsync",
            (False, True): "cuMemcpyDtoHAsync",
            (True, True): "cuMemcpyDtoDAsync",
        }[to_device, from_device]
        self.call(function)
        for address, on_device in ((to, to_device), (source, from_device)):
            if not on_device and not self._is_pinned(address, size):
                raise AssertionError("an asynchronous copy needs page-locked memory")
        if not (to_device and from_device):
            self.copied.append((function, size))

        def view(address: int, on_device: bool) -> Any:
            if on_device:
                return self.bytes_at(address, size)
            return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

        def work() -> None:
            view(to, to_device)[:] = view(source, from_device)

        self.stream(handle).add(work)

    def _is_on_device(self, address: int) -> bool:
        return any(start <= address < start + array.size for start, array in self.memory.items())

    def _is_pinned(self, address: int, size: int = 1) -> bool:
        return any(start <= address and address + size <= start + array.size for start, array in self.host.items())

    def synchronize(self, handle: int) -> None:
        self.call("cuStreamSynchronize", unsafe=True)
        self.stream(handle).drain()

    def load_kernels(self, ptx: bytes) -> None:
        self.call("cuModuleLoadData", unsafe=True)
        assert all(b".visible .entry %s(" % name.encode() in ptx for name in KERNELS)

    def launch_kernel(
        self, name: str, grid: Sequence[int], threads: int, handle: int, arguments: Sequence[int | np.int32]
    ) -> None:
        """Queue a kernel. An int is a pointer, an np.int32 a C int, as for cuda.core."""
        self.call(f"kernel {name}")
        execute = host_kernels()
        values = [
            ctypes.c_int32(int(value)) if isinstance(value, np.int32) else ctypes.c_uint64(value) for value in arguments
        ]
        self.stream(handle).add(lambda: execute(name, grid[0], grid[1], threads, values))

    def clear(self, address: int, value: int, size: int, handle: int) -> None:
        self.call("cuMemsetD8Async")
        self.stream(handle).add(lambda: self.bytes_at(address, size).fill(value))

    def new_event(self) -> int:
        self.call("cuEventCreate")
        handle = self.handle()
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

    def synchronize_event(self, event: int) -> None:
        self.call("cuEventSynchronize", unsafe=True)
        stream, upto = self.events[event]
        stream.drain(upto)

    def destroy_event(self, event: int) -> None:
        self.call("cuEventDestroy")
        del self.events[event]

    def begin_capture(self, handle: int) -> None:
        self.call("cuStreamBeginCapture")
        stream = self.stream(handle)
        stream.capture, stream.broken = [], False

    def end_capture(self, handle: int) -> int:
        stream = self.stream(handle)
        captured, stream.capture = stream.capture, None  # the capture is over, also if it fails
        self.call("cuStreamEndCapture")
        if stream.broken or captured is None:
            raise SimulatedCudaError(Code.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        return self._new_graph(captured)

    def instantiate(self, template: int) -> int:
        self.call("cuGraphInstantiate")
        return self._new_graph(self.graphs[template])

    def _new_graph(self, work: list[Work]) -> int:
        handle = self.handle()
        self.graphs[handle] = work
        return handle

    def launch(self, graph: int, handle: int) -> None:
        self.call("cuGraphLaunch")
        for work in self.graphs[graph]:
            self.stream(handle).add(work)

    def destroy_graph(self, function: str, graph: int) -> None:
        self.call(function)
        if graph not in self.graphs:
            raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_VALUE)
        del self.graphs[graph]

    def push(self, context: int) -> None:
        self.call("cuCtxPushCurrent", context=False)
        self.contexts.append(context)

    def pop(self) -> int:
        self.call("cuCtxPopCurrent")
        return self.contexts.pop()

    def get_current(self) -> int:
        self.call("cuCtxGetCurrent", context=False)
        return self.contexts[-1] if self.contexts else 0

    def set_current(self, context: int) -> None:
        self.call("cuCtxSetCurrent", context=False)
        if self.contexts:
            self.contexts.pop()
        if context:
            self.contexts.append(context)

    def mem_info(self) -> tuple[int, int]:
        self.call("cuMemGetInfo")
        return self.capacity - self.used, self.capacity

    def memory_type(self, address: int) -> int:
        """CUmemorytype: 1 for page-locked memory, 2 for the device, 0 for an address that CUDA does not know."""
        self.call("cuPointerGetAttribute")
        return 2 if self._is_on_device(address) else 1 if self._is_pinned(address) else 0

    def device(self, ordinal: int) -> int:
        self.call("cuDeviceGet", context=False)
        if ordinal != 0:
            raise SimulatedCudaError(Code.CUDA_ERROR_INVALID_DEVICE)
        return 0


@contextmanager
def host_context(gpu: SimulatedGpu, handle: int = 0xB0B) -> Iterator[None]:
    """A context of the host program's own, current before and after ours."""
    gpu.contexts.append(handle)
    yield
    assert gpu.contexts == [handle], "the host program's context was disturbed"
    gpu.contexts.pop()


@cache
def host_kernels() -> Callable[..., None]:
    """kernels.cu compiled by g++, called with name, blocks along x and y, threads in a block and ctypes parameters."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing, which compiles the CUDA kernels for the host")
    sources = Path(__file__).parents[2] / "spmdeploy/gpu"
    options = ["-O2", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{sources}"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        subprocess.run([compiler, *options, str(_HERE / "kernels_on_host.cpp"), "-o", str(library)], check=True)
        launch = ctypes.cdll.LoadLibrary(str(library)).launch  # `plug_in` replaces CDLL

    def execute(name: str, blocks_x: int, blocks_y: int, threads: int, values: Sequence[Any]) -> None:
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        assert launch(name.encode(), blocks_x, blocks_y, threads, addresses) == 0, name

    return execute
