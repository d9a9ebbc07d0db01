"""Deploy graphs: known pixels are kept, and refining agrees with the edit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spmdeploy.model.deploy import EditGraph, RefineGraph
from spmdeploy.model.generator import Generator, GeneratorConfig


def test_edit_graph_keeps_known_pixels() -> None:
    image, labels, instances, mask = _deploy_inputs()
    labels.fill_(200)  # belongs to no class: allowed, conditions nothing
    with torch.inference_mode():
        edited, unrounded = EditGraph(_tiny())(image, labels, instances, mask)
    assert (edited.dtype, unrounded.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(edited[mask == 0], image[mask == 0])
    assert torch.equal(unrounded[mask == 0], image[mask == 0].float())
    assert (edited[mask != 0] != image[mask != 0]).float().mean() > 0.9
    assert torch.equal(unrounded.round(), edited.float())
    assert (unrounded != unrounded.round()).any()


def _deploy_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image, labels, instances and mask of two edits."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 3, (2, 8, 8), dtype=np.uint8).repeat(32, 1).repeat(32, 2))
    mask = torch.zeros(2, 256, 256, dtype=torch.uint8)
    mask[0, :40, 200:], mask[1, 100:140, 90:130] = 1, 255
    return image, labels, labels.to(torch.int32), mask


def test_refine_graph_of_the_previous_stage_gives_the_edit() -> None:
    generator = _tiny()
    inputs = _deploy_inputs()
    coarse: list[Tensor] = []
    generator.stages[1].register_forward_hook(lambda stage, given, raw: coarse.append(raw))
    with torch.inference_mode():
        edited = EditGraph(generator)(*inputs)[0]
        levels = (coarse[0].permute(0, 2, 3, 1) + 1) * 127.5
        refined = RefineGraph(generator)(*inputs, levels)[0]
    assert torch.equal(refined, edited)


def test_refine_graph_unrounded_has_the_colors_of_coarse() -> None:
    *inputs, mask = _deploy_inputs()
    mask[:, 96:192, 64:224] = 1
    light = torch.full((2, 128, 128, 3), 60.0)
    light[:, :, 64:] = 190
    with torch.inference_mode():
        edited, lit = RefineGraph(_tiny())(*inputs, mask, light)
    blocks = lit[:, 96:192, 64:224].reshape(2, 12, 8, 20, 8, 3).mean(dim=(2, 4))
    for side, level in ((blocks[:, 1:-1, 1:6], 60), (blocks[:, 1:-1, -6:-1], 190)):
        assert (side - level).abs().median() < 2
    plain = edited[:, 96:192, 64:224].float().reshape(2, 12, 8, 20, 8, 3).mean(dim=(2, 4))
    assert (plain[:, :, -6:-1] - 190).abs().mean() > 30, "it had that light by itself"
    sharp, flat = (image.float().diff(dim=2)[:, 100:190, 70:120].std() for image in (lit, edited))
    assert torch.isclose(sharp, flat, rtol=0.1), "detail was lost"
    assert torch.equal(lit[mask == 0], inputs[0][mask == 0].float())


def test_refine_graph_reads_image_outside_and_coarse_under_the_mask() -> None:
    image, labels, instances, mask = _deploy_inputs()
    coarse = torch.rand(2, 128, 128, 3) * 255
    hidden = torch.nn.functional.max_pool2d((mask != 0).float(), 2)
    near = torch.nn.functional.max_pool2d(hidden, 3, stride=1, padding=1) != 0
    refine = RefineGraph(_tiny())
    with torch.inference_mode():
        edited, unrounded = refine(image, labels, instances, mask, coarse)
        image[mask != 0] = 77
        coarse[~near] = 1000
        again, unrounded_again = refine(image, labels, instances, mask, coarse)
        coarse[hidden != 0] += 40
        other = refine(image, labels, instances, mask, coarse)[0]
    assert torch.equal(edited, again) and torch.equal(unrounded, unrounded_again)
    assert torch.equal(edited[mask == 0], image[mask == 0])
    assert (other[mask != 0] != edited[mask != 0]).float().mean() > 0.3


def _tiny(**switches: Any) -> Generator:
    torch.manual_seed(1)
    return Generator(GeneratorConfig(classes=3, width=1, hidden=2, **switches)).eval().requires_grad_(False)
