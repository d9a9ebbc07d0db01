"""The losses of the recipe, each the mean over a batch, computed in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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


def crop_around_mask(pictures: tuple[Tensor, ...], mask: Tensor, side: int, seeds: Sequence[int]) -> tuple[Tensor, ...]:
    """The same square of each picture per sample, centerd on a random masked pixel and moved inside the picture.

    pictures: (N, C, h, w) each. mask: (N, 1, h, w). seeds: one per sample. Returns (N, C, side, side) each; as given
    when `side` is 0 or the picture is not larger.
    """
    height, width = mask.shape[-2:]
    if not side or (side >= height and side >= width):
        return pictures
    cut: list[list[Tensor]] = [[] for _ in pictures]
    for index, seed in enumerate(seeds):
        places = mask[index, 0].nonzero()
        choice = int(np.random.default_rng(seed).integers(max(1, len(places))))
        y, x = places[choice].tolist() if len(places) else (height // 2, width // 2)
        top, left = min(max(0, y - side // 2), height - side), min(max(0, x - side // 2), width - side)
        for picture, parts in zip(pictures, cut, strict=True):
            parts.append(picture[index, :, top : top + side, left : left + side])
    return tuple(torch.stack(parts) for parts in cut)
