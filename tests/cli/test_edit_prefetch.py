"""The command `edit` reads its files while the graph loads, with unchanged results and errors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import spmdeploy
from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends import onnxruntime_graph as ort
from spmdeploy.backends import registry as session
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.editing import run
from spmdeploy.errors import BundleError, UnavailableError
from spmdeploy.imaging import files as images

SAMPLE = SAMPLE_EDITS[0]


def edit_args(output: Path, **changes: object) -> list[str]:
    options: dict[str, object] = {"labels": SAMPLE.labels, "mask": SAMPLE.mask, "output": output} | changes
    photo = options.pop("image", SAMPLE.photo)
    return ["edit", str(photo), *(str(text) for name, value in options.items() for text in (f"--{name}", value))]


def fail_to_load(error: Exception) -> Any:
    def load(*arguments: object) -> None:
        raise error

    return load


def test_edit_reads_the_photo_while_the_graph_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading waits until the photo has been read, so reading one after the other would never end."""
    read, decode, load = threading.Event(), images.read_photo, ort.inference_session

    def read_photo(*arguments: Any) -> images.Photo:
        photo = decode(*arguments)
        read.set()
        return photo

    def inference_session(*arguments: Any) -> Any:
        assert read.wait(60)
        return load(*arguments)

    monkeypatch.setattr(images, "read_photo", read_photo)
    monkeypatch.setattr(ort, "inference_session", inference_session)
    assert cli.main(edit_args(tmp_path / "o.png", device="cpu", backend="onnxruntime")) == 0
    assert images.read_photo(tmp_path / "o.png").pixels.shape == (360, 480, 3)


@pytest.mark.parametrize("given", [{}, {"backend": "onnxruntime", "device": "cpu"}], ids=["auto", "named"])
@pytest.mark.parametrize("error", [BundleError("no graph"), UnavailableError("no ONNX Runtime")], ids=repr)
def test_edit_model_error_precedes_input_error(
    error: Any, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(ort, "inference_session", fail_to_load(error))
    monkeypatch.setattr(ort, "_to_package_error", lambda error, device: error)
    before = set(threading.enumerate())
    assert cli.main(edit_args(tmp_path / "o.png", image=tmp_path / "absent.png", **given)) == error.exit_code
    assert capfd.readouterr().err == f"error: {error.problem}\n"
    assert set(threading.enumerate()) <= before and not list(tmp_path.iterdir())


def test_edit_output_error_precedes_input_error(tmp_path: Path, capfd: Any) -> None:
    output = tmp_path / "o.png"
    output.write_bytes(b"dear")
    assert cli.main(edit_args(output, image=tmp_path / "absent.png")) == 7
    text = capfd.readouterr().err.splitlines()
    assert text[0] == "onnxruntime, CPU, fp32" and str(output) in text[-2] and "absent" not in text[-2]
    assert output.read_bytes() == b"dear"


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError(), ZeroDivisionError()], ids=repr)
def test_edit_exception_in_reading_thread_has_its_exit_code(
    raised: BaseException, tmp_path: Path, monkeypatch: Any
) -> None:
    def read_inputs(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr(run, "read_inputs", read_inputs)
    code = {KeyboardInterrupt: 130, MemoryError: 8}.get(type(raised), 1)
    assert cli.main(edit_args(tmp_path / "o.png")) == code
    assert not list(tmp_path.iterdir())


def test_edit_backend_without_on_loading_reads_files_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with engines, the files are read after opening the model."""
    opened = session.open_backend(open_bundle(spmdeploy.default_model()), "onnxruntime", "cpu")
    monkeypatch.setattr(session, "open_backend", lambda *arguments: opened)
    assert cli.main(edit_args(tmp_path / "o.png")) == 0


def test_open_editor_on_loading_receives_the_classes(street_bundle: Path) -> None:
    result: list[Any] = []
    spmdeploy.open_editor(street_bundle, "onnxruntime", "cpu", on_loading=result.append).close()
    assert [table.name for table in result] == ["street"]
