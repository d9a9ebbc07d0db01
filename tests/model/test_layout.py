"""Layout pyramid and instance edges."""

from __future__ import annotations

import torch

from spmdeploy.model.layout import LayoutPyramid, instance_edges


def test_instance_edges_mark_both_pixels_but_not_the_border() -> None:
    instances = torch.zeros(1, 5, 6, dtype=torch.int32)
    instances[0, 2, 3] = 70000
    edges = instance_edges(instances)[0]
    expected = torch.zeros(5, 6, dtype=torch.bool)
    for row, column in ((2, 3), (1, 3), (3, 3), (2, 2), (2, 4)):
        expected[row, column] = True
    assert torch.equal(edges, expected)


def test_layout_pyramid_equals_nearest_resizing() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (2, 128, 256))
    mask = (torch.rand(2, 1, 128, 256) < 0.5).float()
    pyramid = LayoutPyramid(labels, labels, mask, classes=5)  # ids 5 and 6 belong to no class
    full = pyramid.at(128, 256)
    assert full.shape == (2, 7, 128, 256)
    assert torch.equal(full[:, :5].sum(1, keepdim=True), (labels < 5).float()[:, None] * mask)
    for step in (2, 4, 32):
        size = (128 // step, 256 // step)
        assert torch.equal(pyramid.at(*size), torch.nn.functional.interpolate(full, size=size, mode="nearest"))
