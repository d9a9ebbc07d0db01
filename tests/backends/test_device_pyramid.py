"""Cascades on the simulated GPU: the host's images bit for bit, and none of them on the host before the end."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spmdeploy.backends import onnxruntime as ort
from spmdeploy.backends.base import SupportsDevicePyramid
from spmdeploy.backends.device_pyramid import TILE
from spmdeploy.backends.tensorrt import TensorRtSession
from spmdeploy.editing.editor import Editor, EditResult
from spmdeploy.errors import OutOfMemoryError, UnavailableError
from spmdeploy.gpu.arrays import DeviceArray
from spmdeploy.gpu.buffers import EngineMemory
from spmdeploy.labels import ClassTable, LabelClass
from spmdeploy.types import ModelInput
from tests.backends.test_tensorrt import LIBRARIES, SIZE, cache, gpu, inputs_for, opened, refine_inputs, session
from tests.simulators.simulated_gpu import Code, SimulatedGpu
from tests.simulators.simulated_packages import PACKAGES, plug_in
from tests.simulators.simulated_tensorrt import edited_like

__all__ = ["cache", "gpu", "session"]  # fixtures of the neighbor
CLASSES = ClassTable("four", tuple(LabelClass(i, f"class {i}", (i, i, i)) for i in range(4)), 255)


class OnHost:
    """A session without what keeps images on the device."""

    def __init__(self, session: TensorRtSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        if name == "device_cascade":
            raise AttributeError(name)
        return getattr(self._session, name)


def photo_of(height: int, width: int, seed: int = 0, smooth: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo, labels, instances."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), np.uint8)
    if smooth:
        image[:] = np.linspace(0, 255, width).astype(np.uint8)[:, None]
    return image, random.integers(0, 4, (height, width), np.uint8), random.integers(0, 99, (height, width), np.int32)


def mask_in(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[height // 8 : -(height // 6), width // 5 : -(width // 8)] = True
    mask[height // 2 : height // 2 + 3, :] = False
    return mask


def edit(session: Any, height: int, width: int, mask: np.ndarray | None = None, **more: Any) -> EditResult:
    image, labels, instances = photo_of(height, width, smooth=more.pop("smooth", False))
    mask = mask_in(height, width) if mask is None else mask
    return Editor(session, CLASSES).edit(image, labels, mask, instances, tiling="cascade", **more)


def assert_same(one: EditResult, other: EditResult) -> None:
    assert np.array_equal(one.image, other.image)
    for window, expected in zip(one.report.windows, other.report.windows, strict=True):
        assert (window.between_levels, expected.between_levels) == ("device", "host")
        for level, wanted in zip(window.levels, expected.levels, strict=True):
            assert (level.height, level.width, level.tiles) == (wanted.height, wanted.width, wanted.tiles)
            assert (level.refined, level.seam_score) == (wanted.refined, wanted.seam_score)
            assert (level.tile_mismatch is None) == (wanted.tile_mismatch is None)
            assert level.tile_mismatch == pytest.approx(wanted.tile_mismatch, rel=1e-6)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("runtime", "version"), LIBRARIES)
def test_cascade_on_the_device_equals_the_hosts(
    runtime: str, version: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, package)
    with opened(gpu, tmp_path, runtime, version) as session:
        assert isinstance(session, SupportsDevicePyramid) and not isinstance(OnHost(session), SupportsDevicePyramid)
        for _ in range(3):  # enqueued, captured, launched
            assert_same(edit(session, 75, 90), edit(OnHost(session), 75, 90))
        assert session.notes == ()
    assert gpu.left_behind == {} and gpu.contexts == []


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(st.integers(SIZE + 1, 100)), draw(st.integers(SIZE + 1, 100))
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : top + draw(st.integers(1, 90)), left : left + draw(st.integers(1, 90))] = True
    mask[0, 0] = False
    mask[-1, -1] = True
    return mask


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=masks(), batch=st.integers(1, 11), smooth=st.booleans())
def test_cascade_of_any_window_equals_the_hosts(
    mask: np.ndarray, batch: int, smooth: bool, session: TensorRtSession
) -> None:
    """The same session all along. Smooth photos are enlarged, the others refined."""
    options = {"mask": mask, "batch_size": batch, "smooth": smooth}
    found, expected = (edit(one, *mask.shape, **options) for one in (session, OnHost(session)))
    assert np.array_equal(found.image, expected.image)
    assert [window.to_json() | {"between_levels": None} for window in found.report.windows] == [
        window.to_json() | {"between_levels": None} for window in expected.report.windows
    ]


@pytest.mark.parametrize(("height", "width"), [(17, 100), (100, 9), (40, 41), (7, 70)])
def test_cascade_of_levels_smaller_than_a_tile_equals_the_hosts(
    height: int, width: int, session: TensorRtSession
) -> None:
    """What a tile is made from is then continued by mirroring, more than once where it must be."""
    assert_same(*(edit(one, height, width) for one in (session, OnHost(session))))


def test_cascade_of_a_smooth_photo_is_enlarged(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    found, expected = (edit(one, 75, 90, smooth=True) for one in (session, OnHost(session)))
    assert_same(found, expected)
    assert not any(level.refined for window in found.report.windows for level in window.levels)


def test_cascade_copies_images_to_the_host_at_the_end_only(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    """To the device go tables, once, and what the photo shows of each tile; back come the levels, when all are done."""
    edit(session, 75, 90)
    gpu.calls.clear()
    gpu.copied.clear()
    (window,) = edit(session, 75, 90, batch_size=4).report.windows
    assert len(window.plan.levels) == 3
    back = [size for function, size in gpu.copied if function == "cuMemcpyDtoHAsync"]
    canvases = sum(math.prod(level.extent) * 12 for level in window.plan.levels)
    planes = sum(level.region.height * level.region.width * 4 for level in window.plan.levels)
    assert sum(back) == canvases + planes
    places = [number for number, call in enumerate(gpu.calls) if call == "cuMemcpyDtoHAsync"]
    work = {"kernel cut", "kernel blend", "kernel compare", "kernel resample", "execute_async_v3", "cuGraphLaunch"}
    assert max(number for number, call in enumerate(gpu.calls) if call in work) < places[0]

    batches = [1] + [
        min(4, len(level.tiles) - start) for level in window.plan.levels for start in range(0, len(level.tiles), 4)
    ]
    sent = [size for function, size in gpu.copied if function == "cuMemcpyHtoDAsync"]
    pixels = SIZE * SIZE
    tiles = [size * batch for batch in batches for size in (3 * pixels, pixels, 4 * pixels, pixels, TILE.itemsize)]
    del tiles[4]  # the coarse edit has no tile
    assert sent[-len(tiles) :] == tiles
    tables = sent[: -len(tiles)]
    assert sum(tables) < 1 << 16


def test_cascade_tiles_of_a_batch_are_one_launch(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    edit(session, 75, 90)
    gpu.calls.clear()
    (window,) = edit(session, 75, 90, batch_size=4).report.windows
    tiles = [len(level.tiles) for level in window.plan.levels]
    batches = sum(math.ceil(count / 4) for count in tiles)
    assert batches < sum(tiles)
    for name in ("cut", "blend", "compare"):
        assert gpu.calls.count(f"kernel {name}") == batches


def test_cascade_prepares_a_batch_while_the_one_before_is_computed(
    gpu: SimulatedGpu, session: TensorRtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for the copies of the batch before the last one, not for the stream, and never for the last."""
    edit(session, 75, 90)
    stage, unfinished = EngineMemory.stage, []

    def watched(memory: EngineMemory, inputs: dict[str, np.ndarray]) -> None:
        before = gpu.stream(memory.stream).done
        end = gpu.stream(memory.stream).end
        stage(memory, inputs)
        if "tiles" in inputs:
            unfinished.append((end - before, end - gpu.stream(memory.stream).done))

    monkeypatch.setattr(EngineMemory, "stage", watched)
    gpu.calls.clear()
    edit(session, 75, 90, batch_size=4)
    work = [number for number, call in enumerate(gpu.calls) if call in ("kernel cut", "kernel blend")]
    assert "cuStreamSynchronize" not in gpu.calls[work[0] : work[-1]]
    assert len(unfinished) > 3
    for queued, left in unfinished[1:]:
        assert queued > 0 and left > 0  # kernels of the batch before were not done when its successor was staged


def test_cascade_repeated_allocates_one_block(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    """One piece for inputs and outputs, one for activations, one lent to the cascade; nothing once it is warm."""
    edit(session, 75, 90)
    before, used = sorted(gpu.memory), gpu.used
    gpu.calls.clear()
    edit(session, 75, 90)
    assert gpu.calls.count("cuMemAlloc") == gpu.calls.count("cuMemFree") == 1
    assert (sorted(gpu.memory), gpu.used) == (before, used)
    assert not {"cuMemHostAlloc", "cuModuleLoadData", "cuStreamCreate", "create_execution_context"} & set(gpu.calls)


def test_cascade_memory_depends_on_the_window_alone(session: TensorRtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate_temporary, lent = EngineMemory.allocate_temporary, []

    def watched(memory: EngineMemory, size: int, purpose: str) -> int:
        lent.append(size)
        return allocate_temporary(memory, size, purpose)

    monkeypatch.setattr(EngineMemory, "allocate_temporary", watched)
    for height, width in ((200, 300), (400, 500)):
        mask = np.zeros((height, width), bool)
        mask[:60, :60] = True
        edit(session, height, width, mask=mask)
    assert len(lent) == 2 and lent[0] == lent[1] > 0


def test_cascade_without_memory_for_levels_runs_on_the_host(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    expected = edit(session, 75, 90)
    gpu.capacity = gpu.used + 1000
    found = edit(session, 75, 90)
    assert np.array_equal(found.image, expected.image)
    (window,) = found.report.windows
    assert window.between_levels == "host"
    (note,) = (note for note in found.report.notes if "between levels" in note)
    assert "bytes for the levels of a cascade: 1,000 of" in note


def test_cascade_without_memory_for_the_network_is_an_error(gpu: SimulatedGpu, tmp_path: Path) -> None:
    with opened(gpu, tmp_path, activations=40_000) as session:
        gpu.capacity = gpu.used + 100_000
        with pytest.raises(OutOfMemoryError) as caught:
            edit(session, 75, 90, batch_size=8)
        assert caught.value.exit_code == 8
        del caught  # which holds on to what the library has made
    assert gpu.left_behind == {}


def test_cascade_short_of_memory_reserves_the_network_first(gpu: SimulatedGpu, tmp_path: Path) -> None:
    """What fits into the host's way of doing it still does."""
    with opened(gpu, tmp_path, activations=100_000) as session:
        session.run(ModelInput(**inputs_for(1)))
        session.refine(*refine_inputs(inputs_for(1, coarse=True)))
        gpu.capacity = gpu.used + 301_000
        assert edit(session, 75, 90, batch_size=4).report.windows[0].between_levels == "host"
        gpu.capacity += 10_000_000
        assert edit(session, 75, 90, batch_size=4).report.windows[0].between_levels == "device"


def test_cascade_without_kernels_runs_on_the_host(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    gpu.fails["cuModuleLoadData"] = Code.CUDA_ERROR_INVALID_VALUE
    found = edit(session, 75, 90)
    assert found.report.windows[0].between_levels == "host"
    assert any("failed at loading the refinement kernels" in note for note in found.report.notes)
    gpu.fails.clear()
    assert edit(session, 75, 90).report.windows[0].between_levels == "device"


@pytest.mark.parametrize("call", ["kernel blend", "kernel compare", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync"])
def test_cascade_failed_leaves_the_session_usable(call: str, gpu: SimulatedGpu, session: TensorRtSession) -> None:
    expected, *_ = [edit(session, 75, 90).image for _ in range(3)]  # until nothing new is made any more
    left = gpu.left_behind
    gpu.fails[call] = Code.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(UnavailableError, match="failed at"):
        edit(session, 75, 90)
    gpu.fails.clear()
    assert gpu.left_behind == left
    assert np.array_equal(edit(session, 75, 90).image, expected)


def test_cascade_interrupted_frees_its_memory(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    expected, *_ = [edit(session, 75, 90).image for _ in range(3)]
    left = gpu.left_behind

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(session, 75, 90, progress=stop)
    assert gpu.left_behind == left
    assert np.array_equal(edit(session, 75, 90).image, expected)


def test_cascade_with_other_edits_between_tiles_is_unchanged(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    """Whatever they put into the pool's places."""
    expected = edit(session, 75, 90)

    def others(done: int, total: int) -> None:
        inputs = inputs_for(1 + done % 8, done)
        assert np.array_equal(session.run(ModelInput(**inputs)), edited_like(inputs)["edited"])

    assert np.array_equal(edit(session, 75, 90, progress=others).image, expected.image)


def test_cascades_in_threads_give_each_its_result(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    sizes = [(75, 90), (60, 100), (110, 40)]
    expected = [edit(session, *size).image for size in sizes]
    left, found = gpu.left_behind, {}

    def work(place: int) -> None:
        found[place] = edit(session, *sizes[place], batch_size=2)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, image in enumerate(expected):
        assert np.array_equal(found[place].image, image)
        assert {window.between_levels for window in found[place].report.windows} == {"device"}
    assert gpu.left_behind["memory"] == left["memory"]


def test_cascade_of_a_session_closed_meanwhile_is_an_error(gpu: SimulatedGpu, tmp_path: Path) -> None:
    session = opened(gpu, tmp_path)
    with pytest.raises(UnavailableError, match="closed"):
        edit(session, 75, 90, progress=lambda done, total: session.close() if done > 3 else None)
    assert gpu.left_behind == {}


class Graph:
    """A graph in ONNX Runtime that computes on the simulated GPU, in no stream of ours."""

    gpu: SimulatedGpu
    batches: list[int]
    provider, size, outputs = "CUDAExecutionProvider", SIZE, frozenset({"edited", "unrounded"})
    fails: Exception | None = None
    notes = ()

    def __init__(self, content: Any, graph: str, device: str, *_: Any) -> None:
        self._device = device

    def run(self, outputs: Any, inputs: Any) -> list[np.ndarray]:
        return [edited_like(dict(inputs))[name] for name in outputs]

    def bound(self, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> Callable[[], None]:
        self.batches.append(inputs["image"].shape[0])

        def view(array: DeviceArray) -> np.ndarray:
            memory = self.gpu.bytes_at(array.address, math.prod(array.shape) * np.dtype(array.dtype).itemsize)
            return memory.view(array.dtype).reshape(array.shape)

        def run() -> None:
            assert not any(stream.queue for stream in self.gpu.streams.values()), "its inputs are still being written"
            if self.fails:
                raise self.fails
            made = edited_like({name: view(array).copy() for name, array in inputs.items()})
            for name, array in outputs.items():
                view(array)[:] = made[name]

        return run


@pytest.fixture
def on_cuda(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[ort.OnnxRuntimeSession]:
    monkeypatch.setattr(ort, "LoadedGraph", Graph)
    monkeypatch.setattr(Graph, "gpu", gpu, raising=False)
    monkeypatch.setattr(Graph, "batches", [], raising=False)
    session = ort.OnnxRuntimeSession(Path("edit"), "fp16", "cuda:0", refine=lambda: Path("refine"))
    yield session
    session.close()
    assert gpu.left_behind == {} and gpu.contexts == []


def test_onnxruntime_cascade_equals_the_hosts(gpu: SimulatedGpu, on_cuda: ort.OnnxRuntimeSession) -> None:
    for batch in (2, 5, 3):
        assert_same(edit(on_cuda, 75, 90, batch_size=batch), edit(OnHost(on_cuda), 75, 90, batch_size=batch))
    gpu.calls.clear()
    edit(on_cuda, 75, 90, batch_size=4)
    assert gpu.calls.count("cuMemAlloc") == gpu.calls.count("cuMemFree") == 1
    read = [number for number, call in enumerate(gpu.calls) if call == "cuMemcpyDtoHAsync"]
    assert read[0] > max(number for number, call in enumerate(gpu.calls) if call.startswith("kernel"))


def test_onnxruntime_cascade_is_bound_once_to_fixed_batches(gpu: SimulatedGpu, on_cuda: ort.OnnxRuntimeSession) -> None:
    for batch in (3, 4, 2):  # with a smaller last batch each
        assert_same(edit(on_cuda, 75, 90, batch_size=batch), edit(OnHost(on_cuda), 75, 90, batch_size=batch))
    assert sorted(Graph.batches) == [1, 1, 4]  # the coarse edit, and tiles of both sizes
    edit(on_cuda, 75, 90, batch_size=5)
    assert sorted(Graph.batches[3:]) == [1, 4, 8]  # the memory has moved, and tiles are left for two sizes


def test_onnxruntime_cascade_after_a_failed_reservation_reserves_again(
    gpu: SimulatedGpu, on_cuda: ort.OnnxRuntimeSession
) -> None:
    expected = edit(on_cuda, 75, 90, batch_size=4).image
    capacity, gpu.capacity = gpu.capacity, gpu.used + 10
    assert edit(on_cuda, 75, 90, batch_size=8).report.windows[0].between_levels == "host"
    gpu.capacity = capacity
    found = edit(on_cuda, 75, 90, batch_size=4)
    assert found.report.windows[0].between_levels == "device" and np.array_equal(found.image, expected)


def test_onnxruntime_cascade_without_packages_runs_on_the_host(
    gpu: SimulatedGpu, on_cuda: ort.OnnxRuntimeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, gpu, "")
    found = edit(on_cuda, 75, 90)
    assert found.report.windows[0].between_levels == "host"
    assert any("neither PyCUDA" in note for note in found.report.notes)


def test_onnxruntime_cascade_failed_frees_its_memory(
    gpu: SimulatedGpu, on_cuda: ort.OnnxRuntimeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = edit(on_cuda, 75, 90).image
    left = gpu.left_behind
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "fails", OutOfMemoryError("ONNX Runtime ran out of memory on cuda:0"))
        with pytest.raises(OutOfMemoryError):
            edit(on_cuda, 75, 90)
    assert gpu.left_behind == left
    assert np.array_equal(edit(on_cuda, 75, 90).image, expected)


def test_onnxruntime_cascade_on_a_cpu_runs_on_the_host(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "LoadedGraph", Graph)
    session = ort.OnnxRuntimeSession(Path("edit"), "fp32", "cpu", refine=lambda: Path("refine"))
    report = edit(session, 75, 90).report
    assert report.windows[0].between_levels == "host" and not any("between levels" in note for note in report.notes)
    assert gpu.calls == []
