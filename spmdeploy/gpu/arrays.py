"""Arrays that lie on a GPU already, from whatever library: by `__cuda_array_interface__` or as a bare pointer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from spmdeploy.errors import InputError

ALIGNMENT = 256
"""What TensorRT wants of every address."""

_LIKE_THIS = "give a C-contiguous array on the GPU: a torch or CuPy array, or DeviceArray(address, shape, dtype)"


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array by its address in device memory. Whoever makes it keeps the memory alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    """As numpy names it: uint8, int32, float32."""
    read_only: bool = False
    stream: int | None = None
    """The stream that still works on it; None where nobody does."""

    @property
    def bytes_per_item(self) -> int:
        """Of one edit, the first axis being the batch."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize


def as_device_array(value: Any, name: str) -> DeviceArray:
    """`value` if it is a DeviceArray, else what its `__cuda_array_interface__` says. Raises InputError with `name`."""
    if isinstance(value, DeviceArray):
        return value
    try:
        interface = value.__cuda_array_interface__
        address, read_only = interface["data"]
        shape = tuple(int(length) for length in interface["shape"])
        dtype = np.dtype(interface["typestr"])
    except Exception as error:  # an attribute of somebody else's: PyTorch alone raises three kinds of errors
        raise InputError(f"{name} is no array on a GPU: {type(error).__name__}: {error}", _LIKE_THIS) from error
    strides = interface.get("strides")
    if interface.get("mask") is not None or (strides is not None and not _contiguous(shape, strides, dtype.itemsize)):
        raise InputError(f"{name} is masked or not C-contiguous: shape {shape}, strides {strides}", _LIKE_THIS)
    return DeviceArray(int(address or 0), shape, dtype.name, bool(read_only), interface.get("stream"))


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != size:
            return False
        size *= length
    return True
