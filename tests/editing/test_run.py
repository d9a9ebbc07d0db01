"""One edit from files to a file, apart from what the command line adds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from spmdeploy.backends.base import Unsupported
from spmdeploy.editing.editor import Editor
from spmdeploy.editing.masks import dilate
from spmdeploy.editing.options import DEFAULT_DILATION, EditOptions, EditRequest, parse_padding
from spmdeploy.editing.overlay import explain_sheet
from spmdeploy.editing.plan import PlannedWindow
from spmdeploy.editing.report import WindowReport
from spmdeploy.editing.run import read_inputs, run_edit
from spmdeploy.errors import InputError, UsageError
from spmdeploy.imaging.contact_sheet import CELL_SIDE, edit_sheet, sheet
from spmdeploy.imaging.files import read_photo
from spmdeploy.labels import class_table
from spmdeploy.tiling.letterbox import fit_letterbox
from spmdeploy.tiling.pyramid import plan_pyramid
from spmdeploy.tiling.windows import plan_windows
from spmdeploy.types import ModelInput, Padding


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


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def files(tmp_path: Path) -> EditRequest:
    photo = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10, 5:15] = 255
    return EditRequest(
        image=save(tmp_path / "photo.png", photo),
        output=tmp_path / "edited.png",
        labels=save(tmp_path / "labels.png", np.full((20, 30), 3, np.uint8)),
        mask=save(tmp_path / "mask.png", mask),
    )


def changed(files: EditRequest, **changes: Any) -> EditRequest:
    """Changes of the request, and of its options by their own names."""
    names = {one.name for one in dataclasses.fields(EditOptions)}
    options = {name: changes.pop(name) for name in names & set(changes)}
    return dataclasses.replace(files, **changes, options=dataclasses.replace(files.options, **options))


# ------------------------------------------------------------------------------------------------- growing the mask


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 15),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11))),
)
def test_growing_reaches_so_many_rows_and_columns(
    height: int, width: int, pixels: int, marked: list[tuple[int, int]]
) -> None:
    mask = np.zeros((height, width), bool)
    for row, column in marked:
        mask[row % height, column % width] = True
    expected = [
        [mask[max(y - pixels, 0) : y + pixels + 1, max(x - pixels, 0) : x + pixels + 1].any() for x in range(width)]
        for y in range(height)
    ]
    assert np.array_equal(dilate(mask, pixels), expected)


def test_how_much_a_mask_grows(files: EditRequest) -> None:
    from_changes = {"mask": None, "edited_from": files.image}
    assert files.dilation == 0 and changed(files, dilate=3).dilation == 3
    assert changed(files, **from_changes).dilation == DEFAULT_DILATION
    assert changed(files, dilate=0, **from_changes).dilation == 0


# -------------------------------------------------------------------------------------------- what contradicts itself


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "either labels or fill"),
        ({"fill": "road"}, "either labels or fill"),
        ({"labels": None, "fill": "road", "match_surroundings": True}, "match_surroundings needs the labels"),
        ({"mask": None}, "one of mask, edited_from and extend"),
        ({"edited_from": Path("l.png")}, "one of mask, edited_from and extend"),
        ({"extend": Padding(1, 0, 0, 0)}, "one of mask, edited_from and extend"),
        ({"mask": None, "extend": Padding(1, 0, 0, 0), "dilate": 2}, "grow enlarges a mask"),
        ({"mask": None, "edited_from": Path("l.png"), "labels": None, "fill": "road"}, "edited_from needs labels"),
        ({"dilate": -1}, "grow is -1"),
        ({"dilate": 1025}, "grow is 1025"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, Any], words: str, files: EditRequest) -> None:
    with pytest.raises(UsageError, match=words):
        changed(files, **changes)


def test_outputs_never_replace_what_is_read(files: EditRequest, tmp_path: Path) -> None:
    link = tmp_path / "link.png"
    link.symlink_to(files.mask)  # type: ignore[arg-type]
    for changes in (
        {"output": link},
        {"output": files.labels},
        {"sheet": files.image},
        {"sheet": files.output},
        {"explain": files.mask},
        {"explain": files.output},
        {"explain": tmp_path / "sheet.png", "sheet": tmp_path / "sheet.png"},
    ):
        with pytest.raises(UsageError, match="would be written over"):
            changed(files, **changes)
    assert changed(files, output=files.image).output == files.image


# ------------------------------------------------------------------------------------------------ reading and writing


def test_orientation_profile_and_labels_of_a_turned_photo(files: EditRequest, tmp_path: Path) -> None:
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
def test_a_failed_edit_writes_nothing(failure: Exception, files: EditRequest, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(type(failure)):
        run_edit(editor(failure), changed(files, sheet=tmp_path / "sheet.png", explain=tmp_path / "tiles.png"))
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_between_the_tiles_of_a_cascade_leaves_what_was_there(files: EditRequest, tmp_path: Path) -> None:
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
def test_further_pictures_are_checked_before_the_work(kind: str, files: EditRequest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        run_edit(editor(), changed(files, **{kind: tmp_path / "absent" / "picture.png"}))
    assert not files.output.exists()


def test_further_pictures_are_written_beside_the_edit(files: EditRequest, tmp_path: Path) -> None:
    done = run_edit(editor(), changed(files, sheet=tmp_path / "sheet.png", explain=tmp_path / "tiles.png"))
    assert done.to_json()["sheet"] == str(tmp_path / "sheet.png")
    assert done.to_json()["explain"] == str(tmp_path / "tiles.png")
    assert read_photo(tmp_path / "sheet.png").pixels.shape != read_photo(tmp_path / "tiles.png").pixels.shape


def test_labels_of_another_size_than_those_before(files: EditRequest, tmp_path: Path) -> None:
    before = save(tmp_path / "before.png", np.zeros((20, 31), np.uint8))
    with pytest.raises(InputError, match=r"before.png is 31×20 but .*labels.png is 30×20"):
        run_edit(editor(), changed(files, mask=None, edited_from=before))


# --------------------------------------------------------------------------------------------------------- extensions


def extension(files: EditRequest, *sides: int, **changes: Any) -> EditRequest:
    return changed(files, mask=None, labels=None, fill="road", extend=Padding(*sides), **changes)


def test_a_photo_grows_with_everything_beside_its_pixels(files: EditRequest, tmp_path: Path) -> None:
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


def test_an_extension_by_a_label_map_of_the_grown_size(files: EditRequest, tmp_path: Path) -> None:
    labels = save(tmp_path / "grown.png", np.full((20, 40), 3, np.uint8))
    pictures = {"sheet": tmp_path / "sheet.png", "explain": tmp_path / "tiles.png"}
    done = run_edit(editor(), changed(files, mask=None, labels=labels, extend=Padding(10, 0, 0, 0), **pictures))
    assert done.size == (40, 20) and all(path.exists() for path in pictures.values())
    assert [window["width"] for window in done.to_json()["report"]["windows"]] == [40]


def test_labels_of_the_photos_own_size_are_not_enough_for_an_extension(files: EditRequest) -> None:
    with pytest.raises(InputError, match=r"labels.png: 30×20, but .*photo.png grows to 40×20"):
        run_edit(editor(), changed(files, mask=None, extend=Padding(10, 0, 0, 0)))


def test_absurd_extensions_are_refused_before_memory_is_asked_for(files: EditRequest) -> None:
    with pytest.raises(UsageError, match="grow to 2000000028×20"):
        run_edit(editor(), extension(files, 999_999_999, 0, 999_999_999, 0))


def test_a_format_that_cannot_hold_the_grown_picture_is_refused_before_the_work(files: EditRequest) -> None:
    never = editor(AssertionError("the session ran"))
    with pytest.raises(InputError, match="WebP holds at most 16383 pixels per side, not 17030"):
        run_edit(never, extension(files, 17_000, 0, 0, 0, output=files.output.with_suffix(".webp")))


@pytest.mark.parametrize("text", ["0,0,256,0", "0 0 256 0", " 0, 0, 256, 0 "])
def test_how_sides_may_be_written(text: str) -> None:
    assert parse_padding(text) == Padding(0, 0, 256, 0)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1.5,0,0,0", "1,2,3,1" + "0" * 5000, "٣,0,0,0"])
def test_sides_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="not four whole numbers"):
        parse_padding(text)


# ------------------------------------------------------------------------------------------------------------ sheets


def test_sheets_of_large_photos_are_shrunk() -> None:
    photo = np.zeros((300, 4 * CELL_SIDE, 3), np.uint8)
    mask = np.zeros(photo.shape[:2], bool)
    mask[100:200, 100:900] = True
    drawn = edit_sheet(photo, np.full(mask.shape, 8, np.uint8), mask, photo, class_table("street"))
    assert drawn.shape[1] == 4 * (CELL_SIDE + 10) + 10 and drawn.shape[0] < 75 + 100
    car = np.array(class_table("street").find("car").color)
    assert (drawn == car).all(axis=2).sum() > 24 * 190  # under the mask, and in the legend


def test_the_explanation_shows_windows_and_the_tiles_of_every_size() -> None:
    mask = np.zeros((900, 1300), bool)
    mask[200:700, 300:800] = mask[100, 1200] = True
    small, large = sorted(plan_windows(mask), key=lambda site: site.window.width)
    levels = plan_pyramid(large.window, large.mask_of(mask))
    windows = [
        WindowReport(PlannedWindow(small, fit_letterbox(small.window))),
        WindowReport(PlannedWindow(large, fit_letterbox(large.window), levels)),
    ]
    photo = np.zeros((900, 1300, 3), np.uint8)
    picture = explain_sheet(photo, mask, windows)
    at_once, carried_up, tile = (255, 190, 0), (255, 255, 255), (0, 200, 255)
    assert [len(window.plan.levels) for window in windows] == [0, 2]
    for color in (at_once, carried_up, tile):
        assert (picture == color).all(axis=2).any(), color
    alone = explain_sheet(photo, mask, windows[:1])
    assert alone.shape[0] < picture.shape[0] and alone.shape[1] < picture.shape[1]


def test_explaining_a_photo_of_a_pixel_or_two() -> None:
    mask = np.array([[True, False]])
    windows = [WindowReport(PlannedWindow(site, fit_letterbox(site.window))) for site in plan_windows(mask)]
    assert explain_sheet(np.zeros((1, 2, 3), np.uint8), mask, windows).ndim == 3


def test_legends_break_into_lines() -> None:
    cell = {"x": np.zeros((10, 100, 3), np.uint8)}
    names = [(f"class {i}", (i, i, i)) for i in range(9)]
    assert sheet([cell], names).shape[0] > sheet([cell], names[:1]).shape[0] > sheet([cell]).shape[0]


@pytest.mark.parametrize("option", [{"mask_threshold": 100}, {"mask_alpha": "transparent"}])
def test_edit_request_mask_options_without_mask_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="are about a mask file"):
        EditRequest(Path("a.png"), Path("b.png"), fill="road", extend=Padding(0, 0, 8, 0), **option)


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
