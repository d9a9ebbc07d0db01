"""The stream and the memory on the GPU that the engines of one session share."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.errors import OutOfMemoryError, SpmDeployError
from spmdeploy.gpu.arrays import ALIGNMENT
from spmdeploy.gpu.device import Device
from spmdeploy.gpu.driver import Bytes


@dataclass
class _Staging:
    """A page-locked copy of all inputs and outputs."""

    array: Bytes
    event: Any
    """Occurs when the copies that were last queued from or to the array are done."""
    busy: bool = False


class EngineMemory:
    """Inputs and outputs on the device and, page-locked, on the host, and one allocation for the activations.

    Everything is used inside `with memory.lock():` by one thread at a time. All work goes through `stream` or is
    ordered with it, so that engines which share the memory never run at once. `generation` changes whenever an address
    does: execution contexts must then be given the new addresses, and CUDA graphs captured again.

    There are two page-locked copies, so that the host can fill one while the device still reads the other. Captured
    graphs copy from and to the first. Not yet run on a GPU.
    """

    def __init__(self, device: Device, mutex: threading.RLock | None = None) -> None:
        """mutex: What `lock` holds; None: one of its own."""
        self.device = device
        self.generation = 0
        self._mutex = mutex or threading.RLock()
        self._places: dict[str, tuple[int, int]] = {}
        self._ports = 0
        self._staging: list[_Staging] = []
        self._turn = 0
        self._activations, self._activation_bytes = 0, 0
        self._temporary: set[int] = set()
        with device.current():
            self.stream = device.stream()
        self._open = True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Wait for other threads and make the device's context current."""
        with self._mutex, self.device.current():
            yield

    def reserve(self, sizes: Mapping[str, int], batch: int) -> None:
        """Make room for `batch` items under each name. What was reserved before keeps its room.

        Args:
            sizes: Bytes of one item, by name.
            batch: Number of items.

        Raises:
            OutOfMemoryError: The message says how many items there is room for.
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
            for _ in range(2):
                array = self.device.pinned(end, "inputs and outputs")
                self._staging.append(_Staging(array, None))
                self._staging[-1].event = self.device.event()
        except OutOfMemoryError as exc:
            room = self.device.memory()[0] // sum(sizes.values())
            hint = f"there is room for batches of {room}: --max-batch {room}" if room else exc.hint
            raise OutOfMemoryError(exc.problem, hint) from exc
        self._places = places

    def address(self, name: str) -> int:
        """Return where an input or output is on the device."""
        return self._ports + self._places[name][0]

    def host(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Return the first page-locked array for an input or output, once no queued copy uses it."""
        staging = self._staging[0]
        self._wait(staging)
        return self._view(staging, name, shape, dtype)

    def stage(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Queue copies of inputs to their places on the device. The arrays may be changed afterwards."""
        staging = self._next_staging()
        for name, array in inputs.items():
            staged = self._view(staging, name, array.shape, array.dtype.name)
            np.copyto(staged, array)
            self.device.copy_in(self.address(name), staged, self.stream)
        self._mark_busy(staging)

    def upload(self, address: int, content: NDArray[np.uint8]) -> None:
        """Copy bytes to the device through the page-locked memory."""
        for start in range(0, content.size, self._staging[0].array.size):
            staging = self._next_staging()
            part = staging.array[: min(staging.array.size, content.size - start)]
            part[:] = content[start : start + part.size]
            self.device.copy_in(address + start, part, self.stream)
            self._mark_busy(staging)

    def download(self, address: int, content: NDArray[np.uint8]) -> None:
        """Copy from the device into bytes through the page-locked memory."""
        for start in range(0, content.size, self._staging[0].array.size):
            staging = self._next_staging()
            part = staging.array[: min(staging.array.size, content.size - start)]
            self.device.copy_out(part, address + start, self.stream)
            self.device.synchronize(self.stream)
            content[start : start + part.size] = part

    def _view(self, staging: _Staging, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        start, size = self._places[name][0], math.prod(shape) * np.dtype(dtype).itemsize
        return staging.array[start : start + size].view(dtype).reshape(shape)

    def _next_staging(self) -> _Staging:
        """The page-locked copy that was not used last, once no queued copy uses it."""
        self._turn = 1 - self._turn
        staging = self._staging[self._turn]
        self._wait(staging)
        return staging

    def _mark_busy(self, staging: _Staging) -> None:
        self.device.record(staging.event, self.stream)
        staging.busy = True

    def _wait(self, staging: _Staging) -> None:
        if staging.busy:
            self.device.wait_for_event(staging.event)
            staging.busy = False

    def allocate_temporary(self, size: int, purpose: str) -> int:
        """Return the address of memory that `release_temporary` or `close` frees.

        Args:
            size: In bytes.
            purpose: For the error message.

        Raises:
            OutOfMemoryError: The GPU has too little memory.
        """
        address = self.device.allocate(size, purpose)
        self._temporary.add(address)
        return address

    def release_temporary(self, address: int) -> None:
        """Free memory after the work that uses it. Safe to call twice, after `close` and outside `lock`."""
        with self._mutex:
            if address not in self._temporary:
                return
            self._temporary.remove(address)
            with self.device.current():
                with suppress(SpmDeployError):  # a device that has failed fails again, and does no more work
                    self.device.synchronize(self.stream)
                self.device.free(address)

    def activations(self, size: int) -> tuple[int, int]:
        """Return address and bytes of at least `size` bytes for activations.

        Raises:
            OutOfMemoryError: There is no memory for activations then until the next call.
        """
        if size > self._activation_bytes:
            self._free_activations()
            self._activations = self.device.allocate(size, "activations")
            self._activation_bytes = size
        return self._activations, self._activation_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of GPU memory that are allocated for activations now."""
        return self._activation_bytes

    def room_for_activations(self) -> int:
        """Return the most bytes that `activations` could be called with."""
        return self.device.memory()[0] + self._activation_bytes

    def _before_freeing(self) -> None:
        """Wait until no work uses an address, and make its users ask for it again."""
        self.generation += 1
        for staging in self._staging:
            staging.busy = False
        with suppress(SpmDeployError):  # a device that has failed fails again, and does no more work
            self.device.synchronize(self.stream)

    def close(self) -> None:
        """Free everything and close the device. Safe to call twice."""
        with self._mutex:
            if not self._open:
                return
            self._open = False
            try:
                with self.device.current():
                    for address in tuple(self._temporary):
                        self.release_temporary(address)
                    self._free_activations()
                    self._free_ports()
                    self.device.destroy_stream(self.stream)
            finally:
                self.device.close()

    def _free_ports(self) -> None:
        self._before_freeing()
        address, staging = self._ports, self._staging
        self._ports, self._staging, self._places = 0, [], {}
        for one in staging:
            if one.event is not None:
                self.device.destroy_event(one.event)
            self.device.free_pinned(one.array)
        if address:
            self.device.free(address)

    def _free_activations(self) -> None:
        self._before_freeing()
        address, self._activations, self._activation_bytes = self._activations, 0, 0
        if address:
            self.device.free(address)
