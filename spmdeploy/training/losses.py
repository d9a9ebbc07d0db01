"""The patch discriminator and the losses of the paper, each the mean over a batch, computed in float32."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from spmdeploy.model.layout import LayoutPyramid

WIDTHS = (1, 2, 4, 4, 4)
"""Widths of all layers but the last, in multiples of the discriminator's width."""
MAX_LAYERS = 6
"""Layers of the full-size stage's discriminator; each coarser stage has one less, so that outputs are 4 × 4."""


class Discriminator(nn.Module):
    """Scores patches of a composited image, given its labels under the mask.

    Spectrally normalized 5 × 5 convolutions without bias, stride 2, replicate padding 2, leaky_relu 0.2 after each one,
    the last included (the authors' `netD`).

    Args:
        classes: Label channels, without the edge channel.
        halvings: log2 of the full size over the stage's, 0 for the finest.
        width: Channels of the first layer.
    """

    def __init__(self, classes: int, halvings: int, width: int) -> None:
        super().__init__()
        channels = [classes + 3, *(multiple * width for multiple in WIDTHS[: MAX_LAYERS - halvings - 1]), 3]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 5, stride=2, padding=2, padding_mode="replicate", bias=False))
            for before, after in pairwise(channels)
        )

    def forward(self, image: Tensor, layout: LayoutPyramid) -> Tensor:
        """Scores float (N, 3, h, w) in [-1, 1] at the stage's size; returns (N, 3, 4, 4), higher = more real."""
        labels = layout.at(*image.shape[-2:])[:, :-2]  # without edges and mask
        x = torch.cat((labels, image), dim=1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return x


def reference_state(discriminator: Discriminator) -> dict[str, Tensor]:
    """The weights under the keys of the authors' `netD_1` etc., which use the older torch.nn.utils.spectral_norm."""
    names = {"original": "weight_orig", "0._u": "weight_u", "0._v": "weight_v"}
    state = {}
    for key, tensor in discriminator.state_dict().items():
        _, index, _, _, part = key.split(".", 4)
        state[f"dis_model.{index}.conv.{names[part]}"] = tensor
    return state


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Zero once every real score is above 1 and every fake one below -1."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """The negated mean score: lower when the discriminator takes the edit for real; without bound."""
    return -fake.float().mean()


def masked_l1(raw: Tensor, target: Tensor, mask: Tensor, inside: float) -> Tensor:
    """Mean absolute error in which pixels under the mask count more.

    The weights are normalized per sample, so that a batch may be split over processes.

    Args:
        raw: float (N, 3, h, w).
        target: float (N, 3, h, w).
        mask: float (N, 1, h, w), 1 = edit, 0 = keep.
        inside: Weight of a pixel under the mask; that of the others is 1.

    Returns:
        float32, a scalar in the unit of the images.
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
