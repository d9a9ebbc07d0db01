"""One protocol for every backend, and the choice between them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spmdeploy.bundle.bundle import Bundle, GraphFiles
from spmdeploy.bundle.manifest import EDIT, ON_CPU, REFINE, GraphRecord
from spmdeploy.errors import UnavailableError, UsageError
from spmdeploy.types import LayoutInput, ModelInput, Precision

if TYPE_CHECKING:
    from spmdeploy.backends.device_pyramid import DeviceCascade
    from spmdeploy.tiling.letterbox import Letterbox
    from spmdeploy.tiling.pyramid import PyramidLevel

BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx", "torch")


class Unsupported(NamedTuple):
    """What a session cannot do, in words, and what to do about it."""

    problem: str
    hint: str


class Session(Protocol):
    """A graph that is loaded and ready on one device. Every attribute says what is, never what was asked for."""

    backend: str
    """onnxruntime, tensorrt, tensorrt-rtx or torch."""
    device: str
    """cpu or cuda:N."""
    precision: Precision
    """Of the arithmetic in the graph."""
    provider: str
    """Who computes, as the library itself names it, with its version."""
    size: int
    """Height and width of the pictures that the graph takes."""
    refines: bool
    """Whether `refine` can be called: the bundle holds a `refine` graph for this device in this precision."""
    refine_unsupported: Unsupported | None
    """Why it cannot be; None where it can."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should, in words, though the results are right. May grow with use."""

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        """Edits a batch.

        Args:
            inputs: A batch: image (B, size, size, 3); labels, instances and mask (B, size, size).

        Returns:
            uint8 (B, size, size, 3) RGB, equal to the image bit for bit where the mask is 0.
        """

    def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
        """`run` before its result is rounded: float32 (B, size, size, 3) RGB in 0..255, to be refined."""

    def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
        """Carries a result up to twice its size: `run_unrounded`, but content and light come from `coarse`.

        coarse: float32 (B, size/2, size/2, 3) RGB in 0..255, the result at half size; read under the mask and one of
        its pixels around it. The image is read outside the mask only. The graph is loaded at the first call. Raises
        BundleError where `refines` is false.
        """

    def close(self) -> None:
        """Frees the device's memory. Safe to call twice."""


LayoutRun = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""`Session.run` for a layout that is known: takes the images, (B, size, size, 3), and returns the edited ones."""


@runtime_checkable
class SupportsLayoutCache(Protocol):
    """A session that can compute once what many images share."""

    def bind_layout(self, layout: LayoutInput) -> LayoutRun:
        """Computes now what these three decide. The pictures are those of `run` with the same arguments."""


@runtime_checkable
class SupportsDevicePyramid(Protocol):
    """A session that can keep the picture of a cascade in the memory of its GPU from one level to the next."""

    def device_cascade(self, frame: Letterbox, levels: tuple[PyramidLevel, ...], batch: int) -> DeviceCascade | None:
        """For one window, `batch` tiles at once at most. Pictures and scores are those of the same steps on the host.
        None where the session is on the CPU.

        Raises OutOfMemory where the levels do not fit beside the graphs, UnavailableError where the GPU cannot.
        """


def bind_layout(session: Session, layout: LayoutInput) -> LayoutRun:
    """The layout kept by the session where it can, else given to it with every image."""
    if isinstance(session, SupportsLayoutCache):
        return session.bind_layout(layout)
    return lambda image: session.run(ModelInput(image, *layout))


@dataclass(frozen=True)
class OpenedBackend:
    """A session, and why it is this one: a line for each choice that the caller left open."""

    session: Session
    choices: tuple[str, ...]


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    on_loading: Callable[[], None] = lambda: None,
) -> OpenedBackend:
    """Loads the `edit` graph of a bundle; its `refine` graph waits until it is used.

    What is asked for by name is done or refused, never replaced.

    backend: auto (an engine that fits, else ONNX Runtime), onnxruntime, tensorrt or tensorrt-rtx. device: auto (the GPU
    where one can be used, else the CPU), cpu or cuda:N. precision: auto, fp32 or fp16. meanwhile: called before ONNX
    Runtime loads a graph, which takes long and leaves Python to other threads.
    Raises UnavailableError when this machine cannot, BundleError when the bundle does not hold it, VerificationError
    when an engine that was asked for gives wrong pictures.
    """
    if precision not in ("auto", "fp32", "fp16"):
        raise UsageError(f"unknown precision {precision!r}", "choose from auto, fp32, fp16")
    if device != "auto":
        check_device(device)
    if backend in ("tensorrt", "tensorrt-rtx"):
        return _open_engine(bundle, backend, device, precision)
    if backend == "onnxruntime":
        return _open_onnxruntime(bundle, device, precision, [], on_loading)
    if backend != "auto":
        raise UsageError(f"unknown backend {backend!r}", f"choose from auto, {', '.join(BACKENDS)}")
    if device == "cpu":
        why = "backend onnxruntime: engines do not run on the CPU"
        return _open_onnxruntime(bundle, device, precision, [why], on_loading)
    from spmdeploy.backends.select_engine import open_compatible_engine

    opened, reason = open_compatible_engine(bundle, _ordinal(device), precision)
    if opened is None:
        return _open_onnxruntime(bundle, device, precision, [f"backend onnxruntime: {reason}"], on_loading)
    return _with_device(opened, device)


def _open_engine(bundle: Bundle, backend: str, device: str, precision: str) -> OpenedBackend:
    """The session on an engine of this library, and on nothing else."""
    from spmdeploy.backends.select_engine import open_named_engine

    if device == "cpu":
        raise UsageError(f"{backend} runs on NVIDIA GPUs, not on the CPU", "leave --device out, or say cuda:0")
    runtime: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt" if backend == "tensorrt" else "tensorrt-rtx"
    return _with_device(open_named_engine(bundle, runtime, _ordinal(device), precision), device)


def _ordinal(device: str) -> int:
    return 0 if device == "auto" else int(device.removeprefix("cuda:"))


def _with_device(opened: OpenedBackend, device: str) -> OpenedBackend:
    backend, *others = opened.choices
    first = [f"device {opened.session.device}: the first GPU that the driver shows"] if device == "auto" else []
    return OpenedBackend(opened.session, (backend, *first, *others))


def _open_onnxruntime(
    bundle: Bundle, device: str, precision: str, choices: list[str], on_loading: Callable[[], None]
) -> OpenedBackend:
    """The session in ONNX Runtime; what `auto` leaves open goes to a GPU that works, else to the CPU."""
    from spmdeploy.backends import onnxruntime as ort

    if device != "auto":
        return _open_on(bundle, device, precision, choices, on_loading)
    device, reason = ort.best_device()
    if device != "cpu" and not any(_suits(record, device) for record in bundle.manifest.graphs):
        device, reason = "cpu", "the bundle holds a graph for CPUs only"
    if device != "cpu":
        try:
            return _open_on(bundle, device, precision, [*choices, f"device {device}: {reason}"], on_loading)
        except UnavailableError as error:
            device, reason = "cpu", f"{device} was tried first; {error.problem}"
    return _open_on(bundle, device, precision, [*choices, f"device {device}: {reason}"], on_loading)


def _open_on(
    bundle: Bundle, device: str, precision: str, choices: list[str], on_loading: Callable[[], None]
) -> OpenedBackend:
    """The session on exactly this device."""
    from spmdeploy.backends import onnxruntime as ort

    record, why = _choose_graph(bundle, precision, device)
    if why:
        choices = [*choices, f"precision {record.precision}: {why}"]
    finer = _find(bundle, REFINE, record.precision, device)
    get_finer = None if finer is None else lambda: _content(bundle, finer)
    on_loading()
    session = ort.OnnxRuntimeSession(
        _content(bundle, record),
        record.precision,
        device,
        refine=get_finer,
        read_again=partial(bundle.read_graph, record),
    )
    return OpenedBackend(session, tuple(choices))


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


def check_device(device: str) -> None:
    """Raises UsageError unless `device` is cpu or cuda:N."""
    if device != "cpu" and not re.fullmatch(r"cuda:\d{1,2}", device):
        raise UsageError(f"unknown device {device!r}", "choose from auto, cpu, cuda:0, cuda:1, ...")
