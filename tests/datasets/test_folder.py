from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spmdeploy.datasets import folder as dataset
from spmdeploy.datasets.check import check_dataset
from spmdeploy.datasets.folder import ImageFolder
from spmdeploy.errors import InputError
from tests.toy_dataset import same, samples, write_data_folder


def test_image_folder_instance_maps_are_preferred(data_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data_folder, tmp_path / "copy")
    (root / "train" / "inst_map").mkdir()
    for path in (root / "train" / "labels").iterdir():
        values = np.full((140, 180), 26007, np.uint16)
        Image.fromarray(values).save(root / "train" / "inst_map" / path.name)
    assert (samples(root).at(0).instances == 26007).all()


def test_image_folder_missing_label_maps_are_counted(data_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data_folder, tmp_path / "copy")
    (root / "train" / "labels" / "004.png").unlink()
    with pytest.raises(InputError, match="1 images have no label map, the first is 004"):
        samples(root)


def test_image_folder_beyond_the_cache_is_read_again(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CACHE_BYTES", 2 * 140 * 180 * (3 + 1 + 4))
    drawn, again = samples(data_folder), samples(data_folder)
    found = [drawn.at(position) for position in range(12)]
    assert len(drawn._main[0][0]._cache) == 2
    assert all(same(sample, again.at(position)) for position, sample in enumerate(found))


def test_image_folder_undeclared_label_is_refused_before_it_is_trained_on(data_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    path = root / "train" / "labels" / "000.png"
    labels = np.array(Image.open(path))
    labels[:3] = 255
    Image.fromarray(labels).save(path)
    folder = ImageFolder.open(root, "train")
    with pytest.raises(InputError, match=r"000\.png holds ids that toy does not have: 255 \(540 pixels\)") as caught:
        folder["000"]
    assert "void_id" in str(caught.value.hint)
    table = json.loads((root / "labels.json").read_text())
    (root / "labels.json").write_text(json.dumps(table | {"void_id": 255}))
    assert (ImageFolder.open(root, "train")["000"].labels == 255).sum() == 540


def test_image_folder_hidden_files_are_ignored(data_folder: Path, tmp_path: Path) -> None:
    """macOS writes ._NAME next to each file on other file systems; file managers leave .DS_Store and thumbnails."""
    root = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            for name in ("._000.png", "._new.png", ".DS_Store", ".thumbs.jpg"):
                (root / split / kind / name).write_bytes(b"Mac OS X resource fork")
    assert ImageFolder.open(root, "train").names == ImageFolder.open(data_folder, "train").names
    assert samples(root).at(0).image.shape == (128, 128, 3)
    report = check_dataset(root)
    assert report.ok and report.pictures == {"train": 6, "test": 6}
    assert not any("._" in warning or "DS_Store" in warning for warning in report.warnings)


def test_image_folder_sizes_that_differ_are_named(data_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data_folder, tmp_path / "copy")
    for path in (root / "train" / "labels").iterdir():
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"\.png is 30×20, its image is 180×140"):
        samples(root).at(0)


def test_read_classes_bad_table_is_named(tmp_path: Path) -> None:
    root = write_data_folder(tmp_path / "bad", 1)
    (root / "labels.json").write_text(json.dumps({"labels": []}))
    with pytest.raises(InputError, match=r"labels\.json"):
        samples(root)
