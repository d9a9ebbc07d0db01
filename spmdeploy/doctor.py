"""What this machine can run, and if not, why not and what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from typing import Any

from spmdeploy.errors import UnavailableError
from spmdeploy.runtime.cuda import visible_gpus
from spmdeploy.runtime.ort import import_onnxruntime


@dataclass(frozen=True)
class Finding:
    """One capability of this machine."""

    name: str
    usable: bool
    reason: str
    remedy: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "usable": self.usable, "reason": self.reason, "remedy": self.remedy}


def examine() -> list[Finding]:
    """Every capability, in the order of preference at run time, then what is needed to export."""
    return [_gpu(), _onnxruntime_cuda(), _onnxruntime_cpu(), _torch(), _export()]


def machine() -> dict[str, Any]:
    """Facts about this machine that a bug report needs."""
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _gpu() -> Finding:
    try:
        count = visible_gpus()
    except OSError as error:
        return Finding("NVIDIA GPU", False, str(error), "install NVIDIA's driver, or edit on the CPU")
    if not count:
        return Finding("NVIDIA GPU", False, "the driver shows no GPU", "check CUDA_VISIBLE_DEVICES and nvidia-smi")
    return Finding("NVIDIA GPU", True, f"{count} visible")


def _onnxruntime_cpu() -> Finding:
    name = "onnxruntime on cpu"
    try:
        library = import_onnxruntime()
    except UnavailableError as error:
        return Finding(name, False, error.problem, error.hint)
    return Finding(name, True, f"onnxruntime {library.__version__}{_mixed_packages()}")


def _onnxruntime_cuda() -> Finding:
    name = "onnxruntime on cuda"
    both = {"onnxruntime", "onnxruntime-gpu"} & _installed()
    if len(both) == 2:
        return Finding(
            name,
            False,
            "onnxruntime and onnxruntime-gpu are both installed and have overwritten each other's files",
            'pip uninstall onnxruntime onnxruntime-gpu, then pip install "spmdeploy[gpu]"',
        )
    try:
        library = import_onnxruntime()
    except UnavailableError as error:
        return Finding(name, False, error.problem, 'pip install "spmdeploy[gpu]"')
    if "CUDAExecutionProvider" not in library.get_available_providers():
        reason = f"the installed onnxruntime {library.__version__} is built without CUDA"
        return Finding(name, False, reason, 'pip uninstall onnxruntime, then pip install "spmdeploy[gpu]"')
    gpu = _gpu()
    if not gpu.usable:
        return Finding(name, False, gpu.reason, gpu.remedy)
    return Finding(name, True, f"onnxruntime {library.__version__}; `spmdeploy verify --device cuda:0` proves it")


def _torch() -> Finding:
    missing = _missing("torch", "onnx")
    if missing:
        return Finding("torch", False, f"{missing} is not installed", 'pip install "spmdeploy[export]"')
    return Finding("torch", True, f"torch {importlib.metadata.version('torch')}")


def _export() -> Finding:
    missing = _missing("torch", "onnx", "onnxscript", "safetensors", "onnxruntime")
    if missing:
        return Finding("export", False, f"{missing} is not installed", 'pip install "spmdeploy[export,cpu]"')
    return Finding("export", True, f"onnx {importlib.metadata.version('onnx')}")


def _mixed_packages() -> str:
    return " (mixed with onnxruntime-gpu)" if {"onnxruntime", "onnxruntime-gpu"} <= _installed() else ""


def _installed() -> set[str]:
    names = ("onnxruntime", "onnxruntime-gpu")
    return {name for name in names if any(importlib.metadata.distributions(name=name))}


def _missing(*modules: str) -> str:
    """The first of these modules that is not installed, or nothing; without importing any."""
    return next((name for name in modules if importlib.util.find_spec(name) is None), "")
