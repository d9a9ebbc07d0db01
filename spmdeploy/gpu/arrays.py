"""Arrays of other libraries on a GPU: by `__cuda_array_interface__` or by address."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from spmdeploy.errors import InputError

ALIGNMENT = 256
"""TensorRT requires that every address is a multiple of this."""

_HINT = "give a C-contiguous array on the GPU: a torch or CuPy array, or DeviceArray(address, shape, dtype)"


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array in device memory. Its owner keeps the memory alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    """As numpy names it: uint8, int32, float32."""
    read_only: bool = False
    stream: int | None = None
    """The stream with work that still writes to it; None: there is none."""

    @property
    def bytes_per_item(self) -> int:
        """Bytes of one item of the batch, the first axis."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize


def as_device_array(value: Any, name: str) -> DeviceArray:
    """Return a DeviceArray as it is, anything else as its `__cuda_array_interface__` describes it.

    PyTorch's and CuPy's arrays have that attribute.

    Raises:
        InputError: The value, called `name`, is not a contiguous array on a GPU.
    """
    if isinstance(value, DeviceArray):
        return value
    try:
        interface = value.__cuda_array_interface__
        address, read_only = interface["data"]
        shape = tuple(int(length) for length in interface["shape"])
        dtype = np.dtype(interface["typestr"])
    except Exception as exc:  # another library's attribute: PyTorch alone raises three kinds of errors
        raise InputError(f"{name} is not an array on a GPU: {type(exc).__name__}: {exc}", _HINT) from exc
    strides = interface.get("strides")
    if interface.get("mask") is not None or (strides is not None and not _contiguous(shape, strides, dtype.itemsize)):
        raise InputError(f"{name} is masked or not C-contiguous: shape {shape}, strides {strides}", _HINT)
    return DeviceArray(int(address or 0), shape, dtype.name, bool(read_only), interface.get("stream"))


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != size:
            return False
        size *= length
    return True
