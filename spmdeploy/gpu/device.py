"""One GPU to run engines on: the narrow interface, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from spmdeploy.errors import OutOfMemoryError, UnavailableError
from spmdeploy.gpu.cuda_bindings import CAPTURE_CODES, OUT_OF_MEMORY, Binding, Bytes, open_binding
from spmdeploy.gpu.driver import CudaError, Driver, gpu_facts
from spmdeploy.gpu.kernels import DeviceKernels

SEE_DOCTOR = "see `spmdeploy doctor`"


class GraphCaptureError(Exception):
    """Something among the work cannot be part of a CUDA graph. The message says what the driver said."""


class Device:
    """One GPU through its primary context, which PyTorch and the CUDA runtime share, so that all can work side by side.

    A host program's own context is not disturbed: ours is current inside `with device.current():` and nowhere else.
    Every other method but `close` wants to be called in there. Addresses, streams and graphs are plain integers. What
    was made here is to be given back here; nothing is freed by garbage collection, whose moment and thread nobody
    chooses.

    Every method raises OutOfMemory (with the bytes asked for and those free) or UnavailableError.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Raises UnavailableError where there is no driver, no such device, or no package to talk to it with."""
        self.ordinal = ordinal
        self._binding = _open_binding()
        try:
            self.facts = gpu_facts(ordinal)
        except OSError as error:
            raise UnavailableError(f"cuda:{ordinal} cannot be used: {error}", SEE_DOCTOR) from error
        self.binding = self._binding.name
        with self._translated("the context"):
            self._context = self._binding.retain(ordinal)
        self._kernels: DeviceKernels | None = None
        self._open = True

    def __str__(self) -> str:
        return f"cuda:{self.ordinal} ({self.facts.name})"

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device's context current in this thread, and whatever was current before again at the end."""
        if not self._open:
            raise UnavailableError(f"{self} was closed", "open another session")
        with self._translated("the context"):
            self._binding.push(self._context)
        try:
            yield
        finally:
            self._binding.pop()

    def close(self) -> None:
        """Lets the context go; it stays alive for whoever else uses it. Safe to call twice."""
        if not self._open:
            return
        try:
            if self._kernels is not None:
                with self.current(), suppress(CudaError):  # a device that has failed fails again
                    self._kernels.close()
        finally:
            self._open = False
            with self._translated("the context"):
                self._binding.release(self.ordinal, self._context)

    # -- memory

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        with self._translated("a look at the memory"):
            return self._binding.memory()

    def allocate(self, size: int, purpose: str) -> int:
        """The address of `size` bytes, aligned to 256. purpose: for the message when there are not so many."""
        with self._translated(purpose, size):
            return self._binding.allocate(size)

    def free(self, address: int) -> None:
        with self._translated("memory that is given back"):
            self._binding.free(address)

    def pinned(self, size: int, purpose: str) -> Bytes:
        """uint8 (size,) in page-locked host memory, which can be copied while the host does something else."""
        with self._translated(purpose, size, " of page-locked host memory"):
            return self._binding.pinned(size)

    def free_pinned(self, array: Bytes) -> None:
        """`array` as it came from `pinned`. Nothing may look at it any more."""
        with self._translated("memory that is given back"):
            self._binding.free_pinned(array)

    def device_of(self, address: int) -> int | None:
        """The ordinal of the device whose memory the address lies in; None where it is on none."""
        return self._binding.device_of(address)

    # -- streams and events

    def stream(self) -> int:
        with self._translated("a stream"):
            return self._binding.stream()

    def destroy_stream(self, stream: int) -> None:
        with self._translated("a stream"):
            self._binding.destroy_stream(stream)

    def copy_in(self, address: int, array: Any, stream: int) -> None:
        """Queues a copy of a C-contiguous array to the device."""
        with self._translated("a copy to the device"):
            self._binding.copy_in(address, array, stream)

    def copy_out(self, array: Any, address: int, stream: int) -> None:
        """Queues a copy from the device into a C-contiguous array, to be looked at after `synchronize`."""
        with self._translated("a copy from the device"):
            self._binding.copy_out(array, address, stream)

    def synchronize(self, stream: int) -> None:
        """Waits for everything in the stream, and raises what went wrong there."""
        with self._translated("the work on the device"):
            self._binding.synchronize(stream)

    def wait_for_stream(self, stream: int, other: int) -> None:
        """Lets what is queued in `stream` from now on wait for what is queued in `other` so far; the host does not."""
        with self._translated("an event"):
            self._binding.wait_for_stream(stream, other)

    @contextmanager
    def timed(self, stream: int) -> Iterator[list[float]]:
        """Gives a list that holds, at the end, the milliseconds that the device spent on what was queued inside."""
        binding = self._binding
        milliseconds: list[float] = []
        with self._translated("an event"):
            start, end = binding.event(), binding.event()
            try:
                binding.record(start, stream)
                yield milliseconds
                binding.record(end, stream)
                binding.synchronize(stream)
                milliseconds.append(binding.elapsed_ms(start, end))
            finally:
                binding.destroy_event(start)
                binding.destroy_event(end)

    # -- kernels of our own

    def load_kernels(self) -> None:
        """Lets the driver compile them, which it keeps for the next start. What follows needs it."""
        if self._kernels is None:
            with self._translated("kernels between levels"):
                self._kernels = DeviceKernels(Driver())

    def kernel(self, name: str, threads: int, stream: int, *arguments: int) -> None:
        """Queues one; see `device_kernels`."""
        assert self._kernels is not None
        with self._translated(f"the kernel {name}"):
            self._kernels.launch(name, threads, stream, *arguments)

    def clear(self, address: int, size: int, stream: int) -> None:
        """Queues zeros."""
        assert self._kernels is not None
        with self._translated("memory that is cleared"):
            self._kernels.clear(address, size, stream)

    def copy_within(self, address: int, source: int, size: int, stream: int) -> None:
        """Queues a copy from one place on the device to another."""
        assert self._kernels is not None
        with self._translated("a copy on the device"):
            self._kernels.copy(address, source, size, stream)

    # -- CUDA graphs

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """A CUDA graph of what `enqueue` queues in the stream, which is not done now. Raises CaptureRefused."""
        with self._translated("a CUDA graph"):
            self._binding.begin_capture(stream)
            try:
                enqueue()
            except Exception as error:
                self._abandon_capture(stream, error)
                raise
            return self._binding.end_capture(stream)

    def _abandon_capture(self, stream: int, error: Exception) -> None:
        """Makes the stream usual again. Raises CaptureRefused if the capture was what made the work fail."""
        try:
            self._binding.destroy_graph(self._binding.end_capture(stream))
        except CudaError as failure:
            if failure.code in CAPTURE_CODES:
                raise GraphCaptureError(str(error)) from error

    def launch(self, graph: int, stream: int) -> None:
        """Queues everything in the graph with one call."""
        with self._translated("a CUDA graph"):
            self._binding.launch(graph, stream)

    def destroy_graph(self, graph: int) -> None:
        with self._translated("a CUDA graph"):
            self._binding.destroy_graph(graph)

    # -- errors

    @contextmanager
    def _translated(self, purpose: str, size: int | None = None, where: str = "") -> Iterator[None]:
        try:
            yield
        except CudaError as error:
            raise self._to_package_error(error, purpose, size, where) from error

    def _to_package_error(self, error: CudaError, purpose: str, size: int | None, where: str) -> Exception:
        if error.code in CAPTURE_CODES:
            return GraphCaptureError(str(error))
        if error.code != OUT_OF_MEMORY:
            return UnavailableError(f"{self} failed at {purpose}: {error}", SEE_DOCTOR)
        asked = "memory" if size is None else f"{size:,} bytes{where}"
        return OutOfMemoryError(
            f"{self} has no {asked} for {purpose}{self._free_memory_text()}", "close other programs on the GPU"
        )

    def _free_memory_text(self) -> str:
        with suppress(CudaError):
            free, total = self._binding.memory()
            return f": {free:,} of {total:,} bytes are free"
        return ""


def _open_binding() -> Binding:
    try:
        return open_binding()
    except ImportError as error:
        raise UnavailableError(
            f"nothing is installed to use the GPU with: {error}",
            'pip install "spmdeploy[tensorrt-rtx]" or cuda-python; on Jetson PyCUDA is part of most images',
        ) from error
    except (OSError, CudaError) as error:
        raise UnavailableError(f"the GPU cannot be used: {error}", SEE_DOCTOR) from error
