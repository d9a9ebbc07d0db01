"""Baselines without a model: Telea inpainting and class-mean colors, with the interface of a backend."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

import numpy as np
import numpy.typing as npt

from spmdeploy.errors import UnavailableError
from spmdeploy.types import ModelInput

Pixels = npt.NDArray[np.uint8]

TELEA_RADIUS = 3
"""Neighborhood in pixels that each inpainted point is made of; that of OpenCV's own examples."""


class Telea:
    """OpenCV's inpainting (Telea 2004), which does not use labels."""

    def __init__(self) -> None:
        self._cv2 = _import_cv2()

    def run(self, inputs: ModelInput) -> Pixels:
        """Edits a batch: uint8 (B, H, W, 3) RGB."""
        image, _, _, mask = inputs
        filled = [
            self._cv2.inpaint(np.ascontiguousarray(photo), inside, TELEA_RADIUS, self._cv2.INPAINT_TELEA)
            for photo, inside in zip(image, np.where(mask > 0, np.uint8(255), np.uint8(0)), strict=True)
        ]
        return np.where(mask[..., None] > 0, np.stack(filled), image)


class ClassMeanColor:
    """Each class in one color: its mean over the known pixels of the image, else over the training images."""

    def __init__(self, colors: npt.NDArray[np.float64]) -> None:
        """colors: (K, 3), mean color of each class over the training images."""
        self._colors = colors

    def run(self, inputs: ModelInput) -> Pixels:
        """Edits a batch: uint8 (B, H, W, 3) RGB."""
        image, labels, _, mask = inputs
        return np.stack([self._fill(*parts) for parts in zip(image, labels, mask > 0, strict=True)])

    def _fill(self, image: Pixels, labels: Pixels, mask: npt.NDArray[np.bool_]) -> Pixels:
        colors = self._colors.copy()
        for class_id in np.unique(labels[mask]):
            known = (labels == class_id) & ~mask
            if known.any() and class_id < len(colors):
                colors[class_id] = image[known].mean(axis=0)
        painted = np.rint(colors[np.minimum(labels, len(colors) - 1)]).astype(np.uint8)
        return np.where(mask[..., None], painted, image)


def mean_colors(images: Iterable[tuple[Pixels, Pixels]], classes: int) -> npt.NDArray[np.float64]:
    """(K, 3) mean color of each class over pairs of image (H, W, 3) and labels (H, W); gray where there is none."""
    sums, counts = np.zeros((classes, 3)), np.zeros(classes)
    for image, labels in images:
        inside = labels < classes
        ids = labels[inside]
        counts += np.bincount(ids, minlength=classes)
        for channel in range(3):
            sums[:, channel] += np.bincount(ids, weights=image[inside][:, channel], minlength=classes)
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], 127.5)


def _import_cv2() -> ModuleType:
    try:
        return importlib.import_module("cv2")
    except ImportError as exc:
        raise UnavailableError(
            "the Telea baseline needs OpenCV, which is not installed", "pip install opencv-python-headless"
        ) from exc
