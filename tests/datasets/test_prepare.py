from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spmdeploy.datasets import prepare as module
from spmdeploy.datasets.check import check_dataset
from spmdeploy.datasets.folder import ImageFolder
from spmdeploy.datasets.prepare import ade20k_size, prepare
from spmdeploy.errors import InputError, UsageError
from spmdeploy.imaging import files as images
from spmdeploy.labels import class_table

TRAIN_STEM, TEST_STEM = "aachen_000000_000019", "lindau_000000_000019"


def save(path: Path, values: npt.NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **({"quality": 95} if path.suffix == ".jpg" else {"compress_level": 0}))


def save_cityscapes(root: Path, split: str, stem: str, seed: int) -> None:
    """One annotated with its annotations, a quarter of the official size: road, with a car in a place of its own."""
    rng = np.random.default_rng(seed)
    photo = np.kron(rng.integers(0, 256, (64, 128, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    labels = np.full((512, 1024), 7, np.uint8)
    top, left = rng.integers(0, 300, 2)
    labels[top : top + 100, left : left + 201] = 26
    city = stem.split("_")[0]
    save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", photo)
    truth = root / "gtFine" / split / city
    save(truth / f"{stem}_gtFine_labelIds.png", labels)
    save(truth / f"{stem}_gtFine_instanceIds.png", np.where(labels == 26, np.uint16(26003), labels))
    save(truth / f"{stem}_gtFine_color.png", np.zeros((4, 4, 4), np.uint8))


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """The official tree with three photos to train on and one to validate; the official test split is there too."""
    root = tmp_path / "cityscapes"
    stems = [("train", TRAIN_STEM), ("train", "aachen_000001_000019"), ("train", "ulm_000000_000019")]
    for seed, (split, stem) in enumerate([*stems, ("val", TEST_STEM), ("test", "berlin_000000_000019")]):
        save_cityscapes(root, split, stem, seed)
    return root


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    """The official tree with a photo of 400×300 in each split: floor (4), with chair (20) number 3 on it."""
    root = tmp_path / "ADEChallengeData2016"
    labels = np.full((300, 400), 4, np.uint8)
    labels[100:200, 100:200] = 20
    instances = np.zeros((300, 400, 3), np.uint8)
    instances[100:200, 100:200] = (8, 3, 0)  # red: chair among the 100 classes of the instance track
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save(root / "images" / split / f"{name}.jpg", np.full((300, 400, 3), 90, np.uint8))
        save(root / "annotations" / split / f"{name}.png", labels)
        save(root / "annotations_instance" / split / f"{name}.png", instances)
    return root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepare_cityscapes_writes_the_paper_sizes(cityscapes: Path, target: Path) -> None:
    done = prepare("cityscapes", cityscapes, target, jobs=1)
    assert (done.pictures, done.made, done.notes) == ({"train": 3, "test": 1}, 4, ())
    assert json.loads(json.dumps(done.to_json()))["pictures"] == {"train": 3, "test": 1}
    report = check_dataset(target)
    assert report.ok, report.errors
    assert report.pictures == {"train": 3, "test": 1}
    for split, official, stem in (("train", "train", TRAIN_STEM), ("test", "val", TEST_STEM)):
        city = stem.split("_")[0]
        source = images.read_labels(cityscapes / "gtFine" / official / city / f"{stem}_gtFine_labelIds.png")
        labels = images.read_labels(target / split / "labels" / f"{stem}.png")
        assert np.array_equal(labels, source[1::2, 1::2])  # nearest: the same class under every pixel
        instances = images.read_instances(target / split / "inst_map" / f"{stem}.png")
        assert np.array_equal(instances, np.where(labels == 26, 26003, 7))


def test_prepare_photos_are_antialiased(cityscapes: Path, target: Path) -> None:
    stripes = np.zeros((1024, 2048, 3), np.uint8)
    stripes[:, ::2] = 201
    save(cityscapes / "leftImg8bit/train/aachen" / f"{TRAIN_STEM}_leftImg8bit.png", stripes)
    for kind in ("labelIds", "instanceIds"):
        save(cityscapes / "gtFine/train/aachen" / f"{TRAIN_STEM}_gtFine_{kind}.png", np.full((1024, 2048), 7, np.uint8))
    prepare("cityscapes", cityscapes, target, jobs=1)
    pixels = images.read_photo(target / "train" / "images" / f"{TRAIN_STEM}.png").pixels
    assert pixels.shape == (256, 512, 3)
    assert np.unique(pixels).tolist() == [101]


def test_prepare_license_plates_of_255_become_car(cityscapes: Path, target: Path) -> None:
    path = cityscapes / "gtFine/train/aachen" / f"{TRAIN_STEM}_gtFine_labelIds.png"
    labels = images.read_labels(path)
    prepare("cityscapes", cityscapes, target, jobs=1)
    expected = contents(target)
    rows, columns = np.nonzero(labels == 26)
    labels[rows[0] : rows[0] + 20, columns[0] : columns[0] + 40] = 255
    save(path, labels)
    prepare("cityscapes", cityscapes, target.with_name("with_plates"), jobs=1)
    assert contents(target.with_name("with_plates")) == expected


def test_prepare_ade20k_keeps_proportions_and_instances(ade20k: Path, target: Path) -> None:
    assert prepare("ade20k", ade20k, target, jobs=1).pictures == {"train": 1, "test": 1}
    assert check_dataset(target).ok
    labels = images.read_labels(target / "test" / "labels" / "ADE_val_00000001.png")
    instances = images.read_instances(target / "test" / "inst_map" / "ADE_val_00000001.png")
    assert labels.shape == (288, 384)
    assert np.unique(labels).tolist() == [4, 20]
    assert np.array_equal(instances, np.where(labels == 20, 3, 0))
    annotated = ImageFolder.open(target, "train")["ADE_train_00000001"]
    assert np.unique(annotated.instances).tolist() == [4, 20003]  # a thing, so that instance masks find its box


def test_prepare_ade20k_without_instances_uses_components(ade20k: Path, target: Path) -> None:
    (ade20k / "annotations_instance").rename(ade20k.with_name("elsewhere"))
    done = prepare("ade20k", ade20k, target, jobs=1)
    assert done.notes[0].startswith("2 of 2 photos have no instance map")
    annotated = ImageFolder.open(target, "train")["ADE_train_00000001"]
    assert annotated.instances.max() >= 20000  # the chair, from its connected piece


def test_ade20k_things_are_those_of_the_instance_track() -> None:
    names = [class_table("ade20k").classes[thing].name for thing in module.ADE20K_THINGS]
    assert len(set(names)) == 100
    assert {"bed", "person", "chair", "car", "flag"} <= set(names)
    assert not {"wall", "building", "sky", "floor", "tree", "road", "grass"} & set(names)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((600, 800), (288, 384)),
        ((800, 600), (384, 288)),
        ((512, 768), (256, 384)),
        ((256, 300), (256, 300)),  # small enough and large enough: as it is
        ((300, 900), (256, 768)),  # both cannot hold: the shorter side wins
        ((200, 220), (256, 282)),  # the only reason to enlarge
    ],
)
def test_ade20k_size_keeps_proportions(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert ade20k_size(*size) == wanted


def test_prepare_several_processes_write_the_same_bytes(cityscapes: Path, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare("cityscapes", cityscapes, target, jobs=1)
    prepare(
        "cityscapes",
        cityscapes,
        target.with_name("parallel"),
        jobs=2,
        progress=lambda done, count: seen.append((done, count)),
    )
    assert contents(target.with_name("parallel")) == contents(target)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("harm", ["removed", "empty", "truncated"])
def test_prepare_again_writes_only_incomplete_files(cityscapes: Path, target: Path, harm: str) -> None:
    prepare("cityscapes", cityscapes, target, jobs=1)
    whole = contents(target)
    harmed = target / "train" / "inst_map" / "ulm_000000_000019.png"
    kept = target / "train" / "images" / f"{TRAIN_STEM}.png"
    if harm == "removed":
        harmed.unlink()
    else:
        harmed.write_bytes(b"" if harm == "empty" else harmed.read_bytes()[:-1])
    (harmed.parent / ".0123456789abcdef.tmp").write_bytes(b"half")  # as a killed run leaves it
    before = kept.stat()
    assert prepare("cityscapes", cityscapes, target, jobs=1).made == 1
    assert contents(target) == whole
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert prepare("cityscapes", cityscapes, target, jobs=1).made == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from spmdeploy.datasets.prepare import prepare
if __name__ == "__main__":
    die = lambda done, count: os.kill(os.getpid(), signal.SIGKILL)
    prepare("cityscapes", Path(sys.argv[1]), Path(sys.argv[2]), jobs=2, progress=die)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_prepare_killed_run_continues_without_partial_files(cityscapes: Path, target: Path) -> None:
    for index in range(8):
        save_cityscapes(cityscapes, "train", f"zurich_{index:06d}_000019", index)
    script = target.with_name("script.py")
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    command = [sys.executable, str(script), str(cityscapes), str(target)]
    # run() returns when the output is closed: the workers, which hold it open, end with their parent.
    killed = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (target / "labels.json").exists()  # nothing takes the folder for a finished one
    finished = list(target.rglob("[!.]*.png"))
    assert 3 <= len(finished) < 36
    for path in finished:
        with Image.open(path) as annotated:
            annotated.load()
    assert 0 < prepare("cityscapes", cityscapes, target, jobs=1).made < 12
    prepare("cityscapes", cityscapes, target.with_name("at_once"), jobs=1)
    assert contents(target) == contents(target.with_name("at_once"))


def test_prepare_missing_annotations_are_listed(cityscapes: Path, target: Path) -> None:
    for stem in ("aachen_000001_000019", "ulm_000000_000019"):
        (cityscapes / "gtFine/train" / stem.split("_")[0] / f"{stem}_gtFine_labelIds.png").unlink()
    with pytest.raises(InputError, match=r"2 of 4 photos have no \*_gtFine_labelIds\.png") as caught:
        prepare("cityscapes", cityscapes, target, jobs=1)
    assert "train/aachen/aachen_000001_000019; train/ulm/ulm_000000_000019" in caught.value.problem
    assert "gtFine_trainvaltest.zip" in (caught.value.hint or "")
    assert not target.exists()


def test_prepare_labels_without_a_photo_are_noted(cityscapes: Path, target: Path) -> None:
    (cityscapes / "leftImg8bit/train/aachen" / f"{TRAIN_STEM}_leftImg8bit.png").unlink()
    done = prepare("cityscapes", cityscapes, target, jobs=1)
    assert done.pictures == {"train": 2, "test": 1}
    assert done.notes == (f"1 label maps have no photo and are left out: aachen/{TRAIN_STEM}",)


@pytest.mark.parametrize("folder", ["leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"])
def test_prepare_missing_folder_is_named_with_its_origin(cityscapes: Path, target: Path, folder: str) -> None:
    shutil.rmtree(cityscapes / folder)
    with pytest.raises(InputError, match=f"{folder}: no such folder") as caught:
        prepare("cityscapes", cityscapes, target, jobs=1)
    assert f"{folder.split('/')[0]}_trainvaltest.zip" in (caught.value.hint or "")


def test_prepare_other_folder_is_refused(ade20k: Path, target: Path) -> None:
    with pytest.raises(InputError, match=r"leftImg8bit.train: no such folder"):
        prepare("cityscapes", ade20k, target, jobs=1)
    with pytest.raises(InputError, match=r"images.training: no such folder") as caught:
        prepare("ade20k", ade20k / "images", target, jobs=1)
    assert "name the folder that holds annotations and images" in (caught.value.hint or "")
    for photo in (ade20k / "images/training").iterdir():
        photo.unlink()
    with pytest.raises(InputError, match=r"images.training holds no \*\.jpg"):
        prepare("ade20k", ade20k, target, jobs=1)


def shrink_labels(path: Path) -> None:
    save(path, np.full((256, 512), 7, np.uint8))


def use_unknown_ids(path: Path) -> None:
    save(path, np.full((512, 1024), 34, np.uint8))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (shrink_labels, r"labelIds\.png is 512×256, aachen_000000_000019_leftImg8bit\.png is 1024×512"),
        (use_unknown_ids, r"labelIds\.png holds ids that cityscapes does not have: 34"),
        (truncate, r"labelIds\.png is truncated or damaged"),
    ],
)
def test_prepare_bad_file_is_named_after_the_others_are_done(
    cityscapes: Path, target: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    spoil(cityscapes / "gtFine/train/aachen" / f"{TRAIN_STEM}_gtFine_labelIds.png")
    with pytest.raises(InputError, match=f"1 of 4 images cannot be prepared: .*{problem}"):
        prepare("cityscapes", cityscapes, target, jobs=1)
    assert len(list(target.rglob("*.png"))) == 9
    assert not (target / "labels.json").exists()


def test_prepare_cityscapes_of_another_size_is_refused(cityscapes: Path, target: Path) -> None:
    save(cityscapes / "leftImg8bit/train/aachen" / f"{TRAIN_STEM}_leftImg8bit.png", np.zeros((512, 900, 3), np.uint8))
    for kind in ("labelIds", "instanceIds"):
        save(cityscapes / "gtFine/train/aachen" / f"{TRAIN_STEM}_gtFine_{kind}.png", np.zeros((512, 900), np.uint8))
    with pytest.raises(InputError, match=f"{TRAIN_STEM}_leftImg8bit.png: 900×512 is not a size of Cityscapes"):
        prepare("cityscapes", cityscapes, target, jobs=1)


def test_prepare_target_with_another_data_set_is_refused(cityscapes: Path, ade20k: Path, target: Path) -> None:
    prepare("ade20k", ade20k, target, jobs=1)
    with pytest.raises(InputError, match="already holds ade20k, not cityscapes"):
        prepare("cityscapes", cityscapes, target, jobs=1)


def test_prepare_zero_jobs_is_refused(cityscapes: Path, target: Path) -> None:
    with pytest.raises(UsageError, match="0 processes"):
        prepare("cityscapes", cityscapes, target, jobs=0)
