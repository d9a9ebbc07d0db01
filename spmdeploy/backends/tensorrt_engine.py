"""Loads and runs one engine on the GPU, with TensorRT 10, TensorRT 11 or TensorRT-RTX.

Each batch size has its own execution context, because a context must stay as it was when a CUDA graph was captured from
it. The contexts do not allocate: they use the activations of `EngineMemory` (USER_MANAGED), as much as their batch
needs. From its second run on, a batch size is a CUDA graph: one launch for the copies in, several hundred kernels and
the copy out, which would take longer to launch one by one than to compute.

Run on the simulated GPU of the tests only, not yet on a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
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
_MAX_MESSAGES = 20
MAX_FIXED = 4
"""Sets of the caller's addresses that graphs are kept for."""

Addresses = tuple[tuple[str, int], ...]
"""Sorted names and addresses of the caller's arrays; () for the places in `EngineMemory`."""


class EngineError(UnavailableError):
    """The library refused to run an engine that it had loaded."""


@dataclass
class _Prepared:
    """An execution context for one batch size, and the graphs that were captured from it."""

    context: Any
    generation: int = -1
    """Of the memory whose addresses the context has."""
    ran: bool = False
    graphs: dict[str | None, Any] = field(default_factory=dict)
    """By the output that is copied to the host; None: of the engine alone, without copies."""


class LoadedEngine:
    """Everything but the constructor must be called inside `memory.lock()`."""

    def __init__(
        self,
        library: Any,
        engine: StoredEngine,
        ports: Mapping[str, Port],
        memory: EngineMemory,
        extra_bytes: Mapping[str, int] | None = None,
        on_host: Collection[str] | None = None,
    ) -> None:
        """Read, check and load an engine.

        Args:
            library: The module `tensorrt` or `tensorrt_rtx`.
            engine: Its hash and its record are checked against this machine before anything is loaded.
            ports: Inputs and outputs of the graph by name; the engine must have exactly these.
            memory: Shared with the session's other engines.
            extra_bytes: Bytes an item to reserve under more names.
            on_host: Names of the ports with places in `memory`, to be copied from or to the host; `enqueue_on` must
                be given the addresses of the others. None: all.

        Raises:
            BundleError: The engine does not fit this machine, cannot be loaded or is another graph's.
            OutOfMemoryError, UnavailableError: The GPU cannot take it.
        """
        content = engine.read()
        self.record = engine.require_compatible()
        self.notes: list[str] = []
        self._library, self._memory, self._path = library, memory, engine.path
        self._inputs, self._outputs = self.record.inputs, self.record.outputs
        self._messages: list[str] = []
        self._prepared: dict[tuple[int, bool], _Prepared] = {}
        self._fixed: OrderedDict[tuple[int, Addresses], _Prepared] = OrderedDict()
        self._seen: OrderedDict[tuple[int, Addresses], None] = OrderedDict()
        self._captures = True
        self._runtime: Any = None
        self._engine: Any = None
        self._context_options: Any = None
        self._kernels: KernelCache | None = None
        with memory.lock(), capture_log(library, self._on_log):
            try:
                self._load(content)
                self._check_ports(ports)
                self._choose_context_options()
                ports_here = [
                    port for port in (*self._inputs, *self._outputs) if on_host is None or port.name in on_host
                ]
                sizes = {port.name: item_bytes(port) for port in ports_here} | dict(extra_bytes or {})
                if sizes:
                    memory.reserve(sizes, self.record.batch.max)
            except BaseException:
                self.close()
                raise

    def _load(self, content: bytes) -> None:
        try:
            self._runtime = self._library.Runtime(library_logger(self._library))
        except (TypeError, RuntimeError) as exc:  # how the bindings report a factory that returned nothing
            raise UnavailableError(f"{self._name} does not start: {self._error_summary(exc)}", SEE_DOCTOR) from exc
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            self._raise_if_out_of_memory(f"the {len(content):,} bytes of {self._path}")
            if "cudaerror" in self._log_text or "cudaruntime" in self._log_text:  # nothing is wrong with the engine
                problem = f"{self._name} cannot use {self._memory.device}: {self._error_summary()}"
                raise UnavailableError(
                    problem, "is NVIDIA's driver new enough for this library? See `spmdeploy doctor`"
                )
            raise BundleError(f"{self._path} cannot be loaded by {self._name}: {self._error_summary()}", BUILD_AGAIN)

    def _check_ports(self, ports: Mapping[str, Port]) -> None:
        """Compare the loaded engine with its record and with the graph. Raises BundleError with every difference."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        loaded = {name: self._port(name) for name in names}
        inputs = {name for name in names if engine.get_tensor_mode(name) == self._library.TensorIOMode.INPUT}
        problems = []
        for whose, expected in (("its record", _by_name(self._inputs + self._outputs)), ("the graph", ports)):
            problems += [
                f"{name}: {_port_text(loaded.get(name))} in the engine, {_port_text(expected.get(name))} in {whose}"
                for name in sorted(loaded.keys() | expected.keys())
                if loaded.get(name) != expected.get(name)
            ]
        if inputs != {port.name for port in self._inputs}:
            problems.append(f"inputs are {', '.join(sorted(inputs))}")
        if not problems:
            problems += self._batch_problems()
        if problems:
            raise BundleError(f"{self._path} is not what it should be: {'; '.join(problems)}", BUILD_AGAIN)

    def _batch_problems(self) -> list[str]:
        profiles, count = self.record.batch_profiles, self._engine.num_optimization_profiles
        if count != len(profiles):
            return [f"{count} optimization profiles instead of {len(profiles)}"]
        problems = []
        for index, profile in enumerate(profiles):
            for port in self._inputs:
                least, _, most = (shape[0] for shape in self._engine.get_tensor_profile_shape(port.name, index))
                if (least, most) != (profile.min, profile.max):
                    recorded = f"{profile.min} to {profile.max} in its record"
                    problems.append(f"{port.name}: batches of {least} to {most}, {recorded}")
        return problems

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
        # TensorRT-RTX compiles kernels for a shape when it first occurs, by default in the background while slower ones
        # are used: a CUDA graph would keep the slow ones for ever, and the same edit would have different last bits.
        specialization = self._library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        self._kernels = KernelCache(config.create_runtime_cache(), self.record)
        config.set_runtime_cache(self._kernels.cache)

    def run(self, inputs: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
        """Run one batch of at most `max_batch`, from host arrays of the right shapes and dtypes to a new array."""
        memory, batch = self._memory, len(next(iter(inputs.values())))
        with capture_log(self._library, self._on_log):
            prepared = self._staged(inputs, batch, output)
            self._queue(prepared, batch, output)
            memory.device.synchronize(memory.stream)
            prepared.ran = True
        return self._host(_by_name(self._outputs)[output], batch).copy()

    def timed_run(self, inputs: Mapping[str, NDArray[Any]], output: str) -> float:
        """Return milliseconds from the device's first copy in to its last copy out, by its own clock."""
        memory, batch = self._memory, len(next(iter(inputs.values())))
        with capture_log(self._library, self._on_log):
            prepared = self._staged(inputs, batch, output)
            with memory.device.timed(memory.stream) as milliseconds:
                self._queue(prepared, batch, output)
            prepared.ran = True
        return milliseconds[0]

    def _staged(self, inputs: Mapping[str, NDArray[Any]], batch: int, output: str) -> _Prepared:
        """Put inputs into page-locked memory and prepare the run, as a graph where possible."""
        prepared = self._ready(batch, own=True)
        for name, array in inputs.items():
            np.copyto(self._memory.host(name, array.shape, array.dtype.name), array)
        if prepared.ran and output not in prepared.graphs and self._captures:
            self._capture(prepared, batch, output)
        return prepared

    def prepare(self, batch: int) -> None:
        """Make room for the activations of a batch of that many items.

        Raises:
            OutOfMemoryError: The GPU has too little memory.
        """
        with capture_log(self._library, self._on_log):
            self._ready(batch, own=True)

    def enqueue_in_place(self, batch: int) -> None:
        """Queue one batch from the inputs' places in the memory to the outputs'."""
        with capture_log(self._library, self._on_log):
            prepared = self._ready(batch, own=True)
            if prepared.ran and None not in prepared.graphs and self._captures:
                self._capture(prepared, batch, None)
            self._queue(prepared, batch, None)
            prepared.ran = True

    def enqueue_on(self, addresses: Mapping[str, int], batch: int, stream: int, cuda_graphs: bool = True) -> None:
        """Queue one batch in a stream of the caller, on inputs and outputs at the caller's addresses.

        The same addresses and batch are a CUDA graph from the third time on. Outputs that are not named go where those
        of `run` go, and are lost.

        Args:
            addresses: By name.
            batch: Number of items.
            stream: Handle.
            cuda_graphs: False queues the kernels one by one each time.
        """
        memory = self._memory
        with capture_log(self._library, self._on_log):
            prepared = self._fixed_context(addresses, batch) if cuda_graphs and self._captures else None
            if prepared is not None and prepared.ran and None not in prepared.graphs:
                self._capture(prepared, batch, None)
            if prepared is None:
                prepared = self._ready(batch, own=False)
                self._set_addresses(prepared, addresses)
            memory.device.wait_for_stream(stream, memory.stream)  # whatever used the activations before
            try:
                if None in prepared.graphs:
                    memory.device.launch(prepared.graphs[None], stream)
                else:
                    self._execute(prepared, batch, stream)
                    prepared.ran = True
            finally:
                memory.device.wait_for_stream(memory.stream, stream)  # and whatever uses them next

    def _fixed_context(self, addresses: Mapping[str, int], batch: int) -> _Prepared | None:
        """The context that stays at these addresses, from the second time on that they are used."""
        key = (batch, tuple(sorted(addresses.items())))
        prepared = self._fixed.get(key)
        if prepared is None:
            seen = key in self._seen
            self._seen[key] = None
            if len(self._seen) > 2 * MAX_FIXED:
                self._seen.popitem(last=False)
            if not seen:
                return None
            prepared = _Prepared(self._context_for(batch))
            if len(self._fixed) >= MAX_FIXED:
                self._destroy_graphs(self._fixed.popitem(last=False)[1])
            self._fixed[key] = prepared
        self._fixed.move_to_end(key)
        if prepared.generation != self._memory.generation:
            try:
                self._give_memory(prepared, batch, addresses)
            except BaseException:
                del self._fixed[key]
                raise
        return prepared

    def _queue(self, prepared: _Prepared, batch: int, output: str | None) -> None:
        if output in prepared.graphs:
            self._memory.device.launch(prepared.graphs[output], self._memory.stream)
        else:
            self._enqueue(prepared, batch, output)

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
            raise EngineError(f"{self._name} cannot run {self._path} on a batch of {batch}: {self._error_summary()}")

    def _capture(self, prepared: _Prepared, batch: int, output: str | None) -> None:
        """Capture a graph, or note why there is none: everything works without, but slower."""
        memory, context = self._memory, prepared.context
        try:
            # TensorRT-RTX can be asked beforehand; TensorRT has no such method.
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(memory.stream):
                raise GraphCaptureError("the library says that this engine's work cannot be captured")
            prepared.graphs[output] = memory.device.capture(
                memory.stream, lambda: self._enqueue(prepared, batch, output)
            )
        except (GraphCaptureError, EngineError) as exc:
            self._captures = False
            self.notes.append(f"{self.record.graph}: without CUDA graphs, which costs time at every run: {exc}")

    def _host(self, port: Port, batch: int) -> NDArray[Any]:
        return self._memory.host(port.name, (batch, *port.shape[1:]), port.dtype)

    def _ready(self, batch: int, own: bool) -> _Prepared:
        """The context for a batch size. own: at the places of `EngineMemory`.

        Contexts for the caller's arrays are separate: to change an address would invalidate the graphs.
        """
        prepared = self._prepared.get((batch, own))
        if prepared is None:
            prepared = self._prepared[batch, own] = _Prepared(self._context_for(batch))
        if prepared.generation != self._memory.generation:
            try:
                self._give_memory(prepared, batch, {} if own else None)
            except BaseException:
                del self._prepared[batch, own]
                raise
        return prepared

    def _give_memory(self, prepared: _Prepared, batch: int, addresses: Mapping[str, int] | None) -> None:
        """Give a context activations and the addresses of its inputs and outputs; None: these come before each run."""
        self._destroy_graphs(prepared)
        address, size = self._activations(prepared.context, batch)
        prepared.context.set_device_memory(address, size)
        if addresses is not None:
            self._set_addresses(prepared, addresses)
        prepared.generation, prepared.ran = self._memory.generation, False

    def _set_addresses(self, prepared: _Prepared, addresses: Mapping[str, int]) -> None:
        """Those given, and the places in `EngineMemory` for the others."""
        for port in (*self._inputs, *self._outputs):
            address = addresses[port.name] if port.name in addresses else self._memory.address(port.name)
            if not prepared.context.set_tensor_address(port.name, address):
                raise EngineError(f"{self._name} refuses the address of {port.name}: {self._error_summary()}")

    def _context_for(self, batch: int) -> Any:
        self._messages.clear()
        context = self._engine.create_execution_context(self._context_options)
        if context is None:
            self._raise_if_out_of_memory(f"an execution context of {self._path}")
            raise EngineError(f"{self._name} makes no context for {self._path}: {self._error_summary()}", SEE_DOCTOR)
        self._set_batch(context, batch)
        return context

    def _set_batch(self, context: Any, batch: int) -> None:
        """Choose the optimization profile for a batch size, and set the shapes of the inputs."""
        profiles = self.record.batch_profiles
        if len(profiles) > 1:
            (index,) = (number for number, profile in enumerate(profiles) if profile.min <= batch <= profile.max)
            stream = self._memory.stream
            if index != context.active_optimization_profile:
                if not context.set_optimization_profile_async(index, stream):
                    raise EngineError(f"{self._path} refuses its profile {index}: {self._error_summary()}", BUILD_AGAIN)
                self._memory.device.synchronize(stream)
        for port in self._inputs:
            if not context.set_input_shape(port.name, (batch, *port.shape[1:])):
                raise EngineError(f"{self._path} takes no batch of {batch}: {self._error_summary()}", BUILD_AGAIN)

    def _activations(self, context: Any, batch: int) -> tuple[int, int]:
        needed = context.update_device_memory_size_for_shapes()
        try:
            return self._memory.activations(needed)
        except OutOfMemoryError as exc:
            fits = self._largest_batch_below(context, batch)
            hint = (
                f"a batch of {fits} would fit: use --batch-size {fits}, or build with --max-batch {fits}"
                if fits
                else "no smaller batch would fit"
            )
            problem = f"a batch of {batch} is too large: {exc.problem}"
            raise OutOfMemoryError(problem, f"{hint}; or close other programs on the GPU") from exc

    def _largest_batch_below(self, context: Any, batch: int) -> int:
        """The largest batch whose activations fit; 0 where none does, or it is unknown. Changes the context."""
        room, fits = self._memory.room_for_activations(), 0
        with suppress(SpmDeployError):
            while fits + 1 < batch:
                middle = (fits + batch) // 2
                self._set_batch(context, middle)
                if context.update_device_memory_size_for_shapes() <= room:
                    fits = middle
                else:
                    batch = middle
        return fits

    def _destroy_graphs(self, prepared: _Prepared) -> None:
        while prepared.graphs:
            self._memory.device.destroy_graph(prepared.graphs.popitem()[1])

    def close(self) -> None:
        """Free contexts, graphs and weights, and save the kernels that TensorRT-RTX compiled. Safe to call twice."""
        for prepared in (*self._prepared.values(), *self._fixed.values()):
            self._destroy_graphs(prepared)
        if self._kernels is not None:
            self.notes += self._kernels.save()
        # The library frees what is on the device with the last reference, which must be while the context is current.
        self._prepared.clear()
        self._fixed.clear()
        self._kernels = self._context_options = self._engine = self._runtime = None

    @property
    def _name(self) -> str:
        return f"{self.record.runtime} {self._library.__version__}"

    def _on_log(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            del self._messages[: -_MAX_MESSAGES + 1]
            self._messages.append(" ".join(text.split()))

    @property
    def _log_text(self) -> str:
        """All messages without spaces, to search."""
        return "".join(self._messages).lower().replace(" ", "")

    def _error_summary(self, error: Exception | None = None) -> str:
        """The library's first messages: the first one usually causes the others."""
        return "; ".join(dict.fromkeys(self._messages[:3]))[:600] or (str(error) if error else "no reason given")

    def _raise_if_out_of_memory(self, what: str) -> None:
        if "outofmemory" in self._log_text or "cudaerrormemoryallocation" in self._log_text:
            free, total = self._memory.device.memory()
            problem = f"{self._memory.device} has no room for {what}: {free:,} of {total:,} bytes are free"
            raise OutOfMemoryError(f"{problem} ({self._error_summary()})", "close other programs on the GPU")


def item_bytes(port: Port) -> int:
    """Return the bytes of one item of the batch."""
    assert port.shape[0] == BATCH and BATCH not in port.shape[1:], port
    return int(np.prod(port.shape[1:])) * np.dtype(port.dtype).itemsize


def _by_name(ports: tuple[Port, ...]) -> dict[str, Port]:
    return {port.name: port for port in ports}


def _port_text(port: Port | None) -> str:
    return "nothing" if port is None else f"{port.dtype} {list(port.shape)}"
