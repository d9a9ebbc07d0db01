"""PyTorch baselines on a tiny generator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import spmdeploy
from spmdeploy.backends.verify import limits_of, measure_deviation
from spmdeploy.bench.torch_backends import BaselineSession, open_baseline, set_fp32_mode
from spmdeploy.bench.workloads import edit_batch
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.errors import UnavailableError, UsageError
from spmdeploy.export.parity import FP32_LIMITS, HALF_LIMITS
from spmdeploy.labels import class_table
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.types import LayoutInput, ModelInput

STREET = class_table("street")
BUILTIN = open_bundle(spmdeploy.default_model())


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Global settings of PyTorch, restored afterwards; one thread suits a tiny network."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = flags


@pytest.fixture(scope="module")
def batch() -> ModelInput:
    return edit_batch(STREET, 256, "large", 1)


def generator() -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Generator(GeneratorConfig(len(STREET), width=2, hidden=8)).eval().requires_grad_(False)


def test_run_bf16_is_close_to_fp32(batch: ModelInput) -> None:
    expected = BaselineSession(generator(), "cpu", "fp32").run(batch)
    session = BaselineSession(generator(), "cpu", "bf16")
    edited = session.run(batch)
    assert edited.dtype == np.uint8 and (edited[batch.mask == 0] == batch.image[batch.mask == 0]).all()
    deviation = measure_deviation(edited, expected, batch.mask)
    assert deviation.max_grey > 0 and not deviation.problems(limits_of(BUILTIN, "bf16"))
    assert session.provider.endswith("bf16, channels_last") and session.precision == "bf16"
    unrounded = session.run_unrounded(batch)
    assert unrounded.dtype == np.float32 and np.abs(unrounded - edited).max() <= 0.51


def test_bind_layout_equals_run(batch: ModelInput) -> None:
    session = BaselineSession(generator(), "cpu", "fp32")
    run = session.bind_layout(LayoutInput(batch.labels, batch.instances, batch.mask))
    assert np.array_equal(run(batch.image), session.run(batch))


def test_fp32_session_switches_tf32_off() -> None:
    set_fp32_mode(allow_tf32=True)
    BaselineSession(generator(), "cpu", "fp32")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def _rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest with 10 bits of mantissa, as tensor cores do with FP32 operands in TF32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_limits_emulated_tf32_is_not_fp32(batch: ModelInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions on operands with 10 mantissa bits exceed the limits of FP32 and keep those of reduced precision."""
    expected = BaselineSession(generator(), "cpu", "fp32").run(batch)
    convolve = torch.nn.Conv2d._conv_forward

    def in_tf32(self: torch.nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return convolve(self, _rounded_to_tf32(x), _rounded_to_tf32(weight), bias)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", in_tf32)
    deviation = measure_deviation(BaselineSession(generator(), "cpu", "fp32").run(batch), expected, batch.mask)
    assert deviation.problems(FP32_LIMITS) and not deviation.problems(HALF_LIMITS)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_open_baseline_precision_of_gpus_is_refused_on_cpu(precision: str) -> None:
    with pytest.raises(UnavailableError, match=f"does not compute in {precision} on CPUs"):
        open_baseline(BUILTIN, "torch", "cpu", precision)


def test_open_baseline_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown precision 'int8'"):
        open_baseline(BUILTIN, "torch", "cpu", "int8")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_compiled_session_caches_no_layout(batch: ModelInput) -> None:
    session = BaselineSession(generator(), "cpu", "fp32", compiled=True)  # compiles at the first run only
    assert session.backend == "torch-compile" and session.provider.endswith("torch.compile")
    with pytest.raises(UnavailableError, match="for every layout"):
        session.bind_layout(LayoutInput(batch.labels, batch.instances, batch.mask))
