"""CUDA through NVIDIA's packages cuda-core and cuda-bindings. Not yet run on a GPU.

cuda-bindings is called for what cuda.core 1.2 does not have: keeping and restoring the current context, memory outside
a pool (a pool keeps what is freed, and TensorRT could not have it) whose failures are raised, and the free memory.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.gpu.driver import Bytes, CudaError, cuda_error

_LEGACY_STREAMS = (0, 1)
_PER_THREAD_STREAM = 2


class CudaCore:
    """The implementation of `gpu.device.CudaApi` on cuda.core. Streams are known by their handles."""

    def __init__(self, ordinal: int) -> None:
        """Raises ImportError without the packages, CudaError without a driver or such a device."""
        import cuda.core
        from cuda.bindings import driver

        self.name = f"cuda-core {cuda.core.__version__}"
        self._core, self._driver, self._ordinal = cuda.core, driver, ordinal
        self._streams: dict[int, Any] = {}
        self._builders: dict[int, Any] = {}
        self._code: Any = None
        self._kernels: dict[str, Any] = {}
        with _to_package_error("cuInit"):
            cuda.core.Device(ordinal)

    @contextmanager
    def current(self) -> Iterator[None]:
        previous = self._call("cuCtxGetCurrent")
        with _to_package_error("cuCtxSetCurrent"):
            self._core.Device(self._ordinal).set_current()  # the primary context, which cuda.core retains
        try:
            yield
        finally:
            self._call("cuCtxSetCurrent", previous)

    def close(self) -> None:
        self._kernels, self._code = {}, None

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

    def device_of(self, address: int) -> int | None:
        with suppress(CudaError), _to_package_error("cuPointerGetAttributes"):
            buffer = self._core.Buffer.from_handle(address, 1)
            if buffer.is_device_accessible and (buffer.is_managed or not buffer.is_host_accessible):
                return int(buffer.device_id)
        return None

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        self._copy("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        self._copy("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def copy_within(self, address: int, source: int, size: int, stream: int) -> None:
        self._copy("cuMemcpyDtoDAsync", address, source, size, stream)

    def clear(self, address: int, size: int, stream: int) -> None:
        with _to_package_error("cuMemsetD8Async"):
            self._core.Buffer.from_handle(address, size).fill(0, stream=self._stream(stream))

    def stream(self) -> int:
        options = self._core.StreamOptions(nonblocking=True)
        with _to_package_error("cuStreamCreate"):
            stream = self._core.Device(self._ordinal).create_stream(options=options)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        with _to_package_error("cuStreamDestroy"):
            self._streams.pop(stream).close()

    def synchronize(self, stream: int) -> None:
        with _to_package_error("cuStreamSynchronize"):
            self._stream(stream).sync()

    def wait_for_stream(self, stream: int, other: int) -> None:
        with _to_package_error("cuStreamWaitEvent"):
            self._stream(stream).wait(self._stream(other))

    def event(self, timing: bool) -> Any:
        options = self._core.EventOptions(timing_enabled=timing)
        with _to_package_error("cuEventCreate"):
            return self._core.Device(self._ordinal).create_event(options)

    def destroy_event(self, event: Any) -> None:
        with _to_package_error("cuEventDestroy"):
            event.close()

    def record(self, event: Any, stream: int) -> None:
        with _to_package_error("cuEventRecord"):
            self._stream(stream).record(event)

    def wait_for_event(self, event: Any) -> None:
        with _to_package_error("cuEventSynchronize"):
            event.sync()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        with _to_package_error("cuEventElapsedTime"):
            return float(end - start)

    def begin_capture(self, stream: int) -> None:
        with _to_package_error("cuStreamBeginCapture"):
            # thread_local: other threads of the program can neither break the capture nor be disturbed by it.
            self._builders[stream] = self._stream(stream).create_graph_builder().begin_building("thread_local")

    def end_capture(self, stream: int) -> Any:
        builder = self._builders.pop(stream)
        try:
            with _to_package_error("cuStreamEndCapture"):
                builder.end_building()
            with _to_package_error("cuGraphInstantiate"):
                return builder.complete()
        finally:
            with suppress(Exception):  # a capture that was invalidated ends here, with the error raised above
                builder.close()

    def launch(self, graph: Any, stream: int) -> None:
        with _to_package_error("cuGraphLaunch"):
            graph.launch(self._stream(stream))

    def destroy_graph(self, graph: Any) -> None:
        with _to_package_error("cuGraphExecDestroy"):
            graph.close()

    def load_kernels(self, ptx: bytes, names: tuple[str, ...]) -> None:
        with _to_package_error("cuLibraryLoadData"):
            self._code = self._core.ObjectCode.from_ptx(ptx)
            self._kernels = {name: self._code.get_kernel(name) for name in names}

    def launch_kernel(
        self, name: str, grid: tuple[int, int], threads: int, stream: int, arguments: tuple[int | np.int32, ...]
    ) -> None:
        config = self._core.LaunchConfig(grid=grid, block=threads)
        with _to_package_error(f"cuLaunchKernel {name}"):  # Python's int goes as a pointer
            self._core.launch(self._stream(stream), config, self._kernels[name], *arguments)

    def _stream(self, handle: int) -> Any:
        if handle in self._streams:
            return self._streams[handle]
        if handle in _LEGACY_STREAMS:
            return self._core.LEGACY_DEFAULT_STREAM
        if handle == _PER_THREAD_STREAM:
            return self._core.PER_THREAD_DEFAULT_STREAM
        return self._core.Stream.from_handle(handle)

    def _copy(self, call: str, to: int, source: int, size: int, stream: int) -> None:
        view = self._core.Buffer.from_handle
        with _to_package_error(call):
            view(to, size).copy_from(view(source, size), stream=self._stream(stream))

    def _call(self, function: str, *arguments: Any) -> Any:
        """The value that a driver function returns, a tuple of several, None of none."""
        with _to_package_error(function):
            code, *values = getattr(self._driver, function)(*arguments)
        if int(code):
            raise cuda_error(function, code.name)
        return tuple(values) if len(values) > 1 else next(iter(values), None)


@contextmanager
def _to_package_error(call: str) -> Iterator[None]:
    """Turns any error of the packages into a CudaError: the class of cuda.core's own is not public."""
    try:
        yield
    except CudaError:
        raise
    except Exception as exc:
        text = " ".join(str(exc).split())
        raise cuda_error(call, text, missing=_missing_function(text)) from exc


def _missing_function(text: str) -> str | None:
    """The function that the driver's library does not have, from the message of cuda-bindings."""
    found = re.search(r"function \W?(cu\w+)\W? (?:is )?not found", text, re.IGNORECASE)
    return found[1] if found else None
