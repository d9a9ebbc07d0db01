from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spmdeploy.datasets.check import check_dataset
from spmdeploy.errors import InputError


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_folder, tmp_path / "data"))


def save(path: Path, values: object, dtype: type = np.uint8) -> None:
    Image.fromarray(np.asarray(values, dtype)).save(path)


def test_check_dataset_good_folder_is_ok(folder: Path) -> None:
    report = check_dataset(folder, crop=128)
    assert report.ok
    assert report.pictures == {"train": 6, "test": 6}
    assert report.smallest == (140, 180)
    assert [(share.name, share.pictures) for share in report.classes] == [("sky", 6), ("road", 6), ("car", 6)]
    assert sum(share.pixels for share in report.classes) == 6 * 140 * 180
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_check_dataset_missing_counterparts_are_errors(folder: Path) -> None:
    (folder / "train" / "labels" / "001.png").unlink()
    (folder / "test" / "images" / "002.png").unlink()
    report = check_dataset(folder)
    assert not report.ok
    assert [error.split(": ")[1] for error in report.errors] == [
        "has no counterpart in labels",
        "has no counterpart in images",
    ]
    assert report.pictures == {"train": 5, "test": 5}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.zeros((10, 20)), r"001\.png is 20×10, 001\.png is 180×140"),
        (np.full((140, 180), 7), r"001\.png.* 7 \("),
        (np.full((140, 180, 3), (1, 2, 3)), r"001\.png is a color image"),
    ],
)
def test_check_dataset_bad_label_map_is_named(folder: Path, values: np.ndarray, problem: str) -> None:
    save(folder / "train" / "labels" / "001.png", values)
    (error,) = check_dataset(folder).errors
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(error)


def test_check_dataset_damaged_images_are_errors_each(folder: Path) -> None:
    (folder / "train" / "images" / "000.png").write_bytes(b"nothing")
    (folder / "train" / "images" / "001.png").write_bytes(b"nothing")
    assert len(check_dataset(folder).errors) == 2


def test_check_dataset_instance_map_of_another_size_is_an_error(folder: Path) -> None:
    (folder / "train" / "inst_map").mkdir()
    save(folder / "train" / "inst_map" / "003.png", np.zeros((9, 9)), np.uint16)
    report = check_dataset(folder)
    assert "inst_map/003.png is 9×9" in report.errors[0]
    assert any("5 images have no map there, the first is 000" in warning for warning in report.warnings)


def test_check_dataset_weak_folder_has_warnings(folder: Path) -> None:
    for path in (folder / "train" / "labels").iterdir():
        values = np.zeros((140, 180))
        values[0, 0] = 1
        save(path, values)
    shutil.rmtree(folder / "test")
    text = "\n".join(check_dataset(folder, crop=256).warnings)
    assert "the shortest side is 140; crops of 256 are enlarged" in text
    assert "class 2 (car) is in no training image" in text
    assert "class 1 (road) covers 0.0040%" in text
    assert "nothing to evaluate on" in text
    assert "connected components" in text


def test_check_dataset_unknown_thing_ids_are_an_error(folder: Path) -> None:
    table = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(table | {"thing_ids": [2, 7]}))
    (error,) = check_dataset(folder).errors
    assert "thing_ids names [7], ids run from 0 to 2" in error


def test_check_dataset_progress_ends_at_the_total(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    check_dataset(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]


def test_check_dataset_two_files_of_one_name_are_an_error(folder: Path) -> None:
    shutil.copy(folder / "train" / "images" / "000.png", folder / "train" / "images" / "000.jpg")
    assert any("the same name as" in error for error in check_dataset(folder).errors)


def test_check_dataset_without_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        check_dataset(tmp_path)
