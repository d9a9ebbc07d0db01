"""The run-time part of TensorRT 10 and 11 and TensorRT-RTX on a `SimulatedGpu`, with the attributes that they have.

An engine is JSON: its inputs and outputs, batch sizes and needs of memory. What it computes is plain integer arithmetic
(`edited_like`), so that every pixel of a result can be predicted. Mistakes that TensorRT answers with undefined
behavior are assertions here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np

from spmdeploy.engines.record import BATCH, EngineRecord, Port
from tests.simulators.simulated_gpu import Code, SimulatedCudaError, SimulatedGpu

MAGIC = b"kernels of "
_DTYPES = {"bool": "BOOL", "uint8": "UINT8", "int32": "INT32", "float32": "FLOAT", "float16": "HALF"}


def engine_content(record: EngineRecord, **changes: Any) -> bytes:
    """An engine that matches its record, except for the changes."""
    facts = {
        "inputs": [[port.name, port.dtype, list(port.shape)] for port in record.inputs],
        "outputs": [[port.name, port.dtype, list(port.shape)] for port in record.outputs],
        "batch": [record.batch.min, record.batch.opt, record.batch.max],
        "profiles": 1,
        "weights": 5_000,
        "activations": 1_000,
        "graph": record.graph,
        "capturable": True,
    }
    return json.dumps(facts | changes).encode()


def edited_like(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What simulated engines compute. A function of each edit alone, of every input, and of neighboring pixels.

    The graph layout (no image) gives the cached tensors of `CACHED`, which the graph picture reads.
    """
    if "image" not in inputs:
        shift = inputs["labels"][..., None] * 7.0 + inputs["instances"][..., None]
        return {"heads/Add": shift.astype(np.float32), "edit/Unsqueeze": inputs["mask"][..., None] != 0}
    if "heads/Add" in inputs:
        start, shift, mask = inputs["image"], inputs["heads/Add"], inputs["edit/Unsqueeze"]
        unrounded = np.where(mask, (np.roll(start, 1, axis=2) * 3 + shift) % 256, start).astype(np.float32)
        return {"edited": np.floor(unrounded).astype(np.uint8), "unrounded": unrounded}
    mask = inputs["mask"][..., None] != 0
    start = inputs["image"]
    if "coarse" in inputs:
        start = inputs["coarse"].repeat(2, axis=1).repeat(2, axis=2)
    mixed = np.roll(start, 1, axis=2) * 3 + inputs["labels"][..., None] * 7 + inputs["instances"][..., None]
    unrounded = np.where(mask, mixed % 256, inputs["image"]).astype(np.float32)
    return {"edited": np.floor(unrounded).astype(np.uint8), "unrounded": unrounded}


CACHED = (Port("heads/Add", "float32", (BATCH, 16, 16, 1)), Port("edit/Unsqueeze", "bool", (BATCH, 16, 16, 1)))
"""The cached tensors of the simulated graphs, whose images are 16 by 16."""


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


def simulated_library(gpu: SimulatedGpu, runtime: str = "tensorrt", version: str = "10.16.1") -> Any:
    """The module, on this GPU. `rtx.log` and friends are not part of it: tests look at `gpu.calls`."""
    library = ModuleType({"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}[runtime])
    rtx = runtime == "tensorrt-rtx"
    alive: list[Any] = []

    class ILogger:
        def log(self, severity: Severity, text: str) -> None:
            raise NotImplementedError

    class DataType(Enum):
        UINT8 = "UINT8"
        INT32 = "INT32"
        INT64 = "INT64"
        BOOL = "BOOL"
        FLOAT = "FLOAT"
        HALF = "HALF"

    class TensorIOMode(Enum):
        NONE = 0
        INPUT = 1
        OUTPUT = 2

    class ExecutionContextAllocationStrategy(Enum):
        STATIC = 0
        ON_PROFILE_CHANGE = 1
        USER_MANAGED = 2

    class DynamicShapesKernelSpecializationStrategy(Enum):
        LAZY = 0
        EAGER = 1
        NONE = 2

    class IRuntimeCache:
        def __init__(self) -> None:
            self._batches: set[int] = set()

        def serialize(self) -> bytes | None:
            return MAGIC + version.encode() + b":" + ",".join(map(str, sorted(self._batches))).encode()

        def deserialize(self, blob: bytes) -> bool:
            assert gpu.contexts, "the environment cannot be compared without a context"
            head, _, batches = bytes(blob).partition(b":")
            if head != MAGIC + version.encode():
                return False
            self._batches = {int(batch) for batch in batches.split(b",") if batch}
            return True

    class IRuntimeConfig:
        def __init__(self) -> None:
            self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
            self._strategy = ExecutionContextAllocationStrategy.STATIC
            self._cache: IRuntimeCache | None = None

        def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
            self._strategy = strategy

        def create_runtime_cache(self) -> IRuntimeCache:
            return IRuntimeCache()

        def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
            self._cache = cache
            return True

    class OnDevice:
        """What frees device memory with its last reference."""

        def __init__(self) -> None:
            alive.append(id(self))

        def __del__(self) -> None:
            if id(self) in alive:
                alive.remove(id(self))
                if not gpu.contexts:
                    gpu.calls.append(f"{type(self).__name__} destroyed without a context")

    class IExecutionContext(OnDevice):
        def __init__(self, engine: ICudaEngine, options: Any) -> None:
            super().__init__()
            config = options if isinstance(options, IRuntimeConfig) else None
            strategy = config._strategy if config else options
            assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED, strategy
            if config:
                eager = DynamicShapesKernelSpecializationStrategy.EAGER
                assert config.dynamic_shapes_kernel_specialization_strategy == eager
            self._engine, self._config = engine, config
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._memory = (0, 0)
            self._version = 0  # incremented by every change of the context
            self._enqueued = -1  # the version that was last enqueued outside a capture

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self._version += 1
            known = self._engine._ports[name][2]
            least, _, most = self._engine._facts["batch"]
            if tuple(shape[1:]) != tuple(known[1:]) or not least <= shape[0] <= most:
                library._say("ERROR", f"IExecutionContext::setInputShape: {name} {shape} does not satisfy any profile")
                return False
            self._shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            gpu.calls.append(f"set_tensor_address {name}")
            self._version += self._addresses.get(name) != address
            self._addresses[name] = address
            return name in self._engine._ports and address % 256 == 0

        def set_device_memory(self, address: int, size: int) -> None:
            gpu.calls.append("set_device_memory")
            self._version += 1
            self._memory = (address, size)

        def update_device_memory_size_for_shapes(self) -> int:
            assert self._shapes.keys() == self._engine._names("inputs"), "shapes first"
            return self._batch * int(self._engine._facts["activations"])

        @property
        def _batch(self) -> int:
            (batch,) = {shape[0] for shape in self._shapes.values()}
            return batch

        def execute_async_v3(self, stream_handle: int) -> bool:
            gpu.calls.append("execute_async_v3")
            assert gpu.contexts, "no context is current"
            assert self._addresses.keys() == self._engine._ports.keys(), "not every tensor has an address"
            assert self._memory[0] and self._memory[1] >= self.update_device_memory_size_for_shapes(), "activations"
            gpu.bytes_at(*self._memory)
            stream = gpu.stream(stream_handle)
            if library._refuses:
                library._say("ERROR", library._refuses)
                return False
            if stream.capture is not None and not self._engine._facts["capturable"]:
                stream.broken = True
                library._say("ERROR", "operation not permitted when stream is capturing")
                return False
            if stream.capture is not None:
                assert self._enqueued == self._version, "captured before it was enqueued in this state"
            else:
                self._compile()
                self._enqueued = self._version
            stream.add(self._work(self._version, dict(self._addresses), captured=stream.capture is not None))
            return True

        def _compile(self) -> None:
            if self._config is not None and self._config._cache is not None:
                if self._batch not in self._config._cache._batches:
                    gpu.calls.append(f"compile {self._batch}")
                self._config._cache._batches.add(self._batch)

        def _work(self, version: int, addresses: dict[str, int], captured: bool) -> Callable[[], None]:
            engine, batch = self._engine, self._batch

            def work() -> None:
                assert not captured or version == self._version, "the context changed after it was captured"
                inputs = {name: engine._view(name, addresses[name], batch) for name in engine._names("inputs")}
                gpu.bytes_at(*self._memory)[:] = batch  # activations are written to
                for name, array in library._computes(inputs).items():
                    engine._view(name, addresses[name], batch)[:] = array

            return work

        if rtx:

            def is_stream_capturable(self, stream: int) -> bool:
                return bool(self._engine._facts["capturable"])

    class ICudaEngine(OnDevice):
        def __init__(self, facts: dict[str, Any]) -> None:
            self._facts = facts
            self._ports = {port[0]: port for port in (*facts["inputs"], *facts["outputs"])}
            self._weights = gpu.allocate(facts["weights"])
            super().__init__()

        def __del__(self) -> None:
            if hasattr(self, "_weights"):
                super().__del__()
                gpu.memory.pop(self._weights, None)

        def _names(self, kind: str) -> set[str]:
            return {port[0] for port in self._facts[kind]}

        def _view(self, name: str, address: int, batch: int) -> np.ndarray:
            _, dtype, shape = self._ports[name]
            shape = (batch, *shape[1:])
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return gpu.bytes_at(address, size).view(dtype).reshape(shape)

        @property
        def num_io_tensors(self) -> int:
            return len(self._ports)

        @property
        def num_optimization_profiles(self) -> int:
            return int(self._facts["profiles"])

        def get_tensor_name(self, index: int) -> str:
            return list(self._ports)[index]

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode.INPUT if name in self._names("inputs") else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> DataType:
            return DataType[_DTYPES.get(self._ports[name][1], self._ports[name][1].upper())]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self._ports[name][2])

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            assert profile_index == 0 and self._ports[name][2][0] == BATCH
            return [(batch, *self._ports[name][2][1:]) for batch in self._facts["batch"]]

        def create_execution_context(self, options: Any) -> IExecutionContext | None:
            gpu.calls.append("create_execution_context")
            assert gpu.contexts, "no context is current"
            return None if library._no_contexts else IExecutionContext(self, options)

        if rtx:

            def create_runtime_config(self) -> IRuntimeConfig:
                return IRuntimeConfig()

    class Runtime(OnDevice):
        def __init__(self, logger: ILogger) -> None:
            super().__init__()
            library._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            gpu.calls.append("deserialize_cuda_engine")
            assert gpu.contexts, "no context is current"
            try:
                return ICudaEngine(json.loads(serialized_engine))
            except SimulatedCudaError as exc:
                memory = exc.code == Code.CUDA_ERROR_OUT_OF_MEMORY
                library._say("ERROR", f"Error Code 1: Cuda Runtime ({'out of memory' if memory else exc})")
            except ValueError:
                library._say("WARNING", "this is not what it is about")
                library._say("ERROR", "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed")
            return None

    def say(severity: str, text: str) -> None:
        library._logger.log(Severity[severity], text)

    classes: list[Any] = [ILogger, DataType, TensorIOMode, ExecutionContextAllocationStrategy]
    classes += [IExecutionContext, ICudaEngine, Runtime]
    if rtx:
        classes += [DynamicShapesKernelSpecializationStrategy, IRuntimeCache, IRuntimeConfig]
    for kind in classes:
        setattr(library, kind.__name__, kind)
    facts = {"__version__": version, "_say": say, "_logger": None, "_refuses": "", "_no_contexts": False}
    for name, value in {**facts, "_computes": edited_like, "_alive": alive, "_classes": classes}.items():
        setattr(library, name, value)
    return library


def offered(library: Any) -> dict[str, set[str]]:
    """The public members of each class of a simulated library, to be compared with those of the real ones."""
    return {kind.__name__: {name for name in vars(kind) if not name.startswith("_")} for kind in library._classes}
