"""Edits in GPU memory with a simulated driver: results, timing by events, released resources."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from spmdeploy.bench.backend_process import BackendProcess
from spmdeploy.bench.backends import device_run, time_on_device
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import REFINE
from spmdeploy.errors import OutOfMemoryError, VerificationError
from spmdeploy.gpu.device import Device
from spmdeploy.types import ModelInput
from tests.backends.test_select_engine import Machine, add, bundle, machine
from tests.backends.test_tensorrt import inputs_for, opened, record_of, refine_inputs
from tests.simulators.simulated_gpu import Code, SimulatedGpu
from tests.simulators.simulated_packages import PACKAGES, plug_in
from tests.simulators.simulated_tensorrt import edited_like

__all__ = ["bundle", "machine"]  # fixtures of the neighbor


@pytest.mark.parametrize("package", PACKAGES)
def test_time_on_device_uses_events_on_stream(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, package)
    given = inputs_for(3)
    with opened(gpu, tmp_path) as session:
        device = Device(0)
        with ExitStack() as stack:
            edit = device_run(session, ModelInput(**given), device, stack)
            time_on_device(edit, device)  # the first one prepares the batch size
            for _ in range(3):
                before = len(gpu.calls)
                passed, launching = time_on_device(edit, device)
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


def test_device_run_out_of_memory_releases_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu)
    with opened(gpu, tmp_path) as session:
        device = Device(0)
        gpu.fails["cuMemAlloc"] = Code.CUDA_ERROR_OUT_OF_MEMORY
        with ExitStack() as stack, pytest.raises(OutOfMemoryError):
            device_run(session, ModelInput(**inputs_for(1)), device, stack)
        device.close()
    assert gpu.left_behind == {}


def test_prepare_engine_streams_have_own_sessions(machine: Machine, bundle: Bundle) -> None:
    gpu, given = machine.gpu, inputs_for(2)
    add(bundle, record_of())
    bench = BackendProcess(bundle.path, "tensorrt", "cuda:0", "fp16")
    alone = len(gpu.streams)
    first = bench.prepare_engine(ModelInput(**given), 3)
    assert np.array_equal(first.edited, edited_like(given)["edited"])
    assert len(gpu.streams) == 3 * (alone + 1)  # of each session its own, and the one that it is timed on
    gpu.calls.clear()
    turn = bench.turn(0.0, 4)
    work = Counter(gpu.calls)  # whatever is captured is enqueued, but not run
    assert work["execute_async_v3"] + work["cuGraphLaunch"] - work["cuStreamBeginCapture"] == 3 * 4
    assert len(turn.samples) == 3 * 4 and turn.seconds > 0
    assert not any(call.startswith("cuMemcpy") for call in gpu.calls)
    assert set(turn.samples) == {gpu.milliseconds}
    bench.prepare_engine(ModelInput(**given), 1)
    assert len(gpu.streams) == alone + 1 and len(bench.turn(0.0, 4).samples) == 4
    bench.close()
    assert gpu.left_behind == {} and gpu.contexts == []


def test_prepare_engine_streams_that_differ_are_refused(machine: Machine, bundle: Bundle) -> None:
    add(bundle, record_of())
    bench = BackendProcess(bundle.path, "tensorrt", "cuda:0", "fp16")
    runs = iter(range(100))

    def another_every_time(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = edited_like(inputs)
        return made | {"edited": made["edited"] ^ np.uint8(next(runs) % 2)}

    machine.libraries["tensorrt"]._computes = another_every_time
    with pytest.raises(VerificationError, match="different results in different streams"):
        bench.prepare_engine(ModelInput(**inputs_for(1)), 2)
    bench.close()
    assert machine.gpu.left_behind == {}


def test_memory_counts_refine_once_loaded(machine: Machine, bundle: Bundle) -> None:
    edit, refine = (add(bundle, record_of(graph=graph)) for graph in ("edit", REFINE))
    bench = BackendProcess(bundle.path, "tensorrt", "cuda:0", "fp16")
    sizes = [next(path.parent.glob("*.engine")).stat().st_size for path in (edit, refine)]
    bench.verify()
    bench._session.run(ModelInput(**inputs_for(1)))
    loaded = bench.memory().loaded
    bench._session.refine(*refine_inputs(inputs_for(1, coarse=True)))
    assert bench.memory().loaded == sum(sizes) and loaded in (sizes[0], sum(sizes))
    bench.close()
