"""Style loss per class: feature statistics of a class's edited pixels against those of its known pixels.

Gatys et al., "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016, restricted to one class of one
image at a time. It needs no aligned ground truth: what a building looks like is read off the building next to the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

MIN_PIXELS = 256
"""A class with fewer edited or fewer known pixels in a crop has no statistics to compare (16x16 of 256x256)."""


@dataclass(frozen=True)
class StylePairs:
    """The (sample, class) pairs of a batch that have enough edited and enough known pixels. Chosen on the host."""

    samples: npt.NDArray[np.intp]
    """Index of the sample, per pair."""
    classes: npt.NDArray[np.intp]
    """Class id, per pair."""
    weights: npt.NDArray[np.float32]
    """Share of the edited pixels, 1 in sum."""
    skipped: int
    """Pairs with enough edited pixels whose class has too few known ones."""

    def __len__(self) -> int:
        return len(self.samples)


def find_style_pairs(labels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], classes: int) -> StylePairs:
    """Which classes of which samples the style loss compares.

    Args:
        labels: uint8 (N, H, W); ids from `classes` on belong to no class.
        mask: bool (N, H, W), True = edit.
        classes: number of classes.
    """
    edited = np.zeros((len(labels), classes), np.int64)
    known = np.zeros_like(edited)
    for index, (ids, inside) in enumerate(zip(labels, mask, strict=True)):
        edited[index] = np.bincount(ids[inside], minlength=256)[:classes]
        known[index] = np.bincount(ids[~inside], minlength=256)[:classes]
    needed = edited >= MIN_PIXELS
    usable = needed & (known >= MIN_PIXELS)
    samples, found = usable.nonzero()
    weights = edited[samples, found] / max(1, edited[samples, found].sum())
    return StylePairs(samples, found, weights.astype(np.float32), int(needed.sum() - usable.sum()))


def class_style_loss(
    fake: Sequence[Tensor], real: Sequence[Tensor], one_hot: Tensor, mask: Tensor, pairs: StylePairs
) -> Tensor:
    """Distance of mean and covariance of the features, averaged over the scales; 0 without pairs.

    Args:
        fake: features of the edited image, float (N, C, h, w) per scale.
        real: features of the photo, likewise.
        one_hot: float (N, classes, H, W).
        mask: float (N, 1, H, W), 1 = edit.
        pairs: what to compare.
    """
    if not len(pairs):
        return fake[0].new_zeros((), dtype=torch.float32)
    device = mask.device
    samples = torch.from_numpy(pairs.samples).to(device, non_blocking=True)
    classes = torch.from_numpy(pairs.classes).to(device, non_blocking=True)
    weights = torch.from_numpy(pairs.weights).to(device, non_blocking=True)
    region, inside = one_hot[samples, classes][:, None], mask[samples]
    losses = []
    for ours, theirs in zip(fake, real, strict=True):
        size = (ours.shape[-2], ours.shape[-1])
        edited = F.adaptive_avg_pool2d(region * inside, size)
        known = F.adaptive_avg_pool2d(region * (1 - inside), size)
        theirs = theirs.float()
        mean, deviation = theirs.mean(dim=(2, 3), keepdim=True), theirs.std(dim=(2, 3), keepdim=True).clamp_min(1e-3)
        our_mean, our_covariance = _moments(((ours.float() - mean) / deviation)[samples], edited)
        with torch.no_grad():
            their_mean, their_covariance = _moments(((theirs - mean) / deviation)[samples], known)
        distance = (our_mean - their_mean).abs().mean(dim=1)
        distance = distance + (our_covariance - their_covariance).abs().mean(dim=(1, 2))
        # The augmentation may have moved all of a region out of the image.
        present = (edited.sum(dim=(1, 2, 3)) > 0) & (known.sum(dim=(1, 2, 3)) > 0)
        losses.append((distance * weights * present).sum())
    return torch.stack(losses).mean()


def _moments(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean (P, C) and covariance (P, C, C) of features (P, C, h, w); weight: (P, 1, h, w)."""
    x, w = features.flatten(2), weight.flatten(2)
    w = w / w.sum(dim=2, keepdim=True).clamp_min(1e-6)
    mean = (x * w).sum(dim=2, keepdim=True)
    centered = (x - mean) * w.sqrt()
    return mean[:, :, 0], centered @ centered.transpose(1, 2)
