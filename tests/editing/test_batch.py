"""Batches: what a manifest may hold, what becomes of each row, and what a killed run leaves to the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spmdeploy import cli
from spmdeploy.backends.base import Unsupported
from spmdeploy.editing.batch import run_batch
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.manifest import _ignores_case, read_manifest
from spmdeploy.editing.options import EditOptions
from spmdeploy.editing.status import STATUS_FILE, ItemStatus
from spmdeploy.errors import InputError, OutOfMemoryError, UsageError
from spmdeploy.labels import class_table
from spmdeploy.remote import RemotePath, list_remote, read_remote, write_remote
from spmdeploy.types import ModelInput


class Painter:
    """A session that paints each class in a gray of its own; `before` is called first in every run."""

    backend, device, precision, provider, size = "onnxruntime", "cpu", "fp32", "paint", 256
    refines, refine_unsupported = False, Unsupported("the model has no refine graph", "export it again")
    notes = ()

    def __init__(self, before: Callable[[int], None] = lambda run: None) -> None:
        self.before, self.runs = before, 0

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        image, labels, _, mask = inputs
        self.runs += 1
        self.before(self.runs)
        return np.where(mask[..., None] != 0, labels[..., None] * np.uint8(20), image)

    def close(self) -> None:
        pass


def painting(before: Callable[[int], None] = lambda run: None) -> Editor:
    return Editor(Painter(before), class_table("street"))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos a.png, b.png, c.png of 40x30, with labels.png (road) and mask.png, and a folder `out`."""
    noise = np.random.default_rng(3)
    for name in "abc":
        save(tmp_path / f"{name}.png", noise.integers(0, 256, (30, 40, 3), np.uint8))
    save(tmp_path / "labels.png", np.full((30, 40), 3, np.uint8))
    mask = np.zeros((30, 40), np.uint8)
    mask[5:15, 10:30] = 255
    save(tmp_path / "mask.png", mask)
    (tmp_path / "out").mkdir()
    return tmp_path


def save(path: Path, pixels: NDArray[Any]) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def csv(folder: Path, *rows: str, heading: str = "image,labels,mask,output") -> Path:
    path = folder / "edits.csv"
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")
    return path


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "edits.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


ROWS = [f"{name}.png,labels.png,mask.png," for name in "abc"]


def edit_all(manifest: Path, editor: Editor | None = None, **options: Any) -> list[ItemStatus]:
    out = manifest.parent / "out"
    overwrite = options.pop("overwrite", False)
    return run_batch(editor or painting(), read_manifest(manifest, out, overwrite), out, **options)


def words(statuses: list[ItemStatus]) -> list[str]:
    return [status.status for status in statuses]


def recorded(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / STATUS_FILE).read_text().splitlines()]


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*.png"))}


# --------------------------------------------------------------------------------------------------------- manifests


def test_read_manifest_csv_and_jsonl_give_equal_requests(folder: Path) -> None:
    rows = [
        {"image": "a.png", "labels": "labels.png", "mask": "mask.png"},
        {"image": "b.png", "fill": "tree", "mask": "mask.png", "grow": 2, "output": "deep/b.webp"},
    ]
    heading = "image,labels,fill,mask,grow,output"
    lines = ["a.png,labels.png,,mask.png,,", "b.png,,tree,mask.png,2,deep/b.webp"]
    out = folder / "out"
    from_csv = read_manifest(csv(folder, *lines, heading=heading), out)
    assert from_csv == read_manifest(jsonl(folder, *rows), out)
    files = [item.request for item in from_csv]
    assert files[0] is not None and files[0].image == folder / "a.png" and files[0].output == out / "a.png"
    assert files[1] is not None and files[1].options.dilate == 2 and files[1].output == out / "deep/b.webp"
    assert not list(out.iterdir())  # reading makes nothing


def test_read_manifest_quoted_names_are_kept(folder: Path) -> None:
    name = 'x\u2028y, "z"\nw.png'
    quoted = name.replace('"', '""')
    for manifest in (
        csv(folder, f'"{quoted}",labels.png,mask.png,'),
        jsonl(folder, {"image": name, "labels": "labels.png", "mask": "mask.png"}),
    ):
        (item,) = read_manifest(manifest, folder / "out")
        assert item.request is not None and item.request.image == folder / name


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("m.csv", "", "no rows"),
        ("m.csv", "image,mask\n", "no rows"),
        ("m.csv", "image;mask\na;b\n", "'image;mask'"),
        ("m.csv", "image,mask,mask\na,b,c\n", "'mask' 2 times"),
        ("m.csv", "image,mask,prompt\na,b,c\n", "'prompt'"),
        ("m.csv", "image,mask\na,b,c\n", "line 2"),
        ("m.csv", 'image,mask\n"a,b\n', "line"),
        ("m.csv", b"image\n\xff\xfe\n", "UTF-8"),
        ("m.jsonl", "\n\n", "no rows"),
        ("m.jsonl", '{"image": "a"}\n{"image": \n', "line 2 is not JSON"),
        ("m.jsonl", "[1]\n", "line 1 is not an object"),
        ("m.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("m.jsonl", '{"picture": "a.png"}\n', "'picture'"),
        ("m.txt", "image\n", ".csv nor .jsonl"),
        ("m.csv", None, "there is no file"),
    ],
)
def test_read_manifest_unusable_file_is_refused(name: str, text: str | bytes | None, word: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_manifest(path, tmp_path)
    assert name in error.value.problem and word in f"{error.value.problem} {error.value.hint}"


def test_read_manifest_equal_outputs_are_refused(folder: Path) -> None:
    save(folder / "a.webp", np.zeros((30, 40, 3), np.uint8))
    for rows in (
        ["a.png,labels.png,mask.png,", "a.webp,labels.png,mask.png,"],
        ["a.png,labels.png,mask.png,x.png", "b.png,labels.png,mask.png,y/../x.png"],
    ):
        with pytest.raises(InputError, match=r"rows 1 and 2 would both write .*\.png") as error:
            read_manifest(csv(folder, *rows), folder / "out")
        assert error.value.hint == "give them different names in the output column"


@pytest.mark.parametrize("output", ["../x.png", "/x.png", "y/../../x.png", "link/x.png", "x\0.png", "", "."])
def test_read_manifest_output_outside_the_folder_is_refused(output: str, folder: Path) -> None:
    (folder / "out/link").symlink_to(folder)
    row = {"image": "a.png", "labels": "labels.png", "mask": "mask.png", "output": output}
    (item,) = read_manifest(jsonl(folder, row), folder / "out")
    assert item.request is None and item.error is not None and "leads out of the output folder" in item.error.problem


# ---------------------------------------------------------------------------------------------------------- running


def test_run_batch_bad_row_does_not_stop_others(folder: Path) -> None:
    rows = [
        ROWS[0],
        "missing.png,labels.png,mask.png,",
        "b.png,labels.png,,",
        ROWS[1],
        "c.png,labels.png,mask.png,c.gif",
        "c.png,labels.png,mask.png,../c.png",
    ]
    statuses = edit_all(csv(folder, *rows))
    assert words(statuses) == ["done", "failed", "failed", "done", "failed", "failed"]
    assert [status.row for status in statuses] == [1, 2, 3, 4, 5, 6]
    assert "missing.png" in str(statuses[1].error)
    assert set(results(folder)) == {"a.png", "b.png"}
    log = [record for record in recorded(folder) if record["status"] != "started"]
    assert sorted(log, key=lambda record: record["row"]) == [status.to_json() for status in statuses]


def test_run_batch_unexpected_exception_does_not_stop_others(folder: Path) -> None:
    def fail(run: int) -> None:
        if run == 2:
            raise ZeroDivisionError("by 0")

    statuses = edit_all(csv(folder, *ROWS), painting(fail))
    assert words(statuses) == ["done", "failed", "done"]
    assert statuses[1].error == "unexpected ZeroDivisionError: by 0"


@pytest.mark.parametrize("error", [OutOfMemoryError("too large"), MemoryError()], ids=["device", "host"])
def test_run_batch_out_of_memory_stops_all(error: Exception, folder: Path) -> None:
    def fail(run: int) -> None:
        if run == 2:
            raise error

    with pytest.raises(type(error)):
        edit_all(csv(folder, *ROWS), painting(fail))
    assert set(results(folder)) == {"a.png"}
    assert words(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped", "done", "done"]


def test_run_batch_three_jobs_give_the_bytes_of_one(folder: Path) -> None:
    edit_all(csv(folder, *ROWS), jobs=1)
    alone = results(folder)
    assert len(alone) == 3
    assert words(edit_all(csv(folder, *ROWS), jobs=3, overwrite=True)) == ["done"] * 3
    assert results(folder) == alone


def test_run_batch_zero_jobs_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError):
        edit_all(csv(folder, *ROWS), jobs=0)


def test_run_batch_existing_outputs_are_kept(folder: Path) -> None:
    (folder / "out/b.png").write_bytes(b"dear")
    statuses = edit_all(csv(folder, *ROWS))
    assert words(statuses) == ["done", "failed", "done"] and "exists already" in str(statuses[1].error)
    assert words(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped", "failed", "skipped"]
    assert (folder / "out/b.png").read_bytes() == b"dear"


def test_run_batch_output_folder_that_is_a_file_is_refused(folder: Path) -> None:
    (folder / "file").write_text("")
    items = read_manifest(csv(folder, *ROWS), folder / "file")
    with pytest.raises(InputError, match="file"):
        run_batch(painting(), items, folder / "file")
    rows = ["a.png,labels.png,mask.png,deep/a.png", ROWS[1]]
    (folder / "out/deep").write_text("")
    statuses = edit_all(csv(folder, *rows))
    assert words(statuses) == ["failed", "done"] and "deep" in str(statuses[0].error)


# --------------------------------------------------------------------------------------------------------- resuming


def test_run_batch_resume_skips_existing_results(folder: Path) -> None:
    manifest = csv(folder, *ROWS)
    assert words(edit_all(manifest)) == ["done"] * 3
    (folder / "out/b.png").unlink()
    editor = painting()
    assert words(edit_all(manifest, editor, resume=True)) == ["skipped", "done", "skipped"]
    assert words(edit_all(manifest, editor, resume=True)) == ["skipped"] * 3
    assert editor.session.runs == 1  # type: ignore[attr-defined]


def test_run_batch_resume_from_another_folder_skips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words(edit_all(csv(folder, *ROWS))) == ["done"] * 3
    (folder / "out").rename(folder / "moved")
    monkeypatch.chdir(folder)
    items = read_manifest(Path("edits.csv"), Path("moved"))
    assert words(run_batch(painting(), items, Path("moved"), resume=True)) == ["skipped"] * 3


@pytest.mark.parametrize("kept", [1, 20, -1, -30])
def test_run_batch_resume_after_a_truncated_line_continues(kept: int, folder: Path) -> None:
    edit_all(csv(folder, ROWS[0]))
    log = folder / "out" / STATUS_FILE
    before, last = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(before + last[:kept])
    first = "skipped" if kept == -1 else "done"  # without its newline the record is whole; else a.png is made again
    assert words(edit_all(csv(folder, *ROWS), resume=True)) == [first, "done", "done"]
    assert words(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped"] * 3


def test_run_batch_status_file_of_garbage_is_ignored(folder: Path) -> None:
    (folder / "out" / STATUS_FILE).write_bytes(b'\xff\xfe{"output"\n[1]\n{"output": ["a.png"], "status": "done"}\nnull')
    assert words(edit_all(csv(folder, *ROWS), resume=True)) == ["done"] * 3
    assert words(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped"] * 3


# ------------------------------------------------------------------------------------------------- the command itself


def command(folder: Path, bundle: Path, *options: object) -> list[str]:
    words = ["batch", folder / "edits.csv", "--output-dir", folder / "out", "--model", bundle, "--json", *options]
    return [str(word) for word in words]


def test_batch_command_reports_failed_count(
    folder: Path, street_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv(folder, ROWS[0], "b.png,labels.png,mask.png,../b.png", ROWS[2])
    assert cli.main(command(folder, street_bundle, "--jobs", 2)) == 3
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["schema"] == "spmdeploy.batch/1" and told["exit_code"] == 3
    assert told["counts"] == {"done": 2, "skipped": 0, "failed": 1}
    assert [item["status"] for item in told["items"]] == ["done", "failed", "done"]
    assert "row 2: output '../b.png' leads out" in printed.err
    edit = np.asarray(Image.open(folder / "mask.png")) != 0
    for name in ("a.png", "c.png"):
        before, after = (np.asarray(Image.open(path / name)) for path in (folder, folder / "out"))
        assert np.array_equal(before[~edit], after[~edit]) and not np.array_equal(before, after)
    csv(folder, ROWS[0], ROWS[2])
    assert cli.main(command(folder, street_bundle, "--resume")) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"done": 0, "skipped": 2, "failed": 0}


def test_batch_command_jobs_share_one_session(
    folder: Path, street_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv(folder, *ROWS)
    assert cli.main(command(folder, street_bundle)) == 0
    alone = results(folder)
    assert cli.main(command(folder, street_bundle, "--jobs", 3, "--overwrite")) == 0
    assert results(folder) == alone and len(alone) == 3
    capsys.readouterr()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
def test_batch_command_killed_run_is_resumed(
    number: str, folder: Path, street_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv(folder, *ROWS)
    driver = (
        "import os, signal, spmdeploy.cli, spmdeploy.imaging.files as images\n"
        "write = images.write_photo\n"
        "def write_and_die(path, *_, **__):\n"
        "    notes = write(path, *_, **__)\n"
        f"    if path.name == 'b.png': os.kill(os.getpid(), signal.{number})\n"
        "    return notes\n"
        "images.write_photo = write_and_die\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "spmdeploy.cli.entry()"
    )
    words = [sys.executable, "-c", driver, *command(folder, street_bundle)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if number == "SIGINT":
        assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (130, 130)
    else:
        assert done.returncode == -signal.SIGKILL
    assert set(results(folder)) == {"a.png", "b.png"}
    assert cli.main(command(folder, street_bundle, "--resume")) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts["failed"] == 0 and counts["skipped"] == (2 if number == "SIGINT" else 1)
    assert set(results(folder)) == {"a.png", "b.png", "c.png"}
    assert not [path for path in (folder / "out").iterdir() if path.suffix == ".tmp"]


def test_read_manifest_csv_as_spreadsheets_write_it_is_read(folder: Path) -> None:
    manifest = csv(
        folder,
        "a.png,labels.png,mask.png,,,,,",
        ",,,,,,,",
        "b.png,,mask.png,tree,2,yes,,",
        heading="Image , LABELS,mask,Fill,Grow,Match surroundings,,",
    )
    first, second = read_manifest(manifest, folder / "out")
    assert first.request is not None and first.request.labels == folder / "labels.png"
    assert second.error is not None and "match_surroundings needs the labels" in second.error.problem
    manifest = csv(folder, "b.png,mask.png,tree,2,,", heading="image,mask,fill,grow,,")
    (item,) = read_manifest(manifest, folder / "out")
    assert item.request is not None and (item.request.fill, item.request.options.dilate) == ("tree", 2)


@pytest.mark.parametrize("row", ["a.png,labels.png,mask.png,,surplus", "a.png,labels.png,mask.png,,,surplus"])
def test_read_manifest_cell_without_heading_is_refused(row: str, folder: Path) -> None:
    with pytest.raises(InputError, match="line 2: 'surplus' is in a column without a heading"):
        read_manifest(csv(folder, row, heading="image,labels,mask,output,"), folder / "out")


@pytest.mark.parametrize(("stored", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_read_manifest_name_in_another_normalization_is_found(stored: str, written: str, folder: Path) -> None:
    name = unicodedata.normalize(stored, "café.png")
    (folder / "a.png").rename(folder / name)
    (item,) = read_manifest(
        csv(folder, unicodedata.normalize(written, "café.png,labels.png,mask.png,")), folder / "out"
    )
    assert item.request is not None and item.request.image == folder / name


def test_read_manifest_options_in_columns_replace_those_of_the_command(folder: Path) -> None:
    rows = [f"{name}.png,labels.png,mask.png,{feather}" for name, feather in zip("ab", ("0", ""), strict=True)]
    manifest = csv(folder, *rows, heading="image,labels,mask,feather")
    items = read_manifest(manifest, folder / "out", options=EditOptions(feather=9, tiling="crop"))
    assert [item.request and (item.request.options.feather, item.request.options.tiling) for item in items] == [
        (0, "crop"),
        (9, "crop"),
    ]


def test_read_manifest_standard_input_inside_a_row_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("-", "/dev/stdin", "/dev/fd/3"):
        (item,) = read_manifest(csv(Path(), f"{name},labels.png,mask.png,o.png"), folder / "out")
        assert item.error is not None and f"cannot read {name}" in item.error.problem


@pytest.mark.parametrize("kind", ["image", "labels", "mask"])
def test_read_manifest_output_over_the_input_of_another_row_is_refused(kind: str, folder: Path) -> None:
    save(folder / "x.png", np.zeros((30, 40), np.uint8))
    rows = [f"{name}.png,labels.png,mask.png,{name}-edited.png".split(",") for name in "ab"]
    rows[1][["image", "labels", "mask"].index(kind)] = "x.png"
    rows[0][3] = "x.png"
    manifest = csv(folder, *map(",".join, rows))
    with pytest.raises(InputError, match=r"row 1 would overwrite .*x\.png, which row 2 reads"):
        read_manifest(manifest, folder, overwrite=True)
    assert len(read_manifest(manifest, folder)) == 2  # refused by the rows themselves, which leave existing files alone


def test_read_manifest_output_over_an_input_behind_a_link_is_refused(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "b.png")
    rows = ["a.png,labels.png,mask.png,link.png", "b.png,labels.png,mask.png,other.png"]
    with pytest.raises(InputError, match=r"row 1 would overwrite .*b\.png, which row 2 reads"):
        read_manifest(csv(folder, *rows), folder, overwrite=True)


def test_read_manifest_output_over_the_photo_of_its_own_row_is_allowed(folder: Path) -> None:
    assert all(item.request for item in read_manifest(csv(folder, *ROWS), folder, overwrite=True))


def test_read_manifest_names_that_differ_in_case_are_one_file_where_case_is_ignored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = csv(folder, "a.png,labels.png,mask.png,x.png", "b.png,labels.png,mask.png,X.png")
    assert len(read_manifest(manifest, folder / "out")) == 2
    monkeypatch.setattr("spmdeploy.editing.manifest._ignores_case", lambda folder: True)
    with pytest.raises(InputError, match="rows 1 and 2 would both write"):
        read_manifest(manifest, folder / "out")
    manifest = csv(folder, "a.png,labels.png,mask.png,B.PNG", "b.png,labels.png,mask.png,c2.png")
    with pytest.raises(InputError, match=r"row 1 would overwrite .*b\.png, which row 2 reads"):
        read_manifest(manifest, folder, overwrite=True)


def test_ignores_case_follows_the_file_system(folder: Path) -> None:
    assert _ignores_case(folder / "absent") == (folder.parent / folder.name.swapcase()).exists()
    (folder / "case").mkdir()
    (folder / "CASE").mkdir(exist_ok=True)
    assert _ignores_case(folder / "case") == (folder / "case").samefile(folder / "CASE")


@pytest.mark.skipif(sys.platform == "win32", reason="needs /dev/stdin")
@pytest.mark.parametrize("path", ["-", "/dev/stdin"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_batch_manifest_from_standard_input_is_read_relative_to_the_working_directory(
    path: str, kind: str, folder: Path, street_bundle: Path
) -> None:
    row = {"image": "a.png", "labels": "labels.png", "mask": "mask.png"}
    manifest = csv(folder, ROWS[0]) if kind == "csv" else jsonl(folder, row)
    arguments = ["batch", path, "--output-dir", "out", "--model", street_bundle, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "spmdeploy", *map(str, arguments)],
        input=manifest.read_bytes(),
        capture_output=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["counts"]["done"] == 1, done.stderr
    assert set(results(folder)) == {"a.png"}


# ---------------------------------------------------------------------------------------------------------- stores


@pytest.fixture
def store(folder: Path, s3: str) -> RemotePath:
    """A folder of a store that holds the files of `folder` and a manifest, edits.csv."""
    target = RemotePath(f"{s3}/{folder.name}")
    csv(folder, *ROWS)
    for path in folder.glob("*.*"):
        write_remote(target / path.name, path.read_bytes())
    return target


def run_in_store(store: RemotePath, editor: Editor | None = None, **options: Any) -> list[ItemStatus]:
    out = store / "out"
    overwrite = options.pop("overwrite", False)
    return run_batch(editor or painting(), read_manifest(store / "edits.csv", out, overwrite), out, **options)


def test_run_batch_in_a_store_gives_the_bytes_of_a_folder(folder: Path, store: RemotePath) -> None:
    edit_all(folder / "edits.csv")
    assert words(run_in_store(store, jobs=2)) == ["done"] * 3
    assert {name: read_remote(store / "out" / name, 1 << 20) for name in results(folder)} == results(folder)
    assert list_remote(store / "out") == {*results(folder), STATUS_FILE}
    assert words(run_in_store(store, resume=True)) == ["skipped"] * 3
    again = run_in_store(store)
    assert words(again) == ["failed"] * 3 and "exists already" in str(again[0].error)
    assert words(run_in_store(store, overwrite=True)) == ["done"] * 3


def test_run_batch_in_a_store_interrupted_run_is_resumed(folder: Path, store: RemotePath) -> None:
    def stop(run: int) -> None:
        if run == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_in_store(store, painting(stop))
    assert "a.png" in list_remote(store / "out") and STATUS_FILE not in list_remote(store / "out")
    write_remote(store / "out/b.png", b"of the interrupted run")
    assert words(run_in_store(store, resume=True)) == ["skipped", "done", "done"]
    assert read_remote(store / "out/b.png", 1 << 20).startswith(b"\x89PNG")
    assert list_remote(store / "out") == {"a.png", "b.png", "c.png", STATUS_FILE}


def test_run_batch_statuses_in_a_store_are_not_rewritten_for_each_item(
    folder: Path, store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(path: RemotePath, content: bytes, overwrite: bool = False) -> None:
        written.append(path.name)
        write_remote(path, content, overwrite)

    monkeypatch.setattr("spmdeploy.editing.status.write_remote", write)
    run_in_store(store)
    assert len(written) == 3  # all started; all done; both merged


def test_batch_command_mixes_paths_and_urls(
    folder: Path, store: RemotePath, street_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv(folder, f"{store.url}/a.png,labels.png,{store.url}/mask.png,x.png", f"b.png,labels.png,{store.url}/none.png,")
    arguments = command(folder, street_bundle)
    arguments[arguments.index("--output-dir") + 1] = f"{store.url}/out"
    assert cli.main(arguments) == 3
    printed = json.loads(capsys.readouterr().out)
    assert [item["status"] for item in printed["items"]] == ["done", "failed"]
    assert "none.png" in printed["items"][1]["error"] and printed["hint"] == f"see {store.url}/out/{STATUS_FILE}"
    arguments[arguments.index("--output-dir") + 1] = "http://127.0.0.1/out"
    assert cli.main(arguments) == 7


@pytest.mark.parametrize("text", ["/etc/x.png", "file:///etc/x.png", "../../../x.png"])
def test_read_manifest_in_a_store_names_nothing_outside_it(text: str, store: RemotePath) -> None:
    write_remote(store / "edits.csv", f"image,labels,mask\n{text},labels.png,mask.png\n".encode(), overwrite=True)
    (item,) = read_manifest(store / "edits.csv", store / "out")
    assert (item.request is None and "relative path" in str(item.error.hint)) or "whole URL" in str(item.error.hint)
