"""Exports bundles with seeded weights: presets for benchmarks, and one whose activations overflow FP16 statistics.

Squares of the values that an instance norm reads overflow first: the largest FP16 value is 65504, so values above 256
square to infinity while being representable themselves. `enlarge_activations` scales each convolution before a norm by
a power of two, which is exact in FP32, until its largest value is near `PEAK`. The norm removes the scale, so the
results stay the same as long as statistics are computed in FP32. ONNX Runtime's CPU kernels do not show the overflow;
GPUs do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spmdeploy.backends.pytorch import bundled_generator
from spmdeploy.backends.verify import GoldenSample, read_golden
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.export.pipeline import ExportOptions, export_bundle
from spmdeploy.labels import ClassTable, class_table
from spmdeploy.model.checkpoint import save_generator
from spmdeploy.model.deploy import EditGraph
from spmdeploy.model.generator import PRESETS, Generator, GeneratorConfig
from spmdeploy.model.modulation import StylePreservedModulation
from spmdeploy.types import Precision

SEED = 0
CLASSES = {"paper": "cityscapes", "small": "street", "tiny": "street"}
"""Class table of each preset: the number of classes determines the cost of the layout branch."""
SIZES = PRESETS | {"tiny": {"width": 2, "hidden": 8}}
"""Presets of the model, and one for tests."""
PEAK = 8192.0
"""An eighth of the largest FP16 value: other photos may produce larger values."""


@dataclass(frozen=True)
class OverflowProof:
    """How many instance norms overflow FP16 statistics in a generator, on the golden edits."""

    overflowing_norms: int
    norms: int
    overflowing_norms_before: int
    """Without scaling."""
    largest_value: float


def export_random(preset: str, folder: Path, precisions: tuple[Precision, ...]) -> Path:
    """Writes `folder`/PRESET.spm with seeded random weights; returns its path."""
    table = class_table(CLASSES[preset])
    torch.manual_seed(SEED)
    size = SIZES[preset]
    generator = Generator(GeneratorConfig(len(table), size["width"], size["hidden"]))
    return _export(generator, table, folder / f"{preset}.spm", precisions)


def export_enlarged(bundle: Bundle, path: Path) -> OverflowProof:
    """Writes a bundle with the weights of another one, scaled so that FP16 statistics overflow."""
    generator = bundled_generator(bundle)
    golden = [read_golden(bundle, edit) for edit in bundle.manifest.golden]
    enlarged = enlarge_activations(generator, golden[0])
    _export(enlarged, bundle.manifest.classes, path, ("fp32", "fp16"))
    peaks = [peak for sample in golden for peak in norm_inputs(enlarged, sample, _peak_and_overflow).values()]
    before = norm_inputs(generator, golden[0], _peak_and_overflow).values()
    return OverflowProof(
        overflowing_norms=sum(overflows for _, overflows in peaks),
        norms=len(peaks),
        overflowing_norms_before=sum(overflows for _, overflows in before),
        largest_value=max(peak for peak, _ in peaks),
    )


def enlarge_activations(generator: Generator, golden: GoldenSample) -> Generator:
    """A copy whose convolutions before norms produce values up to `PEAK` for this edit."""
    enlarged = copy.deepcopy(generator)
    for layer, (peak, _) in norm_inputs(enlarged, golden, _peak_and_overflow, single_pixels=True).items():
        factor = 2.0 ** math.floor(math.log2(PEAK / peak)) if peak else 1.0
        with torch.no_grad():
            for parameter in enlarged.get_submodule(layer).parameters():
                parameter.mul_(factor)
    return enlarged


def norm_inputs(
    generator: Generator,
    golden: GoldenSample,
    measure: Callable[[Tensor], tuple[float, bool]],
    single_pixels: bool = False,
) -> dict[str, tuple[float, bool]]:
    """Measures the input of each instance norm of a network.

    Args:
        generator: The network.
        golden: Its inputs, a batch of one.
        measure: Gets float (N, C, H, W), the input of one norm.
        single_pixels: Include norms over a single pixel, whose variance is always zero.

    Returns:
        Results of `measure` by the name of the convolution before the norm.
    """
    found: dict[str, tuple[float, bool]] = {}
    hooks = []
    for name, module in generator.named_modules():
        if isinstance(module, StylePreservedModulation):

            def record(layer: nn.Module, inputs: Any, output: Tensor, name: str = f"{name}.features") -> None:
                if single_pixels or output[0, 0].numel() > 1:
                    found[name] = measure(output.detach())

            hooks.append(module.features.register_forward_hook(record))
    with torch.inference_mode():
        EditGraph(generator).eval()(*(torch.from_numpy(np.ascontiguousarray(array)) for array in golden.inputs))
    for hook in hooks:
        hook.remove()
    return found


def _peak_and_overflow(values: Tensor) -> tuple[float, bool]:
    """Largest absolute value, and whether the variance overflows if computed in FP16.

    The variance is the mean of squares minus the square of the mean, as engines without FP32 norms compute it.
    """
    halves = values.numpy().astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        variance = np.square(halves).mean(axis=(2, 3)) - np.square(halves.mean(axis=(2, 3)))
    return float(values.abs().max()), not bool(np.isfinite(variance).all())


def _export(generator: Generator, table: ClassTable, path: Path, precisions: tuple[Precision, ...]) -> Path:
    checkpoint = path.with_suffix(".safetensors")
    checkpoint.unlink(missing_ok=True)
    save_generator(generator, checkpoint)
    return export_bundle(checkpoint, path, ExportOptions(table, precisions, overwrite=True)).bundle.path
