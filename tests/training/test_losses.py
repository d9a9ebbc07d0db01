from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training.losses import (
    Discriminator,
    choose_crops,
    cut_crops,
    hinge_discriminator,
    hinge_generator,
    masked_l1,
    reference_state,
)


def test_hinge_losses_of_known_scores_have_known_values() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.25 + 1.0)
    assert hinge_generator(fake).item() == pytest.approx(1.0)


def test_masked_l1_inside_counts_the_given_times() -> None:
    raw, target = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :1] = 1  # 4 of 16 pixels
    raw[..., :1] = 1
    assert masked_l1(raw, target, mask, 1).item() == pytest.approx(4 / 16)
    assert masked_l1(raw, target, mask, 3).item() == pytest.approx(12 / (12 + 12))


def test_masked_l1_batch_is_the_mean_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    raw, target = torch.rand(4, 3, 8, 8, generator=generator), torch.rand(4, 3, 8, 8, generator=generator)
    mask = (torch.rand(4, 1, 8, 8, generator=generator) > 0.5).float()
    alone = [masked_l1(raw[i : i + 1], target[i : i + 1], mask[i : i + 1], 5) for i in range(4)]
    torch.testing.assert_close(masked_l1(raw, target, mask, 5), torch.stack(alone).mean())


def test_choose_crops_squares_contain_a_masked_pixel() -> None:
    places = torch.arange(3 * 32 * 32).view(3, 1, 32, 32).float()
    mask = torch.zeros(3, 1, 32, 32)
    mask[:, :, 31, 2] = 1
    corners = choose_crops(mask[:, 0].bool().numpy(), 8, range(3))
    first, second = cut_crops(places, corners, 8), cut_crops(-places, corners, 8)
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, -second)
    for index in range(3):
        assert places[index, 0, 31, 2] in first[index]


def test_choose_crops_same_seed_gives_same_corner() -> None:
    places, mask = torch.arange(2 * 64 * 64).view(2, 1, 64, 64).float(), np.ones((2, 64, 64), bool)
    both = cut_crops(places, choose_crops(mask, 8, range(10, 12)), 8)
    alone = cut_crops(places[1:], choose_crops(mask[1:], 8, range(11, 12)), 8)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1] - 64 * 64)


def test_choose_crops_image_not_larger_gives_none() -> None:
    image, mask = torch.rand(1, 3, 16, 16), np.ones((1, 16, 16), bool)
    for side in (16, 0):
        assert cut_crops(image, choose_crops(mask, side, range(1)), side) is image


def layout(classes: int) -> LayoutPyramid:
    labels = torch.zeros(1, 256, 256, dtype=torch.uint8)
    return LayoutPyramid(labels, labels.int(), torch.ones(1, 1, 256, 256), classes)


@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_discriminator_every_stage_gives_four_by_four_scores(halvings: int) -> None:
    side = 256 >> halvings
    score = Discriminator(5, halvings, 2)(torch.zeros(1, 3, side, side), layout(5))
    assert score.shape == (1, 3, 4, 4)


def test_discriminator_labels_matter_only_under_the_mask() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(5, 2, 4).eval()
    image = torch.zeros(1, 3, 64, 64)
    labels = torch.ones(1, 256, 256, dtype=torch.uint8)
    keep, edit = torch.zeros(1, 1, 256, 256), torch.ones(1, 1, 256, 256)
    scores = [
        discriminator(image, LayoutPyramid(ids, ids, mask, 5)) for ids in (labels, labels * 2) for mask in (keep, edit)
    ]
    assert torch.equal(scores[0], scores[2])  # nothing is masked: no labels
    assert not torch.equal(scores[1], scores[3])


def test_reference_state_has_the_keys_and_widths_of_the_authors() -> None:
    state = reference_state(Discriminator(34, 0, 64))
    assert {key.split(".", 2)[2] for key in state} == {"conv.weight_orig", "conv.weight_u", "conv.weight_v"}
    shapes = [tuple(state[f"dis_model.{index}.conv.weight_orig"].shape) for index in range(6)]
    assert shapes == [
        (64, 37, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (256, 256, 5, 5), (256, 256, 5, 5), (3, 256, 5, 5),
    ]  # fmt: skip


def test_reference_state_in_older_spectral_norm_gives_the_same_scores() -> None:
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
    image = torch.rand(1, 3, 64, 64)
    labels = layout(5).at(64, 64)[:, :-2]
    torch.testing.assert_close(layers(torch.cat((labels, image), 1)), ours(image, layout(5)))
