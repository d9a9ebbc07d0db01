"""ONNX Runtime on the CPU or on a CUDA device: chooses device and graphs, and runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import OpenedBackend, Unsupported
from spmdeploy.backends.onnxruntime_graph import CachedLayoutGraphs, Graph, GraphSource, LoadedGraph, import_onnxruntime
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, ON_CPU, PARTS, REFINE, GraphRecord
from spmdeploy.errors import BundleError, UnavailableError
from spmdeploy.types import BackendPrecision, LayoutInput, ModelInput, Precision

if TYPE_CHECKING:
    from spmdeploy.backends.base import LayoutRun
    from spmdeploy.backends.device_pyramid import DeviceCascade
    from spmdeploy.backends.onnxruntime_pyramid import OrtCascades
    from spmdeploy.gpu.arrays import DeviceArray
    from spmdeploy.tiling.letterbox import Letterbox
    from spmdeploy.tiling.pyramid import PyramidLevel


def open_onnxruntime(
    bundle: Bundle, device: str, precision: str, on_loading: Callable[[], None] = lambda: None
) -> OpenedBackend:
    """Open a bundle in ONNX Runtime.

    Args:
        bundle: Holds the graph.
        device: cpu, cuda:N, or auto, which is a GPU that works, else the CPU.
        precision: auto, fp32 or fp16.
        on_loading: Called before the graph is loaded.

    Raises:
        UnavailableError: The package or the device cannot be used.
        BundleError: The bundle has no such graph.
    """
    choices: list[str] = []
    if device != "auto":
        return _open_on(bundle, device, precision, choices, on_loading)
    device, reason = best_device()
    if device != "cpu" and not any(_suits(record, device) for record in bundle.manifest.graphs):
        device, reason = "cpu", "the bundle holds a graph for CPUs only"
    if device != "cpu":
        try:
            return _open_on(bundle, device, precision, [*choices, f"device {device}: {reason}"], on_loading)
        except UnavailableError as exc:
            notice = f"device cpu: {device} was tried first; {exc.problem}"
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
    get_finer = None if finer is None else lambda: graph_content(bundle, finer)
    on_loading()
    session = OnnxRuntimeSession(
        lambda: graph_content(bundle, record),
        record.precision,
        device,
        refine=get_finer,
        cached_layout=_parts_of(bundle, record),
        edit_key=bundle.graph_digests(record),
        refine_key=None if finer is None else bundle.graph_digests(finer),
        add_refine=bundle.add_graphs,
    )
    return OpenedBackend(session, tuple(choices))


def _parts_of(bundle: Bundle, record: GraphRecord) -> Callable[[], tuple[Graph, Graph]] | None:
    """What loads the two parts of a graph for cached layouts; None where the bundle has none (schema 1)."""
    names = PARTS.get(record.graph, ())
    there = {one.graph: one for one in bundle.manifest.graphs if one.precision == record.precision}
    if not names or not all(name in there for name in names):
        return None
    layout, picture = (there[name] for name in names)
    return lambda: (graph_content(bundle, layout), graph_content(bundle, picture))


def graph_content(bundle: Bundle, record: GraphRecord) -> Graph:
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


def best_device() -> tuple[str, str]:
    """The device that `auto` means, and why."""
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        return "cpu", "this ONNX Runtime is built without CUDA"
    from spmdeploy.gpu.driver import visible_gpus

    try:
        gpus = visible_gpus()
    except OSError as exc:
        return "cpu", str(exc)
    return ("cuda:0", "the first GPU that the driver shows") if gpus else ("cpu", "the driver shows no GPU")


class OnnxRuntimeSession:
    """The `edit` graph in ONNX Runtime, and the `refine` graph from its first use on; may be used from several threads
    at once."""

    backend = "onnxruntime"

    def __init__(
        self,
        edit: GraphSource,
        precision: Precision,
        device: str = "cpu",
        threads: int = 0,
        refine: Callable[[], Graph] | None = None,
        cached_layout: Callable[[], tuple[Graph, Graph]] | None = None,
        edit_key: str | None = None,
        refine_key: str | None = None,
        add_refine: str = "export the bundle again",
    ) -> None:
        """device: cpu or cuda:N. threads: 0 = `available_threads` (CPU only). refine: gets the graph when it is needed.

        cached_layout: gets the `layout` and `picture` graphs when they are needed; None: the bundle has none, and
        layouts are not cached. edit_key, refine_key: identify the content of the graphs; without them the optimized
        graph is not cached. add_refine: what to do where there is no `refine` graph.
        """
        self.device = device
        self.precision: BackendPrecision = precision
        self._threads = threads
        self._edit: LoadedGraph | None = self._load(edit, EDIT, edit_key)
        self._refine: LoadedGraph | None = None
        self._parts: CachedLayoutGraphs | None = None
        self._cascades: OrtCascades | None = None
        self._get_refine, self._refine_key = refine, refine_key
        self._get_parts = cached_layout
        self.refines = refine is not None
        problem = f"the bundle holds no refine graph in {precision} for {device}"
        self.refine_unsupported = None if self.refines else Unsupported(problem, add_refine)
        self._loading = threading.Lock()
        self.provider, self.size = self._edit.provider, self._edit.size

    def _load(self, content: GraphSource, graph: str, key: str | None) -> LoadedGraph:
        return LoadedGraph(content, graph, self.device, self._threads, key, self.precision)

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
                self._refine = self._load(self._get_refine(), REFINE, self._refine_key)
            return self._refine

    @property
    def notes(self) -> tuple[str, ...]:
        """What it does without on a GPU, and why."""
        return tuple(note for graph in (self._edit, self._refine) if graph is not None for note in graph.notes)

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
                self._parts = CachedLayoutGraphs(*self._get_parts(), self.device, self._threads, self.precision)
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
