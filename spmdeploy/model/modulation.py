"""Style-preserved modulation, the block that the generator consists of (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.types import Modulation

NORM_EPS = 1e-5


def instance_norm(x: Tensor) -> Tensor:
    """Zero mean and unit variance per instance and channel, without affine parameters, computed in float32.

    In half precision the sums of a 256×256 channel overflow long before the normalized values do; the statistics
    therefore always run in float32, in training, in export and in every engine.
    """
    if x.shape[-2] * x.shape[-1] == 1:  # the variance of one pixel is zero
        return torch.zeros_like(x)
    if x.requires_grad:  # training: the operator below copies channels-last maps there and back, a tenth of a CPU step
        variance, mean = torch.var_mean(x.float(), dim=(2, 3), keepdim=True, correction=0)
        return ((x.float() - mean) * torch.rsqrt(variance + NORM_EPS)).to(x.dtype)
    return F.instance_norm(x.float(), eps=NORM_EPS).to(x.dtype)


class StylePreservedModulation(nn.Module):
    """One layer: convolve, normalize, modulate by the context's style corrected for the layout.

    The first modulation (`context_*`) reads the un-normalized features, which hold the style of the known pixels; the
    second (`layout_*`) reads labels, edges and mask and corrects both of its parameters. With `spade` there is nothing
    to correct: the shifts alone are gamma and beta.

    Args:
        in_channels: Feature channels of the input.
        channels: Feature channels of the output.
        layout_channels: See `LayoutPyramid`.
        hidden: Width of the two shared layers.
        stride: Of the two convolutions that read features.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layout_channels: int,
        hidden: int,
        stride: int = 1,
        modulation: Modulation = "spm",
    ) -> None:
        super().__init__()
        self.by_context = modulation == "spm"
        # The order is that of the optimizer's state in a run's checkpoint: it must not change.
        self.features = _conv3x3(in_channels, channels, stride)
        if self.by_context:
            self.context_shared = _conv3x3(in_channels, hidden, stride)
            self.context_gamma = _conv3x3(hidden, channels)
            self.context_beta = _conv3x3(hidden, channels)
        self.layout_shared = _conv3x3(layout_channels, hidden)
        if self.by_context:
            self.layout_gamma_scale = _conv3x3(hidden, channels)
        self.layout_gamma_shift = _conv3x3(hidden, channels)
        if self.by_context:
            self.layout_beta_scale = _conv3x3(hidden, channels)
        self.layout_beta_shift = _conv3x3(hidden, channels)

    def forward(self, x: Tensor, layout: Tensor) -> Tensor:
        """Modulates features.

        Args:
            x: float (N, in_channels, stride * h, stride * w).
            layout: float (N, layout_channels, h, w).

        Returns:
            float (N, channels, h, w).
        """
        normalized = instance_norm(self.features(x))
        style = F.relu(self.context_shared(x)) if self.by_context else None
        layout = F.relu(self.layout_shared(layout))
        if style is None:
            gamma, beta = self.layout_gamma_shift(layout), self.layout_beta_shift(layout)
        else:
            gamma = self.context_gamma(style) * (1 + self.layout_gamma_scale(layout)) + self.layout_gamma_shift(layout)
            beta = self.context_beta(style) * (1 + self.layout_beta_scale(layout)) + self.layout_beta_shift(layout)
        return F.leaky_relu(normalized * (1 + gamma) + beta, 0.2)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
