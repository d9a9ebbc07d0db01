"""Bundles with seeded weights: activations that overflow FP16 statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.backends.verify import GoldenSample, measure_deviation
from spmdeploy.bench.seeded_bundles import _peak_and_overflow, enlarge_activations, norm_inputs
from spmdeploy.export.parity import HALF_LIMITS
from spmdeploy.labels import class_table
from spmdeploy.model import modulation
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.types import ModelInput


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks are slower with more threads, far slower beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator() -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Generator(GeneratorConfig(len(class_table("street")), width=2, hidden=8)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden(generator: Generator) -> GoldenSample:
    """A real edit of 128×128 pixels, the smallest size the network accepts."""
    photo, labels, mask = SAMPLE_EDITS[0].read(class_table("street"))
    middle = np.argwhere(mask).mean(axis=0)
    top, left = np.clip(middle - 64, 0, np.array(mask.shape) - 128).astype(int)
    cut = np.s_[top : top + 128, left : left + 128]
    maps = labels[cut][None], labels[cut].astype(np.int32)[None], mask[cut].astype(np.uint8)[None]
    assert maps[2].any() and not maps[2].all()
    inputs = ModelInput(photo[cut][None], *maps)
    return GoldenSample(inputs, TorchSession(generator).run(inputs))


def edited_by(generator: Generator, golden: GoldenSample) -> np.ndarray:
    return TorchSession(generator).run(golden.inputs)


def in_halves(x: Tensor) -> Tensor:
    """An instance norm with the error to detect: statistics in half precision."""
    values = x.half()
    if values.shape[-2] * values.shape[-1] == 1:
        return torch.zeros_like(x)
    mean = values.mean((2, 3), keepdim=True)
    variance = values.square().mean((2, 3), keepdim=True) - mean.square()
    return ((values - mean) * torch.rsqrt(variance + modulation.NORM_EPS)).to(x.dtype)


def test_enlarge_activations_overflows_fp16_statistics_only(
    generator: Generator, golden: GoldenSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(overflows for _, overflows in norm_inputs(generator, golden, _peak_and_overflow).values())
    enlarged = enlarge_activations(generator, golden)
    inputs = norm_inputs(enlarged, golden, _peak_and_overflow).values()
    assert len(inputs) > 30 and all(overflows for _, overflows in inputs)
    assert max(peak for peak, _ in inputs) < np.finfo(np.float16).max / 2  # the values themselves are representable

    expected = edited_by(enlarged, golden)
    assert not measure_deviation(expected, golden.expected, golden.inputs.mask).problems(HALF_LIMITS)  # same results

    # The check can fail: FP16 statistics are detected with these weights, and not without them.
    monkeypatch.setattr(modulation, "instance_norm", in_halves)
    assert measure_deviation(edited_by(enlarged, golden), expected, golden.inputs.mask).problems(HALF_LIMITS)
    assert not measure_deviation(edited_by(generator, golden), golden.expected, golden.inputs.mask).problems(
        HALF_LIMITS
    )
