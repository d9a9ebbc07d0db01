"""Validation: metrics and contact-sheet images of the averaged weights on the held-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spmdeploy.datasets.samples import Batch, Sample, collate
from spmdeploy.training import distributed
from spmdeploy.training.perceptual import Lpips

BATCH = 4

EditByStage = Callable[[Batch], Sequence[Tensor]]
"""Each trained stage's edit of a batch at full size, known pixels restored: float (N, 3, S, S) in [-1, 1]."""


@dataclass(frozen=True)
class ValidationResult:
    """Metrics of the finest trained stage, and all edits."""

    lpips: float
    """Under the mask, mean over the samples."""
    l1: float
    """Mean absolute error under the mask in [-1, 1] units, likewise."""
    stages: tuple[npt.NDArray[np.uint8], ...]
    """For each stage, all edits: uint8 (N, S, S, 3)."""


@torch.no_grad()
def validate(samples: Sequence[Sample], edit: EditByStage, lpips: Lpips, device: torch.device) -> ValidationResult:
    """Evaluates a generator on held-out samples; every process takes a part of them.

    Args:
        samples: All samples, the same in every process.
        edit: Returns the output of each trained stage.
        lpips: Computes the metric.
        device: Where batches are placed.
    """
    results: list[tuple[float, float, list[npt.NDArray[np.uint8]]]] = []
    part = samples[distributed.rank() :: distributed.world_size()]
    for start in range(0, len(part), BATCH):
        batch = collate(part[start : start + BATCH]).to(device)
        stages = edit(batch)
        scores = lpips(stages[-1], batch.image, batch.mask)
        difference = (stages[-1] - batch.image).abs().mean(dim=1, keepdim=True) * batch.mask
        errors = difference.sum(dim=(1, 2, 3)) / batch.mask.sum(dim=(1, 2, 3))
        pixels = zip(*(to_pixels(stage) for stage in stages), strict=True)
        results += zip(scores.tolist(), errors.tolist(), map(list, pixels), strict=True)
    scores_, errors_, edits = zip(*distributed.gather(results), strict=True)
    return ValidationResult(
        lpips=float(np.mean(scores_)),
        l1=float(np.mean(errors_)),
        stages=tuple(np.stack(stage) for stage in zip(*edits, strict=True)),
    )


def to_pixels(images: Tensor) -> npt.NDArray[np.uint8]:
    """float (N, 3, h, w) in [-1, 1] to uint8 (N, h, w, 3)."""
    values: npt.NDArray[np.float32] = images.detach().float().permute(0, 2, 3, 1).cpu().numpy()
    levels: npt.NDArray[np.uint8] = np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)
    return levels
