"""The training loop of all schedules.

A phase trains neighboring stages; the coarser stages are frozen at their averaged weights. The joint
recipe of the paper is a single phase of all three stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.datasets.samples import Batch, HostBatch, TrainingSamples
from spmdeploy.errors import InputError, OutOfMemoryError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.imaging.files import write_image
from spmdeploy.model.generator import Generator, GeneratorConfig, composite
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training import distributed
from spmdeploy.training import projected_discriminator as projected
from spmdeploy.training.config import ADAM_BETAS, Phase, TrainConfig
from spmdeploy.training.contact_sheets import sample_sheet
from spmdeploy.training.ema import (
    grow_stage,
    inherit_discriminator,
    initialize,
    training_generator,
    update_ema,
)
from spmdeploy.training.loader import BackgroundLoader
from spmdeploy.training.logging import ScalarWriter, open_tensorboard, write_record
from spmdeploy.training.losses import (
    Discriminator,
    choose_crops,
    cut_crops,
    hinge_discriminator,
    hinge_generator,
    masked_l1,
)
from spmdeploy.training.perceptual import Lpips, build_perceptual_loss
from spmdeploy.training.projected_discriminator import EfficientNetFeatures, FeaturePair, ProjectedDiscriminator
from spmdeploy.training.run_dir import CHECKPOINT_HINT, RunDirectory
from spmdeploy.training.state import TrainState, restore_moments, restore_progress, restore_weights
from spmdeploy.training.style_loss import class_style_loss, find_style_pairs
from spmdeploy.training.validation import validate

DIVERGED_ABOVE = 1e4
"""A loss above this means divergence; those of the recipe stay far below."""
SHEET_ROWS = 10
"""Validation images on a sample sheet: two of each mask kind."""
STYLE_SCALES = 3
"""Feature scales that the style loss compares; the fourth and coarsest has too few cells per class."""
MIN_RATE = 0.05
"""A decaying rate ends at this part of the phase's rate."""

Network = TypeVar("Network", bound=nn.Module)
Report = Callable[[dict[str, Any]], None]


class StageOutput(NamedTuple):
    """One stage's part in a step; all float, at the stage's size."""

    raw: Tensor
    """(N, 3, h, w), the stage's own output, with gradients."""
    target: Tensor
    """(N, 3, h, w), the photo."""
    mask: Tensor
    """(N, 1, h, w), 1 = edit."""
    edited: Tensor
    """(N, 3, h, w), `raw` under the mask, the photo elsewhere."""


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
        self._compiled: dict[nn.Module, Callable[..., Tensor]] = {}
        if config.compile and config.channels_last and device.type == "cpu":
            # torch 2.13: the backward of replicate padding returns another memory format than the compiler expects.
            raise UsageError("compile and channels_last exclude each other on a CPU", "leave one of them out")
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        torch.manual_seed(config.seed)
        self.samples = TrainingSamples(config.data, config.seed)
        start = None if config.start_weights is None else Path(config.start_weights)
        generator = GeneratorConfig(
            len(self.samples.classes), config.width, config.hidden, config.modulation, config.stages
        )
        self.generator = self._placed(training_generator(generator, start))
        self.averaged = self._placed(Generator(generator).eval().requires_grad_(False))
        self.features: EfficientNetFeatures | None = None
        self.discriminators: nn.ModuleList
        if config.discriminator == "projected":
            self.features = self._placed(EfficientNetFeatures().eval())
            self.discriminators = nn.ModuleList([ProjectedDiscriminator(generator.classes, config.discriminator_width)])
        else:
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
            trained = list(self._projected_discriminator().heads.parameters())
        self._discriminator_optimizer = self._adam(trained, phase.discriminator_rate)

    def _parameters(self, networks: nn.ModuleList) -> list[nn.Parameter]:
        return [parameter for index in self.phase.stages for parameter in networks[index].parameters()]

    def _adam(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=rate, betas=ADAM_BETAS[self.config.discriminator], fused=True)

    def _projected_discriminator(self) -> ProjectedDiscriminator:
        discriminator = self.discriminators[0]
        assert isinstance(discriminator, ProjectedDiscriminator)
        return discriminator

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
            outputs = self._stage_outputs(batch, layout)
            pair = self._feature_pair(outputs, layout, positions)
        losses: dict[str, Tensor] = {}
        if self.config.loss.adversarial:
            self._train_discriminators(True)
            losses["discriminator"] = self._discriminator_loss(outputs, layout, pair)
            optimizer_step(self._discriminator_optimizer, losses["discriminator"])
            self._train_discriminators(False)
        if not warming_up:
            parts = self._reconstruction_losses(outputs, host, positions)
            if self.config.loss.adversarial:
                parts["adversarial"] = self._adversarial_weight() * self._adversarial_loss(outputs, layout, pair)
            if pair is not None:
                parts.update(self._feature_losses(pair, host))
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

    def _stage_outputs(self, batch: Batch, layout: LayoutPyramid) -> dict[int, StageOutput]:
        """Outputs of the trained stages, whose inputs come from the frozen ones before them."""
        outputs: dict[int, StageOutput] = {}
        coarser: Tensor | None = None
        for index in range(self.phase.stages[-1] + 1):
            trained = index in self.phase.stages
            with self._autocast(), torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                generator = self.generator if trained else self.averaged
                image = generator.stage_input(index, batch.image, layout, coarser)
                coarser = self._call(generator.stages[index], self._ordered(image), layout)
            if trained:
                target = downsample(batch.image, self.generator.config.halvings(index))
                mask = layout.mask_at(*target.shape[-2:])
                outputs[index] = StageOutput(coarser, target, mask, composite(coarser.float(), target, mask))
        return outputs

    def _feature_pair(
        self, outputs: dict[int, StageOutput], layout: LayoutPyramid, positions: range
    ) -> FeaturePair | None:
        """What the projected discriminator compares, of the finest stage; None with patch discriminators."""
        if self.features is None:
            return None
        finest = outputs[max(outputs)]
        seen = torch.cat((layout.one_hot_at(*finest.mask.shape[-2:]), finest.mask), dim=1)
        (real, fake), seen = projected.augment((finest.target, finest.edited), seen, positions)
        with self._autocast():
            with torch.no_grad():
                of_photo = self.features(self._ordered(real))
            return FeaturePair(of_photo, self.features(self._ordered(fake)), seen)

    def _train_discriminators(self, learn: bool) -> None:
        trained = self.discriminators if self.features is None else self._projected_discriminator().heads
        trained.requires_grad_(learn)

    def _discriminator_loss(
        self, outputs: dict[int, StageOutput], layout: LayoutPyramid, pair: FeaturePair | None
    ) -> Tensor:
        if pair is not None:
            with self._autocast():
                return projected.discriminator_loss(self._projected_discriminator(), pair)
        losses = []
        for index, output in outputs.items():
            with self._autocast():
                real = self._call(self.discriminators[index], self._ordered(output.target), layout)
                fake = self._call(self.discriminators[index], self._ordered(output.edited.detach()), layout)
            losses.append(hinge_discriminator(real, fake))
        return torch.stack(losses).sum()

    def _adversarial_loss(
        self, outputs: dict[int, StageOutput], layout: LayoutPyramid, pair: FeaturePair | None
    ) -> Tensor:
        """The generator's side, summed over the stages or the scales."""
        if pair is not None:
            with self._autocast():
                return projected.generator_loss(self._projected_discriminator(), pair)
        losses = []
        for index, output in outputs.items():
            with self._autocast():
                score = self._call(self.discriminators[index], self._ordered(output.edited), layout)
            losses.append(hinge_generator(score))
        return torch.stack(losses).sum()

    def _adversarial_weight(self) -> float:
        loss = self.config.loss
        if not loss.adversarial_ramp:
            return loss.adversarial
        done = self.progress.phase_images + self.phase.batch - loss.adversarial_warmup
        return loss.adversarial * min(1.0, done / loss.adversarial_ramp)

    def _reconstruction_losses(
        self, outputs: dict[int, StageOutput], host: HostBatch, positions: range
    ) -> dict[str, Tensor]:
        """Weighted L1 and perceptual loss, each summed over the stages."""
        weights = self.config.loss
        parts: dict[str, list[Tensor]] = {"l1": [], "perceptual": []}
        for index, output in outputs.items():
            parts["l1"].append(weights.l1 * masked_l1(output.raw, output.target, output.mask, weights.l1_inside))
            if self.perceptual is None or (weights.perceptual_stages == "finest" and index != max(outputs)):
                continue
            side, step = self.phase.perceptual_crop, 2 ** self.generator.config.halvings(index)
            corners = choose_crops(host.mask.numpy()[:, ::step, ::step], side, positions)
            compared, target = (cut_crops(image, corners, side) for image in (output.raw, output.target))
            with self._autocast():
                distance = self.perceptual(self._ordered(compared), self._ordered(target), self.phase.perceptual_blocks)
            parts["perceptual"].append(weights.perceptual * distance)
        return {name: torch.stack(losses).sum() for name, losses in parts.items() if losses}

    def _feature_losses(self, pair: FeaturePair, host: HostBatch) -> dict[str, Tensor]:
        """Weighted losses on the projected discriminator's pretrained features."""
        weights = self.config.loss
        parts = {}
        if weights.feature_matching:
            parts["feature_matching"] = weights.feature_matching * projected.feature_matching_loss(pair)
        if weights.style:
            pairs = find_style_pairs(host.labels.numpy(), host.mask.numpy(), self.generator.config.classes)
            self.progress.style_pairs += len(pairs)
            self.progress.style_skipped += pairs.skipped
            scales = slice(STYLE_SCALES)
            style = class_style_loss(pair.fake[scales], pair.real[scales], pair.one_hot, pair.mask, pairs)
            parts["style"] = weights.style * style
        return parts

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
            with self._autocast():
                image = self.averaged.stage_input(index, batch.image, layout, coarser)
                coarser = self.averaged.stages[index](self._ordered(image), layout)
            size = batch.image.shape[-2:]
            full = F.interpolate(coarser.float(), size=size, mode="bilinear", align_corners=False)
            edited.append(composite(full, batch.image, batch.mask))
        return edited

    def save(self) -> None:
        """Stores a checkpoint and the averaged weights. Raises SpmDeployError when the training has diverged."""
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
            InputError: The checkpoint is damaged, or is one of another configuration.
        """
        state = self.run.load_checkpoint()
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

    def _call(self, network: nn.Module, image: Tensor, layout: LayoutPyramid) -> Tensor:
        """Calls a network; with `compile` through torch.compile, which compiles it at the first call."""
        if not self.config.compile:
            output: Tensor = network(image, layout)
            return output
        if network not in self._compiled:
            # Static shapes: code for any batch size may round differently from what a resumed run compiles for its own.
            # On a CPU the compiler must keep memory formats, see above.
            untouched: dict[str, str | int | bool | Callable[..., Any]] = {"layout_optimization": False}
            options = untouched if self.device.type == "cpu" else None
            self._compiled[network] = torch.compile(network, dynamic=False, options=options)
        try:
            return self._compiled[network](image, layout)
        except torch._dynamo.exc.BackendCompilerFailed as exc:
            reason = " ".join(str(exc).split())[:200]
            raise UnavailableError(
                f"torch.compile does not work here: {reason}",
                "it needs a C++ compiler, on a GPU also Triton; or leave compile out",
            ) from exc

    def _placed(self, network: Network) -> Network:
        network.to(self.device)
        network.to(memory_format=self._memory_format)  # type: ignore[call-overload]  # missing from torch's stubs
        return network

    def _layout(self, batch: Batch) -> LayoutPyramid:
        return LayoutPyramid(batch.labels, batch.instances, batch.mask, self.generator.config.classes)

    def _ordered(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=self._memory_format)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Computes gradients, averages them over the processes and takes one step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    distributed.average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step()


def downsample(image: Tensor, halvings: int) -> Tensor:
    """The target of a stage: float (N, 3, H, W) to the stage's size, bilinear as in the generator."""
    if not halvings:
        return image
    return F.interpolate(image, scale_factor=0.5**halvings, mode="bilinear", align_corners=False)


def train(config: TrainConfig, output: Path, resume: bool, report: Report, device: str = "cpu") -> int:
    """Trains in a run directory. Works under torchrun too.

    Args:
        config: What to train.
        output: The run directory.
        resume: Continue from its last checkpoint.
        report: Gets each record of the metrics.
        device: cpu, cuda or cuda:N.

    Returns:
        The samples of the run.

    Raises:
        SpmDeployError: Names what cannot be used, or the loss that diverged.
    """
    place = distributed.local_device(device)
    distributed.init(place)
    run = RunDirectory(output)
    try:
        trainer = Trainer(config, run, place)
        if trainer.is_main_process and not resume:
            run.start(config)
        with run.lock() if trainer.is_main_process else nullcontext():
            if resume:
                trainer.resume()
            trainer.train(report)
    except torch.OutOfMemoryError as exc:
        raise OutOfMemoryError(
            f"{place} has too little memory", "take a smaller batch, a smaller crop or bf16"
        ) from exc
    distributed.shutdown()
    return trainer.progress.images
