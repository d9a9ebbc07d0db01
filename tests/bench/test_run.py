"""Whole runs of the command, with a tiny network and with the built-in model."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spmdeploy
from spmdeploy import cli
from spmdeploy.backends.registry import bench_names
from spmdeploy.bench import run as bench_run
from spmdeploy.bench import schedule
from spmdeploy.bench.backend_process import BackendCrashedError
from spmdeploy.bench.backends import cold_start_options, open_backend, skip_by_default
from spmdeploy.bench.machine import BackgroundLoad
from spmdeploy.bench.nvml import GpuState
from spmdeploy.bench.parity import GOLDEN
from spmdeploy.bench.results import Record, read_record
from spmdeploy.bench.roofline import BYTES_PER_PIXEL, PeakRates, fastest, numpy_rates, roofline_bound
from spmdeploy.bench.run import Options, cases, reader_warnings
from spmdeploy.bench.schedule import WarmUp
from spmdeploy.bench.worker import Worker
from spmdeploy.bench.workloads import edit_batch, edit_case
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.errors import SpmDeployError, UnavailableError
from spmdeploy.imaging.files import read_photo
from spmdeploy.labels import class_table

from .conftest import FAST, measured_row, record_of

STREET = class_table("street")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for the processes started here: spinning threads slow down other tests."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warm-up and made-up peak rates."""
    for name in ("WARM_UP_SECONDS", "MAX_WARM_UP_SECONDS", "WINDOW_SECONDS", "TURN_SECONDS"):
        monkeypatch.setattr(schedule, name, 0.01)
    monkeypatch.setattr(schedule, "MIN_ROUNDS", 2)
    monkeypatch.setattr(bench_run, "_cpu_rates", lambda seconds: [PeakRates("cpu", "fp32", "numpy", 100.0, 10.0)])
    monkeypatch.setattr("spmdeploy.bench.machine._cpu_info", lambda: ("Imaginary CPU", frozenset()))


def test_bench_command_writes_record_chart_and_report(
    short_run: None, street_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outputs = {
        name: tmp_path / f"r.{suffix}" for name, suffix in (("output", "json"), ("plot", "png"), ("markdown", "md"))
    }
    arguments = ["bench", str(street_bundle), "--backend", "torch", "--backend", "onnxruntime", "--backend", "tensorrt"]
    arguments += ["--precision", "auto", "--mask", "small", "--duration", "0.01", "--batch", "2", "--profile", "--json"]
    arguments += [argument for name, path in outputs.items() for argument in (f"--{name}", str(path))]
    assert cli.main(arguments) == 0
    output = capfd.readouterr()
    assert len(output.out.splitlines()) == 1 and "measuring" in output.err
    record = read_record(outputs["output"])
    assert Record.from_json(json.loads(output.out), "stdout") == record

    statuses = [(row.backend, row.batch, row.status) for row in record.rows]
    assert statuses == [("torch", 2, "measured"), ("onnxruntime", 2, "measured"), ("tensorrt", 2, "unavailable")]
    for row in record.rows:
        if row.status != "measured":
            assert row.reason and row.latency_ms is None
            continue
        assert row.latency_ms is not None and row.ran is not None and row.parity is not None and row.floor is not None
        assert row.latency_ms.n == sum(len(turn) for turn in row.samples_ms) >= 2
        assert row.ran.precision == "fp32" and row.ran.device == "cpu" and row.parity.max_grey <= 2
        assert row.ran.threads == 1  # OMP_NUM_THREADS
        assert row.memory is not None and row.memory.peak is not None and row.memory.peak >= (row.memory.ready or 0) > 0
        assert {part.kind for part in row.parts} >= {"main convolution", "context modulation", "layout branch"}
        assert sum(part.share for part in row.parts) == pytest.approx(1)
        # A turn lasts at least as long as its iterations.
        assert 0 < (row.edits_per_second or 0) <= row.batch * 1000 / row.latency_ms.mean * 1.0001
    assert str(tmp_path) not in output.out and str(Path.home()) not in output.out
    assert f"spmdeploy bench {street_bundle.name} --backend torch" in record.protocol.command
    assert read_photo(outputs["plot"]).pixels.shape[1] == 1600
    assert "layout branch" in outputs["markdown"].read_text(encoding="utf-8")

    assert cli.main([*arguments[:-6], "--output", str(outputs["output"]), "--json"]) == 7  # before measuring anything
    assert "exists already" in json.loads(capfd.readouterr().out)["error"]


def test_bench_without_torch_compares_golden_edits(
    short_run: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "has_torch", lambda: False)
    arguments = [
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
    arguments += ["--size", "256", "--mask", "small", "--duration", "0.01", "--output", str(tmp_path / "r.json")]
    assert cli.main(arguments) == 0
    table = capfd.readouterr().out
    edit, cold = read_record(tmp_path / "r.json").rows
    assert edit.parity is not None and edit.parity.against == GOLDEN and edit.parity.max_grey <= 48
    assert edit.scope == "edit" and cold.scope == "cold-start" and edit.status == cold.status == "measured"
    assert {"validate", "plan", "prepare", "run", "stitch"} <= set(edit.phases_ms) and edit.notes["windows"] == 1
    assert {"start", "open", "edit", "end", "import onnxruntime"} <= set(cold.phases_ms)
    assert edit.latency_ms is not None and cold.latency_ms is not None
    assert edit.latency_ms.min < cold.latency_ms.min and edit.floor is None  # scopes are never mixed
    assert "cold start" in table and "files to file" in table


def test_bench_nothing_available_exits_4(
    short_run: None, street_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(street_bundle), "--backend", "onnxruntime-cuda", "--mask", "small", "--duration", "0.1"]
    try:
        from spmdeploy.gpu.driver import visible_gpus

        if visible_gpus():
            pytest.skip("there is a GPU")
    except OSError:
        pass
    assert cli.main([*arguments, "--json"]) == 4
    output = json.loads(capfd.readouterr().out)
    assert output["schema"] == "spmdeploy.bench/1" and output["exit_code"] == 4
    assert "nothing could be measured: onnxruntime-cuda:" in output["error"]
    assert output["rows"][0]["reason"] and output["rows"][0]["latency_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "code"),
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
def test_bench_invalid_arguments_give_exit_code(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_run, "_cpu_rates", lambda seconds: pytest.fail("began to measure"))
    assert cli.main(["bench", *arguments, "--json"]) == code
    output = json.loads(capfd.readouterr().out)
    assert output["exit_code"] == code and output["error"] and output["hint"]
    assert list(tmp_path.iterdir()) == []


def test_cases_of_options_are_the_product() -> None:
    bundle = open_bundle(spmdeploy.default_model())
    options = Options(
        scopes=("engine", "cached-layout", "edit"), batches=(1, 4), streams=(1, 2), sizes=(300, 900), masks=("large",)
    )
    output = [(case.scope, case.size, case.batch, case.streams) for case in cases(bundle, options)]
    assert output == [
        ("engine", 256, 1, 1),
        ("engine", 256, 1, 2),
        ("engine", 256, 4, 1),
        ("engine", 256, 4, 2),
        ("cached-layout", 256, 1, 1),
        ("cached-layout", 256, 1, 2),
        ("cached-layout", 256, 4, 1),
        ("cached-layout", 256, 4, 2),
        ("edit", 300, 1, 1),
        ("edit", 900, 1, 1),
    ]


def test_backends_of_command_line_are_those_of_bench() -> None:
    from spmdeploy.cli import bench as command

    assert command.bench_names() == bench_names()


def test_open_backend_plain_graph_missing_is_refused() -> None:
    """The built-in model may hold graphs for CPUs only; what a plain export gives is then no baseline."""
    bundle = open_bundle(spmdeploy.default_model())
    if any(record.graph == "edit" and record.precision == "fp32" for record in bundle.manifest.graphs):
        session = open_backend(bundle, "onnxruntime-plain", "auto", "auto")
        assert session.precision == "fp32" and session.device == "cpu"
        session.close()
        return
    with pytest.raises(SpmDeployError, match="edit"):
        open_backend(bundle, "onnxruntime-plain", "auto", "auto")


def test_rows_to_measure_without_precision_uses_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(**options: Any) -> list[tuple[str, str]]:
        return list(bench_run.rows_to_measure(Options(backends=("torch", "onnxruntime"), **options)))

    monkeypatch.setattr("spmdeploy.bench.backends.visible_gpus", lambda: 0)
    assert rows() == [("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "auto")]
    monkeypatch.setattr("spmdeploy.bench.backends.visible_gpus", lambda: 1)
    assert rows() == [("torch", "fp32"), ("torch", "fp16"), ("onnxruntime", "auto")]
    assert rows(device="cpu")[1] == ("torch", "bf16")
    assert rows(precisions=("fp32",)) == [("torch", "fp32"), ("onnxruntime", "fp32")]


def test_stop_condition_depends_on_scope() -> None:
    engine, cold = Options().stop_condition("engine"), Options().stop_condition("cold-start")
    assert (engine.seconds, engine.iterations, cold.iterations) == (10, 200, 20)
    short = Options(seconds=0.5).stop_condition("engine")
    assert (short.seconds, short.iterations) == (0.5, 0)


def test_command_repeats_run_without_folders() -> None:
    options = Options(bundle=Path("/a/folder/street.spm"), backends=("torch",), seconds=1.5, profile=True)
    assert options.command() == (
        "spmdeploy bench street.spm --backend torch --device auto --scope engine --batch 1 "
        "--streams 1 --size 512 --mask small --mask medium --mask large --duration 1.5 --baseline torch --profile"
    )


def test_open_backend_wrong_device_is_refused() -> None:
    bundle = open_bundle(spmdeploy.default_model())
    for name, device in (("onnxruntime", "cuda:0"), ("tensorrt", "cpu"), ("onnxruntime-cuda", "cpu")):
        with pytest.raises(UnavailableError):
            open_backend(bundle, name, device, "auto")
    with pytest.raises(SpmDeployError):
        open_backend(bundle, "onnxruntime", "gpu", "auto")
    assert cold_start_options("onnxruntime-cuda", "auto", "auto") == (
        ["--backend", "onnxruntime", "--device", "cuda:0", "--precision", "auto"]
    )


def test_skip_by_default_only_torch_compile_on_cpu_and_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(bench_names()) - {"torch-compile", "triton"}:
        skip_by_default(name)
    with pytest.raises(UnavailableError, match="no server is named"):
        skip_by_default("triton")
    monkeypatch.setattr("spmdeploy.bench.backends.visible_gpus", lambda: 1)
    skip_by_default("torch-compile")
    monkeypatch.setattr("spmdeploy.bench.backends.visible_gpus", lambda: 0)
    with pytest.raises(UnavailableError, match="takes minutes"):
        skip_by_default("torch-compile")


def test_reader_warnings_name_every_disturbance() -> None:
    fine = measured_row(latency_ms=replace(_summary(), unstable=False), phases_ms={"launch": 1.0})
    gpu = GpuState(None, None, None, None, None, (), None)
    state = replace(record_of().before, gpus=(gpu,))
    assert list(reader_warnings([fine], "torch", (state, state), BackgroundLoad(0.01))) == []

    hot = replace(state, gpus=(replace(gpu, slowed_by=("power cap",)),))
    shaky = replace(
        fine,
        warm_up=WarmUp(31.0, 9, (1.0, 2.0), False),
        latency_ms=replace(_summary(), unstable=True, cv=0.1),
        phases_ms={"launch": 700.0},
    )
    output = " | ".join(reader_warnings([shaky], "onnxruntime", (state, hot), BackgroundLoad(0.2)))
    for text in (
        "other processes used 20%",
        "baseline onnxruntime",
        "not stable after 31 s",
        "is unstable",
        "power cap",
    ):
        assert text in output, text
    assert "is host-bound: launching takes 700.00 ms" in output


def _summary() -> Any:
    return measured_row().latency_ms


def test_roofline_bound_is_the_larger_time() -> None:
    rates = PeakRates("cpu", "fp32", "numpy", gflops=200.0, copy_gb_per_second=10.0)
    work = roofline_bound(100.0, 50_000_000, 2, 256, rates, median=2000.0)
    assert (work.milliseconds, work.bound_by, work.reached, work.gflop) == (1000.0, "arithmetic", 0.5, 200.0)
    moved = 50_000_000 + 2 * 256 * 256 * BYTES_PER_PIXEL
    assert work.megabytes == pytest.approx(moved / 1e6, abs=0.001)
    memory = roofline_bound(0.001, 50_000_000, 2, 256, rates, median=10.0)
    assert memory.bound_by == "memory" and memory.milliseconds == pytest.approx(moved / 10e9 * 1e3)
    assert memory.reached == pytest.approx(memory.milliseconds / 10)


def test_fastest_takes_best_of_both_rates() -> None:
    rates = numpy_rates(0.01)
    assert rates.gflops > 0.1 and rates.copy_gb_per_second > 0.05
    best = fastest([rates, replace(rates, library="other", gflops=rates.gflops * 2, copy_gb_per_second=1e-3)])
    assert (best.library, best.copy_gb_per_second) == ("other", rates.copy_gb_per_second)


@pytest.fixture
def worker(street_bundle: Path) -> Iterator[Worker]:
    with Worker(street_bundle, "onnxruntime", "auto", "auto") as worker:
        yield worker


def test_worker_runs_every_scope(worker: Worker) -> None:
    assert worker.describe().provider.startswith("CPUExecutionProvider")
    assert all(result.passed for result in worker.verify())
    batch = edit_batch(STREET, 256, "large", 2)
    first = worker.prepare_engine(batch, streams=2)
    keep = batch.mask == 0
    assert first.edited.shape == batch.image.shape and (first.edited[keep] == batch.image[keep]).all()
    turn = worker.turn(0.0, 3)
    assert len(turn.samples) == 6 and min(turn.samples) > 0  # three by each of two callers at once
    assert turn.seconds * 1000 >= max(turn.samples) and turn.joules is None

    further = worker.prepare_cached_layout(batch, streams=1)
    np.testing.assert_array_equal(further.edited, first.edited)
    assert "milliseconds to cache the layout" in further.notes and len(worker.turn(0.0, 2).samples) == 2

    case = edit_case(STREET, 300, "small")
    edited = worker.prepare_edit(case)
    assert (edited.edited[0][~case.mask] == edited.photo[0][~case.mask]).all()
    assert (edited.edited != edited.photo).any() and edited.notes["windows"] == 1
    worker.reset()
    assert worker.phase_medians() == {}
    worker.turn(0.0, 1)
    assert worker.phase_medians()["run"] > 0
    memory = worker.memory()
    assert memory.peak is None or memory.peak >= (memory.ready or 0)


def test_worker_error_is_raised_and_worker_goes_on(worker: Worker, street_bundle: Path) -> None:
    batch = edit_batch(STREET, 64, "small", 1)  # not the graph's size
    with pytest.raises(SpmDeployError, match="64"):
        worker.prepare_engine(batch, 1)
    assert worker.describe().device == "cpu"  # and it goes on
    with pytest.raises(UnavailableError):
        Worker(street_bundle, "onnxruntime-cuda", "cpu", "auto")
    with pytest.raises(SpmDeployError, match="missing"):
        Worker(street_bundle.with_name("missing.spm"), "onnxruntime", "auto", "auto")


def test_worker_killed_raises_backend_crashed(worker: Worker) -> None:
    child = next(it for it in multiprocessing.active_children() if it.pid == worker.pid)
    child.kill()
    child.join()
    with pytest.raises(BackendCrashedError, match="signal 9"):
        worker.turn(0.0, 1)
    pid = worker.pid
    worker.close()
    assert pid not in [it.pid for it in multiprocessing.active_children()]


def test_worker_close_ends_the_process(worker: Worker) -> None:
    pid = worker.pid
    worker.close()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_record_identifies_nobody() -> None:
    text = json.dumps(record_of(measured_row(), measured_row("onnxruntime", FAST)).to_json())
    assert not re.search(r"/(?:home|root|Users|tmp)/", text) and np.isfinite(len(text))


_KILLED_PARENT = """
import os, signal
from spmdeploy import default_model
from spmdeploy.bench.worker import Worker
if __name__ == "__main__":
    print(Worker(default_model(), "onnxruntime", "auto", "auto").pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_worker_ends_when_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(_KILLED_PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker is still running")
