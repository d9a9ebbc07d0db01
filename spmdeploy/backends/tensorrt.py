"""The session on TensorRT and TensorRT-RTX engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Unsupported
from spmdeploy.backends.device_pyramid import DeviceCascade
from spmdeploy.backends.tensorrt_engine import LoadedEngine
from spmdeploy.bundle.manifest import EDIT, REFINE
from spmdeploy.engines.record import BATCH, Port
from spmdeploy.engines.store import StoredEngine
from spmdeploy.errors import BundleError, InputError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.gpu.arrays import ALIGNMENT, DeviceArray, as_device_array
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.gpu.device import Device
from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.pyramid import PyramidLevel
from spmdeploy.types import ModelInput

HostArrays = Mapping[str, NDArray[Any]]
_NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_NO_REFINE = Unsupported("there is no refine engine", "build one: spmdeploy build BUNDLE --graph refine")


class TensorRtSession:
    """The engines of a bundle on one GPU. Batches of any size: they are run in parts that the engine takes.

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
    ) -> None:
        """library: the module `tensorrt` or `tensorrt_rtx`. edit, refine: engines that fit this machine, by that
        library and in one precision, or why there is none that refines. size: height and width of the graphs' pictures.
        ordinal: of the GPU.

        Raises BundleError (an engine does not fit), UnavailableError (no GPU, driver or package), OutOfMemory.
        """
        record = edit.require_compatible()
        self.backend: str = record.runtime
        self.device = f"cuda:{ordinal}"
        self.precision = record.precision
        self.size = size
        self.refine_unsupported = refine if isinstance(refine, Unsupported) else None
        self.refines = self.refine_unsupported is None
        self.max_batch = record.batch.max
        self._library, self._refine_found = library, refine
        self._engines: dict[str, LoadedEngine] = {}
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
        """What did not go as it should, though the results are right."""
        return tuple(note for engine in self._engines.values() for note in engine.notes)

    @property
    def engine_bytes(self) -> int:
        """Of the engine files that are loaded: `refine` is from its first use on."""
        return sum(engine.record.engine.bytes for engine in self._engines.values())

    @property
    def activation_bytes(self) -> int:
        """What the engines have been given on the GPU to keep intermediate results in."""
        return self._memory.activation_bytes

    # -- from and to the host

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        edited: NDArray[np.uint8] = self._run(EDIT, "edited", inputs._asdict())
        return edited

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        unrounded: NDArray[np.float32] = self._run(EDIT, "unrounded", inputs._asdict())
        return unrounded

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        unrounded: NDArray[np.float32] = self._run(REFINE, "unrounded", {**inputs._asdict(), "coarse": coarse})
        return unrounded

    def _run(self, graph: str, output: str, inputs: HostArrays) -> NDArray[Any]:
        ports = graph_ports(graph, self.size)
        batch = _common_batch({name: (array.shape, array.dtype.name) for name, array in inputs.items()}, ports)
        with self._memory.in_use():
            engine = self._engine(graph)
            most = engine.record.batch.max
            parts = [
                engine.run({name: array[start : start + most] for name, array in inputs.items()}, output)
                for start in range(0, batch, most)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def timed_run(self, inputs: ModelInput) -> float:
        """Milliseconds that the device spends on `run` of one batch of at most `max_batch`, copies in and out included.

        By its own clock; what the host does before and after does not count.
        """
        with self._memory.in_use():
            return self._engine(EDIT).timed_run(inputs._asdict(), "edited")

    # -- from and to the device

    def run_device(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: int, graph: str = EDIT) -> None:
        """Queues a batch of edits in a CUDA stream, without waiting and without a copy through the host.

        inputs: image, labels, instances, mask (and coarse, for the graph refine) with the shapes and dtypes of `run`.
        outputs: edited or unrounded or both, written to. All are arrays on this GPU with `__cuda_array_interface__`
        (PyTorch's, CuPy's, ...) or `DeviceArray`s, at addresses that are multiples of 256; the caller keeps them
        alive until the stream has done its work. stream: the handle, such as `torch.cuda.current_stream().cuda_stream`.

        Work of other streams that an array names is waited for on the device. Without CUDA graphs, as addresses differ.
        Raises InputError for arrays that do not fit, naming them.
        """
        if graph not in (EDIT, REFINE):
            raise UsageError(f"no graph {graph!r}", f"choose from {EDIT}, {REFINE}")
        ports = graph_ports(graph, self.size)
        wanted = [name for name in ports if name not in _OUTPUTS]
        if set(inputs) != set(wanted) or not outputs or not set(outputs) <= set(_OUTPUTS):
            takes = f"{graph} takes {', '.join(wanted)} and gives {' or '.join(_OUTPUTS)}"
            given_words = f"not {', '.join(inputs) or 'nothing'} and {', '.join(outputs) or 'nothing'}"
            raise InputError(f"{takes}, {given_words}", "name every input, and at least one output")
        given = {name: as_device_array(value, name) for name, value in {**inputs, **outputs}.items()}
        batch = _common_batch({name: (array.shape, array.dtype) for name, array in given.items()}, ports)
        with self._memory.in_use():
            for name, array in given.items():
                self._check_place(name, array, written=name in outputs)
            for other in {array.stream for array in given.values()} - {None, stream}:
                self._memory.device.wait_for_stream(stream, int(other or 0))
            engine = self._engine(graph)
            most = engine.record.batch.max
            for start in range(0, batch, most):
                addresses = {name: array.address + start * array.bytes_per_item for name, array in given.items()}
                engine.enqueue_on(addresses, min(most, batch - start), stream)

    def synchronize(self) -> None:
        """Waits for whatever `run_device` has queued: then arrays that it was given may be freed."""
        with self._memory.in_use():
            self._memory.device.synchronize(self._memory.stream)

    def _check_place(self, name: str, array: DeviceArray, written: bool) -> None:
        memory, where = self._memory, None
        if array.address:
            where = memory.device.device_of(array.address)
        if where != memory.device.ordinal:
            place = "not in a GPU's memory" if where is None else f"on cuda:{where}"
            raise InputError(f"{name} is {place}, but the session is on {self.device}", "copy it there first")
        if array.address % ALIGNMENT:
            raise InputError(
                f"{name} starts at an address that is no multiple of {ALIGNMENT}", "copy it into an array of its own"
            )
        if written and array.read_only:
            raise InputError(f"{name} is to be written to, but is read-only", "give another array")

    # -- engines

    def device_cascade(self, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch: int) -> DeviceCascade:
        """Carries a window up through its levels without its picture leaving the GPU; see `SupportsDevicePyramid`."""
        with self._memory.in_use():
            edit, refine = self._engine(EDIT), self._engine(REFINE)
            most = min(batch, refine.record.batch.max)
            edit.prepare(1)
            refine.prepare(most)  # first what nothing goes without
        return DeviceCascade(self._memory, edit.enqueue_in_place, refine.enqueue_in_place, most, frame, levels)

    def _engine(self, graph: str) -> LoadedEngine:
        """Inside `in_use`. The refine engine is loaded when it is first asked for."""
        if not self._open:
            raise UnavailableError(f"the session on {self.device} was closed", "open another")
        if graph not in self._engines:
            if isinstance(self._refine_found, Unsupported):
                raise BundleError(*self._refine_found)
            self._load(graph, self._refine_found)
        return self._engines[graph]

    def _load(self, graph: str, found: StoredEngine) -> None:
        self._engines[graph] = LoadedEngine(self._library, found, graph_ports(graph, self.size), self._memory)

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        try:
            with self._memory.in_use():
                with suppress(SpmDeployError):  # a device that has failed fails again, and all is to be freed
                    self._memory.device.synchronize(self._memory.stream)
                for engine in self._engines.values():
                    engine.close()
        finally:
            self._memory.close()

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------------------------------- what the graphs take and give

_OUTPUTS = ("edited", "unrounded")


def graph_ports(graph: str, size: int) -> dict[str, Port]:
    """Inputs and outputs of the `edit` or `refine` graph for pictures of that size, by name."""
    picture, plane = (BATCH, size, size, 3), (BATCH, size, size)
    ports = [
        Port("image", "uint8", picture),
        Port("labels", "uint8", plane),
        Port("instances", "int32", plane),
        Port("mask", "uint8", plane),
        Port("edited", "uint8", picture),
        Port("unrounded", "float32", picture),
    ]
    if graph == REFINE:
        ports.append(Port("coarse", "float32", (BATCH, size // 2, size // 2, 3)))
    return {port.name: port for port in ports}


def _common_batch(arrays: Mapping[str, tuple[tuple[int, ...], str]], ports: Mapping[str, Port]) -> int:
    """How many edits the arrays hold, by their shapes and dtypes. Raises InputError naming the first that is wrong."""
    batch = next(iter(arrays.values()))[0][:1]
    for name, (shape, dtype) in arrays.items():
        port = ports[name]
        if dtype != port.dtype or shape != (*batch, *port.shape[1:]) or not all(batch):
            lengths = ", ".join(map(str, (batch[0] if batch and batch[0] else "B", *port.shape[1:])))
            problem = f"{name} is {dtype} {shape}, but the graph has {port.dtype} ({lengths}) there"
            raise InputError(problem, "give arrays of one batch of at least one edit")
    return batch[0]
