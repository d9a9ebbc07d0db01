"""The command line as its users meet it: exit codes, what is printed where, and what stays on disk afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from PIL import Image

import spmdeploy
from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.cli import app as commands
from spmdeploy.editing.options import DEFAULT_DILATION
from spmdeploy.labels import class_table, colorize

COMMANDS = {
    "edit": ["edit"],
    "batch": ["batch"],
    "export": ["export"],
    "inspect": ["inspect"],
    "build": ["build"],
    "verify": ["verify"],
    "doctor": ["doctor"],
    "export-triton": ["export-triton"],
    "bench": ["bench"],
    "bench run": ["bench", "run"],
    "bench compare": ["bench", "compare"],
    "bundle": ["bundle"],
    "bundle pack": ["bundle", "pack"],
    "bundle unpack": ["bundle", "unpack"],
    "bundle slim": ["bundle", "slim"],
    "bundle keygen": ["bundle", "keygen"],
    "labels": ["labels"],
    "labels check": ["labels", "check"],
    "labels show": ["labels", "show"],
    "labels convert": ["labels", "convert"],
    "train": ["train"],
    "evaluate": ["evaluate"],
    "dataset": ["dataset"],
    "dataset check": ["dataset", "check"],
    "dataset prepare": ["dataset", "prepare"],
}
GROUPS = ("bundle", "labels", "dataset")
HEAVY = {
    "cryptography",
    "minisign",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "safetensors",
    "numpy",
    "PIL",
}


class Ran(NamedTuple):
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that is all of stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        value = json.loads(lines[0])
        assert value["schema"].startswith("spmdeploy.") and value["schema"].endswith("/1")
        return dict(value)


class Edit(NamedTuple):
    """The files of a small edit: a noisy photo of 300x280, the labels of a road, a mask of 60x40 with its box."""

    photo: Path
    labels: Path
    mask: Path
    output: Path
    model: Path

    def words(self, **changes: object) -> list[str]:
        """The arguments of `spmdeploy edit`. changes: options by name; None leaves one out, True is a flag."""
        options: dict[str, object] = {
            "labels": self.labels,
            "mask": self.mask,
            "output": self.output,
            "model": self.model,
        } | changes
        words = ["edit", str(options.pop("image", self.photo))]
        for name, value in options.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return words


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> Ran:
        capfd.readouterr()
        code = cli.main([str(word) for word in words])
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def files(tmp_path: Path, street_bundle: Path) -> Edit:
    noise = np.random.default_rng(1)
    save(tmp_path / "photo.png", noise.integers(0, 256, (280, 300, 3), np.uint8))
    save(tmp_path / "labels.png", np.full((280, 300), 3, np.uint8))
    mask = np.zeros((280, 300), np.uint8)
    mask[100:140, 200:260] = 255
    save(tmp_path / "mask.png", mask)
    names = ("photo.png", "labels.png", "mask.png", "edited.png")
    return Edit(*(tmp_path / name for name in names), street_bundle)


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def is_edited(path: Path) -> NDArray[np.bool_]:
    return pixels(path) != 0


def process(*words: object, driver: str = "import spmdeploy.cli; spmdeploy.cli.entry()", **options: Any) -> Ran:
    command = [sys.executable, "-c", driver, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False, **options)
    return Ran(done.returncode, done.stdout, done.stderr)


# ------------------------------------------------------------------------------------------------------------- help


def commands_of(group: Any, prefix: str = "") -> set[str]:
    names = set()
    for name, command in group.commands.items():
        names |= {prefix + name} | (commands_of(command, f"{name} ") if hasattr(command, "commands") else set())
    return names


def test_there_are_no_other_commands() -> None:
    assert commands_of(typer.main.get_command(commands.app)) == set(COMMANDS)


@pytest.mark.parametrize("words", [[], *COMMANDS.values()], ids=["spmdeploy", *COMMANDS])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    driver = (
        "import sys, spmdeploy.cli\n"
        "code = spmdeploy.cli.main(sys.argv[1:])\n"
        "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    ran = process(*words, "--help", driver=driver)
    code, *modules = ran.err.split()
    assert code == "0" and ran.out.startswith("Usage: spmdeploy")
    assert HEAVY.isdisjoint(modules)
    assert "typer" in modules  # the list is one


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in GROUPS])
def test_every_command_has_json(name: str, run: Any) -> None:
    assert "--json" in run(*COMMANDS[name], "--help").out


def test_the_help_knows_the_default_growth(run: Any) -> None:
    assert f"Default: {DEFAULT_DILATION} with --edited-from" in " ".join(run("edit", "--help").out.split())


def test_without_a_command_comes_the_help(run: Any) -> None:
    ran = run()
    assert (ran.code, ran.err) == (0, "")
    assert "Commands:" in ran.out and "..." not in ran.out.partition("Commands:")[2]  # no summary is cut off


def test_version(run: Any) -> None:
    assert run("--version") == Ran(0, f"{spmdeploy.__version__}\n", "")


# ------------------------------------------------------------------------------------------- errors, whatever command

NOTHING_GIVEN = [name for name in COMMANDS if name not in ("verify", "doctor", "bench", "bench run", *GROUPS)]


@pytest.mark.parametrize("name", NOTHING_GIVEN)
def test_missing_arguments(name: str, run: Any) -> None:
    ran = run(*COMMANDS[name], "--json")
    assert ran.code == ran.json["exit_code"] == 2
    assert "Missing" in ran.json["error"] and ran.json["hint"] == f"see spmdeploy {name} --help"
    assert ran.err == ""


@pytest.mark.parametrize(
    "words",
    [
        ["edit", "a.png", "-o", "b.png", "--backend", "cuda"],
        ["edit", "a.png", "-o", "b.png", "--precision", "int8"],
        ["edit", "a.png", "-o", "b.png", "--grow", "many"],
        ["edit", "a.png", "b.png", "-o", "c.png"],
        ["edit", "a.png", "-o", "b.png", "--mask", "m.png"],
        ["edit", "a.png", "-o", "b.png", "--mask", "m.png", "--labels", "l.png", "--fill", "road"],
        ["edit", "a.png", "-o", "b.png", "--mask", "m.png", "--edited-from", "l.png", "--labels", "k.png"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road", "--edited-from", "l.png"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road", "--mask", "m.png", "--grow", "-1"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road", "--mask", "m.png", "--sheet", "./b.png"],
        ["batch", "m.csv", "--output-dir", "d", "--jobs", "0"],
        ["labels", "convert", "a.png", "-o", "b.png", "--void", "255"],
        ["nonsense"],
        ["--nonsense"],
        ["labels"],
        ["labels", "nonsense"],
    ],
    ids=" ".join,
)
def test_usage_errors(words: list[str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    in_words = run(*words)
    assert (in_words.code, in_words.out) == (2, "")
    assert in_words.err.startswith("error: ") and "Traceback" not in in_words.err and "Value error" not in in_words.err
    as_json = run(*words, "--json")
    assert as_json.code == as_json.json["exit_code"] == 2
    assert as_json.json["error"] in in_words.err or "--json" in as_json.json["error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("raised", [KeyboardInterrupt, MemoryError, ZeroDivisionError("by 0")])
@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize("json_words", [[], ["--json"]], ids=["words", "json"])
def test_what_is_not_foreseen(
    raised: Any, debug: str, json_words: list[str], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: object) -> None:
        raise raised

    monkeypatch.setattr("spmdeploy.backends.doctor.run_checks", fail)
    monkeypatch.setenv("SPMDEPLOY_DEBUG", debug)
    code = {KeyboardInterrupt: 130, MemoryError: 8}.get(raised, 1)
    ran = run("doctor", *json_words)
    assert ran.code == code
    if json_words:
        assert ran.json["exit_code"] == code and ran.json["schema"] == "spmdeploy.error/1"
    else:
        assert ran.out == "" and "error: " in ran.err
    if code != 130:
        assert ("Traceback" in ran.err) == (debug == "1")


def test_ctrl_c_before_the_command_has_begun(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "app", interrupted)
    assert run("doctor") == Ran(130, "", "error: interrupted\n")


@pytest.mark.parametrize("words", [(), ("--json",)], ids=["words", "json"])
@pytest.mark.parametrize("module", ["typer", "spmdeploy.cli"])
def test_ctrl_c_while_the_command_line_is_imported(module: str, words: tuple[str, ...]) -> None:
    driver = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('spmdeploy', run_name='__main__')"
    )
    ran = process("doctor", *words, driver=driver)
    assert ran.code == 130 and "Traceback" not in ran.err
    if words:
        assert (ran.json["schema"], ran.json["exit_code"], ran.err) == ("spmdeploy.error/1", 130, "")
    else:
        assert (ran.out, ran.err) == ("", "error: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])  # stdout fails when it is flushed, or when it is printed to
@pytest.mark.parametrize("command", ["labels check", "edit"])
def test_a_reader_that_goes_away_is_no_drama(command: str, unbuffered: str, files: Edit) -> None:
    words = files.words(backend="onnxruntime", device="cpu", precision="fp32", json=True)
    reading, writing = os.pipe()
    os.close(reading)
    words = words if command == "edit" else [*command.split(), str(SAMPLE_EDITS[0].labels)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-m", "spmdeploy", *words],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
    assert files.output.exists() == (command == "edit")


WITH_LAST_WORDS = (
    "import atexit, spmdeploy.cli\n"
    "atexit.register(lambda: print('the interpreter was taken down', flush=True))\n"
    "spmdeploy.cli.entry()"
)


def test_an_edit_ends_when_all_is_said(files: Edit, tmp_path: Path) -> None:
    words = (*files.words(json=True), "--backend", "onnxruntime")
    ran = process(*words, driver=WITH_LAST_WORDS)
    assert ran.code == 0 and ran.json["output"] == str(files.output)
    assert "device cpu" in ran.err.splitlines()[-1] or "precision" in ran.err.splitlines()[-1]
    ran = process(*files.words(), driver=WITH_LAST_WORDS)  # there is an output already
    assert (ran.code, ran.out) == (7, "") and ran.err.splitlines()[-1].startswith("hint: ")
    ran = process("labels", "check", files.labels, driver=WITH_LAST_WORDS)
    assert ran.code == 0 and ran.out.endswith("taken down\n")
    ran = process(
        *files.words(json=True, overwrite=True),
        driver="import sys; sys.settrace(lambda *_: None)\n" + WITH_LAST_WORDS,
    )
    assert ran.code == 0 and ran.out.endswith("taken down\n")  # who watches tells at the end what was seen


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not text")
@pytest.mark.parametrize("words", [[], ["--json"]], ids=["words", "json"])
def test_file_names_that_are_no_text(words: list[str], tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    Path(os.fsdecode(odd)).write_bytes(SAMPLE_EDITS[0].labels.read_bytes())
    shown = tmp_path / "\N{GRINNING FACE}.png"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = process("labels", "check", os.fsdecode(odd), *words, env=environment)
    assert ran.code == 0 and ran.err == "" and (not words or ran.json["labels"])
    ran = process("labels", "show", os.fsdecode(odd), "-o", shown, *words, env=environment)
    assert ran.code == 0 and shown.exists() and (not words or ran.json["output"] == str(shown))


# --------------------------------------------------------------------------------------------------- edit: what works


def test_known_pixels_come_back_bit_for_bit(files: Edit, run: Any) -> None:
    ran = run(*files.words(json=True))
    assert ran.code == 0
    edit = is_edited(files.mask)
    before, after = pixels(files.photo), pixels(files.output)
    assert np.array_equal(before[~edit], after[~edit])
    assert not np.array_equal(before[edit], after[edit])
    assert ran.json["report"]["edited_pixels"] == edit.sum() == 60 * 40
    assert (ran.json["width"], ran.json["height"], ran.json["notes"]) == (300, 280, [])
    assert ran.json["output"] == str(files.output) and ran.json["sheet"] is None


def test_what_auto_chose_is_said_and_what_was_asked_for_is_not(files: Edit, run: Any) -> None:
    ran = run(*files.words())
    assert [line.split(":")[0] for line in ran.err.splitlines()] == [
        "backend onnxruntime",
        "device cpu",
        "precision fp32",
    ]
    assert ran.out.startswith(f"{files.output}: 2400 pixels in 1 window, CPUExecutionProvider (onnxruntime ")
    asked = run(*files.words(backend="onnxruntime", device="cpu", precision="fp16", overwrite=True, json=True))
    assert asked.err == "" and asked.json["choices"] == []
    assert asked.json["report"]["precision"] == "fp16"


def test_transparency_is_kept(files: Edit, run: Any) -> None:
    rgba = np.dstack([pixels(files.photo), np.arange(280 * 300, dtype=np.uint32).astype(np.uint8).reshape(280, 300)])
    save(files.photo, rgba)
    assert run(*files.words()).code == 0
    edit = is_edited(files.mask)
    assert np.array_equal(pixels(files.output)[~edit], rgba[~edit])
    assert np.array_equal(pixels(files.output)[..., 3], rgba[..., 3])


def test_jpeg_output_says_that_known_pixels_are_not_exact(files: Edit, run: Any) -> None:
    output = files.output.with_suffix(".jpg")
    ran = run(*files.words(output=output, json=True))
    assert ran.code == 0 and output.read_bytes().startswith(b"\xff\xd8\xff")
    assert [note for note in ran.json["notes"] if "not equal; .png keeps them" in note]
    assert "note: " in ran.err


def test_filling_is_labelling_everything(files: Edit, run: Any) -> None:
    results = []
    for changes in ({}, {"labels": None, "fill": "Road"}, {"labels": None, "fill": "3"}):
        assert run(*files.words(overwrite=True, **changes)).code == 0
        results.append(files.output.read_bytes())
    assert results[0] == results[1] == results[2]
    assert run(*files.words(overwrite=True, labels=None, fill="tree")).code == 0
    assert files.output.read_bytes() != results[0]


def test_filling_with_an_unknown_class_suggests_one(files: Edit, run: Any) -> None:
    ran = run(*files.words(labels=None, fill="raod", json=True))
    assert (ran.code, ran.json["hint"]) == (7, "did you mean 'road'?")
    assert run(*files.words(labels=None, fill="12")).code == 7
    assert not files.output.exists()


@pytest.mark.parametrize(("grow", "side"), [(None, 10 + 2 * 8), (0, 10), (3, 10 + 2 * 3)])
def test_the_mask_is_what_changed_between_two_label_maps(
    grow: int | None, side: int, files: Edit, run: Any, tmp_path: Path
) -> None:
    labels = pixels(files.labels).copy()
    labels[50:60, 70:80] = 5
    now = save(tmp_path / "now.png", labels)
    ran = run(*files.words(labels=now, edited_from=files.labels, mask=None, grow=grow, json=True))
    assert ran.code == 0 and ran.json["report"]["edited_pixels"] == side**2
    margin = (side - 10) // 2
    edited = np.zeros(labels.shape, bool)
    edited[50 - margin : 60 + margin, 70 - margin : 80 + margin] = True
    assert np.array_equal(pixels(files.output)[~edited], pixels(files.photo)[~edited])


def test_equal_label_maps_leave_nothing_to_edit(files: Edit, run: Any) -> None:
    ran = run(*files.words(edited_from=files.labels, mask=None))
    assert ran.code == 7 and "nothing to edit" in ran.err and not files.output.exists()


def test_editing_in_place_needs_to_be_allowed(files: Edit, run: Any) -> None:
    before = files.photo.read_bytes()
    ran = run(*files.words(output=files.photo))
    assert ran.code == 7 and "--overwrite" in ran.err and files.photo.read_bytes() == before
    assert run(*files.words(output=files.photo, overwrite=True)).code == 0
    assert files.photo.read_bytes() != before


def test_torch_and_onnxruntime_agree(files: Edit, run: Any) -> None:
    torch_output = files.output.with_name("torch.png")
    assert run(*files.words(backend="onnxruntime")).code == 0
    ran = run(*files.words(backend="torch", output=torch_output, json=True))
    assert ran.code == 0 and ran.json["report"]["provider"].startswith("torch ")
    difference = pixels(files.output).astype(int) - pixels(torch_output)
    assert np.abs(difference).max() <= 1


def test_the_sheet_shows_four_pictures(files: Edit, run: Any, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    ran = run(*files.words(sheet=sheet, json=True))
    assert ran.code == 0 and ran.json["sheet"] == str(sheet)
    drawn = pixels(sheet)
    for cell, picture in ((0, pixels(files.photo)), (3, pixels(files.output))):
        left = 10 + cell * (300 + 10)
        assert np.array_equal(drawn[38 : 38 + 280, left : left + 300], picture)
    labels_cell = drawn[38 : 38 + 280, 320:620]
    assert np.array_equal(labels_cell[120, 230], class_table("street").find("road").color)


def test_an_edit_reads_nothing_but_its_files(files: Edit, run: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert run(*files.words()).code == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, files.output])


# ------------------------------------------------------------------------------------------- edit: what is refused


def refused(ran: Ran, files: Edit, code: int, *words: str) -> None:
    """The command failed with this code, said these words, and left no output and no temporary file."""
    assert ran.code == ran.json["exit_code"] == code
    text = f"{ran.json['error']} / {ran.json['hint']}"
    for word in words:
        assert word in text, text
    assert not files.output.exists()
    assert not [path for path in files.output.parent.iterdir() if path.suffix == ".tmp"]


def test_sizes_that_differ(files: Edit, run: Any, tmp_path: Path) -> None:
    small = save(tmp_path / "small.png", np.eye(28, 30, dtype=np.uint8))
    for option in ("labels", "mask", "instances"):
        ran = run(*files.words(json=True, **{option: small}))
        refused(ran, files, 7, "small.png", "30×28", "300×280", "match")


def test_unknown_labels_count_under_the_mask_alone(files: Edit, run: Any) -> None:
    labels = pixels(files.labels).copy()
    labels[0, 0] = 99
    save(files.labels, labels)
    assert run(*files.words()).code == 0
    files.output.unlink()
    labels[110, 210:213] = 12
    save(files.labels, labels)
    refused(run(*files.words(json=True)), files, 7, "labels.png", "12 (3 pixels)", "under the mask")


def test_a_color_label_map_is_not_guessed_at(files: Edit, run: Any) -> None:
    save(files.labels, colorize(pixels(files.labels), class_table("street")))
    refused(run(*files.words(json=True)), files, 7, "labels.png", "labels convert")


@pytest.mark.parametrize(("value", "word"), [(0, "empty"), (255, "full")])
def test_masks_that_say_nothing(value: int, word: str, files: Edit, run: Any) -> None:
    save(files.mask, np.full((280, 300), value, np.uint8))
    refused(run(*files.words(json=True)), files, 7, "mask.png", word)


def test_a_mask_that_grew_too_large_says_so(files: Edit, run: Any) -> None:
    refused(run(*files.words(grow=400, json=True)), files, 7, "mask.png, grown by 400", "full")


@pytest.mark.parametrize("option", ["image", "labels", "mask", "instances", "edited_from"])
@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "garbage", "absent"])
def test_files_that_are_no_pictures(option: str, content: bytes | None, files: Edit, run: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    changes: dict[str, object] = {option: bad} | ({"mask": None} if option == "edited_from" else {})
    refused(run(*files.words(json=True, **changes)), files, 7, "bad.png")


@pytest.mark.parametrize("output", ["missing/edited.png", "edited", "edited.gif", "edited.tiff", "."])
def test_outputs_that_cannot_be(output: str, files: Edit, run: Any, tmp_path: Path) -> None:
    refused(run(*files.words(output=tmp_path / output, json=True)), files, 7, str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that even root cannot write into")
def test_a_folder_that_cannot_be_written(files: Edit, run: Any) -> None:
    refused(run(*files.words(output="/proc/edited.png", json=True)), files, 7, "/proc/edited.png")


def test_an_existing_output_is_left_alone(files: Edit, run: Any, tmp_path: Path) -> None:
    files.output.write_bytes(b"dear")
    ran = run(*files.words(json=True))
    assert ran.code == 7 and "exists already" in ran.json["error"] and files.output.read_bytes() == b"dear"
    files.output.unlink()
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"dear")
    refused(run(*files.words(sheet=sheet, json=True)), files, 7, "sheet.png exists already")
    assert sheet.read_bytes() == b"dear"


@pytest.mark.parametrize(("written", "source"), [("output", "mask"), ("output", "labels"), ("sheet", "photo")])
def test_overwriting_does_not_extend_to_the_inputs(written: str, source: str, files: Edit, run: Any) -> None:
    path = getattr(files, source)
    before = path.read_bytes()
    ran = run(*files.words(overwrite=True, json=True, **{written: path}))
    assert ran.code == 2 and str(path) in ran.json["error"] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "code", "words"),
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
def test_what_is_asked_for_is_never_replaced(
    asked: dict[str, object], code: int, words: list[str], files: Edit, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked.get("backend") == "torch":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    refused(run(*files.words(json=True, **asked)), files, code, *words)


def test_models_that_are_none(files: Edit, run: Any, tmp_path: Path) -> None:
    for model, word in (
        (tmp_path / "absent.spm", "absent.spm"),
        (tmp_path, "manifest.json"),
        (files.model / "graphs/edit.fp32.onnx", ".spm folder"),
        (files.model.with_name("tiny.safetensors"), "spmdeploy export"),
        (files.photo, "neither a folder nor a zip"),
    ):
        refused(run(*files.words(model=model, json=True)), files, 6, word)


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\nimport spmdeploy.cli; spmdeploy.cli.entry()"


def test_torch_that_is_not_installed(files: Edit, street_bundle: Path, tmp_path: Path) -> None:
    ran = process(*files.words(backend="torch", json=True), driver=WITHOUT_TORCH)
    refused(ran, files, 4, "torch", 'pip install "spmdeploy[export]"')
    checkpoint, bundle = street_bundle.with_name("tiny.safetensors"), tmp_path / "b.spm"
    ran = process("export", checkpoint, "-o", bundle, "--classes", "street", "--json", driver=WITHOUT_TORCH)
    refused(ran, files, 4, "torch", 'pip install "spmdeploy[export]"')
    assert not bundle.exists()
    assert process(*files.words(), driver=WITHOUT_TORCH).code == 0  # an edit needs none


# ------------------------------------------------------------------------------------------------------- interrupted

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
def test_ctrl_c_leaves_nothing_behind(place: str, files: Edit, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    ran = process(*files.words(json=True), driver=INTERRUPTING.format(patch=INTERRUPTED_IN[place]))
    assert ran.code == ran.json["exit_code"] == 130 and ran.json["error"] == "interrupted"
    assert "Traceback" not in ran.err
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------------------------------------- export, labels


def test_export_prints_one_object(street_bundle: Path) -> None:
    ran = Ran(0, (street_bundle.with_name("export.stdout")).read_text(), "")
    assert ran.json["schema"] == "spmdeploy.export/1"
    assert [graph["precision"] for graph in ran.json["graphs"]] == ["fp32"] * 6 + ["fp16"] * 3 + [
        "fp32",
        "fp32",
        "fp16",
    ]


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "absent"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_exporting_what_is_no_checkpoint(suffix: str, content: bytes | None, run: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / f"weights{suffix}"
    if content is not None:
        checkpoint.write_bytes(content)
    ran = run("export", checkpoint, "-o", tmp_path / "b.spm", "--classes", "street", "--json")
    assert ran.code == ran.json["exit_code"] == 7 and checkpoint.stem in ran.json["error"]
    assert not [path for path in tmp_path.iterdir() if path != checkpoint]


def test_exporting_with_the_wrong_classes(street_bundle: Path, run: Any, tmp_path: Path) -> None:
    words = ["export", street_bundle.with_name("tiny.safetensors"), "-o", tmp_path / "b.spm", "--json", "--classes"]
    ran = run(*words, "cityscapes")
    assert ran.code == 7 and "12 classes" in ran.json["error"] and "34" in ran.json["error"]
    assert run(*words, "cityscape").code == 7
    assert not list(tmp_path.iterdir())


def test_exporting_over_something_dear(street_bundle: Path, run: Any, tmp_path: Path) -> None:
    (tmp_path / "b.spm").mkdir()
    (tmp_path / "b.spm/thesis.txt").write_text("dear")
    words = ["export", street_bundle.with_name("tiny.safetensors"), "-o", tmp_path / "b.spm", "--classes", "street"]
    assert run(*words).code == run(*words, "--overwrite").code == 7
    assert (tmp_path / "b.spm/thesis.txt").read_text() == "dear"


def test_labels_are_counted(run: Any) -> None:
    ran = run("labels", "check", SAMPLE_EDITS[0].labels, "--json")
    assert ran.code == 0 and sum(entry["pixels"] for entry in ran.json["labels"]) == 360 * 480
    assert ran.json["labels"][0]["name"] == "sky"
    assert run("labels", "check", SAMPLE_EDITS[0].labels).out.splitlines()[1].split()[:2] == ["0", "sky"]


def test_labels_that_the_table_does_not_have(run: Any, tmp_path: Path) -> None:
    ids = save(tmp_path / "ids.png", np.array([[3, 40], [40, 200]], np.uint8))
    ran = run("labels", "check", ids, "--json")
    assert ran.code == 7 and "40 (2 pixels), 200 (1 pixel)" in ran.json["error"]
    ran = run("labels", "show", ids, "-o", tmp_path / "shown.png", "--json")
    assert ran.code == 0 and ran.json["notes"] == ["street has no class 40, 200: painted white"]
    assert pixels(tmp_path / "shown.png")[0, 1].tolist() == [255, 255, 255]


def test_labels_go_to_colors_and_back(run: Any, tmp_path: Path) -> None:
    source, colored, back = SAMPLE_EDITS[0].labels, tmp_path / "colored.png", tmp_path / "ids.png"
    assert run("labels", "show", source, "-o", colored).code == 0
    ran = run("labels", "convert", colored, "-o", back, "--json")
    assert ran.code == 0 and ran.json["notes"] == []
    assert np.array_equal(pixels(back), pixels(source))
    assert run("labels", "convert", colored, "-o", back).code == 7  # it exists
    assert run("labels", "convert", colored, "-o", tmp_path / "x.png", "--classes", "cityscapes").code == 7


def test_shared_colors_are_said(run: Any, tmp_path: Path) -> None:
    black = save(tmp_path / "black.png", np.zeros((4, 4, 3), np.uint8))
    ran = run("labels", "convert", black, "-o", tmp_path / "ids.png", "--classes", "cityscapes", "--json")
    assert ran.code == 0 and "share the color (0, 0, 0): taken for unlabeled" in ran.json["notes"][0]


def test_ids_are_shifted_there_and_back(run: Any, tmp_path: Path) -> None:
    ids = save(tmp_path / "ids.png", np.array([[1, 7], [12, 255]], np.uint8))
    shifted, back = tmp_path / "shifted.png", tmp_path / "back.png"
    assert run("labels", "convert", ids, "-o", shifted, "--offset", "-1", "--void", "255").code == 0
    assert pixels(shifted).tolist() == [[0, 6], [11, 255]]
    assert run("labels", "convert", shifted, "-o", back, "--offset", "1", "--void", "255").code == 0
    assert np.array_equal(pixels(back), pixels(ids))
    ran = run("labels", "convert", ids, "-o", tmp_path / "x.png", "--offset", "1", "--json")
    assert ran.code == 7 and "255" in ran.json["error"] and not (tmp_path / "x.png").exists()


def test_doctor_finds_the_cpu(run: Any) -> None:
    ran = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in ran.json["findings"]}
    assert ran.code == 0 and findings["onnxruntime on cpu"]["usable"]
    assert "onnxruntime on cpu   usable" in run("doctor").out
