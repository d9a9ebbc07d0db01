"""The triton backend against a stand-in that runs models in ONNX Runtime, and once against a real Triton server."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spmdeploy
from spmdeploy import cli
from spmdeploy.backends import triton
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.triton import TritonSession, open_triton, parse_url
from spmdeploy.backends.verify import verify
from spmdeploy.bench.workloads import edit_batch
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.errors import BundleError, UnavailableError, UsageError
from spmdeploy.types import ModelInput

if not all(find_spec(name) for name in ("grpc", "rapidjson", "tritonclient", "onnxruntime")):
    pytest.skip("needs the extras `triton` and `cpu`", allow_module_level=True)

from tests.simulators import pytriton_server
from tests.simulators.triton_server import Server, serving, serving_process


@pytest.fixture(scope="module")
def bundle(street_bundle: Path) -> Bundle:
    return open_bundle(street_bundle)


@pytest.fixture(scope="module")
def repository(street_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `tiny` and `tiny_refine`, for CPUs."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    for graph in ("edit", "refine"):
        args = ["export-triton", str(street_bundle), str(folder), "--device", "cpu", "--graph", graph, "--json"]
        assert cli.main(args) == 0
    return folder


@pytest.fixture(scope="module")
def running(repository: Path) -> Iterator[tuple[Server, str]]:
    server = Server(repository)
    with serving(server) as url:
        yield server, url


@pytest.fixture
def server(running: tuple[Server, str]) -> Iterator[Server]:
    """The running server, restored afterwards."""
    server, _ = running
    configs = dict(server.configs)
    server.requests.clear()
    server.most_at_once = 0
    yield server
    server.configs, server.delay, server.answer_with = configs, 0.0, None


@pytest.fixture
def url(server: Server, running: tuple[Server, str]) -> str:
    return running[1]


@pytest.fixture
def batch(bundle: Bundle) -> ModelInput:
    return edit_batch(bundle.manifest.classes, 256, "medium", 6)


def open_session(bundle: Bundle, url: str) -> TritonSession:
    session = open_triton(bundle, url, "auto").session
    assert isinstance(session, TritonSession)
    return session


def changed_config(server: Server, model: str, **parameters: str) -> None:
    config = type(server.configs[model])()
    config.CopyFrom(server.configs[model])
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    server.configs[model] = config


def edit_files(folder: Path, side: int) -> list[str]:
    """Options of an edit of a photo that needs windows and tiles."""
    rng = np.random.default_rng(3)
    photo = rng.integers(0, 256, (side, side, 3), np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[20 : side - 20, 30 : side - 40] = 255
    paths = {"photo": photo, "labels": np.full((side, side), 2, np.uint8), "mask": mask}
    for name, pixels in paths.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return [f"{folder}/photo.png", "--labels", f"{folder}/labels.png", "--mask", f"{folder}/mask.png"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = cli.main([*map(str, arguments), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return code, json.loads(line)


@pytest.mark.parametrize(("side", "tiling"), [(256, "off"), (300, "crop"), (520, "cascade")])
def test_edit_gives_the_bytes_of_onnxruntime(
    side: int, tiling: str, server: Server, url: str, street_bundle: Path, tmp_path: Path, capsys: Any
) -> None:
    files = [*edit_files(tmp_path, side), "--model", street_bundle]
    local = ["--backend", "onnxruntime", "--device", "cpu", "--precision", "fp32", "--batch-size", "1"]
    assert run(capsys, "edit", *files, "--output", tmp_path / "local.png", *local)[0] == 0
    remote = ["--backend", "triton", "--url", url, "--batch-size", 8]
    code, result = run(capsys, "edit", *files, "--output", tmp_path / "remote.png", *remote)
    assert code == 0 and (tmp_path / "remote.png").read_bytes() == (tmp_path / "local.png").read_bytes()
    report = result["report"]
    assert (report["backend"], report["device"], report["precision"], report["tiling"]) == (
        *("triton", url, "fp32"),
        tiling,
    )
    assert report["provider"] == "Triton 0.fake (onnxruntime, model tiny)"
    assert ("tiny_refine" in server.requests) == (tiling == "cascade")
    if tiling == "cascade":
        assert server.requests["tiny_refine"] >= 4 and server.most_at_once > 1


@pytest.mark.slow
@pytest.mark.skipif(pytriton_server.server_folder() is None, reason="needs nvidia-pytriton, which carries a server")
def test_real_server_gives_the_bytes_of_onnxruntime_and_is_killed(
    repository: Path, street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(repository, tmp_path / "models")
    pytriton_server.use_python_backend(tmp_path / "models")
    files = [*edit_files(tmp_path, 520), "--model", street_bundle]
    local = ["--backend", "onnxruntime", "--device", "cpu", "--precision", "fp32", "--batch-size", "1"]
    assert run(capsys, "edit", *files, "--output", tmp_path / "local.png", *local)[0] == 0
    with pytriton_server.serving(tmp_path / "models", tmp_path / "triton.log") as (url, process):
        remote = ["--backend", "triton", "--url", url]
        code, result = run(capsys, "edit", *files, "--output", tmp_path / "remote.png", *remote)
        assert code == 0 and (tmp_path / "remote.png").read_bytes() == (tmp_path / "local.png").read_bytes()
        assert result["report"]["provider"].startswith("Triton 2.") and result["report"]["tiling"] == "cascade"
        assert run(capsys, "verify", street_bundle, *remote)[0] == 0
        code, result = run(capsys, "verify", street_bundle, "--backend", "triton", "--url", f"{url}/other")
        assert code == 4 and "model other: NOT_FOUND" in result["error"]
        code, result = run(capsys, "verify", "--backend", "triton", "--url", f"{url}/tiny")
        assert code == 4 and "model tiny: is not of the bundle street.spm" in result["error"]
        arrays = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("photo", "labels", "mask")]
        with spmdeploy.open_editor(street_bundle, "triton", url) as editor:
            message = f"^Triton server {url}, model tiny_refine: UNAVAILABLE: "
            with pytest.raises(UnavailableError, match=message) as raised:
                editor.edit(*arrays, progress=lambda done, total: process.kill() if done == 1 else None)
    assert raised.value.exit_code == 4


def test_golden_edits_pass(url: str, bundle: Bundle) -> None:
    session = open_session(bundle, url)
    results = verify(session, bundle)
    assert len(results) == 2 * len(bundle.manifest.golden) and all(result.passed for result in results)


def test_run_sends_all_images_at_once(server: Server, url: str, bundle: Bundle, batch: ModelInput) -> None:
    server.delay = 0.3
    session = open_session(bundle, url)
    edited = session.run(batch)
    assert server.most_at_once == len(batch.image) == server.requests["tiny"]
    singles = [session.run(ModelInput(*(array[index : index + 1] for array in batch))) for index in range(2)]
    assert np.array_equal(edited[:2], np.concatenate(singles))


def test_run_several_servers_share_the_work(
    server: Server, url: str, repository: Path, bundle: Bundle, batch: ModelInput
) -> None:
    second = Server(repository, delay=0.2)
    server.delay = 0.2
    with serving(second) as other:
        opened = open_triton(bundle, f"{url},{other}", "auto")
        opened.session.run(batch)
    assert server.requests["tiny"] == second.requests["tiny"] == len(batch.image) // 2
    assert opened.choices[0] == f"servers {url}, {other}"


def test_name_of_several_addresses_is_as_many_servers(
    server: Server, repository: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    port = int(url.rpartition(":")[2])
    found = [(socket.AF_INET, None, None, "", (number, port)) for number in ("127.0.0.1", "127.0.0.1", "127.0.0.2")]
    found.append((socket.AF_INET6, None, None, "", ("::1", port, 0, 0)))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert triton._resolve(f"fleet:{port}", "") == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[-1:])
    assert triton._resolve(f"fleet:{port}", "") == [f"[::1]:{port}"]


def test_commands_use_the_server(
    server: Server, url: str, street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = ["--backend", "triton", "--url", f"{url}/tiny"]
    code, result = run(capsys, "verify", street_bundle, *remote, "--thorough")
    assert code == 0 and result["device"] == f"{url}/tiny" and all(edit["passed"] for edit in result["golden"])
    edit_files(tmp_path, 300)
    (tmp_path / "edits.csv").write_text("image,mask,fill\n" + "photo.png,mask.png,road\n")
    outputs = ["--output-dir", tmp_path / "out", "--model", street_bundle]
    assert run(capsys, "batch", tmp_path / "edits.csv", *outputs, *remote)[0] == 0
    code, result = run(capsys, "doctor", street_bundle, "--url", url)
    findings = {finding["name"]: finding for finding in result["findings"]}
    assert code == 0 and findings["triton"]["usable"] and findings[f"triton {url}"]["usable"]
    assert findings[f"triton {url}"]["reason"] == "Triton 0.fake (onnxruntime, model tiny), fp32"


@pytest.mark.slow
def test_bench_measures_the_server(url: str, street_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--backend", "triton", "--baseline", "triton", "--mask", "small", "--duration", "0.1")
    code, result = run(capsys, "bench", street_bundle, *options, "--url", url)
    (row,) = [row for row in result["rows"] if row["backend"] == "triton"]
    assert code == 0 and row["status"] == "measured" and row["ran"]["device"] == url


def test_server_not_reachable_exits_4(street_bundle: Path, tmp_path: Path, capsys: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{free.getsockname()[1]}"
    args = [*edit_files(tmp_path, 300), "--model", street_bundle, "--output", tmp_path / "out.png"]
    code, result = run(capsys, "edit", *args, "--backend", "triton", "--url", url)
    assert code == 4 and result["error"].startswith(f"Triton server {url}: UNAVAILABLE: ")
    assert not (tmp_path / "out.png").exists()
    code, result = run(capsys, "doctor", street_bundle, "--url", url)
    (finding,) = [finding for finding in result["findings"] if finding["name"] == f"triton {url}"]
    assert code == 0 and not finding["usable"] and "UNAVAILABLE" in finding["reason"]


def test_host_without_address_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UnavailableError, match=r"Triton server nowhere\.invalid:8001: nowhere\.invalid cannot be"):
        open_triton(bundle, "nowhere.invalid:8001", "auto")


def test_missing_model_is_named(url: str, bundle: Bundle) -> None:
    with pytest.raises(UnavailableError, match=f"^Triton server {url}/other, model other: NOT_FOUND: .*unknown"):
        open_triton(bundle, f"{url}/other", "auto")


@pytest.mark.parametrize("model", ["tiny", "tiny_refine"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({triton.CONTENT: "0" * 64}, r"is not of the bundle tiny\.spm: other graph or weights"),
        ({triton.PRECISION: "fp16"}, r"is not of the bundle tiny\.spm"),
        ({triton.GRAPH: "layout"}, "has the graph 'layout', not"),
    ],
)
def test_model_of_another_bundle_is_refused(
    server: Server, url: str, bundle: Bundle, model: str, parameters: dict[str, str], message: str
) -> None:
    changed_config(server, model, **parameters)
    with pytest.raises(UnavailableError, match=f"^Triton server {url}, model {model}: {message}"):
        open_triton(bundle, url, "auto")


def test_model_without_parameters_is_refused(server: Server, url: str, bundle: Bundle) -> None:
    changed_config(server, "tiny")
    server.configs["tiny"].parameters.clear()
    with pytest.raises(UnavailableError, match="model tiny: was not written by spmdeploy export-triton"):
        open_triton(bundle, url, "auto")


def test_one_of_two_servers_with_another_model_is_refused(
    server: Server, url: str, repository: Path, bundle: Bundle
) -> None:
    second = Server(repository)
    changed_config(second, "tiny", **{triton.CONTENT: "0"})
    with serving(second) as other, pytest.raises(UnavailableError, match=rf"{url},{other} \({other}\), model tiny: is"):
        open_triton(bundle, f"{url},{other}", "auto")


def test_precision_that_the_model_lacks_is_refused(url: str, bundle: Bundle) -> None:
    with pytest.raises(UnavailableError, match=f"{url}, model tiny: computes in fp32, not in fp16"):
        open_backend(bundle, "triton", url, "fp16")


def test_server_without_the_refine_model_edits_without_it(server: Server, url: str, bundle: Bundle) -> None:
    del server.configs["tiny_refine"]
    session = open_session(bundle, url)
    assert not session.refines and session.refine_unsupported is not None
    assert "has no model tiny_refine" in session.refine_unsupported.problem
    assert "--graph refine --name tiny_refine" in session.refine_unsupported.hint
    with pytest.raises(BundleError, match="has no model tiny_refine"):
        session.refine(ModelInput(*(np.zeros(1) for _ in range(4))), np.zeros(1, np.float32))  # type: ignore[arg-type]


def test_request_timeout_is_named(
    server: Server, url: str, bundle: Bundle, batch: ModelInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(bundle, url)
    server.delay = 2.0
    monkeypatch.setattr(triton, "RUN_SECONDS", 0.3)
    with pytest.raises(UnavailableError, match=rf"^Triton server {url}, model tiny: no answer within 0\.3 s"):
        session.run(batch)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda edited: edited[:, :8], r"gave uint8 \(1, 8, 256, 3\) for edited, not uint8 \(1, 256, 256, 3\)"),
        (lambda edited: edited.astype(np.float32), "gave float32"),
    ],
)
def test_unusable_answer_is_named(
    server: Server, url: str, bundle: Bundle, batch: ModelInput, answer: Any, message: str
) -> None:
    session = open_session(bundle, url)
    server.answer_with = answer
    with pytest.raises(UnavailableError, match=f"^Triton server {url}, model tiny: {message}"):
        session.run(batch)


def test_server_killed_during_an_edit_exits_4(
    repository: Path, street_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*edit_files(tmp_path, 700), "--model", street_bundle, "--output", tmp_path / "out.png"]
    with serving_process(repository, requests=3) as (url, process):
        code, result = run(capsys, "edit", *args, "--backend", "triton", "--url", url)
        assert process.wait(10) == -signal.SIGKILL
    assert code == 4 and result["error"].startswith(f"Triton server {url}, model tiny_refine: UNAVAILABLE: ")
    assert not (tmp_path / "out.png").exists()


def test_closed_session_is_refused(url: str, bundle: Bundle, batch: ModelInput) -> None:
    session = open_session(bundle, url)
    session.close()
    session.close()
    with pytest.raises(UnavailableError, match="was closed"):
        session.run(batch)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("host:8001", (("host:8001",), None)),
        ("a.b:1,10.0.0.2:2/street", (("a.b:1", "10.0.0.2:2"), "street")),
        ("[::1]:8001", (("[::1]:8001",), None)),
    ],
)
def test_parse_url_takes_servers_and_model(given: str, expected: Any) -> None:
    assert parse_url(given) == expected


@pytest.mark.parametrize(
    "given", ["host", "http://host:8001", "host:0", "host:99999", "a:1,,b:2", "host:1/", "h:1/a b"]
)
def test_parse_url_other_forms_are_refused(given: str) -> None:
    with pytest.raises(UsageError):
        parse_url(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "triton"], "not named"),
        (["--backend", "onnxruntime", "--url", "host:8001"], "--url is for --backend triton"),
        (["--url", "host:8001"], "--url is for --backend triton"),
        (["--backend", "triton", "--url", "host:8001", "--device", "cpu"], "contradict"),
    ],
)
def test_options_that_contradict_each_other_exit_2(
    options: list[str], message: str, street_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "verify", street_bundle, *options)
    assert code == 2 and message in result["error"]
