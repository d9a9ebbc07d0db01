"""Batches: what becomes of each row, and what a killed run leaves to the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
from spmdeploy.editing.manifest import read_manifest
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


def states(statuses: list[ItemStatus]) -> list[str]:
    return [status.status for status in statuses]


def recorded(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / STATUS_FILE).read_text().splitlines()]


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*.png"))}


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
    assert states(statuses) == ["done", "failed", "failed", "done", "failed", "failed"]
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
    assert states(statuses) == ["done", "failed", "done"]
    assert statuses[1].error == "unexpected ZeroDivisionError: by 0"


@pytest.mark.parametrize("error", [OutOfMemoryError("too large"), MemoryError()], ids=["device", "host"])
def test_run_batch_out_of_memory_stops_all(error: Exception, folder: Path) -> None:
    def fail(run: int) -> None:
        if run == 2:
            raise error

    with pytest.raises(type(error)):
        edit_all(csv(folder, *ROWS), painting(fail))
    assert set(results(folder)) == {"a.png"}
    assert states(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped", "done", "done"]


def test_run_batch_three_jobs_give_the_bytes_of_one(folder: Path) -> None:
    edit_all(csv(folder, *ROWS), jobs=1)
    alone = results(folder)
    assert len(alone) == 3
    assert states(edit_all(csv(folder, *ROWS), jobs=3, overwrite=True)) == ["done"] * 3
    assert results(folder) == alone


def test_run_batch_zero_jobs_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError):
        edit_all(csv(folder, *ROWS), jobs=0)


def test_run_batch_existing_outputs_are_kept(folder: Path) -> None:
    (folder / "out/b.png").write_bytes(b"dear")
    statuses = edit_all(csv(folder, *ROWS))
    assert states(statuses) == ["done", "failed", "done"] and "exists already" in str(statuses[1].error)
    assert states(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped", "failed", "skipped"]
    assert (folder / "out/b.png").read_bytes() == b"dear"


def test_run_batch_output_folder_that_is_a_file_is_refused(folder: Path) -> None:
    (folder / "file").write_text("")
    items = read_manifest(csv(folder, *ROWS), folder / "file")
    with pytest.raises(InputError, match="file"):
        run_batch(painting(), items, folder / "file")
    rows = ["a.png,labels.png,mask.png,deep/a.png", ROWS[1]]
    (folder / "out/deep").write_text("")
    statuses = edit_all(csv(folder, *rows))
    assert states(statuses) == ["failed", "done"] and "deep" in str(statuses[0].error)


def test_run_batch_resume_skips_existing_results(folder: Path) -> None:
    manifest = csv(folder, *ROWS)
    assert states(edit_all(manifest)) == ["done"] * 3
    (folder / "out/b.png").unlink()
    editor = painting()
    assert states(edit_all(manifest, editor, resume=True)) == ["skipped", "done", "skipped"]
    assert states(edit_all(manifest, editor, resume=True)) == ["skipped"] * 3
    assert editor.session.runs == 1  # type: ignore[attr-defined]


def test_run_batch_resume_from_another_folder_skips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(edit_all(csv(folder, *ROWS))) == ["done"] * 3
    (folder / "out").rename(folder / "moved")
    monkeypatch.chdir(folder)
    items = read_manifest(Path("edits.csv"), Path("moved"))
    assert states(run_batch(painting(), items, Path("moved"), resume=True)) == ["skipped"] * 3


@pytest.mark.parametrize("kept", [1, 20, -1, -30])
def test_run_batch_resume_after_a_truncated_line_continues(kept: int, folder: Path) -> None:
    edit_all(csv(folder, ROWS[0]))
    log = folder / "out" / STATUS_FILE
    before, last = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(before + last[:kept])
    first = "skipped" if kept == -1 else "done"  # without its newline the record is whole; else a.png is made again
    assert states(edit_all(csv(folder, *ROWS), resume=True)) == [first, "done", "done"]
    assert states(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped"] * 3


def test_run_batch_status_file_of_garbage_is_ignored(folder: Path) -> None:
    (folder / "out" / STATUS_FILE).write_bytes(b'\xff\xfe{"output"\n[1]\n{"output": ["a.png"], "status": "done"}\nnull')
    assert states(edit_all(csv(folder, *ROWS), resume=True)) == ["done"] * 3
    assert states(edit_all(csv(folder, *ROWS), resume=True)) == ["skipped"] * 3


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
    assert states(run_in_store(store, jobs=2)) == ["done"] * 3
    assert {name: read_remote(store / "out" / name, 1 << 20) for name in results(folder)} == results(folder)
    assert list_remote(store / "out") == {*results(folder), STATUS_FILE}
    assert states(run_in_store(store, resume=True)) == ["skipped"] * 3
    again = run_in_store(store)
    assert states(again) == ["failed"] * 3 and "exists already" in str(again[0].error)
    assert states(run_in_store(store, overwrite=True)) == ["done"] * 3


def test_run_batch_in_a_store_interrupted_run_is_resumed(folder: Path, store: RemotePath) -> None:
    def stop(run: int) -> None:
        if run == 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_in_store(store, painting(stop))
    assert "a.png" in list_remote(store / "out") and STATUS_FILE not in list_remote(store / "out")
    write_remote(store / "out/b.png", b"of the interrupted run")
    assert states(run_in_store(store, resume=True)) == ["skipped", "done", "done"]
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
