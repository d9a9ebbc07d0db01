from __future__ import annotations

import numpy as np
import pytest
import torch

from spmdeploy.training.style_loss import MIN_PIXELS, class_style_loss, find_style_pairs

SIDE = 64


def layout() -> tuple[np.ndarray, np.ndarray]:
    """Class 0 above, class 1 below; the right half is edited, and so is all of class 1."""
    labels = np.zeros((1, SIDE, SIDE), np.uint8)
    labels[:, SIDE // 2 :] = 1
    mask = np.zeros((1, SIDE, SIDE), bool)
    mask[..., SIDE // 2 :] = True
    mask[labels == 1] = True
    return labels, mask


def test_find_style_pairs_class_without_known_pixels_is_skipped() -> None:
    pairs = find_style_pairs(*layout(), classes=3)
    assert pairs.samples.tolist() == [0] and pairs.classes.tolist() == [0]
    assert pairs.skipped == 1
    assert pairs.weights.sum() == 1


def test_find_style_pairs_few_pixels_and_unknown_ids_are_left_out() -> None:
    labels, mask = np.full((1, SIDE, SIDE), 255, np.uint8), np.zeros((1, SIDE, SIDE), bool)
    mask[..., :4] = True
    assert len(find_style_pairs(labels, mask, classes=3)) == find_style_pairs(labels, mask, classes=3).skipped == 0
    labels[...] = 0
    mask[...] = False
    mask.reshape(-1)[: MIN_PIXELS - 1] = True
    assert len(find_style_pairs(labels, mask, classes=3)) == 0


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    labels, mask = layout()
    one_hot = torch.from_numpy(np.stack([labels == index for index in range(3)], axis=1)).float()
    return one_hot, torch.from_numpy(mask)[:, None].float()


def test_class_style_loss_ignores_positions() -> None:
    one_hot, mask = tensors()
    pairs = find_style_pairs(*layout(), classes=3)
    torch.manual_seed(0)
    real = torch.randn(1, 1, SIDE, SIDE).expand(1, 8, SIDE, SIDE)
    shuffled = torch.randn(1, 1, SIDE, SIDE).expand(1, 8, SIDE, SIDE)  # the same distribution at other places
    flat = torch.zeros(1, 8, SIDE, SIDE)
    good, bad = (class_style_loss([fake], [real], one_hot, mask, pairs).item() for fake in (shuffled, flat))
    assert good < 0.3 * bad


def test_class_style_loss_gradient_reaches_only_edited_pixels_of_the_class() -> None:
    one_hot, mask = tensors()
    pairs = find_style_pairs(*layout(), classes=3)
    fake = torch.randn(1, 4, SIDE, SIDE, requires_grad=True)
    class_style_loss([fake], [torch.randn(1, 4, SIDE, SIDE)], one_hot, mask, pairs).backward()
    assert fake.grad is not None
    touched = fake.grad.abs().sum(dim=1) > 0
    assert torch.equal(touched, (one_hot[:, 0] * mask[:, 0]).bool())


@pytest.mark.parametrize("edited", [False, True])
def test_class_style_loss_without_pairs_is_zero(edited: bool) -> None:
    labels, mask = np.zeros((1, SIDE, SIDE), np.uint8), np.full((1, SIDE, SIDE), edited)
    pairs = find_style_pairs(labels, mask, classes=3)
    assert pairs.skipped == int(edited)
    features = [torch.randn(1, 4, SIDE, SIDE)]
    one_hot, known = tensors()
    assert class_style_loss(features, features, one_hot, known, pairs).item() == 0
