"""Validates the averaged weights on held-out images: LPIPS, L1 and a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spmdeploy.datasets.folder import Batch, Sample, collate
from spmdeploy.training.perceptual import Lpips

BATCH = 4

EditByStage = Callable[[Batch], Sequence[Tensor]]
"""Each trained stage's edit of a batch at full size, known pixels restored: float (N, 3, S, S) in [-1, 1]."""


@dataclass(frozen=True)
class ValidationResult:
    """What a validation found."""

    lpips: float
    """Under the mask, of the finest stage, mean over the samples."""
    l1: float
    """Mean absolute error under the mask in [-1, 1] units, likewise."""
    stages: tuple[npt.NDArray[np.uint8], ...]
    """For each stage, all edits: uint8 (N, S, S, 3)."""


@torch.no_grad()
def judge(samples: Sequence[Sample], edit: EditByStage, lpips: Lpips, device: torch.device) -> ValidationResult:
    scores, errors, edits = [], [], []
    for start in range(0, len(samples), BATCH):
        batch = collate(samples[start : start + BATCH]).to(device)
        stages = edit(batch)
        scores.append(lpips(stages[-1], batch.image, batch.mask))
        difference = (stages[-1] - batch.image).abs().mean(dim=1, keepdim=True) * batch.mask
        errors.append(difference.sum(dim=(1, 2, 3)) / batch.mask.sum(dim=(1, 2, 3)))
        edits.append([to_pixels(stage) for stage in stages])
    return ValidationResult(
        lpips=float(torch.cat(scores).mean()),
        l1=float(torch.cat(errors).mean()),
        stages=tuple(np.concatenate(parts) for parts in zip(*edits, strict=True)),
    )


def to_pixels(pictures: Tensor) -> npt.NDArray[np.uint8]:
    """float (N, 3, h, w) in [-1, 1] to uint8 (N, h, w, 3)."""
    values: npt.NDArray[np.float32] = pictures.detach().float().permute(0, 2, 3, 1).cpu().numpy()
    levels: npt.NDArray[np.uint8] = np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)
    return levels
