from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from spmdeploy.datasets.samples import DataConfig, ExtraData
from spmdeploy.errors import InputError
from spmdeploy.training.config import (
    LossConfig,
    Phase,
    TrainConfig,
    build_config,
    from_json,
    joint_schedule,
    staged_schedule,
    to_json,
)


def config() -> TrainConfig:
    extra = (ExtraData("more", 0.25, {"door": "building"}),)
    return TrainConfig(data=DataConfig("root", extra=extra), schedule=staged_schedule((8, 8, 8), joint_images=8))


def test_build_config_preset_sets_widths() -> None:
    small = build_config(Path("root"), "small", images=3)
    assert (small.width, small.hidden, small.discriminator_width) == (16, 32, 32)
    assert build_config(Path("root"), images=3) == TrainConfig(data=DataConfig("root"), schedule=joint_schedule(3))
    with pytest.raises(InputError, match="preset is 'large', expected one of paper, small"):
        build_config(Path("root"), "large", images=3)


def test_build_config_overrides_change_only_their_fields() -> None:
    found = build_config(
        Path("root"),
        images=40,
        run_overrides={"ema_half_life": 7, "compile": True, "seed": None},
        data_overrides={"max_scale": 2.0, "crop": None},
        loss_overrides={"perceptual_network": "vgg16"},
        phase_overrides={"batch": 4, "decay_from": 0.5},
    )
    recipe = build_config(Path("root"), images=40)
    assert found == dataclasses.replace(
        recipe,
        ema_half_life=7,
        compile=True,
        data=DataConfig("root", max_scale=2.0),
        loss=LossConfig(perceptual_network="vgg16"),
        schedule=(Phase((0, 1, 2), 40, 4, decay_from=0.5),),
    )
    staged = build_config(Path("root"), schedule="staged", images=40, phase_overrides={"batch": 3})
    assert [phase.batch for phase in staged.schedule] == [3, 3, 3]
    assert [phase.generator_rate for phase in staged.schedule] == [4e-4, 3e-4, 2e-4]


def test_build_config_single_stage_needs_the_joint_schedule() -> None:
    single = build_config(Path("root"), images=3, stages=1)
    assert [phase.stages for phase in single.schedule] == [(0,)]
    with pytest.raises(InputError, match="stages is 1, expected 3 for a staged schedule"):
        build_config(Path("root"), schedule="staged", images=3, stages=1)
    with pytest.raises(InputError, match=r"schedule.stages is \(0, 1, 2\), expected stages from 0 to 0"):
        dataclasses.replace(single, schedule=joint_schedule(3))


def test_from_json_without_later_fields_uses_defaults() -> None:
    """The run directories of earlier versions have none of these fields, and mean what was then the only way."""
    fields = json.loads(json.dumps(to_json(config())))
    for name in ("modulation", "stages", "compile", "tensorboard"):
        del fields[name]
    for name in ("max_scale", "color_jitter"):
        del fields["data"][name]
    assert from_json(fields, "config.json") == config()


def test_from_json_names_of_version_0_1_are_read() -> None:
    fields = json.loads(json.dumps(to_json(config())))
    current = fields["data"]
    old_names = {
        "mask_kinds": "holes", "color_jitter": "relighting", "min_scale": "smallest_scale", "max_scale": "largest_scale"
    }  # fmt: skip
    fields["data"] = {old_names.get(name, name): value for name, value in current.items()}
    fields["data"]["holes"] = ["class"]
    assert from_json(fields, "config.json").data.mask_kinds == ("class",)
    assert set(old_names.values()) <= fields["data"].keys()


def test_from_json_to_json_round_trip_is_equal() -> None:
    assert from_json(json.loads(json.dumps(to_json(config()))), "config.json") == config()


def test_train_config_defaults_are_those_of_the_paper() -> None:
    recipe = TrainConfig(data=DataConfig("root"), schedule=joint_schedule(1))
    assert (recipe.loss.adversarial, recipe.loss.l1, recipe.loss.l1_inside, recipe.loss.perceptual) == (1, 1, 1, 10)
    assert recipe.loss.perceptual_network == "vgg19"
    (phase,) = recipe.schedule
    assert (phase.stages, phase.batch, phase.perceptual_blocks) == ((0, 1, 2), 1, 5)
    assert (phase.generator_rate, phase.discriminator_rate, phase.decay_from) == (1e-4, 4e-4, 1)
    assert recipe.data.min_scale == 1


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("width",), "wide", "width is 'wide'"),
        (("data", "crop"), 200, "data.crop is 200"),
        (("data", "max_scale"), 0.5, "data.max_scale is 0.5"),
        (("modulation",), "adain", "modulation is 'adain', expected spm or spade"),
        (("stages",), 2, "stages is 2, expected 3 or 1"),
        (("stages",), True, "stages is True"),
        (("stages",), 1, r"schedule.stages is \(1,\)"),
        (("schedule", 2, "decay_from"), 1.5, "decay_from is 1.5"),
        (("data", "root"), None, "data.root is None"),
        (("loss", "perceptual_network"), "resnet", "perceptual_network is 'resnet'"),
        (("schedule", 0, "stages"), [0, 10**12], r"stages is \(0, 1000000000000\)"),  # once took terabytes
        (("schedule", 0, "stages"), [0, 2], r"stages is \(0, 2\)"),
        (("schedule", 1, "batch"), 0, "batch is 0"),
        (("data", "mask_kinds"), ["moon"], "data.mask_kinds is 'moon', expected kinds among strokes"),
        (("data", "mask_kinds"), [], "at least one kind"),
        (("report_images",), 0, "report_images is 0, expected at least one sample"),
        (("validate_images",), 0, "validate_images is 0"),
        (("checkpoint_seconds",), -1, "checkpoint_seconds is -1"),
        (("width",), 10**9, "width is 1000000000"),
        (("seed",), -1, "seed is -1"),
        (("bf16",), 1, "bf16 is 1"),
        (("color",), 1, "color"),
    ],
)
def test_from_json_bad_value_is_named(path: tuple[Any, ...], value: Any, named: str) -> None:
    fields = json.loads(json.dumps(to_json(config())))
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=named) as caught:
        from_json(fields, "run/config.json")
    assert caught.value.problem.startswith("run/config.json: ")


def test_from_json_missing_field_is_named() -> None:
    fields = to_json(config())
    del fields["data"]
    with pytest.raises(InputError, match="data"):
        from_json(fields, "config.json")


def test_from_json_other_schema_is_refused() -> None:
    with pytest.raises(InputError, match="schema is None"):
        from_json({}, "config.json")


def test_phase_assignment_is_refused() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Phase((0,), 1, 1).batch = 2  # type: ignore[misc]
