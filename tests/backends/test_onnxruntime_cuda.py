"""What runs on a GPU by ONNX Runtime's CUDA provider, as far as its CPU provider shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from spmdeploy.backends import onnxruntime_cuda as cuda
from spmdeploy.backends.onnxruntime_cuda import CudaSession, OpenedSession
from spmdeploy.backends.onnxruntime_graph import _to_package_error
from tests.backends.test_onnxruntime import graph_file

SIZE = 16


class Replaying:
    """A session on the CPU that holds callers to the rules of CUDA graphs.

    A number belongs to one binding, whose arrays stay where they are, and to one thread.
    """

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.get_outputs = self.session.get_outputs
        self.bindings: list[Any] = []
        self.captured: dict[str, Any] = {}
        self.runs: list[str] = []
        self.threads: set[int] = set()
        self.refuses: Callable[[str], bool] = lambda number: False

    def io_binding(self) -> Any:
        self.bindings.append(self.session.io_binding())
        return self.bindings[-1]

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        self.runs.append(number)
        self.threads.add(threading.get_ident())
        if self.refuses(number):
            raise RuntimeError("operation not permitted when stream is capturing")
        if number != "-1":
            assert int(number) > 0 and self.captured.setdefault(number, binding) is binding
        self.session.run_with_iobinding(binding, options)


@pytest.fixture
def replaying(tmp_path: Path) -> Replaying:
    return Replaying(graph_file(tmp_path / "edit.onnx", SIZE))


@pytest.fixture
def session(replaying: Replaying) -> CudaSession:
    return CudaSession(onnxruntime, OpenedSession(replaying, cuda_graphs=True), 0, "cpu")


def inputs_for(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    square = random.integers(0, 2, (batch, SIZE, SIZE), np.uint8)
    image = random.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    return {"image": image, "labels": square, "instances": square.astype(np.int32), "mask": square}


@pytest.mark.parametrize(
    ("count", "batch"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 24), (64, 64)]
)
def test_fixed_batch_is_the_next_size(count: int, batch: int) -> None:
    assert cuda.fixed_batch(count) == batch


def test_run_of_any_batch_is_padded_and_cut(session: CudaSession, replaying: Replaying) -> None:
    for number, count in enumerate((1, 3, 4, 2, 8, 5, 9, 1)):
        given = inputs_for(count, number)
        (found,) = session.run(["edited"], given)
        (expected,) = replaying.session.run(["edited"], given)
        assert found.shape == expected.shape and np.array_equal(found, expected)
    assert len(replaying.bindings) == 4  # batches of 1, 4, 8 and 16, bound once each
    assert sorted(replaying.captured) == ["1", "2", "3", "4"] and len(replaying.runs) == 8


def test_run_again_leaves_earlier_results(session: CudaSession) -> None:
    first = session.run(["edited"], inputs_for(2, 1))[0]
    kept = first.copy()
    session.run(["edited"], inputs_for(2, 2))
    assert np.array_equal(first, kept)


def test_run_with_arrays_of_other_shapes_or_types_is_refused(session: CudaSession) -> None:
    given = inputs_for(2)
    session.run(["edited"], given)
    with pytest.raises(Exception, match=r"(?i)shape|size|dimension"):
        session.run(["edited"], given | {"image": given["image"][:, :8]})


def test_run_in_threads_is_made_by_one(session: CudaSession, replaying: Replaying) -> None:
    batches = [inputs_for(1 + number % 5, number) for number in range(16)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda given: session.run(["edited"], given)[0], batches))
    for given, edited in zip(batches, found, strict=True):
        assert np.array_equal(edited, replaying.session.run(["edited"], given)[0])
    assert len(replaying.threads) == 1


def test_run_that_cannot_be_captured_is_noted_and_works(session: CudaSession, replaying: Replaying) -> None:
    replaying.refuses = lambda number: number != "-1"
    given = inputs_for(3)
    for _ in range(2):
        assert np.array_equal(session.run(["edited"], given)[0], replaying.session.run(["edited"], given)[0])
    assert replaying.runs == ["1", "-1", "-1"]
    (note,) = session.notes
    assert note.startswith("ONNX Runtime without CUDA graphs") and "stream is capturing" in note


def test_run_that_fails_without_graphs_too_keeps_them(session: CudaSession, replaying: Replaying) -> None:
    replaying.refuses = lambda number: True
    with pytest.raises(RuntimeError):
        session.run(["edited"], inputs_for(1))
    assert session.notes == []
    replaying.refuses = lambda number: False
    session.run(["edited"], inputs_for(1))
    assert replaying.runs[-1] == "1"


PLAIN = {"device_id": 2, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
NHWC, GRAPHS = {"prefer_nhwc": 1}, {"enable_cuda_graph": 1}


@pytest.mark.parametrize(
    ("precision", "graphs", "refused", "tried", "note"),
    [
        ("fp16", True, (), [PLAIN | NHWC | GRAPHS], None),
        ("fp32", True, (), [PLAIN | GRAPHS], None),
        ("fp16", False, (), [PLAIN | NHWC], None),
        ("fp16", True, ("enable_cuda_graph",), [PLAIN | NHWC | GRAPHS, PLAIN | NHWC], "without enable_cuda_graph: no"),
        (
            "fp16",
            True,
            ("prefer_nhwc",),
            [PLAIN | NHWC | GRAPHS, PLAIN | NHWC, PLAIN],
            "without enable_cuda_graph, prefer_nhwc: no",
        ),
    ],
)
def test_open_on_cuda_asks_for_the_fastest_options_first(
    precision: str, graphs: bool, refused: tuple[str, ...], tried: list[dict[str, Any]], note: str | None
) -> None:
    asked: list[dict[str, Any]] = []

    def open_session(providers: list[Any]) -> Any:
        ((name, options),) = providers
        assert name == "CUDAExecutionProvider"
        asked.append(options)
        for option in refused:
            if option in options:
                raise RuntimeError(f"no {option}")
        return SimpleNamespace()

    opened = cuda.open_on_cuda(open_session, 2, precision, graphs)
    assert asked == tried and opened.cuda_graphs == ("enable_cuda_graph" in tried[-1])
    assert bool(opened.notes) == bool(note) and all(note in found for found in opened.notes if note)


def test_open_on_cuda_refused_raises_the_first_error() -> None:
    def open_session(providers: list[Any]) -> Any:
        raise RuntimeError(str(sorted(providers[0][1])))

    with pytest.raises(RuntimeError, match="enable_cuda_graph"):
        cuda.open_on_cuda(open_session, 0, "fp16", cuda_graphs=True)


@pytest.mark.parametrize(
    ("batch", "hint"),
    [(1, "a smaller --batch-size"), (2, "--batch-size 1"), (8, "--batch-size 4"), (9, "--batch-size 8")],
)
def test_out_of_memory_on_a_gpu_names_the_next_smaller_batch(batch: int, hint: str) -> None:
    error = _to_package_error(RuntimeError("Failed to allocate memory for requested buffer of size 7"), "cuda:0", batch)
    assert "buffer of size 7" in str(error) and error.hint == f"close other programs, or use {hint}"  # type: ignore[attr-defined]
