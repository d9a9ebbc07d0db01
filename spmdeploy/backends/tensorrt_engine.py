"""One engine on the GPU: TensorRT 10, TensorRT 11 or TensorRT-RTX, whose module is a parameter.

Each batch size has an execution context of its own, because a context has to stay as it was when a CUDA graph was
captured from it. The contexts do not allocate: they are given the activations of `EngineMemory` (USER_MANAGED), as much
as their batch needs. From its second run on a batch size is a CUDA graph: one launch for the copies in, some hundred
kernels and the copy out, which would take longer to launch than to compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.engines.kernel_cache import KernelCache
from spmdeploy.engines.library import capture_log, library_logger
from spmdeploy.engines.record import BATCH, BUILD_AGAIN, Port
from spmdeploy.engines.store import StoredEngine
from spmdeploy.errors import BundleError, OutOfMemoryError, SpmDeployError, UnavailableError
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.gpu.device import SEE_DOCTOR, GraphCaptureError

_DTYPES = {"FLOAT": "float32", "HALF": "float16"}
_KEPT_MESSAGES = 20


class EngineError(UnavailableError):
    """The library refused to run an engine that it had loaded."""


@dataclass
class _Prepared:
    """An execution context for one batch size, and what was captured from it."""

    context: Any
    generation: int = -1
    """Of the memory that the context knows the addresses of."""
    ran: bool = False
    graphs: dict[str | None, int] = field(default_factory=dict)
    """By the output that is copied to the host; None: of the engine alone, without copies."""


class LoadedEngine:
    """Everything but the constructor wants to be called inside `memory.in_use()`."""

    def __init__(self, library: Any, found: StoredEngine, ports: Mapping[str, Port], memory: EngineMemory) -> None:
        """found: read, which is to say hashed and compared with this machine, before anything is loaded.
        ports: what the graph takes and gives, by name; the engine must do just that.

        Raises BundleError (does not fit, cannot be loaded, is another graph's), OutOfMemory, UnavailableError.
        """
        content = found.read()
        self.record = found.require_compatible()
        self.notes: list[str] = []
        self._library, self._memory, self._path = library, memory, found.path
        self._inputs, self._outputs = self.record.inputs, self.record.outputs
        self._messages: list[str] = []
        self._prepared: dict[tuple[int, bool], _Prepared] = {}
        self._captures = True
        self._runtime: Any = None
        self._engine: Any = None
        self._context_options: Any = None
        self._kernels: KernelCache | None = None
        with memory.in_use(), capture_log(library, self._on_log):
            try:
                self._load(content)
                self._check_ports(ports)
                self._choose_context_options()
                sizes = {port.name: item_bytes(port) for port in (*self._inputs, *self._outputs)}
                memory.reserve(sizes, self.record.batch.max)
            except BaseException:
                self.close()
                raise

    # -- loading

    def _load(self, content: bytes) -> None:
        try:
            self._runtime = self._library.Runtime(library_logger(self._library))
        except (TypeError, RuntimeError) as error:  # what the bindings make of a factory that gives nothing
            raise UnavailableError(f"{self._name} does not start: {self._words(error)}", SEE_DOCTOR) from error
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            self._raise_if_out_of_memory(f"the {len(content):,} bytes of {self._path}")
            if "cudaerror" in self._log_text or "cudaruntime" in self._log_text:  # nothing is wrong with the engine
                problem = f"{self._name} cannot use {self._memory.device}: {self._words()}"
                raise UnavailableError(
                    problem, "is NVIDIA's driver new enough for this library? See `spmdeploy doctor`"
                )
            raise BundleError(f"{self._path} cannot be loaded by {self._name}: {self._words()}", BUILD_AGAIN)

    def _check_ports(self, ports: Mapping[str, Port]) -> None:
        """Compares the loaded engine with its record and with the graph. Raises BundleError with every difference."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        loaded = {name: self._port(name) for name in names}
        inputs = {name for name in names if engine.get_tensor_mode(name) == self._library.TensorIOMode.INPUT}
        faults = []
        for whose, expected in (("its record", _by_name(self._inputs + self._outputs)), ("the graph", ports)):
            faults += [
                f"{name}: {_port_words(loaded.get(name))} in the engine, {_port_words(expected.get(name))} in {whose}"
                for name in sorted(loaded.keys() | expected.keys())
                if loaded.get(name) != expected.get(name)
            ]
        if inputs != {port.name for port in self._inputs}:
            faults.append(f"inputs are {', '.join(sorted(inputs))}")
        if not faults:
            faults += self._batch_faults()
        if faults:
            raise BundleError(f"{self._path} is not what it should be: {'; '.join(faults)}", BUILD_AGAIN)

    def _batch_faults(self) -> list[str]:
        if self._engine.num_optimization_profiles != 1:
            return [f"{self._engine.num_optimization_profiles} optimization profiles instead of one"]
        batch, faults = self.record.batch, []
        for port in self._inputs:
            least, _, most = (shape[0] for shape in self._engine.get_tensor_profile_shape(port.name, 0))
            if (least, most) != (batch.min, batch.max):
                faults.append(f"{port.name}: batches of {least} to {most}, {batch.min} to {batch.max} in its record")
        return faults

    def _port(self, name: str) -> Port:
        dtype = self._engine.get_tensor_dtype(name).name
        return Port(name, _DTYPES.get(dtype, dtype.lower()), tuple(self._engine.get_tensor_shape(name)))

    def _choose_context_options(self) -> None:
        """Contexts without memory of their own and, with TensorRT-RTX, with the kernels of earlier starts."""
        strategies = self._library.ExecutionContextAllocationStrategy
        if not hasattr(self._library, "IRuntimeCache"):
            self._context_options = strategies.USER_MANAGED
            return
        self._context_options = config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        # TensorRT-RTX compiles kernels for a shape when it first comes, by default in the background while slower ones
        # do the work: a CUDA graph would keep the slow ones for ever, and the same edit would give other last bits.
        specialization = self._library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        self._kernels = KernelCache(config.create_runtime_cache(), self.record)
        config.set_runtime_cache(self._kernels.cache)

    # -- running

    def run(self, inputs: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
        """One batch of at most `max_batch`, from host arrays of the right shapes and dtypes to a new one."""
        memory, batch = self._memory, len(next(iter(inputs.values())))
        with capture_log(self._library, self._on_log):
            prepared = self._staged(inputs, batch, output)
            self._queue(prepared, batch, output)
            memory.device.synchronize(memory.stream)
            prepared.ran = True
        return self._host(_by_name(self._outputs)[output], batch).copy()

    def timed_run(self, inputs: Mapping[str, NDArray[Any]], output: str) -> float:
        """Milliseconds from the device's first copy in to its last copy out, by its own clock."""
        memory, batch = self._memory, len(next(iter(inputs.values())))
        with capture_log(self._library, self._on_log):
            prepared = self._staged(inputs, batch, output)
            with memory.device.timed(memory.stream) as milliseconds:
                self._queue(prepared, batch, output)
            prepared.ran = True
        return milliseconds[0]

    def _staged(self, inputs: Mapping[str, NDArray[Any]], batch: int, output: str) -> _Prepared:
        """Inputs in page-locked memory, and all that is needed to run them, a graph where there can be one."""
        prepared = self._ready(batch, own=True)
        for name, array in inputs.items():
            np.copyto(self._memory.host(name, array.shape, array.dtype.name), array)
        if prepared.ran and output not in prepared.graphs and self._captures:
            self._capture(prepared, batch, output)
        return prepared

    def prepare(self, batch: int) -> None:
        """Makes sure that there is room for the intermediate results of so many edits. Raises OutOfMemory."""
        with capture_log(self._library, self._on_log):
            self._ready(batch, own=True)

    def enqueue_in_place(self, batch: int) -> None:
        """Queues one batch on the inputs that lie in the memory's places by then; the outputs stay in theirs."""
        with capture_log(self._library, self._on_log):
            prepared = self._ready(batch, own=True)
            if prepared.ran and None not in prepared.graphs and self._captures:
                self._capture(prepared, batch, None)
            self._queue(prepared, batch, None)
            prepared.ran = True
        self._memory.queued()

    def _queue(self, prepared: _Prepared, batch: int, output: str | None) -> None:
        if output in prepared.graphs:
            self._memory.device.launch(prepared.graphs[output], self._memory.stream)
        else:
            self._enqueue(prepared, batch, output)

    def enqueue_on(self, addresses: Mapping[str, int], batch: int, stream: int) -> None:
        """Queues one batch in a stream of the caller's, on inputs and outputs at the caller's addresses.

        Outputs that are not named go where those of `run` go, and are lost.
        """
        memory = self._memory
        with capture_log(self._library, self._on_log):
            prepared = self._ready(batch, own=False)
            self._set_addresses(prepared, addresses)
            memory.device.wait_for_stream(stream, memory.stream)  # whoever had the activations before
            try:
                self._execute(prepared, batch, stream)
            finally:
                memory.device.wait_for_stream(memory.stream, stream)  # and whoever has them next

    def _enqueue(self, prepared: _Prepared, batch: int, output: str | None) -> None:
        memory = self._memory
        if output is None:
            self._execute(prepared, batch, memory.stream)
            return
        for port in self._inputs:
            memory.device.copy_in(memory.address(port.name), self._host(port, batch), memory.stream)
        self._execute(prepared, batch, memory.stream)
        memory.device.copy_out(
            self._host(_by_name(self._outputs)[output], batch), memory.address(output), memory.stream
        )

    def _execute(self, prepared: _Prepared, batch: int, stream: int) -> None:
        self._messages.clear()
        if not prepared.context.execute_async_v3(stream):
            raise EngineError(f"{self._name} cannot run {self._path} on a batch of {batch}: {self._words()}")

    def _capture(self, prepared: _Prepared, batch: int, output: str | None) -> None:
        """Captures a graph, or notes why there will be none: everything works without, only slower."""
        memory, context = self._memory, prepared.context
        try:
            # TensorRT-RTX knows beforehand; TensorRT has no such question.
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(memory.stream):
                raise GraphCaptureError("the library says that this engine's work cannot be captured")
            prepared.graphs[output] = memory.device.capture(
                memory.stream, lambda: self._enqueue(prepared, batch, output)
            )
        except (GraphCaptureError, EngineError) as error:
            self._captures = False
            self.notes.append(f"{self.record.graph}: without CUDA graphs, which costs time at every run: {error}")

    def _host(self, port: Port, batch: int) -> NDArray[Any]:
        return self._memory.host(port.name, (batch, *port.shape[1:]), port.dtype)

    # -- contexts

    def _ready(self, batch: int, own: bool) -> _Prepared:
        """The context for a batch size, knowing where its memory is. own: for the arrays of `EngineMemory`.

        Those that work on somebody else's arrays are apart: to change an address would spoil the graphs.
        """
        memory = self._memory
        prepared = self._prepared.get((batch, own))
        if prepared is None:
            prepared = self._prepared[batch, own] = _Prepared(self._context_for(batch))
        if prepared.generation != memory.generation:
            self._destroy_graphs(prepared)
            address, size = self._activations(prepared.context, batch)
            prepared.context.set_device_memory(address, size)
            if own:
                self._set_addresses(prepared, {})
            prepared.generation, prepared.ran = memory.generation, False
        return prepared

    def _set_addresses(self, prepared: _Prepared, addresses: Mapping[str, int]) -> None:
        """Those given, and our own for the others."""
        for port in (*self._inputs, *self._outputs):
            address = addresses.get(port.name, self._memory.address(port.name))
            if not prepared.context.set_tensor_address(port.name, address):
                raise EngineError(f"{self._name} refuses the address of {port.name}: {self._words()}", SEE_DOCTOR)

    def _context_for(self, batch: int) -> Any:
        self._messages.clear()
        context = self._engine.create_execution_context(self._context_options)
        if context is None:
            self._raise_if_out_of_memory(f"an execution context of {self._path}")
            raise EngineError(f"{self._name} makes no context for {self._path}: {self._words()}", SEE_DOCTOR)
        for port in self._inputs:
            if not context.set_input_shape(port.name, (batch, *port.shape[1:])):
                raise EngineError(f"{self._path} takes no batch of {batch}: {self._words()}", BUILD_AGAIN)
        return context

    def _activations(self, context: Any, batch: int) -> tuple[int, int]:
        needed = context.update_device_memory_size_for_shapes()
        try:
            return self._memory.activations(needed)
        except OutOfMemoryError as error:
            fits = self._largest_batch_below(batch)
            hint = f"a batch of {fits} would fit" if fits else "no smaller batch would fit"
            problem = f"a batch of {batch} is too large: {error.problem}"
            raise OutOfMemoryError(problem, f"{hint}; or close other programs on the GPU") from error

    def _largest_batch_below(self, batch: int) -> int:
        """The largest for whose activations there is room; 0 where there is none, or it cannot be told."""
        room = self._memory.room_for_activations()
        with suppress(SpmDeployError):
            for smaller in range(batch - 1, 0, -1):
                if self._context_for(smaller).update_device_memory_size_for_shapes() <= room:
                    return smaller
        return 0

    def _destroy_graphs(self, prepared: _Prepared) -> None:
        while prepared.graphs:
            self._memory.device.destroy_graph(prepared.graphs.popitem()[1])

    # -- the end

    def close(self) -> None:
        """Frees contexts, graphs and weights, and keeps the kernels that TensorRT-RTX compiled. Safe to call twice."""
        for prepared in self._prepared.values():
            self._destroy_graphs(prepared)
        if self._kernels is not None:
            self.notes += self._kernels.save()
        # The library frees what is on the device with the last reference, which must be while the context is current.
        self._prepared.clear()
        self._kernels = self._context_options = self._engine = self._runtime = None

    # -- words

    @property
    def _name(self) -> str:
        return f"{self.record.runtime} {self._library.__version__}"

    def _on_log(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            del self._messages[: -_KEPT_MESSAGES + 1]
            self._messages.append(" ".join(text.split()))

    @property
    def _log_text(self) -> str:
        """All its words, to look for some."""
        return "".join(self._messages).lower().replace(" ", "")

    def _words(self, error: Exception | None = None) -> str:
        """What the library said, the first message first: it usually causes the others."""
        return "; ".join(dict.fromkeys(self._messages[:3]))[:600] or (str(error) if error else "no reason given")

    def _raise_if_out_of_memory(self, what: str) -> None:
        if "outofmemory" in self._log_text or "cudaerrormemoryallocation" in self._log_text:
            free, total = self._memory.device.memory()
            problem = f"{self._memory.device} has no room for {what}: {free:,} of {total:,} bytes are free"
            raise OutOfMemoryError(f"{problem} ({self._words()})", "close other programs on the GPU")


def _by_name(ports: tuple[Port, ...]) -> dict[str, Port]:
    return {port.name: port for port in ports}


def _port_words(port: Port | None) -> str:
    return "nothing" if port is None else f"{port.dtype} {list(port.shape)}"


def item_bytes(port: Port) -> int:
    """Of one edit."""
    assert port.shape[0] == BATCH and BATCH not in port.shape[1:], port
    return int(np.prod(port.shape[1:])) * np.dtype(port.dtype).itemsize
