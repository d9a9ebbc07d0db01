"""Manifests of a batch: what is read, and what is refused before any edit."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from spmdeploy.editing.manifest import _ignores_case, read_manifest
from spmdeploy.editing.options import EditOptions
from spmdeploy.errors import InputError
from tests.editing.conftest import save
from tests.editing.test_batch import ROWS, csv, jsonl


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
