"""The interface to a GPU, the same through PyCUDA and cuda.core, and the errors it raises."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from spmdeploy.errors import OutOfMemoryError, UnavailableError
from spmdeploy.gpu.device import Device, GraphCaptureError
from tests.simulators.simulated_gpu import GARBAGE, Code, SimulatedGpu, host_context
from tests.simulators.simulated_packages import PACKAGES, plug_in


@pytest.fixture(params=PACKAGES)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    plug_in(monkeypatch, simulated, request.param)
    return simulated


def test_device_copies_queued_run_at_synchronize(gpu: SimulatedGpu) -> None:
    device = Device()
    with host_context(gpu), device.current():
        sent, received = device.pinned(1000, "input"), device.pinned(1000, "output")
        sent[:] = np.arange(1000) % 251
        address, other, stream = device.allocate(1000, "input"), device.allocate(1000, "input"), device.stream()
        device.copy_in(address, sent, stream)
        device.copy_within(other, address, 1000, stream)
        device.clear(other, 10, stream)
        device.copy_out(received, other, stream)
        assert (received == GARBAGE).all()
        device.synchronize(stream)
        assert np.array_equal(received[10:], sent[10:]) and not received[:10].any()
        assert device.memory() == (gpu.capacity - 2000, gpu.capacity)
        for used in (address, other):
            device.free(used)
        for array in (sent, received):
            device.free_pinned(array)
        device.destroy_stream(stream)
    device.close()
    assert gpu.left_behind == {}


def test_device_opened_names_gpu_and_package(gpu: SimulatedGpu) -> None:
    device = Device()
    assert str(device) == "cuda:0 (NVIDIA GeForce RTX 3060)" and device.facts.compute_capability == "8.6"
    assert device.binding in ("PyCUDA 2025.1.2", "cuda-core 1.2.2")


def test_device_with_both_packages_takes_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, "pycuda")
    both = {name: sys.modules[name] for name in ("pycuda", "pycuda.driver")}
    plug_in(monkeypatch, gpu, "cuda-core")
    assert Device().binding.startswith("cuda-core")
    for name, module in both.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert Device().binding.startswith("PyCUDA")


def test_capture_launched_repeats_the_work(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        host, address, stream = device.pinned(4, "x"), device.allocate(4, "x"), device.stream()
        graph = device.capture(stream, lambda: device.copy_in(address, host, stream))
        device.synchronize(stream)
        assert (gpu.bytes_at(address, 4) == GARBAGE).all()  # captured, not run
        for value in (1, 2):
            host[:] = value
            device.launch(graph, stream)
            device.synchronize(stream)
            assert (gpu.bytes_at(address, 4) == value).all()
        device.destroy_graph(graph)
    assert "graphs" not in gpu.left_behind


def test_capture_failed_leaves_the_stream_usable(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        host, address, stream = device.pinned(4, "x"), device.allocate(4, "x"), device.stream()
        with pytest.raises(GraphCaptureError, match=r"cuMemAlloc|stream.capture"):
            device.capture(stream, lambda: device.free(device.allocate(4, "not now")))
        gpu.fails["cuStreamEndCapture"] = Code.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
        with pytest.raises(GraphCaptureError):
            device.capture(stream, lambda: None)
        gpu.fails.clear()
        with pytest.raises(KeyError):
            device.capture(stream, lambda: {}["an error of the caller"])
        device.copy_in(address, host, stream)
        device.synchronize(stream)
    assert "graphs" not in gpu.left_behind


def test_wait_for_stream_orders_work_of_a_foreign_stream(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        first, second, out = (device.pinned(1, "x") for _ in range(3))
        address, ours, theirs = device.allocate(1, "x"), device.stream(), gpu.foreign_stream()
        first[:], second[:] = 1, 2
        gpu.copy(address, first.ctypes.data, 1, theirs)  # the host program's own work
        device.wait_for_stream(ours, theirs)
        gpu.copy(address, second.ctypes.data, 1, theirs)  # queued too late to be waited for
        device.copy_out(out, address, ours)
        device.synchronize(ours)
        assert out[0] == 1
        device.wait_for_stream(0, ours)  # the legacy default stream, PyTorch's usual one
        device.wait_for_stream(ours, 0)
    assert "events" not in gpu.left_behind


def test_wait_for_event_waits_for_the_work_before_it(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        host, address, stream = device.pinned(2, "x"), device.allocate(2, "x"), device.stream()
        host[:] = 7
        device.copy_in(address, host[:1], stream)
        event = device.event()
        device.record(event, stream)
        device.copy_in(address + 1, host[1:], stream)
        device.wait_for_event(event)
        assert gpu.bytes_at(address, 2).tolist() == [7, GARBAGE]
        device.destroy_event(event)
        del event  # PyCUDA's destroys itself
    assert "events" not in gpu.left_behind


def test_timed_ended_holds_milliseconds(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        stream = device.stream()
        with device.timed(stream) as milliseconds:
            assert milliseconds == []
        assert milliseconds == [1.5]
    assert "events" not in gpu.left_behind


def test_device_of_address_is_none_off_the_device(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        address, host = device.allocate(16, "x"), device.pinned(16, "x")
        assert [device.device_of(place) for place in (address + 15, host.ctypes.data, 1)] == [0, None, None]


def test_kernel_queued_runs_with_its_arguments(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        stream, tables = device.stream(), device.pinned(96, "x")
        address, out = device.allocate(96, "x"), device.allocate(16, "x")
        tables[:16].view(np.float32)[:] = (1, 2, 300, 4)  # the source
        tables[16:32].view(np.int32)[:] = (0, 1, 2, 2)
        tables[32:].view(np.float64)[:] = (0.5, 0.5) * 4
        device.copy_in(address, tables, stream)
        device.load_kernels()
        numbers = map(np.int32, (2, 3, 0, 1, 4, 1, 4))
        device.kernel("resample", 4, stream, out, address, address + 16, address + 32, *numbers)
        device.synchronize(stream)
        assert gpu.bytes_at(out, 16).view(np.float32).tolist() == [1.5, 151, 152, 152]


def test_current_after_an_error_restores_the_context(gpu: SimulatedGpu) -> None:
    device = Device()
    with host_context(gpu):
        with pytest.raises(OutOfMemoryError), device.current():
            device.allocate(1 << 40, "too much")
        with pytest.raises(RuntimeError, match="of the caller"), device.current():
            raise RuntimeError("of the caller")
        assert len(gpu.contexts) == 1


def test_devices_in_several_threads_share_the_context(gpu: SimulatedGpu) -> None:
    first, second = Device(), Device()
    used: dict[Device, int] = {}

    def work(device: Device) -> None:
        with device.current():
            used[device] = device.allocate(8, "x")
            device.destroy_stream(device.stream())

    threads = [threading.Thread(target=work, args=(device,)) for device in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(used.values())) == 2
    first.close()
    with second.current():
        second.free(used[second])


def test_device_closed_refuses_to_work(gpu: SimulatedGpu) -> None:
    device = Device()
    device.close()
    device.close()
    with pytest.raises(UnavailableError, match=r"cuda:0 .* was closed"), device.current():
        pass


def test_allocate_too_much_says_what_is_missing(gpu: SimulatedGpu) -> None:
    gpu.capacity = 10_000
    device = Device()
    with device.current():
        device.allocate(4_000, "x")
        with pytest.raises(OutOfMemoryError) as caught:
            device.allocate(8_000, "activations")
    expected = "no 8,000 bytes for activations: 6,000 of 10,000 bytes are free, 2,000 too few"
    assert expected in caught.value.problem
    gpu.fails["cuMemHostAlloc"] = Code.CUDA_ERROR_OUT_OF_MEMORY
    with device.current(), pytest.raises(OutOfMemoryError, match="12 bytes of page-locked host memory for the inputs"):
        device.pinned(12, "the inputs")


@pytest.mark.parametrize(
    ("call", "message"),
    [("cuStreamSynchronize", "failed at the work on the device"), ("cuMemcpyHtoDAsync", "failed at a copy to the")],
)
def test_call_failed_is_an_error_with_its_name(call: str, message: str, gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        host, address, stream = device.pinned(4, "x"), device.allocate(4, "x"), device.stream()
        gpu.fails[call] = Code.CUDA_ERROR_ILLEGAL_ADDRESS

        def copy_and_wait() -> None:
            device.copy_in(address, host, stream)
            device.synchronize(stream)

        with pytest.raises(UnavailableError, match=message) as caught:
            copy_and_wait()
        assert call in caught.value.problem and "illegal" in caught.value.problem.lower()


def test_call_without_a_context_fails(gpu: SimulatedGpu) -> None:
    with pytest.raises(UnavailableError, match=r"(?i)invalid.context|not yet initialized"):
        Device().stream()


def test_function_missing_in_the_driver_names_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuda.core reports it; cuda.bindings raises an error of its own, which test_driver has."""
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, "cuda-core")
    device = Device()
    with device.current():
        gpu.fails["cuStreamCreate"] = Code.CUDA_ERROR_NOT_FOUND
        with pytest.raises(UnavailableError, match="driver has no function cuStreamCreate: it is older than") as caught:
            device.stream()
    assert caught.value.exit_code == 4 and "spmdeploy[tensorrt-cu12]" in str(caught.value.hint)


def test_device_without_packages_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, SimulatedGpu(), "")
    with pytest.raises(UnavailableError, match=r"neither PyCUDA \(.*pycuda.*\) nor cuda-core \(.*cuda.*\)") as caught:
        Device()
    assert "pip install" in str(caught.value.hint)


def test_device_that_does_not_exist_is_unavailable(gpu: SimulatedGpu) -> None:
    with pytest.raises(UnavailableError, match=r"cuda:3 cannot be used: .*cuDeviceGet with error 101"):
        Device(3)
    gpu.fails["cuInit"] = Code.CUDA_ERROR_NO_DEVICE
    with pytest.raises(UnavailableError, match="cuInit"):
        Device()
