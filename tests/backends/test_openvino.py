"""OpenVINO on a tiny bundle: results, precision, cache, refusals, and what `auto` makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spmdeploy import cli
from spmdeploy.backends import graph_cache, openvino, openvino_graph, select_cpu
from spmdeploy.backends.base import OpenedBackend
from spmdeploy.backends.doctor import check_openvino
from spmdeploy.backends.graph_cache import cpu_features, graph_cache_folder
from spmdeploy.backends.openvino import BF16_FEATURES, OpenVinoSession, open_openvino
from spmdeploy.backends.openvino_graph import shorten_message
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.verify import GoldenResult, verify
from spmdeploy.bench.checks import run_thorough
from spmdeploy.bench.workloads import edit_batch
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.errors import BundleError, SpmDeployError, UnavailableError
from spmdeploy.types import LayoutInput, ModelInput

if find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)
library = openvino_graph.import_openvino()
FEATURES = cpu_features()
needs_bf16 = pytest.mark.skipif(
    not set(BF16_FEATURES) & set(FEATURES.split()), reason=f"the processor has none of {BF16_FEATURES}"
)


def test_import_openvino_sends_and_writes_nothing(tmp_path: Path) -> None:
    line = "from spmdeploy.backends.openvino_graph import import_openvino as load; load(); import sys; "
    line += "sys.exit('openvino_telemetry' in sys.modules)"
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", line], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bundle(street_bundle: Path) -> Bundle:
    return open_bundle(street_bundle)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> OpenVinoSession:
    opened = open_openvino(bundle, "cpu", "fp32").session
    assert isinstance(opened, OpenVinoSession)
    return opened


@pytest.fixture(scope="module")
def batch(bundle: Bundle) -> ModelInput:
    return edit_batch(bundle.manifest.classes, 256, "medium", 2)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(graph_cache, "_reported", set())
    return graph_cache_folder()


def test_session_fp32_is_proved(session: OpenVinoSession, bundle: Bundle) -> None:
    results = verify(session, bundle)
    assert len(results) == 2 * len(bundle.manifest.golden) and all(result.passed for result in results)
    assert (session.backend, session.device, session.precision, session.size) == ("openvino", "cpu", "fp32", 256)
    assert session.provider.startswith("CPU (openvino 20") and "convolutions compute in fp32" in session.read_back
    assert [record.graph for record in session.loaded] == ["edit", "refine"]


def test_session_thorough_checks_pass(session: OpenVinoSession, bundle: Bundle) -> None:
    found = list(run_thorough(bundle, session, lambda: session))
    assert not [check for check in found if check.failed] and found[2].status == "passed"


def test_graph_of_huge_values_is_refused_before_compiling(
    bundle: Bundle, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_graph, "MAX_VALUE_BYTES", 1 << 20)
    with pytest.raises(BundleError, match=r"edit graph computes values of \d\.\d GiB for one image"):
        open_openvino(bundle, "cpu", "fp32")
    assert not list(empty.glob("*/*"))


def test_value_sizes_unknown_or_hidden_are_refused(bundle: Bundle) -> None:
    ops = library.opset13
    image = ops.parameter([1, 4, 4, 3], np.uint8, "image")
    nonzero = ops.non_zero(image)
    body = library.Model([ops.constant(True), ops.constant(np.zeros(3))], [])
    loop = ops.loop(ops.constant(2), ops.constant(True))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 0])
    result = loop.get_iter_value(body.results[1].output(0))
    for value, message in ((nonzero.output(0), "is not known"), (result, "has a Loop")):
        model = library.Model([ops.result(value)], [image])
        with pytest.raises(BundleError, match=message):
            openvino_graph._check_value_sizes(model, bundle.graph("edit", "fp32"))


def test_run_batch_equals_single_images(session: OpenVinoSession, batch: ModelInput) -> None:
    edited = session.run(batch)
    singles = [session.run(ModelInput(*(array[index : index + 1] for array in batch))) for index in range(2)]
    assert np.array_equal(edited, np.concatenate(singles))
    assert np.abs(session.run_unrounded(batch) - edited).max() <= 0.5


def test_bind_layout_batch_is_close_to_run(session: OpenVinoSession, batch: ModelInput) -> None:
    run = session.bind_layout(LayoutInput(*batch[1:]))
    assert np.abs(run(batch.image).astype(int) - session.run(batch)).max() <= 1


def test_run_threads_take_turns(session: OpenVinoSession, batch: ModelInput) -> None:
    expected = session.run(batch)
    with ThreadPoolExecutor(4) as pool:
        for edited in pool.map(lambda _: session.run(batch), range(8)):
            assert np.array_equal(edited, expected)


def test_zip_gives_the_same(session: OpenVinoSession, street_bundle: Path, batch: ModelInput, empty: Path) -> None:
    packed = empty.parent.parent / "packed.spm"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(street_bundle.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(street_bundle).as_posix())
    opened = open_openvino(open_bundle(packed), "cpu", "fp32").session
    assert np.array_equal(opened.run(batch), session.run(batch))


def test_cpu_only_bundle_names_the_graph_that_is_missing(street_bundle: Path, tmp_path: Path) -> None:
    slim = tmp_path / "slim.spm"
    assert cli.main(["bundle", "slim", str(street_bundle), str(slim), "--keep", "cpu"]) == 0
    with pytest.raises(BundleError, match="no graph 'edit' in fp32"):
        open_openvino(open_bundle(slim), "cpu", "fp32")


def test_closed_session_is_refused(bundle: Bundle, batch: ModelInput) -> None:
    session = open_openvino(bundle, "cpu", "fp32").session
    session.close()
    session.close()
    with pytest.raises(UnavailableError, match="closed"):
        session.run(batch)


# The cache


def entry(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if (path / "compiled.blob").exists())
    return found


@pytest.mark.parametrize(
    ("content", "sums", "message"),
    [(b"garbage", False, "is damaged and is made again"), (b"garbage", True, "cannot be used and is made again")],
    ids=["damaged", "foreign"],
)
def test_cache_unusable_entry_is_made_again(
    content: bytes,
    sums: bool,
    message: str,
    bundle: Bundle,
    batch: ModelInput,
    empty: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = open_openvino(bundle, "cpu", "fp32").session.run(batch)
    assert "compiling the edit graph" in caplog.text
    caplog.clear()
    assert np.array_equal(open_openvino(bundle, "cpu", "fp32").session.run(batch), expected)
    assert not caplog.text  # from the cache
    blob = entry(empty) / "compiled.blob"
    blob.write_bytes(content)
    if sums:
        (blob.parent / "sums.json").write_text(json.dumps({blob.name: graph_cache._sha256_of(blob)}))
    assert np.array_equal(open_openvino(bundle, "cpu", "fp32").session.run(batch), expected)
    assert message in caplog.text and blob.stat().st_size > 1000


def test_cache_other_version_compiles_anew(bundle: Bundle, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_openvino(bundle, "cpu", "fp32")
    monkeypatch.setattr(library, "__version__", "2027.1.0-1-later")
    open_openvino(bundle, "cpu", "fp32")
    assert len([path for path in empty.iterdir() if (path / "compiled.blob").exists()]) == 2


# What is refused


def test_missing_package_names_the_command(
    street_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert cli.main(["verify", str(street_bundle), "--backend", "openvino", "--json"]) == 4
    result = json.loads(capsys.readouterr().out)
    assert "needs the package openvino" in result["error"] and result["hint"] == 'pip install "spmdeploy[openvino]"'
    (check,) = check_openvino()
    assert not check.usable and 'pip install "spmdeploy[openvino]"' in str(check.remedy)


def test_old_version_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__version__", "2025.3.0-19807-abc")
    with pytest.raises(UnavailableError, match=r"OpenVINO 2025\.3\.0 is too old, 2026\.4 is needed"):
        open_openvino(bundle, "cpu", "fp32")


class Refusing:
    """A core that compiles nothing."""

    def read_model(self, path: str) -> Any:
        raise RuntimeError(
            "Exception from src/inference/src/cpp/core.cpp:105:\nCheck 'rank == 4' failed at src/core/shape.cpp:7:\n"
            f"Doesn't support dynamic weights shape{' and so on' * 100}"
        )


def test_refused_graph_is_said_in_short(bundle: Bundle, empty: Path) -> None:
    with pytest.raises(UnavailableError) as raised:
        OpenVinoSession(library, Refusing(), bundle, "fp32")
    assert raised.value.exit_code == 4 and "onnxruntime" in str(raised.value.hint)
    assert raised.value.problem.startswith("OpenVINO refuses the edit graph: Doesn't support dynamic weights shape")
    assert len(raised.value.problem) < 340


@pytest.mark.parametrize("text", ["", "Exception from src/a.cpp:1:"])
def test_shorten_message_keeps_what_there_is(text: str) -> None:
    assert shorten_message(text) == text


def compiled_graph(*precisions: str) -> Any:
    """A compiled graph with convolutions that execute in these precisions."""

    def node(layer: str, precision: str) -> Any:
        texts = {"layerType": layer, "runtimePrecision": precision}
        return SimpleNamespace(rt_info={key: SimpleNamespace(astype=lambda _, it=it: it) for key, it in texts.items()})

    nodes = [node("Convolution", precision) for precision in precisions] + [node("Output", "f32")]
    return SimpleNamespace(get_runtime_model=lambda: SimpleNamespace(get_ops=lambda: nodes))


@pytest.mark.parametrize("precisions", [["bf16", "f32", "f32"], []])
def test_other_precision_than_asked_is_refused(precisions: list[str], bundle: Bundle) -> None:
    record = bundle.graph("edit", "fp32")
    with pytest.raises(UnavailableError, match="2 in f32, 1 in bf16" if precisions else "it has none"):
        openvino_graph._check_precision(compiled_graph(*precisions), record, "bf16")
    assert openvino_graph._check_precision(compiled_graph("bf16", "bf16"), record, "bf16").startswith("all 2")


def test_bf16_without_instructions_is_refused(bundle: Bundle) -> None:
    for backend in ("openvino", "auto"):
        with pytest.raises(UnavailableError, match="neither amx_bf16 nor avx512_bf16"):
            open_backend(bundle, backend, "cpu", "bf16")
    assert "fp32 only: this processor has neither" in check_openvino()[0].reason


# bf16 and `auto`


@pytest.fixture
def real_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "cpu_features", lambda: FEATURES)


@needs_bf16
@pytest.mark.usefixtures("real_processor")
def test_auto_takes_proved_bf16_and_says_so(bundle: Bundle, empty: Path) -> None:
    opened = open_backend(bundle, device="cpu")
    session = opened.session
    assert (session.backend, session.precision) == ("openvino", "bf16")
    assert opened.notices == opened.choices[1:]
    assert opened.choices[0] == "backend openvino: engines do not run on the CPU"
    for text in ("precision bf16: faster by", "convolutions compute in bf16", "golden edits differ by at most"):
        assert text in opened.choices[1]
    assert all(result.passed and result.deviation.max_grey > 0 for result in verify(session, bundle))
    assert open_backend(bundle, device="cpu").choices == opened.choices  # the result is kept
    assert open_backend(bundle, device="cpu", precision="fp32").session.backend == "onnxruntime"
    assert open_backend(bundle, "openvino").choices[0].startswith("precision bf16: faster by")


@needs_bf16
@pytest.mark.usefixtures("real_processor")
def test_bind_layout_bf16_stays_within_limits(bundle: Bundle) -> None:
    session = open_openvino(bundle, "cpu", "bf16").session
    found = {check.name: check for check in run_thorough(bundle, session, lambda: session)}
    assert found["cached layout"].status == "passed" and found["repeatability"].status == "passed"


@pytest.fixture
def pretended_bf16(session: OpenVinoSession, monkeypatch: pytest.MonkeyPatch, empty: Path) -> list[str]:
    """A processor with bf16 whose session computes in FP32; grows with each verification."""
    verified: list[str] = []

    def repeat(session: Any, bundle: Bundle) -> list[GoldenResult]:
        verified.append(session.backend)
        return verify(session, bundle)

    monkeypatch.setattr(openvino, "cpu_features", lambda: "x86_64 avx512_bf16")
    monkeypatch.setattr(select_cpu, "open_openvino", lambda *_: OpenedBackend(session, ()))
    monkeypatch.setattr("spmdeploy.backends.verify.verify", repeat)
    return verified


def test_auto_verifies_once(bundle: Bundle, pretended_bf16: list[str]) -> None:
    choices = [open_backend(bundle, device="cpu").choices for _ in range(2)]
    assert choices[0] == choices[1] and "faster by avx512_bf16" in choices[0][1] and len(pretended_bf16) == 1


@pytest.mark.parametrize("error", [None, UnavailableError("OpenVINO refuses the edit graph: no", None)])
def test_auto_without_proof_takes_onnxruntime_and_says_why(
    error: SpmDeployError | None, bundle: Bundle, pretended_bf16: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def golden_result(session: Any, bundle: Bundle) -> tuple[str, int]:
        if error is not None:
            raise error
        return "car_away: largest difference 90 > 64", 90

    monkeypatch.setattr(select_cpu, "_golden_result", golden_result)
    monkeypatch.setattr(OpenVinoSession, "close", lambda self: None)  # shared by the tests
    opened = open_backend(bundle, device="cpu")
    assert opened.session.backend == "onnxruntime"
    reason = "golden edits differ: car_away" if error is None else "OpenVINO refuses the edit graph"
    assert f"no bf16: {reason}" in opened.choices[0]
    with pytest.raises(UnavailableError, match="bf16 cannot be used"):
        open_backend(bundle, device="cpu", precision="bf16")


def test_auto_without_onnxruntime_takes_openvino(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("spmdeploy.backends.registry.BackendEntry.missing", _missing)
    opened = open_backend(bundle, device="cpu")
    assert (opened.session.backend, opened.session.precision) == ("openvino", "fp32")


def _missing(entry: Any) -> str:
    return "onnxruntime" if entry.name == "onnxruntime" else ""
