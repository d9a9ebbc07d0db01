"""The contract with everything outside PyTorch: bytes in, bytes out.

Whatever lies between a decoded picture and an edited one happens inside these modules, so that no caller re-implements
the conditioning: the exporter writes them to ONNX, and the torch session runs them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.model.generator import Generator
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.types import NATIVE_SIZE

COARSE_SIZE = NATIVE_SIZE // 2
"""Height and width of the coarser picture that the `refine` graph carries up."""

COLOR_BLOCK = 8
"""Side of the blocks whose mean colors are transferred from the coarse result. As measured (docs/large-images.md), 4
costs sharpness, and larger ones leave more of the brightness steps between tiles."""

EDIT_INPUTS = ("image", "labels", "instances", "mask")
REFINE_INPUTS = (*EDIT_INPUTS, "coarse")
OUTPUTS = ("edited", "unrounded")


class EditGraph(nn.Module):
    """One whole edit.

    image: uint8 (B, H, W, 3) RGB. labels: uint8 (B, H, W). instances: int32 (B, H, W), read for the edge channel only.
    mask: uint8 (B, H, W), 0 = keep, else edit. Returns the edit twice, both equal to `image` wherever the mask is 0:
    edited: uint8 (B, H, W, 3) RGB, and unrounded: float32 (B, H, W, 3) RGB in 0..255, the same before it was rounded,
    for whoever computes on.

    TensorRT takes uint8 inputs only into a cast, and before 10.6 only to floating point, so every such input is cast to
    float32 before anything else is done with it.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, image: Tensor, labels: Tensor, instances: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        given = _GraphInputs(image, labels, instances, mask, self.generator.config.classes)
        return given.edited_to(self.generator(given.picture, given.layout).raw[-1])


class RefineGraph(nn.Module):
    """The last stage alone: carries a result up to twice its size.

    Inputs of `EditGraph`, and coarse: float32 (B, H/2, W/2, 3) RGB in 0..255, the result at half size. Of `image` only
    what lies outside the mask is read, of `coarse` what lies under it and one pixel around. Returns edited, as
    `EditGraph` does and equal to its own if fed with the raw picture of the stage before the last; and unrounded, for
    the next doubling: float32 (B, H, W, 3) RGB in 0..255, with the low-frequency
    colors of `coarse` (`_transfer_low_frequencies`).

    coarse is float32 and not uint8, because a cascade of levels would otherwise round once a level, and where a tile is
    flat the instance norms enlarge the steps; at half size it has the bytes of `image`.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        assert len(generator.stages) > 1, "a single stage has nothing to refine"
        self.generator = generator

    def forward(
        self, image: Tensor, labels: Tensor, instances: Tensor, mask: Tensor, coarse: Tensor
    ) -> tuple[Tensor, Tensor]:
        given = _GraphInputs(image, labels, instances, mask, self.generator.config.classes)
        last = len(self.generator.stages) - 1
        start = self.generator.stage_input(last, given.picture, given.layout, _to_picture(coarse))
        edited, plain = given.edited_to(self.generator.stages[last](start, given.layout))
        return edited, _transfer_low_frequencies(coarse, plain, given.layout.mask)


class _GraphInputs:
    """The inputs that both graphs share, as the generator wants them, and the way back."""

    def __init__(self, image: Tensor, labels: Tensor, instances: Tensor, mask: Tensor, classes: int) -> None:
        self._pixels = image.to(torch.float32)
        self._edit = mask.to(torch.float32) != 0
        self.picture = _to_picture(self._pixels)
        self.layout = LayoutPyramid(
            labels.to(torch.float32).to(torch.int32), instances, self._edit.unsqueeze(1).to(torch.float32), classes
        )

    def edited_to(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of the graph, from a picture of the generator: float (B, 3, H, W) in [-1, 1]."""
        levels = torch.clamp((generated.permute(0, 2, 3, 1) + 1) * 127.5, 0, 255)
        unrounded = torch.where(self._edit.unsqueeze(3), levels, self._pixels)
        return torch.round(unrounded).to(torch.uint8), unrounded


def _transfer_low_frequencies(coarse: Tensor, refined: Tensor, mask: Tensor) -> Tensor:
    """`refined` with the mean colors of `coarse` under the mask, by blocks that pass over into each other.

    Instance norms go by what they see: of two tiles that share a sky, the one with less street in it grays that sky.
    `coarse` is one picture for both.

    coarse: float (B, H/2, W/2, 3), refined: float (B, H, W, 3), both in 0..255. mask: float (B, 1, H, W).
    """
    doubled = F.interpolate(coarse.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False)
    refined = refined.permute(0, 3, 1, 2)
    missing = _spread_by_blocks((doubled - refined) * mask) / _spread_by_blocks(mask).clamp(min=1e-3)
    return (refined + missing * mask).clamp(0, 255).permute(0, 2, 3, 1)


def _spread_by_blocks(x: Tensor) -> Tensor:
    """float (B, C, H, W): the means of blocks, interpolated."""
    return F.interpolate(F.avg_pool2d(x, COLOR_BLOCK), scale_factor=COLOR_BLOCK, mode="bilinear", align_corners=False)


def _to_picture(levels: Tensor) -> Tensor:
    """float (B, H, W, 3) in 0..255 to float (B, 3, H, W) in [-1, 1]."""
    return levels.permute(0, 3, 1, 2) / 127.5 - 1
