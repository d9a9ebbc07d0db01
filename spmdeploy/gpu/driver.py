"""The NVIDIA driver, asked directly: what GPUs there are, before any library that needs one is loaded."""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref
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
    return Driver().integer("cuDeviceGetCount")


def gpu_facts(index: int = 0) -> GpuFacts:
    """Name and abilities of one device; makes no CUDA context. Raises OSError saying why there is no answer."""
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
    """The name of one piece of hardware, as nvidia-smi prints it: GPU-... Raises OSError like `gpu_facts`."""
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
    """A call that the driver refused. `code` is its number, 0 where a package passed on words only."""

    def __init__(self, call: str, code: int, words: str = "") -> None:
        super().__init__(f"the NVIDIA driver answered {call} with {words or f'error {code}'}")
        self.call, self.code = call, code


class Driver:
    """The driver's library by its C interface, initialized. Raises OSError where there is none."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as error:
            raise OSError(f"no NVIDIA driver ({error})") from error
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Python's numbers go as C's int; anything longer must come as a ctypes object. Raises CudaFailure."""
        code = getattr(self._library, function)(*arguments)
        if code:
            raise CudaError(function, code)

    def integer(self, function: str, *arguments: Any) -> int:
        """The C int that a function writes where its first parameter points."""
        number = ctypes.c_int()
        self.call(function, byref(number), *arguments)
        return number.value
