"""A backend that is registered is available everywhere, without any other change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.base import OpenedBackend, Unsupported
from spmdeploy.backends.registry import BackendEntry, backend_names, bench_names, open_backend, register, unregister
from spmdeploy.errors import UsageError
from spmdeploy.types import ModelInput


class Echo:
    """Returns its input."""

    backend, device, precision, provider, notes = "echo", "cpu", "fp32", "echo 1.0", ()
    size, refines, refine_unsupported = 256, False, Unsupported("echo refines nothing", "use another backend")

    def run(self, inputs: ModelInput) -> np.ndarray:
        return inputs.image.copy()

    def run_unrounded(self, inputs: ModelInput) -> np.ndarray:
        return inputs.image.astype(np.float32)

    def close(self) -> None:
        pass


def open_echo(bundle: Any, device: str, precision: str, on_loading: Any) -> OpenedBackend:
    return OpenedBackend(Echo(), ("backend echo: as asked",))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def echo() -> Iterator[None]:
    register(BackendEntry("echo", open_echo, "returns its input"))
    yield
    unregister("echo")


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    code = cli.main([*map(str, arguments), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return code, json.loads(line)


def test_registered_backend_edits(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sample, output = SAMPLE_EDITS[0], tmp_path / "edited.png"
    args = ("--labels", sample.labels, "--mask", sample.mask, "--output", output, "--backend", "echo")
    code, result = run(capsys, "edit", sample.photo, *args)
    assert (code, result["report"]["backend"], result["report"]["provider"]) == (0, "echo", "echo 1.0")
    photo, mask = np.asarray(Image.open(sample.photo)), np.asarray(Image.open(sample.mask)) != 0
    edited = np.asarray(Image.open(output))
    assert np.array_equal(edited[~mask], photo[~mask]) and not np.array_equal(edited[mask], photo[mask])


def test_registered_backend_edits_a_batch(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sample = SAMPLE_EDITS[0]
    (tmp_path / "edits.csv").write_text(f"image,mask,fill\n{sample.photo},{sample.mask},road\n")
    code, _ = run(capsys, "batch", tmp_path / "edits.csv", "--output-dir", tmp_path / "out", "--backend", "echo")
    assert code == 0 and len(list((tmp_path / "out").glob("*.png"))) == 1


def test_registered_backend_is_verified_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, "verify", "--backend", "echo")
    assert code == 5 and result["backend"] == "echo"
    assert result["golden"] and not any(edit["passed"] for edit in result["golden"])


def test_registered_backend_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--backend", "echo", "--baseline", "echo", "--mask", "small", "--duration", "0.1")
    code, result = run(capsys, "bench", *options)
    (row,) = [row for row in result["rows"] if row["backend"] == "echo"]
    assert code == 5 and "echo" in bench_names()
    assert row["status"] != "measured" and not row["latency_ms"], "its results differ, so that it gets no speed"


def test_registered_backend_is_listed_by_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, "doctor")
    (finding,) = [finding for finding in result["findings"] if finding["name"] == "echo"]
    assert code == 0 and finding["usable"] and finding["reason"] == "returns its input"


def test_unknown_backend_lists_the_registered_ones() -> None:
    with pytest.raises(UsageError) as raised:
        open_backend(None, "ecco")  # type: ignore[arg-type]
    assert raised.value.hint == f"choose from auto, {', '.join(backend_names())}"


@pytest.mark.parametrize(("device", "precision"), [("cuda:0", "auto"), ("auto", "fp16")])
def test_device_or_precision_that_an_entry_lacks_is_refused(device: str, precision: str) -> None:
    with pytest.raises(UsageError, match="echo"):
        open_backend(None, "echo", device, precision)  # type: ignore[arg-type]
