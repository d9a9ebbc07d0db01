"""The discriminator of a stage: one class, a depth for each size."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from spmdeploy.model.layout import LayoutPyramid

WIDTHS = (1, 2, 4, 4, 4)
"""Widths of all layers but the last, in multiples of the discriminator's width."""
DEEPEST = 6
"""Layers of the full-size stage's discriminator; each coarser stage has one less, so that every output is 4 × 4."""


class Discriminator(nn.Module):
    """Judges a composited picture with its labels under the mask.

    Spectrally normalized 5 × 5 convolutions without bias, stride 2, replicate padding 2, leaky_relu 0.2 after each one,
    the last included. classes: label channels, without the edge channel. halvings: how often the stage's pictures are
    half the whole, 0 for the finest.
    """

    def __init__(self, classes: int, halvings: int, width: int) -> None:
        super().__init__()
        channels = [classes + 3, *(multiple * width for multiple in WIDTHS[: DEEPEST - halvings - 1]), 3]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 5, stride=2, padding=2, padding_mode="replicate", bias=False))
            for before, after in pairwise(channels)
        )

    def forward(self, picture: Tensor, layout: LayoutPyramid) -> Tensor:
        """picture: float (N, 3, h, w) in [-1, 1], the stage's size. Returns (N, 3, 4, 4), higher = more real."""
        labels = layout.at(*picture.shape[-2:])[:, :-2]  # without edges and mask
        x = torch.cat((labels, picture), dim=1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return x


def reference_state(discriminator: Discriminator) -> dict[str, Tensor]:
    """The weights under the keys of the authors' `netD_1` and so on, which use torch's older spectral_norm."""
    names = {"original": "weight_orig", "0._u": "weight_u", "0._v": "weight_v"}
    state = {}
    for key, tensor in discriminator.state_dict().items():
        _, index, _, _, part = key.split(".", 4)
        state[f"dis_model.{index}.conv.{names[part]}"] = tensor
    return state
