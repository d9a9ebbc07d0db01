"""Lists GPUs through the NVIDIA driver's own library, without any package and without a CUDA context.

Importing cuda.core takes a second, too long for a program that may turn out to have no GPU.
"""

from __future__ import annotations

import ctypes
import re
import sys
from ctypes import byref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute in cuda.h
_OUT_OF_MEMORY = 2
_CAPTURE_CODES = range(900, 910)  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED and the like
_KERNEL_MODULE_VERSION = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class GpuFacts:
    """One CUDA device, as the driver describes it."""

    name: str
    compute_capability: str
    """Major and minor number, as in 8.6."""
    cuda: str
    """The newest CUDA version that the driver supports, as in 12.8."""
    driver: str | None
    """Version of the driver; None where the kernel does not report it."""


def visible_gpus() -> int:
    """Return the number of CUDA devices that the driver shows this process.

    Raises:
        OSError: There is no driver or no GPU; the message says which.
    """
    return Driver().integer("cuDeviceGetCount")


def gpu_facts(index: int = 0) -> GpuFacts:
    """Describe one device. Raises OSError like `visible_gpus`."""
    driver = Driver()
    device = driver.integer("cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    driver.call("cuDeviceGetName", name, len(name), device)
    capability = [
        str(driver.integer("cuDeviceGetAttribute", attribute, device))
        for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
    ]
    number = driver.integer("cuDriverGetVersion")
    cuda = f"{number // 1000}.{number % 1000 // 10}"
    return GpuFacts(name.value.decode("utf-8", "replace"), ".".join(capability), cuda, _driver_version())


def gpu_uuid(index: int = 0) -> str:
    """Return the identifier of one GPU as nvidia-smi prints it: GPU-... Raises OSError like `visible_gpus`."""
    driver, uuid = Driver(), (ctypes.c_uint8 * 16)()
    driver.call("cuDeviceGetUuid", byref(uuid), driver.integer("cuDeviceGet", index))
    digits = bytes(uuid).hex()
    return "GPU-" + "-".join(digits[start:end] for start, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def _driver_version() -> str | None:
    try:
        return _KERNEL_MODULE_VERSION.read_text(encoding="ascii").strip()
    except OSError:
        return None


class CudaError(OSError):
    """A call that failed in the driver."""


class CudaMemoryError(CudaError):
    """There is not enough memory on the device, or not enough page-locked memory."""


class CudaCaptureError(CudaError):
    """The call cannot be part of a CUDA graph, or the capture was invalidated."""


class MissingFunctionError(CudaError):
    """The driver is too old to have the function."""


def cuda_error(call: str, text: str, code: int = 0, missing: str | None = None) -> CudaError:
    """Classify a failed call.

    Args:
        call: Function of the driver.
        text: What the driver or a package says, with the name of the error code where there is one.
        code: Number of the error; 0 where only the text is known.
        missing: The function that the driver's library does not have.
    """
    if missing is None and "CUDA_ERROR_NOT_FOUND" in text:  # what cuda.core makes of it
        missing = call
    if missing is not None:
        return MissingFunctionError(
            f"the NVIDIA driver has no function {missing}: it is older than the installed packages for CUDA"
        )
    message = f"the NVIDIA driver answered {call} with {text or f'error {code}'}"
    if code == _OUT_OF_MEMORY or re.search(r"out.of.memory", text, re.IGNORECASE):
        return CudaMemoryError(message)
    if code in _CAPTURE_CODES or re.search(r"stream.capture|been invalidated", text, re.IGNORECASE):
        return CudaCaptureError(message)
    return CudaError(message)


class Driver:
    """The driver's C library, initialized. Raises OSError where there is none."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as exc:
            raise OSError(f"no NVIDIA driver ({exc})") from exc
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver; Python integers are passed as C int, anything else as a ctypes object.

        Raises:
            CudaError: The driver returned an error.
        """
        try:
            found = getattr(self._library, function)
        except AttributeError as exc:
            raise cuda_error(function, "", missing=function) from exc
        code = found(*arguments)
        if code:
            raise cuda_error(function, "", code)

    def integer(self, function: str, *arguments: Any) -> int:
        """Return the C int that a function writes to its first parameter."""
        number = ctypes.c_int()
        self.call(function, byref(number), *arguments)
        return number.value
