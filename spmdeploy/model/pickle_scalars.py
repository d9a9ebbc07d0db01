"""Lets torch's restricted unpickler read numpy scalars, without admitting any constructor of numpy itself.

Training scripts store numpy scalars next to weights (a best loss, an epoch). Their pickles name
`numpy._core.multiarray.scalar` and `numpy.dtype`; both are replaced here by functions that rebuild plain numbers only.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | {
    f"{kind}{size}": letter if kind == "i" else letter.upper()
    for kind in "iu"
    for size, letter in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))
}
"""Codes of numpy's types -> those of the struct module."""


class ScalarType:
    """Stands for numpy.dtype in a pickle: the type of a number, little-endian unless its state says otherwise."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if code not in _FORMATS:
            raise pickle.UnpicklingError(f"a numpy type {code!r}")
        self.format = _FORMATS[code]
        self.byte_order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = ">" if state[1] == ">" else "<"


def make_scalar(kind: ScalarType, content: bytes) -> float | int | bool:
    """Stands for numpy's constructor of scalars: the number as a Python number."""
    (number,) = struct.unpack(kind.byte_order + kind.format, content)
    return number  # type: ignore[no-any-return]


def encode_latin1(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, with which pickles of protocol 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as text in {encoding!r}")
    return text.encode("latin1")


ALLOWED_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    ScalarType,
    (ScalarType, "numpy.dtype"),
    (make_scalar, "numpy._core.multiarray.scalar"),
    (make_scalar, "numpy.core.multiarray.scalar"),
    (encode_latin1, "_codecs.encode"),
]
"""For torch.serialization.safe_globals."""
