"""The calls of the CUDA driver that running engines needs, through PyCUDA, cuda-python or the driver's own library.

Addresses, streams and graphs are plain integers everywhere, as the driver has them. PyCUDA and cuda-python serve the
same protocol; what PyCUDA has no words for (CUDA graphs, streams of somebody else) is asked of the driver itself.
Whatever fails raises `CudaError`; `cuda_device.Device` turns it into an error of ours.
"""

from __future__ import annotations

import atexit
import ctypes
from ctypes import byref
from threading import Lock
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.gpu.driver import CudaError, Driver

Bytes = NDArray[np.uint8]

OUT_OF_MEMORY = 2
CAPTURE_CODES = range(900, 910)
"""CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED and its kin: something cannot be part of a graph."""

# From cuda.h: enumerations of which PyCUDA knows none.
_NON_BLOCKING = 1  # a stream that does not wait for the legacy stream, where a host program may have long work
_THREAD_LOCAL = 1  # a capture that other threads of the host program can neither spoil nor be hurt by
_WITHOUT_CLOCK = 2  # an event that only orders: cheap
_MEMORY_TYPE, _DEVICE_ORDINAL = 2, 9  # what can be asked of a pointer
_ON_DEVICE = 2  # a memory type


class Binding(Protocol):
    """One way to call the driver. Between `push` and `pop`, but for `retain` and `release`."""

    name: str
    """The package and its version."""

    def retain(self, ordinal: int) -> Any:
        """The primary context of a device, the one that the CUDA runtime, PyTorch and TensorRT use."""

    def release(self, ordinal: int, context: Any) -> None: ...

    def push(self, context: Any) -> None: ...

    def pop(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""

    def allocate(self, size: int) -> int:
        """The address of so many bytes on the device, aligned to 256."""

    def free(self, address: int) -> None: ...

    def pinned(self, size: int) -> Bytes:
        """uint8 (size,) of the host that the device can read and write while the host does something else."""

    def free_pinned(self, array: Bytes) -> None: ...

    def stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Queues a copy of a contiguous array to the device."""

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Queues a copy from the device into a contiguous array."""

    def synchronize(self, stream: int) -> None: ...

    def wait_for_stream(self, stream: int, other: int) -> None:
        """Lets whatever is queued in `stream` from now on wait for what is queued in `other` so far."""

    def event(self) -> Any: ...

    def destroy_event(self, event: Any) -> None: ...

    def record(self, event: Any, stream: int) -> None: ...

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""

    def begin_capture(self, stream: int) -> None: ...

    def end_capture(self, stream: int) -> int:
        """A graph of what was queued since `begin_capture`, ready to be launched. The stream is usual again."""

    def launch(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    def device_of(self, address: int) -> int | None:
        """The ordinal of the device whose memory the address lies in; None where it is not on a device."""


def open_binding() -> Binding:
    """PyCUDA where it is installed (Jetson images bring it, and there is no wheel of it), else cuda-python.

    Raises ImportError naming both where neither can be imported, CudaFailure or OSError where there is no driver.
    """
    try:
        import pycuda.driver
    except ImportError as no_pycuda:
        try:
            from cuda.bindings import driver
        except ImportError as no_cuda_python:
            raise ImportError(f"neither PyCUDA ({no_pycuda}) nor cuda-python ({no_cuda_python})") from no_cuda_python
        return CudaPython(driver)
    return PyCuda(pycuda.driver)


# -------------------------------------------------------------------------------------------------------------- PyCUDA


class PyCuda:
    """PyCUDA (read: 2025.1 and 2026.1), whose objects are kept here and known by their addresses."""

    _contexts: ClassVar[dict[int, Any]] = {}
    _contexts_lock: ClassVar[Lock] = Lock()

    def __init__(self, driver: Any) -> None:
        """driver: the module pycuda.driver."""
        import pycuda

        self.name = f"PyCUDA {pycuda.VERSION_TEXT}"
        self._pycuda = driver
        self._objects: dict[int, Any] = {}
        self._guarded("cuInit", driver.init)
        self._driver = Driver()

    def retain(self, ordinal: int) -> Any:
        # PyCUDA's detach pushes a context, releases it and trusts that this pops it. That is so for contexts that were
        # created, not for primary ones: the thread would be left with ours. So each is retained once and to the end,
        # as PyTorch does, and let go while the driver still answers.
        with self._contexts_lock:
            if not self._contexts:
                atexit.register(self._contexts.clear)
            if ordinal not in self._contexts:
                device = self._guarded("cuDeviceGet", self._pycuda.Device, ordinal)
                self._contexts[ordinal] = self._guarded("cuDevicePrimaryCtxRetain", device.retain_primary_context)
            return self._contexts[ordinal]

    def release(self, ordinal: int, context: Any) -> None:
        """Does nothing, for the reason above."""

    def push(self, context: Any) -> None:
        self._guarded("cuCtxPushCurrent", context.push)

    def pop(self) -> None:
        self._guarded("cuCtxPopCurrent", self._pycuda.Context.pop)

    def memory(self) -> tuple[int, int]:
        free, total = self._guarded("cuMemGetInfo", self._pycuda.mem_get_info)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        return self._keep(self._guarded("cuMemAlloc", self._pycuda.mem_alloc, size))

    def free(self, address: int) -> None:
        self._guarded("cuMemFree", self._objects.pop(address).free)

    def pinned(self, size: int) -> Bytes:
        array: Bytes = self._guarded("cuMemHostAlloc", self._pycuda.pagelocked_empty, size, np.uint8)
        return array

    def free_pinned(self, array: Bytes) -> None:
        self._guarded("cuMemFreeHost", array.base.free)  # type: ignore[union-attr] # PyCUDA's own allocation

    def stream(self) -> int:
        stream = self._guarded("cuStreamCreate", self._pycuda.Stream, _NON_BLOCKING)
        self._objects[stream.handle] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        del self._objects[stream]  # PyCUDA destroys it with the object

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        self._guarded("cuMemcpyHtoDAsync", self._pycuda.memcpy_htod_async, address, array, self._objects[stream])

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        self._guarded("cuMemcpyDtoHAsync", self._pycuda.memcpy_dtoh_async, array, address, self._objects[stream])

    def synchronize(self, stream: int) -> None:
        self._guarded("cuStreamSynchronize", self._objects[stream].synchronize)

    def wait_for_stream(self, stream: int, other: int) -> None:
        event = ctypes.c_void_p()
        self._driver.call("cuEventCreate", byref(event), _WITHOUT_CLOCK)
        try:
            self._driver.call("cuEventRecord", event, ctypes.c_void_p(other))
            self._driver.call("cuStreamWaitEvent", ctypes.c_void_p(stream), event, 0)
        finally:
            self._driver.call("cuEventDestroy_v2", event)  # the driver keeps it for whoever waits for it

    def event(self) -> Any:
        return self._guarded("cuEventCreate", self._pycuda.Event)

    def destroy_event(self, event: Any) -> None:
        """PyCUDA destroys it with the object."""

    def record(self, event: Any, stream: int) -> None:
        self._guarded("cuEventRecord", event.record, self._objects[stream])

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._guarded("cuEventElapsedTime", start.time_till, end))

    def begin_capture(self, stream: int) -> None:
        self._driver.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        template, graph = ctypes.c_void_p(), ctypes.c_void_p()
        self._driver.call("cuStreamEndCapture", ctypes.c_void_p(stream), byref(template))
        try:
            self._driver.call("cuGraphInstantiateWithFlags", byref(graph), template, ctypes.c_ulonglong(0))
        finally:
            self._driver.call("cuGraphDestroy", template)
        return graph.value or 0

    def launch(self, graph: int, stream: int) -> None:
        self._driver.call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        self._driver.call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def device_of(self, address: int) -> int | None:
        where = ctypes.c_uint64(address)
        try:
            kind = self._driver.integer("cuPointerGetAttribute", _MEMORY_TYPE, where)
            ordinal = self._driver.integer("cuPointerGetAttribute", _DEVICE_ORDINAL, where)
        except CudaError:  # an address that CUDA has never heard of
            return None
        return ordinal if kind == _ON_DEVICE else None

    def _keep(self, allocation: Any) -> int:
        self._objects[int(allocation)] = allocation
        return int(allocation)

    def _guarded(self, call: str, function: Any, *arguments: Any) -> Any:
        """PyCUDA's errors name the call themselves but carry no number, apart from the class for lack of memory."""
        try:
            return function(*arguments)
        except self._pycuda.MemoryError as error:
            raise CudaError(call, OUT_OF_MEMORY, str(error)) from error
        except self._pycuda.Error as error:
            raise CudaError(call, 0, str(error)) from error


# --------------------------------------------------------------------------------------------------------- cuda-python


class CudaPython:
    """cuda-python's `cuda.bindings.driver` (read: 12.9 and 13.5): the C functions, returning a code and the values."""

    def __init__(self, driver: Any) -> None:
        """driver: the module cuda.bindings.driver."""
        from cuda.bindings import __version__

        self.name = f"cuda-python {__version__}"
        self._driver = driver
        try:
            self._call("cuInit", 0)
        except CudaError:
            raise
        except Exception as error:  # a class of its own in each version: libcuda is not there
            raise OSError(f"no NVIDIA driver ({error})") from error

    def retain(self, ordinal: int) -> Any:
        return self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", ordinal))

    def release(self, ordinal: int, context: Any) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._call("cuDeviceGet", ordinal))

    def push(self, context: Any) -> None:
        self._call("cuCtxPushCurrent", context)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent")

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def pinned(self, size: int) -> Bytes:
        address = int(self._call("cuMemHostAlloc", size, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, array: Bytes) -> None:
        self._call("cuMemFreeHost", array.ctypes.data)

    def stream(self) -> int:
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def wait_for_stream(self, stream: int, other: int) -> None:
        event = self._call("cuEventCreate", _WITHOUT_CLOCK)
        try:
            self._call("cuEventRecord", event, other)
            self._call("cuStreamWaitEvent", stream, event, 0)
        finally:
            self._call("cuEventDestroy", event)

    def event(self) -> Any:
        return self._call("cuEventCreate", 0)

    def destroy_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture", stream, self._driver.CUstreamCaptureMode(_THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        template = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", template, 0))
        finally:
            self._call("cuGraphDestroy", template)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def device_of(self, address: int) -> int | None:
        attribute = self._driver.CUpointer_attribute
        try:
            kind = self._call("cuPointerGetAttribute", attribute(_MEMORY_TYPE), address)
            ordinal = self._call("cuPointerGetAttribute", attribute(_DEVICE_ORDINAL), address)
        except CudaError:  # an address that CUDA has never heard of
            return None
        return int(ordinal) if int(kind) == _ON_DEVICE else None

    def _call(self, function: str, *arguments: Any) -> Any:
        """The value that a function returns beside its code; a tuple of several, None of none."""
        code, *values = getattr(self._driver, function)(*arguments)
        if int(code):
            raise CudaError(function, int(code), code.name)
        return tuple(values) if len(values) > 1 else next(iter(values), None)
