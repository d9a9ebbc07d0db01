"""Runs a bundle's graphs in OpenVINO: in FP32, or in bf16 on processors with instructions for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import OpenedBackend, Unsupported
from spmdeploy.backends.graph_cache import cpu_features
from spmdeploy.backends.openvino_graph import (
    CompiledGraph,
    CpuPrecision,
    GraphLoader,
    import_openvino,
    short_version,
    single_images,
)
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, LAYOUT, PICTURE, REFINE, GraphRecord
from spmdeploy.errors import BundleError, UnavailableError
from spmdeploy.types import BackendPrecision, LayoutInput, ModelInput

if TYPE_CHECKING:
    from spmdeploy.backends.base import LayoutRun

BF16_FEATURES = ("amx_bf16", "avx512_bf16")
"""Instruction sets that multiply bf16, the faster first. Without them OpenVINO converts, or computes in FP32."""


def open_openvino(
    bundle: Bundle, device: str, precision: str, on_loading: Callable[[], None] = lambda: None
) -> OpenedBackend:
    """Open the plain graphs of a bundle on the CPU.

    Args:
        bundle: Must hold the FP32 `edit` graph.
        device: auto or cpu.
        precision: auto (bf16 where the processor multiplies it, else fp32), fp32 or bf16.
        on_loading: Called before a graph is loaded.

    Raises:
        UnavailableError: OpenVINO is missing, too old, refuses the graph, or does not compute in the precision.
        BundleError: The bundle holds no plain FP32 graph.
    """
    library = import_openvino()
    core = library.Core()
    feature, problem = bf16_support()
    choices: list[str] = []
    if precision == "auto":
        precision = "bf16" if feature else "fp32"
        why = f"faster by {feature}" if feature else problem
    elif precision == "bf16" and not feature:
        raise UnavailableError(f"bf16 is refused: {problem}", "use --precision fp32")
    else:
        why = ""
    on_loading()
    session = OpenVinoSession(library, core, bundle, "bf16" if precision == "bf16" else "fp32")
    if why:
        choices.append(f"precision {precision}: {why}; {session.read_back}")
    return OpenedBackend(session, tuple(choices))


def bf16_support() -> tuple[str, str]:
    """The instruction set of this processor that multiplies bf16; or an empty string, and why there is none."""
    features = cpu_features().split()
    found = next((name for name in BF16_FEATURES if name in features), "")
    return found, "" if found else f"this processor has neither {' nor '.join(BF16_FEATURES)}"


class OpenVinoSession:
    """The `edit` graph in OpenVINO, and the others from their first use on; may be used from several threads at once,
    which take turns."""

    backend = "openvino"
    device = "cpu"
    notes: tuple[str, ...] = ()

    def __init__(
        self, library: Any, core: Any, bundle: Bundle, precision: CpuPrecision, as_exported: bool = False
    ) -> None:
        """as_exported: batches of any size, without the cache; slower, a baseline.

        Raises BundleError, UnavailableError, OutOfMemoryError.
        """
        self.precision: BackendPrecision = precision
        self.provider = f"CPU (openvino {short_version(library)})"
        self.size = bundle.manifest.native_size
        self._loader = GraphLoader(library, core, bundle, precision, as_exported)
        self._loading = threading.Lock()
        self._edit: CompiledGraph | None = self._loader.load(bundle.graph(EDIT, "fp32"))
        self._refine: CompiledGraph | None = None
        self._parts: tuple[CompiledGraph, CompiledGraph] | None = None
        there = {record.graph: record for record in bundle.manifest.graphs if record.precision == "fp32"}
        self._refine_record = there.get(REFINE)
        self._part_records = (there[LAYOUT], there[PICTURE]) if LAYOUT in there and PICTURE in there else None
        self.refines = self._refine_record is not None
        problem = Unsupported("the bundle holds no plain refine graph in fp32", bundle.add_graphs)
        self.refine_unsupported = None if self.refines else problem

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        edited: NDArray[np.uint8] = _open(self._edit).run(inputs._asdict(), "edited")
        return edited

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        unrounded: NDArray[np.float32] = _open(self._edit).run(inputs._asdict(), "unrounded")
        return unrounded

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._loading:
            _open(self._edit)
            if self._refine is None:
                if self._refine_record is None:
                    assert self.refine_unsupported is not None
                    raise BundleError(*self.refine_unsupported)
                self._refine = self._loader.load(self._refine_record)
        unrounded: NDArray[np.float32] = self._refine.run({**inputs._asdict(), "coarse": coarse}, "unrounded")
        return unrounded

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        """Runs the `layout` graph now. Both graphs are loaded at the first call; bundles of schema 1 have none."""
        if self._part_records is None:
            return lambda image: self.run(ModelInput(image, *layout))
        with self._loading:
            _open(self._edit)
            if self._parts is None:
                first, second = self._part_records
                self._parts = self._loader.load(first), self._loader.load(second)
        layout_graph, picture_graph = self._parts
        bound = [
            picture_graph.bind(layout_graph.compute(given) | picture_graph.own_inputs(given))
            for given in single_images(layout._asdict())
        ]

        def run(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return np.concatenate([one(image[[index]]) for index, one in enumerate(bound)])

        return run

    @property
    def loaded(self) -> tuple[GraphRecord, ...]:
        """Records of the whole graphs that are loaded: `refine` is from its first use on."""
        return tuple(graph.record for graph in (self._edit, self._refine) if graph is not None)

    @property
    def read_back(self) -> str:
        """The precision that the convolutions of the edit graph compute in, read from OpenVINO's compiled graph."""
        return _open(self._edit).read_back

    def close(self) -> None:
        with self._loading:
            self._edit = self._refine = self._parts = None


def _open(graph: CompiledGraph | None) -> CompiledGraph:
    if graph is None:
        raise UnavailableError("the session was closed", "open another")
    return graph
