"""Checks a data folder for what would stop or impair training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from spmdeploy.datasets.folder import (
    IMAGE_SUFFIXES,
    INSTANCE_FOLDERS,
    list_files,
    read_classes,
    read_instance_rules,
)
from spmdeploy.errors import InputError
from spmdeploy.imaging import files as images
from spmdeploy.labels import ClassTable, check_labels, count_labels
from spmdeploy.types import Progress

SPLITS = ("train", "test")
MIN_CLASS_SHARE = 1e-4
"""A class with a smaller share of all pixels is hardly learned: 7 pixels of a 256 × 256 crop on average."""


@dataclass(frozen=True)
class ClassShare:
    """How much of the training split a class covers."""

    id: int
    name: str
    pixels: int
    """Over all label maps."""
    pictures: int
    """Number of label maps that contain the class."""


@dataclass(frozen=True)
class DatasetReport:
    """The result of `check_dataset`. Field names are those of the JSON report."""

    root: str
    pictures: dict[str, int]
    """Split -> complete pairs of image and label map."""
    smallest: tuple[int, int] | None
    """(height, width), the minimum of each over the training split."""
    classes: tuple[ClassShare, ...]
    errors: tuple[str, ...]
    """What stops training, a sentence each."""
    warnings: tuple[str, ...]
    """What impairs it."""

    @property
    def ok(self) -> bool:
        """Whether training can use the folder; there may be warnings."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """The JSON report, schema spmdeploy.dataset-check/1."""
        fields = {**vars(self), "classes": [vars(share) for share in self.classes]}
        return {"schema": "spmdeploy.dataset-check/1", "ok": self.ok, **fields}


def check_dataset(root: Path, crop: int = 256, progress: Progress = lambda done, total: None) -> DatasetReport:
    """Reads every file of a data folder once and reports what is wrong.

    Args:
        root: The data folder.
        crop: Side of the training crops, in pixels.
        progress: Called with the number of images read and the total.

    Raises:
        InputError: labels.json cannot be used, or there is no training split.
    """
    table, rules = read_classes(root), read_instance_rules(root)
    folders = [root / split / "labels" for split in SPLITS]
    total = sum(len(list_files(folder)) for folder in folders if folder.is_dir())
    checker = _DatasetChecker(table, lambda done: progress(done, max(done, total)))
    if unknown := [thing for thing in rules.thing_ids if not 0 <= thing < len(table)]:
        checker.errors.append(f"{root / 'labels.json'}: thing_ids names {unknown}, ids run from 0 to {len(table) - 1}")
    for split in SPLITS:
        checker.check_split(root / split, required=split == "train")
    checker.check_totals(crop)
    shares = tuple(
        ClassShare(label.id, label.name, checker.pixels[label.id], checker.images_with[label.id])
        for label in table.classes
    )
    errors, warnings = tuple(checker.errors), tuple(checker.warnings)
    return DatasetReport(str(root), checker.pairs, checker.smallest, shares, errors, warnings)


class _DatasetChecker:
    """Collects errors, warnings and counts over both splits."""

    def __init__(self, table: ClassTable, progress: Callable[[int], None]) -> None:
        self.table = table
        self._progress = progress
        self._read = 0
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.pairs: dict[str, int] = {}
        self.pixels: Counter[int] = Counter()
        self.images_with: Counter[int] = Counter()
        self.smallest: tuple[int, int] | None = None

    def check_split(self, folder: Path, required: bool) -> None:
        """Checks the files of one split. Raises InputError when a required split is missing."""
        if not (folder / "images").is_dir():
            if required:
                raise InputError(f"{folder / 'images'}: no such folder", "expected ROOT/{train,test}/{images,labels}")
            self.warnings.append(f"{folder}: there is none; nothing to evaluate on")
            return
        files = {kind: self._by_stem(folder / kind) for kind in ("images", "labels", *INSTANCE_FOLDERS)}
        for kind, other in (("images", "labels"), ("labels", "images")):
            for stem in sorted(files[kind].keys() - files[other].keys()):
                self.errors.append(f"{files[kind][stem]}: has no counterpart in {other}")
        stems = sorted(files["images"].keys() & files["labels"].keys())
        for stem in stems:
            instances = next((files[kind].get(stem) for kind in INSTANCE_FOLDERS if files[kind]), None)
            self._check_pair(files["images"][stem], files["labels"][stem], instances, counted=required)
        self.pairs[folder.name] = len(stems)
        self._check_instances(folder, files, stems)

    def _by_stem(self, folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in list_files(folder) if folder.is_dir() else ():
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                self.warnings.append(f"{path}: not an image, it is ignored")
            elif path.stem in found:
                self.errors.append(f"{path}: the same name as {found[path.stem].name}")
            else:
                found[path.stem] = path
        return found

    def _check_pair(self, image: Path, label_map: Path, instance_map: Path | None, counted: bool) -> None:
        self._read += 1
        self._progress(self._read)
        try:
            size = images.read_photo(image).pixels.shape[:2]
            labels = images.read_labels(label_map, table=self.table)
            check_labels(labels, self.table, str(label_map))
            self._check_size(label_map, labels, image, size)
            if instance_map is not None:
                self._check_size(instance_map, images.read_instances(instance_map), image, size)
        except InputError as exc:
            self.errors.append(exc.problem if exc.hint is None else f"{exc.problem} ({exc.hint})")
            return
        if counted:
            counts = count_labels(labels)
            self.pixels.update(counts)
            self.images_with.update(counts.keys())
            smallest = self.smallest or size
            self.smallest = min(smallest[0], size[0]), min(smallest[1], size[1])

    @staticmethod
    def _check_size(path: Path, values: NDArray[Any], image: Path, size: tuple[int, ...]) -> None:
        if values.shape != size:
            raise InputError(
                f"{path} is {values.shape[1]}×{values.shape[0]}, {image.name} is {size[1]}×{size[0]}; they must match"
            )

    def _check_instances(self, folder: Path, files: dict[str, dict[str, Path]], stems: list[str]) -> None:
        kind = next((kind for kind in INSTANCE_FOLDERS if files[kind]), None)
        if kind is None:
            self.warnings.append(f"{folder}: no {INSTANCE_FOLDERS[0]}; instances are connected components")
        elif without := [stem for stem in stems if stem not in files[kind]]:
            self.warnings.append(f"{folder / kind}: {len(without)} images have no map there, the first is {without[0]}")

    def check_totals(self, crop: int) -> None:
        """Reports what only the counts over all images show."""
        if not self.pairs.get("train"):
            self.errors.append("the training split holds no complete pair of image and label map")
        if self.smallest is not None and min(self.smallest) < crop:
            self.warnings.append(f"the shortest side is {min(self.smallest)}; crops of {crop} are enlarged from it")
        total = self.pixels.total()
        for label in self.table.classes:
            if label.id == self.table.void_id or not total:
                continue
            share = self.pixels[label.id] / total
            if not share:
                self.warnings.append(f"class {label.id} ({label.name}) is in no training image")
            elif share < MIN_CLASS_SHARE:
                self.warnings.append(
                    f"class {label.id} ({label.name}) covers {share:.4%} of the training pixels, "
                    f"in {self.images_with[label.id]} images; it will hardly be learned"
                )
