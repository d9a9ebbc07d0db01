"""`make gpu-check`: what it proves, what it lets fail, and that it tells the truth of a machine without a GPU."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.backends.verify import GoldenSample, measure_deviation
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.errors import UnavailableError
from spmdeploy.export.parity import HALF_LIMITS
from spmdeploy.labels import class_table
from spmdeploy.model import modulation
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.types import ModelInput
from tests.backends.test_select_engine import Machine, add, bundle, machine, painted_black
from tests.backends.test_tensorrt import record_of
from tests.simulators.simulated_gpu import Code
from tests.simulators.simulated_tensorrt import edited_like

BENCH = Path(__file__).parents[2] / "bench"
__all__ = ["bundle", "machine"]  # fixtures of the neighbor


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, which is no package."""
    names = ("large_activations", "gpu_contenders", "gpu_cascade", "gpu_check")
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(BENCH))
        for name in names:
            sys.modules.pop(name, None)


# --------------------------------------------------------------------------------------------------- large activations


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower with more, by far where something else has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator() -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Generator(GeneratorConfig(len(class_table("street")), width=2, hidden=8)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden(generator: Generator) -> GoldenSample:
    """A real edit, 128 pixels a side: the smallest that the network takes."""
    photo, labels, mask = SAMPLE_EDITS[0].read(class_table("street"))
    middle = np.argwhere(mask).mean(axis=0)
    top, left = np.clip(middle - 64, 0, np.array(mask.shape) - 128).astype(int)
    cut = np.s_[top : top + 128, left : left + 128]
    maps = labels[cut][None], labels[cut].astype(np.int32)[None], mask[cut].astype(np.uint8)[None]
    assert maps[2].any() and not maps[2].all()
    inputs = ModelInput(photo[cut][None], *maps)
    return GoldenSample(inputs, TorchSession(generator).run(inputs))


def edited_by(generator: Generator, golden: GoldenSample) -> np.ndarray:
    return TorchSession(generator).run(golden.inputs)


def in_halves(x: Tensor) -> Tensor:
    """An instance norm that does what must not be done: statistics in half precision."""
    values = x.half()
    if values.shape[-2] * values.shape[-1] == 1:
        return torch.zeros_like(x)
    mean = values.mean((2, 3), keepdim=True)
    variance = values.square().mean((2, 3), keepdim=True) - mean.square()
    return ((values - mean) * torch.rsqrt(variance + modulation.NORM_EPS)).to(x.dtype)


def test_scaled_weights_overflow_statistics_in_halves_and_nothing_else(
    scripts: dict[str, ModuleType], generator: Generator, golden: GoldenSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = scripts["large_activations"]
    assert not any(layer.overflows for layer in large.proof(generator, golden))
    enlarged = large.enlarge(generator, golden)
    layers = large.proof(enlarged, golden)
    assert len(layers) > 30 and all(layer.overflows for layer in layers)
    assert max(layer.peak for layer in layers) < np.finfo(np.float16).max / 2  # the values themselves are sound halves

    expected = edited_by(enlarged, golden)
    assert not measure_deviation(expected, golden.expected, golden.inputs.mask).faults(HALF_LIMITS)  # the same pictures

    # The check can fail: halves in the norms are found out with these weights, and not without them.
    monkeypatch.setattr(modulation, "instance_norm", in_halves)
    assert measure_deviation(edited_by(enlarged, golden), expected, golden.inputs.mask).faults(HALF_LIMITS)
    assert not measure_deviation(edited_by(generator, golden), golden.expected, golden.inputs.mask).faults(HALF_LIMITS)


# ------------------------------------------------------------------------------------------------------------- judging


@pytest.fixture
def work(bundle: Bundle, tmp_path: Path) -> Path:
    """The work folder with both bundles, whose pictures simulated engines compute."""
    folder = tmp_path / "work"
    for name in ("plain", "large"):
        shutil.copytree(bundle.path, folder / f"{name}.spm")
    return folder


def contender(scripts: dict[str, ModuleType], run: Callable[..., Any], name: str = "somebody", **more: Any) -> Any:
    """Runs by `run`; more: fields of the runner."""

    @contextmanager
    def opened(bundle: Bundle, device: str) -> Iterator[Any]:
        yield scripts["gpu_contenders"].Runner(run, {"provider": "nobody"}, **more)

    return scripts["gpu_contenders"].Contender(name, "cpu", "fp16", opened)


def refined(inputs: ModelInput, coarse: np.ndarray) -> np.ndarray:
    return edited_like({**inputs._asdict(), "coarse": coarse})["unrounded"]


def right(inputs: ModelInput) -> np.ndarray:
    return edited_like(inputs._asdict())["edited"]


def judged(scripts: dict[str, ModuleType], one: Any, work: Path, repeats: int = 4) -> dict[str, Any]:
    """The verdict on `one`, after the reference has left its pictures."""
    reference = scripts["gpu_check"].judge(contender(scripts, right, "torch fp32", refine=refined), work, 1)
    assert reference["status"] == "passed"
    told: dict[str, Any] = json.loads(json.dumps(scripts["gpu_check"].judge(one, work, repeats), default=list))
    return told


def test_one_that_does_everything_right(scripts: dict[str, ModuleType], work: Path) -> None:
    told = judged(scripts, contender(scripts, right, timed=lambda *inputs: 0.25, notes=lambda: ("by the way",)), work)
    assert told["status"] == "passed" and "reason" not in told and told["notes"] == ["by the way"]
    assert [check["name"] for check in told["checks"]] == [
        "pictures of the plain bundle",
        "repeated",
        "pictures of the large bundle",
    ]
    assert told["milliseconds"]["8"]["device"] == {"n": 4, "min": 0.25, "p50": 0.25, "p95": 0.25}
    assert told["milliseconds"]["1"]["wall"]["p95"] >= told["milliseconds"]["1"]["wall"]["p50"] > 0


class Changing:
    """Gives another last bit every time."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, inputs: ModelInput) -> np.ndarray:
        self.runs += 1
        return right(inputs) ^ np.uint8((self.runs % 2) * (inputs.mask[..., None] != 0))


def touching(inputs: ModelInput) -> np.ndarray:
    edited = right(inputs)
    edited[inputs.mask == 0] ^= 1
    return edited


def black(inputs: ModelInput) -> np.ndarray:
    return painted_black(inputs._asdict())["edited"]


def fails(inputs: ModelInput) -> np.ndarray:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (black, "pictures of the plain bundle: tree, from torch fp32 here: largest difference"),
        (touching, "pixels outside the mask were changed"),
        (Changing(), "repeated: 2 different results in 4 runs"),
        (fails, "runs: RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_what_is_wrong_fails_and_has_no_speed(run: Any, words: str, scripts: dict[str, ModuleType], work: Path) -> None:
    told = judged(scripts, contender(scripts, run), work)
    assert told["status"] == "failed" and words in told["reason"] and "milliseconds" not in told
    row = scripts["gpu_check"]._row(told)
    assert row[1] == "failed" and not any("ms" in cell for cell in row)


def test_refining_is_judged_too(scripts: dict[str, ModuleType], work: Path) -> None:
    told = judged(scripts, contender(scripts, right, refine=refined), work)
    edits = [drift["edit"] for drift in told["checks"][0]["drifts"]]
    assert told["status"] == "passed" and edits == ["tree", "tree", "tree refined", "tree refined"]
    told = judged(scripts, contender(scripts, right, refine=lambda *inputs: refined(*inputs) * 0.5), work)
    assert told["status"] == "failed" and "tree refined, from torch at export: largest difference" in told["reason"]
    assert "tree refined: pixels outside the mask were changed" in told["reason"]


def test_wrong_on_large_activations_alone(scripts: dict[str, ModuleType], work: Path) -> None:
    opened: list[str] = []
    made = contender(scripts, right)

    @contextmanager
    def by_name(bundle: Bundle, device: str) -> Iterator[Any]:
        opened.append(bundle.path.stem)
        yield scripts["gpu_contenders"].Runner(black if bundle.path.stem == "large" else right, {})

    told = judged(scripts, scripts["gpu_contenders"].Contender(made.name, "cpu", "fp16", by_name), work)
    assert told["status"] == "failed" and told["reason"].startswith("pictures of the large bundle: ")
    assert opened == ["plain", "large"]


@pytest.mark.parametrize("error", [UnavailableError("no GPU here"), ModuleNotFoundError("No module named 'triton'")])
def test_what_cannot_run_is_no_failure(error: Exception, scripts: dict[str, ModuleType], work: Path) -> None:
    @contextmanager
    def opened(bundle: Bundle, device: str) -> Iterator[Any]:
        raise error
        yield

    told = judged(scripts, scripts["gpu_contenders"].Contender("x", "cuda:0", "fp16", opened), work)
    assert (told["status"], told["reason"]) == ("unavailable", str(error)) and told["checks"] == []


def test_an_engine_is_judged_from_build_to_close(
    scripts: dict[str, ModuleType], work: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spmdeploy.bundle.bundle import open_bundle

    def built(bundle: Bundle, *how: str) -> dict[str, Any]:
        there = open_bundle(bundle.path)
        return {graph: str(add(there, record_of(graph=graph))) for graph in ("edit", "refine")}

    monkeypatch.setattr(scripts["gpu_contenders"], "_build", built)
    large_edit = scripts["gpu_cascade"].large_edit

    def of_two_classes(golden: GoldenSample) -> Any:
        scene = large_edit(golden)
        return scene._replace(labels=scene.labels % 2)

    monkeypatch.setattr(scripts["gpu_cascade"], "large_edit", of_two_classes)
    (engine,) = (one for one in scripts["gpu_contenders"].contenders(True) if one.name == "tensorrt fp16 on cuda")
    told = judged(scripts, engine, work, repeats=12)
    assert told["status"] == "passed", told["reason"]
    assert told["milliseconds"]["1"]["device"]["p50"] == machine.gpu.milliseconds
    checks = {check["name"]: check for check in told["checks"]}
    cascade = checks["cascade"]
    assert cascade["between_levels"] == "device" and len(cascade["levels"]) == 2 and cascade["tiles"] > 16
    assert all(level["refined"] for level in cascade["levels"])
    assert cascade["copies"]["to_host_before_the_end"] == 0 < cascade["copies"]["bytes_to_host"]
    assert cascade["milliseconds"]["device"] == machine.gpu.milliseconds
    assert cascade["milliseconds by way of the host"]["device"] is None
    row = scripts["gpu_check"]._row(told)
    assert (
        row[-3] == "device" and row[-2].startswith("1.5 ms, ") and row[-2].endswith(" ms") and row[-1].endswith(" ms")
    )
    assert checks["repeated"]["bytes_lost"] == checks["memory after closing"]["bytes_lost"] == 0
    assert machine.gpu.left_behind == {} and machine.gpu.contexts == []

    machine.gpu.fails["cuModuleLoadData"] = Code.CUDA_ERROR_INVALID_VALUE
    told = judged(scripts, engine, work, repeats=1)
    assert told["status"] == "failed" and "cascade: it did not stay on the device: " in told["reason"]
    assert "failed at kernels between levels" in told["reason"] and "milliseconds" not in told
    machine.gpu.fails.clear()

    real = scripts["gpu_check"].free_bytes
    lost = iter(range(0, 1 << 40, 8 << 20))
    monkeypatch.setattr(scripts["gpu_check"], "free_bytes", lambda: real() - next(lost))
    told = judged(scripts, engine, work, repeats=12)
    assert told["status"] == "failed" and "8,388,608 bytes were lost" in told["reason"]
    assert "stay away after two more sessions" in told["reason"]


# ------------------------------------------------------------------------------------------------------------- telling


def verdict(name: str, status: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "device": "cpu", "status": status, "checks": [], **more}


def run_check(
    scripts: dict[str, ModuleType], tmp_path: Path, patch: pytest.MonkeyPatch, *results: dict[str, Any]
) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and table, when the contenders are judged so."""
    check, answers = scripts["gpu_check"], iter(results)
    proof = {"norms_that_overflow_in_halves": 9, "norms": 9, "norms_that_overflow_without_scaling": 0}
    patch.setattr(check, "prepare", lambda options: {**proof, "largest_value": 9000.0, "largest_half": 65504.0})
    patch.setattr(check, "_in_own_process", lambda contender, options: next(answers))
    patch.setattr(check, "contenders", lambda gpu: [Namespace(name=result["name"]) for result in results])
    output = tmp_path / "result/gpu.json"
    code = check.main(["--output", str(output), "--work", str(tmp_path), "--device", "cpu"])
    return code, json.loads(output.read_text()), output.with_suffix(".md").read_text()


def test_the_result_of_a_machine(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {str(batch): {"wall": {"n": 3, "min": 1, "p50": 2.5, "p95": 3.5}, "device": None} for batch in (1, 8)}
    good = verdict("torch fp32", "passed", milliseconds=times, notes=["slow today"])
    missing = [verdict(name, "unavailable", reason="no NVIDIA driver") for name in ("tensorrt", "tensorrt-rtx")]
    code, told, table = run_check(scripts, tmp_path, monkeypatch, good, *missing)
    assert code == 0 and told["passed"] and told["schema"] == "spmdeploy.gpu-check/2"
    assert {"gpus", "gpu_note", "cpu", "libraries", "before", "after"} <= set(told["machine"])
    assert "| torch fp32 | passed |" in table and "2.50 / 3.50 ms" in table and "- torch fp32: slow today" in table
    assert "- tensorrt, tensorrt-rtx: no NVIDIA driver" in table and "9 of 9 norms overflow" in table
    code, told, table = run_check(scripts, tmp_path, monkeypatch, good, verdict("x", "failed", reason="black"))
    assert code == 5 and not told["passed"] and "FAILED" in table and "- x: black" in table


def test_nothing_to_check(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(options: Any) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(scripts["gpu_check"], "prepare", prepare)
    assert scripts["gpu_check"].main(["--output", str(tmp_path / "x.json"), "--work", str(tmp_path)]) == 4
    assert "onnxscript" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_a_process_that_dies_is_a_failure(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = scripts["gpu_check"]
    options = Namespace(work=tmp_path, repeats=1, device="cpu")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "dies.py"))
    (tmp_path / "dies.py").write_text("import os, sys; print('on the way out', file=sys.stderr); os.abort()")
    told = check._in_own_process(contender(scripts, right), options)
    assert told["status"] == "failed" and "ended with -6: on the way out" in told["reason"]


def test_every_backend_is_among_the_contenders(scripts: dict[str, ModuleType]) -> None:
    on_gpu, on_cpu = ([one.name for one in scripts["gpu_contenders"].contenders(gpu)] for gpu in (True, False))
    for names in (on_gpu, on_cpu):
        assert names[0] == "torch fp32" and len(set(names)) == len(names)
        for backend in ("torch fp16", "torch.compile", "onnxruntime", "tensorrt", "tensorrt-rtx"):
            assert any(name.startswith(f"{backend} ") for name in names)


@pytest.mark.slow
def test_the_whole_command_on_a_machine_without_a_gpu(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{BENCH.parent}:{BENCH}")
    words = ["--output", tmp_path / "gpu.json", "--work", tmp_path / "work", "--device", "cpu", "--preset", "tiny"]
    assert scripts["gpu_check"].main([str(word) for word in [*words, "--repeats", "2"]]) == 0
    told = json.loads((tmp_path / "gpu.json").read_text())
    status = {result["name"]: result["status"] for result in told["contenders"]}
    assert status["torch fp32"] == status["onnxruntime cpu fp32"] == "passed"
    assert all(result.get("reason") for result in told["contenders"] if result["status"] == "unavailable")
    assert told["large_activations"]["norms_that_overflow_in_halves"] == told["large_activations"]["norms"] > 100
