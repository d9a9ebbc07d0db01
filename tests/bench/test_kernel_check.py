"""Check of our CUDA code: on the simulated GPU as far as PyTorch is not needed, and its command without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from spmdeploy.bench import kernel_check
from spmdeploy.bench.kernel_check import check_copies, check_events, check_graph_of_copies
from spmdeploy.errors import UnavailableError
from spmdeploy.gpu.device import Device
from tests.simulators.simulated_gpu import SimulatedGpu
from tests.simulators.simulated_packages import PACKAGES, plug_in


@pytest.fixture(params=PACKAGES)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    plug_in(monkeypatch, simulated, request.param)
    monkeypatch.setattr(kernel_check, "SIZE", 1 << 12)
    return simulated


def test_checks_of_copies_and_graphs_pass_and_free_everything(gpu: SimulatedGpu) -> None:
    device = Device()
    assert check_copies(device) == check_graph_of_copies(device) == []
    device.close()
    assert gpu.left_behind == {}


def test_check_copies_changed_bytes_are_found(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(Device, "copy_within", lambda self, address, source, size, stream: None)
    assert check_copies(device) == ["bytes changed on the way"]
    assert check_graph_of_copies(device) == ["replay 0 gives other bytes"]
    device.close()


def test_check_events_constant_clock_is_found(gpu: SimulatedGpu) -> None:
    device = Device()
    assert check_events(device) == ["1 copy took 1.5 ms, 200 copies 1.5 ms"]  # the simulated clock does not advance
    device.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_main_without_gpu_prints_json_and_exits_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_check.main() == UnavailableError.exit_code
    result = json.loads(capsys.readouterr().out)
    assert "sees no GPU" in result["error"] and result["checks"] == []
