"""One stage of the progressive generator: a U-Net of style-preserved modulations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.model.modulation import StylePreservedModulation
from spmdeploy.types import Modulation


@dataclass(frozen=True)
class StagePlan:
    """The widths of a stage's layers, in multiples of the generator's width.

    encoder: layers 1..n. All halve the resolution but the first and the last.
    decoder: layers n-1..2. Each doubles the resolution; layer k reads encoder layer k-1 as its skip, layer 2 none.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.decoder) == len(self.encoder) - 2, self


STAGE_PLANS = (
    StagePlan(encoder=(1, 2, 4, 4, 8, 8, 16), decoder=(8, 4, 2, 1, 1)),
    StagePlan(encoder=(1, 2, 4, 4, 8, 8, 16, 16), decoder=(16, 8, 4, 2, 1, 1)),
    StagePlan(encoder=(1, 2, 4, 4, 8, 8, 16, 16, 32), decoder=(16, 8, 8, 4, 2, 1, 1)),
)


class Stage(nn.Module):
    """A U-Net from a composited picture at one size to a generated picture of the same size."""

    def __init__(self, plan: StagePlan, width: int, hidden: int, classes: int, modulation: Modulation = "spm") -> None:
        super().__init__()
        layer = partial(StylePreservedModulation, layout_channels=classes + 2, hidden=hidden, modulation=modulation)
        encoder, decoder = [], []

        in_channels = 3
        for index, multiple in enumerate(plan.encoder):
            stride = _encoder_stride(index, len(plan.encoder))
            encoder.append(layer(in_channels, multiple * width, stride=stride))
            in_channels = multiple * width

        for index, multiple in enumerate(plan.decoder):
            skip = _skip_index(index, len(plan.decoder))
            skip_channels = 0 if skip is None else plan.encoder[skip] * width
            decoder.append(layer(in_channels + skip_channels, multiple * width))
            in_channels = multiple * width

        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(decoder)
        self.to_rgb = nn.Conv2d(in_channels, 3, kernel_size=3, bias=False)

    def forward(self, picture: Tensor, layout: LayoutPyramid) -> Tensor:
        """picture: float (N, 3, h, w) RGB in [-1, 1], known pixels and the coarser stage's guess under the mask.

        Returns the raw, uncomposited picture: float (N, 3, h, w) in [-1, 1].
        """
        skips = []
        x = picture
        for index, layer in enumerate(self.encoder):
            stride = _encoder_stride(index, len(self.encoder))
            x = layer(x, layout.at(x.shape[-2] // stride, x.shape[-1] // stride))
            skips.append(x)

        for index, layer in enumerate(self.decoder):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            skip = _skip_index(index, len(self.decoder))
            if skip is not None:
                x = torch.cat((x, skips[skip]), dim=1)
            x = layer(x, layout.at(*x.shape[-2:]))

        return torch.tanh(self.to_rgb(F.pad(x, (1, 1, 1, 1), mode="replicate")))


def _encoder_stride(index: int, layers: int) -> int:
    """The first and the last layer of the encoder keep the resolution, the others halve it."""
    return 1 if index in (0, layers - 1) else 2


def _skip_index(index: int, layers: int) -> int | None:
    """Position in the encoder of the skip that decoder layer `index` of `layers` reads; None for the last one."""
    return None if index == layers - 1 else layers - 1 - index
