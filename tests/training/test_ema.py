from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spmdeploy import default_model
from spmdeploy.backends.pytorch import bundled_generator
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.errors import InputError
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training.ema import grow_stage, inherit_discriminator, training_generator, update_ema
from spmdeploy.training.losses import Discriminator

CONFIG = GeneratorConfig(classes=3, width=2, hidden=2)


def plain() -> Generator:
    return Generator(CONFIG).requires_grad_(False)


def run(generator: Generator) -> torch.Tensor:
    image = torch.linspace(-1, 1, 3 * 128 * 128).view(1, 3, 128, 128)
    labels = torch.arange(128).remainder(3).expand(1, 128, 128)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    with torch.no_grad():
        return generator.eval()(image, LayoutPyramid(labels, labels, mask, 3)).edited


def test_update_ema_without_decay_gives_the_folded_generator() -> None:
    torch.manual_seed(0)
    generator, averaged = training_generator(CONFIG), plain()
    update_ema(averaged, generator, range(3), decay=0.0)
    torch.testing.assert_close(run(averaged), run(generator))
    assert set(averaged.state_dict()) == set(plain().state_dict())


def test_update_ema_changes_the_given_stages_by_the_decay() -> None:
    torch.manual_seed(0)
    generator, averaged = training_generator(CONFIG), plain()
    before = {name: value.clone() for name, value in averaged.named_parameters()}
    update_ema(averaged, generator, (1,), decay=0.75)
    name = "stages.1.encoder.0.features.weight"
    wanted = 0.75 * before[name] + 0.25 * generator.get_parameter(name)
    torch.testing.assert_close(averaged.get_parameter(name), wanted)
    assert torch.equal(averaged.get_parameter(name.replace("1", "0", 1)), before[name.replace("1", "0", 1)])


def test_update_ema_keeps_the_power_iteration() -> None:
    generator, averaged = training_generator(CONFIG).train(), plain()
    before = {name: value.clone() for name, value in generator.named_buffers()}
    update_ema(averaged, generator, range(3), decay=0.5)
    assert before
    assert all(torch.equal(value, before[name]) for name, value in generator.named_buffers())
    assert generator.training


def test_grow_stage_copies_all_but_the_bottom_of_the_u() -> None:
    torch.manual_seed(0)
    generator, averaged = training_generator(CONFIG), plain()
    update_ema(averaged, generator, range(3), decay=0.0)
    copied = grow_stage(generator, averaged, 1)
    finer = {name.rsplit(".", 2)[0] for name, _ in averaged.stages[1].named_parameters() if "to_rgb" not in name}
    assert finer - {name.rsplit(".", 2)[0] for name in copied} == {"encoder.7", "decoder.0"}
    update_ema(averaged, generator, range(3), decay=0.0)
    # Decoders are listed from the inside out: the last one of each stage corresponds.
    for here, there in (("encoder.3", "encoder.3"), ("decoder.5", "decoder.4"), ("decoder.1", "decoder.0")):
        ours = averaged.stages[1].get_submodule(here).context_gamma.weight
        assert torch.equal(ours, averaged.stages[0].get_submodule(there).context_gamma.weight)
    assert torch.equal(averaged.stages[1].to_rgb.weight, averaged.stages[0].to_rgb.weight)


def test_grow_stage_copies_are_independent_and_trainable() -> None:
    generator, averaged = training_generator(CONFIG), plain()
    grow_stage(generator, averaged, 2)
    assert all(parameter.requires_grad for parameter in generator.stages[2].parameters())
    with torch.no_grad():
        generator.stages[2].to_rgb.weight.add_(1)
    assert not torch.equal(generator.stages[2].to_rgb.weight, averaged.stages[1].to_rgb.weight)


def test_inherit_discriminator_copies_the_outer_layers() -> None:
    torch.manual_seed(0)
    coarser, finer = Discriminator(3, 2, 2), Discriminator(3, 1, 2)
    own_last = finer.state_dict()["layers.4.parametrizations.weight.original"].clone()
    inherit_discriminator(finer, coarser)
    state = finer.state_dict()
    for index in range(3):
        key = f"layers.{index}.parametrizations.weight.original"
        assert torch.equal(state[key], coarser.state_dict()[key])
    assert torch.equal(state["layers.4.parametrizations.weight.original"], own_last)


def test_training_generator_starts_from_a_bundle() -> None:
    bundled = bundled_generator(open_bundle(default_model()))
    started = training_generator(bundled.config, default_model())
    name = "stages.2.encoder.3.features.weight"
    assert torch.equal(started.get_parameter(name), bundled.get_parameter(name))
    with pytest.raises(InputError, match=r"street\.spm: is a generator of .*classes=12.*the run trains .*classes=3"):
        training_generator(CONFIG, default_model())


@pytest.mark.parametrize("name", ["missing.spm", "/dev/zero"])
def test_training_generator_start_that_is_no_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no such file"):
        training_generator(CONFIG, Path(name))
