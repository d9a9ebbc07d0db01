"""CUDA through PyCUDA, which is part of many containers for Jetson. Not yet run on a GPU.

What PyCUDA has no functions for (CUDA graphs, streams of another library, attributes of pointers) is called in the
driver's own library.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref
from threading import Lock
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spmdeploy.gpu.driver import Bytes, CudaError, CudaMemoryError, Driver, cuda_error

# From cuda.h.
_NON_BLOCKING = 1  # a stream that does not wait for the legacy stream, where the host program may have long work
_THREAD_LOCAL = 1  # a capture that other threads of the program can neither break nor be disturbed by
_DISABLE_TIMING = 2  # an event for ordering only
_MEMORY_TYPE, _DEVICE_ORDINAL = 2, 9  # pointer attributes
_ON_DEVICE = 2  # a memory type


class PyCuda:
    """The implementation of `gpu.device.CudaApi` on PyCUDA (written against 2025.1 and 2026.1).

    Its objects are kept here and known by their addresses.
    """

    _contexts: ClassVar[dict[int, Any]] = {}
    _contexts_lock: ClassVar[Lock] = Lock()

    def __init__(self, ordinal: int) -> None:
        """Raises ImportError without the package, OSError without a driver or such a device."""
        import pycuda
        import pycuda.driver

        self.name = f"PyCUDA {pycuda.VERSION_TEXT}"
        self._pycuda = pycuda.driver
        self._objects: dict[int, Any] = {}
        self._module: Any = None
        self._kernels: dict[str, Any] = {}
        self._guarded("cuInit", self._pycuda.init)
        self._driver = Driver()
        self._context = self._retain(ordinal)

    def _retain(self, ordinal: int) -> Any:
        # PyCUDA's detach pushes a context, releases it and expects that this pops it. That holds for contexts that were
        # created, not for primary ones: the thread would be left with ours. So each is retained once and to the end,
        # as PyTorch does, and released while the driver still answers.
        with self._contexts_lock:
            if not self._contexts:
                atexit.register(self._contexts.clear)
            if ordinal not in self._contexts:
                device = self._guarded("cuDeviceGet", self._pycuda.Device, ordinal)
                self._contexts[ordinal] = self._guarded("cuDevicePrimaryCtxRetain", device.retain_primary_context)
            return self._contexts[ordinal]

    @contextmanager
    def current(self) -> Iterator[None]:
        self._guarded("cuCtxPushCurrent", self._context.push)
        try:
            yield
        finally:
            self._guarded("cuCtxPopCurrent", self._pycuda.Context.pop)

    def close(self) -> None:
        self._kernels, self._module = {}, None

    def memory(self) -> tuple[int, int]:
        free, total = self._guarded("cuMemGetInfo", self._pycuda.mem_get_info)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        allocation = self._guarded("cuMemAlloc", self._pycuda.mem_alloc, size)
        self._objects[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        self._guarded("cuMemFree", self._objects.pop(address).free)

    def pinned(self, size: int) -> Bytes:
        array: Bytes = self._guarded("cuMemHostAlloc", self._pycuda.pagelocked_empty, size, np.uint8)
        return array

    def free_pinned(self, array: Bytes) -> None:
        self._guarded("cuMemFreeHost", array.base.free)  # type: ignore[union-attr] # PyCUDA's own allocation

    def device_of(self, address: int) -> int | None:
        pointer = ctypes.c_uint64(address)
        try:
            kind = self._driver.integer("cuPointerGetAttribute", _MEMORY_TYPE, pointer)
            ordinal = self._driver.integer("cuPointerGetAttribute", _DEVICE_ORDINAL, pointer)
        except CudaError:  # an address that CUDA does not know
            return None
        return ordinal if kind == _ON_DEVICE else None

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        self._guarded("cuMemcpyHtoDAsync", self._pycuda.memcpy_htod_async, address, array, self._objects[stream])

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        self._guarded("cuMemcpyDtoHAsync", self._pycuda.memcpy_dtoh_async, array, address, self._objects[stream])

    def copy_within(self, address: int, source: int, size: int, stream: int) -> None:
        copy = self._pycuda.memcpy_dtod_async
        self._guarded("cuMemcpyDtoDAsync", copy, address, source, size, self._objects[stream])

    def clear(self, address: int, size: int, stream: int) -> None:
        self._guarded("cuMemsetD8Async", self._pycuda.memset_d8_async, address, 0, size, self._objects[stream])

    def stream(self) -> int:
        stream = self._guarded("cuStreamCreate", self._pycuda.Stream, _NON_BLOCKING)
        self._objects[stream.handle] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        del self._objects[stream]  # PyCUDA destroys it with the object

    def synchronize(self, stream: int) -> None:
        self._guarded("cuStreamSynchronize", self._objects[stream].synchronize)

    def wait_for_stream(self, stream: int, other: int) -> None:
        event = ctypes.c_void_p()
        self._driver.call("cuEventCreate", byref(event), _DISABLE_TIMING)
        try:
            self._driver.call("cuEventRecord", event, ctypes.c_void_p(other))
            self._driver.call("cuStreamWaitEvent", ctypes.c_void_p(stream), event, 0)
        finally:
            self._driver.call("cuEventDestroy_v2", event)  # the driver keeps it until the wait is over

    def event(self, timing: bool) -> Any:
        return self._guarded("cuEventCreate", self._pycuda.Event, 0 if timing else _DISABLE_TIMING)

    def destroy_event(self, event: Any) -> None:
        """Does nothing: PyCUDA destroys an event with its object."""

    def record(self, event: Any, stream: int) -> None:
        self._guarded("cuEventRecord", event.record, self._objects[stream])

    def wait_for_event(self, event: Any) -> None:
        self._guarded("cuEventSynchronize", event.synchronize)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._guarded("cuEventElapsedTime", start.time_till, end))

    def begin_capture(self, stream: int) -> None:
        self._driver.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)

    def end_capture(self, stream: int) -> Any:
        template, graph = ctypes.c_void_p(), ctypes.c_void_p()
        self._driver.call("cuStreamEndCapture", ctypes.c_void_p(stream), byref(template))
        try:
            self._driver.call("cuGraphInstantiateWithFlags", byref(graph), template, ctypes.c_ulonglong(0))
        finally:
            self._driver.call("cuGraphDestroy", template)
        return graph

    def launch(self, graph: Any, stream: int) -> None:
        self._driver.call("cuGraphLaunch", graph, ctypes.c_void_p(stream))

    def destroy_graph(self, graph: Any) -> None:
        self._driver.call("cuGraphExecDestroy", graph)

    def load_kernels(self, ptx: bytes, names: tuple[str, ...]) -> None:
        self._module = self._guarded("cuModuleLoadData", self._pycuda.module_from_buffer, ptx)
        self._kernels = {name: self._guarded("cuModuleGetFunction", self._module.get_function, name) for name in names}

    def launch_kernel(
        self, name: str, grid: tuple[int, int], threads: int, stream: int, arguments: tuple[int | np.int32, ...]
    ) -> None:
        typed = [argument if isinstance(argument, np.int32) else np.uint64(argument) for argument in arguments]
        options = {"grid": grid, "block": (threads, 1, 1), "stream": self._objects[stream]}
        self._guarded(f"cuLaunchKernel {name}", self._kernels[name], *typed, **options)

    def _guarded(self, call: str, function: Any, *arguments: Any, **options: Any) -> Any:
        """PyCUDA's errors name the call themselves but carry no number, apart from the class for exhausted memory."""
        try:
            return function(*arguments, **options)
        except self._pycuda.MemoryError as exc:
            raise CudaMemoryError(str(cuda_error(call, str(exc)))) from exc
        except self._pycuda.Error as exc:
            raise cuda_error(call, str(exc)) from exc
