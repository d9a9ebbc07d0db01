"""The network is the published one: recorded outputs of the original, and a second implementation, say so."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spmdeploy.imaging.files import read_labels, read_mask, read_photo
from spmdeploy.model.checkpoint import load_checkpoint
from spmdeploy.model.deploy import EditGraph, RefineGraph
from spmdeploy.model.flops import edit_gflop
from spmdeploy.model.generator import PRESETS, Generator, GeneratorConfig
from spmdeploy.model.layout import LayoutPyramid, instance_edges
from spmdeploy.model.modulation import StylePreservedModulation, instance_norm

GOLDEN = Path(__file__).parents[1] / "golden"


def _literal() -> Any:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(generator: Generator, image: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """Raw stage outputs in BGR as recorded, and the edited image in RGB. image uint8 HWC, labels HW, mask HW."""
    ids = torch.from_numpy(labels.astype(np.int64))[None]
    inside = torch.from_numpy(mask.astype(np.float32))[None, None]
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        pictures = generator(pixels, LayoutPyramid(ids, ids, inside, generator.config.classes))
    return [raw.flip(1) for raw in pictures.raw], pictures.edited


@pytest.mark.parametrize("dataset", ["cityscapes", "ade20k"])
def test_generator_published_weights_give_the_recorded_outputs(shared: Path, dataset: str) -> None:
    folder = shared / "golden" / dataset
    generator = load_checkpoint(folder / "checkpoint.pth").generator
    pictures = {p.name: p for p in (shared / "data/spmpgan_examples").rglob("*") if p.parent.name not in SIDE_FOLDERS}
    maps = pictures | {p.name: p for p in (shared / "data/spmpgan_examples").rglob("labels/*")}
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    assert cases
    for name, case in cases.items():
        image = read_photo(pictures[case["image"]]).pixels
        mask = read_mask(pictures[case["mask"]])
        raw, edited = _run(generator, image, read_labels(maps[case["labels"]]), mask)
        recorded = np.load(folder / f"{name}.npz")
        first, second, third = (
            (output - torch.from_numpy(recorded[f"stage{i}"])).abs() for i, output in enumerate(raw, start=1)
        )
        assert first.max() <= 1e-4
        assert second.max() <= 1e-4
        # Where the last stage divides by a tiny deviation, the last bit of float32 decides: the float64 result is up to
        # 2.6e-3 away from the recorded float32 one too, in a few dozen of 196608 values. All others keep to 1e-4.
        assert (third > 1e-4).float().mean() < 5e-4
        assert third.max() <= 5e-3
        levels = ((edited[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
        assert np.abs(levels - read_photo(folder / f"{name}.png").pixels).max() <= 1


SIDE_FOLDERS = ("labels", "inst_map")


def test_generator_small_weights_give_the_golden_outputs() -> None:
    case = np.load(GOLDEN / "case.npz")
    generator = load_checkpoint(GOLDEN / "checkpoint.pth").generator
    raw, _ = _run(generator, case["image"], case["labels"], case["mask"])
    for i, output in enumerate(raw, start=1):
        torch.testing.assert_close(output, torch.from_numpy(case[f"stage{i}"]), rtol=0, atol=1e-4)


def test_golden_implementation_agrees_with_the_generator(shared: Path) -> None:
    literal = _literal()
    folder, data = shared / "golden/cityscapes", shared / "data/spmpgan_examples/data_test"
    state = torch.load(folder / "checkpoint.pth", weights_only=True)["netG"]
    labels, mask = read_labels(data / "segmap_1.png"), read_mask(data / "mask_1.png")
    image = torch.from_numpy(read_photo(data / "input.jpg").pixels[..., ::-1].copy()).double().permute(2, 0, 1)[None]
    outputs = literal.reference_outputs(
        {key: value.double() for key, value in state.items()},
        image / 127.5 - 1,
        literal.condition_of(labels, mask, 34),
        torch.from_numpy(mask).double()[None, None],
    )
    recorded = np.load(folder / "segmap_1.npz")
    for i, output in enumerate(outputs, start=1):
        difference = (output - torch.from_numpy(recorded[f"stage{i}"])).abs()
        assert (difference > 1e-4).double().mean() < 5e-4
        assert difference.max() <= 5e-3


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


@pytest.mark.parametrize(
    ("classes", "preset", "millions", "gflop"),
    [(34, "paper", 74.1, 93.8), (151, "paper", 76.9, 124.7), (12, "small", 18.5, 23.1)],
)
def test_presets_have_known_size_and_work(classes: int, preset: str, millions: float, gflop: float) -> None:
    config = GeneratorConfig(classes, **PRESETS[preset])
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Generator(config).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert edit_gflop(config) == pytest.approx(gflop, abs=0.05)


def test_edit_gflop_of_ablations_is_known() -> None:
    """A single scale saves the two smaller stages; spade saves the context branch and two of four layout heads."""
    whole, single, spade = (
        edit_gflop(GeneratorConfig(34, **PRESETS["paper"], **switches))  # type: ignore[arg-type]
        for switches in ({}, {"stages": 1}, {"modulation": "spade"})
    )
    assert 0.7 < single / whole < 0.8  # the last stage is three quarters of the work
    assert 0.3 < spade / whole < 0.7


def test_modulation_spade_is_spm_without_context() -> None:
    """An SPM layer whose context branch answers zero has only the layout's shifts left: the block of Park et al."""
    torch.manual_seed(0)
    full = StylePreservedModulation(3, 4, 5, 6, stride=2)
    plain = StylePreservedModulation(3, 4, 5, 6, stride=2, modulation="spade")
    x, layout = torch.randn(2, 3, 16, 16), torch.rand(2, 5, 8, 8)
    plain.load_state_dict({name: full.state_dict()[name] for name in plain.state_dict()})
    assert not torch.allclose(full(x, layout), plain(x, layout), atol=1e-3)
    for head in (full.context_gamma, full.context_beta):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)  # type: ignore[arg-type]
    assert torch.equal(full(x, layout), plain(x, layout))
    normalized = instance_norm(plain.features(x))
    shared = torch.relu(plain.layout_shared(layout))
    literal = normalized * (1 + plain.layout_gamma_shift(shared)) + plain.layout_beta_shift(shared)
    torch.testing.assert_close(plain(x, layout), torch.nn.functional.leaky_relu(literal, 0.2))


def test_generator_single_stage_is_the_full_size_stage_on_the_masked_image() -> None:
    generator = _tiny(stages=1)
    image, labels = torch.rand(1, 3, 128, 128) * 2 - 1, torch.zeros(1, 128, 128, dtype=torch.int64)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 40:90, 30:100] = 1
    layout = LayoutPyramid(labels, labels, mask, 3)
    with torch.inference_mode():
        raw, edited = generator(image, layout)
        (expected,) = (stage(image * (1 - mask), layout) for stage in generator.stages)
        hidden = generator(image + mask, layout)  # what is under the mask has no influence
    assert torch.equal(raw[0], expected)
    assert torch.equal(edited, torch.where(mask == 1, expected, image))
    assert torch.equal(hidden.raw[0], raw[0])
    assert [len(stage.encoder) for stage in generator.stages] == [9]


@pytest.mark.parametrize("size", [(128, 128), (128, 384), (256, 128)])
def test_generator_sizes_are_multiples_of_128(size: tuple[int, int]) -> None:
    generator = _tiny()
    labels = torch.zeros(1, *size, dtype=torch.int64)
    mask = torch.zeros(1, 1, *size)
    mask[..., 30:60, 40:90] = 1
    image = torch.rand(1, 3, *size) * 2 - 1
    with torch.inference_mode():
        raw, edited = generator(image, LayoutPyramid(labels, labels, mask, 3))
    assert [tuple(output.shape[2:]) for output in raw] == [(size[0] // k, size[1] // k) for k in (4, 2, 1)]
    assert torch.equal(torch.where(mask == 0, edited, 0), torch.where(mask == 0, image, 0))
    assert edited.isfinite().all()


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


@pytest.mark.parametrize(
    "config",
    [(0, 1, 1), (256, 1, 1), (3, -1, 1), (3, 1, 2.5), (3, 1, 1, "adain"), (3, 1, 1, "spm", 2), (3, 1, 1, "spm", True)],
)
def test_generator_config_impossible_values_are_refused(config: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        GeneratorConfig(*config)


def _tiny(**switches: Any) -> Generator:
    torch.manual_seed(1)
    return Generator(GeneratorConfig(classes=3, width=1, hidden=2, **switches)).eval().requires_grad_(False)


def test_generator_parameters_keep_the_order_of_old_checkpoints() -> None:
    """An optimizer's state in a run's checkpoint goes by position: another order would mix it up without an error."""
    parts = [name.rpartition(".")[0] for name, _ in _tiny().stages[0].encoder[0].named_parameters()]
    assert parts[::2] == [
        "features", "context_shared", "context_gamma", "context_beta", "layout_shared",
        "layout_gamma_scale", "layout_gamma_shift", "layout_beta_scale", "layout_beta_shift",
    ]  # fmt: skip
    names = "\n".join(name for name, _ in _tiny().named_parameters())
    assert (
        hashlib.sha256(names.encode()).hexdigest() == "445a789bd4bd57ac3dd2854b9449d60249e19d3c63901d83df8814b1576ce0dd"
    )
