"""Deploy graphs: modules that take and return bytes, which are exported to ONNX and run as they are by PyTorch.

Except for reading and writing files, everything between a photo and its edit is inside these modules, so that no
backend implements the conditioning again.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.model.generator import Generator
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.model.modulation import StylePreservedModulation
from spmdeploy.types import NATIVE_SIZE

COARSE_SIZE = NATIVE_SIZE // 2
"""Height and width of the coarse result that the `refine` graph refines."""

COLOR_BLOCK = 8
"""Side of the blocks whose mean colors are transferred from the coarse result. As measured (docs/large-images.md), 4
costs sharpness, and larger ones leave more of the brightness steps between tiles."""

EDIT_INPUTS = ("image", "labels", "instances", "mask")
REFINE_INPUTS = (*EDIT_INPUTS, "coarse")
OUTPUTS = ("edited", "unrounded")

_HEADS = ("layout_gamma_scale", "layout_gamma_shift", "layout_beta_scale", "layout_beta_shift")
"""Layers of a modulation that read the layout only."""


class EditGraph(nn.Module):
    """One whole edit.

    image: uint8 (B, H, W, 3) RGB. labels: uint8 (B, H, W). instances: int32 (B, H, W), read for the edge channel only.
    mask: uint8 (B, H, W), 0 = keep, else edit. Returns the edit twice, both equal to `image` wherever the mask is 0:
    edited: uint8 (B, H, W, 3) RGB, and unrounded: float32 (B, H, W, 3) RGB in 0..255, the same before rounding, for
    further computation.

    TensorRT takes uint8 inputs only into a cast, and before 10.6 only to floating point, so every such input is cast to
    float32 before anything else is done with it.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, image: Tensor, labels: Tensor, instances: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        inputs = _GraphInputs(image, labels, instances, mask, self.generator.config.classes)
        return inputs.edited_to(self.generator(inputs.image, inputs.layout).raw[-1])


class RefineGraph(nn.Module):
    """The last stage alone: refines a half-resolution result at full resolution.

    Inputs of `EditGraph`, and coarse: float32 (B, H/2, W/2, 3) RGB in 0..255, the result at half size. Of `image` only
    the pixels outside the mask are read, of `coarse` those under it and one pixel around. Returns edited, as
    `EditGraph` does and equal to its result if given the raw output of the stage before the last; and unrounded, for
    the next doubling: float32 (B, H, W, 3) RGB in 0..255, with the low-frequency
    colors of `coarse` (`_transfer_low_frequencies`).

    coarse is float32 and not uint8, because several pyramid levels would otherwise round once per level, and where a
    tile is flat the instance norms amplify the steps; at half size it has the bytes of `image`.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        assert len(generator.stages) > 1, "a single stage has nothing to refine"
        self.generator = generator

    def forward(
        self, image: Tensor, labels: Tensor, instances: Tensor, mask: Tensor, coarse: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = _GraphInputs(image, labels, instances, mask, self.generator.config.classes)
        last = len(self.generator.stages) - 1
        start = self.generator.stage_input(last, inputs.image, inputs.layout, _to_tensor(coarse))
        edited, plain = inputs.edited_to(self.generator.stages[last](start, inputs.layout))
        return edited, _transfer_low_frequencies(coarse, plain, inputs.layout.mask)


def cache_layout(graph: EditGraph, labels: Tensor, instances: Tensor, mask: Tensor) -> EditGraph:
    """Copies the graph for one layout, with the layout branches replaced by their precomputed outputs.

    Args:
        graph: Its weights are shared.
        labels: uint8 (B, H, W).
        instances: int32 (B, H, W).
        mask: uint8 (B, H, W). The copy must be called with the same labels, instances and mask.

    Returns:
        The copy, whose edits equal those of the graph bit for bit. It takes the time of one edit to create, and holds
        the output of every layout branch in memory.
    """
    outputs: dict[str, Tensor] = {}
    hooks = [
        head.register_forward_hook(partial(_remember, outputs, name))
        for name, head in graph.named_modules()
        if name.rpartition(".")[2] in _HEADS
    ]
    try:
        graph(torch.zeros((*mask.shape, 3), dtype=torch.uint8, device=mask.device), labels, instances, mask)
    finally:
        for hook in hooks:
            hook.remove()
    cached = copy.deepcopy(graph, {id(weight): weight for weight in graph.parameters()})
    for path, layer in list(cached.named_modules()):
        if isinstance(layer, StylePreservedModulation):
            layer_outputs = {name: outputs[f"{path}.{name}"] for name in _HEADS if f"{path}.{name}" in outputs}
            layer_outputs["layout_shared"] = torch.empty(0)  # only the heads read it
            for name, output in layer_outputs.items():
                setattr(layer, name, _Constant(output))
    return cached


class _GraphInputs:
    """The inputs of both graphs, converted for the generator, and the conversion of its output."""

    def __init__(self, image: Tensor, labels: Tensor, instances: Tensor, mask: Tensor, classes: int) -> None:
        self._pixels = image.to(torch.float32)
        self._edit = mask.to(torch.float32) != 0
        self.image = _to_tensor(self._pixels)
        self.layout = LayoutPyramid(
            labels.to(torch.float32).to(torch.int32), instances, self._edit.unsqueeze(1).to(torch.float32), classes
        )

    def edited_to(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of the graph, from the output of the generator: float (B, 3, H, W) in [-1, 1]."""
        levels = torch.clamp((generated.permute(0, 2, 3, 1) + 1) * 127.5, 0, 255)
        unrounded = torch.where(self._edit.unsqueeze(3), levels, self._pixels)
        return torch.round(unrounded).to(torch.uint8), unrounded


def _transfer_low_frequencies(coarse: Tensor, refined: Tensor, mask: Tensor) -> Tensor:
    """Gives `refined` the mean colors of `coarse` under the mask, per block and interpolated between blocks.

    Instance norms depend on the whole tile: of two tiles that share a sky, the one with less street grays that sky.
    `coarse` is the same image for both.

    coarse: float (B, H/2, W/2, 3), refined: float (B, H, W, 3), both in 0..255. mask: float (B, 1, H, W).
    """
    doubled = F.interpolate(coarse.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False)
    refined = refined.permute(0, 3, 1, 2)
    missing = _spread_by_blocks((doubled - refined) * mask) / _spread_by_blocks(mask).clamp(min=1e-3)
    return (refined + missing * mask).clamp(0, 255).permute(0, 2, 3, 1)


def _spread_by_blocks(x: Tensor) -> Tensor:
    """float (B, C, H, W): the means of blocks, interpolated."""
    return F.interpolate(F.avg_pool2d(x, COLOR_BLOCK), scale_factor=COLOR_BLOCK, mode="bilinear", align_corners=False)


def _to_tensor(levels: Tensor) -> Tensor:
    """float (B, H, W, 3) in 0..255 to float (B, 3, H, W) in [-1, 1]."""
    return levels.permute(0, 3, 1, 2) / 127.5 - 1


class _Constant(nn.Module):
    """Returns a precomputed tensor."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, _: Tensor) -> Tensor:
        return self._output


def _remember(outputs: dict[str, Tensor], name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
    outputs[name] = output
