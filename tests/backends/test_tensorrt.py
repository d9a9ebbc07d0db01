"""Sessions on simulated engines: right pictures for any batch, right calls in the right order, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spmdeploy.backends.tensorrt import TensorRtSession, graph_ports
from spmdeploy.backends.tensorrt_layout import MAX_LAYOUTS, StoredParts
from spmdeploy.bundle.manifest import LAYOUT, PICTURE, REFINE
from spmdeploy.bundle.storage import FolderStore
from spmdeploy.engines import library as engine_library
from spmdeploy.engines.record import BatchRange, EngineFile, EngineRecord, Port
from spmdeploy.engines.store import StoredEngine
from spmdeploy.errors import BundleError, InputError, OutOfMemoryError, SpmDeployError, UnavailableError, UsageError
from spmdeploy.gpu.arrays import DeviceArray
from spmdeploy.types import LayoutInput, ModelInput
from tests.simulators.records import sample
from tests.simulators.simulated_gpu import Code, SimulatedGpu, host_context
from tests.simulators.simulated_packages import PACKAGES, plug_in
from tests.simulators.simulated_tensorrt import CACHED, edited_like, engine_content, offered, simulated_library

SIZE = 16
LIBRARIES = [("tensorrt", "10.3.0"), ("tensorrt", "10.16.1"), ("tensorrt", "11.4.1"), ("tensorrt-rtx", "1.7.1.116")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_library, "_loggers", {})
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    made = SimulatedGpu()
    plug_in(monkeypatch, made)
    return made


def record_of(runtime: str = "tensorrt", version: str = "10.16.1", graph: str = "edit", most: int = 8) -> EngineRecord:
    ports = graph_ports(graph, SIZE)
    outputs = tuple(ports[name] for name in ("edited", "unrounded"))
    inputs = tuple(port for name, port in ports.items() if port not in outputs)
    if graph == LAYOUT:
        inputs, outputs = tuple(ports[name] for name in LayoutInput._fields), CACHED
    if graph == PICTURE:
        inputs = (ports["image"], *CACHED)
    batch = BatchRange(1, 1, most)
    return sample(runtime=runtime, version=version, graph=graph, inputs=inputs, outputs=outputs, batch=batch)


def engine_file(folder: Path, record: EngineRecord, content: bytes | None = None, **changes: Any) -> StoredEngine:
    """An engine that was found fit; `content` or what the record says, but for the changes."""
    content = engine_content(record, **changes) if content is None else content
    name = f"{record.graph}.engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    record = replace(record, engine=EngineFile(name, len(content), hashlib.sha256(content).hexdigest()))
    return StoredEngine(folder / name, "bundle", record, (), (), (), False, FolderStore(folder), "")


def inputs_for(batch: int, seed: int = 0, coarse: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    ports = graph_ports(REFINE if coarse else "edit", SIZE)
    drawn = {}
    for name, port in ports.items():
        if name not in ("edited", "unrounded"):
            most = {"mask": 2, "labels": 12}.get(name, 256)
            drawn[name] = random.integers(0, most, (batch, *port.shape[1:])).astype(port.dtype)
    return drawn


def refine_inputs(arrays: dict[str, np.ndarray]) -> tuple[ModelInput, np.ndarray]:
    """The arguments of `refine`."""
    return ModelInput(*(arrays[name] for name in ModelInput._fields)), arrays["coarse"]


@pytest.fixture
def session(gpu: SimulatedGpu, tmp_path: Path) -> Iterator[TensorRtSession]:
    with opened(gpu, tmp_path) as made:
        yield made


def opened(gpu: SimulatedGpu, folder: Path, runtime: str = "tensorrt", version: str = "10.16.1", **changes: Any) -> Any:
    """A session with both engines. changes: to the engine's facts."""
    library = simulated_library(gpu, runtime, version)
    edit, refine = (
        engine_file(folder / graph, record_of(runtime, version, graph), **changes) for graph in ("edit", "refine")
    )
    return TensorRtSession(library, edit, refine, size=SIZE)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("runtime", "version"), LIBRARIES)
def test_run_of_both_graphs_gives_what_the_engines_compute(
    runtime: str, version: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, package)
    with host_context(gpu), opened(gpu, tmp_path, runtime, version) as session:
        assert (session.backend, session.device, session.precision, session.size) == (runtime, "cuda:0", "fp16", SIZE)
        assert session.provider.startswith(f"{'TensorRT-RTX' if runtime.endswith('rtx') else 'TensorRT'} {version} on ")
        for seed in range(3):  # enqueued, captured, launched
            edit, refine = inputs_for(2, seed), inputs_for(2, seed, coarse=True)
            assert np.array_equal(session.run(ModelInput(**edit)), edited_like(edit)["edited"])
            assert np.array_equal(session.run_unrounded(ModelInput(**edit)), edited_like(edit)["unrounded"])
            assert session.refines and np.array_equal(
                session.refine(*refine_inputs(refine)), edited_like(refine)["unrounded"]
            )
        assert session.notes == ()
    assert gpu.left_behind == {} and not any("without a context" in call for call in gpu.calls)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.integers(1, 20), min_size=1, max_size=5), unrounded=st.booleans())
def test_run_of_any_batch_is_split_into_parts(batches: list[int], unrounded: bool, session: TensorRtSession) -> None:
    """The same session all along: whatever batches came before, and in whatever order."""
    for seed, batch in enumerate(batches):
        given = inputs_for(batch, seed)
        result = session.run_unrounded(ModelInput(**given)) if unrounded else session.run(ModelInput(**given))
        assert np.array_equal(result, edited_like(given)["unrounded" if unrounded else "edited"])


def test_run_again_leaves_earlier_results(session: TensorRtSession) -> None:
    first, second = inputs_for(1, 1), inputs_for(1, 2)
    kept = session.run(ModelInput(**first))
    session.run(ModelInput(**second))
    assert np.array_equal(kept, edited_like(first)["edited"])


def test_run_in_threads_gives_each_its_result(session: TensorRtSession) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for batch in (1, 3, 9):
            given = inputs_for(batch, seed)
            if not np.array_equal(session.run(ModelInput(**given)), edited_like(given)["edited"]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_sessions_open_at_once_are_independent(gpu: SimulatedGpu, tmp_path: Path) -> None:
    given = inputs_for(2)
    with opened(gpu, tmp_path / "a") as first, opened(gpu, tmp_path / "b", "tensorrt-rtx", "1.7.1.116") as second:
        for _ in range(3):
            assert np.array_equal(first.run(ModelInput(**given)), second.run(ModelInput(**given)))
        first.close()
        assert np.array_equal(second.run(ModelInput(**given)), edited_like(given)["edited"])
    assert gpu.left_behind == {}


TRANSFERS = {"cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "execute_async_v3", "cuGraphLaunch", "cuStreamSynchronize"}


def calls_of(gpu: SimulatedGpu, session: TensorRtSession, batch: int) -> list[str]:
    gpu.calls.clear()
    session.run(ModelInput(**inputs_for(batch)))
    assert (gpu.calls[0], gpu.calls[-1]) == ("cuCtxGetCurrent", "cuCtxSetCurrent")
    return list(gpu.calls)


def test_run_repeated_becomes_one_graph_launch(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    first, second, third = (calls_of(gpu, session, 2) for _ in range(3))
    enqueued = ["cuMemcpyHtoDAsync"] * 4 + ["execute_async_v3", "cuMemcpyDtoHAsync"]
    assert [call for call in first if call in TRANSFERS - {"cuStreamSynchronize"}] == enqueued
    addressed = [first.index(f"set_tensor_address {name}") for name in graph_ports("edit", SIZE)]
    assert max(*addressed, first.index("set_device_memory")) < first.index("execute_async_v3")
    assert first.index("cuMemcpyDtoHAsync") < len(first) - 1 - first[::-1].index("cuStreamSynchronize")

    capture = second[second.index("cuStreamBeginCapture") : second.index("cuStreamEndCapture")]
    assert [call for call in capture if call in TRANSFERS] == enqueued
    assert second.index("cuStreamEndCapture") < second.index("cuGraphInstantiate") < second.index("cuGraphLaunch")
    assert third == [
        "cuCtxGetCurrent",
        "cuDeviceGet",
        "cuCtxSetCurrent",
        "cuGraphLaunch",
        "cuStreamSynchronize",
        "cuCtxSetCurrent",
    ]


def test_run_of_several_batch_sizes_captures_each_once(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    for _ in range(3):
        for batch in (1, 2, 3):
            session.run(ModelInput(**inputs_for(batch)))
        session.run_unrounded(ModelInput(**inputs_for(3)))
    assert gpu.calls.count("cuStreamBeginCapture") == gpu.calls.count("cuGraphInstantiate") == 4
    assert gpu.calls.count("create_execution_context") == 3  # one for each: a graph's context must stay as it was


def test_timed_run_is_measured_by_events_around_the_work(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    events = len(gpu.events)
    for _ in range(3):
        gpu.calls.clear()
        assert session.timed_run(ModelInput(**inputs_for(2))) == gpu.milliseconds
        records = [place for place, call in enumerate(gpu.calls) if call == "cuEventRecord"]
        queued = [place for place, call in enumerate(gpu.calls) if call in TRANSFERS - {"cuStreamSynchronize"}]
        assert len(records) == 2 and records[0] < queued[-1] < records[1]
    assert records[0] < queued[0] and len(gpu.events) == events
    given = inputs_for(2)
    assert np.array_equal(session.run(ModelInput(**given)), edited_like(given)["edited"])


def test_run_of_known_batch_sizes_allocates_nothing(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    session.run(ModelInput(**inputs_for(8)))
    session.refine(*refine_inputs(inputs_for(8, coarse=True)))
    before = dict(gpu.memory)
    for batch in (1, 8, 20, 5):
        session.run(ModelInput(**inputs_for(batch)))
        session.refine(*refine_inputs(inputs_for(batch, coarse=True)))
    assert gpu.memory.keys() == before.keys()
    # Weights twice; inputs, outputs and activations once: the engines share them.
    assert len(gpu.memory) == 4 and len(gpu.host) == 2


def test_run_with_larger_activations_captures_again(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    for batch in (1, 1, 1, 6, 6, 6, 1, 1, 1):
        given = inputs_for(batch, batch)
        assert np.array_equal(session.run(ModelInput(**given)), edited_like(given)["edited"])
    assert gpu.calls.count("cuGraphInstantiate") == 3 and len(gpu.graphs) == 2


def test_run_that_cannot_be_captured_is_noted(gpu: SimulatedGpu, tmp_path: Path) -> None:
    for runtime, version in LIBRARIES:
        with opened(gpu, tmp_path, runtime, version, capturable=False) as session:
            for seed in range(3):
                given = inputs_for(2, seed)
                assert np.array_equal(session.run(ModelInput(**given)), edited_like(given)["edited"])
            (note,) = session.notes
            assert "edit: without CUDA graphs" in note and "captur" in note
    assert gpu.left_behind == {}


def test_run_failed_while_capturing_is_an_error(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    session.run(ModelInput(**inputs_for(1)))
    gpu.fails["cuGraphInstantiate"] = Code.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(UnavailableError, match="cuGraphInstantiate"):
        session.run(ModelInput(**inputs_for(1)))
    assert session.notes == ()


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuMemAlloc", "cuGraphLaunch"])
def test_run_after_a_failure_works(call: str, gpu: SimulatedGpu, session: TensorRtSession) -> None:
    given = inputs_for(1)
    session.run(ModelInput(**given))
    session.run(ModelInput(**given))
    with host_context(gpu):
        gpu.fails[call] = Code.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(SpmDeployError):
            # A new batch size needs everything but the graph that exists.
            session.run(ModelInput(**(given if call == "cuGraphLaunch" else inputs_for(2))))
        gpu.fails.clear()
        assert np.array_equal(session.run(ModelInput(**given)), edited_like(given)["edited"])


def test_run_without_memory_names_the_batch_that_fits(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    gpu.capacity = gpu.used + 4_500
    with pytest.raises(OutOfMemoryError) as caught:
        session.run(ModelInput(**inputs_for(8)))
    assert caught.value.exit_code == 8
    assert "no 8,000 bytes for activations: 4,500 of" in caught.value.problem
    assert "bytes are free, 3,500 too few" in caught.value.problem
    assert "a batch of 8 is too large" in caught.value.problem
    assert "a batch of 4 would fit: use --batch-size 4, or build with --max-batch 4" in str(caught.value.hint)
    given = inputs_for(4)
    for _ in range(3):
        assert np.array_equal(session.run(ModelInput(**given)), edited_like(given)["edited"])
    gpu.capacity = gpu.used - 4_000 + 500
    with pytest.raises(OutOfMemoryError, match="no 5,000 bytes"):
        session.run(ModelInput(**inputs_for(5)))
    with pytest.raises(OutOfMemoryError) as caught:
        session.run(ModelInput(**inputs_for(1)))
    assert "no smaller batch would fit" in str(caught.value.hint)


def test_session_without_memory_says_what_is_missing(gpu: SimulatedGpu, tmp_path: Path) -> None:
    item = 2 * SIZE * SIZE * 3 + 2 * SIZE * SIZE + 4 * SIZE * SIZE + 4 * SIZE * SIZE * 3
    gpu.capacity = 4_000
    with pytest.raises(OutOfMemoryError, match=r"no room for the .* bytes of .*: 4,000 of 4,000 bytes are free"):
        opened(gpu, tmp_path)
    gpu.capacity = 5_000 + 3 * item
    with pytest.raises(OutOfMemoryError, match=rf"no {8 * item:,} bytes for inputs and outputs") as caught:
        opened(gpu, tmp_path)
    assert "there is room for batches of 3: --max-batch 3" in str(caught.value.hint)
    assert gpu.left_behind == {} and gpu.contexts == []


def test_session_of_a_changed_engine_loads_nothing(gpu: SimulatedGpu, tmp_path: Path) -> None:
    found = engine_file(tmp_path, record_of())
    found.path.write_bytes(found.path.read_bytes()[:-1] + b" ")
    with pytest.raises(BundleError, match="SHA-256") as caught:
        TensorRtSession(simulated_library(gpu), found, size=SIZE)
    assert caught.value.exit_code == 6 and "deserialize_cuda_engine" not in gpu.calls and gpu.left_behind == {}
    unfit = replace(
        engine_file(tmp_path, record_of()), incompatibilities=("GPU: built on X, here Y", "tensorrt: 1, here 2")
    )
    with pytest.raises(BundleError, match=r"GPU: built on X, here Y; tensorrt: 1, here 2"):
        TensorRtSession(simulated_library(gpu), unfit, size=SIZE)


def test_session_of_an_unreadable_engine_has_the_librarys_error(gpu: SimulatedGpu, tmp_path: Path) -> None:
    found = engine_file(tmp_path, record_of(), b"not an engine")
    with pytest.raises(BundleError, match=r"cannot be loaded by tensorrt 10\.16\.1: Serialization assertion") as caught:
        TensorRtSession(simulated_library(gpu), found, size=SIZE)
    assert "not what it is about" not in caught.value.problem and "spmdeploy build" in str(caught.value.hint)
    assert gpu.left_behind == {} and gpu.contexts == []


def test_session_on_a_driver_that_is_too_old_is_unavailable(gpu: SimulatedGpu, tmp_path: Path) -> None:
    gpu.fails["cuMemAlloc"] = Code.CUDA_ERROR_NO_DEVICE
    with pytest.raises(UnavailableError, match=r"cannot use cuda:0 .*: Error Code 1: Cuda Runtime") as caught:
        opened(gpu, tmp_path)
    assert caught.value.exit_code == 4 and "driver" in str(caught.value.hint) and gpu.left_behind == {}


def swapped(ports: tuple[Port, ...], changed_port: str, changes: dict[str, Any]) -> list[list[Any]]:
    changed = [replace(port, **changes) if port.name == changed_port else port for port in ports]
    return [[port.name, port.dtype, list(port.shape)] for port in changed]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"inputs": ("instances", {"dtype": "int64"})}, r"instances: int64 .* in the engine, int32 .* in its record"),
        (
            {"inputs": ("mask", {"shape": (-1, 8, 8)})},
            r"mask: uint8 \[-1, 8, 8\] in the engine, .* in the graph",
        ),
        ({"inputs": ("labels", {"name": "classes"})}, "classes: .* in the engine, nothing in its record"),
        ({"outputs": ("edited", {"dtype": "float32"})}, "edited: float32"),
        ({"batch": [1, 1, 4]}, "image: batches of 1 to 4, 1 to 8 in its record"),
        ({"profiles": 2}, "2 optimization profiles"),
    ],
)
def test_session_of_an_engine_unlike_its_record_is_refused(
    changes: dict[str, Any], text: str, gpu: SimulatedGpu, tmp_path: Path
) -> None:
    record = record_of()
    facts = {
        kind: swapped(getattr(record, kind), *change) if isinstance(change, tuple) else change
        for kind, change in changes.items()
    }
    with pytest.raises(BundleError, match=text):
        TensorRtSession(simulated_library(gpu), engine_file(tmp_path, record, **facts), size=SIZE)
    assert gpu.left_behind == {} and gpu.contexts == []


def test_session_of_another_graphs_engine_is_refused(gpu: SimulatedGpu, tmp_path: Path) -> None:
    record = record_of()
    record = replace(record, inputs=(*record.inputs, Port("coarse", "float32", (-1, 8, 8, 3))))
    with pytest.raises(BundleError, match=r"coarse: float32 .* in the engine, nothing in the graph"):
        TensorRtSession(simulated_library(gpu), engine_file(tmp_path, record), size=SIZE)


def test_run_refused_by_the_library_has_its_error(gpu: SimulatedGpu, tmp_path: Path) -> None:
    library = simulated_library(gpu)
    with TensorRtSession(library, engine_file(tmp_path, record_of()), size=SIZE) as session:
        library._refuses = "Error Code 1: Cuda Runtime (invalid resource handle)"
        with pytest.raises(UnavailableError, match="on a batch of 3: Error Code 1: Cuda Runtime"):
            session.run(ModelInput(**inputs_for(3)))
        library._refuses, library._no_contexts = "", True
        with pytest.raises(UnavailableError, match="makes no context"):
            session.run(ModelInput(**inputs_for(2)))


@pytest.mark.parametrize(
    ("name", "spoil", "text"),
    [
        ("labels", lambda array: array.astype(np.int64), r"labels is int64 \(2, 16, 16\), but the graph has uint8"),
        ("mask", lambda array: array[:1], r"mask is uint8 \(1, 16, 16\), but the graph has uint8 \(2, 16, 16\)"),
        ("image", lambda array: array[:0], r"image is uint8 \(0, 16, 16, 3\), .* uint8 \(B, 16, 16, 3\)"),
        ("image", lambda array: array[0], "image is uint8"),
        ("image", lambda array: array[0, 0, 0, 0], "image is uint8"),
        ("instances", lambda array: array[..., None], "instances is int32"),
    ],
)
def test_run_with_wrong_arrays_names_them(name: str, spoil: Any, text: str, session: TensorRtSession) -> None:
    with pytest.raises(InputError, match=text):
        session.run(ModelInput(**{**inputs_for(2), name: spoil(inputs_for(2)[name])}))


def test_refine_without_an_engine_names_the_command(gpu: SimulatedGpu, tmp_path: Path) -> None:
    with TensorRtSession(simulated_library(gpu), engine_file(tmp_path, record_of()), size=SIZE) as session:
        assert not session.refines and session.refine_unsupported is not None
        with pytest.raises(BundleError, match="no refine engine") as caught:
            session.refine(*refine_inputs(inputs_for(1, coarse=True)))
    assert "spmdeploy build BUNDLE --graph refine" in str(caught.value.hint)


def test_session_closed_frees_everything(gpu: SimulatedGpu, tmp_path: Path) -> None:
    session = opened(gpu, tmp_path)
    session.run(ModelInput(**inputs_for(2)))
    session.close()
    session.close()
    assert gpu.left_behind == {} and gpu.contexts == []
    with pytest.raises(UnavailableError, match="was closed"):
        session.run(ModelInput(**inputs_for(2)))


def test_session_closed_on_a_failed_device_frees_everything(gpu: SimulatedGpu, tmp_path: Path) -> None:
    session = opened(gpu, tmp_path)
    session.run(ModelInput(**inputs_for(2)))
    gpu.fails["cuStreamSynchronize"] = Code.CUDA_ERROR_ILLEGAL_ADDRESS
    session.close()
    assert gpu.left_behind == {} and gpu.contexts == []


def rtx(gpu: SimulatedGpu, folder: Path) -> Any:
    return opened(gpu, folder, "tensorrt-rtx", "1.7.1.116")


def test_rtx_session_opened_again_compiles_nothing(gpu: SimulatedGpu, tmp_path: Path, cache: Path) -> None:
    for expected in (["compile 2", "compile 3"], [], []):
        gpu.calls.clear()
        with rtx(gpu, tmp_path) as session:
            for batch in (2, 3, 2, 3):
                session.run(ModelInput(**inputs_for(batch)))
        assert [call for call in gpu.calls if call.startswith("compile")] == expected
        assert session.notes == ()
    (kept,) = (cache / "kernels").iterdir()
    assert kept.stat().st_mode & 0o077 == 0 or (cache / "kernels").stat().st_mode & 0o077 == 0  # nobody else's business


def test_rtx_kernels_of_another_version_are_compiled_again(gpu: SimulatedGpu, tmp_path: Path, cache: Path) -> None:
    with rtx(gpu, tmp_path) as session:
        session.run(ModelInput(**inputs_for(2)))
    (kept,) = (cache / "kernels").iterdir()
    kept.write_bytes(b"kernels of another version:2")
    gpu.calls.clear()
    with rtx(gpu, tmp_path) as session:
        session.run(ModelInput(**inputs_for(2)))
    assert "compile 2" in gpu.calls and b"1.7.1.116:2" in kept.read_bytes()


def test_rtx_kernels_that_cannot_be_written_are_noted(gpu: SimulatedGpu, tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with rtx(gpu, tmp_path) as session:
        session.run(ModelInput(**inputs_for(2)))
    (note,) = session.notes
    assert "compiled kernels are lost" in note and str(cache) in note


class OnGpu:
    """Somebody's array on the GPU, with the attribute that says so."""

    def __init__(self, gpu: SimulatedGpu, array: np.ndarray, **changes: Any) -> None:
        self.address = gpu.place(array)
        self.array = gpu.memory[self.address].view(array.dtype).reshape(array.shape)
        self.interface = {
            "data": (self.address, False),
            "shape": array.shape,
            "typestr": array.dtype.str,
            "version": 3,
            "strides": None,
            **changes,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.interface


def on_gpu(gpu: SimulatedGpu, given: dict[str, np.ndarray]) -> tuple[dict[str, OnGpu], dict[str, OnGpu]]:
    outputs = {name: OnGpu(gpu, np.zeros_like(array)) for name, array in edited_like(given).items()}
    return {name: OnGpu(gpu, array) for name, array in given.items()}, outputs


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("batch", [1, 3, 8, 19])
def test_run_device_copies_nothing_to_the_host(
    batch: int, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, package)
    with opened(gpu, tmp_path) as session:
        stream = gpu.foreign_stream()
        for seed in range(2):
            edit, refine = inputs_for(batch, seed), inputs_for(batch, seed, coarse=True)
            for graph, given in (("edit", edit), (REFINE, refine)):
                inputs, outputs = on_gpu(gpu, given)
                gpu.calls.clear()
                session.run_device(inputs, outputs, stream, graph)
                assert not {"cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"} & set(gpu.calls)
                assert seed == 0 or "cuStreamSynchronize" not in gpu.calls  # at first there may be memory to make
                assert not outputs["edited"].array.any()  # queued only
                gpu.streams[stream].drain()
                for name, expected in edited_like(given).items():
                    assert np.array_equal(outputs[name].array, expected)
            assert np.array_equal(session.run(ModelInput(**edit)), edited_like(edit)["edited"])
        del gpu.streams[stream]
    assert set(gpu.left_behind) == {"memory"}  # the caller's


def test_run_device_takes_addresses_and_one_output(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    given = inputs_for(2)
    inputs, outputs = on_gpu(gpu, given)
    pointers = {
        name: DeviceArray(value.address, value.array.shape, value.array.dtype.name) for name, value in inputs.items()
    }
    stream = gpu.foreign_stream()
    session.run_device(pointers, {"unrounded": outputs["unrounded"]}, stream)
    gpu.streams[stream].drain()
    assert np.array_equal(outputs["unrounded"].array, edited_like(given)["unrounded"])


def test_run_after_run_device_waits_for_it(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    """They share activations: whoever comes later waits, on the device."""
    first, second = inputs_for(3, 1), inputs_for(3, 2)
    inputs, outputs = on_gpu(gpu, first)
    session.run_device(inputs, outputs, stream := gpu.foreign_stream())
    assert np.array_equal(session.run(ModelInput(**second)), edited_like(second)["edited"])
    assert np.array_equal(outputs["edited"].array, edited_like(first)["edited"])  # was done before
    assert not gpu.streams[stream].queue


def test_run_device_in_two_streams_is_ordered(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    streams = gpu.foreign_stream(), gpu.foreign_stream()
    made = [on_gpu(gpu, inputs_for(3, seed)) for seed in range(2)]
    for stream, (inputs, outputs) in zip(streams, made, strict=True):
        session.run_device(inputs, outputs, stream)
    gpu.streams[streams[1]].drain()
    assert not gpu.streams[streams[0]].queue  # was waited for


def test_run_that_grows_memory_waits_for_run_device(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    small, large = inputs_for(1), inputs_for(8)
    inputs, outputs = on_gpu(gpu, small)
    session.run_device(inputs, outputs, gpu.foreign_stream())
    assert np.array_equal(session.run(ModelInput(**large)), edited_like(large)["edited"])
    assert np.array_equal(outputs["edited"].array, edited_like(small)["edited"])


def test_run_device_waits_for_the_streams_of_its_arrays(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    given = inputs_for(1)
    inputs, outputs = on_gpu(gpu, {**given, "image": given["image"] * 0})
    theirs, stream = gpu.foreign_stream(), gpu.foreign_stream()
    gpu.streams[theirs].add(lambda: inputs["image"].array.__setitem__(slice(None), given["image"]))
    inputs["image"].interface["stream"] = theirs
    session.run_device(inputs, outputs, stream)
    gpu.streams[stream].drain()
    assert np.array_equal(outputs["edited"].array, edited_like(given)["edited"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda gpu, arrays: arrays.update(mask=np.zeros((1, SIZE, SIZE), np.uint8)), "mask is not an array on a GPU"),
        (lambda gpu, arrays: arrays["mask"].interface.update(strides=(1, 2, 3)), "mask is masked or not C-contiguous"),
        (lambda gpu, arrays: arrays["mask"].interface.update(mask=object()), "mask is masked"),
        (lambda gpu, arrays: arrays["mask"].interface.update(typestr="<i8"), "mask is int64"),
        (lambda gpu, arrays: arrays["mask"].interface.update(shape=(1, SIZE, 8)), r"mask is uint8 \(1, 16, 8\)"),
        (lambda gpu, arrays: arrays["mask"].interface.update(data=(0, False)), "mask is not in a GPU's memory"),
        (lambda gpu, arrays: arrays["mask"].interface.update(data=(12345, False)), "mask is not in a GPU's memory"),
        (
            lambda gpu, arrays: arrays["mask"].interface.update(data=(arrays["mask"].address + 4, False)),
            "multiple of 256",
        ),
        (lambda gpu, arrays: arrays["edited"].interface.update(data=(arrays["edited"].address, True)), "read-only"),
        (lambda gpu, arrays: arrays.pop("mask"), "edit takes image, labels, instances, mask and gives edited or"),
        (lambda gpu, arrays: arrays.update(coarse=arrays["mask"]), "not .*coarse"),
    ],
)
def test_run_device_with_wrong_arrays_names_them(
    change: Any, text: str, gpu: SimulatedGpu, session: TensorRtSession
) -> None:
    inputs, outputs = on_gpu(gpu, inputs_for(1))
    arrays: dict[str, Any] = {**inputs, "edited": outputs["edited"]}
    change(gpu, arrays)
    written = {"edited": arrays.pop("edited")}
    with pytest.raises(InputError, match=text):
        session.run_device(arrays, written, gpu.foreign_stream())
    assert "execute_async_v3" not in gpu.calls


def test_run_device_on_another_gpu_is_refused(
    gpu: SimulatedGpu, session: TensorRtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = on_gpu(gpu, inputs_for(1))
    with pytest.raises(UsageError, match="no graph 'edits'"):
        session.run_device(inputs, outputs, 0, "edits")
    with pytest.raises(InputError, match=r"not .* and nothing"):
        session.run_device(inputs, {}, 0)
    monkeypatch.setattr(session._memory.device, "device_of", lambda address: 1)
    with pytest.raises(InputError, match="image is on cuda:1, but the session is on cuda:0"):
        session.run_device(inputs, outputs, 0)


def test_run_device_ignores_strides_of_length_one(gpu: SimulatedGpu, session: TensorRtSession) -> None:
    given = inputs_for(1)
    inputs, outputs = on_gpu(gpu, given)
    inputs["mask"].interface["strides"] = (99, SIZE, 1)  # of an axis of length 1 they do not matter
    session.run_device(inputs, outputs, stream := gpu.foreign_stream())
    gpu.streams[stream].drain()
    assert np.array_equal(outputs["edited"].array, edited_like(given)["edited"])


@pytest.mark.parametrize("version", ["10.3", "10.16", "11.4"])
def test_simulated_tensorrt_has_no_more_members_than_the_real(version: str, shared: Path) -> None:
    """So whatever the session touches is there: the simulated classes have no other public members."""
    real = json.loads((shared / f"tensorrt-api/tensorrt-{version}.json").read_text())
    for name, members in offered(simulated_library(SimulatedGpu(), "tensorrt", f"{version}.0")).items():
        assert members <= set(real[name]), f"{name}: {sorted(members - set(real[name]))}"


def test_simulated_tensorrt_rtx_has_no_more_members_than_the_real() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for name, members in offered(simulated_library(SimulatedGpu(), "tensorrt-rtx", "1.7.1")).items():
        missing = {member for member in members if not hasattr(getattr(real, name), member)}
        assert not missing, f"{name}: {sorted(missing)}"


def test_import_of_the_backend_loads_no_gpu_library() -> None:
    heavy = {"tensorrt", "tensorrt_rtx", "pycuda", "cuda.core", "cuda.bindings.driver"}
    code = "import sys, spmdeploy.backends.tensorrt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert heavy.isdisjoint(loaded)


def with_parts(gpu: SimulatedGpu, folder: Path, runtime: str, version: str, most: int = 8, **changes: Any) -> Any:
    """A session with the engines for cached layouts. changes: to the record of the picture engine."""
    library = simulated_library(gpu, runtime, version)
    edit = engine_file(folder / "edit", record_of(runtime, version))
    layout = engine_file(folder / LAYOUT, record_of(runtime, version, LAYOUT, most))
    picture = engine_file(folder / PICTURE, replace(record_of(runtime, version, PICTURE, most), **changes))
    return TensorRtSession(library, edit, size=SIZE, parts=StoredParts(layout, picture))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("runtime", "version"), LIBRARIES)
def test_bind_layout_gives_what_run_gives(
    runtime: str, version: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu()
    plug_in(monkeypatch, gpu, package)
    with host_context(gpu), with_parts(gpu, tmp_path, runtime, version) as session:
        given = inputs_for(2)
        run = session.bind_layout(LayoutInput(*ModelInput(**given)[1:]))
        for seed in range(5):
            image = inputs_for(2, seed)["image"]
            assert np.array_equal(run(image), session.run(ModelInput(**{**given, "image": image})))
        assert session.notes == ()
    assert gpu.left_behind == {} and not any("without a context" in call for call in gpu.calls)


def test_bind_layout_computes_once_and_copies_images_only(gpu: SimulatedGpu, tmp_path: Path) -> None:
    with with_parts(gpu, tmp_path, "tensorrt", "10.16.1") as session:
        given = inputs_for(2)
        run = session.bind_layout(LayoutInput(*ModelInput(**given)[1:]))
        for seed in range(3):
            run(inputs_for(2, seed)["image"])
        gpu.calls.clear()
        copies = []
        for name in ("copy_in", "copy_out"):
            copy = getattr(session._memory.device, name)

            def counted(*arguments: Any, copy: Any = copy, name: str = name) -> None:
                copies.append((name, next(value.nbytes for value in arguments if hasattr(value, "nbytes"))))
                copy(*arguments)

            setattr(session._memory.device, name, counted)
        image = inputs_for(2, 9)["image"]
        assert np.array_equal(run(image), edited_like({**given, "image": image})["edited"])
        assert copies == [("copy_in", image.nbytes), ("copy_out", image.nbytes)]
        assert "execute_async_v3" not in gpu.calls  # a captured graph, and no layout


def test_bind_layout_more_than_fit_recomputes_the_oldest(gpu: SimulatedGpu, tmp_path: Path) -> None:
    with with_parts(gpu, tmp_path, "tensorrt", "10.16.1") as session:
        cases = [inputs_for(1, seed) for seed in range(MAX_LAYOUTS + 2)]
        runs = [session.bind_layout(LayoutInput(*ModelInput(**case)[1:])) for case in cases]
        for _ in range(4):
            for case, run in zip(cases, runs, strict=True):
                assert np.array_equal(run(case["image"]), edited_like(case)["edited"])
            assert np.array_equal(session.run(ModelInput(**cases[0])), edited_like(cases[0])["edited"])
        assert len(session._memory._temporary) == MAX_LAYOUTS
    assert gpu.left_behind == {}


def test_bind_layout_keeps_its_own_copy_of_the_layout(gpu: SimulatedGpu, tmp_path: Path) -> None:
    with with_parts(gpu, tmp_path, "tensorrt", "10.16.1") as session:
        given = inputs_for(1)
        expected = edited_like(given)["edited"]
        run = session.bind_layout(LayoutInput(*ModelInput(**given)[1:]))
        others = [session.bind_layout(LayoutInput(*ModelInput(**inputs_for(1, seed))[1:])) for seed in (1, 2)]
        given["labels"][:] = 0
        assert others and np.array_equal(run(given["image"]), expected)


def test_bind_layout_of_a_large_batch_is_split(gpu: SimulatedGpu, tmp_path: Path) -> None:
    with with_parts(gpu, tmp_path, "tensorrt-rtx", "1.7.1.116", most=2) as session:
        given = inputs_for(5)
        run = session.bind_layout(LayoutInput(*ModelInput(**given)[1:]))
        for _ in range(4):
            assert np.array_equal(run(given["image"]), edited_like(given)["edited"])


def test_bind_layout_wrong_shapes_are_named(gpu: SimulatedGpu, tmp_path: Path) -> None:
    with with_parts(gpu, tmp_path, "tensorrt", "10.16.1") as session:
        given = ModelInput(**inputs_for(2))
        with pytest.raises(
            InputError, match=r"mask is uint8 \(1, 16, 16\), but the graph has uint8 \(2, 16, 16\)|labels"
        ):
            session.bind_layout(LayoutInput(given.labels, given.instances, given.mask[:1]))
        run = session.bind_layout(LayoutInput(*given[1:]))
        with pytest.raises(InputError, match=r"image is uint8 \(1, 16, 16, 3\)"):
            run(given.image[:1])


def test_bind_layout_parts_that_do_not_match_are_refused(gpu: SimulatedGpu, tmp_path: Path) -> None:
    other = (graph_ports("edit", SIZE)["image"], replace(CACHED[0], shape=(-1, 8, 8, 1)), CACHED[1])
    with with_parts(gpu, tmp_path, "tensorrt", "10.16.1", inputs=other) as session:
        given = inputs_for(1)
        with pytest.raises(
            BundleError, match=r"heads/Add: float32 \[-1, 8, 8, 1\] in the engine, float32 \[-1, 16, 16, 1\]"
        ):
            session.bind_layout(LayoutInput(*ModelInput(**given)[1:]))
        assert np.array_equal(session.run(ModelInput(**given)), edited_like(given)["edited"])
    assert gpu.left_behind == {}


def test_bind_layout_without_the_engines_runs_the_edit_graph(session: TensorRtSession) -> None:
    given = inputs_for(2)
    assert session.layout_unsupported is not None and "--graph cached-layout" in session.layout_unsupported.hint
    run = session.bind_layout(LayoutInput(*ModelInput(**given)[1:]))
    assert np.array_equal(run(given["image"]), edited_like(given)["edited"])


def test_bind_layout_after_close_is_refused(gpu: SimulatedGpu, tmp_path: Path) -> None:
    session = with_parts(gpu, tmp_path, "tensorrt", "10.16.1")
    given = inputs_for(1)
    run = session.bind_layout(LayoutInput(*ModelInput(**given)[1:]))
    session.close()
    with pytest.raises(UnavailableError, match="closed"):
        run(given["image"])
