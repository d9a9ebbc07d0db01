"""The losses of the recipe, each the mean over a batch, computed in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Zero once every real score is above 1 and every fake one below -1."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """The lower, the more real the discriminator finds the picture; without bound."""
    return -fake.float().mean()


def masked_l1(raw: Tensor, target: Tensor, mask: Tensor, inside: float) -> Tensor:
    """Mean absolute error in which a pixel under the mask counts `inside` times.

    raw, target: float (N, 3, h, w). mask: float (N, 1, h, w). The weights are normalized per sample, so that
    `inside` = 1 is the plain mean, and a batch may be split over processes.
    """
    weight = 1 + (inside - 1) * mask
    error = (raw.float() - target.float()).abs().mean(dim=1, keepdim=True)
    return ((error * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))).mean()


def choose_crops(mask: npt.NDArray[np.bool_], side: int, seeds: Sequence[int]) -> list[tuple[int, int]] | None:
    """Top left corners of squares that are centered on a random masked pixel and moved inside the image.

    Computed on the host, so that a GPU need not wait.

    Args:
        mask: bool (N, h, w).
        side: of the squares.
        seeds: one per sample.

    Returns:
        One corner per sample; None when `side` is 0 or the image is not larger.
    """
    height, width = mask.shape[-2:]
    if not side or (side >= height and side >= width):
        return None
    corners = []
    for masked, seed in zip(mask, seeds, strict=True):
        places = np.flatnonzero(masked)
        choice = int(np.random.default_rng(seed).integers(max(1, len(places))))
        y, x = divmod(int(places[choice]), width) if len(places) else (height // 2, width // 2)
        corners.append((min(max(0, y - side // 2), height - side), min(max(0, x - side // 2), width - side)))
    return corners


def cut_crops(image: Tensor, corners: Sequence[tuple[int, int]] | None, side: int) -> Tensor:
    """The squares at `corners` of (N, C, h, w): (N, C, side, side), or `image` itself when `corners` is None."""
    if corners is None:
        return image
    return torch.stack([sample[:, y : y + side, x : x + side] for sample, (y, x) in zip(image, corners, strict=True)])
