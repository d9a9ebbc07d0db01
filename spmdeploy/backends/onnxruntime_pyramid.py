"""Coarse-to-fine refinement with ONNX Runtime on a GPU: images stay in GPU memory between graphs and kernels."""

from __future__ import annotations

from collections.abc import Callable

from spmdeploy.backends.device_pyramid import EXTRA_BYTES, DeviceCascade, EnqueueBatch
from spmdeploy.backends.onnxruntime_cuda import CUDA_CALLS, fixed_batch
from spmdeploy.backends.onnxruntime_graph import LoadedGraph
from spmdeploy.backends.tensorrt import graph_ports
from spmdeploy.backends.tensorrt_engine import item_bytes
from spmdeploy.bundle.manifest import EDIT, REFINE
from spmdeploy.engines.record import Port
from spmdeploy.gpu.arrays import DeviceArray
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.gpu.device import Device
from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.pyramid import PyramidLevel


class OrtCascades:
    """Inputs and outputs on the GPU for both graphs of a session, which has its own memory for the rest.

    ONNX Runtime computes in its own stream and waits for it, so tiles are not prepared meanwhile. Batches have fixed
    sizes, whose last items may be left from earlier ones. Not yet run on a GPU.
    """

    def __init__(self, ordinal: int, size: int) -> None:
        """Raises UnavailableError where neither PyCUDA nor cuda-core is installed."""
        self._memory, self._size, self._room = EngineMemory(Device(ordinal), CUDA_CALLS), size, 0
        self._bound: dict[tuple[str, int], Callable[[], None]] = {}

    def open(
        self, edit: LoadedGraph, refine: LoadedGraph, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch: int
    ) -> DeviceCascade:
        """Return the refinement of one window.

        Args:
            edit: The `edit` graph.
            refine: The `refine` graph, on the same GPU.
            frame: The window in the model's input.
            levels: Of the window, the coarsest first.
            batch: Tiles at once, at most.

        Raises:
            OutOfMemoryError: The buffers do not fit into the GPU's memory.
            UnavailableError: The GPU failed.
        """
        with self._memory.lock():
            if batch > self._room:
                self._reserve(fixed_batch(batch))
        return DeviceCascade(self._memory, self._run(edit, EDIT), self._run(refine, REFINE), batch, frame, levels)

    def _reserve(self, room: int) -> None:
        """Make room for a batch, whose items are zeros until they are written."""
        memory, self._room = self._memory, 0
        self._bound.clear()
        sizes = {name: item_bytes(port) for name, port in graph_ports(REFINE, self._size).items()}
        memory.reserve(sizes | EXTRA_BYTES, room)
        for name, size in sizes.items():
            memory.device.clear(memory.address(name), size * room, memory.stream)
        self._room = room

    def close(self) -> None:
        """Free the GPU's memory."""
        self._bound.clear()
        self._memory.close()

    def _run(self, graph: LoadedGraph, name: str) -> EnqueueBatch:
        """What runs a graph at the places of the memory, to which it is bound once for each batch size."""
        memory, ports = self._memory, graph_ports(name, self._size)
        outputs = {"unrounded": ports.pop("unrounded")}
        del ports["edited"]

        def run(batch: int) -> None:
            fixed = fixed_batch(batch)

            def placed(port: Port) -> DeviceArray:
                return DeviceArray(memory.address(port.name), (fixed, *port.shape[1:]), port.dtype)

            if (name, fixed) not in self._bound:
                arrays = ({key: placed(port) for key, port in some.items()} for some in (ports, outputs))
                self._bound[name, fixed] = graph.bound(*arrays)
            memory.device.synchronize(memory.stream)  # what is queued there writes to the inputs
            self._bound[name, fixed]()

        return run
