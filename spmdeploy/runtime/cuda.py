"""The NVIDIA driver, asked directly: what GPUs there are, before any library that needs one is loaded."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute in cuda.h
_KERNEL_MODULE_VERSION = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class GpuFacts:
    """One CUDA device, as the driver describes it."""

    name: str
    compute_capability: str
    """Major and minor number, as in 8.6."""
    cuda: str
    """The newest CUDA that the driver supports, as in 12.8."""
    driver: str | None
    """Version of the driver; None where the kernel does not tell."""


def visible_gpus() -> int:
    """How many CUDA devices the driver shows this process. Raises OSError saying why there is no answer."""
    driver, count = _driver(), ctypes.c_int()
    _check("cuDeviceGetCount", driver.cuDeviceGetCount(ctypes.byref(count)))
    return count.value


def gpu_facts(index: int = 0) -> GpuFacts:
    """Name and abilities of one device; makes no CUDA context. Raises OSError saying why there is no answer."""
    driver, device, number = _driver(), ctypes.c_int(), ctypes.c_int()
    _check("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), index))
    name = ctypes.create_string_buffer(256)
    _check("cuDeviceGetName", driver.cuDeviceGetName(name, len(name), device))
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        _check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
        capability.append(str(number.value))
    _check("cuDriverGetVersion", driver.cuDriverGetVersion(ctypes.byref(number)))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return GpuFacts(name.value.decode("utf-8", "replace"), ".".join(capability), cuda, _driver_version())


def _driver_version() -> str | None:
    try:
        return _KERNEL_MODULE_VERSION.read_text(encoding="ascii").strip()
    except OSError:
        return None


def _driver() -> Any:
    """The driver's library, initialised."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise OSError(f"no NVIDIA driver ({error})") from error
    _check("cuInit", driver.cuInit(0))
    return driver


def _check(call: str, code: int) -> None:
    if code:
        raise OSError(f"the NVIDIA driver answered {call} with error {code}")
