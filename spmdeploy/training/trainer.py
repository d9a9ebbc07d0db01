"""Trains a generator: the loop over phases and steps, optimizers, validation and checkpoints.

A phase trains neighboring stages; the coarser stages are frozen at their averaged weights. The joint
recipe of the paper is a single phase of all three stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.datasets.samples import Batch, HostBatch, TrainingSamples
from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UnavailableError
from spmdeploy.imaging.files import write_image
from spmdeploy.model.generator import Generator, GeneratorConfig, composite
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training import distributed
from spmdeploy.training.config import ADAM_BETAS, Phase, TrainConfig
from spmdeploy.training.contact_sheets import sample_sheet
from spmdeploy.training.ema import (
    grow_stage,
    inherit_discriminator,
    initialize,
    training_generator,
    update_ema,
)
from spmdeploy.training.execution import Execution
from spmdeploy.training.loader import BackgroundLoader
from spmdeploy.training.logging import ScalarWriter, open_tensorboard, write_record
from spmdeploy.training.losses import (
    Discriminator,
)
from spmdeploy.training.objectives import Objectives
from spmdeploy.training.perceptual import Lpips
from spmdeploy.training.projected_discriminator import EfficientNetFeatures, ProjectedDiscriminator
from spmdeploy.training.run_dir import CHECKPOINT_HINT, RunDirectory
from spmdeploy.training.state import TrainState, restore_moments, restore_progress, restore_weights
from spmdeploy.training.validation import validate

DIVERGED_ABOVE = 1e4
"""A loss above this means divergence; those of the recipe stay far below."""
SHEET_ROWS = 10
"""Validation images on a sample sheet: two of each mask kind."""
MIN_RATE = 0.05
"""A decaying rate ends at this part of the phase's rate."""

SHARED_HINT = "give an --output that all nodes share"

Report = Callable[[dict[str, Any]], None]


class UnreadLosses(NamedTuple):
    """The losses of one step while they are still on the device."""

    step: int
    images: int
    values: dict[str, Tensor]


class Trainer:
    """Networks, optimizers and position of a run.

    Args:
        config: What to train.
        run: Where to store it.
        device: Of this process.

    Raises:
        SpmDeployError: Data, weights or a package are missing or unusable.
    """

    def __init__(self, config: TrainConfig, run: RunDirectory, device: torch.device) -> None:
        self.config = config
        self.run = run
        self.device = device
        self.progress = TrainState()
        self._tensorboard: ScalarWriter | None = None
        self._loader: BackgroundLoader[HostBatch] | None = None
        self._unread: list[UnreadLosses] = []
        self._execution = Execution(config, device)
        torch.manual_seed(config.seed)
        self.samples = TrainingSamples(config.data, config.seed)
        start = None if config.start_weights is None else Path(config.start_weights)
        generator = GeneratorConfig(
            len(self.samples.classes), config.width, config.hidden, config.modulation, config.stages
        )
        self.generator = self._execution.place(training_generator(generator, start))
        self.averaged = self._execution.place(Generator(generator).eval().requires_grad_(False))
        self.features: EfficientNetFeatures | None = None
        self.discriminators: nn.ModuleList
        if config.discriminator == "projected":
            self.features = self._execution.place(EfficientNetFeatures().eval())
            self.discriminators = nn.ModuleList([ProjectedDiscriminator(generator.classes, config.discriminator_width)])
        else:
            self.discriminators = nn.ModuleList(
                Discriminator(generator.classes, generator.halvings(stage), config.discriminator_width)
                for stage in range(config.stages)
            )
            initialize(self.discriminators)
        self._execution.place(self.discriminators)
        self._objectives = Objectives(
            config.loss, self._execution, self.generator, self.averaged, self.discriminators, self.features
        )
        self.lpips = self._execution.place(Lpips()) if config.data.validation else None
        update_ema(self.averaged, self.generator, range(config.stages), decay=0.0)
        self._begin_phase()

    @property
    def phase(self) -> Phase:
        """The current phase of the schedule."""
        return self.config.schedule[self.progress.phase]

    @property
    def last_trained_stage(self) -> int:
        """The finest stage that has been trained so far."""
        return max(phase.stages[-1] for phase in self.config.schedule[: self.progress.phase + 1])

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run directory."""
        return distributed.rank() == 0

    def train(self, report: Report) -> None:
        """Runs to the end of the schedule. `report` gets each record of the metrics."""
        if self.config.tensorboard and self.is_main_process:
            self._tensorboard = open_tensorboard(self.run.path, self.progress.images)
        saved = time.monotonic()
        while True:
            losses: dict[str, float] = {}
            while self.progress.phase_images < self.phase.images:
                started = time.monotonic()
                self.step()
                self.progress.phase_seconds += time.monotonic() - started
                # All processes take the same branches up to here: reading losses and validating are joint operations.
                reports = self._crossed_interval(self.config.report_images)
                if reports or self.progress.steps % self.config.check_steps == 0:
                    losses = self.read_losses()
                    if reports:
                        self._log(report, "train", losses)
                if self._crossed_interval(self.config.validate_images):
                    self.validate(report)
                if self.is_main_process and time.monotonic() - saved > self.config.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
            # A phase that is shorter than an interval gets a record too.
            if (losses := self.read_losses() or losses) and not self._crossed_interval(self.config.report_images):
                self._log(report, "train", losses)
            if not self._crossed_interval(self.config.validate_images):
                self.validate(report)
            more = self._next_phase()
            if self.is_main_process:
                self.save()
            if not more:
                self._close_loader()
                return

    def _crossed_interval(self, interval: int) -> bool:
        """Whether the last step crossed a multiple of `interval` images."""
        return self.progress.images // interval != (self.progress.images - self.phase.batch) // interval

    def _log(self, report: Report, kind: str, metrics: dict[str, float]) -> None:
        if not self.is_main_process:
            return
        counts = {"style_skipped": self.progress.style_skipped} if self.config.loss.style and kind == "train" else {}
        record = {
            "kind": kind,
            "images": self.progress.images,
            "phase": self.progress.phase,
            "phase_images": self.progress.phase_images,
            "seconds": round(self.progress.phase_seconds, 1),
            **metrics,
            **counts,
        }
        self.run.log(**record)
        if self._tensorboard is not None:
            write_record(self._tensorboard, record)
        report(record)

    def _begin_phase(self) -> None:
        """Inherits weights, freezes what the phase does not train, and creates its optimizers."""
        phase = self.phase
        first = phase.stages[0]
        self._close_loader()
        if phase.inherit and first:
            grow_stage(self.generator, self.averaged, first)
            if self.features is None:
                inherit_discriminator(self.discriminators[first], self.discriminators[first - 1])
            update_ema(self.averaged, self.generator, phase.stages, decay=0.0)
        self.generator.zero_grad(set_to_none=True)
        for index, stage in enumerate(self.generator.stages):
            stage.requires_grad_(index in phase.stages)
        trained = self._parameters(self.generator.stages)
        self._generator_optimizer = self._adam(trained, phase.generator_rate)
        if self.features is None:
            trained = self._parameters(self.discriminators)
        else:
            trained = list(self._objectives.projected_discriminator().heads.parameters())
        self._discriminator_optimizer = self._adam(trained, phase.discriminator_rate)

    def _parameters(self, networks: nn.ModuleList) -> list[nn.Parameter]:
        return [parameter for index in self.phase.stages for parameter in networks[index].parameters()]

    def _adam(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=rate, betas=ADAM_BETAS[self.config.discriminator], fused=True)

    def _next_phase(self) -> bool:
        """Moves on; False at the end of the schedule."""
        if self.progress.phase + 1 == len(self.config.schedule):
            return False
        self.progress.phase += 1
        self.progress.phase_images = 0
        self.progress.phase_seconds = 0.0
        self._begin_phase()
        return True

    def step(self) -> None:
        """One step of the discriminators and, after their warm-up, of the generator."""
        images = self.progress.images
        positions = distributed.shard(range(images, images + self.phase.batch))
        host = self._next_batch()
        batch = host.to(self.device)
        layout = self._layout(batch)
        self._set_rates()
        warming_up = self.progress.phase_images < self.config.loss.adversarial_warmup
        with torch.set_grad_enabled(not warming_up):
            outputs = self._objectives.stage_outputs(batch, layout, self.phase)
            pair = self._objectives.feature_pair(outputs, layout, positions)
        losses: dict[str, Tensor] = {}
        if self.config.loss.adversarial:
            self._train_discriminators(True)
            losses["discriminator"] = self._objectives.discriminator_loss(outputs, layout, pair)
            optimizer_step(self._discriminator_optimizer, losses["discriminator"])
            self._train_discriminators(False)
        if not warming_up:
            parts = self._objectives.reconstruction_losses(outputs, host, positions, self.phase)
            if self.config.loss.adversarial:
                adversarial = self._objectives.adversarial_loss(outputs, layout, pair)
                parts["adversarial"] = self._adversarial_weight() * adversarial
            if pair is not None:
                parts.update(self._objectives.feature_losses(pair, host, self.progress))
            losses.update(parts)
            optimizer_step(self._generator_optimizer, torch.stack(list(parts.values())).sum())

        self.progress.images += self.phase.batch
        self.progress.phase_images += self.phase.batch
        self.progress.steps += 1
        values = {name: loss.detach() for name, loss in losses.items()}
        self._unread.append(UnreadLosses(self.progress.steps - 1, images, values))
        if not warming_up:
            update_ema(self.averaged, self.generator, self.phase.stages, self._averaging_decay())

    def _next_batch(self) -> HostBatch:
        """The batch at the current position, prepared ahead by the loader's threads."""
        if self._loader is None:
            end = self.progress.images + self.phase.images - self.progress.phase_images
            workers = self.config.loader_workers
            self._loader = BackgroundLoader(self._load, self.progress.images, self.phase.batch, workers, end)
        return next(self._loader)

    def _load(self, position: int) -> HostBatch:
        batch = self.samples.host_batch(distributed.shard(range(position, position + self.phase.batch)))
        return batch.pin() if self.device.type == "cuda" else batch

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _train_discriminators(self, learn: bool) -> None:
        trained = self.discriminators if self.features is None else self._objectives.projected_discriminator().heads
        trained.requires_grad_(learn)

    def _adversarial_weight(self) -> float:
        loss = self.config.loss
        if not loss.adversarial_ramp:
            return loss.adversarial
        done = self.progress.phase_images + self.phase.batch - loss.adversarial_warmup
        return loss.adversarial * min(1.0, done / loss.adversarial_ramp)

    def read_losses(self) -> dict[str, float]:
        """The losses of the last step as numbers, averaged over the processes; checks those of all steps since.

        Raises:
            SpmDeployError: one of them shows that the training has diverged.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return {}
        flat = torch.stack([value.float() for losses in unread for value in losses.values.values()])
        numbers = iter(distributed.average(flat).tolist())
        values: dict[str, float] = {}
        for losses in unread:
            values = {name: next(numbers) for name in losses.values}
            self._check_finite(values, losses)
        return values

    def _check_finite(self, values: dict[str, float], losses: UnreadLosses) -> None:
        for name, value in values.items():
            if not math.isfinite(value) or abs(value) > DIVERGED_ABOVE:
                raise SpmDeployError(
                    f"training diverged: the {name} loss is {value} at step {losses.step}, "
                    f"after {losses.images} images",
                    f"the last good checkpoint is {self.run.checkpoint}; lower the rates, then resume",
                )

    def _set_rates(self) -> None:
        phase = self.phase
        done = self.progress.phase_images / phase.images
        factor = 1.0
        if done > phase.decay_from:
            factor = 1 - (1 - MIN_RATE) * (done - phase.decay_from) / (1 - phase.decay_from)
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

    def validate(self, report: Report) -> None:
        """Logs metrics and a sample sheet of the averaged weights on the held-out images; exports the best weights."""
        if self.lpips is None:
            return
        samples = self.samples.validation_samples()
        result = validate(samples, self.edited_by_stage, self.lpips, self.device)
        improved = result.lpips < self.progress.best
        self.progress.best = min(self.progress.best, result.lpips)
        if not self.is_main_process:
            return
        self._log(report, "validation", {"lpips": round(result.lpips, 5), "l1": round(result.l1, 5)})
        page = sample_sheet(samples[:SHEET_ROWS], result.stages, self.samples.classes)
        write_image(self.run.sample_sheet(self.progress.images), page, overwrite=True)
        if improved:
            self.run.export(self.averaged, "best")

    @torch.no_grad()
    def edited_by_stage(self, batch: Batch) -> list[Tensor]:
        """Each trained stage's averaged output at full size, known pixels restored: float (N, 3, S, S) in [-1, 1]."""
        layout = self._layout(batch)
        coarser: Tensor | None = None
        edited = []
        for index in range(self.last_trained_stage + 1):
            with self._execution.autocast():
                image = self.averaged.stage_input(index, batch.image, layout, coarser)
                coarser = self.averaged.stages[index](self._execution.reorder(image), layout)
            size = batch.image.shape[-2:]
            full = F.interpolate(coarser.float(), size=size, mode="bilinear", align_corners=False)
            edited.append(composite(full, batch.image, batch.mask))
        return edited

    def save(self) -> None:
        """Stores a checkpoint and the averaged weights.

        Raises:
            SpmDeployError: The training has diverged.
        """
        for losses in self._unread:
            self._check_finite({name: value.item() for name, value in losses.values.items()}, losses)
        self.run.save_checkpoint(
            {
                "discriminator": self.config.discriminator,
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
        """Restores the last checkpoint; starts from the beginning when there is none yet.

        Raises:
            InputError: The checkpoint is damaged, gone, or one of another configuration.
        """
        state = self.run.load_checkpoint()
        if state is None and (exported := self.run.path / "export").exists():  # these come after a checkpoint
            raise InputError(
                f"{self.run.checkpoint}: is gone; starting again would overwrite {exported} and the metrics",
                CHECKPOINT_HINT,
            )
        if state is not None:
            try:
                self._restore(state)
            except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as exc:
                reason = " ".join(str(exc).split())[:200]
                raise InputError(
                    f"{self.run.checkpoint}: does not fit the run's config.json: {reason}", CHECKPOINT_HINT
                ) from exc
        if self.is_main_process:
            self.run.drop_metrics_after(self.progress.images)

    def _restore(self, state: dict[str, Any]) -> None:
        stored = state.get("discriminator", "patch")  # checkpoints from before the choice hold patch discriminators
        if stored != self.config.discriminator:
            raise InputError(
                f"{self.run.checkpoint}: holds a {stored} discriminator, "
                f"config.json asks for a {self.config.discriminator} one",
                "put discriminator back, or start a new run with start_weights set to this run's export",
            )
        self.progress = restore_progress(state["progress"], self.config.schedule)
        self._begin_phase()  # optimizers of the right shape; what it inherits is overwritten below
        for name in ("generator", "averaged", "discriminators"):
            restore_weights(getattr(self, name), state[name], name)
        restore_moments(self._generator_optimizer, state["generator_optimizer"])
        restore_moments(self._discriminator_optimizer, state["discriminator_optimizer"])
        torch.set_rng_state(state["random"])

    def _layout(self, batch: Batch) -> LayoutPyramid:
        return LayoutPyramid(batch.labels, batch.instances, batch.mask, self.generator.config.classes)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Computes gradients, averages them over the processes and takes one step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    distributed.average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step()


def train(
    config: TrainConfig,
    output: Path,
    resume: bool,
    report: Report,
    device: str = "cpu",
    timeout: float = distributed.TIMEOUT,
) -> int:
    """Trains in a run directory. Works under torchrun too; processes that it restarts resume the run.

    Args:
        config: What to train.
        output: The run directory.
        resume: Continue from its last checkpoint.
        report: Gets each record of the metrics.
        device: cpu, cuda or cuda:N.
        timeout: Seconds that a process waits for the others.

    Returns:
        The samples of the run.

    Raises:
        SpmDeployError: Names what cannot be used, or the loss that diverged.
    """
    place = distributed.local_device(device)
    run, job = RunDirectory(output), distributed.job()
    try:
        distributed.init(place, timeout)
        continues = resume or run.belongs_to(job) or (distributed.was_restarted() and run.has_begun)
        if distributed.from_main(continues) and not resume:
            resume, config = True, run.config()
        trainer = Trainer(config, run, place)
        if trainer.is_main_process and not resume:
            run.start(config, job)
        with run.lock() if trainer.is_main_process else nullcontext():
            if resume:
                trainer.resume()
                distributed.check_equal(trainer.progress.images, "checkpoints, by their samples", SHARED_HINT)
            trainer.train(report)
    except distributed.PeerLostError as exc:
        last = f"the last good checkpoint is {run.checkpoint}" if run.checkpoint.exists() else "there is no checkpoint"
        raise UnavailableError(f"{exc.problem}; {last}", "continue with --resume, on any number of nodes") from exc
    except torch.OutOfMemoryError as exc:
        raise OutOfMemoryError(
            f"{place} has too little memory", "take a smaller batch, a smaller crop or bf16"
        ) from exc
    distributed.shutdown()
    return trainer.progress.images
