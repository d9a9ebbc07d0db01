"""Position of a run, and restoring positions, weights and optimizers from a checkpoint with checks.

The functions raise ValueError, or what PyTorch raises, for parts that are damaged or of another configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spmdeploy.serialization import Count, FieldError, convert
from spmdeploy.training.config import Phase


@dataclass
class TrainState:
    """Position of the run."""

    phase: Count = 0
    """Index of the current phase."""
    phase_images: Count = 0
    """Finished samples of the current phase."""
    images: Count = 0
    """Finished samples of the run."""
    steps: Count = 0
    """Optimizer steps of the run."""
    phase_seconds: float = 0.0
    """Wall time of the current phase's steps."""
    best: float = math.inf
    """Lowest validation LPIPS so far."""
    style_pairs: Count = 0
    """Pairs of sample and class that the style loss has compared."""
    style_skipped: Count = 0
    """Pairs that it has skipped, because too few pixels of the class were known."""


def restore_progress(fields: dict[str, Any], schedule: Sequence[Phase]) -> TrainState:
    """Converts the stored position and checks it against the schedule."""
    try:
        progress = convert(fields, TrainState)
    except FieldError as exc:
        raise ValueError(f"progress: {exc}") from exc
    if progress.phase >= len(schedule) or progress.phase_images > schedule[progress.phase].images:
        raise ValueError(f"sample {progress.phase_images} of phase {progress.phase} is not in the schedule")
    if not progress.best >= 0 or not math.isfinite(progress.phase_seconds):
        raise ValueError(f"progress: best is {progress.best}, phase_seconds is {progress.phase_seconds}")
    return progress


def restore_weights(network: nn.Module, state: dict[str, Any], name: str) -> None:
    """Loads a state dict of finite tensors; `name` is the network's in errors."""
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.isfinite().all():
            raise ValueError(f"{name}: {key} is no tensor of finite numbers")
    network.load_state_dict(state)


def restore_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores step counts and moments; rates and all else are the configuration's."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            shapes = {name: tuple(value.shape) for name, value in moments.items()}
            expected = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
            if moments and shapes != expected:
                raise ValueError(f"optimizer state of the shapes {shapes}, expected {expected}")
            if not all(value.is_floating_point() and value.isfinite().all() for value in moments.values()):
                raise ValueError("optimizer state that is not finite")
