"""Weights whose activations overflow statistics in half precision, and the proof that they do.

The squares of the values that an instance norm reads are what overflows first: 65504 is the largest half, so values
above 256 already square to infinity, while the values themselves are perfectly good halves. Each convolution in front
of a norm is scaled by a power of two, which changes no digit in FP32, until its largest value is near `PEAK`. The norm
takes the scale out again, so the pictures stay what they were as long as the statistics are computed in FP32.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spmdeploy.backends.verify import GoldenSample
from spmdeploy.model.deploy import EditGraph
from spmdeploy.model.generator import Generator
from spmdeploy.model.modulation import StylePreservedModulation

PEAK = 8192.0
"""A quarter of what a half holds: another photo may go higher and must still be representable."""


@dataclass(frozen=True)
class LayerProof:
    """What one norm reads, on one edit."""

    layer: str
    peak: float
    """The largest absolute value."""
    overflows: bool
    """Whether its variance, computed in halves, is infinite or not a number."""


def enlarge(generator: Generator, golden: GoldenSample) -> Generator:
    """A copy whose convolutions before norms are scaled up to `PEAK` on this edit."""
    enlarged = copy.deepcopy(generator)
    for layer, peak in _read_by_norms(enlarged, golden, lambda values: float(values.abs().max())).items():
        factor = 2.0 ** math.floor(math.log2(PEAK / peak)) if peak else 1.0
        features = enlarged.get_submodule(layer)
        with torch.no_grad():
            for parameter in features.parameters():
                parameter.mul_(factor)
    return enlarged


def proof(generator: Generator, golden: GoldenSample) -> list[LayerProof]:
    """For each norm over more than one pixel: how large its values are, and what halves would make of them."""

    def judge(values: Tensor) -> LayerProof | None:
        return None if values[0, 0].numel() == 1 else LayerProof("", float(values.abs().max()), _overflows(values))

    found = _read_by_norms(generator, golden, judge)
    return [LayerProof(layer, seen.peak, seen.overflows) for layer, seen in found.items() if seen is not None]


def _overflows(values: Tensor) -> bool:
    """values: (N, C, h, w). Mean of squares less square of the mean, as engines that allow it compute in halves."""
    halves = values.numpy().astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        variance = np.square(halves).mean(axis=(2, 3)) - np.square(halves.mean(axis=(2, 3)))
    return not bool(np.isfinite(variance).all())


def _read_by_norms(generator: Generator, golden: GoldenSample, look: Any) -> dict[str, Any]:
    """What `look` makes of the output of each convolution whose only reader is a norm, by the convolution's name."""
    seen: dict[str, Any] = {}
    hooks = []
    for name, module in generator.named_modules():
        if isinstance(module, StylePreservedModulation):

            def note(layer: nn.Module, inputs: Any, output: Tensor, name: str = f"{name}.features") -> None:
                seen[name] = look(output.detach())

            hooks.append(module.features.register_forward_hook(note))
    arrays = golden.inputs
    with torch.inference_mode():
        EditGraph(generator).eval()(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
    for hook in hooks:
        hook.remove()
    return seen
