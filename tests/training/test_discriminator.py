from __future__ import annotations

import pytest
import torch
from torch import nn

from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training.discriminator import Discriminator, reference_state


def layout(classes: int) -> LayoutPyramid:
    labels = torch.zeros(1, 256, 256, dtype=torch.uint8)
    return LayoutPyramid(labels, labels.int(), torch.ones(1, 1, 256, 256), classes)


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_every_size_gives_four_by_four(halvings: int) -> None:
    side = 256 >> halvings
    score = Discriminator(5, halvings, 2)(torch.zeros(1, 3, side, side), layout(5))
    assert score.shape == (1, 3, 4, 4)


def test_the_labels_under_the_mask_matter() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(5, 2, 4).eval()
    picture = torch.zeros(1, 3, 64, 64)
    labels = torch.ones(1, 256, 256, dtype=torch.uint8)
    keep, edit = torch.zeros(1, 1, 256, 256), torch.ones(1, 1, 256, 256)
    scores = [
        discriminator(picture, LayoutPyramid(ids, ids, mask, 5))
        for ids in (labels, labels * 2)
        for mask in (keep, edit)
    ]
    assert torch.equal(scores[0], scores[2])  # nothing is masked: no labels
    assert not torch.equal(scores[1], scores[3])


def test_reference_keys_and_widths() -> None:
    state = reference_state(Discriminator(34, 0, 64))
    assert {key.split(".", 2)[2] for key in state} == {"conv.weight_orig", "conv.weight_u", "conv.weight_v"}
    shapes = [tuple(state[f"dis_model.{index}.conv.weight_orig"].shape) for index in range(6)]
    assert shapes == [
        (64, 37, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (256, 256, 5, 5), (256, 256, 5, 5), (3, 256, 5, 5),
    ]  # fmt: skip


def test_reference_state_gives_the_same_scores_under_the_older_normalization() -> None:
    torch.manual_seed(0)
    ours = Discriminator(5, 2, 2).eval()
    layers = nn.Sequential()
    for index, layer in enumerate(ours.layers):
        convolution = nn.Conv2d(layer.in_channels, layer.out_channels, 5, 2, 2, padding_mode="replicate", bias=False)
        block = nn.Sequential()
        block.add_module("conv", nn.utils.spectral_norm(convolution))
        block.add_module("activation", nn.LeakyReLU(0.2))
        layers.add_module(str(index), block)
    theirs = nn.ModuleDict({"dis_model": layers}).eval()
    theirs.load_state_dict(reference_state(ours))
    picture = torch.rand(1, 3, 64, 64)
    labels = layout(5).at(64, 64)[:, :-2]
    torch.testing.assert_close(layers(torch.cat((labels, picture), 1)), ours(picture, layout(5)))
