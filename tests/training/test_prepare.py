from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spmdeploy import images
from spmdeploy.errors import InputError
from spmdeploy.training.check import check_dataset
from spmdeploy.training.dataset import PictureFolder, read_instance_rules
from spmdeploy.training.prepare import Prepared, ade20k_size, prepare


def save(path: Path, values: npt.NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """The official tree, a few small pictures of the official proportions."""
    root = tmp_path / "cityscapes"
    labels = np.full((64, 128), 7, np.uint8)
    labels[20:40, 30:60] = 26
    instances = np.where(labels == 26, np.uint16(26001), labels)
    for split, city, count in (
        ("train", "aachen", 2),
        ("train", "ulm", 1),
        ("val", "lindau", 1),
        ("test", "berlin", 1),
    ):
        for index in range(count):
            stem = f"{city}_{index:06d}_000019"
            save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", np.zeros((64, 128, 3), np.uint8))
            save(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", labels)
            save(root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", instances)
            save(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", np.zeros((64, 128, 4), np.uint8))
    return root


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    labels = np.full((300, 400), 4, np.uint8)
    labels[100:200, 100:200] = 20
    instances = np.zeros((300, 400, 3), np.uint8)
    instances[100:200, 100:200] = (20, 3, 0)
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save(root / "images" / split / f"{name}.jpg", np.full((300, 400, 3), 90, np.uint8))
        save(root / "annotations" / split / f"{name}.png", labels)
        save(root / "annotations_instance" / split / f"{name}.png", instances)
    return root


def test_cityscapes(cityscapes: Path, tmp_path: Path) -> None:
    target = tmp_path / "data"
    assert prepare("cityscapes", cityscapes, target, processes=1) == Prepared(made=4, kept=0)
    report = check_dataset(target)
    assert report.ok, report.errors
    assert report.pictures == {"train": 3, "test": 1}
    stem = "aachen_000000_000019.png"
    labels = images.read_labels(target / "train" / "labels" / stem)
    instances = images.read_instances(target / "train" / "inst_map" / stem)
    assert labels.shape == instances.shape == (256, 512)
    assert set(np.unique(labels)) == {7, 26}
    assert np.array_equal(instances, np.where(labels == 26, 26001, 7))


def test_an_interrupted_preparation_goes_on(cityscapes: Path, tmp_path: Path) -> None:
    target = tmp_path / "data"
    prepare("cityscapes", cityscapes, target, processes=1)
    lost = target / "train" / "inst_map" / "ulm_000000_000019.png"
    before = lost.read_bytes()
    lost.unlink()
    untouched = (target / "train" / "labels" / "aachen_000000_000019.png").stat().st_mtime_ns
    assert prepare("cityscapes", cityscapes, target, processes=1) == Prepared(made=1, kept=3)
    assert lost.read_bytes() == before
    assert (target / "train" / "labels" / "aachen_000000_000019.png").stat().st_mtime_ns == untouched


def test_ade20k(ade20k: Path, tmp_path: Path) -> None:
    target = tmp_path / "data"
    assert prepare("ade20k", ade20k, target, processes=1) == Prepared(made=2, kept=0)
    assert check_dataset(target).ok
    picture = PictureFolder(target, "train", read_instance_rules(target))["ADE_train_00000001"]
    assert picture.labels.shape == (288, 384)
    assert set(np.unique(picture.instances)) == {4, 20003}  # a thing, so that holes find its box


def test_ade20k_without_instances(ade20k: Path, tmp_path: Path) -> None:
    (ade20k / "annotations_instance").rename(tmp_path / "elsewhere")
    assert prepare("ade20k", ade20k, tmp_path / "data", processes=1).made == 2


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((600, 800), (288, 384)),
        ((256, 300), (256, 300)),
        ((512, 683), (288, 384)),
        ((300, 900), (256, 768)),
        ((200, 220), (256, 282)),
    ],
)
def test_sizes_of_ade20k(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert ade20k_size(*size) == wanted


def test_a_missing_annotation_is_named(cityscapes: Path, tmp_path: Path) -> None:
    (cityscapes / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(InputError, match="ulm_000000_000019_gtFine_labelIds"):
        prepare("cityscapes", cityscapes, tmp_path / "data", processes=1)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no pictures of ade20k") as caught:
        prepare("ade20k", tmp_path, tmp_path / "data")
    assert "annotations" in (caught.value.hint or "")
