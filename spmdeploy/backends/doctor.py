"""Checks what this machine can run, and reports why not and what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from typing import Any

from spmdeploy.backends.base import Check
from spmdeploy.backends.onnxruntime_graph import import_onnxruntime, missing_cuda_library
from spmdeploy.backends.openvino import bf16_support
from spmdeploy.backends.openvino_graph import import_openvino, short_version
from spmdeploy.backends.registry import backend_entry, backends
from spmdeploy.backends.select_engine import compatible_engine
from spmdeploy.backends.triton import check_triton
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import ON_CPU
from spmdeploy.engines.library import import_engine_library
from spmdeploy.engines.record import EngineRuntime
from spmdeploy.errors import UnavailableError
from spmdeploy.files import quote_path
from spmdeploy.gpu.device import open_cuda
from spmdeploy.gpu.driver import visible_gpus

# The bare names, and those of the packages that they bring.
_PACKAGES: dict[EngineRuntime, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
_STUB_REMEDY = (
    "the package on PyPI is a stub that fetches the libraries from NVIDIA's own index while it is installed: install "
    "it again where that can be reached, or use the TensorRT of JetPack or of a container"
)


def run_checks(bundle: Bundle, url: str | None = None) -> list[Check]:
    """Check the GPU, every registered backend and what is needed to export.

    Args:
        bundle: Its engines are looked for.
        url: Triton servers that are asked for its models.
    """
    engines = [check for entry in backends() if entry.runs_engines for check in entry.run_checks()]
    others = [check for entry in backends() if not entry.runs_engines for check in entry.run_checks()]
    servers = [] if url is None else [_servers(bundle, url)]
    return [_gpu(), _cuda_binding(), *engines, _engines(bundle), *others, *servers, _export()]


def machine() -> dict[str, Any]:
    """Facts about this machine that a bug report needs."""
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _gpu() -> Check:
    try:
        count = visible_gpus()
    except OSError as exc:
        return Check("NVIDIA GPU", False, str(exc), "install NVIDIA's driver, or edit on the CPU")
    if not count:
        return Check("NVIDIA GPU", False, "the driver shows no GPU", "check CUDA_VISIBLE_DEVICES and nvidia-smi")
    return Check("NVIDIA GPU", True, f"{count} visible")


def _cuda_binding() -> Check:
    gpu = _gpu()
    name = "CUDA for Python"
    try:
        return Check(name, gpu.usable, open_cuda(0).name, gpu.remedy)
    except ImportError as exc:
        remedy = 'pip install cuda-core cuda-bindings (with a driver for CUDA 12: "cuda-bindings<13"), or PyCUDA'
        return Check(name, False, str(exc), remedy)
    except OSError as exc:
        return Check(name, False, str(exc) if gpu.usable else gpu.reason, gpu.remedy or "check nvidia-smi")


def check_engine_library(runtime: EngineRuntime) -> Check:
    """Whether engines can be run with it: needs the library, a GPU and a CUDA binding."""
    try:
        library = import_engine_library(runtime)
    except UnavailableError as exc:
        return Check(runtime, False, *_why_not_imported(runtime, exc))
    if not hasattr(library, "Runtime"):
        return Check(runtime, False, f"the module {library.__name__} is empty: leftovers of a package", _STUB_REMEDY)
    version = f"{runtime} {library.__version__}"
    binding = _cuda_binding()
    for needed in (_gpu(), binding):
        if not needed.usable:
            builds = "; it can build engines for other machines" if runtime == "tensorrt-rtx" else ""
            return Check(runtime, False, f"{version}, but no usable {needed.name}{builds}", needed.remedy)
    return Check(runtime, True, f"{version} with {binding.reason}")


def _why_not_imported(runtime: EngineRuntime, error: UnavailableError) -> tuple[str, str | None]:
    """Reason and remedy: not installed, installed without its libraries, or a library of CUDA missing."""
    package = next((name for name in _PACKAGES[runtime] if any(importlib.metadata.distributions(name=name))), None)
    if package is None:
        return f"{package or runtime} is not installed", error.hint
    version = importlib.metadata.version(package)
    if missing := re.search(r"(lib[\w.+-]+\.so[\w.]*|[\w.+-]+\.dll)", error.problem):
        remedy = f"install what brings {missing[1]}: CUDA's libraries, in the version that this package was built for"
        return f"{package} {version} is installed, but the library {missing[1]} is missing", remedy
    return f"{package} {version} is installed without its libraries: {error.problem}", _STUB_REMEDY


def _engines(bundle: Bundle) -> Check:
    name = f"engines of {bundle.manifest.name}"
    if all(graph.graph in ON_CPU.values() for graph in bundle.manifest.graphs):
        reason = "the bundle holds graphs for CPUs only, of which no engine can be built"
        return Check(name, False, reason, bundle.add_graphs)
    engine, reason = compatible_engine(bundle)
    remedy = f"on this machine: spmdeploy build {quote_path(bundle.path)}"
    return Check(name, engine is not None, reason, None if engine else remedy)


def _servers(bundle: Bundle, url: str) -> Check:
    try:
        backend_entry("triton").require_installed()
    except UnavailableError as exc:
        return Check(f"triton {url}", False, exc.problem, exc.hint)
    return check_triton(bundle, url)


def _onnxruntime_cpu() -> Check:
    name = "onnxruntime on cpu"
    try:
        library = import_onnxruntime()
    except UnavailableError as exc:
        return Check(name, False, exc.problem, exc.hint)
    return Check(name, True, f"onnxruntime {library.__version__}{_mixed_packages()}")


def check_onnxruntime() -> list[Check]:
    """On GPUs and on the CPU."""
    return [_onnxruntime_cuda(), _onnxruntime_cpu()]


def _onnxruntime_cuda() -> Check:
    name = "onnxruntime on cuda"
    both = {"onnxruntime", "onnxruntime-gpu"} & _installed()
    if len(both) == 2:
        return Check(
            name,
            False,
            "onnxruntime and onnxruntime-gpu are both installed and have overwritten each other's files",
            'pip uninstall onnxruntime onnxruntime-gpu, then pip install "spmdeploy[gpu]"',
        )
    try:
        library = import_onnxruntime()
    except UnavailableError as exc:
        return Check(name, False, exc.problem, 'pip install "spmdeploy[gpu]"')
    if "CUDAExecutionProvider" not in library.get_available_providers():
        reason = f"the installed onnxruntime {library.__version__} is built without CUDA"
        return Check(name, False, reason, 'pip uninstall onnxruntime, then pip install "spmdeploy[gpu]"')
    gpu = _gpu()
    if not gpu.usable:
        return Check(name, False, gpu.reason, gpu.remedy)
    if missing := missing_cuda_library(library):
        remedy = 'pip install "onnxruntime-gpu[cuda,cudnn]", or install CUDA and cuDNN for the whole system'
        return Check(name, False, f"onnxruntime {library.__version__} lacks a library of CUDA: {missing}", remedy)
    return Check(name, True, f"onnxruntime {library.__version__}; `spmdeploy verify --device cuda:0` proves it")


def check_openvino() -> list[Check]:
    """On the CPU; other devices that OpenVINO offers are listed, but not used: none has been tried."""
    name = "openvino on cpu"
    try:
        library = import_openvino()
    except UnavailableError as exc:
        return [Check(name, False, exc.problem, exc.hint)]
    feature, problem = bf16_support()
    core = library.Core()
    others = [device for device in core.available_devices if device != "CPU"]
    in_bf16 = f"bf16 by {feature}" if feature else f"fp32 only: {problem}"
    return [
        Check(name, True, f"openvino {short_version(library)}; {in_bf16}"),
        *(
            Check(f"openvino on {one}", False, f"{_full_name(core, one)}: not run yet, so not used", "use the CPU")
            for one in others
        ),
    ]


def _full_name(core: Any, device: str) -> str:
    name: str = core.get_property(device, "FULL_DEVICE_NAME")
    return name


def check_torch() -> Check:
    """Whether the reference can be run."""
    missing = _missing("torch", "onnx")
    if missing:
        return Check("torch", False, f"{missing} is not installed", 'pip install "spmdeploy[export]"')
    return Check("torch", True, f"torch {importlib.metadata.version('torch')}")


def _export() -> Check:
    missing = _missing("torch", "onnx", "safetensors", "onnxruntime")
    if missing:
        return Check("export", False, f"{missing} is not installed", 'pip install "spmdeploy[export,cpu]"')
    return Check("export", True, f"onnx {importlib.metadata.version('onnx')}")


def _mixed_packages() -> str:
    return " (mixed with onnxruntime-gpu)" if {"onnxruntime", "onnxruntime-gpu"} <= _installed() else ""


def _installed() -> set[str]:
    names = ("onnxruntime", "onnxruntime-gpu")
    return {name for name in names if any(importlib.metadata.distributions(name=name))}


def _missing(*modules: str) -> str:
    """The first of these modules that is not installed, or nothing; without importing any."""
    return next((name for name in modules if importlib.util.find_spec(name) is None), "")
