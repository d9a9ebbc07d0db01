"""ONNX Runtime, on the CPU or on a CUDA device, proved to be where it says it is."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import OpenedBackend, Unsupported
from spmdeploy.backends.graph_cache import cache_key, open_cached
from spmdeploy.backends.threads import available_threads
from spmdeploy.bundle.bundle import Bundle, GraphFiles
from spmdeploy.bundle.manifest import EDIT, ON_CPU, PARTS, REFINE, GraphRecord
from spmdeploy.errors import BundleError, OutOfMemoryError, SpmDeployError, UnavailableError
from spmdeploy.gpu.arrays import DeviceArray
from spmdeploy.gpu.driver import visible_gpus
from spmdeploy.types import BackendPrecision, LayoutInput, ModelInput, Precision

if TYPE_CHECKING:
    from spmdeploy.backends.base import LayoutRun
    from spmdeploy.backends.device_pyramid import DeviceCascade
    from spmdeploy.backends.onnxruntime_pyramid import OrtCascades
    from spmdeploy.tiling.letterbox import Letterbox
    from spmdeploy.tiling.pyramid import PyramidLevel

_INPUTS = {
    "image": "tensor(uint8)",
    "labels": "tensor(uint8)",
    "instances": "tensor(int32)",
    "mask": "tensor(uint8)",
    "coarse": "tensor(float)",
}

Graph = Path | GraphFiles
"""An ONNX file, its weights beside it where it holds them not itself; or all of that in memory."""
Arrays = Mapping[str, NDArray[Any]]


def open_onnxruntime(
    bundle: Bundle, device: str, precision: str, on_loading: Callable[[], None] = lambda: None
) -> OpenedBackend:
    """Open a bundle in ONNX Runtime; device `auto` is a GPU that works, else the CPU."""
    choices: list[str] = []
    if device != "auto":
        return _open_on(bundle, device, precision, choices, on_loading)
    device, reason = best_device()
    if device != "cpu" and not any(_suits(record, device) for record in bundle.manifest.graphs):
        device, reason = "cpu", "the bundle holds a graph for CPUs only"
    if device != "cpu":
        try:
            return _open_on(bundle, device, precision, [*choices, f"device {device}: {reason}"], on_loading)
        except UnavailableError as error:
            notice = f"device cpu: {device} was tried first; {error.problem}"
            opened = _open_on(bundle, "cpu", precision, [*choices, notice], on_loading)
            return replace(opened, notices=(notice,))
    return _open_on(bundle, device, precision, [*choices, f"device {device}: {reason}"], on_loading)


def _open_on(
    bundle: Bundle, device: str, precision: str, choices: list[str], on_loading: Callable[[], None]
) -> OpenedBackend:
    """The session on exactly this device."""
    record, why = _choose_graph(bundle, precision, device)
    if why:
        choices = [*choices, f"precision {record.precision}: {why}"]
    finer = _find(bundle, REFINE, record.precision, device)
    get_finer = None if finer is None else lambda: _content(bundle, finer)
    on_loading()
    session = OnnxRuntimeSession(
        _content(bundle, record),
        record.precision,
        device,
        refine=get_finer,
        cached_layout=_parts_of(bundle, record),
        edit_key=_content_key(bundle, record),
        refine_key=None if finer is None else _content_key(bundle, finer),
    )
    return OpenedBackend(session, tuple(choices))


def _parts_of(bundle: Bundle, record: GraphRecord) -> Callable[[], tuple[Graph, Graph]] | None:
    """What loads the two parts of a graph for cached layouts; None where the bundle has none (schema 1)."""
    names = PARTS.get(record.graph, ())
    there = {one.graph: one for one in bundle.manifest.graphs if one.precision == record.precision}
    if not names or not all(name in there for name in names):
        return None
    layout, picture = (there[name] for name in names)
    return lambda: (_content(bundle, layout), _content(bundle, picture))


def _content_key(bundle: Bundle, record: GraphRecord) -> str:
    """Identifies the graph and its weights."""
    return " ".join(bundle.digest(name) for name in record.files)


def _content(bundle: Bundle, record: GraphRecord) -> Path | GraphFiles:
    """A path spares the copy in memory that bytes cost, but only a folder has one."""
    return bundle.path_of_graph(record) if bundle.is_on_disk(record) else bundle.read_graph(record)


def _choose_graph(bundle: Bundle, precision: str, device: str) -> tuple[GraphRecord, str | None]:
    """The record of the graph to load, and why when the choice was ours."""
    if precision != "auto":
        return _graph_for(bundle, precision, device), None
    there = {record.precision for record in bundle.manifest.graphs if _suits(record, device)}
    preferred: Precision = "fp32" if device == "cpu" else "fp16"
    why = "CPUs compute in FP32" if device == "cpu" else "faster on a GPU, within the bundle's limits of FP32"
    if preferred in there:
        return _graph_for(bundle, preferred, device), why
    other: Precision = "fp16" if preferred == "fp32" else "fp32"
    return _graph_for(bundle, other, device), f"the bundle holds no {preferred} graph for {device}"


def _suits(record: GraphRecord, device: str) -> bool:
    return record.graph == EDIT or (record.graph == ON_CPU[EDIT] and device == "cpu")


def _graph_for(bundle: Bundle, precision: str, device: str) -> GraphRecord:
    """The `edit` graph for the device. Raises BundleError."""
    return _find(bundle, EDIT, precision, device) or bundle.graph(EDIT, precision)


def _find(bundle: Bundle, graph: str, precision: str, device: str) -> GraphRecord | None:
    """The graph made for the device where there is one, else the one for all. graph: EDIT or REFINE."""
    there = {record.graph: record for record in bundle.manifest.graphs if record.precision == precision}
    return (there.get(ON_CPU[graph]) if device == "cpu" else None) or there.get(graph)


class OnnxRuntimeSession:
    """The `edit` graph in ONNX Runtime, and the `refine` graph from its first use on; may be used from several threads
    at once."""

    backend = "onnxruntime"
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        edit: Graph,
        precision: Precision,
        device: str = "cpu",
        threads: int = 0,
        refine: Callable[[], Graph] | None = None,
        cached_layout: Callable[[], tuple[Graph, Graph]] | None = None,
        edit_key: str | None = None,
        refine_key: str | None = None,
    ) -> None:
        """device: cpu or cuda:N. threads: 0 = `available_threads` (CPU only). refine: gets the graph when it is needed.

        cached_layout: gets the `layout` and `picture` graphs when they are needed; None: the bundle has none, and
        layouts are not cached. edit_key, refine_key: identify the content of the graphs; without them the optimized
        graph is not cached.
        """
        self.device = device
        self.precision: BackendPrecision = precision
        self._threads = threads
        self._edit: LoadedGraph | None = LoadedGraph(edit, EDIT, device, threads, edit_key)
        self._refine: LoadedGraph | None = None
        self._parts: CachedLayoutGraphs | None = None
        self._cascades: OrtCascades | None = None
        self._get_refine, self._refine_key = refine, refine_key
        self._get_parts = cached_layout
        self.refines = refine is not None
        problem = f"the bundle holds no refine graph in {precision} for {device}"
        self.refine_unsupported = None if self.refines else Unsupported(problem, "export it again with one")
        self._loading = threading.Lock()
        self.provider, self.size = self._edit.provider, self._edit.size

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        edited: NDArray[np.uint8] = _open(self._edit).run(["edited"], inputs._asdict())[0]
        return edited

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        unrounded: NDArray[np.float32] = _open(self._edit).run(["unrounded"], inputs._asdict())[0]
        return unrounded

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        unrounded: NDArray[np.float32] = self._refining().run(["unrounded"], {**inputs._asdict(), "coarse": coarse})[0]
        return unrounded

    def _refining(self) -> LoadedGraph:
        with self._loading:
            if self._refine is None:
                _open(self._edit)
                if self._get_refine is None:
                    assert self.refine_unsupported is not None
                    raise BundleError(*self.refine_unsupported)
                self._refine = LoadedGraph(self._get_refine(), REFINE, self.device, self._threads, self._refine_key)
            return self._refine

    @property
    def loaded(self) -> tuple[str, ...]:
        """The graphs that are: `refine` is from its first use on."""
        return tuple(name for name, graph in ((EDIT, self._edit), (REFINE, self._refine)) if graph is not None)

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        """Runs the `layout` graph now. Both graphs are loaded at the first call and take the memory of the weights once
        more."""
        if self._get_parts is None:
            return lambda image: self.run(ModelInput(image, *layout))
        with self._loading:
            _open(self._edit)
            if self._parts is None:
                self._parts = CachedLayoutGraphs(*self._get_parts(), self.device, self._threads)
        return self._parts.bind(layout)

    def bound(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Callable[[], None]:
        """A call that runs the graph on arrays in the memory of this session's GPU, and returns when it is done."""
        return _open(self._edit).bound(inputs, outputs)

    def device_cascade(self, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch: int) -> DeviceCascade | None:
        """On a GPU, refine a window whose image stays in its memory; see `SupportsDevicePyramid`."""
        if self.device == "cpu":
            return None
        refine = self._refining()
        from spmdeploy.backends.onnxruntime_pyramid import (
            OrtCascades,  # needed on GPUs only
        )

        with self._loading:
            edit = _open(self._edit)
            if self._cascades is None:
                self._cascades = OrtCascades(int(self.device.removeprefix("cuda:")), self.size)
        return self._cascades.open(edit, refine, frame, levels, batch)

    def close(self) -> None:
        with self._loading:
            self._edit = self._refine = self._parts = None
            if self._cascades is not None:
                self._cascades.close()


def _open(graph: LoadedGraph | None) -> LoadedGraph:
    if graph is None:
        raise UnavailableError("the session was closed", "open another")
    return graph


class CachedLayoutGraphs:
    """The `layout` and `picture` graphs of a bundle in ONNX Runtime: the first runs once for each layout.

    On a GPU the cached tensors stay in its memory, for as long as the function that `bind` returned is alive.
    """

    def __init__(self, layout: Graph, picture: Graph, device: str = "cpu", threads: int = 0) -> None:
        """Raises BundleError, OutOfMemoryError, UnavailableError."""
        library = import_onnxruntime()
        self._device = device
        providers = _providers(library, device)
        sessions = []
        try:
            for graph in (layout, picture):
                options = _options(library, threads)
                if device != "cpu":
                    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
                sessions.append(inference_session(library, graph, options, providers))
        except Exception as error:
            raise _translated(error, device) from error
        for session in sessions:
            _proved_provider(session, providers, device)
        self._layout, self._picture = sessions
        self._layout_inputs, self._cached, self._picture_inputs = (
            [value.name for value in values]
            for values in (self._layout.get_inputs(), self._layout.get_outputs(), self._picture.get_inputs())
        )
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
            return self._bind_on("cuda", int(self._device.removeprefix("cuda:")), given)
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
            self._layout.run_with_iobinding(binding)
            known |= dict(zip(self._cached, binding.get_outputs(), strict=True))
        except Exception as error:
            raise _translated(error, self._device) from error

        def run(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
            try:
                binding = self._picture.io_binding()  # one for each call: several threads may call
                binding.bind_cpu_input("image", np.ascontiguousarray(image))
                for name in self._picture_inputs:
                    if name != "image":
                        binding.bind_ortvalue_input(name, known[name])
                binding.bind_output("edited", "cpu")
                self._picture.run_with_iobinding(binding)
                edited: NDArray[np.uint8] = binding.copy_outputs_to_cpu()[0]
            except Exception as error:
                raise _translated(error, self._device) from error
            return edited

        return run

    def _run(self, graph: Any, outputs: Sequence[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            results: list[NDArray[Any]] = graph.run(list(outputs), inputs)
        except Exception as error:
            raise _translated(error, self._device) from error
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
    """ONNX Runtime's own session. options: its SessionOptions, to which weights in memory are added."""
    without: dict[str, Any] = {"enable_fallback": 0}  # it prints to stdout and tries the same again
    if providers == ["CPUExecutionProvider"]:
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


def _options(library: Any, threads: int) -> Any:
    options = library.SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.log_severity_level = 3
    return options


def _cpu_options(library: Any, threads: int) -> Any:
    _bound_memory(library)
    options = _options(library, threads)
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


_OPTIMIZED, _WEIGHTS = "graph.onnx", "weights.bin"


def _cached_session(library: Any, content: Graph, threads: int, key: str) -> Any:
    """ONNX Runtime's session on the CPU; its optimized graph is read from the cache, or written to it.

    Optimizing and laying out the weights anew takes most of the time of loading. The weights are stored beside the
    graph, where they are mapped instead of parsed.
    """
    providers = ["CPUExecutionProvider"]

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
        return inference_session(library, content, options, providers)

    def plain() -> Any:
        return inference_session(library, content, _cpu_options(library, threads), providers)

    facts = ("onnxruntime", library.__version__, key, *_IDLE_PASSES)
    return open_cached(cache_key(*facts), load, make, plain)


@cache
def _bound_memory(library: Any) -> None:
    """Limits the intermediate results of all sessions on the CPU to half of the machine's memory.

    A graph can ask for any amount; beyond the limit ONNX Runtime raises an error instead of exhausting the machine.
    """
    if not hasattr(os, "sysconf"):
        return
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    memory = library.OrtMemoryInfo("Cpu", library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, library.OrtMemType.DEFAULT)
    library.create_and_register_allocator(memory, library.OrtArenaCfg({"max_mem": limit}))


class LoadedGraph:
    """One graph in ONNX Runtime, proved to be where it was wanted and to be what it should be."""

    def __init__(
        self, content: Graph, graph: str, device: str = "cpu", threads: int = 0, key: str | None = None
    ) -> None:
        """graph: EDIT or REFINE, whose inputs and outputs it must have.

        key: identifies the content; with it the optimized graph is cached on CPUs.
        """
        library = import_onnxruntime()
        self._device = device
        options = _options(library, threads)
        providers = _providers(library, device)
        if device == "cpu":
            options = _cpu_options(library, threads)
        else:
            _preload_cuda(library)
            # Without this ONNX Runtime moves to the CPU whatever a GPU cannot do, or everything, and says nothing.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            if key is None or device != "cpu":
                self._session: Any = inference_session(library, content, options, providers)
            else:
                self._session = _cached_session(library, content, threads, key)
            self.provider = f"{_proved_provider(self._session, providers, device)} (onnxruntime {library.__version__})"
            self.outputs = frozenset(value.name for value in self._session.get_outputs())
            self.size = self._checked_size(graph)
        except SpmDeployError:
            raise
        except Exception as error:  # names that are no UTF-8 raise UnicodeDecodeError
            raise _translated(error, device) from error

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        if not self.outputs.issuperset(outputs):
            raise BundleError(
                "the graph gives no unrounded result, which tiles are made from", "export the bundle again"
            )
        try:
            results: list[NDArray[Any]] = self._session.run(list(outputs), dict(inputs))
        except Exception as error:
            raise _translated(error, self._device) from error
        return results

    def bound(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Callable[[], None]:
        """A call that runs the graph on arrays in the memory of its GPU, and returns when it is done."""
        binding = self._session.io_binding()
        number = int(self._device.removeprefix("cuda:"))
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cuda", number, np.dtype(array.dtype).type, array.shape, array.address)

        def run() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                raise _translated(error, self._device) from error

        return run

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


def _proved_provider(session: Any, asked: list[Any], device: str) -> str:
    """The provider that a session really has. Raises UnavailableError unless it is the first one asked for."""
    wanted = asked[0][0] if isinstance(asked[0], tuple) else asked[0]
    have: str = session.get_providers()[0]
    if have != wanted:
        raise UnavailableError(
            f"asked for {wanted} on {device}, but ONNX Runtime would run on {have}",
            "see `spmdeploy doctor`, or ask for --device cpu",
        )
    return have


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
    except ImportError as error:
        raise UnavailableError(
            f"ONNX Runtime cannot be imported: {error}",
            'install it: pip install "spmdeploy[cpu]", or "spmdeploy[gpu]" for an NVIDIA GPU (never both)',
        ) from error
    return onnxruntime


def missing_cuda_library(library: Any) -> str | None:
    """What the loader says when a library that the CUDA provider needs is not there; None when all are."""
    _preload_cuda(library)
    provider = Path(str(library.__file__)).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        return None
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        return str(error) if "cannot open shared object" in str(error) else None  # what else fails here may work there
    return None


def _preload_cuda(library: Any) -> None:
    """Loads CUDA and cuDNN from their pip packages, where there are any; without this only a system's are found."""
    if hasattr(library, "preload_dlls"):  # from onnxruntime 1.21 on
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            library.preload_dlls()


def best_device() -> tuple[str, str]:
    """The device that `auto` means, and why."""
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        return "cpu", "this ONNX Runtime is built without CUDA"
    try:
        gpus = visible_gpus()
    except OSError as error:
        return "cpu", str(error)
    return ("cuda:0", "the first GPU that the driver shows") if gpus else ("cpu", "the driver shows no GPU")


def _providers(library: Any, device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    available = library.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise UnavailableError(
            f"{device} was asked for, but this ONNX Runtime has only {', '.join(available)}",
            'pip uninstall onnxruntime, then pip install "spmdeploy[gpu]"; or ask for --device cpu',
        )
    # FP32 means FP32: by default this provider rounds what convolutions multiply to TF32's ten bits of mantissa.
    return [("CUDAExecutionProvider", {"device_id": int(device.removeprefix("cuda:")), "use_tf32": 0})]


def _translated(error: Exception, device: str) -> Exception:
    """ONNX Runtime's exceptions as ours; they share no base class, only the messages differ."""
    text = " ".join(str(error).split())[:400]
    signs = ("allocate memory", "out of memory", "bad_alloc", "smaller than requested bytes")
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in signs):
        return OutOfMemoryError(f"ONNX Runtime ran out of memory on {device}: {text}", "close other programs")
    if device != "cpu":
        return UnavailableError(f"ONNX Runtime cannot use {device}: {text}", "see `spmdeploy doctor`")
    return BundleError(f"ONNX Runtime refused the graph: {text}", "export the bundle again")
