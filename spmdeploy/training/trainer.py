"""The training loop: one for every schedule.

A phase trains a run of neighboring stages; the coarser stages before them are frozen at their averaged weights. The
paper's joint recipe is a single phase of all three stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.datasets.folder import Batch, TrainingSamples
from spmdeploy.errors import OutOfMemoryError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.imaging.files import write_picture
from spmdeploy.model.generator import Generator, GeneratorConfig, composite
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training import distributed as processes
from spmdeploy.training.board import ScalarWriter, open_board, write_record
from spmdeploy.training.config import Phase, TrainConfig
from spmdeploy.training.contact_sheets import sample_sheet
from spmdeploy.training.discriminator import Discriminator
from spmdeploy.training.ema import (
    grow_stage,
    inherit_discriminator,
    initialize,
    training_generator,
    update_ema,
)
from spmdeploy.training.losses import crop_around_mask, hinge_discriminator, hinge_generator, masked_l1
from spmdeploy.training.perceptual import Lpips, build_perceptual_loss
from spmdeploy.training.run_dir import RunDirectory
from spmdeploy.training.validation import judge

DIVERGED_ABOVE = 1e4
"""No loss of the recipe is ever near this; a run that gets here does not come back."""
SHEET_ROWS = 10
"""Validation pictures on a sample sheet: two of each kind of hole."""
LOWEST_RATE = 0.05
"""What a decaying rate ends at, in parts of the phase's rate."""
ADAM_BETAS = (0.5, 0.999)

Network = TypeVar("Network", bound=nn.Module)
Report = Callable[[dict[str, Any]], None]


@dataclass
class TrainState:
    """Where the run is."""

    phase: int = 0
    """Index of the current phase."""
    phase_images: int = 0
    """Samples of the current phase that are done."""
    images: int = 0
    """Samples of the run that are done."""
    steps: int = 0
    """Optimizer steps of the run."""
    phase_seconds: float = 0.0
    """Wall time of the current phase's steps."""
    best: float = math.inf
    """Lowest validation LPIPS so far."""


class StageOutput(NamedTuple):
    """One stage's part in a step; all float, at the stage's size."""

    raw: Tensor
    """(N, 3, h, w), the stage's own picture, with gradients."""
    target: Tensor
    """(N, 3, h, w), the photo."""
    mask: Tensor
    """(N, 1, h, w), 1 = edit."""
    edited: Tensor
    """(N, 3, h, w), `raw` under the mask, the photo elsewhere."""


class Trainer:
    """Networks, optimizers and position of a run; `train` brings it to its end."""

    def __init__(self, config: TrainConfig, run: RunDirectory, device: torch.device) -> None:
        self.config = config
        self.run = run
        self.device = device
        self.progress = TrainState()
        self._board: ScalarWriter | None = None
        self._compiled: dict[nn.Module, Callable[..., Tensor]] = {}
        if config.compile and config.channels_last and device.type == "cpu":
            # torch 2.13: the backward of replicate padding answers in another memory order than the compiler was told.
            raise UsageError("compile and channels_last exclude each other on a CPU", "leave one of them out")
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        torch.manual_seed(config.seed)
        self.samples = TrainingSamples(config.data, config.seed)
        generator = GeneratorConfig(
            len(self.samples.classes), config.width, config.hidden, config.modulation, config.stages
        )
        self.generator = self._placed(training_generator(generator))
        self.averaged = self._placed(Generator(generator).eval().requires_grad_(False))
        self.discriminators = nn.ModuleList(
            Discriminator(generator.classes, generator.halvings(stage), config.discriminator_width)
            for stage in range(config.stages)
        )
        initialize(self.discriminators)
        self._placed(self.discriminators)
        self.perceptual = self._placed(build_perceptual_loss(config.loss)) if config.loss.perceptual else None
        self.lpips = self._placed(Lpips()) if config.data.validation else None
        update_ema(self.averaged, self.generator, range(config.stages), decay=0.0)
        self._begin_phase()

    @property
    def phase(self) -> Phase:
        return self.config.schedule[self.progress.phase]

    @property
    def last_trained_stage(self) -> int:
        """The finest stage that has learnt so far."""
        return max(phase.stages[-1] for phase in self.config.schedule[: self.progress.phase + 1])

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run directory."""
        return processes.rank() == 0

    # -- the whole run

    def train(self, report: Report) -> None:
        """Runs to the end of the schedule. `report` gets each record that goes to the metrics."""
        if self.config.tensorboard and self.is_main_process:
            self._board = open_board(self.run.path, self.progress.images)
        saved = time.monotonic()
        while True:
            while self.progress.phase_images < self.phase.images:
                started = time.monotonic()
                losses = self.step()
                self.progress.phase_seconds += time.monotonic() - started
                if not self.is_main_process:
                    continue
                if self._crossed_interval(self.config.report_images):
                    self._log(report, "train", losses)
                if self._crossed_interval(self.config.validate_images):
                    self.validate(report)
                if time.monotonic() - saved > self.config.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            if self.is_main_process and not self._crossed_interval(self.config.validate_images):
                self.validate(report)
            more = self._next_phase()
            if self.is_main_process:
                self.save()
            if not more:
                return

    def _crossed_interval(self, interval: int) -> bool:
        """Whether the last step crossed a multiple of `interval` images."""
        return self.progress.images // interval != (self.progress.images - self.phase.batch) // interval

    def _log(self, report: Report, kind: str, figures: dict[str, float]) -> None:
        record = {
            "kind": kind,
            "images": self.progress.images,
            "phase": self.progress.phase,
            "phase_images": self.progress.phase_images,
            "seconds": round(self.progress.phase_seconds, 1),
            **figures,
        }
        self.run.log(**record)
        if self._board is not None:
            write_record(self._board, record)
        report(record)

    # -- phases

    def _begin_phase(self) -> None:
        """Weights to inherit, what learns, and fresh optimizers."""
        phase = self.phase
        first = phase.stages[0]
        if phase.inherit and first:
            grow_stage(self.generator, self.averaged, first)
            inherit_discriminator(self.discriminators[first], self.discriminators[first - 1])
            update_ema(self.averaged, self.generator, phase.stages, decay=0.0)
        self.generator.zero_grad(set_to_none=True)
        for index, stage in enumerate(self.generator.stages):
            stage.requires_grad_(index in phase.stages)
        self._generator_optimizer = self._adam(self.generator.stages, phase.generator_rate)
        self._discriminator_optimizer = self._adam(self.discriminators, phase.discriminator_rate)

    def _adam(self, networks: nn.ModuleList, rate: float) -> torch.optim.Adam:
        learning = [parameter for index in self.phase.stages for parameter in networks[index].parameters()]
        return torch.optim.Adam(learning, lr=rate, betas=ADAM_BETAS)

    def _next_phase(self) -> bool:
        """Moves on; False at the end of the schedule."""
        if self.progress.phase + 1 == len(self.config.schedule):
            return False
        self.progress.phase += 1
        self.progress.phase_images = 0
        self.progress.phase_seconds = 0.0
        self._begin_phase()
        return True

    # -- one step

    def step(self) -> dict[str, float]:
        """One step of discriminators and generator; returns the losses. Raises SpmDeployError on divergence."""
        images = self.progress.images
        positions = processes.shard(range(images, images + self.phase.batch))
        batch = self.samples.batch(positions).to(self.device)
        layout = self._layout(batch)
        self._set_rates()
        outputs = self._stage_outputs(batch, layout)
        losses: dict[str, float] = {}
        if self.config.loss.adversarial:
            self.discriminators.requires_grad_(True)
            loss = self._discriminator_loss(outputs, layout)
            losses.update(self._check_finite({"discriminator": loss}))
            optimizer_step(self._discriminator_optimizer, loss)
            self.discriminators.requires_grad_(False)
        parts = self._generator_losses(outputs, layout, positions)
        losses.update(self._check_finite(parts))
        optimizer_step(self._generator_optimizer, torch.stack(list(parts.values())).sum())

        self.progress.images += self.phase.batch
        self.progress.phase_images += self.phase.batch
        self.progress.steps += 1
        update_ema(self.averaged, self.generator, self.phase.stages, self._averaging_decay())
        return losses

    def _stage_outputs(self, batch: Batch, layout: LayoutPyramid) -> dict[int, StageOutput]:
        """Of the stages that learn, fed by the frozen ones before them."""
        outputs: dict[int, StageOutput] = {}
        coarser: Tensor | None = None
        for index in range(self.phase.stages[-1] + 1):
            learns = index in self.phase.stages
            with self._autocast(), torch.set_grad_enabled(learns):
                generator = self.generator if learns else self.averaged
                picture = generator.stage_input(index, batch.image, layout, coarser)
                coarser = self._call(generator.stages[index], self._ordered(picture), layout)
            if learns:
                target = downsample(batch.image, self.generator.config.halvings(index))
                mask = layout.mask_at(*target.shape[-2:])
                outputs[index] = StageOutput(coarser, target, mask, composite(coarser.float(), target, mask))
        return outputs

    def _discriminator_loss(self, outputs: dict[int, StageOutput], layout: LayoutPyramid) -> Tensor:
        losses = []
        for index, output in outputs.items():
            with self._autocast():
                real = self._call(self.discriminators[index], self._ordered(output.target), layout)
                fake = self._call(self.discriminators[index], self._ordered(output.edited.detach()), layout)
            losses.append(hinge_discriminator(real, fake))
        return torch.stack(losses).sum()

    def _generator_losses(
        self, outputs: dict[int, StageOutput], layout: LayoutPyramid, positions: range
    ) -> dict[str, Tensor]:
        """The weighted losses, each summed over the stages."""
        weights = self.config.loss
        parts: dict[str, list[Tensor]] = {"l1": [], "adversarial": [], "perceptual": []}
        for index, output in outputs.items():
            parts["l1"].append(weights.l1 * masked_l1(output.raw, output.target, output.mask, weights.l1_inside))
            if weights.adversarial:
                with self._autocast():
                    score = self._call(self.discriminators[index], self._ordered(output.edited), layout)
                parts["adversarial"].append(weights.adversarial * hinge_generator(score))
            if self.perceptual is not None:
                found, wanted = crop_around_mask(
                    (output.raw, output.target), output.mask, self.phase.perceptual_crop, positions
                )
                with self._autocast():
                    distance = self.perceptual(
                        self._ordered(found), self._ordered(wanted), self.phase.perceptual_blocks
                    )
                parts["perceptual"].append(weights.perceptual * distance)
        return {name: torch.stack(losses).sum() for name, losses in parts.items() if losses}

    def _check_finite(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The losses as numbers, averaged over the processes. Raises SpmDeployError when one shows divergence."""
        values = dict(zip(losses, processes.average(torch.stack(list(losses.values()))).tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value) or abs(value) > DIVERGED_ABOVE:
                raise SpmDeployError(
                    f"training diverged: the {name} loss is {value} at step {self.progress.steps}, "
                    f"after {self.progress.images} images",
                    f"the last good checkpoint is {self.run.checkpoint}; lower the rates, then resume",
                )
        return values

    def _set_rates(self) -> None:
        phase = self.phase
        done = self.progress.phase_images / phase.images
        factor = 1.0
        if done > phase.decay_from:
            factor = 1 - (1 - LOWEST_RATE) * (done - phase.decay_from) / (1 - phase.decay_from)
        for optimizer, rate in (
            (self._generator_optimizer, phase.generator_rate),
            (self._discriminator_optimizer, phase.discriminator_rate),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    def _averaging_decay(self) -> float:
        """Early in a phase the average is short, so that it forgets the beginning."""
        if not self.config.ema_half_life:
            return 0.0
        half_life = min(self.config.ema_half_life, max(1.0, self.progress.phase_images / 4))
        return float(0.5 ** (self.phase.batch / half_life))

    # -- validation

    def validate(self, report: Report) -> None:
        """Figures and a sample sheet of the averaged weights on the held-out pictures; keeps the best."""
        if self.lpips is None:
            return
        samples = self.samples.validation_samples()
        verdict = judge(samples, self.edited_by_stage, self.lpips, self.device)
        self._log(report, "validation", {"lpips": round(verdict.lpips, 5), "l1": round(verdict.l1, 5)})
        page = sample_sheet(samples[:SHEET_ROWS], verdict.stages, self.samples.classes)
        write_picture(self.run.sample_sheet(self.progress.images), page, overwrite=True)
        if verdict.lpips < self.progress.best:
            self.progress.best = verdict.lpips
            self.run.export(self.averaged, "best")

    @torch.no_grad()
    def edited_by_stage(self, batch: Batch) -> list[Tensor]:
        """Each trained stage's averaged output at full size, known pixels restored: float (N, 3, S, S) in [-1, 1]."""
        layout = self._layout(batch)
        coarser: Tensor | None = None
        edited = []
        for index in range(self.last_trained_stage + 1):
            with self._autocast():
                picture = self.averaged.stage_input(index, batch.image, layout, coarser)
                coarser = self.averaged.stages[index](self._ordered(picture), layout)
            size = batch.image.shape[-2:]
            full = F.interpolate(coarser.float(), size=size, mode="bilinear", align_corners=False)
            edited.append(composite(full, batch.image, batch.mask))
        return edited

    # -- saving and resuming

    def save(self) -> None:
        """A checkpoint, and the averaged weights beside it."""
        self.run.save_checkpoint(
            {
                "progress": dict(vars(self.progress)),
                "generator": self.generator.state_dict(),
                "averaged": self.averaged.state_dict(),
                "discriminators": self.discriminators.state_dict(),
                "generator_optimizer": self._generator_optimizer.state_dict(),
                "discriminator_optimizer": self._discriminator_optimizer.state_dict(),
                "random": torch.get_rng_state(),
            }
        )
        self.run.export(self.averaged, "export")

    def resume(self) -> None:
        """Goes back to the last checkpoint, to the beginning when there is none yet."""
        state = self.run.load_checkpoint()
        if state is not None:
            self.progress = TrainState(**state["progress"])
            self._begin_phase()  # optimizers of the right shape; what it inherits is overwritten below
            self.generator.load_state_dict(state["generator"])
            self.averaged.load_state_dict(state["averaged"])
            self.discriminators.load_state_dict(state["discriminators"])
            self._generator_optimizer.load_state_dict(state["generator_optimizer"])
            self._discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
            torch.set_rng_state(state["random"])
        if self.is_main_process:
            self.run.drop_metrics_after(self.progress.images)

    # -- devices and memory

    def _call(self, network: nn.Module, picture: Tensor, layout: LayoutPyramid) -> Tensor:
        """The network's answer; with `compile` through torch.compile, which compiles what runs when it first runs."""
        if not self.config.compile:
            answer: Tensor = network(picture, layout)
            return answer
        if network not in self._compiled:
            # Static shapes: code for any batch size would round otherwise than what a resumed run compiles for its own.
            # On a CPU the compiler must leave memory orders alone, see above.
            untouched: dict[str, str | int | bool | Callable[..., Any]] = {"layout_optimization": False}
            options = untouched if self.device.type == "cpu" else None
            self._compiled[network] = torch.compile(network, dynamic=False, options=options)
        try:
            return self._compiled[network](picture, layout)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = " ".join(str(error).split())[:200]
            raise UnavailableError(
                f"torch.compile does not work here: {reason}",
                "it needs a C++ compiler, on a GPU also Triton; or leave compile out",
            ) from error

    def _placed(self, network: Network) -> Network:
        network.to(self.device)
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]  # missing from torch's stubs
        return network

    def _layout(self, batch: Batch) -> LayoutPyramid:
        return LayoutPyramid(batch.labels, batch.instances, batch.mask, self.generator.config.classes)

    def _ordered(self, picture: Tensor) -> Tensor:
        return picture.contiguous(memory_format=self._memory_format)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backward, averaged over the processes, and one step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    processes.average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step()


def downsample(image: Tensor, halvings: int) -> Tensor:
    """The truth for a stage: float (N, 3, H, W) to the stage's size, by the generator's own bilinear rule."""
    if not halvings:
        return image
    return F.interpolate(image, scale_factor=0.5**halvings, mode="bilinear", align_corners=False)


def train(config: TrainConfig, output: Path, resume: bool, report: Report, device: str = "cpu") -> None:
    """Trains in the run directory `output`; with `resume`, on from its last checkpoint. Works under torchrun too.

    device: cpu, cuda or cuda:N. Raises SpmDeployError.
    """
    place = processes.local_device(device)
    processes.join(place)
    run = RunDirectory(output)
    try:
        trainer = Trainer(config, run, place)
        if trainer.is_main_process and not resume:
            run.start(config)
        with run.held() if trainer.is_main_process else nullcontext():
            if resume:
                trainer.resume()
            trainer.train(report)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{place} has too little memory", "take a smaller batch, a smaller crop or bf16"
        ) from error
    processes.leave()
