"""Session on TensorRT and TensorRT-RTX engines. Run on the simulated GPU of the tests only, not yet on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import LayoutRun, Unsupported
from spmdeploy.backends.device_pyramid import EXTRA_BYTES, DeviceCascade
from spmdeploy.backends.tensorrt_engine import LoadedEngine
from spmdeploy.backends.tensorrt_layout import CachedLayoutEngines, StoredParts
from spmdeploy.bundle.manifest import EDIT, REFINE
from spmdeploy.engines.record import BATCH, Port
from spmdeploy.engines.store import StoredEngine
from spmdeploy.errors import BundleError, InputError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.gpu.arrays import ALIGNMENT, DeviceArray, as_device_array
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.gpu.device import Device
from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.pyramid import PyramidLevel
from spmdeploy.types import BackendPrecision, LayoutInput, ModelInput

HostArrays = Mapping[str, NDArray[Any]]
_NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_OUTPUTS = ("edited", "unrounded")
_NO_REFINE = Unsupported("there is no refine engine", "build one: spmdeploy build BUNDLE --graph refine")
_NO_PARTS = Unsupported(
    "there are no engines for cached layouts", "build them: spmdeploy build BUNDLE --graph cached-layout"
)


class TensorRtSession:
    """The engines of a bundle on one GPU. Batches of any size: they are split into parts that the engine takes.

    Its methods may be called from several threads and wait for each other; several sessions may be open at once. Use it
    as a context manager or call `close`: nothing on the device is freed before.
    """

    def __init__(
        self,
        library: Any,
        edit: StoredEngine,
        refine: StoredEngine | Unsupported = _NO_REFINE,
        size: int = 256,
        ordinal: int = 0,
        parts: StoredParts | Unsupported = _NO_PARTS,
    ) -> None:
        """Load the edit engine; the others are loaded when they are first used.

        Args:
            library: The module `tensorrt` or `tensorrt_rtx`.
            edit: An engine of that library that fits this machine.
            refine: One of the same library and precision, or why there is none.
            size: Height and width of the graphs' images.
            ordinal: Number of the GPU.
            parts: The engines for cached layouts, of the same library and precision, or why there are none.

        Raises:
            BundleError: An engine does not fit.
            UnavailableError: There is no GPU, driver or package.
            OutOfMemoryError: The GPU has too little memory.
        """
        record = edit.require_compatible()
        self.backend: str = record.runtime
        self.device = f"cuda:{ordinal}"
        self.precision: BackendPrecision = record.precision
        self.size = size
        self.refine_unsupported = refine if isinstance(refine, Unsupported) else None
        self.refines = self.refine_unsupported is None
        self.layout_unsupported = parts if isinstance(parts, Unsupported) else None
        self.max_batch = record.batch.max
        self._library, self._refine_engine = library, refine
        self._engines: dict[str, LoadedEngine] = {}
        self._stored_parts = parts
        self._parts: CachedLayoutEngines | None = None
        self._open = True
        self._memory = EngineMemory(Device(ordinal))
        try:
            self._load(EDIT, edit)
        except BaseException:
            self.close()
            raise
        device = self._memory.device
        self.provider = f"{_NAMES[self.backend]} {library.__version__} on {device.facts.name} ({device.binding})"

    @property
    def notes(self) -> tuple[str, ...]:
        """Non-fatal warnings collected so far."""
        return tuple(note for engine in self._loaded for note in engine.notes)

    @property
    def engine_bytes(self) -> int:
        """Bytes of the engine files that are loaded: all but `edit` are from their first use on."""
        return sum(engine.record.engine.bytes for engine in self._loaded)

    @property
    def _loaded(self) -> tuple[LoadedEngine, ...]:
        return (*self._engines.values(), *(self._parts.engines if self._parts else ()))

    @property
    def activation_bytes(self) -> int:
        """Bytes on the GPU for the engines' intermediate results."""
        return self._memory.activation_bytes

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        """See `Session.run`."""
        edited: NDArray[np.uint8] = self._run(EDIT, "edited", inputs._asdict())
        return edited

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        """See `Session.run_unrounded`."""
        unrounded: NDArray[np.float32] = self._run(EDIT, "unrounded", inputs._asdict())
        return unrounded

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Session.refine`."""
        unrounded: NDArray[np.float32] = self._run(REFINE, "unrounded", {**inputs._asdict(), "coarse": coarse})
        return unrounded

    def _run(self, graph: str, output: str, inputs: HostArrays) -> NDArray[Any]:
        ports = graph_ports(graph, self.size)
        batch = _common_batch({name: (array.shape, array.dtype.name) for name, array in inputs.items()}, ports)
        with self._memory.lock():
            engine = self._engine(graph)
            step = engine.record.batch.max
            parts = [
                engine.run({name: array[start : start + step] for name, array in inputs.items()}, output)
                for start in range(0, batch, step)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        """Compute a layout now and keep it on the GPU; see `SupportsLayoutCache`.

        Without the engines for it (`layout_unsupported`) the layout is computed with every image.
        """
        if isinstance(self._stored_parts, Unsupported):
            return lambda image: self.run(ModelInput(image, *layout))
        with self._memory.lock():
            self._engine(EDIT)
            if self._parts is None:
                known = graph_ports(EDIT, self.size)
                self._parts = CachedLayoutEngines(self._library, self._stored_parts, known, self._memory)
            return self._parts.bind(layout)

    def timed_run(self, inputs: ModelInput) -> float:
        """Return the milliseconds of `run` by the device's clock, copies in and out included.

        Args:
            inputs: One batch of at most `max_batch`.
        """
        with self._memory.lock():
            return self._engine(EDIT).timed_run(inputs._asdict(), "edited")

    def run_device(
        self,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        stream: int,
        graph: str = EDIT,
        cuda_graphs: bool = True,
    ) -> None:
        """Queue a batch of edits in a CUDA stream, without waiting and without a copy through the host.

        Work of other streams that an array names is waited for on the device. A batch at the same addresses is replayed
        as a CUDA graph from its third time on.

        Args:
            inputs: image, labels, instances, mask (and coarse, for the graph refine) with the shapes and dtypes of
                `run`: arrays on this GPU with `__cuda_array_interface__` (PyTorch's, CuPy's) or `DeviceArray`s, at
                addresses that are multiples of 256. The caller keeps them alive until the stream has done its work.
            outputs: edited or unrounded or both, to be written to.
            stream: The handle, such as `torch.cuda.current_stream().cuda_stream`.
            graph: edit or refine.
            cuda_graphs: False queues every kernel by itself, to measure what graphs save.

        Raises:
            InputError: Arrays do not fit; the message names them.
        """
        if graph not in (EDIT, REFINE):
            raise UsageError(f"no graph {graph!r}", f"choose from {EDIT}, {REFINE}")
        ports = graph_ports(graph, self.size)
        wanted = [name for name in ports if name not in _OUTPUTS]
        if set(inputs) != set(wanted) or not outputs or not set(outputs) <= set(_OUTPUTS):
            takes = f"{graph} takes {', '.join(wanted)} and gives {' or '.join(_OUTPUTS)}"
            given_text = f"not {', '.join(inputs) or 'nothing'} and {', '.join(outputs) or 'nothing'}"
            raise InputError(f"{takes}, {given_text}", "name every input, and at least one output")
        given = {name: as_device_array(value, name) for name, value in {**inputs, **outputs}.items()}
        batch = _common_batch({name: (array.shape, array.dtype) for name, array in given.items()}, ports)
        with self._memory.lock():
            for name, array in given.items():
                self._check_array(name, array, written=name in outputs)
            for other in {array.stream for array in given.values()} - {None, stream}:
                self._memory.device.wait_for_stream(stream, int(other or 0))
            engine = self._engine(graph)
            step = engine.record.batch.max
            for start in range(0, batch, step):
                addresses = {name: array.address + start * array.bytes_per_item for name, array in given.items()}
                engine.enqueue_on(addresses, min(step, batch - start), stream, cuda_graphs)

    def synchronize(self) -> None:
        """Wait for everything that `run_device` has queued. Arrays that it was given may be freed then."""
        with self._memory.lock():
            self._memory.device.synchronize(self._memory.stream)

    def _check_array(self, name: str, array: DeviceArray, written: bool) -> None:
        device = self._memory.device
        where = device.device_of(array.address) if array.address else None
        if where != device.ordinal:
            place = "not in a GPU's memory" if where is None else f"on cuda:{where}"
            raise InputError(f"{name} is {place}, but the session is on {self.device}", "copy it there first")
        if array.address % ALIGNMENT:
            raise InputError(
                f"{name} starts at an address that is not a multiple of {ALIGNMENT}", "copy it into a new array"
            )
        if written and array.read_only:
            raise InputError(f"{name} is to be written to, but is read-only", "give another array")

    def device_cascade(self, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch: int) -> DeviceCascade:
        """Refine a window level by level without copying its image to the host; see `SupportsDevicePyramid`."""
        with self._memory.lock():
            edit, refine = self._engine(EDIT), self._engine(REFINE)
            batch = min(batch, refine.record.batch.max)
            edit.prepare(1)  # first what refinement through the host needs too
            refine.prepare(batch)
        return DeviceCascade(self._memory, edit.enqueue_in_place, refine.enqueue_in_place, batch, frame, levels)

    def _engine(self, graph: str) -> LoadedEngine:
        """The engine of a graph, loaded at its first use. To be called inside `lock`."""
        if not self._open:
            raise UnavailableError(f"the session on {self.device} was closed", "open another")
        if graph not in self._engines:
            if isinstance(self._refine_engine, Unsupported):
                raise BundleError(*self._refine_engine)
            self._load(graph, self._refine_engine)
        return self._engines[graph]

    def _load(self, graph: str, engine: StoredEngine) -> None:
        extra = EXTRA_BYTES if graph == REFINE else {}
        ports = graph_ports(graph, self.size)
        self._engines[graph] = LoadedEngine(self._library, engine, ports, self._memory, extra)

    def close(self) -> None:
        """Free everything on the device. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        try:
            with self._memory.lock():
                with suppress(SpmDeployError):  # a device that has failed fails again
                    self._memory.device.synchronize(self._memory.stream)
                for engine in self._engines.values():
                    engine.close()
                if self._parts is not None:
                    self._parts.close()
        finally:
            self._memory.close()

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def graph_ports(graph: str, size: int) -> dict[str, Port]:
    """Return inputs and outputs of the `edit` or `refine` graph for images of `size` by `size` pixels, by name."""
    image, plane = (BATCH, size, size, 3), (BATCH, size, size)
    ports = [
        Port("image", "uint8", image),
        Port("labels", "uint8", plane),
        Port("instances", "int32", plane),
        Port("mask", "uint8", plane),
        Port("edited", "uint8", image),
        Port("unrounded", "float32", image),
    ]
    if graph == REFINE:
        ports.append(Port("coarse", "float32", (BATCH, size // 2, size // 2, 3)))
    return {port.name: port for port in ports}


def _common_batch(arrays: Mapping[str, tuple[tuple[int, ...], str]], ports: Mapping[str, Port]) -> int:
    """The batch size of arrays given by shape and dtype. Raises InputError naming the first that does not fit."""
    batch = next(iter(arrays.values()))[0][:1]
    for name, (shape, dtype) in arrays.items():
        port = ports[name]
        if dtype != port.dtype or shape != (*batch, *port.shape[1:]) or not all(batch):
            lengths = ", ".join(map(str, (batch[0] if batch and batch[0] else "B", *port.shape[1:])))
            problem = f"{name} is {dtype} {shape}, but the graph has {port.dtype} ({lengths}) there"
            raise InputError(problem, "give arrays of one batch of at least one edit")
    return batch[0]
