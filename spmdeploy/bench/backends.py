"""The backends that can be compared, and how each is opened, measured and described.

What is asked for by name is opened or refused with the reason; nothing here chooses for the user.
"""

from __future__ import annotations

import importlib.util

from spmdeploy.backends.base import Session, check_device, open_session
from spmdeploy.backends.onnxruntime import OnnxRuntimeSession
from spmdeploy.backends.tensorrt import TensorRtSession
from spmdeploy.bench.results import BackendInfo
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import EDIT, ON_CPU, GraphRecord
from spmdeploy.errors import UnavailableError
from spmdeploy.gpu.driver import visible_gpus

REFERENCE_BACKEND = "torch"
"""The plain generator in eager PyTorch, in FP32: what every other picture and every speed is held against."""
BACKENDS = (REFERENCE_BACKEND, "torch-compile", "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
_ON_GPU_ONLY = frozenset({"onnxruntime-cuda", "tensorrt", "tensorrt-rtx"})


def open_backend(bundle: Bundle, name: str, device: str, precision: str) -> Session:
    """device: auto, cpu or cuda:N. precision: auto, fp32 or fp16.

    Raises UnavailableError saying why this machine cannot, BundleError when the bundle does not hold it.
    """
    place = _device_of(name, device)
    if name in (REFERENCE_BACKEND, "torch-compile"):
        return _open_torch(bundle, name, place, precision)
    library = name.removesuffix("-cuda")
    return open_session(bundle, library, place, precision).session


def skip_by_default(name: str) -> None:
    """Raises UnavailableError for what is not measured unless asked for by name."""
    if name != "torch-compile":
        return
    try:
        gpus = visible_gpus()
    except OSError:
        gpus = 0
    if not gpus:
        raise UnavailableError("left out: compiling for a CPU takes minutes", "ask for it: --backend torch-compile")


def cold_start_options(name: str, device: str, precision: str) -> list[str]:
    """The options with which `spmdeploy edit` uses a backend. Raises UnavailableError where it does not offer it."""
    if name == "torch-compile":
        raise UnavailableError("`spmdeploy edit` does not offer it", "leave it out of --scope cold-start")
    return ["--backend", name.removesuffix("-cuda"), "--device", _device_of(name, device), "--precision", precision]


def has_torch() -> bool:
    """Whether the reference can be made here; without importing anything."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "onnx"))


def describe(session: Session, bundle: Bundle) -> BackendInfo:
    provider, threads = session.provider, None
    if session.backend in (REFERENCE_BACKEND, "torch-compile"):
        from spmdeploy.bench.torch_backends import compute_settings

        threads, setting = compute_settings(session.device)
        provider += setting
    return BackendInfo(
        device=session.device,
        precision=session.precision,
        provider=provider,
        threads=threads,
        file_bytes=loaded_bytes(session, bundle),
        weights_bytes=bundle.manifest.generator.parameters * (2 if session.precision == "fp16" else 4),
    )


def _device_of(name: str, device: str) -> str:
    if device != "auto":
        check_device(device)
    if name in _ON_GPU_ONLY:
        if device == "cpu":
            raise UnavailableError(f"{name} runs on GPUs only, and --device cpu was asked for", "leave --device out")
        return "cuda:0" if device == "auto" else device
    if name == "onnxruntime":
        if device not in ("auto", "cpu"):
            raise UnavailableError(
                f"onnxruntime stands for the CPU here, and --device {device} was asked for",
                "--backend onnxruntime-cuda is its name on a GPU",
            )
        return "cpu"
    return device


def _open_torch(bundle: Bundle, name: str, device: str, precision: str) -> Session:
    try:
        from spmdeploy.backends.pytorch import open_torch_session
        from spmdeploy.bench.torch_backends import open_compiled_session
    except ModuleNotFoundError as error:
        raise UnavailableError(f"this needs the package {error.name}", 'pip install "spmdeploy[export]"') from error
    if name == REFERENCE_BACKEND:
        return open_torch_session(bundle, REFERENCE_BACKEND, device, precision).session
    return open_compiled_session(bundle, device, precision)


def loaded_bytes(session: Session, bundle: Bundle) -> int | None:
    """Bytes of the graphs or engines that a session has loaded by now, weights that they share counted once; None where
    it loads no files."""
    if isinstance(session, TensorRtSession):
        return session.engine_bytes
    if not isinstance(session, OnnxRuntimeSession):
        return None
    graphs = filter(None, (_record_of(session, bundle, name) for name in session.loaded))
    return sum(bundle.files()[name] for name in {name for graph in graphs for name in graph.files})


def graph_of(session: Session, bundle: Bundle) -> GraphRecord | None:
    """The record of the edit graph that a session has loaded; only ONNX Runtime loads one."""
    return _record_of(session, bundle, EDIT) if session.backend == "onnxruntime" else None


def _record_of(session: Session, bundle: Bundle, name: str) -> GraphRecord | None:
    names = (ON_CPU[name], name) if session.device == "cpu" else (name,)
    records = {record.graph: record for record in bundle.manifest.graphs if record.precision == session.precision}
    return next((records[name] for name in names if name in records), None)
