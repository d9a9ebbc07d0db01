"""One GPU: memory, streams, events, CUDA graphs and kernels, with errors of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import resources
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.errors import OutOfMemoryError, SpmDeployError, UnavailableError
from spmdeploy.gpu.driver import (
    Bytes,
    CudaCaptureError,
    CudaError,
    CudaMemoryError,
    MissingFunctionError,
    gpu_facts,
)

SEE_DOCTOR = "see `spmdeploy doctor`"
KERNELS = ("cut", "resample", "blend", "compare")
"""The kernels of kernels.cu."""
_THREADS = 256  # in a block
_NEWER_DRIVER = (
    'install a newer NVIDIA driver, or the packages for its CUDA version: pip install "spmdeploy[tensorrt-cu12]"'
)


class GraphCaptureError(Exception):
    """Something among the work cannot be part of a CUDA graph. The message is the driver's."""


class CudaApi(Protocol):
    """The CUDA functions that this package uses, of one device. `gpu.cuda_core` and `gpu.pycuda` implement them.

    All but `current` and `close` are called inside `current`. Addresses and streams are plain integers; streams may be
    those of another library. Everything raises CudaError.
    """

    name: str
    """The package and its version."""

    def current(self) -> AbstractContextManager[None]:
        """Makes the device's primary context current, which the CUDA runtime, PyTorch and TensorRT share."""

    def close(self) -> None:
        """Unloads the kernels."""

    def memory(self) -> tuple[int, int]:
        """Free and total memory of the device, in bytes."""

    def allocate(self, size: int) -> int:
        """Returns the address of `size` bytes on the device, aligned to at least 256 bytes."""

    def free(self, address: int) -> None:
        """Frees memory of `allocate`."""

    def pinned(self, size: int) -> Bytes:
        """Returns page-locked host memory: uint8 (size,), not cleared."""

    def free_pinned(self, array: Bytes) -> None:
        """Frees an array of `pinned`."""

    def device_of(self, address: int) -> int | None:
        """The number of the device whose memory an address is in, also of managed memory; None for host memory."""

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Queues a copy of a contiguous host array of any dtype to the device."""

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Queues a copy from the device into a contiguous host array, as many bytes as it has."""

    def copy_within(self, address: int, source: int, size: int, stream: int) -> None:
        """Queues a copy of `size` bytes from `source` to `address`, both on the device."""

    def clear(self, address: int, size: int, stream: int) -> None:
        """Queues setting `size` bytes on the device to zero."""

    def stream(self) -> int:
        """Returns a new stream that does not wait for the default stream."""

    def destroy_stream(self, stream: int) -> None:
        """Destroys a stream of `stream`."""

    def synchronize(self, stream: int) -> None:
        """Blocks until everything queued in the stream is done."""

    def wait_for_stream(self, stream: int, other: int) -> None:
        """Makes later work in `stream` wait for what is queued in `other` now."""

    def event(self, timing: bool) -> Any:
        """Returns a new event; with `timing`, it can be given to `elapsed_ms`."""

    def destroy_event(self, event: Any) -> None:
        """Destroys an event of `event`."""

    def record(self, event: Any, stream: int) -> None:
        """Queues the event in the stream."""

    def wait_for_event(self, event: Any) -> None:
        """Blocks until a recorded event is reached."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that were reached, both with timing."""

    def begin_capture(self, stream: int) -> None:
        """Begins to record the stream's work, by this thread alone, instead of queuing it."""

    def end_capture(self, stream: int) -> Any:
        """Ends the recording and returns it as a graph that can be launched."""

    def launch(self, graph: Any, stream: int) -> None:
        """Queues the work of a graph of `end_capture`."""

    def destroy_graph(self, graph: Any) -> None:
        """Destroys a graph of `end_capture`."""

    def load_kernels(self, ptx: bytes, names: tuple[str, ...]) -> None:
        """Loads kernels from PTX text, so that `launch_kernel` finds them by name."""

    def launch_kernel(
        self, name: str, grid: tuple[int, int], threads: int, stream: int, arguments: tuple[int | np.int32, ...]
    ) -> None:
        """Queues a kernel.

        Args:
            name: One of those given to `load_kernels`.
            grid: Blocks along x and y.
            threads: Of a block, along x.
            stream: Where it is queued.
            arguments: Of the kernel; an int is a pointer, an np.int32 a C int.
        """


def open_cuda(ordinal: int) -> CudaApi:
    """Return PyCUDA where it is installed (images for Jetson bring it; it has no wheels), else cuda.core.

    Raises:
        ImportError: Neither can be imported; the message names both.
        OSError: There is no driver or no such device.
    """
    from spmdeploy.gpu.cuda_core import CudaCore
    from spmdeploy.gpu.pycuda import PyCuda

    try:
        return PyCuda(ordinal)
    except ImportError as no_pycuda:
        try:
            return CudaCore(ordinal)
        except ImportError as no_cuda_core:
            raise ImportError(f"neither PyCUDA ({no_pycuda}) nor cuda-core ({no_cuda_core})") from no_cuda_core


class Device:
    """One GPU through its primary context.

    The context is current inside `with device.current():` and nowhere else, so that a host program's own context is not
    disturbed. Every other method but `close` must be called in there. What was created here must be freed here; nothing
    is freed by garbage collection, which may come at any time and on any thread.

    Every method raises OutOfMemoryError, with the bytes requested and those free, or UnavailableError.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Raises UnavailableError without a driver, such a device, or a package to use it with."""
        self.ordinal = ordinal
        try:
            self.facts = gpu_facts(ordinal)
        except OSError as exc:
            raise UnavailableError(f"cuda:{ordinal} cannot be used: {exc}", SEE_DOCTOR) from exc
        self._cuda = _open_or_raise(ordinal)
        self.binding = self._cuda.name
        self._has_kernels = False
        self._open = True

    def __str__(self) -> str:
        return f"cuda:{self.ordinal} ({self.facts.name})"

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current in this thread, and restore the previous one at the end."""
        if not self._open:
            raise UnavailableError(f"{self} was closed", "open another session")
        context = self._cuda.current()
        with self._translate_errors("the context"):
            context.__enter__()
        try:
            yield
        finally:
            context.__exit__(None, None, None)

    def close(self) -> None:
        """Unload the kernels. The context stays alive for its other users. Safe to call twice."""
        if not self._open:
            return
        try:
            if self._has_kernels:
                with self.current(), suppress(CudaError):  # a device that has failed fails again
                    self._cuda.close()
        finally:
            self._open = False

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        with self._translate_errors("a query of its memory"):
            return self._cuda.memory()

    def allocate(self, size: int, purpose: str) -> int:
        """Return the address of `size` bytes, aligned to 256 bytes; `purpose` is named in the error message."""
        with self._translate_errors(purpose, size):
            return self._cuda.allocate(size)

    def free(self, address: int) -> None:
        """Free memory of `allocate`."""
        with self._translate_errors("freeing memory"):
            self._cuda.free(address)

    def pinned(self, size: int, purpose: str) -> Bytes:
        """Return uint8 (size,) in page-locked host memory, which can be copied while the host does other work."""
        with self._translate_errors(purpose, size, " of page-locked host memory"):
            return self._cuda.pinned(size)

    def free_pinned(self, array: Bytes) -> None:
        """Free an array of `pinned`. It must not be read any more."""
        with self._translate_errors("freeing memory"):
            self._cuda.free_pinned(array)

    def device_of(self, address: int) -> int | None:
        """Return the ordinal of the device that the address belongs to; None for host memory and unknown addresses."""
        return self._cuda.device_of(address)

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Queue a copy of a C-contiguous array to the device."""
        with self._translate_errors("a copy to the device"):
            self._cuda.copy_in(address, array, stream)

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Queue a copy from the device into a C-contiguous array, to be read after `synchronize`."""
        with self._translate_errors("a copy from the device"):
            self._cuda.copy_out(array, address, stream)

    def copy_within(self, address: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes from `source` to `address`, both on the device."""
        with self._translate_errors("a copy on the device"):
            self._cuda.copy_within(address, source, size, stream)

    def clear(self, address: int, size: int, stream: int) -> None:
        """Queue zeroing memory."""
        with self._translate_errors("clearing memory"):
            self._cuda.clear(address, size, stream)

    def stream(self) -> int:
        """Return the handle of a new stream, one that does not wait for the legacy default stream."""
        with self._translate_errors("a stream"):
            return self._cuda.stream()

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream that was created here."""
        with self._translate_errors("a stream"):
            self._cuda.destroy_stream(stream)

    def synchronize(self, stream: int) -> None:
        """Wait for everything in the stream, and raise what went wrong there."""
        with self._translate_errors("the work on the device"):
            self._cuda.synchronize(stream)

    def wait_for_stream(self, stream: int, other: int) -> None:
        """Make later work in `stream` wait for what is queued in `other` so far. The host does not wait."""
        if stream == other:
            return
        with self._translate_errors("an event"):
            self._cuda.wait_for_stream(stream, other)

    def event(self) -> Any:
        """Return a new event for ordering, to be freed with `destroy_event`."""
        with self._translate_errors("an event"):
            return self._cuda.event(timing=False)

    def destroy_event(self, event: Any) -> None:
        """Destroy an event that was created here."""
        with self._translate_errors("an event"):
            self._cuda.destroy_event(event)

    def record(self, event: Any, stream: int) -> None:
        """Make the event occur when everything that is queued in the stream so far is done."""
        with self._translate_errors("an event"):
            self._cuda.record(event, stream)

    def wait_for_event(self, event: Any) -> None:
        """Wait on the host until a recorded event has occurred."""
        with self._translate_errors("the work on the device"):
            self._cuda.wait_for_event(event)

    @contextmanager
    def timed(self, stream: int) -> Iterator[list[float]]:
        """Yield a list that holds, at the end, the milliseconds that the device spent on what was queued inside."""
        cuda = self._cuda
        milliseconds: list[float] = []
        with self._translate_errors("an event"):
            start, end = cuda.event(timing=True), cuda.event(timing=True)
            try:
                cuda.record(start, stream)
                yield milliseconds
                cuda.record(end, stream)
                cuda.synchronize(stream)
                milliseconds.append(cuda.elapsed_ms(start, end))
            finally:
                cuda.destroy_event(start)
                cuda.destroy_event(end)

    def load_kernels(self) -> None:
        """Load kernels.ptx, which the driver compiles for the GPU and caches for the next start."""
        if not self._has_kernels:
            ptx = resources.files("spmdeploy.gpu").joinpath("kernels.ptx").read_bytes()
            with self._translate_errors("loading the refinement kernels"):
                self._cuda.load_kernels(ptx, KERNELS)
            self._has_kernels = True

    def kernel(self, name: str, threads: int, stream: int, *arguments: int | np.int32, blocks_y: int = 1) -> None:
        """Queue a kernel of kernels.cu. `load_kernels` must have been called.

        Args:
            name: One of `KERNELS`.
            threads: Number of threads along x, rounded up to whole blocks.
            stream: Handle.
            *arguments: An int is a pointer, an np.int32 a C int.
            blocks_y: Number of blocks along y.
        """
        grid = (-(-threads // _THREADS), blocks_y)
        with self._translate_errors(f"the kernel {name}"):
            self._cuda.launch_kernel(name, grid, _THREADS, stream, arguments)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Return a CUDA graph of what `enqueue` queues in the stream, without running it.

        Raises:
            GraphCaptureError: Some of the work cannot be captured.
        """
        with self._translate_errors("a CUDA graph"):
            self._cuda.begin_capture(stream)
            try:
                enqueue()
            except Exception as exc:
                self._abandon_capture(stream, exc)
                raise
            return self._cuda.end_capture(stream)

    def _abandon_capture(self, stream: int, error: Exception) -> None:
        """End a capture after an error. Raises GraphCaptureError if the capture was what made the work fail."""
        try:
            self._cuda.destroy_graph(self._cuda.end_capture(stream))
        except CudaCaptureError:
            raise GraphCaptureError(str(error)) from error
        except CudaError:
            return

    def launch(self, graph: Any, stream: int) -> None:
        """Queue everything in a CUDA graph with one call."""
        with self._translate_errors("a CUDA graph"):
            self._cuda.launch(graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a CUDA graph that was captured here."""
        with self._translate_errors("a CUDA graph"):
            self._cuda.destroy_graph(graph)

    @contextmanager
    def _translate_errors(self, purpose: str, size: int | None = None, where: str = "") -> Iterator[None]:
        try:
            yield
        except CudaCaptureError as exc:
            raise GraphCaptureError(str(exc)) from exc
        except CudaError as exc:
            raise self._to_package_error(exc, purpose, size, where) from exc

    def _to_package_error(self, error: CudaError, purpose: str, size: int | None, where: str) -> SpmDeployError:
        if isinstance(error, MissingFunctionError):
            return UnavailableError(f"{self} failed at {purpose}: {error}", _NEWER_DRIVER)
        if not isinstance(error, CudaMemoryError):
            return UnavailableError(f"{self} failed at {purpose}: {error}", SEE_DOCTOR)
        wanted = "memory" if size is None else f"{size:,} bytes{where}"
        return OutOfMemoryError(
            f"{self} has no {wanted} for {purpose}{self._free_memory_text(size)}", "close other programs on the GPU"
        )

    def _free_memory_text(self, size: int | None) -> str:
        with suppress(CudaError):
            free, total = self._cuda.memory()
            lacking = f", {size - free:,} too few" if size is not None and size > free else ""
            return f": {free:,} of {total:,} bytes are free{lacking}"
        return ""


def _open_or_raise(ordinal: int) -> CudaApi:
    try:
        return open_cuda(ordinal)
    except ImportError as exc:
        raise UnavailableError(
            f"no package to use the GPU with is installed: {exc}",
            'pip install "spmdeploy[tensorrt]" (with a driver for CUDA 12: "spmdeploy[tensorrt-cu12]"), or PyCUDA',
        ) from exc
    except MissingFunctionError as exc:
        raise UnavailableError(f"the GPU cannot be used: {exc}", _NEWER_DRIVER) from exc
    except OSError as exc:
        raise UnavailableError(f"cuda:{ordinal} cannot be used: {exc}", SEE_DOCTOR) from exc
