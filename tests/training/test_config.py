from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from spmdeploy.errors import InputError
from spmdeploy.training.config import (
    DataConfig,
    ExtraData,
    Phase,
    TrainConfig,
    from_json,
    joint_schedule,
    preset_config,
    staged_schedule,
    to_json,
)


def config() -> TrainConfig:
    extra = (ExtraData("more", 0.25, {"door": "building"}),)
    return TrainConfig(data=DataConfig("root", extra=extra), schedule=staged_schedule((8, 8, 8), joint_images=8))


def test_presets() -> None:
    small = preset_config("small", DataConfig("root"), joint_schedule(1))
    assert (small.width, small.hidden, small.discriminator_width) == (16, 32, 32)
    paper = preset_config("paper", DataConfig("root"), joint_schedule(1))
    assert paper == TrainConfig(data=DataConfig("root"), schedule=joint_schedule(1))
    with pytest.raises(InputError, match="preset is 'large', expected one of paper, small"):
        preset_config("large", DataConfig("root"), joint_schedule(1))


def test_survives_json() -> None:
    assert from_json(json.loads(json.dumps(to_json(config()))), "config.json") == config()


def test_the_default_is_the_papers_recipe() -> None:
    recipe = TrainConfig(data=DataConfig("root"), schedule=joint_schedule(1))
    assert (recipe.loss.adversarial, recipe.loss.l1, recipe.loss.l1_inside, recipe.loss.perceptual) == (1, 1, 1, 10)
    assert recipe.loss.perceptual_network == "vgg19"
    (phase,) = recipe.schedule
    assert (phase.stages, phase.batch, phase.perceptual_blocks) == ((0, 1, 2), 1, 5)
    assert (phase.generator_rate, phase.discriminator_rate, phase.decay_from) == (1e-4, 4e-4, 1)
    assert recipe.data.smallest_scale == 1


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("width",), "wide", "width is 'wide'"),
        (("data", "crop"), 200, "data.crop is 200"),
        (("data", "root"), None, "data.root is None"),
        (("loss", "perceptual_network"), "resnet", "perceptual_network is 'resnet'"),
        (("schedule", 0, "stages"), [0, 2], r"stages is \(0, 2\)"),
        (("schedule", 1, "batch"), 0, "batch is 0"),
        (("data", "holes"), ["moon"], "'moon'"),
        (("bf16",), 1, "bf16 is 1"),
        (("colour",), 1, "colour"),
    ],
)
def test_a_bad_value_is_named(path: tuple[Any, ...], value: Any, named: str) -> None:
    fields = json.loads(json.dumps(to_json(config())))
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=named) as caught:
        from_json(fields, "run/config.json")
    assert caught.value.problem.startswith("run/config.json: ")


def test_a_missing_field_is_named() -> None:
    fields = to_json(config())
    del fields["data"]
    with pytest.raises(InputError, match="data"):
        from_json(fields, "config.json")


def test_another_file_is_refused() -> None:
    with pytest.raises(InputError, match="schema is None"):
        from_json({}, "config.json")


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Phase((0,), 1, 1).batch = 2  # type: ignore[misc]
