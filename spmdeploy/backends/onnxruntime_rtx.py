"""ONNX Runtime's plugin provider for TensorRT-RTX: the bundle's graphs on RTX GPUs, without engines built beforehand.

The package `onnxruntime-ep-nv-tensorrt-rtx` works beside plain ONNX Runtime from 1.24 on. It compiles a graph for the
GPU when it is opened and keeps the kernels in the cache folder. FP16 only: it has no option that excludes TF32.

Not yet run on a GPU. Version 0.5.0 was installed and refuses to load without NVIDIA's driver; with stand-ins for the
driver's libraries it loads and lists no GPU. The sessions of the tests are those of ONNX Runtime's CPU provider.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache, partial
from typing import Any

from spmdeploy.backends.base import Check, OpenedBackend
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession, graph_content
from spmdeploy.backends.onnxruntime_graph import (
    Graph,
    GraphSource,
    LoadedGraph,
    import_onnxruntime,
    inference_session,
    session_options,
)
from spmdeploy.backends.verify import verify_edits
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, REFINE
from spmdeploy.errors import UnavailableError, VerificationError
from spmdeploy.files import user_cache
from spmdeploy.gpu.driver import visible_gpus
from spmdeploy.types import Precision

NAME = "onnxruntime-rtx"
MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = 'pip install "spmdeploy[onnxruntime-rtx]"'
PRECISION: Precision = "fp16"
_ENTRIES = {"session.disable_cpu_ep_fallback": "1"}


def open_onnxruntime_rtx(bundle: Bundle, device: str) -> OpenedBackend:
    """Open the FP16 graphs of a bundle and repeat its golden edits.

    Args:
        bundle: Holds the graphs.
        device: auto or cuda:N.

    Raises:
        UnavailableError: The package, the driver or an RTX GPU is missing.
        BundleError: The bundle has no FP16 graph or no golden edits.
        VerificationError: The golden edits come out differently.
    """
    ordinal = 0 if device == "auto" else int(device.removeprefix("cuda:"))
    edit = bundle.graph(EDIT, PRECISION)
    refine = next((one for one in bundle.manifest.graphs if (one.graph, one.precision) == (REFINE, PRECISION)), None)
    session = RtxPluginSession(
        graph_content(bundle, edit),
        PRECISION,
        f"cuda:{ordinal}",
        refine=None if refine is None else partial(graph_content, bundle, refine),
        add_refine=bundle.add_graphs,
    )
    faults = [f"{result.name}: {fault}" for result in verify_edits(session, bundle) for fault in result.problems]
    if faults:
        session.close()
        raise VerificationError(f"{NAME} gives wrong results: {'; '.join(faults)}", "use another backend and report it")
    return OpenedBackend(session, (f"backend {NAME}: as asked; its golden edits passed just now",))


class RtxPluginSession(OnnxRuntimeSession):
    """The graphs in ONNX Runtime with the plugin provider. Arrays are copied at every call."""

    backend = NAME

    def _load(self, content: GraphSource, graph: str, key: str | None) -> LoadedGraph:
        return LoadedGraph(content, graph, self.device, open_session=partial(_open_session, self.device))

    def device_cascade(self, *_: Any) -> None:
        """The levels of a large edit are kept on the host."""

    def bound(self, inputs: Any, outputs: Any) -> Any:
        raise UnavailableError(f"{NAME} accepts no inputs in the GPU's memory", "use --scope edit")


def check_onnxruntime_rtx() -> Check:
    """Whether the provider can be loaded here and lists a GPU."""
    if importlib.util.find_spec(MODULE) is None:
        return Check(NAME, False, f"{MODULE} is not installed", f"{INSTALL}, for RTX GPUs from the 30 series on")
    try:
        name, devices = _devices(import_onnxruntime())
    except UnavailableError as exc:
        return Check(NAME, False, exc.problem, exc.hint)
    return Check(NAME, True, f"{name} lists {len(devices)}; `spmdeploy verify --backend {NAME}` proves it")


def _open_session(device: str, library: Any, content: Graph) -> Any:
    ordinal = int(device.removeprefix("cuda:"))
    name, devices = _devices(library)
    if ordinal not in devices:
        raise UnavailableError(f"{name} has no {device}, but {', '.join(f'cuda:{one}' for one in devices)}", None)
    options = session_options(library)
    for key, value in _ENTRIES.items():
        options.add_session_config_entry(key, value)
    kernels = user_cache() / "onnxruntime-rtx"
    kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
    options.add_provider_for_devices([devices[ordinal]], {"nv_runtime_cache_path": str(kernels)})
    session = inference_session(library, content, options, [])
    if (have := session.get_providers()[0]) != name:
        raise UnavailableError(f"asked for {name} on {device}, but ONNX Runtime would run on {have}", None)
    return session


@cache
def _devices(library: Any) -> tuple[str, dict[int, Any]]:
    """The provider's name and its GPUs by number. Registers it. Raises UnavailableError."""
    if not hasattr(library, "register_execution_provider_library"):
        raise UnavailableError(f"{NAME} needs ONNX Runtime 1.24 or newer, here {library.__version__}", INSTALL)
    try:
        count = visible_gpus()  # asked first: without the driver's library the provider does not load
    except OSError as exc:
        raise UnavailableError(
            f"{NAME} needs an NVIDIA GPU: {exc}", "install NVIDIA's driver, or edit on the CPU"
        ) from exc
    try:
        plugin = importlib.import_module(MODULE)
        name: str = plugin.get_ep_name()
        library.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as exc:  # ImportError, OSError and the exceptions of ONNX Runtime, which have no common base
        text = " ".join(str(exc).split())[:400]
        raise UnavailableError(f"{NAME} does not load: {text}", "is NVIDIA's driver new enough for CUDA 13?") from exc
    found = [device for device in library.get_ep_devices() if device.ep_name == name]
    if not found:
        problem = f"{name} lists no GPU, the driver shows {count}"
        raise UnavailableError(problem, "it runs on RTX GPUs from the 30 series on; use --backend onnxruntime")
    return name, {int(device.ep_options.get("device_id", place)): device for place, device in enumerate(found)}
