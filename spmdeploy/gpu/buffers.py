"""The stream and the memory on the GPU that the engines of one session share."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.errors import OutOfMemoryError, SpmDeployError
from spmdeploy.gpu.device import Device

ALIGNMENT = 256
"""TensorRT wants every address to be a multiple of this."""


class EngineMemory:
    """Inputs and outputs on the device and, page-locked, on the host, and one piece for the activations.

    Everything is used inside `with memory.in_use():` by one thread at a time; all work goes through `stream` or is
    ordered with it, so that engines which share the memory never run at once. `generation` changes whenever an address
    does: execution contexts must then be told, and CUDA graphs be captured again.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.generation = 0
        self._lock = threading.RLock()
        self._places: dict[str, tuple[int, int]] = {}
        self._ports, self._host = 0, np.empty(0, np.uint8)
        self._activations, self._activation_bytes = 0, 0
        self._lent: set[int] = set()
        self._unwaited = False
        with device.current():
            self.stream = device.stream()
        self._open = True

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Waits for other threads; makes the device's context current."""
        with self._lock, self.device.current():
            yield

    # -- inputs and outputs

    def reserve(self, sizes: Mapping[str, int], batch: int) -> None:
        """Room for so many bytes an edit under each name, `batch` times; what was reserved before keeps its room.

        Raises OutOfMemory saying how many edits there is room for.
        """
        wanted = {name: size for name, (_, size) in self._places.items()}
        wanted |= {name: max(size * batch, wanted.get(name, 0)) for name, size in sizes.items()}
        places, end = {}, 0
        for name, size in wanted.items():
            places[name] = (end, size)
            end = math.ceil((end + size) / ALIGNMENT) * ALIGNMENT
        self._free_ports()
        try:
            self._ports = self.device.allocate(end, "inputs and outputs")
            self._host = self.device.pinned(end, "inputs and outputs")
        except OutOfMemoryError as error:
            room = self.device.memory()[0] // sum(sizes.values())
            raise OutOfMemoryError(error.problem, f"there is room for batches of {room}: --max-batch {room}") from error
        self._places = places

    def address(self, name: str) -> int:
        return self._ports + self._places[name][0]

    def host(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The page-locked array for an input or output, of that shape; nothing that was queued works on it."""
        self._wait()
        start, size = self._places[name][0], math.prod(shape) * np.dtype(dtype).itemsize
        return self._host[start : start + size].view(dtype).reshape(shape)

    def stage(self, name: str, array: NDArray[Any]) -> None:
        """Queues a copy of an input to its place on the device; `array` may be changed afterwards."""
        staged = self.host(name, array.shape, array.dtype.name)
        np.copyto(staged, array)
        self.device.copy_in(self.address(name), staged, self.stream)

    def queued(self) -> None:
        """Says that something was queued that nobody waits for; whoever next needs the page-locked memory does."""
        self._unwaited = True

    def _wait(self) -> None:
        if self._unwaited:
            self.device.synchronize(self.stream)
            self._unwaited = False

    # -- what a cascade keeps on the device

    def allocate_temporary(self, size: int, purpose: str) -> int:
        """Address of memory that `release_temporary` or `close` frees. Raises OutOfMemoryError."""
        address = self.device.allocate(size, purpose)
        self._lent.add(address)
        return address

    def release_temporary(self, address: int) -> None:
        """Waits for whoever works there. Safe to call twice, after `close` and outside `in_use`."""
        with self._lock:
            if address not in self._lent:
                return
            self._lent.remove(address)
            self._unwaited = False
            with self.device.current():
                with suppress(SpmDeployError):  # a device that has failed fails again, and it works no more
                    self.device.synchronize(self.stream)
                self.device.free(address)

    def upload(self, address: int, content: NDArray[np.uint8]) -> None:
        """Copies bytes to the device, in pieces of the page-locked memory."""
        for start in range(0, content.size, self._host.size):
            self._wait()
            piece = self._host[: min(self._host.size, content.size - start)]
            piece[:] = content[start : start + piece.size]
            self.device.copy_in(address + start, piece, self.stream)
            self.queued()

    def download(self, address: int, content: NDArray[np.uint8]) -> None:
        """Copies from the device into bytes, in pieces of the page-locked memory."""
        for start in range(0, content.size, self._host.size):
            self._wait()
            piece = self._host[: min(self._host.size, content.size - start)]
            self.device.copy_out(piece, address + start, self.stream)
            self.device.synchronize(self.stream)
            content[start : start + piece.size] = piece

    # -- activations

    def activations(self, size: int) -> tuple[int, int]:
        """Address and bytes of at least `size` bytes. Raises OutOfMemory; there are none then until the next call."""
        if size > self._activation_bytes:
            self._free_activations()
            self._activations = self.device.allocate(size, "activations")
            self._activation_bytes = size
        return self._activations, self._activation_bytes

    @property
    def activation_bytes(self) -> int:
        return self._activation_bytes

    def room_for_activations(self) -> int:
        """The most bytes that `activations` could be asked for."""
        return self.device.memory()[0] + self._activation_bytes

    def _settle(self) -> None:
        """Before an address is given up: nobody works there any more, and whoever knows it must ask again."""
        self.generation += 1
        self._unwaited = False
        with suppress(SpmDeployError):  # a device that has failed fails again, and it works no more
            self.device.synchronize(self.stream)

    # -- the end

    def close(self) -> None:
        """Frees everything and closes the device. Safe to call twice."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            try:
                with self.device.current():
                    for address in tuple(self._lent):
                        self.release_temporary(address)
                    self._free_activations()
                    self._free_ports()
                    self.device.destroy_stream(self.stream)
            finally:
                self.device.close()

    def _free_ports(self) -> None:
        self._settle()
        address, host = self._ports, self._host
        self._ports, self._host, self._places = 0, np.empty(0, np.uint8), {}
        if host.size:
            self.device.free_pinned(host)
        if address:
            self.device.free(address)

    def _free_activations(self) -> None:
        self._settle()
        address, self._activations, self._activation_bytes = self._activations, 0, 0
        if address:
            self.device.free(address)
