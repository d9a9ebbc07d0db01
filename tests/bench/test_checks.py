"""Thorough checks: with a fake session that can be broken, and with engines on the simulated GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401, before the driver is simulated: the simulation replaces ctypes.CDLL

import spmdeploy
from spmdeploy import cli
from spmdeploy.backends.base import Unsupported
from spmdeploy.backends.verify import GoldenSample, read_golden
from spmdeploy.bench import checks
from spmdeploy.bench.checks import (
    Check,
    check_batches,
    check_cached_layout,
    check_cuda_graphs,
    check_large_edit,
    check_reopening,
    check_repeatability,
    large_region,
    run_thorough,
)
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.bundle.manifest import REFINE
from spmdeploy.errors import UnavailableError
from spmdeploy.types import LayoutInput, ModelInput
from tests.backends.test_select_engine import Machine, add, bundle, machine
from tests.backends.test_tensorrt import record_of

__all__ = ["bundle", "machine"]  # fixtures of the engine tests
BUILTIN = open_bundle(spmdeploy.default_model())
Edit = Callable[[ModelInput], np.ndarray]


@pytest.fixture(scope="module")
def golden() -> GoldenSample:
    return read_golden(BUILTIN, BUILTIN.manifest.golden[0])


def inverted(inputs: ModelInput) -> np.ndarray:
    return np.where(inputs.mask[..., None] != 0, 255 - inputs.image, inputs.image)


class FakeSession:
    """Inverts what is masked; `edit` and `cached` may be replaced by something wrong."""

    backend, device, precision, provider, size, notes = "fake", "cpu", "fp32", "fake 1", 256, ()

    def __init__(self, edit: Edit = inverted, cached: Edit = inverted, refines: bool = True) -> None:
        self.edit, self.cached, self.refines = edit, cached, refines
        self.refine_unsupported = None if refines else Unsupported("no", "none")
        self.closed = 0

    def run(self, inputs: ModelInput) -> np.ndarray:
        return self.edit(inputs)

    def run_unrounded(self, inputs: ModelInput) -> np.ndarray:
        return self.edit(inputs).astype(np.float32)

    def refine(self, inputs: ModelInput, coarse: np.ndarray) -> np.ndarray:
        return self.edit(inputs).astype(np.float32)

    def bind_layout(self, layout: LayoutInput) -> Callable[[np.ndarray], np.ndarray]:
        return lambda image: self.cached(ModelInput(image, *layout))

    def close(self) -> None:
        self.closed += 1


class Changing:
    """Changes the last bit under the mask with every run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, inputs: ModelInput) -> np.ndarray:
        self.runs += 1
        return inverted(inputs) ^ np.uint8((self.runs % 2) * (inputs.mask[..., None] != 0))


def black_in_batches(inputs: ModelInput) -> np.ndarray:
    return inverted(inputs) if len(inputs.image) == 1 else np.zeros_like(inputs.image)


def test_run_thorough_correct_session_passes() -> None:
    session: Any = FakeSession()
    found = list(run_thorough(BUILTIN, session, lambda: FakeSession()))
    assert {check.name: check.status for check in found} == {
        "repeatability": "passed",
        "batches": "passed",
        "cached layout": "passed",
        "large edit": "passed",
        "CUDA graphs": "skipped",
        "beside PyTorch": "skipped",
        "memory after closing": "skipped",
    }
    assert all(check.reason for check in found if check.status == "skipped")
    assert found[3].facts["tiles"] > 16 and all(level["refined"] for level in found[3].facts["levels"])


def test_check_repeatability_changing_result_fails(golden: GoldenSample) -> None:
    session: Any = FakeSession(Changing())
    check = check_repeatability(session, golden)
    assert check.failed and check.reason == "2 different results in 3 runs"


def test_check_batches_wrong_batch_fails(golden: GoldenSample) -> None:
    session: Any = FakeSession(black_in_batches)
    assert "largest difference" in (check_batches(session, golden, BUILTIN).reason or "")


def test_check_cached_layout_other_bytes_fail(golden: GoldenSample) -> None:
    session: Any = FakeSession(cached=lambda inputs: inverted(inputs) ^ np.uint8(1))
    assert "differs from the plain run by up to 1" in (check_cached_layout(session, golden, BUILTIN).reason or "")


def test_check_large_edit_without_refine_is_skipped(golden: GoldenSample) -> None:
    session: Any = FakeSession(refines=False)
    assert check_large_edit(session, golden, BUILTIN).status == "skipped"


def test_run_thorough_exceptions_are_reported() -> None:
    def broken(inputs: ModelInput) -> np.ndarray:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    session: Any = FakeSession(broken)
    found = {check.name: check for check in run_thorough(BUILTIN, session, lambda: FakeSession())}
    assert found["repeatability"].reason == "RuntimeError: CUDA error: an illegal memory access was encountered"
    unavailable: Any = FakeSession(lambda inputs: (_ for _ in ()).throw(UnavailableError("no memory")))
    found = {check.name: check for check in run_thorough(BUILTIN, unavailable, lambda: FakeSession())}
    assert found["batches"] == Check("batches", "skipped", "no memory")


def test_run_thorough_engine_on_simulated_gpu_passes_and_finds_leaks(
    machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for graph in ("edit", REFINE):
        add(bundle, record_of(graph=graph))
    bundle = open_bundle(bundle.path)
    monkeypatch.setattr(checks, "GPU_RUNS", 12)
    real = checks.large_region

    def of_two_classes(sample: GoldenSample) -> Any:
        return real(sample)._replace(labels=large_region(sample).labels % 2)

    monkeypatch.setattr(checks, "large_region", of_two_classes)

    def reopen() -> Any:
        return spmdeploy.open_editor(bundle.path, "tensorrt", "cuda:0", "fp16").session

    session = reopen()
    found = {check.name: check for check in run_thorough(bundle, session, reopen)}
    assert {check.name: check.reason for check in found.values() if check.failed} == {}
    assert found["large edit"].facts["between_levels"] == "device" and found["CUDA graphs"].status == "passed"
    assert found["repeatability"].facts["bytes_lost"] == found["memory after closing"].facts["bytes_lost"] == 0

    lost = iter(range(0, 1 << 40, 8 << 20))
    free = checks.free_gpu_bytes
    monkeypatch.setattr(checks, "free_gpu_bytes", lambda device: free(device) - next(lost))
    sample = read_golden(bundle, bundle.manifest.golden[0])
    assert "8,388,608 bytes of GPU memory lost" in (check_repeatability(session, sample).reason or "")
    assert "GPU memory lost in 2 sessions" in (check_reopening(session, sample, reopen).reason or "")
    session.close()
    assert machine.gpu.left_behind == {}


def test_check_cuda_graphs_without_engine_is_skipped(golden: GoldenSample) -> None:
    session: Any = FakeSession()
    assert check_cuda_graphs(session, golden).status == "skipped"


def test_verify_thorough_command_lists_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Check("repeatability", "failed", "2 different results in 3 runs")
    monkeypatch.setattr(checks, "run_thorough", lambda *_: iter([failed, Check("batches", "passed")]))
    arguments = ["verify", "--backend", "onnxruntime", "--device", "cpu"]
    assert cli.main([*arguments, "--thorough", "--json"]) == 5
    result = json.loads(capsys.readouterr().out)
    assert [check["status"] for check in result["checks"]] == ["failed", "passed"]
    assert "repeatability: 2 different results" in result["error"]
    assert cli.main(arguments) == 0
