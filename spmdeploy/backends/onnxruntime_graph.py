"""Loads ONNX Runtime and runs single graphs in it, with cached optimized graphs and with the errors of this package."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.graph_cache import cache_key, open_cached
from spmdeploy.backends.onnxruntime_cuda import (
    CUDA_CALLS,
    CUDA_PROVIDER,
    CudaSession,
    OpenedSession,
    on_cuda_thread,
    open_on_cuda,
    smaller_batch,
)
from spmdeploy.backends.threads import available_threads
from spmdeploy.bundle.bundle import GraphFiles
from spmdeploy.bundle.manifest import REFINE
from spmdeploy.errors import BundleError, OutOfMemoryError, SpmDeployError, UnavailableError
from spmdeploy.types import LayoutInput, ModelInput

if TYPE_CHECKING:
    from spmdeploy.backends.base import LayoutRun
    from spmdeploy.gpu.arrays import DeviceArray

_INPUTS = {
    "image": "tensor(uint8)",
    "labels": "tensor(uint8)",
    "instances": "tensor(int32)",
    "mask": "tensor(uint8)",
    "coarse": "tensor(float)",
}

_CPU_PROVIDER = "CPUExecutionProvider"

MAX_MEMORY = 8 << 30
"""Limit on the intermediate results of a process on CPUs, in bytes; batches of 32 in the paper's size take 6 GB."""

Graph = Path | GraphFiles
"""An ONNX file, with its external weights next to it if it has any; or the contents of these files."""
GraphSource = Graph | Callable[[], Graph]
"""A graph, or a function that reads it, which is called only where the cache does not have the graph."""
Arrays = Mapping[str, NDArray[Any]]


class CachedLayoutGraphs:
    """The `layout` and `picture` graphs of a bundle in ONNX Runtime: the first runs once for each layout.

    On a GPU the cached tensors stay in its memory, for as long as the function that `bind` returned is alive.
    """

    def __init__(
        self, layout: Graph, picture: Graph, device: str = "cpu", threads: int = 0, precision: str = "fp32"
    ) -> None:
        """Raises BundleError, OutOfMemoryError, UnavailableError."""
        library = import_onnxruntime()
        self._device = device
        try:
            if device == "cpu":
                self._layout, self._picture = (
                    inference_session(library, graph, _cpu_options(library, threads), [_CPU_PROVIDER])
                    for graph in (layout, picture)
                )
            else:  # without CUDA graphs: each layout has places of its own, and graphs are freed with the session
                self._layout, self._picture = (
                    _open_on_cuda(library, graph, device, threads, precision, cuda_graphs=False).session
                    for graph in (layout, picture)
                )
        except SpmDeployError:
            raise
        except Exception as exc:
            raise _to_package_error(exc, device) from exc
        self._layout_inputs, self._cached, self._picture_inputs = (
            [value.name for value in values]
            for values in (self._layout.get_inputs(), self._layout.get_outputs(), self._picture.get_inputs())
        )
        if unknown := set(self._layout_inputs) - set(LayoutInput._fields):
            raise BundleError(f"the layout graph reads {min(unknown)}, which no layout has", "export the bundle again")
        missing = set(self._picture_inputs) - {*self._cached, *ModelInput._fields}
        if missing:
            raise BundleError(
                f"the picture graph reads {min(missing)}, which the layout graph does not give",
                "export the bundle again",
            )

    def bind(self, layout: LayoutInput) -> LayoutRun:
        """Run the layout graph, and return a function from images, uint8 (B, size, size, 3), to edited ones."""
        given = layout._asdict()
        if self._device != "cpu":
            return self._bind_on("cuda", _ordinal(self._device), given)
        values = self._run(self._layout, self._cached, {name: given[name] for name in self._layout_inputs})
        known = {name: given[name] for name in self._picture_inputs if name in given}
        known |= dict(zip(self._cached, values, strict=True))
        return lambda image: self._run(self._picture, ["edited"], {**known, "image": image})[0]

    def _bind_on(self, kind: str, ordinal: int, given: Arrays) -> LayoutRun:
        """Run the layout graph from device memory to device memory; only images are copied afterwards.

        Args:
            kind: The device as ONNX Runtime names it: cuda or cpu.
            ordinal: Its number.
            given: labels, instances and mask.
        """
        library = import_onnxruntime()
        names = [name for name in given if name in (*self._layout_inputs, *self._picture_inputs)]
        try:
            known = {name: library.OrtValue.ortvalue_from_numpy(given[name], kind, ordinal) for name in names}
            binding = self._layout.io_binding()
            for name in self._layout_inputs:
                binding.bind_ortvalue_input(name, known[name])
            for name in self._cached:
                binding.bind_output(name, kind, ordinal)
            on_cuda_thread(lambda: self._layout.run_with_iobinding(binding))
            known |= dict(zip(self._cached, binding.get_outputs(), strict=True))
        except Exception as exc:
            raise _to_package_error(exc, self._device) from exc

        def run(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
            try:
                binding = self._picture.io_binding()  # one for each call: several threads may call
                binding.bind_cpu_input("image", np.ascontiguousarray(image))
                for name in self._picture_inputs:
                    if name != "image":
                        binding.bind_ortvalue_input(name, known[name])
                binding.bind_output("edited", "cpu")
                on_cuda_thread(lambda: self._picture.run_with_iobinding(binding))
                edited: NDArray[np.uint8] = binding.copy_outputs_to_cpu()[0]
            except Exception as exc:
                raise _to_package_error(exc, self._device) from exc
            return edited

        return run

    def _run(self, graph: Any, outputs: Sequence[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            results: list[NDArray[Any]] = graph.run(list(outputs), inputs)
        except Exception as exc:
            raise _to_package_error(exc, self._device) from exc
        return results


# Passes over the graph that find nothing to gain in ours: the results are the same bit for bit, edits as fast, and
# loading takes a fifth less (onnxruntime 1.32). What folds constants and blocks the convolutions stays on.
_IDLE_PASSES = (
    *("CommonSubexpressionElimination", "ConstantSharing", "TransposeOptimizer", "PropagateCastOps", "ReshapeFusion"),
    *("Level1_RuleBasedTransformer", "Level2_RuleBasedTransformer", "FreeDimensionOverrideTransformer"),
    *("DoubleQDQPairsRemover", "QDQPropagationTransformer", "EnsureUniqueDQForNodeUnit", "WhereDummyDq"),
    *("MatMulAddFusion", "GemmActivationFusion", "ConvAddActivationFusion"),
)


def inference_session(library: Any, graph: Graph, options: Any, providers: list[Any]) -> Any:
    """ONNX Runtime's own session.

    Args:
        library: The module onnxruntime.
        graph: Path of an ONNX file, or its content with the weights that it refers to.
        options: A SessionOptions of `library`; weights in memory are added to it.
        providers: Execution providers as `library` takes them, the preferred one first.
    """
    without: dict[str, Any] = {"enable_fallback": 0}  # it prints to stdout and tries the same again
    if providers == [_CPU_PROVIDER]:
        without["disabled_optimizers"] = list(_IDLE_PASSES)
    if isinstance(graph, Path):
        return library.InferenceSession(str(graph), options, providers=providers, **without)
    names, contents = list(graph.weights), list(graph.weights.values())
    if names and not hasattr(options, "add_external_initializers_from_files_in_memory"):  # before onnxruntime 1.24
        with tempfile.TemporaryDirectory(prefix="spmdeploy-") as folder:
            for name, content in {**graph.weights, "graph.onnx": graph.content}.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return library.InferenceSession(str(path), options, providers=providers, **without)
    if names:
        options.add_external_initializers_from_files_in_memory(names, contents, [len(content) for content in contents])
    return library.InferenceSession(graph.content, options, providers=providers, **without)


def session_options(library: Any, threads: int = 0) -> Any:
    """Options for every provider; 0 threads are those of `available_threads`."""
    options = library.SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.log_severity_level = 3
    return options


def _cpu_options(library: Any, threads: int) -> Any:
    _bound_memory(library)
    options = session_options(library, threads)
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


_OPTIMIZED, _WEIGHTS = "graph.onnx", "weights.bin"


def _cached_session(library: Any, read: Callable[[], Graph], threads: int, key: str) -> Any:
    """ONNX Runtime's session on the CPU; its optimized graph is read from the cache, or written to it.

    Optimizing and laying out the weights takes most of the time of loading. The weights are stored beside the
    graph, where they are mapped instead of parsed.

    read: gets the graph that `key` identifies; called only where the cache does not have it.
    """
    providers = [_CPU_PROVIDER]

    def load(folder: Path) -> Any:
        options = _cpu_options(library, threads)
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
        return inference_session(library, folder / _OPTIMIZED, options, providers)

    def make(folder: Path) -> Any:
        options = _cpu_options(library, threads)
        options.optimized_model_filepath = str(folder / _OPTIMIZED)
        prefix = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{prefix}file_name", _WEIGHTS)
        options.add_session_config_entry(f"{prefix}min_size_in_bytes", "1024")
        return inference_session(library, read(), options, providers)

    def plain() -> Any:
        return inference_session(library, read(), _cpu_options(library, threads), providers)

    facts = ("onnxruntime", library.__version__, key, *_IDLE_PASSES)
    return open_cached(cache_key(*facts), load, make, plain)


@cache
def _bound_memory(library: Any) -> None:
    """Limits the intermediate results of all sessions on the CPU to `MAX_MEMORY`, or half of the machine's memory.

    A graph can ask for any amount; beyond the limit ONNX Runtime raises an error before it allocates. Nothing smaller
    can be checked before the run: in graphs for CPUs shapes depend on the mask.
    """
    limit = MAX_MEMORY
    if hasattr(os, "sysconf"):
        limit = min(limit, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    memory = library.OrtMemoryInfo("Cpu", library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, library.OrtMemType.DEFAULT)
    library.create_and_register_allocator(memory, library.OrtArenaCfg({"max_mem": limit}))


class LoadedGraph:
    """One graph in ONNX Runtime, proved to run on the requested device and to have the expected inputs and outputs."""

    def __init__(
        self,
        content: GraphSource,
        graph: str,
        device: str = "cpu",
        threads: int = 0,
        key: str | None = None,
        precision: str = "fp32",
        open_session: Callable[[Any, Graph], Any] | None = None,
    ) -> None:
        """graph: EDIT or REFINE, whose inputs and outputs it must have.

        key: identifies the content; with it the optimized graph is cached on CPUs. precision: of the graph.
        open_session: opens the graph with the library, where that is not with one of its own providers.
        """
        library = import_onnxruntime()
        read = content if callable(content) else lambda: content
        self._device = device
        self._on_cuda: CudaSession | None = None
        try:
            if open_session is not None:
                self._session: Any = open_session(library, read())
            elif device != "cpu":
                opened = _open_on_cuda(library, read(), device, threads, precision, cuda_graphs=True)
                self._session = opened.session
                self._on_cuda = CudaSession(library, opened, _ordinal(device))
            elif key is None:
                options = _cpu_options(library, threads)
                self._session = inference_session(library, read(), options, [_CPU_PROVIDER])
            else:
                self._session = _cached_session(library, read, threads, key)
            self.provider = f"{self._session.get_providers()[0]} (onnxruntime {library.__version__})"
            self.outputs = frozenset(value.name for value in self._session.get_outputs())
            self.size = self._checked_size(graph)
        except SpmDeployError:
            raise
        except Exception as exc:  # names that are no UTF-8 raise UnicodeDecodeError
            raise _to_package_error(exc, device) from exc

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """Run the graph once.

        Args:
            outputs: Names of the outputs to compute.
            inputs: Arrays by the names of the inputs.

        Returns:
            One array for each name in `outputs`.

        Raises:
            BundleError: The graph has no such output, or ONNX Runtime refuses it.
            OutOfMemoryError: There is too little memory.
            UnavailableError: The GPU failed.
        """
        if not self.outputs.issuperset(outputs):
            raise BundleError(
                "the graph gives no unrounded result, which tiles are made from", "export the bundle again"
            )
        try:
            if self._on_cuda is not None:
                return self._on_cuda.run(outputs, inputs)
            results: list[NDArray[Any]] = self._session.run(list(outputs), dict(inputs))
        except Exception as exc:
            raise _to_package_error(exc, self._device, len(next(iter(inputs.values())))) from exc
        return results

    def bound(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Callable[[], None]:
        """A call that runs the graph on arrays in the memory of its GPU, and returns when it is done."""
        assert self._on_cuda is not None, self._device
        bound = self._on_cuda.bound(inputs, outputs)

        def run() -> None:
            try:
                bound()
            except Exception as exc:
                raise _to_package_error(exc, self._device) from exc

        return run

    @property
    def notes(self) -> tuple[str, ...]:
        """What it does without on its GPU, and why."""
        return () if self._on_cuda is None else tuple(self._on_cuda.notes)

    def _checked_size(self, graph: str) -> int:
        """Height and width of the images that the graph takes. Raises BundleError when it is another graph."""
        inputs = {value.name: (value.type, value.shape[1:]) for value in self._session.get_inputs()}
        outputs = {value.name: value.type for value in self._session.get_outputs()}
        size = inputs["mask"][1][0] if inputs.get("mask", ("", []))[1] else 0
        if not isinstance(size, int) or inputs != _ports(graph, size) or outputs.get("edited") != "tensor(uint8)":
            raise BundleError(
                f"the graph is no {graph} graph: it takes {inputs} and gives {outputs}", "export the bundle again"
            )
        return size


def _open_on_cuda(
    library: Any, content: Graph, device: str, threads: int, precision: str, cuda_graphs: bool
) -> OpenedSession:
    """A session that runs on the GPU as a whole. Raises UnavailableError, or ONNX Runtime's exceptions."""
    available = library.get_available_providers()
    if CUDA_PROVIDER not in available:
        raise UnavailableError(
            f"{device} was asked for, but this ONNX Runtime has only {', '.join(available)}",
            'pip uninstall onnxruntime, then pip install "spmdeploy[gpu]"; or ask for --device cpu',
        )
    _preload_cuda(library)

    def open_session(providers: list[Any]) -> Any:
        options = session_options(library, threads)
        # Without this ONNX Runtime moves to the CPU what a GPU cannot compute, or everything, without a message.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return inference_session(library, content, options, providers)

    with CUDA_CALLS:
        opened = open_on_cuda(open_session, _ordinal(device), precision, cuda_graphs)
    if (have := opened.session.get_providers()[0]) != CUDA_PROVIDER:
        raise UnavailableError(
            f"asked for {CUDA_PROVIDER} on {device}, but ONNX Runtime would run on {have}",
            "see `spmdeploy doctor`, or ask for --device cpu",
        )
    return opened


def _ordinal(device: str) -> int:
    return int(device.removeprefix("cuda:"))


def _ports(graph: str, size: int) -> dict[str, tuple[str, list[int]]]:
    """Types and shapes of the inputs, the batch left out."""
    shapes = {"image": [size, size, 3], "labels": [size, size], "instances": [size, size], "mask": [size, size]}
    if graph == REFINE:
        shapes["coarse"] = [size // 2, size // 2, 3]
    return {name: (_INPUTS[name], shape) for name, shape in shapes.items()}


def import_onnxruntime() -> Any:
    """The onnxruntime module, or UnavailableError with the command that installs it."""
    # Read when the library is imported: without it, version 1.32 stores a device id and may contact a server.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as exc:
        raise UnavailableError(
            f"ONNX Runtime cannot be imported: {exc}",
            'install it: pip install "spmdeploy[cpu]", or "spmdeploy[gpu]" for an NVIDIA GPU (never both)',
        ) from exc
    return onnxruntime


def missing_cuda_library(library: Any) -> str | None:
    """The loader's message when a library that the CUDA provider needs is missing; None when none is."""
    _preload_cuda(library)
    provider = Path(str(library.__file__)).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        return None
    try:
        ctypes.CDLL(str(provider))
    except OSError as exc:
        return str(exc) if "cannot open shared object" in str(exc) else None  # what else fails here may work there
    return None


def _preload_cuda(library: Any) -> None:
    """Loads CUDA and cuDNN from their pip packages, where there are any; without this only a system's are found."""
    if hasattr(library, "preload_dlls"):  # from onnxruntime 1.21 on
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            library.preload_dlls()


def _to_package_error(error: Exception, device: str, batch: int = 1) -> Exception:
    """ONNX Runtime's exceptions as ours; they share no base class, only the messages differ.

    batch: number of items that were to be computed.
    """
    text = " ".join(str(error).split())[:400]
    signs = ("allocate memory", "out of memory", "bad_alloc", "smaller than requested bytes")
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in signs):
        smaller = smaller_batch(batch) if device != "cpu" else None  # the memory that it needs is not known beforehand
        hint = f"close other programs, or use {f'--batch-size {smaller}' if smaller else 'a smaller --batch-size'}"
        return OutOfMemoryError(f"ONNX Runtime ran out of memory on {device}: {text}", hint)
    if device != "cpu":
        return UnavailableError(f"ONNX Runtime cannot use {device}: {text}", "see `spmdeploy doctor`")
    return BundleError(f"ONNX Runtime refused the graph: {text}", "export the bundle again")
