"""What would hurt later in a data folder, found before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from spmdeploy.datasets.folder import INSTANCE_FOLDERS, PICTURE_SUFFIXES, read_classes, read_instance_rules
from spmdeploy.errors import InputError
from spmdeploy.imaging import files as images
from spmdeploy.labels import ClassTable, check_labels, count_labels

SPLITS = ("train", "test")
NEARLY_EMPTY = 1e-4
"""A class with a smaller share of all pixels is hardly learnt: 7 pixels of a 256 × 256 crop on average."""


@dataclass(frozen=True)
class ClassShare:
    """How much of the training split a class covers."""

    id: int
    name: str
    pixels: int
    """Over all label maps."""
    pictures: int
    """How many label maps hold it."""


@dataclass(frozen=True)
class DatasetReport:
    """What `check_dataset` found."""

    root: str
    pictures: dict[str, int]
    """Split -> complete pairs of image and label map."""
    smallest: tuple[int, int] | None
    """(height, width), the least of each, over the training split."""
    classes: tuple[ClassShare, ...]
    errors: tuple[str, ...]
    """What stops training, a sentence each."""
    warnings: tuple[str, ...]
    """What makes it worse."""

    @property
    def ok(self) -> bool:
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        fields = {**vars(self), "classes": [vars(share) for share in self.classes]}
        return {"schema": "spmdeploy.dataset-check/1", "ok": self.ok, **fields}


def check_dataset(
    root: Path, crop: int = 256, progress: Callable[[int, int], None] = lambda done, total: None
) -> DatasetReport:
    """Reads every file of the folder once. progress: told how many of how many pictures have been read.

    Raises InputError only when labels.json cannot be used or there is no training split.
    """
    table, rules = read_classes(root), read_instance_rules(root)
    total = sum(1 for split in SPLITS for _ in (root / split / "labels").glob("*"))
    check = _Check(table, lambda done: progress(done, max(done, total)))
    if strangers := [thing for thing in rules.thing_ids if not 0 <= thing < len(table)]:
        check.errors.append(f"{root / 'labels.json'}: thing_ids names {strangers}, ids run from 0 to {len(table) - 1}")
    for split in SPLITS:
        check.split(root / split, required=split == "train")
    check.judge(crop)
    shares = tuple(
        ClassShare(label.id, label.name, check.pixels[label.id], check.holders[label.id]) for label in table.classes
    )
    return DatasetReport(str(root), check.pairs, check.smallest, shares, tuple(check.errors), tuple(check.warnings))


class _Check:
    """What has been found so far."""

    def __init__(self, table: ClassTable, progress: Callable[[int], None]) -> None:
        self.table = table
        self._progress = progress
        self._read = 0
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.pairs: dict[str, int] = {}
        self.pixels: Counter[int] = Counter()
        self.holders: Counter[int] = Counter()
        self.smallest: tuple[int, int] | None = None

    def split(self, folder: Path, required: bool) -> None:
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
            self._pair(files["images"][stem], files["labels"][stem], instances, counted=required)
        self.pairs[folder.name] = len(stems)
        self._missing_instances(folder, files, stems)

    def _by_stem(self, folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() not in PICTURE_SUFFIXES:
                self.warnings.append(f"{path}: not a picture, it is ignored")
            elif path.stem in found:
                self.errors.append(f"{path}: the same name as {found[path.stem].name}")
            else:
                found[path.stem] = path
        return found

    def _pair(self, image: Path, label_map: Path, instance_map: Path | None, counted: bool) -> None:
        self._read += 1
        self._progress(self._read)
        try:
            size = images.read_photo(image).pixels.shape[:2]
            labels = images.read_labels(label_map)
            check_labels(labels, self.table, str(label_map))
            self._same_size(label_map, labels, image, size)
            if instance_map is not None:
                self._same_size(instance_map, images.read_instances(instance_map), image, size)
        except InputError as error:
            self.errors.append(error.problem if error.hint is None else f"{error.problem} ({error.hint})")
            return
        if counted:
            counts = count_labels(labels)
            self.pixels.update(counts)
            self.holders.update(counts.keys())
            least = self.smallest or size
            self.smallest = min(least[0], size[0]), min(least[1], size[1])

    @staticmethod
    def _same_size(path: Path, values: npt.NDArray[Any], image: Path, size: tuple[int, ...]) -> None:
        if values.shape != size:
            raise InputError(
                f"{path} is {values.shape[1]}×{values.shape[0]}, {image.name} is {size[1]}×{size[0]}; they must match"
            )

    def _missing_instances(self, folder: Path, files: dict[str, dict[str, Path]], stems: list[str]) -> None:
        kind = next((kind for kind in INSTANCE_FOLDERS if files[kind]), None)
        if kind is None:
            self.warnings.append(f"{folder}: no {INSTANCE_FOLDERS[0]}; things are told apart by connected components")
        elif without := [stem for stem in stems if stem not in files[kind]]:
            self.warnings.append(
                f"{folder / kind}: {len(without)} pictures have no map there, the first is {without[0]}"
            )

    def judge(self, crop: int) -> None:
        """What only shows over all pictures."""
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
                self.warnings.append(f"class {label.id} ({label.name}) is in no training picture")
            elif share < NEARLY_EMPTY:
                self.warnings.append(
                    f"class {label.id} ({label.name}) covers {share:.4%} of the training pixels, "
                    f"in {self.holders[label.id]} pictures; it will hardly be learnt"
                )
