"""The NVIDIA driver, asked directly: what GPUs there are, before any library that needs one is loaded."""

from __future__ import annotations

import ctypes
import sys


def visible_gpus() -> int:
    """How many CUDA devices the driver shows this process. Raises OSError saying why there is no answer."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise OSError(f"no NVIDIA driver ({error})") from error
    count = ctypes.c_int()
    for call, code in (
        ("cuInit", driver.cuInit(0)),
        ("cuDeviceGetCount", driver.cuDeviceGetCount(ctypes.byref(count))),
    ):
        if code:
            raise OSError(f"the NVIDIA driver answered {call} with error {code}")
    return count.value
