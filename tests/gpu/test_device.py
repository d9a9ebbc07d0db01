"""The narrow interface to a GPU, the same through PyCUDA and cuda-python, and what the real cuda-python makes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from spmdeploy.errors import OutOfMemoryError, UnavailableError
from spmdeploy.gpu.device import Device, GraphCaptureError
from spmdeploy.gpu.driver import gpu_uuid
from tests.simulators.simulated_gpu import PACKAGES, RUBBISH, Code, SimulatedGpu, host_context, plug_in


@pytest.fixture(params=PACKAGES)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    made = SimulatedGpu()
    plug_in(monkeypatch, made, request.param)
    return made


def test_bytes_travel_there_and_back(gpu: SimulatedGpu) -> None:
    device = Device()
    with host_context(gpu), device.current():
        sent, received = device.pinned(1000, "input"), device.pinned(1000, "output")
        sent[:] = np.arange(1000) % 251
        address, stream = device.allocate(1000, "input"), device.stream()
        device.copy_in(address, sent, stream)
        device.copy_out(received, address, stream)
        assert (received == RUBBISH).all()  # only queued
        device.synchronize(stream)
        assert np.array_equal(received, sent)
        assert device.memory() == (gpu.capacity - 1000, gpu.capacity)
        device.free(address)
        device.free_pinned(sent)
        device.free_pinned(received)
        device.destroy_stream(stream)
    device.close()
    assert gpu.left_behind == {}


def test_it_says_what_it_is(gpu: SimulatedGpu) -> None:
    device = Device()
    assert str(device) == "cuda:0 (NVIDIA GeForce RTX 3060)" and device.facts.compute_capability == "8.6"
    assert device.binding in ("PyCUDA 2025.1.2", "cuda-python 13.5.0")
    assert gpu_uuid() == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_pycuda_comes_first_where_both_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, "pycuda")
    both = {name: sys.modules[name] for name in ("pycuda", "pycuda.driver")}
    plug_in(monkeypatch, gpu, "cuda-python")
    assert Device().binding.startswith("cuda-python")
    for name, module in both.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert Device().binding.startswith("PyCUDA")


def test_a_graph_repeats_what_was_captured(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        host, address, stream = device.pinned(4, "x"), device.allocate(4, "x"), device.stream()
        graph = device.capture(stream, lambda: device.copy_in(address, host, stream))
        device.synchronize(stream)
        assert (gpu.bytes_at(address, 4) == RUBBISH).all()  # captured, not done
        for value in (1, 2):
            host[:] = value
            device.launch(graph, stream)
            device.synchronize(stream)
            assert (gpu.bytes_at(address, 4) == value).all()
        device.destroy_graph(graph)
    assert "graphs" not in gpu.left_behind


def test_what_cannot_be_captured_leaves_a_usual_stream(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        host, address, stream = device.pinned(4, "x"), device.allocate(4, "x"), device.stream()
        with pytest.raises(GraphCaptureError, match="cuMemAlloc"):
            device.capture(stream, lambda: device.free(device.allocate(4, "not now")))
        gpu.fails["cuStreamEndCapture"] = Code.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
        with pytest.raises(GraphCaptureError):
            device.capture(stream, lambda: None)
        gpu.fails.clear()
        with pytest.raises(KeyError):
            device.capture(stream, lambda: {}["a fault of the caller"])
        device.copy_in(address, host, stream)
        device.synchronize(stream)
    assert "graphs" not in gpu.left_behind


def test_one_stream_waits_for_another(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        first, second, out = (device.pinned(1, "x") for _ in range(3))
        address, ours, theirs = device.allocate(1, "x"), device.stream(), gpu.foreign_stream()
        first[:], second[:] = 1, 2
        gpu.copy("cuMemcpyHtoDAsync", address, first.ctypes.data, 1, theirs)  # the host program's own work
        device.wait_for_stream(ours, theirs)
        gpu.copy("cuMemcpyHtoDAsync", address, second.ctypes.data, 1, theirs)  # came too late to be waited for
        device.copy_out(out, address, ours)
        device.synchronize(ours)
        assert out[0] == 1
    assert "events" not in gpu.left_behind


def test_time_on_the_device(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        stream = device.stream()
        with device.timed(stream) as milliseconds:
            assert milliseconds == []
        assert milliseconds == [1.5]
    assert "events" not in gpu.left_behind


def test_whose_memory_an_address_is(gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        address, host = device.allocate(16, "x"), device.pinned(16, "x")
        assert [device.device_of(place) for place in (address + 15, host.ctypes.data, 1)] == [0, None, None]


# ------------------------------------------------------------------------------------------------- side by side, errors


def test_the_context_comes_off_again_when_something_fails(gpu: SimulatedGpu) -> None:
    device = Device()
    with host_context(gpu):
        with pytest.raises(OutOfMemoryError), device.current():
            device.allocate(1 << 40, "too much")
        with pytest.raises(RuntimeError, match="of the caller"), device.current():
            raise RuntimeError("of the caller")
        assert len(gpu.contexts) == 1


def test_several_threads_and_devices_share_the_context(gpu: SimulatedGpu) -> None:
    first, second = Device(), Device()
    used: dict[Device, int] = {}

    def work(device: Device) -> None:
        with device.current():
            used[device] = device.allocate(8, "x")

    threads = [threading.Thread(target=work, args=(device,)) for device in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(used.values())) == 2
    first.close()
    with second.current():
        second.free(used[second])


def test_a_closed_device(gpu: SimulatedGpu) -> None:
    device = Device()
    retained = gpu.retained
    device.close()
    device.close()
    # PyCUDA's way to release a primary context would leave it current: there it stays until the process ends.
    assert retained == 1 and gpu.retained == (1 if device.binding.startswith("PyCUDA") else 0)
    with pytest.raises(UnavailableError, match=r"cuda:0 .* was closed"), device.current():
        pass


def test_too_little_memory_is_said_in_numbers(gpu: SimulatedGpu) -> None:
    gpu.capacity = 10_000
    device = Device()
    with device.current():
        device.allocate(4_000, "x")
        with pytest.raises(OutOfMemoryError) as caught:
            device.allocate(8_000, "activations")
    assert "no 8,000 bytes for activations: 6,000 of 10,000 bytes are free" in caught.value.problem
    gpu.fails["cuMemHostAlloc"] = Code.CUDA_ERROR_OUT_OF_MEMORY
    with device.current(), pytest.raises(OutOfMemoryError, match="12 bytes of page-locked host memory for the inputs"):
        device.pinned(12, "the inputs")


def sent_and_awaited(device: Device, address: int, host: np.ndarray, stream: int) -> None:
    device.copy_in(address, host, stream)
    device.synchronize(stream)


@pytest.mark.parametrize(
    ("call", "words"),
    [("cuStreamSynchronize", "failed at the work on the device"), ("cuMemcpyHtoDAsync", "failed at a copy to the")],
)
def test_other_failures(call: str, words: str, gpu: SimulatedGpu) -> None:
    device = Device()
    with device.current():
        host, address, stream = device.pinned(4, "x"), device.allocate(4, "x"), device.stream()
        gpu.fails[call] = Code.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(UnavailableError, match=words) as caught:
            sent_and_awaited(device, address, host, stream)
        assert call in caught.value.problem and "illegal_address" in caught.value.problem.lower()


def test_without_a_context_nothing_works(gpu: SimulatedGpu) -> None:
    with pytest.raises(UnavailableError, match=r"(?i)invalid_context"):
        Device().stream()


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, SimulatedGpu(), "")
    with pytest.raises(UnavailableError, match=r"neither PyCUDA \(.*pycuda.*\) nor cuda-python \(.*cuda.*\)") as caught:
        Device()
    assert "pip install" in str(caught.value.hint)


def test_no_driver_and_no_such_device(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match=r"cuda:3 cannot be used: .*cuDeviceGet with error 101"):
        Device(3)
    gpu.fails["cuInit"] = Code.CUDA_ERROR_NO_DEVICE
    with pytest.raises(UnavailableError, match="cuInit"):
        Device()


# ------------------------------------------------------------------------------------------------- the real cuda-python

STUB = Path(__file__).parents[1] / "simulators/libcuda.c"


@pytest.fixture(scope="module")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda in C that has the driver's functions and no GPU behind them."""
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler for a libcuda without a GPU")
    folder = tmp_path_factory.mktemp("libcuda")
    command = [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", STUB, "-ldl"]
    subprocess.run([str(word) for word in command], check=True)
    return folder


THROUGH_THE_REAL_PACKAGES = """
import ctypes
import numpy as np
from spmdeploy.gpu import driver as cuda
from spmdeploy.gpu import cuda_bindings
from spmdeploy.gpu import device as cuda_device

assert cuda.visible_gpus() == 1 and cuda.gpu_facts().compute_capability == "9.0"
assert cuda.gpu_uuid() == "GPU-00112233-4455-6677-8899-aabbccddeeff"
device = cuda_device.Device()
with device.current():
    assert device.memory() == (100, 200)
    address, sent, received = device.allocate(1000, "x"), device.pinned(1000, "x"), device.pinned(1000, "x")
    stream = device.stream()
    sent[:] = np.arange(1000) % 251
    device.copy_in(address, sent, stream)
    device.copy_out(received, address, stream)
    device.synchronize(stream)
    assert np.array_equal(sent, received)
    device.order_after(stream, 0x1234)
    assert device.device_of(address) == 0 and device.device_of(1) is None
    with device.timed(stream) as milliseconds:
        pass
    assert milliseconds == [1.5]
    graph = device.capture(stream, lambda: device.copy_in(address, sent, stream))
    device.launch(graph, stream)
    device.destroy_graph(graph)
    try:
        device.allocate(2_000_000, "activations")
    except cuda_device.OutOfMemory as error:
        assert "2,000,000 bytes for activations: 100 of 200 bytes are free" in error.problem
    else:
        raise AssertionError("there are no so many bytes")
    device.load_kernels()
    place = 0x7F00_1234_5678
    device.kernel("cut", 1000, stream, place, place + 16, 7, 8, 9, 10, 11, 12)
    device.clear(place, 1 << 33, stream)
    device.copy_within(place, place + 1, (1 << 33) + 1, stream)
    device.free(address)
    device.free_pinned(sent)
    device.free_pinned(received)
    device.destroy_stream(stream)
device.close()

# What the class for PyCUDA, which cannot be installed without CUDA, asks of the driver by ctypes.
direct = cuda_bindings.PyCuda.__new__(cuda_bindings.PyCuda)
direct._driver = cuda.Driver()
direct.begin_capture(0x51)
graph = direct.end_capture(0x51)
direct.launch(graph, 0x51)
direct.destroy_graph(graph)
direct.order_after(0x51, 0x1234)
assert direct.device_of(5) == 0 and direct.device_of(1) is None
print("all well")
"""


def test_the_real_packages_call_the_functions_that_were_meant(stub_library: Path) -> None:
    """Names, order and types of the arguments, by which no fake of ours can be wrong in the same way twice."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub_library)}
    command = [sys.executable, "-c", THROUGH_THE_REAL_PACKAGES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "all well\n", done.stderr
    calls = done.stderr.splitlines()
    for call in (
        "cuCtxPushCurrent ours",
        "cuStreamCreate flags 1",
        "cuMemcpyHtoDAsync 1000 bytes, stream 0x51",
        "cuStreamWaitEvent stream 0x51, event 0x77, flags 0",
        "cuStreamBeginCapture stream 0x51, mode 1",
        "cuGraphInstantiateWithFlags graph 0x99, flags 0",
        "cuGraphLaunch graph 0xaa, stream 0x51",
        "cuModuleLoadData 1",
        "cuLaunchKernel 0xf0, grid 4 1 1, block 256 1 1, shared 0, stream 0x51, extra (nil)",
        "to 7f0012345678, from 7f0012345688, then 7 8, threads 1000",
        "cuMemsetD8Async 7f0012345678, 0, 8589934592, stream 0x51",
        "cuMemcpyDtoDAsync to 7f0012345678, from 7f0012345679, 8589934593 bytes, stream 0x51",
        "cuModuleUnload 0xbb",
    ):
        assert call in calls, calls
    assert calls.count("cuCtxPushCurrent ours") == calls.count("cuCtxPopCurrent")
    assert calls.count("cuStreamBeginCapture stream 0x51, mode 1") == calls.count("cuGraphExecDestroy graph 0xaa") == 2
    assert calls.count("cuDevicePrimaryCtxRetain 0") == calls.count("cuDevicePrimaryCtxRelease 0") == 1
