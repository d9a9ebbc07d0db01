"""ONNX Runtime's CUDA provider: its options, and batches of fixed sizes that are replayed as CUDA graphs.

Its documentation and source set the rules for CUDA graphs:

- A captured graph reads and writes the addresses that it was captured with: inputs and outputs are bound once.
- A graph is known to the thread that captured it alone: all runs of a process are made by one thread.
- During a capture no other thread may allocate or copy on the GPU: threads that do so hold `CUDA_CALLS`.

Not yet run on a GPU. What does not need one, binding, padding and order, is tested with ONNX Runtime on the CPU.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from spmdeploy.gpu.arrays import DeviceArray

FIXED_BATCHES = (1, 4, 8)
CUDA_CALLS = threading.RLock()
"""Held by a thread that uses the GPU beside ONNX Runtime, and during every run of ONNX Runtime on a GPU."""

CUDA_PROVIDER = "CUDAExecutionProvider"
_GRAPH_ID, _NO_GRAPH = "gpu_graph_id", "-1"
_DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}

_Result = TypeVar("_Result")


def fixed_batch(count: int) -> int:
    """Return the batch size that `count` items are computed in: 1, 4 or a multiple of 8.

    For each new size ONNX Runtime selects its convolutions, allocates and captures anew.
    """
    largest = FIXED_BATCHES[-1]
    return next((size for size in FIXED_BATCHES if size >= count), -(-count // largest) * largest)


def smaller_batch(count: int) -> int | None:
    """Return the next smaller fixed batch size than that of `count` items; None if there is none."""
    return max((size for size in FIXED_BATCHES if size < fixed_batch(count)), default=None)


def cuda_options(ordinal: int, precision: str) -> dict[str, str | int]:
    """Return the options of the provider that every CUDA build of ONNX Runtime has.

    FP32 means FP32: by default the provider rounds what convolutions multiply to TF32's ten bits of mantissa. By
    default it also measures every convolution again for each batch size; the heuristic is quick and repeatable.

    Args:
        ordinal: Number of the GPU.
        precision: fp32 or fp16. Tensor cores read half precision in NHWC.
    """
    options: dict[str, str | int] = {"device_id": ordinal, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    return options | {"prefer_nhwc": 1} if precision == "fp16" else options


class OpenedSession(NamedTuple):
    """A session of ONNX Runtime on a GPU, and what it had to do without."""

    session: Any
    cuda_graphs: bool
    notes: tuple[str, ...] = ()


def open_on_cuda(
    open_session: Callable[[list[Any]], Any], ordinal: int, precision: str, cuda_graphs: bool
) -> OpenedSession:
    """Open a session with the fastest options that the build and the graph allow. Raises ONNX Runtime's exceptions.

    Args:
        open_session: Opens one with a list of providers.
        ordinal: Number of the GPU.
        precision: fp32 or fp16.
        cuda_graphs: Whether to ask for them. ONNX Runtime refuses graphs with operators that it computes on the CPU.
    """
    options = cuda_options(ordinal, precision)
    faster = options | {"enable_cuda_graph": 1} if cuda_graphs else options
    plain = {name: value for name, value in options.items() if name != "prefer_nhwc"}
    attempts = [faster, *(one for one in (options, plain) if one != faster)]
    failure: Exception | None = None
    for tried in attempts:
        try:
            session = open_session([(CUDA_PROVIDER, tried)])
        except Exception as exc:  # the classes that it raises have no common base
            failure = failure or exc
            continue
        missing = ", ".join(sorted(faster.keys() - tried.keys()))
        notes = (f"ONNX Runtime without {missing}: {_first_line(failure)}",) if failure else ()
        return OpenedSession(session, "enable_cuda_graph" in tried, notes)
    assert failure is not None
    raise failure


@cache
def _cuda_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="onnxruntime-cuda")


def on_cuda_thread(work: Callable[[], _Result]) -> _Result:
    """Return what `work` returns in the thread that makes all runs on GPUs, while nothing else of ours uses them."""
    with CUDA_CALLS:
        return _cuda_thread().submit(work).result()


class _Places(NamedTuple):
    """Inputs and outputs of one batch size in the memory of the GPU."""

    inputs: Mapping[str, Any]
    outputs: Sequence[Any]
    run: Callable[[], None]


class CudaSession:
    """A session of ONNX Runtime on one GPU, run on arrays of the host or of the GPU."""

    def __init__(self, library: Any, opened: OpenedSession, ordinal: int, kind: str = "cuda") -> None:
        """kind: The device's kind, as ONNX Runtime names it."""
        self._library, self._session, self._device = library, opened.session, (kind, ordinal)
        self._cuda_graphs = opened.cuda_graphs
        self._places: dict[tuple[int, tuple[str, ...]], _Places] = {}
        self._numbers = itertools.count(1)  # 0 has a meaning of its own
        self.notes = list(opened.notes)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return these outputs of a batch, which is padded to a fixed size."""
        count = len(next(iter(inputs.values())))
        padded = {name: _padded(array, fixed_batch(count)) for name, array in inputs.items()}

        def run() -> list[NDArray[Any]]:
            key = (fixed_batch(count), tuple(outputs))
            if key not in self._places:
                self._places[key] = self._new_places(key[0], outputs, padded)
            places = self._places[key]
            for name, array in padded.items():
                places.inputs[name].update_inplace(array)
            places.run()
            return [np.array(value.numpy()[:count]) for value in places.outputs]

        return on_cuda_thread(run)

    def bound(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Callable[[], None]:
        """Return a call that runs the graph on arrays of this GPU, and returns when it is done."""
        binding = self._session.io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, *self._device, np.dtype(array.dtype).type, array.shape, array.address)
        run = self._replayed(binding)
        return lambda: on_cuda_thread(run)

    def _new_places(self, batch: int, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> _Places:
        new = self._library.OrtValue.ortvalue_from_shape_and_type
        ports = {value.name: value for value in self._session.get_outputs()}
        binding = self._session.io_binding()
        given = {name: new(list(array.shape), array.dtype.type, *self._device) for name, array in inputs.items()}
        made = [new([batch, *ports[name].shape[1:]], _DTYPES[ports[name].type], *self._device) for name in outputs]
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(outputs, made, strict=True):
            binding.bind_ortvalue_output(name, value)
        return _Places(given, made, self._replayed(binding))

    def _replayed(self, binding: Any) -> Callable[[], None]:
        """A call that runs a binding as a CUDA graph of its own, which ONNX Runtime captures in the first call."""
        number = str(next(self._numbers))

        def run() -> None:
            if not self._cuda_graphs:
                self._session.run_with_iobinding(binding, self._options(_NO_GRAPH))
                return
            try:
                self._session.run_with_iobinding(binding, self._options(number))
            except Exception as exc:
                self._session.run_with_iobinding(binding, self._options(_NO_GRAPH))  # raises what is not the graph's
                self._cuda_graphs = False
                self.notes.append(f"ONNX Runtime without CUDA graphs, which costs time: {_first_line(exc)}")

        return run

    def _options(self, graph: str) -> Any:
        options = self._library.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, graph)
        return options


def _padded(array: NDArray[Any], batch: int) -> NDArray[Any]:
    """The last item is repeated, so that no item has values that the graph does not know."""
    if missing := batch - len(array):
        array = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    return np.ascontiguousarray(array)


def _first_line(error: Exception | None) -> str:
    return " ".join(str(error).split())[:200]
