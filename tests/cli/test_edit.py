"""The command `edit`: its output, its options, what it refuses, and what an interruption leaves."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmdeploy.editing.editor import Editor
from spmdeploy.labels import class_table, colorize
from tests.cli.harness import EditFiles, Result, is_edited, pixels, process, save

WITH_EXIT_MESSAGE = (
    "import atexit, spmdeploy.cli\n"
    "atexit.register(lambda: print('the interpreter was taken down', flush=True))\n"
    "spmdeploy.cli.entry()"
)


def test_edit_finished_skips_interpreter_shutdown_unless_traced(files: EditFiles, tmp_path: Path) -> None:
    args = files.args(json=True, backend="onnxruntime")
    result = process(*args, driver=WITH_EXIT_MESSAGE)
    assert result.code == 0 and result.json["output"] == str(files.output)
    assert result.err == "onnxruntime, CPU, fp32\n"
    result = process(*files.args(), driver=WITH_EXIT_MESSAGE)  # the output exists already
    assert (result.code, result.out) == (7, "") and result.err.splitlines()[-1].startswith("hint: ")
    result = process("labels", "check", files.labels, driver=WITH_EXIT_MESSAGE)
    assert result.code == 0 and result.out.endswith("taken down\n")
    result = process(
        *files.args(json=True, overwrite=True),
        driver="import sys; sys.settrace(lambda *_: None)\n" + WITH_EXIT_MESSAGE,
    )
    assert result.code == 0 and result.out.endswith("taken down\n")  # a tracer reports at exit


def test_edit_in_a_process_that_goes_on_closes_its_session(
    files: EditFiles, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Editor] = []
    monkeypatch.setattr(Editor, "close", lambda editor: closed.append(editor))
    for count in (1, 2):
        assert run(*files.args(overwrite=True)).code == 0
        assert len(closed) == count


def test_edit_known_pixels_are_unchanged(files: EditFiles, run: Any) -> None:
    result = run(*files.args(json=True))
    assert result.code == 0
    edit = is_edited(files.mask)
    before, after = pixels(files.photo), pixels(files.output)
    assert np.array_equal(before[~edit], after[~edit])
    assert not np.array_equal(before[edit], after[edit])
    assert result.json["report"]["edited_pixels"] == edit.sum() == 60 * 40
    assert (result.json["width"], result.json["height"], result.json["notes"]) == (300, 280, [])
    assert result.json["output"] == str(files.output) and result.json["sheet"] is None


def test_edit_auto_choices_are_logged_and_explicit_ones_are_not(files: EditFiles, run: Any) -> None:
    result = run(*files.args())
    assert result.err == "onnxruntime, CPU, fp32\n"
    verbose = run(*files.args(overwrite=True, verbose=True))
    assert [line.split(":")[0] for line in verbose.err.splitlines()] == [
        "backend onnxruntime",
        "device cpu",
        "precision fp32",
    ]
    assert result.out.startswith(f"{files.output}: 2400 pixels in 1 window, CPUExecutionProvider (onnxruntime ")
    explicit = run(*files.args(backend="onnxruntime", device="cpu", precision="fp16", overwrite=True, json=True))
    assert explicit.err == "" and explicit.json["choices"] == []
    assert explicit.json["report"]["precision"] == "fp16"


def test_edit_photo_with_alpha_keeps_alpha(files: EditFiles, run: Any) -> None:
    rgba = np.dstack([pixels(files.photo), np.arange(280 * 300, dtype=np.uint32).astype(np.uint8).reshape(280, 300)])
    save(files.photo, rgba)
    assert run(*files.args()).code == 0
    edit = is_edited(files.mask)
    assert np.array_equal(pixels(files.output)[~edit], rgba[~edit])
    assert np.array_equal(pixels(files.output)[..., 3], rgba[..., 3])


def test_edit_jpeg_output_notes_inexact_known_pixels(files: EditFiles, run: Any) -> None:
    output = files.output.with_suffix(".jpg")
    result = run(*files.args(output=output, json=True))
    assert result.code == 0 and output.read_bytes().startswith(b"\xff\xd8\xff")
    assert [note for note in result.json["notes"] if "not equal; .png keeps them" in note]
    assert "note: " in result.err


def test_edit_fill_equals_a_uniform_label_map(files: EditFiles, run: Any) -> None:
    results = []
    for changes in ({}, {"labels": None, "fill": "Road"}, {"labels": None, "fill": "3"}):
        assert run(*files.args(overwrite=True, **changes)).code == 0
        results.append(files.output.read_bytes())
    assert results[0] == results[1] == results[2]
    assert run(*files.args(overwrite=True, labels=None, fill="tree")).code == 0
    assert files.output.read_bytes() != results[0]


def test_edit_fill_unknown_class_suggests_a_name(files: EditFiles, run: Any) -> None:
    result = run(*files.args(labels=None, fill="raod", json=True))
    assert (result.code, result.json["hint"]) == (7, "did you mean 'road'?")
    assert run(*files.args(labels=None, fill="12")).code == 7
    assert not files.output.exists()


@pytest.mark.parametrize(("grow", "side"), [(None, 10 + 2 * 8), (0, 10), (3, 10 + 2 * 3)])
def test_edit_edited_from_masks_changed_labels_dilated(
    grow: int | None, side: int, files: EditFiles, run: Any, tmp_path: Path
) -> None:
    labels = pixels(files.labels).copy()
    labels[50:60, 70:80] = 5
    now = save(tmp_path / "now.png", labels)
    result = run(*files.args(labels=now, edited_from=files.labels, mask=None, grow=grow, json=True))
    assert result.code == 0 and result.json["report"]["edited_pixels"] == side**2
    margin = (side - 10) // 2
    edited = np.zeros(labels.shape, bool)
    edited[50 - margin : 60 + margin, 70 - margin : 80 + margin] = True
    assert np.array_equal(pixels(files.output)[~edited], pixels(files.photo)[~edited])


def test_edit_edited_from_equal_labels_exits_7(files: EditFiles, run: Any) -> None:
    result = run(*files.args(edited_from=files.labels, mask=None))
    assert result.code == 7 and "nothing to edit" in result.err and not files.output.exists()


def test_edit_onto_its_photo_needs_overwrite(files: EditFiles, run: Any) -> None:
    before = files.photo.read_bytes()
    result = run(*files.args(output=files.photo))
    assert result.code == 7 and "--overwrite" in result.err and files.photo.read_bytes() == before
    assert run(*files.args(output=files.photo, overwrite=True)).code == 0
    assert files.photo.read_bytes() != before


def test_edit_torch_and_onnxruntime_agree_within_1_level(files: EditFiles, run: Any) -> None:
    torch_output = files.output.with_name("torch.png")
    assert run(*files.args(backend="onnxruntime")).code == 0
    result = run(*files.args(backend="torch", output=torch_output, json=True))
    assert result.code == 0 and result.json["report"]["provider"].startswith("torch ")
    difference = pixels(files.output).astype(int) - pixels(torch_output)
    assert np.abs(difference).max() <= 1


def test_edit_sheet_shows_before_labels_and_after(files: EditFiles, run: Any, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    result = run(*files.args(sheet=sheet, json=True))
    assert result.code == 0 and result.json["sheet"] == str(sheet)
    drawn = pixels(sheet)
    for cell, image in ((0, pixels(files.photo)), (3, pixels(files.output))):
        left = 10 + cell * (300 + 10)
        assert np.array_equal(drawn[38 : 38 + 280, left : left + 300], image)
    labels_cell = drawn[38 : 38 + 280, 320:620]
    assert np.array_equal(labels_cell[120, 230], class_table("street").find("road").color)


def test_edit_writes_only_its_output(files: EditFiles, run: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert run(*files.args()).code == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, files.output])


def refused(result: Result, files: EditFiles, code: int, *texts: str) -> None:
    """The command failed with this code, printed these texts, and left no output and no temporary file."""
    assert result.code == result.json["exit_code"] == code
    text = f"{result.json['error']} / {result.json['hint']}"
    for part in texts:
        assert part in text, text
    assert not files.output.exists()
    assert not [path for path in files.output.parent.iterdir() if path.suffix == ".tmp"]


def test_edit_inputs_of_different_size_are_refused(files: EditFiles, run: Any, tmp_path: Path) -> None:
    small = save(tmp_path / "small.png", np.eye(28, 30, dtype=np.uint8))
    for option in ("labels", "mask", "instances"):
        result = run(*files.args(json=True, **{option: small}))
        refused(result, files, 7, "small.png", "30×28", "300×280", "match")


def test_edit_unknown_labels_are_refused_only_under_the_mask(files: EditFiles, run: Any) -> None:
    labels = pixels(files.labels).copy()
    labels[0, 0] = 99
    save(files.labels, labels)
    assert run(*files.args()).code == 0
    files.output.unlink()
    labels[110, 210:213] = 12
    save(files.labels, labels)
    refused(run(*files.args(json=True)), files, 7, "labels.png", "12 (3 pixels)", "under the mask")


def test_edit_colored_label_map_is_refused_with_hint(files: EditFiles, run: Any) -> None:
    save(files.labels, colorize(pixels(files.labels), class_table("street")))
    refused(run(*files.args(json=True)), files, 7, "labels.png", "labels convert")


@pytest.mark.parametrize(("value", "text"), [(0, "empty"), (255, "full")])
def test_edit_empty_or_full_mask_is_refused(value: int, text: str, files: EditFiles, run: Any) -> None:
    save(files.mask, np.full((280, 300), value, np.uint8))
    refused(run(*files.args(json=True)), files, 7, "mask.png", text)


def test_edit_mask_full_after_dilation_is_refused(files: EditFiles, run: Any) -> None:
    refused(run(*files.args(grow=400, json=True)), files, 7, "mask.png, grown by 400", "full")


@pytest.mark.parametrize("option", ["image", "labels", "mask", "instances", "edited_from"])
@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "garbage", "absent"])
def test_edit_input_that_is_not_an_image_is_refused(
    option: str, content: bytes | None, files: EditFiles, run: Any, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    changes: dict[str, object] = {option: bad} | ({"mask": None} if option == "edited_from" else {})
    refused(run(*files.args(json=True, **changes)), files, 7, "bad.png")


@pytest.mark.parametrize("output", ["missing/edited.png", "edited", "edited.gif", "edited.tiff", "."])
def test_edit_unusable_output_path_is_refused(output: str, files: EditFiles, run: Any, tmp_path: Path) -> None:
    refused(run(*files.args(output=tmp_path / output, json=True)), files, 7, str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that even root cannot write into")
def test_edit_output_in_unwritable_folder_is_refused(files: EditFiles, run: Any) -> None:
    refused(run(*files.args(output="/proc/edited.png", json=True)), files, 7, "/proc/edited.png")


def test_edit_existing_output_or_sheet_is_not_replaced(files: EditFiles, run: Any, tmp_path: Path) -> None:
    files.output.write_bytes(b"dear")
    result = run(*files.args(json=True))
    assert result.code == 7 and "exists already" in result.json["error"] and files.output.read_bytes() == b"dear"
    files.output.unlink()
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"dear")
    refused(run(*files.args(sheet=sheet, json=True)), files, 7, "sheet.png exists already")
    assert sheet.read_bytes() == b"dear"


@pytest.mark.parametrize(("written", "source"), [("output", "mask"), ("output", "labels"), ("sheet", "photo")])
def test_edit_overwrite_of_another_input_is_refused(written: str, source: str, files: EditFiles, run: Any) -> None:
    path = getattr(files, source)
    before = path.read_bytes()
    result = run(*files.args(overwrite=True, json=True, **{written: path}))
    assert result.code == 2 and str(path) in result.json["error"] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("explicit", "code", "texts"),
    [
        ({"device": "cuda:0"}, 4, ["cuda:0", "--device cpu"]),
        ({"device": "cuda:0", "backend": "torch"}, 4, ["cuda:0", "--device cpu"]),
        ({"device": "gpu"}, 2, ["'gpu'", "cuda:0"]),
        ({"device": "gpu", "backend": "torch"}, 2, ["'gpu'", "cuda:0"]),
        ({"precision": "fp16", "backend": "torch"}, 2, ["fp32", "fp16"]),
        ({"tiling": "off"}, 7, ["photo.png", "300×280", "256×256"]),
    ],
    ids=str,
)
def test_edit_unavailable_explicit_choice_is_refused(
    explicit: dict[str, object],
    code: int,
    texts: list[str],
    files: EditFiles,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if explicit.get("backend") == "torch":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    refused(run(*files.args(json=True, **explicit)), files, code, *texts)


def test_edit_model_that_is_not_a_bundle_exits_6(files: EditFiles, run: Any, tmp_path: Path) -> None:
    for model, text in (
        (tmp_path / "absent.spm", "absent.spm"),
        (tmp_path, "manifest.json"),
        (files.model / "graphs/edit.fp32.onnx", ".spm folder"),
        (files.model.with_name("tiny.safetensors"), "spmdeploy export"),
        (files.photo, "neither a folder nor a zip"),
    ):
        refused(run(*files.args(model=model, json=True)), files, 6, text)


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\nimport spmdeploy.cli; spmdeploy.cli.entry()"


def test_edit_and_export_without_torch_name_the_extra(files: EditFiles, street_bundle: Path, tmp_path: Path) -> None:
    result = process(*files.args(backend="torch", json=True), driver=WITHOUT_TORCH)
    refused(result, files, 4, "torch", 'pip install "spmdeploy[export]"')
    checkpoint, bundle = street_bundle.with_name("tiny.safetensors"), tmp_path / "b.spm"
    result = process("export", checkpoint, "-o", bundle, "--classes", "street", "--json", driver=WITHOUT_TORCH)
    refused(result, files, 4, "torch", 'pip install "spmdeploy[export]"')
    assert not bundle.exists()
    assert process(*files.args(), driver=WITHOUT_TORCH).code == 0  # an edit needs none


INTERRUPTED_IN = {
    "the session": (
        "import spmdeploy.backends.onnxruntime as ort\nort.OnnxRuntimeSession.run = lambda *_: interrupt()\n"
    ),
    "the encoder": (
        "import PIL.Image\n"
        "def save(self, stream, *_, **__): stream.write(b'half a pic'); stream.flush(); interrupt()\n"
        "PIL.Image.Image.save = save\n"
    ),
}
INTERRUPTING = (
    "import os, signal, spmdeploy.cli\n"
    "def interrupt(): os.kill(os.getpid(), signal.SIGINT)\n"
    "{patch}"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "spmdeploy.cli.entry()"
)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("place", INTERRUPTED_IN)
def test_edit_interrupted_leaves_no_files(place: str, files: EditFiles, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    args = files.args(backend="onnxruntime", device="cpu", precision="fp32", json=True)
    result = process(*args, driver=INTERRUPTING.format(patch=INTERRUPTED_IN[place]))
    assert result.code == result.json["exit_code"] == 130 and result.json["error"] == "interrupted"
    assert "Traceback" not in result.err
    assert sorted(tmp_path.iterdir()) == before
