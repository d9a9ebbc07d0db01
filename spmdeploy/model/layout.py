"""Layout pyramid: one-hot labels, edges and mask at every resolution of the network."""

from __future__ import annotations

import torch
from torch import Tensor


def instance_edges(instances: Tensor) -> Tensor:
    """Pixels whose instance differs from their left, right, upper or lower neighbor.

    Args:
        instances: integer (N, H, W).

    Returns:
        bool (N, H, W). Both pixels of a differing pair are marked; the image's own border is not an edge.
    """
    left = torch.cat((instances[:, :, :1], instances[:, :, :-1]), dim=2)
    right = torch.cat((instances[:, :, 1:], instances[:, :, -1:]), dim=2)
    upper = torch.cat((instances[:, :1], instances[:, :-1]), dim=1)
    lower = torch.cat((instances[:, 1:], instances[:, -1:]), dim=1)
    return (instances != left) | (instances != right) | (instances != upper) | (instances != lower)


class LayoutPyramid:
    """The layout input of the second modulation at any size of the U-Nets.

    labels: integer (N, H, W), an id outside 0..classes-1 belongs to no class.
    instances: integer (N, H, W), used for the edge channel only.
    mask: float (N, 1, H, W), 1 = edit, 0 = keep.

    `at(h, w)` is float (N, classes + 2, h, w): one-hot labels and edges, both times the mask, then the mask itself;
    resized with torch's `nearest`, which for the integer ratios of the U-Nets keeps every r-th pixel. Built from the
    ids at the wanted size, so that the full-size one-hot volume never exists unless a layer asks for it.
    """

    def __init__(self, labels: Tensor, instances: Tensor, mask: Tensor, classes: int) -> None:
        self._labels = labels
        self._edges = instance_edges(instances)
        self._mask = mask
        self._class_ids = torch.arange(classes, device=labels.device, dtype=labels.dtype).view(1, classes, 1, 1)
        self._levels: dict[tuple[int, int], Tensor] = {}

    @property
    def mask(self) -> Tensor:
        """The mask at full size, float (N, 1, H, W), 1 = edit."""
        return self._mask

    def at(self, height: int, width: int) -> Tensor:
        """The layout at one size, float (N, classes + 2, height, width); see the class. Computed once for each size."""
        level = self._levels.get((height, width))
        if level is None:
            level = self._levels[height, width] = self._build(height, width)
        return level

    def mask_at(self, height: int, width: int) -> Tensor:
        """The mask alone: float (N, 1, height, width)."""
        step = self._step(height, width)
        return self._mask[:, :, ::step, ::step]

    def one_hot_at(self, height: int, width: int) -> Tensor:
        """One-hot labels of the whole image, not only under the mask: float (N, classes, height, width)."""
        step = self._step(height, width)
        return (self._labels[:, None, ::step, ::step] == self._class_ids).to(self._mask.dtype)

    def _build(self, height: int, width: int) -> Tensor:
        step = self._step(height, width)
        mask = self.mask_at(height, width)
        labels = self._labels[:, None, ::step, ::step]
        edges = self._edges[:, None, ::step, ::step]
        one_hot = (labels == self._class_ids).to(mask.dtype)
        return torch.cat((one_hot * mask, edges.to(mask.dtype) * mask, mask), dim=1)

    def _step(self, height: int, width: int) -> int:
        full_height, full_width = self._mask.shape[-2:]
        step = full_height // height
        assert height * step == full_height and width * step == full_width, (height, width, full_height, full_width)
        return step
