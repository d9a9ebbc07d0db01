from __future__ import annotations

import pytest
import torch

from spmdeploy.training.losses import crop_around_mask, hinge_discriminator, hinge_generator, masked_l1


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
    first, second = crop_around_mask((places, -places), mask, 8, range(3))
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, -second)
    for index in range(3):
        assert places[index, 0, 31, 2] in first[index]


def test_the_seed_of_a_sample_fixes_its_crop() -> None:
    places, mask = torch.arange(2 * 64 * 64).view(2, 1, 64, 64).float(), torch.ones(2, 1, 64, 64)
    both = crop_around_mask((places,), mask, 8, range(10, 12))[0]
    alone = crop_around_mask((places[1:],), mask[1:], 8, range(11, 12))[0]
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1] - 64 * 64)


def test_no_crop_where_the_picture_is_not_larger() -> None:
    picture, mask = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    assert crop_around_mask((picture,), mask, 16, range(1))[0] is picture
    assert crop_around_mask((picture,), mask, 0, range(1))[0] is picture
