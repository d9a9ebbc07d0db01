"""Losses of one training step: reconstruction, adversarial, feature matching and style, for every trained stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spmdeploy.datasets.samples import Batch, HostBatch
from spmdeploy.model.generator import Generator, composite
from spmdeploy.model.layout import LayoutPyramid
from spmdeploy.training import projected_discriminator as projected
from spmdeploy.training.config import LossConfig, Phase
from spmdeploy.training.execution import Execution
from spmdeploy.training.losses import choose_crops, cut_crops, hinge_discriminator, hinge_generator, masked_l1
from spmdeploy.training.perceptual import Lpips, build_perceptual_loss
from spmdeploy.training.projected_discriminator import EfficientNetFeatures, FeaturePair, ProjectedDiscriminator
from spmdeploy.training.state import TrainState
from spmdeploy.training.style_loss import class_style_loss, find_style_pairs

STYLE_SCALES = 3
"""Feature scales that the style loss compares; the fourth and coarsest has too few cells per class."""


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


class Objectives:
    """Computes the losses of the networks that it is given.

    Args:
        weights: Of the losses.
        execution: Runs the networks.
        generator: Is trained.
        averaged: Its moving average, which computes the inputs of the trained stages.
        discriminators: One patch discriminator for each stage, or one projected discriminator.
        features: The pretrained network of the projected discriminator; None with patch discriminators.
    """

    def __init__(
        self,
        weights: LossConfig,
        execution: Execution,
        generator: Generator,
        averaged: Generator,
        discriminators: nn.ModuleList,
        features: EfficientNetFeatures | None,
    ) -> None:
        self._weights = weights
        self._execution = execution
        self._generator, self._averaged = generator, averaged
        self._discriminators, self._features = discriminators, features
        self._perceptual = execution.place(build_perceptual_loss(weights)) if weights.perceptual else None
        self._lpips = execution.place(Lpips()) if weights.lpips else None

    def projected_discriminator(self) -> ProjectedDiscriminator:
        """The discriminator, where the configuration chooses the projected one."""
        discriminator = self._discriminators[0]
        assert isinstance(discriminator, ProjectedDiscriminator)
        return discriminator

    def stage_outputs(self, batch: Batch, layout: LayoutPyramid, phase: Phase) -> dict[int, StageOutput]:
        """Outputs of the stages that the phase trains; their inputs come from the frozen stages before them."""
        outputs: dict[int, StageOutput] = {}
        coarser: Tensor | None = None
        for index in range(phase.stages[-1] + 1):
            trained = index in phase.stages
            with self._execution.autocast(), torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                generator = self._generator if trained else self._averaged
                image = generator.stage_input(index, batch.image, layout, coarser)
                coarser = self._execution.run(generator.stages[index], image, layout)
            if trained:
                target = downsample(batch.image, self._generator.config.halvings(index))
                mask = layout.mask_at(*target.shape[-2:])
                outputs[index] = StageOutput(coarser, target, mask, composite(coarser.float(), target, mask))
        return outputs

    def feature_pair(
        self, outputs: dict[int, StageOutput], layout: LayoutPyramid, positions: range
    ) -> FeaturePair | None:
        """Features of the photo and of the finest stage's edit, which the projected discriminator compares.

        None with patch discriminators. `positions` fixes the augmentation.
        """
        if self._features is None:
            return None
        finest = outputs[max(outputs)]
        seen = torch.cat((layout.one_hot_at(*finest.mask.shape[-2:]), finest.mask), dim=1)
        (real, fake), seen = projected.augment((finest.target, finest.edited), seen, positions)
        with self._execution.autocast():
            with torch.no_grad():
                of_photo = self._features(self._execution.reorder(real))
            return FeaturePair(of_photo, self._features(self._execution.reorder(fake)), seen)

    def discriminator_loss(
        self, outputs: dict[int, StageOutput], layout: LayoutPyramid, pair: FeaturePair | None
    ) -> Tensor:
        """The hinge loss of the discriminators, summed over the stages or the scales."""
        if pair is not None:
            with self._execution.autocast():
                return projected.discriminator_loss(self.projected_discriminator(), pair)
        losses = []
        for index, output in outputs.items():
            with self._execution.autocast():
                real = self._execution.run(self._discriminators[index], output.target, layout)
                fake = self._execution.run(self._discriminators[index], output.edited.detach(), layout)
            losses.append(hinge_discriminator(real, fake))
        return torch.stack(losses).sum()

    def adversarial_loss(
        self, outputs: dict[int, StageOutput], layout: LayoutPyramid, pair: FeaturePair | None
    ) -> Tensor:
        """The hinge loss of the generator, summed over the stages or the scales."""
        if pair is not None:
            with self._execution.autocast():
                return projected.generator_loss(self.projected_discriminator(), pair)
        losses = []
        for index, output in outputs.items():
            with self._execution.autocast():
                score = self._execution.run(self._discriminators[index], output.edited, layout)
            losses.append(hinge_generator(score))
        return torch.stack(losses).sum()

    def reconstruction_losses(
        self, outputs: dict[int, StageOutput], host: HostBatch, positions: range, phase: Phase
    ) -> dict[str, Tensor]:
        """Weighted L1 and perceptual loss, each summed over the stages, and LPIPS of the finest stage's edit.

        Args:
            outputs: Of the trained stages, by number.
            host: The batch in host memory; its masks decide where perceptual crops are cut.
            positions: Numbers of the samples in the run, which seed the crops.
            phase: The current phase.

        Returns:
            Scalars by name, "l1" and, where the configuration has them, "perceptual" and "lpips".
        """
        weights = self._weights
        parts: dict[str, list[Tensor]] = {"l1": [], "perceptual": []}
        for index, output in outputs.items():
            parts["l1"].append(weights.l1 * masked_l1(output.raw, output.target, output.mask, weights.l1_inside))
            if self._perceptual is None or (weights.perceptual_stages == "finest" and index != max(outputs)):
                continue
            side, step = phase.perceptual_crop, 2 ** self._generator.config.halvings(index)
            corners = choose_crops(host.mask.numpy()[:, ::step, ::step], side, positions)
            compared, target = (cut_crops(image, corners, side) for image in (output.raw, output.target))
            with self._execution.autocast():
                distance = self._perceptual(
                    self._execution.reorder(compared), self._execution.reorder(target), phase.perceptual_blocks
                )
            parts["perceptual"].append(weights.perceptual * distance)
        if self._lpips is not None:
            finest = outputs[max(outputs)]
            with self._execution.autocast():
                distances = self._lpips(finest.edited, finest.target, finest.mask)
            parts["lpips"] = [weights.lpips * distances.mean()]
        return {name: torch.stack(losses).sum() for name, losses in parts.items() if losses}

    def feature_losses(self, pair: FeaturePair, host: HostBatch, progress: TrainState) -> dict[str, Tensor]:
        """Weighted losses on the projected discriminator's pretrained features.

        `progress` counts the pairs that the style loss compared and skipped.
        """
        weights = self._weights
        parts = {}
        if weights.feature_matching:
            parts["feature_matching"] = weights.feature_matching * projected.feature_matching_loss(pair)
        if weights.style:
            pairs = find_style_pairs(host.labels.numpy(), host.mask.numpy(), self._generator.config.classes)
            progress.style_pairs += len(pairs)
            progress.style_skipped += pairs.skipped
            scales = slice(STYLE_SCALES)
            style = class_style_loss(pair.fake[scales], pair.real[scales], pair.one_hot, pair.mask, pairs)
            parts["style"] = weights.style * style
        return parts


def downsample(image: Tensor, halvings: int) -> Tensor:
    """The target of a stage: float (N, 3, H, W) to the stage's size, bilinear as in the generator."""
    if not halvings:
        return image
    return F.interpolate(image, scale_factor=0.5**halvings, mode="bilinear", align_corners=False)
