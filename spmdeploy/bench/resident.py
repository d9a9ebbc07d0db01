"""Edits whose inputs and output stay in the GPU's memory: what the engine scope times there, alike for every backend.

Each is put on a stream and timed by events on it (`Device.timed`), the clock being stopped after the stream has come to
rest. ONNX Runtime computes on a stream of its own and waits for it before it returns: there the events enclose that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Session
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.tensorrt import TensorRtSession
from spmdeploy.bench.workloads import EditBatch
from spmdeploy.errors import UnavailableError
from spmdeploy.gpu.arrays import DeviceArray
from spmdeploy.gpu.device import Device


class DeviceRun(Protocol):
    """One batch on a device."""

    stream: int

    def launch(self) -> None:
        """Puts the edit on the stream; need not wait for it."""

    def fetch(self) -> NDArray[np.uint8]:
        """The pictures of the last edit, uint8 (B, S, S, 3), once the stream has come to rest."""


def device_run(session: Session, batch: EditBatch, device: Device, stack: ExitStack) -> DeviceRun:
    """The batch on the session's GPU until the stack is closed. Raises UnavailableError for backends that cannot."""
    if isinstance(session, TensorRtSession | OnnxRuntimeSession):
        return _ResidentArrays(session, batch, device, stack)
    if session.backend.startswith("torch"):
        from spmdeploy.backends.pytorch import TorchSession
        from spmdeploy.bench.torch_backends import ResidentTorchEdit

        assert isinstance(session, TorchSession)
        return ResidentTorchEdit(session, batch)
    raise UnavailableError(f"{session.backend} does not take inputs in the GPU's memory", "use --scope edit")


def time_on_device(edit: DeviceRun, device: Device) -> tuple[float, float]:
    """What passed on the device during one edit, and what passed on the host until it was launched."""
    with device.current():
        with device.timed(edit.stream) as passed:
            called = time.perf_counter()
            edit.launch()
            launched = time.perf_counter()
        return passed[0], (launched - called) * 1000


class _ResidentArrays:
    """For the libraries that take addresses."""

    def __init__(
        self, session: TensorRtSession | OnnxRuntimeSession, batch: EditBatch, device: Device, stack: ExitStack
    ) -> None:
        self._device = device
        self._stack = stack
        with device.current():
            self.stream = device.stream()
            stack.callback(self._given_back, device.destroy_stream, self.stream)
            self._inputs = {name: self._uploaded(array, name) for name, array in batch.named.items()}
            self._edited = self._reserved(batch.image, "edited")
            device.synchronize(self.stream)
        if isinstance(session, TensorRtSession):
            self._launch: Callable[[], None] = partial(
                session.run_device, self._inputs, {"edited": self._edited}, self.stream
            )
            stack.callback(session.synchronize)
        else:
            self._launch = session.bound(self._inputs, {"edited": self._edited})

    def launch(self) -> None:
        self._launch()

    def fetch(self) -> NDArray[np.uint8]:
        picture = np.empty(self._edited.shape, np.uint8)
        with self._device.current():
            pinned = self._device.pinned(picture.nbytes, "the edited pictures")
            try:
                self._device.copy_out(pinned, self._edited.address, self.stream)
                self._device.synchronize(self.stream)
                picture[:] = pinned.reshape(picture.shape)
            finally:
                self._device.free_pinned(pinned)
        return picture

    def _uploaded(self, array: NDArray[Any], name: str) -> DeviceArray:
        place = self._reserved(array, name)
        pinned = self._device.pinned(array.nbytes, name)
        try:
            pinned[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            self._device.copy_in(place.address, pinned, self.stream)
            self._device.synchronize(self.stream)
        finally:
            self._device.free_pinned(pinned)
        return place

    def _reserved(self, like: NDArray[Any], name: str) -> DeviceArray:
        address = self._device.allocate(like.nbytes, name)
        self._stack.callback(self._given_back, self._device.free, address)
        return DeviceArray(address, like.shape, like.dtype.name)

    def _given_back(self, give: Callable[[int], None], handle: int) -> None:
        with self._device.current():
            give(handle)
