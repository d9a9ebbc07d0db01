"""Edits that are timed where they lie: right pictures, the clock stopped after the stream, nothing left behind."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from spmdeploy.bench.cases import EditBatch
from spmdeploy.bench.resident import device_milliseconds, resident_edit
from spmdeploy.errors import OutOfMemory
from spmdeploy.runtime.cuda_device import Device

from .simulated_gpu import PACKAGES, Code, SimulatedGpu, plug_in
from .simulated_tensorrt import edited_like
from .test_trt import inputs_for, opened


@pytest.mark.parametrize("package", PACKAGES)
def test_an_edit_is_timed_on_its_stream(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, package)
    given = inputs_for(3)
    with opened(gpu, tmp_path) as session:
        device = Device(0)
        with ExitStack() as stack:
            edit = resident_edit(session, EditBatch(**given), device, stack)
            device_milliseconds(edit, device)  # the first one prepares the batch size
            for _ in range(3):
                before = len(gpu.calls)
                passed, launching = device_milliseconds(edit, device)
                assert passed >= 0 and launching > 0
                # An event, the edit, an event, and then the stream comes to rest; no copy from or to the host.
                calls = gpu.calls[before:]
                order = [call for call in calls if call in ("cuEventRecord", "cuStreamSynchronize")]
                assert order[0] == "cuEventRecord" and order[-2:] == ["cuEventRecord", "cuStreamSynchronize"]
                assert order.count("cuStreamSynchronize") == 1 and order.count("cuEventRecord") == 4
                assert not any(call.startswith("cuMemcpy") for call in calls)
            assert np.array_equal(edit.fetch(), edited_like(given)["edited"])
        device.close()
    assert gpu.left_behind == {} and not any("without a context" in call for call in gpu.calls)


def test_too_little_memory_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu)
    with opened(gpu, tmp_path) as session:
        device = Device(0)
        gpu.fails["cuMemAlloc"] = Code.CUDA_ERROR_OUT_OF_MEMORY
        with ExitStack() as stack, pytest.raises(OutOfMemory):
            resident_edit(session, EditBatch(**inputs_for(1)), device, stack)
        device.close()
    assert gpu.left_behind == {}
