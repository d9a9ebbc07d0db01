"""Compares our CUDA code with numpy on a real GPU: kernels, streams, pinned memory, events and CUDA graphs.

    python -m spmdeploy.bench.kernel_check

Needs PyTorch with CUDA and cuda-core (or PyCUDA), no TensorRT and no ONNX Runtime for GPUs: PyTorch computes the graphs
of the built-in model on the stream of this package. Prints one JSON object. Exit code: 4 if this machine cannot run it,
5 if a result differs. Not yet run on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

import spmdeploy
from spmdeploy.backends.device_pyramid import EXTRA_BYTES, DeviceCascade
from spmdeploy.backends.pytorch import TorchSession, bundled_generator
from spmdeploy.backends.tensorrt import graph_ports
from spmdeploy.backends.verify import read_golden
from spmdeploy.bench.checks import Check, check_large_edit
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.manifest import REFINE
from spmdeploy.errors import SpmDeployError, UnavailableError, VerificationError
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.gpu.device import Device
from spmdeploy.model.deploy import EDIT_INPUTS, REFINE_INPUTS, RefineGraph
from spmdeploy.model.generator import Generator
from spmdeploy.tiling.letterbox import Letterbox
from spmdeploy.tiling.pyramid import PyramidLevel

SIZE = 1 << 20
REPLAYS = 3
MAX_BATCH = 8


def main() -> int:
    """Runs all checks and prints their results."""
    try:
        checks = list(run_checks())
    except SpmDeployError as exc:
        print(json.dumps({"schema": "spmdeploy.kernel-check/1", "error": exc.problem, "checks": []}))
        return exc.exit_code
    faults = [f"{check.name}: {check.reason}" for check in checks if check.failed]
    result = {"schema": "spmdeploy.kernel-check/1", "checks": [check.to_json() for check in checks]}
    print(json.dumps(result | ({"error": "; ".join(faults)} if faults else {})))
    return VerificationError.exit_code if faults else 0


def run_checks(ordinal: int = 0) -> Iterator[Check]:
    """Compare the kernels, copies and CUDA graphs of one GPU with numpy and PyTorch.

    Raises:
        UnavailableError: PyTorch with CUDA, a GPU, or a package to use it with is missing.
    """
    if not torch.cuda.is_available():
        raise UnavailableError(f"torch {torch.__version__} sees no GPU", "install PyTorch with CUDA")
    device = Device(ordinal)
    try:
        for check in (check_copies, check_graph_of_copies, check_graph_of_torch, check_events):
            yield _guarded(check.__name__.removeprefix("check_").replace("_", " "), partial(check, device))
        yield _guarded("large edit", lambda: check_pyramid(device))
    finally:
        device.close()


def check_copies(device: Device) -> list[str]:
    """Bytes survive a round trip through pinned and device memory."""
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    with device.current(), _buffers(device) as (stream, host, addresses):
        host[:] = content
        device.copy_in(addresses[0], host, stream)
        device.copy_within(addresses[1], addresses[0], SIZE, stream)
        device.synchronize(stream)
        host[:] = 0
        device.copy_out(host, addresses[1], stream)
        device.synchronize(stream)
        return [] if np.array_equal(host, content) else ["bytes changed on the way"]


def check_graph_of_copies(device: Device) -> list[str]:
    """A captured CUDA graph repeats copies with new content each time."""
    noise = np.random.default_rng(1)
    with device.current(), _buffers(device) as (stream, host, addresses):
        result = device.pinned(SIZE, "the result")

        def enqueue() -> None:
            device.copy_in(addresses[0], host, stream)
            device.copy_within(addresses[1], addresses[0], SIZE, stream)
            device.copy_out(result, addresses[1], stream)

        graph = device.capture(stream, enqueue)
        try:
            for replay in range(REPLAYS):
                host[:] = noise.integers(0, 256, SIZE, np.uint8)
                device.launch(graph, stream)
                device.synchronize(stream)
                if not np.array_equal(result, host):
                    return [f"replay {replay} gives other bytes"]
        finally:
            device.destroy_graph(graph)
            device.free_pinned(result)
    return []


def check_graph_of_torch(device: Device) -> list[str]:
    """PyTorch's work on our stream is captured into our CUDA graph and replayed."""
    with device.current():
        stream = device.stream()
        try:
            external: Any = torch.cuda.ExternalStream(stream, f"cuda:{device.ordinal}")  # type: ignore[no-untyped-call]
            source = torch.zeros(SIZE, device=f"cuda:{device.ordinal}")
            target = torch.zeros_like(source)
            torch.cuda.synchronize()

            def enqueue() -> None:
                with torch.cuda.stream(external):
                    torch.mul(source, 3.0, out=target)

            enqueue()
            device.synchronize(stream)
            graph = device.capture(stream, enqueue)
            try:
                for replay in range(1, REPLAYS + 1):
                    source.fill_(float(replay))
                    torch.cuda.synchronize()
                    device.launch(graph, stream)
                    device.synchronize(stream)
                    if not bool((target == 3.0 * replay).all()):
                        return [f"replay {replay} gives another result"]
            finally:
                device.destroy_graph(graph)
        finally:
            device.destroy_stream(stream)
    return []


def check_events(device: Device) -> list[str]:
    """Time between two events is positive and grows with the work."""
    with device.current(), _buffers(device) as (stream, _, addresses):
        times = []
        for count in (1, 1, 200):  # the first one warms up
            with device.timed(stream) as milliseconds:
                for _ in range(count):
                    device.copy_within(addresses[1], addresses[0], SIZE, stream)
            times.append(milliseconds[0])
    return [] if 0 < times[1] < times[2] else [f"1 copy took {times[1]} ms, 200 copies {times[2]} ms"]


def check_pyramid(device: Device) -> Check:
    """A large edit of the built-in model whose pyramid stays on the GPU equals the one by way of numpy."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    bundle = open_bundle(spmdeploy.default_model())
    session = TorchPyramidSession(bundled_generator(bundle), device)
    try:
        return check_large_edit(session, read_golden(bundle, bundle.manifest.golden[0]), bundle)
    finally:
        session.close()


class TorchPyramidSession(TorchSession):
    """Eager PyTorch that keeps the pyramid of a large edit on the GPU, as engines do."""

    def __init__(self, generator: Generator, device: Device) -> None:
        super().__init__(generator, f"cuda:{device.ordinal}")
        self._refine_graph = RefineGraph(generator).to(self.device).eval()
        self._memory = EngineMemory(device)
        ports = graph_ports(REFINE, self.size).items()
        self._shapes = {name: (tuple(map(int, port.shape[1:])), np.dtype(port.dtype)) for name, port in ports}
        sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in self._shapes.items()}
        with self._memory.lock():
            self._memory.reserve(sizes | EXTRA_BYTES, MAX_BATCH)

    def device_cascade(self, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch: int) -> DeviceCascade:
        """See `SupportsDevicePyramid`."""
        edit = self._enqueue(self.edit_graph, EDIT_INPUTS)
        refine = self._enqueue(self._refine_graph, REFINE_INPUTS)
        return DeviceCascade(self._memory, edit, refine, min(batch, MAX_BATCH), frame, levels)

    def _enqueue(self, graph: Any, inputs: tuple[str, ...]) -> Callable[[int], None]:
        external: Any = torch.cuda.ExternalStream(self._memory.stream, self.device)  # type: ignore[no-untyped-call]

        def enqueue(count: int) -> None:
            with torch.inference_mode(), torch.cuda.stream(external):
                outputs = graph(*(self._view(name, count) for name in inputs))
                for name, output in zip(("edited", "unrounded"), outputs, strict=True):
                    self._view(name, count).copy_(output)

        return enqueue

    def _view(self, name: str, count: int) -> torch.Tensor:
        """The first items of an input or output in the memory, without a copy."""
        shape, dtype = self._shapes[name]
        array = _CudaArray(self._memory.address(name), (count, *shape), dtype)
        return torch.as_tensor(array, device=self.device)

    def close(self) -> None:
        """Frees the GPU's memory."""
        self._memory.close()


class _CudaArray:
    """Device memory as PyTorch and CuPy accept it."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (address, False),
            "version": 3,
        }


@contextmanager
def _buffers(device: Device) -> Iterator[tuple[int, Any, list[int]]]:
    """A stream, pinned memory and two allocations of `SIZE` bytes."""
    stream = device.stream()
    host = device.pinned(SIZE, "the content")
    addresses = [device.allocate(SIZE, "the content") for _ in range(2)]
    try:
        yield stream, host, addresses
    finally:
        for address in addresses:
            device.free(address)
        device.free_pinned(host)
        device.destroy_stream(stream)


def _guarded(name: str, check: Callable[[], Check | list[str]]) -> Check:
    try:
        result = check()
    except Exception as exc:  # reported like a wrong result, and the other checks still run
        return Check(name, "failed", f"{type(exc).__name__}: {exc}"[:600])
    if isinstance(result, Check):
        return result
    return Check(name, "failed" if result else "passed", "; ".join(result) or None)


if __name__ == "__main__":
    sys.exit(main())
