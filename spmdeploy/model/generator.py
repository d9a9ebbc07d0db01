"""The SPM generator: three stages, coarse to fine (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.model.modulation import StylePreservedModulation
from spmdeploy.types import MODULATIONS, STAGE_COUNTS, Modulation, StageCount

SIZE_MULTIPLE = 128
"""Height and width of images are multiples of this: the coarsest stage halves a quarter of them five times, the finest
stage the whole seven times."""


MAX_CHANNELS = 2048
"""Of a layer; the paper has 32 to 256. Wider generators than any GPU holds come from corrupt files."""


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


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that fixes the shapes of the generator's weights."""

    classes: int
    """Label channels, void included where it is a class of the model."""
    width: int = 32
    """Channels of the first layer of each stage (the paper's ngf)."""
    hidden: int = 64
    """Channels inside the modulation."""
    modulation: Modulation = "spm"
    """What modulates the normalized features."""
    stages: StageCount = 3
    """The number of sizes at which the image is generated, one after the other."""

    def __post_init__(self) -> None:
        for name in ("classes", "width", "hidden", "stages"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
            if value > MAX_CHANNELS:
                raise ValueError(f"{name} must be at most {MAX_CHANNELS}, not {value}")
        if self.classes > 255:
            raise ValueError(f"classes must be at most 255 (label maps are 8-bit), not {self.classes}")
        if self.modulation not in MODULATIONS:
            raise ValueError(f"modulation must be {' or '.join(MODULATIONS)}, not {self.modulation!r}")
        if self.stages not in STAGE_COUNTS:
            raise ValueError(f"stages must be {' or '.join(map(str, STAGE_COUNTS))}, not {self.stages}")

    @property
    def plans(self) -> tuple[StagePlan, ...]:
        """The stages, coarse to fine; the last one works at full size in any case."""
        return STAGE_PLANS[-self.stages :]

    def halvings(self, index: int) -> int:
        """log2 of the full size over that of stage `index`: 0 for the finest."""
        return self.stages - 1 - index


PRESETS = {
    "paper": {"width": 32, "hidden": 64},
    "small": {"width": 16, "hidden": 32},
}


class StageOutputs(NamedTuple):
    """The result of a forward pass; images are float (N, 3, h, w), RGB in [-1, 1]."""

    raw: tuple[Tensor, ...]
    """Each stage's own output, at H/4, H/2 and H (a single one: at H), not composited."""
    edited: Tensor
    """The last stage's output under the mask, the given image elsewhere, at H."""


class Stage(nn.Module):
    """A U-Net of style-preserved modulations, from a composited image to a generated one of the same size."""

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

    def forward(self, image: Tensor, layout: LayoutPyramid) -> Tensor:
        """Generates an image.

        Args:
            image: float (N, 3, h, w), RGB in [-1, 1], known pixels and the output of the coarser stage under the mask.
            layout: Labels, edges and mask.

        Returns:
            float (N, 3, h, w) in [-1, 1], not composited.
        """
        skips = []
        x = image
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


class Generator(nn.Module):
    """The SPM progressive generator.

    Its convolutions are plain: the spectral normalization that training puts on the decoders is folded into the weights
    when they are saved or loaded (see `checkpoint.py`), which gives the same numbers.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(
            Stage(plan, config.width, config.hidden, config.classes, config.modulation) for plan in config.plans
        )

    def forward(self, image: Tensor, layout: LayoutPyramid) -> StageOutputs:
        """Edits image, float (N, 3, H, W), RGB in [-1, 1], H and W multiples of 128."""
        raw: list[Tensor] = []
        for index in range(len(self.stages)):
            stage_input = self.stage_input(index, image, layout, raw[-1] if raw else None)
            raw.append(self.stages[index](stage_input, layout))
        return StageOutputs(tuple(raw), composite(raw[-1], image, layout.mask))

    def stage_input(self, index: int, image: Tensor, layout: LayoutPyramid, coarser: Tensor | None) -> Tensor:
        """The input of a stage: known pixels, and under the mask the output of the coarser stage.

        Args:
            index: Of the stage, from 0.
            image: float (N, 3, H, W) in [-1, 1], at full size.
            layout: Of the image; its mask is read.
            coarser: float (N, 3, h / 2, w / 2), half this stage's size; None for the first stage, where the mask is
                blacked out at full size before shrinking.

        Returns:
            float (N, 3, h, w), at this stage's size.
        """
        scale = 0.5 ** self.config.halvings(index)
        if coarser is None:
            return _resize(image * (1 - layout.mask), scale)
        known = _resize(image, scale)
        return composite(_resize(coarser, 2), known, layout.mask_at(*known.shape[-2:]))


def composite(generated: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`generated` where the mask is 1, `image` where it is 0."""
    return mask * generated + (1 - mask) * image


def _resize(image: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return image
    return F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)


def _encoder_stride(index: int, layers: int) -> int:
    """The first and the last layer of the encoder keep the resolution, the others halve it."""
    return 1 if index in (0, layers - 1) else 2


def _skip_index(index: int, layers: int) -> int | None:
    """Position in the encoder of the skip that decoder layer `index` of `layers` reads; None for the last one."""
    return None if index == layers - 1 else layers - 1 - index
