"""One edit from files to a file, apart from what the command line adds."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spmdeploy.backends.base import Unsupported
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.options import EditRequest
from spmdeploy.editing.run import read_inputs, run_edit
from spmdeploy.errors import InputError, UsageError
from spmdeploy.imaging.contact_sheet import CELL_SIDE, edit_sheet, sheet
from spmdeploy.imaging.files import read_photo
from spmdeploy.labels import class_table
from spmdeploy.types import ModelInput, Padding
from tests.editing.small_edit import changed, save, small_edit


class Gray:
    """A session that paints everything under the mask in one gray, or fails."""

    backend, device, precision, provider, size = "onnxruntime", "cpu", "fp32", "gray", 256
    refines, refine_unsupported = False, Unsupported("the model has no refine graph", "export it again")
    notes = ()

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        if self.failure:
            raise self.failure
        return np.where(inputs.mask[..., None] != 0, np.uint8(77), inputs.image)

    def close(self) -> None:
        pass


def editor(failure: Exception | None = None) -> Editor:
    return Editor(Gray(failure), class_table("street"))  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> EditRequest:
    return small_edit(tmp_path)


def test_run_edit_rotated_photo_keeps_profile_and_fits_labels(files: EditRequest, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    exif[0x010F] = "a maker"
    stored = np.rot90(np.asarray(Image.open(files.image).convert("RGB"))).copy()
    turned = save(tmp_path / "turned.png", stored, exif=exif)
    done = run_edit(editor(), changed(files, image=turned))
    assert done.size == (30, 20)
    assert any("turned upright" in note for note in done.notes)
    with Image.open(files.output) as written, Image.open(files.image) as original:
        assert np.array_equal(np.asarray(written)[0], np.asarray(original)[0])
        assert written.getexif()[0x0112] == 1 and written.getexif()[0x010F] == "a maker"


@pytest.mark.parametrize("failure", [InputError("no"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_run_edit_failure_writes_nothing(failure: Exception, files: EditRequest, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(type(failure)):
        run_edit(editor(failure), changed(files, sheet=tmp_path / "sheet.png", explain=tmp_path / "tiles.png"))
    assert sorted(tmp_path.iterdir()) == before


def test_run_edit_interrupted_cascade_keeps_existing_files(files: EditRequest, tmp_path: Path) -> None:
    class Interrupted(Gray):
        size, refines, refine_unsupported, calls = 16, True, None, 0

        def run_unrounded(self, inputs: ModelInput) -> NDArray[np.float32]:
            return self.run(inputs).astype(np.float32)

        def refine(self, inputs: ModelInput, coarse: NDArray[np.float32]) -> NDArray[np.float32]:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return self.run_unrounded(inputs)

    session = Interrupted()
    (tmp_path / "edited.png").write_bytes(b"an earlier edit")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        run_edit(Editor(session, class_table("street")), changed(files, overwrite=True, tiling="cascade"))  # type: ignore[arg-type]
    assert session.calls == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["sheet", "explain"])
def test_run_edit_sheet_and_explain_are_checked_first(kind: str, files: EditRequest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        run_edit(editor(), changed(files, **{kind: tmp_path / "absent" / "picture.png"}))
    assert not files.output.exists()


def test_run_edit_sheet_and_explain_are_written(files: EditRequest, tmp_path: Path) -> None:
    done = run_edit(editor(), changed(files, sheet=tmp_path / "sheet.png", explain=tmp_path / "tiles.png"))
    assert done.to_json()["sheet"] == str(tmp_path / "sheet.png")
    assert done.to_json()["explain"] == str(tmp_path / "tiles.png")
    assert read_photo(tmp_path / "sheet.png").pixels.shape != read_photo(tmp_path / "tiles.png").pixels.shape


@pytest.mark.parametrize("failing", ["sheet", "tiles"])
def test_run_edit_full_disk_behind_sheet_keeps_the_edit_and_says_so(
    failing: str, files: EditRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    sheets = {"sheet": tmp_path / "sheet.png", "tiles": tmp_path / "tiles.png"}
    really_flush, written = os.fsync, []

    def flush(descriptor: int) -> None:  # where file systems that allocate late report a full disk
        written.append(descriptor)
        if len(written) == (2 if failing == "sheet" else 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really_flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(InputError) as caught:
        run_edit(editor(), changed(files, sheet=sheets["sheet"], explain=sheets["tiles"]))
    complete = [files.output] if failing == "sheet" else [files.output, sheets["sheet"]]
    named = " and ".join(map(str, complete))
    assert caught.value.problem == (f"cannot write {sheets[failing]}: the disk is full; written and complete: {named}")
    assert caught.value.exit_code == 7 and caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == before | {path.name for path in complete}
    for path in complete:
        read_photo(path)


def test_run_edit_changed_labels_of_another_size_are_refused(files: EditRequest, tmp_path: Path) -> None:
    before = save(tmp_path / "before.png", np.zeros((20, 31), np.uint8))
    with pytest.raises(InputError, match=r"before.png is 31×20 but .*labels.png is 30×20"):
        run_edit(editor(), changed(files, mask=None, edited_from=before))


def extension(files: EditRequest, *sides: int, **changes: Any) -> EditRequest:
    return changed(files, mask=None, labels=None, fill="road", extend=Padding(*sides), **changes)


def test_run_edit_extension_keeps_alpha_and_metadata(files: EditRequest, tmp_path: Path) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (20, 30, 4), np.uint8)
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    see_through = save(tmp_path / "see_through.png", rgba, exif=exif)
    done = run_edit(editor(), extension(files, 3, 0, 5, 7, image=see_through))
    assert done.size == (38, 27)
    with Image.open(files.output) as written:
        assert written.getexif()[0x010F] == "a maker"
        pixels = np.asarray(written)
    assert np.array_equal(pixels[:20, 3:33], rgba)
    new = np.ones((27, 38), bool)
    new[:20, 3:33] = False
    assert (pixels[new][:, 3] == 255).all() and (pixels[20:, 10][3:, :3] == 77).all()


def test_run_edit_extension_with_a_label_map_of_its_size_is_edited(files: EditRequest, tmp_path: Path) -> None:
    labels = save(tmp_path / "grown.png", np.full((20, 40), 3, np.uint8))
    pictures = {"sheet": tmp_path / "sheet.png", "explain": tmp_path / "tiles.png"}
    done = run_edit(editor(), changed(files, mask=None, labels=labels, extend=Padding(10, 0, 0, 0), **pictures))
    assert done.size == (40, 20) and all(path.exists() for path in pictures.values())
    assert [window["width"] for window in done.to_json()["report"]["windows"]] == [40]


def test_run_edit_extension_with_labels_of_the_photos_size_is_refused(files: EditRequest) -> None:
    with pytest.raises(InputError, match=r"labels.png: 30×20, but .*photo.png grows to 40×20"):
        run_edit(editor(), changed(files, mask=None, extend=Padding(10, 0, 0, 0)))


def test_run_edit_huge_extension_is_refused_before_allocation(files: EditRequest) -> None:
    with pytest.raises(UsageError, match="grow to 2000000028×20"):
        run_edit(editor(), extension(files, 999_999_999, 0, 999_999_999, 0))


def test_run_edit_format_too_small_for_the_extension_is_refused_first(files: EditRequest) -> None:
    never = editor(AssertionError("the session ran"))
    with pytest.raises(InputError, match="WebP holds at most 16383 pixels per side, not 17030"):
        run_edit(never, extension(files, 17_000, 0, 0, 0, output=files.output.with_suffix(".webp")))


def test_edit_sheet_large_photo_is_shrunk() -> None:
    photo = np.zeros((300, 4 * CELL_SIDE, 3), np.uint8)
    mask = np.zeros(photo.shape[:2], bool)
    mask[100:200, 100:900] = True
    drawn = edit_sheet(photo, np.full(mask.shape, 8, np.uint8), mask, photo, class_table("street"))
    assert drawn.shape[1] == 4 * (CELL_SIDE + 10) + 10 and drawn.shape[0] < 75 + 100
    car = np.array(class_table("street").find("car").color)
    assert (drawn == car).all(axis=2).sum() > 24 * 190  # under the mask, and in the legend


def test_sheet_long_legend_breaks_into_lines() -> None:
    cell = {"x": np.zeros((10, 100, 3), np.uint8)}
    names = [(f"class {i}", (i, i, i)) for i in range(9)]
    assert sheet([cell], names).shape[0] > sheet([cell], names[:1]).shape[0] > sheet([cell]).shape[0]


def test_read_inputs_mask_threshold_and_table_are_used(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "mask.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    table = class_table("street")
    request = EditRequest(
        tmp_path / "photo.png", tmp_path / "b.png", fill="road", mask=tmp_path / "mask.png", mask_threshold=100
    )
    np.testing.assert_array_equal(read_inputs(request, table).mask, ramp >= 100)
    reordered = Image.fromarray(np.zeros((64, 64), np.uint8), "P")
    reordered.putpalette(table.classes[3].color)
    reordered.save(tmp_path / "labels.png")
    request = EditRequest(
        tmp_path / "photo.png", tmp_path / "b.png", labels=tmp_path / "labels.png", mask=tmp_path / "mask.png"
    )
    with pytest.raises(InputError, match="was reordered"):
        read_inputs(request, table)
