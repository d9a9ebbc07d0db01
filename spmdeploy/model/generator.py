"""The three stages, coarse to fine (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.model.stage import STAGE_PLANS, Stage, StagePlan
from spmdeploy.types import MODULATIONS, STAGE_COUNTS, Modulation, StageCount

SIZE_MULTIPLE = 128
"""Height and width of the pictures are multiples of this: the coarsest stage halves a quarter of them five times, the
finest one the whole seven times."""


MAX_CHANNELS = 2048
"""Of a layer; the paper has 32 to 256. Wider generators than any GPU holds come from corrupt files."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that fixes the shapes of the generator's weights."""

    classes: int
    """Label channels, void included where the model knows it as a class."""
    width: int = 32
    """Channels of the first layer of each stage (the paper's ngf)."""
    hidden: int = 64
    """Channels inside the modulation."""
    modulation: Modulation = "spm"
    """What modulates the normalized features."""
    stages: StageCount = 3
    """How many sizes the picture is generated at, one after the other."""

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
        """How often the pictures of stage `index` are half the whole: 0 for the finest."""
        return self.stages - 1 - index


PRESETS = {
    "paper": {"width": 32, "hidden": 64},
    "small": {"width": 16, "hidden": 32},
}


class StagePictures(NamedTuple):
    """What a forward pass returns: pictures are float (N, 3, h, w) RGB in [-1, 1]."""

    raw: tuple[Tensor, ...]
    """Each stage's own output, at H/4, H/2 and H (a single one: at H), not composited."""
    edited: Tensor
    """The last stage's output under the mask, the given picture elsewhere, at H."""


class Generator(nn.Module):
    """The SPM progressive generator.

    Its convolutions are plain: the spectral normalization that training puts on the decoders is folded into the weights
    when they are saved or loaded (see `weights.py`), which gives the same numbers.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(
            Stage(plan, config.width, config.hidden, config.classes, config.modulation) for plan in config.plans
        )

    def forward(self, image: Tensor, layout: LayoutPyramid) -> StagePictures:
        """image: float (N, 3, H, W) RGB in [-1, 1], H and W multiples of 128."""
        raw: list[Tensor] = []
        for index in range(len(self.stages)):
            picture = self.stage_input(index, image, layout, raw[-1] if raw else None)
            raw.append(self.stages[index](picture, layout))
        return StagePictures(tuple(raw), composite(raw[-1], image, layout.mask))

    def stage_input(self, index: int, image: Tensor, layout: LayoutPyramid, coarser: Tensor | None) -> Tensor:
        """The picture that stage `index` starts from: known pixels, and under the mask the coarser stage's guess.

        image: float (N, 3, H, W). coarser: float, half this stage's size, or None for the first stage, where the mask
        is blacked out at full size before shrinking.
        """
        scale = 0.5 ** self.config.halvings(index)
        if coarser is None:
            return _resize(image * (1 - layout.mask), scale)
        known = _resize(image, scale)
        return composite(_resize(coarser, 2), known, layout.mask_at(*known.shape[-2:]))


def composite(generated: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`generated` where the mask is 1, `image` where it is 0."""
    return mask * generated + (1 - mask) * image


def _resize(picture: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return picture
    return F.interpolate(picture, scale_factor=scale, mode="bilinear", align_corners=False)
