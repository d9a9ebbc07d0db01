"""Lists the inference backends and opens them by name; `auto` chooses one.

The only list of backends: commands, help texts, `bench`, `verify` and `doctor` read it. Listing imports no library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from spmdeploy.backends.base import Check, OpenedBackend, check_device
from spmdeploy.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from spmdeploy.bundle.bundle import Bundle

SERVER = "server"
OnLoading = Callable[[], None]
Opener = Callable[["Bundle", str, str, OnLoading], OpenedBackend]
"""Called with the bundle, the device (auto, cpu, cuda:N ...; the URL of a server), the precision (auto, fp32 ...) and a
callback that runs before a graph is loaded, which takes long and leaves Python to other threads."""


@dataclass(frozen=True)
class BackendEntry:
    """One inference backend, before its library is imported."""

    name: str
    open: Opener
    help: str
    """One phrase for the help texts and the documentation."""
    devices: tuple[str, ...] = ("cpu",)
    """cpu, cuda, or both; `SERVER` alone where the device is the URL of a server."""
    precisions: tuple[str, ...] = ("fp32",)
    modules: tuple[str, ...] = ()
    """Top-level Python modules that it imports."""
    extra: str | None = None
    """Extra of this package that installs them."""
    runs_engines: bool = False
    """Whether it runs engines built by `spmdeploy build` instead of the bundle's graphs."""
    bench_rows: tuple[str, ...] = ()
    """Names of what `bench` measures separately; empty: the backend's name alone."""
    checks: Callable[[], Sequence[Check]] | None = field(default=None, compare=False)
    """What `doctor` reports; None: whether the modules are installed."""

    @property
    def on_server(self) -> bool:
        """Whether its device is the URL of a server."""
        return self.devices == (SERVER,)

    def missing(self) -> str:
        """The first module that is not installed, or an empty string. Imports nothing."""
        return next((name for name in self.modules if importlib.util.find_spec(name) is None), "")

    def run_checks(self) -> Sequence[Check]:
        """Whether this machine can use it, for each device that it distinguishes."""
        if self.checks is not None:
            return self.checks()
        if missing := self.missing():
            return [Check(self.name, False, f"{missing} is not installed", self._install)]
        return [Check(self.name, True, self.help)]

    @property
    def _install(self) -> str | None:
        return f'pip install "spmdeploy[{self.extra}]"' if self.extra else None

    def require_installed(self) -> None:
        """Raises UnavailableError with the command that installs what is missing."""
        if missing := self.missing():
            raise UnavailableError(f"the backend {self.name} needs the package {missing}", self._install)


_ENTRIES: dict[str, BackendEntry] = {}


def register(entry: BackendEntry) -> None:
    """Add a backend, or replace the one of that name."""
    _ENTRIES[entry.name] = entry


def unregister(name: str) -> None:
    """Remove a backend."""
    del _ENTRIES[name]


def backends() -> tuple[BackendEntry, ...]:
    """All registered backends, in the order in which they were registered."""
    return tuple(_ENTRIES.values())


def backend_names() -> tuple[str, ...]:
    """Their names."""
    return tuple(_ENTRIES)


def bench_names() -> tuple[str, ...]:
    """Names of everything that `bench` measures, the reference first."""
    return tuple(row for entry in backends() for row in entry.bench_rows or (entry.name,))


def backend_precisions() -> tuple[str, ...]:
    """Every precision that at least one backend computes in."""
    return tuple(dict.fromkeys(precision for entry in backends() for precision in entry.precisions))


def backend_entry(name: str) -> BackendEntry:
    """The backend of that name.

    Raises:
        UsageError: There is none; lists the names.
    """
    try:
        return _ENTRIES[name]
    except KeyError:
        raise UsageError(f"unknown backend {name!r}", f"choose from auto, {', '.join(_ENTRIES)}") from None


def open_backend(
    bundle: Bundle,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    on_loading: OnLoading = lambda: None,
) -> OpenedBackend:
    """Load the `edit` graph of a bundle; its `refine` graph is loaded when it is first used.

    An explicit choice is used or refused, never replaced.

    Args:
        bundle: The opened bundle.
        backend: auto (a compatible engine, else the fastest proved backend for this device) or a registered name.
        device: auto (a GPU if one can be used, else the CPU), cpu or cuda:N; for triton the URL of the server.
        precision: auto, or one of `backend_precisions`.
        on_loading: Called before ONNX Runtime loads a graph, which takes long and leaves Python to other threads.

    Raises:
        UnavailableError: This machine cannot run it.
        BundleError: The bundle does not hold the graph.
        VerificationError: A requested engine gives wrong results.
    """
    if precision not in ("auto", *backend_precisions()):
        raise UsageError(f"unknown precision {precision!r}", f"choose from auto, {', '.join(backend_precisions())}")
    entry = None if backend == "auto" else backend_entry(backend)
    if entry is not None and entry.on_server:
        if device in ("auto", "cpu") or device.startswith("cuda"):
            raise UsageError(f"{backend} computes on a server, which is not named", "name it with --url HOST:PORT")
    elif device != "auto":
        check_device(device)
    if entry is None:
        return _open_auto(bundle, device, precision, on_loading)
    if device == "cpu" and "cpu" not in entry.devices:
        raise UsageError(f"{backend} runs on NVIDIA GPUs, not on the CPU", "leave --device out, or give cuda:0")
    if device.startswith("cuda") and "cuda" not in entry.devices:
        raise UsageError(f"{backend} runs on the CPU, not on {device}", "leave --device out, or give cpu")
    if precision not in ("auto", *entry.precisions):
        offered = ", ".join(entry.precisions)
        raise UsageError(f"{backend} computes in {offered}, not in {precision}", "leave --precision out")
    entry.require_installed()
    return entry.open(bundle, device, precision, on_loading)


def _open_auto(bundle: Bundle, device: str, precision: str, on_loading: OnLoading) -> OpenedBackend:
    """A compatible engine; else on a CPU bf16 in OpenVINO, where it is faster and proved; else ONNX Runtime."""
    if precision == "bf16" and device not in ("auto", "cpu"):
        raise UsageError(f"bf16 is computed on CPUs, not on {device}", "leave --device out, or give cpu")
    if device == "cpu":
        reason, is_notice = "engines do not run on the CPU", False
    else:
        from spmdeploy.backends.select_engine import NO_ENGINES, open_compatible_engine

        opened, reason = open_compatible_engine(bundle, _ordinal(device), precision)
        if opened is not None:
            return _with_device(opened, device)
        is_notice = reason != NO_ENGINES
    gpu, why = _onnxruntime_gpu(device)
    if gpu or precision not in ("auto", "bf16"):
        return _open_graphs(bundle, device, precision, on_loading, reason, is_notice)
    from spmdeploy.backends.openvino import bf16_support

    feature, problem = bf16_support()
    opened, proof = _open_bf16(bundle, on_loading) if feature else (None, problem)
    if opened is not None:
        chosen = (f"device cpu: {why}",) if device == "auto" else ()
        choice = f"backend openvino: {reason}"
        in_bf16 = f"precision bf16: {proof}"  # a notice: the results are not those of FP32
        notices = (*((choice,) if is_notice else ()), in_bf16)
        return OpenedBackend(opened.session, (choice, *chosen, in_bf16), notices)
    if precision == "bf16":
        raise UnavailableError(f"bf16 cannot be used: {proof}", "use --precision fp32")
    if feature:
        reason = f"{reason}; no bf16: {proof}"
        is_notice = is_notice or not backend_entry("openvino").missing()
    return _open_graphs(bundle, device, precision, on_loading, reason, is_notice)


def _open_graphs(
    bundle: Bundle, device: str, precision: str, on_loading: OnLoading, reason: str, is_notice: bool
) -> OpenedBackend:
    """ONNX Runtime, whose graph for CPUs saves work in FP32; OpenVINO where that alone is installed.

    is_notice: whether the user should see the reason unasked.
    """
    only_openvino = backend_entry("onnxruntime").missing() and not backend_entry("openvino").missing()
    entry = backend_entry("openvino" if only_openvino and device in ("auto", "cpu") else "onnxruntime")
    found = entry.open(bundle, device, precision, on_loading)
    choice = f"backend {entry.name}: {reason}"
    return OpenedBackend(found.session, (choice, *found.choices), (*((choice,) if is_notice else ()), *found.notices))


def _onnxruntime_gpu(device: str) -> tuple[bool, str]:
    """Whether ONNX Runtime would use a GPU for this device, and why."""
    if device != "auto":
        return device != "cpu", "as asked"
    if backend_entry("onnxruntime").missing():
        return False, "ONNX Runtime is not installed"
    from spmdeploy.gpu.driver import visible_gpus

    try:
        if not visible_gpus():
            return False, "the driver shows no GPU"
    except OSError as exc:
        return False, str(exc)
    from spmdeploy.backends.onnxruntime import best_device  # imports ONNX Runtime, which takes long

    best, why = best_device()
    return best != "cpu", why


def _open_bf16(bundle: Bundle, on_loading: OnLoading) -> tuple[OpenedBackend | None, str]:
    if backend_entry("openvino").missing():
        return None, "OpenVINO is not installed"
    from spmdeploy.backends.select_cpu import open_proved_bf16

    return open_proved_bf16(bundle, on_loading)


def _open_openvino(bundle: Bundle, device: str, precision: str, on_loading: OnLoading) -> OpenedBackend:
    from spmdeploy.backends.openvino import open_openvino

    return open_openvino(bundle, device, precision, on_loading)


def _open_triton(bundle: Bundle, device: str, precision: str, on_loading: OnLoading) -> OpenedBackend:
    from spmdeploy.backends.triton import open_triton

    return open_triton(bundle, device, precision)


def _open_onnxruntime(bundle: Bundle, device: str, precision: str, on_loading: OnLoading) -> OpenedBackend:
    from spmdeploy.backends.onnxruntime import open_onnxruntime

    return open_onnxruntime(bundle, device, precision, on_loading)


def _open_onnxruntime_rtx(bundle: Bundle, device: str, precision: str, on_loading: OnLoading) -> OpenedBackend:
    from spmdeploy.backends.onnxruntime_rtx import open_onnxruntime_rtx

    on_loading()
    return open_onnxruntime_rtx(bundle, device)


def _open_torch(bundle: Bundle, device: str, precision: str, on_loading: OnLoading) -> OpenedBackend:
    from importlib import import_module

    opened: OpenedBackend = import_module("spmdeploy.backends.pytorch").open_torch(bundle, device, precision)
    return opened


def _open_engine(
    runtime: Literal["tensorrt", "tensorrt-rtx"], bundle: Bundle, device: str, precision: str, on_loading: OnLoading
) -> OpenedBackend:
    from spmdeploy.backends.select_engine import open_named_engine

    return _with_device(open_named_engine(bundle, runtime, _ordinal(device), precision), device)


def _ordinal(device: str) -> int:
    return 0 if device == "auto" else int(device.removeprefix("cuda:"))


def _with_device(opened: OpenedBackend, device: str) -> OpenedBackend:
    backend, *others = opened.choices
    first = [f"device {opened.session.device}: the first GPU that the driver shows"] if device == "auto" else []
    return OpenedBackend(opened.session, (backend, *first, *others), opened.notices)


def _engine_checks(runtime: Literal["tensorrt", "tensorrt-rtx"]) -> Sequence[Check]:
    from spmdeploy.backends.doctor import check_engine_library

    return [check_engine_library(runtime)]


def _onnxruntime_checks() -> Sequence[Check]:
    from spmdeploy.backends.doctor import check_onnxruntime

    return check_onnxruntime()


def _openvino_checks() -> Sequence[Check]:
    from spmdeploy.backends.doctor import check_openvino

    return check_openvino()


def _onnxruntime_rtx_checks() -> Sequence[Check]:
    from spmdeploy.backends.onnxruntime_rtx import check_onnxruntime_rtx

    return [check_onnxruntime_rtx()]


def _torch_checks() -> Sequence[Check]:
    from spmdeploy.backends.doctor import check_torch

    return [check_torch()]


for _entry in (
    BackendEntry(
        "torch",
        _open_torch,
        "the weights in eager PyTorch, the reference",
        devices=("cpu", "cuda"),
        modules=("torch", "onnx"),
        extra="export",
        bench_rows=("torch", "torch-compile"),
        checks=_torch_checks,
    ),
    BackendEntry(
        "tensorrt",
        partial(_open_engine, "tensorrt"),
        "engines built by TensorRT",
        devices=("cuda",),
        precisions=("fp32", "fp16"),
        extra="tensorrt",
        runs_engines=True,
        checks=partial(_engine_checks, "tensorrt"),
    ),
    BackendEntry(
        "tensorrt-rtx",
        partial(_open_engine, "tensorrt-rtx"),
        "engines built by TensorRT-RTX",
        devices=("cuda",),
        precisions=("fp32", "fp16"),
        extra="tensorrt-rtx",
        runs_engines=True,
        checks=partial(_engine_checks, "tensorrt-rtx"),
    ),
    BackendEntry(
        "onnxruntime",
        _open_onnxruntime,
        "the bundle's graphs in ONNX Runtime",
        devices=("cpu", "cuda"),
        precisions=("fp32", "fp16"),
        extra="cpu",
        bench_rows=("onnxruntime", "onnxruntime-plain", "onnxruntime-cuda"),
        checks=_onnxruntime_checks,
    ),
    BackendEntry(
        "onnxruntime-rtx",
        _open_onnxruntime_rtx,
        "the bundle's FP16 graphs in ONNX Runtime with the TensorRT-RTX plugin, without `build`",
        devices=("cuda",),
        precisions=("fp16",),
        modules=("onnxruntime", "onnxruntime_ep_nv_tensorrt_rtx"),
        extra="onnxruntime-rtx",
        checks=_onnxruntime_rtx_checks,
    ),
    BackendEntry(
        "openvino",
        _open_openvino,
        "the bundle's plain graphs in OpenVINO, in bf16 where the processor multiplies it",
        precisions=("fp32", "bf16"),
        modules=("openvino",),
        extra="openvino",
        bench_rows=("openvino", "openvino-plain"),
        checks=_openvino_checks,
    ),
    BackendEntry(
        "triton",
        _open_triton,
        "the models of export-triton on Triton servers, named by --url",
        devices=(SERVER,),
        precisions=("fp32", "fp16"),
        modules=("tritonclient", "grpc", "rapidjson"),
        extra="triton",
    ),
):
    register(_entry)
