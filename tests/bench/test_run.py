"""Whole runs: the command as its users meet it, on a tiny network and on the shipped one."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spmdeploy
from spmdeploy import cli
from spmdeploy.bench import run as bench_run
from spmdeploy.bench.backends import BACKENDS, cold_start_options, open_backend, skip_by_default
from spmdeploy.bench.machine import BackgroundLoad, GpuState
from spmdeploy.bench.parity import GOLDEN
from spmdeploy.bench.results import Record, read_record
from spmdeploy.bench.roofline import BYTES_PER_PIXEL, PeakRates, best_of, numpy_rates, roofline_bound
from spmdeploy.bench.run import Options, cases, warnings
from spmdeploy.bench.schedule import WarmUp
from spmdeploy.bench.worker import BackendCrashedError, Worker
from spmdeploy.bench.workloads import edit_batch, edit_case
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.imaging.files import read_photo
from spmdeploy.labels import class_table

from .conftest import FAST, measured_row, record_of

STREET = class_table("street")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that are started here: threads that spin beside other tests take minutes for nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# -------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_record_picture_and_report(
    street_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outputs = {
        name: tmp_path / f"r.{suffix}" for name, suffix in (("output", "json"), ("plot", "png"), ("markdown", "md"))
    }
    words = ["bench", str(street_bundle), "--backend", "torch", "--backend", "onnxruntime", "--backend", "tensorrt"]
    words += ["--mask", "small", "--duration", "0.2", "--batch", "2", "--profile", "--json"]
    words += [word for name, path in outputs.items() for word in (f"--{name}", str(path))]
    assert cli.main(words) == 0
    told = capfd.readouterr()
    assert len(told.out.splitlines()) == 1 and "measuring" in told.err
    record = read_record(outputs["output"])
    assert Record.from_json(json.loads(told.out), "stdout") == record

    statuses = [(row.backend, row.batch, row.status) for row in record.rows]
    assert statuses == [("torch", 2, "measured"), ("onnxruntime", 2, "measured"), ("tensorrt", 2, "unavailable")]
    for row in record.rows:
        if row.status != "measured":
            assert row.reason and row.latency_ms is None
            continue
        assert row.latency_ms is not None and row.ran is not None and row.parity is not None and row.floor is not None
        assert row.latency_ms.n == sum(len(turn) for turn in row.samples_ms) >= 3
        assert row.ran.precision == "fp32" and row.ran.device == "cpu" and row.parity.max_grey <= 2
        assert (row.ran.threads == 1) is (row.backend == "torch")  # OMP_NUM_THREADS
        assert row.memory is not None and row.memory.peak is not None and row.memory.peak >= (row.memory.ready or 0) > 0
        assert {part.kind for part in row.parts} >= {"main convolution", "context modulation", "layout branch"}
        assert sum(part.share for part in row.parts) == pytest.approx(1)
        # A turn lasts at least as long as its iterations.
        assert 0 < (row.edits_per_second or 0) <= row.batch * 1000 / row.latency_ms.mean * 1.0001
    assert str(tmp_path) not in told.out and str(Path.home()) not in told.out
    assert f"spmdeploy bench {street_bundle.name} --backend torch" in record.protocol.command
    assert read_photo(outputs["plot"]).pixels.shape[1] == 1600
    assert "layout branch" in outputs["markdown"].read_text(encoding="utf-8")

    assert cli.main([*words[:-6], "--output", str(outputs["output"]), "--json"]) == 7  # before measuring anything
    assert "exists already" in json.loads(capfd.readouterr().out)["error"]


def test_the_shipped_model_on_a_device_without_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "has_torch", lambda: False)
    words = [
        "bench",
        "--backend",
        "onnxruntime",
        "--baseline",
        "onnxruntime",
        "--scope",
        "edit",
        "--scope",
        "cold-start",
    ]
    words += ["--size", "256", "--mask", "small", "--duration", "0.2", "--output", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    table = capfd.readouterr().out
    edit, cold = read_record(tmp_path / "r.json").rows
    assert edit.parity is not None and edit.parity.against == GOLDEN and edit.parity.max_grey <= 48
    assert edit.scope == "edit" and cold.scope == "cold-start" and edit.status == cold.status == "measured"
    assert {"validate", "plan", "prepare", "run", "stitch"} <= set(edit.phases_ms) and edit.notes["windows"] == 1
    assert {"start", "open", "edit", "end", "import onnxruntime"} <= set(cold.phases_ms)
    assert edit.latency_ms is not None and cold.latency_ms is not None
    assert edit.latency_ms.min < cold.latency_ms.min and edit.floor is None  # scopes are never mixed
    assert "cold start" in table and "files to file" in table


def test_nothing_runs_here(street_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(street_bundle), "--backend", "onnxruntime-cuda", "--mask", "small", "--duration", "0.1"]
    try:
        from spmdeploy.gpu.driver import visible_gpus

        if visible_gpus():
            pytest.skip("there is a GPU")
    except OSError:
        pass
    assert cli.main([*words, "--json"]) == 4
    told = json.loads(capfd.readouterr().out)
    assert told["schema"] == "spmdeploy.bench/1" and told["exit_code"] == 4
    assert "nothing could be measured: onnxruntime-cuda:" in told["error"]
    assert told["rows"][0]["reason"] and told["rows"][0]["latency_ms"] is None


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--duration", "0"], 2),
        (["--duration", "-1"], 2),
        (["--duration", "nan"], 2),
        (["--duration", "inf"], 2),
        (["--batch", "0"], 2),
        (["--size", "63"], 2),
        (["--backend", "cuda"], 2),
        (["--scope", "everything"], 2),
        (["a.spm", "--preset", "small"], 2),
        (["missing.spm"], 6),
        (["compare", "a.json"], 2),
        (["--plot", "r.jpg"], 7),
        (["--output", "missing/r.json"], 7),
        (["--output", "r.txt"], 7),
    ],
)
def test_careless_words(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_run, "_cpu_rates", lambda seconds: pytest.fail("began to measure"))
    assert cli.main(["bench", *words, "--json"]) == code
    told = json.loads(capfd.readouterr().out)
    assert told["exit_code"] == code and told["error"] and told["hint"]
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- what is measured, whom


def test_cases_of_a_run() -> None:
    bundle = open_bundle(spmdeploy.default_model())
    options = Options(
        scopes=("engine", "frame", "edit"), batches=(1, 4), streams=(1, 2), sizes=(300, 900), masks=("large",)
    )
    told = [(case.scope, case.size, case.batch, case.streams) for case in cases(bundle, options)]
    assert told == [
        ("engine", 256, 1, 1),
        ("engine", 256, 1, 2),
        ("engine", 256, 4, 1),
        ("engine", 256, 4, 2),
        ("frame", 256, 1, 1),
        ("frame", 256, 1, 2),
        ("frame", 256, 4, 1),
        ("frame", 256, 4, 2),
        ("edit", 300, 1, 1),
        ("edit", 900, 1, 1),
    ]


def test_how_long() -> None:
    engine, cold = Options().enough("engine"), Options().enough("cold-start")
    assert (engine.seconds, engine.iterations, cold.iterations) == (10, 200, 20)
    short = Options(seconds=0.5).enough("engine")
    assert (short.seconds, short.iterations) == (0.5, 0)


def test_the_command_is_typed_again_without_folders() -> None:
    options = Options(bundle=Path("/a/folder/street.spm"), backends=("torch",), seconds=1.5, profile=True)
    assert options.command() == (
        "spmdeploy bench street.spm --backend torch --precision auto --device auto --scope engine --batch 1 "
        "--streams 1 --size 512 --mask small --mask medium --mask large --duration 1.5 --baseline torch --profile"
    )


def test_backends_on_devices_they_do_not_have() -> None:
    bundle = open_bundle(spmdeploy.default_model())
    for name, device in (("onnxruntime", "cuda:0"), ("tensorrt", "cpu"), ("onnxruntime-cuda", "cpu")):
        with pytest.raises(UnavailableError):
            open_backend(bundle, name, device, "auto")
    with pytest.raises(SpmDeployError):
        open_backend(bundle, "onnxruntime", "gpu", "auto")
    assert cold_start_options("onnxruntime-cuda", "auto", "auto") == (
        ["--backend", "onnxruntime", "--device", "cuda:0", "--precision", "auto"]
    )


def test_only_the_compiler_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(BACKENDS) - {"torch-compile"}:
        skip_by_default(name)
    monkeypatch.setattr("spmdeploy.bench.backends.visible_gpus", lambda: 1)
    skip_by_default("torch-compile")
    monkeypatch.setattr("spmdeploy.bench.backends.visible_gpus", lambda: 0)
    with pytest.raises(UnavailableError, match="takes minutes"):
        skip_by_default("torch-compile")


def test_what_a_reader_must_know() -> None:
    fine = measured_row(latency_ms=replace(_summary(), unstable=False), phases_ms={"launch": 1.0})
    gpu = GpuState(None, None, None, None, None, (), None)
    state = replace(record_of().before, gpus=(gpu,))
    assert list(warnings([fine], "torch", (state, state), BackgroundLoad(0.01))) == []

    hot = replace(state, gpus=(replace(gpu, slowed_by=("power cap",)),))
    shaky = replace(
        fine,
        warm_up=WarmUp(31.0, 9, (1.0, 2.0), False),
        latency_ms=replace(_summary(), unstable=True, cv=0.1),
        phases_ms={"launch": 700.0},
    )
    told = " | ".join(warnings([shaky], "onnxruntime", (state, hot), BackgroundLoad(0.2)))
    for words in (
        "other processes used 20%",
        "baseline onnxruntime",
        "not steady after 31 s",
        "vary by 10.0%",
        "power cap",
    ):
        assert words in told, words
    assert "waits for the host: launching takes 700.00 ms" in told


def _summary() -> Any:
    return measured_row().latency_ms


# --------------------------------------------------------------------------------------------------------------- floor


def test_the_floor_is_the_larger_of_two_times() -> None:
    rates = PeakRates("cpu", "fp32", "numpy", gflops=200.0, copy_gb_per_second=10.0)
    work = roofline_bound(100.0, 50_000_000, 2, 256, rates, median=2000.0)
    assert (work.milliseconds, work.bound_by, work.reached, work.gflop) == (1000.0, "arithmetic", 0.5, 200.0)
    moved = 50_000_000 + 2 * 256 * 256 * BYTES_PER_PIXEL
    assert work.megabytes == pytest.approx(moved / 1e6, abs=0.001)
    memory = roofline_bound(0.001, 50_000_000, 2, 256, rates, median=10.0)
    assert memory.bound_by == "memory" and memory.milliseconds == pytest.approx(moved / 10e9 * 1e3)
    assert memory.reached == pytest.approx(memory.milliseconds / 10)


def test_rates_are_measured_and_the_best_counts() -> None:
    rates = numpy_rates(0.01)
    assert rates.gflops > 0.1 and rates.copy_gb_per_second > 0.05
    best = best_of([rates, replace(rates, library="other", gflops=rates.gflops * 2, copy_gb_per_second=1e-3)])
    assert (best.library, best.copy_gb_per_second) == ("other", rates.copy_gb_per_second)


# ------------------------------------------------------------------------------------------------- a backend's process


@pytest.fixture
def worker(street_bundle: Path) -> Iterator[Worker]:
    with Worker(street_bundle, "onnxruntime", "auto", "auto") as worker:
        yield worker


def test_a_worker_does_what_it_is_told(worker: Worker) -> None:
    assert worker.describe().provider.startswith("CPUExecutionProvider")
    assert all(result.passed for result in worker.verify())
    batch = edit_batch(STREET, 256, "large", 2)
    first = worker.prepare_engine(batch, streams=2)
    keep = batch.mask == 0
    assert first.picture.shape == batch.image.shape and (first.picture[keep] == batch.image[keep]).all()
    turn = worker.turn(0.0, 3)
    assert len(turn.samples) == 6 and min(turn.samples) > 0  # three by each of two callers at once
    assert turn.seconds * 1000 >= max(turn.samples) and turn.joules is None

    frame = worker.prepare_frame(batch, streams=1)
    np.testing.assert_array_equal(frame.picture, first.picture)
    assert "milliseconds to keep the layout" in frame.notes and len(worker.turn(0.0, 2).samples) == 2

    case = edit_case(STREET, 300, "small")
    edited = worker.prepare_edit(case)
    assert (edited.picture[0][~case.mask] == edited.photo[0][~case.mask]).all()
    assert (edited.picture != edited.photo).any() and edited.notes["windows"] == 1
    worker.forget()
    assert worker.medians() == {}
    worker.turn(0.0, 1)
    assert worker.medians()["run"] > 0
    memory = worker.memory()
    assert memory.peak is None or memory.peak >= (memory.ready or 0)


def test_what_a_worker_cannot_do_is_told(worker: Worker, street_bundle: Path) -> None:
    batch = edit_batch(STREET, 64, "small", 1)  # not the graph's size
    with pytest.raises(SpmDeployError, match="64"):
        worker.prepare_engine(batch, 1)
    assert worker.describe().device == "cpu"  # and it goes on
    with pytest.raises(UnavailableError):
        Worker(street_bundle, "onnxruntime-cuda", "cpu", "auto")
    with pytest.raises(SpmDeployError, match="missing"):
        Worker(street_bundle.with_name("missing.spm"), "onnxruntime", "auto", "auto")


def test_a_process_that_dies_is_one_row_s_end(worker: Worker) -> None:
    child = next(it for it in multiprocessing.active_children() if it.pid == worker.pid)
    child.kill()
    child.join()
    with pytest.raises(BackendCrashedError, match="signal 9"):
        worker.turn(0.0, 1)
    worker.close()
    assert worker.pid not in [it.pid for it in multiprocessing.active_children()]


def test_closing_ends_the_process(worker: Worker) -> None:
    pid = worker.pid
    worker.close()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_fallbacks_name_nobody() -> None:
    text = json.dumps(record_of(measured_row(), measured_row("onnxruntime", FAST)).to_json())
    assert not re.search(r"/(?:home|root|Users|tmp)/", text) and np.isfinite(len(text))
