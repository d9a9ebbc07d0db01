"""The `layout` and `picture` engines: a layout is computed once, and its cached tensors stay on the GPU.

Run on the simulated GPU of the tests only, not yet on a GPU.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import LayoutRun
from spmdeploy.backends.tensorrt_engine import MAX_FIXED, LoadedEngine, item_bytes
from spmdeploy.engines.record import Port
from spmdeploy.engines.store import StoredEngine
from spmdeploy.errors import InputError, OutOfMemoryError, UnavailableError
from spmdeploy.gpu.arrays import ALIGNMENT
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.types import LayoutInput

MAX_LAYOUTS = 2
"""Layouts on the GPU at once. One that is used again after its memory was reused is computed again."""

_ON_HOST = ("image", "edited", "unrounded")
"""Ports of the picture engine whose contents are copied from or to the host."""


class StoredParts(NamedTuple):
    """The two engines of one library and precision."""

    layout: StoredEngine
    picture: StoredEngine


@dataclass(frozen=True)
class _Part:
    """Items of a batch that the engines take at once."""

    start: int
    count: int
    addresses: Mapping[str, int]
    """Of the layout's inputs and of the cached tensors."""


@dataclass(frozen=True)
class _OnDevice:
    """A computed layout."""

    allocation: int
    parts: tuple[_Part, ...]


class CachedLayoutEngines:
    """Both engines, loaded. Layouts are numbered as they are bound; the `MAX_LAYOUTS` last used are on the GPU."""

    def __init__(self, library: Any, stored: StoredParts, known: Mapping[str, Port], memory: EngineMemory) -> None:
        """Load both engines.

        Args:
            library: The module `tensorrt` or `tensorrt_rtx`.
            stored: The engines.
            known: Inputs and outputs of the `edit` graph by name.
            memory: The session's, with places for the image and the edited image.

        Raises:
            BundleError: An engine does not fit this machine or the other engine.
            OutOfMemoryError, UnavailableError: The GPU cannot take them.
        """
        self._memory, self._known = memory, known
        self._bound: OrderedDict[int, _OnDevice] = OrderedDict()
        self._count = 0
        self._engines: list[LoadedEngine] = []
        layout, picture = (engine.require_compatible() for engine in stored)
        cached = {port.name: port for port in layout.outputs}
        ports = {**known, **cached}
        taken = [port.name for port in layout.inputs]
        read = [port.name for port in (*picture.inputs, *picture.outputs)]
        try:
            for engine, names in ((stored.layout, [*taken, *cached]), (stored.picture, {*read, "image", "edited"})):
                expected = {name: ports[name] for name in names if name in ports}
                self._engines.append(LoadedEngine(library, engine, expected, memory, on_host=_ON_HOST))
        except BaseException:
            self.close()
            raise
        self._layout, self._picture = self._engines
        self._on_device = {
            name: ports[name] for name in dict.fromkeys([*taken, *cached, *read]) if name not in _ON_HOST
        }
        self._step = min(layout.batch.max, picture.batch.max)

    @property
    def engines(self) -> tuple[LoadedEngine, ...]:
        """The loaded engines, `layout` first."""
        return tuple(self._engines)

    def bind(self, layout: LayoutInput) -> LayoutRun:
        """Compute a layout now; returns a function from images, uint8 (B, size, size, 3), to edited ones."""
        arrays = {name: np.array(array) for name, array in layout._asdict().items()}  # the caller may change its own
        batch = len(arrays["mask"])
        for name, array in arrays.items():
            self._check(name, array, batch)
        with self._memory.lock():
            number, self._count = self._count, self._count + 1
            self._computed(number, arrays)

        def run(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
            self._check("image", image, batch)
            edited = np.empty(image.shape, np.uint8)
            with self._memory.lock():
                parts = self._computed(number, arrays).parts
                for part in parts:
                    end = part.start + part.count
                    self._memory.stage({"image": image[part.start : end]})
                    as_graph = len(parts) * MAX_LAYOUTS <= MAX_FIXED
                    self._picture.enqueue_on(part.addresses, part.count, self._memory.stream, as_graph)
                    self._memory.download(self._memory.address("edited"), edited[part.start : end].reshape(-1))
            return edited

        return run

    def _computed(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> _OnDevice:
        """The layout on the GPU, computed if it is not there any more. To be called inside `lock`."""
        if not self._engines:
            raise UnavailableError("the session was closed", "open another")
        if number in self._bound:
            self._bound.move_to_end(number)
            return self._bound[number]
        while len(self._bound) >= MAX_LAYOUTS:
            self._release_oldest()
        found = self._allocate(len(arrays["mask"]))
        try:
            for part in found.parts:
                for name, array in arrays.items():
                    if name in part.addresses:
                        given = np.ascontiguousarray(array[part.start : part.start + part.count])
                        self._memory.upload(part.addresses[name], given.view(np.uint8).reshape(-1))
                self._layout.enqueue_on(part.addresses, part.count, self._memory.stream, cuda_graphs=False)
        except BaseException:
            self._memory.release_temporary(found.allocation)
            raise
        self._bound[number] = found
        return found

    def _allocate(self, batch: int) -> _OnDevice:
        """Memory for a layout. Other layouts give way where there is too little."""
        places, end = [], 0
        for start in range(0, batch, self._step):
            count, offsets = min(self._step, batch - start), {}
            for name, port in self._on_device.items():
                offsets[name] = end
                end += math.ceil(item_bytes(port) * count / ALIGNMENT) * ALIGNMENT
            places.append((start, count, offsets))
        while True:
            try:
                allocation = self._memory.allocate_temporary(end, "the cached layout")
                break
            except OutOfMemoryError:
                if not self._bound:
                    raise
                self._release_oldest()
        parts = [
            _Part(start, count, {name: allocation + offset for name, offset in offsets.items()})
            for start, count, offsets in places
        ]
        return _OnDevice(allocation, tuple(parts))

    def _release_oldest(self) -> None:
        self._memory.release_temporary(self._bound.popitem(last=False)[1].allocation)

    def _check(self, name: str, array: NDArray[Any], batch: int) -> None:
        port = self._known[name]
        if array.dtype.name != port.dtype or array.shape != (batch, *port.shape[1:]) or not batch:
            lengths = ", ".join(map(str, (batch or "B", *port.shape[1:])))
            problem = f"{name} is {array.dtype} {array.shape}, but the graph has {port.dtype} ({lengths}) there"
            raise InputError(problem, "give arrays of one batch of at least one edit")

    def close(self) -> None:
        """Free everything on the device. Safe to call twice."""
        while self._bound:
            self._release_oldest()
        while self._engines:
            self._engines.pop().close()
