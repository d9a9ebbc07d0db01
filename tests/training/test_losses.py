from __future__ import annotations

import numpy as np
import pytest
import torch

from spmdeploy.training.losses import choose_crops, cut_crops, hinge_discriminator, hinge_generator, masked_l1


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.25 + 1.0)
    assert hinge_generator(fake).item() == pytest.approx(1.0)


def test_l1_weights_the_inside() -> None:
    raw, target = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :1] = 1  # 4 of 16 pixels
    raw[..., :1] = 1
    assert masked_l1(raw, target, mask, 1).item() == pytest.approx(4 / 16)
    assert masked_l1(raw, target, mask, 3).item() == pytest.approx(12 / (12 + 12))


def test_l1_of_a_batch_is_the_mean_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    raw, target = torch.rand(4, 3, 8, 8, generator=generator), torch.rand(4, 3, 8, 8, generator=generator)
    mask = (torch.rand(4, 1, 8, 8, generator=generator) > 0.5).float()
    alone = [masked_l1(raw[i : i + 1], target[i : i + 1], mask[i : i + 1], 5) for i in range(4)]
    torch.testing.assert_close(masked_l1(raw, target, mask, 5), torch.stack(alone).mean())


def test_crops_hold_the_mask_and_match_each_other() -> None:
    places = torch.arange(3 * 32 * 32).view(3, 1, 32, 32).float()
    mask = torch.zeros(3, 1, 32, 32)
    mask[:, :, 31, 2] = 1
    corners = choose_crops(mask[:, 0].bool().numpy(), 8, range(3))
    first, second = cut_crops(places, corners, 8), cut_crops(-places, corners, 8)
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, -second)
    for index in range(3):
        assert places[index, 0, 31, 2] in first[index]


def test_the_seed_of_a_sample_fixes_its_crop() -> None:
    places, mask = torch.arange(2 * 64 * 64).view(2, 1, 64, 64).float(), np.ones((2, 64, 64), bool)
    both = cut_crops(places, choose_crops(mask, 8, range(10, 12)), 8)
    alone = cut_crops(places[1:], choose_crops(mask[1:], 8, range(11, 12)), 8)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1] - 64 * 64)


def test_no_crop_where_the_picture_is_not_larger() -> None:
    image, mask = torch.rand(1, 3, 16, 16), np.ones((1, 16, 16), bool)
    for side in (16, 0):
        assert cut_crops(image, choose_crops(mask, side, range(1)), side) is image
