"""The contract with everything outside PyTorch: bytes in, bytes out.

Whatever lies between a decoded picture and an edited one happens inside these modules, so that no caller re-implements
the conditioning: the exporter writes them to ONNX, and the torch session runs them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spmdeploy.networks.conditioning import LayoutPyramid
from spmdeploy.networks.generator import Generator

NATIVE_SIZE = 256
"""Height and width of the exported graphs: the size that the paper trains and edits at."""

EDIT_INPUTS = ("image", "labels", "instances", "mask")
EDIT_OUTPUT = "edited"


class EditGraph(nn.Module):
    """One whole edit.

    image: uint8 (B, H, W, 3) RGB. labels: uint8 (B, H, W). instances: int32 (B, H, W), read for the edge channel only.
    mask: uint8 (B, H, W), 0 = keep, else edit. Returns uint8 (B, H, W, 3) RGB, equal to `image` bit for bit wherever
    the mask is 0.

    TensorRT takes uint8 inputs only into a cast, so every input is cast before anything else is done with it.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, image: Tensor, labels: Tensor, instances: Tensor, mask: Tensor) -> Tensor:
        pixels = image.to(torch.float32).permute(0, 3, 1, 2)
        edit = mask.to(torch.int32).unsqueeze(1) != 0
        layout = LayoutPyramid(labels.to(torch.int32), instances, edit.to(torch.float32), self.generator.config.classes)
        generated = self.generator(pixels / 127.5 - 1, layout).raw[-1]
        levels = torch.clamp(torch.round((generated + 1) * 127.5), 0, 255)
        return torch.where(edit, levels, pixels).permute(0, 2, 3, 1).to(torch.uint8)
