"""Reads labeled image folders: photos, label maps, instance maps and their labels.json.

A folder is ROOT/{train,test}/{images,labels,inst_map|inst_map_cc} with a labels.json. Hidden files are ignored. A
`void_id` among the ids of labels.json is a class like any other, with a channel of its own (as in the paper); one
outside them, often 255, belongs to no class, and the network sees no label there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmdeploy.datasets.masks import FIRST_THING_ID, connected_components
from spmdeploy.errors import InputError
from spmdeploy.imaging import files as images
from spmdeploy.inputs import regular_file
from spmdeploy.labels import ClassTable, check_labels, class_table
from spmdeploy.serialization import parse_json
from spmdeploy.types import Image

INSTANCE_FOLDERS = ("inst_map", "inst_map_cc")
"""Annotated instances, or ones derived from connected components; the first that exists is read."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
CACHE_BYTES = 4 << 30
"""Images beyond this are read again each time: all of ADE20K would take 14 GB in every process."""


@dataclass(frozen=True)
class AnnotatedImage:
    """One annotated photo, whole or cut."""

    image: Image
    """uint8 (H, W, 3), RGB."""
    labels: NDArray[np.uint8]
    """uint8 (H, W), class ids."""
    instances: NDArray[np.int32]
    """int32 (H, W), instance ids."""


@dataclass(frozen=True)
class InstanceRules:
    """The entries of labels.json about instances."""

    thing_ids: tuple[int, ...] = ()
    """Classes whose connected components are countable things, for images without an instance map."""
    numbered: bool = False
    """Maps hold 0 = none, 1, 2, 3 ... for any class (ADE20K), not class * 1000 + number (Cityscapes)."""


class ImageFolder:
    """The images of one split, read on demand and cached up to `CACHE_BYTES`.

    Args:
        root: The data folder.
        split: "train" or "test".
        table: Its classes; a label that is neither one of them nor the void id is refused.
        rules: How to read instances.
        renumber: This folder's class id -> the model's; None keeps the ids.

    Raises:
        InputError: The split is missing, or an image has no label map.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        table: ClassTable,
        rules: InstanceRules,
        renumber: Mapping[int, int] | None = None,
    ) -> None:
        self._folder = root / split
        self._table = table
        self._rules = rules
        self._new_ids = None if renumber is None else _lookup(renumber)
        self._images = _files_by_stem(self._folder / "images")
        self._labels = _files_by_stem(self._folder / "labels")
        self._instances = _instance_files(self._folder)
        missing = sorted(self._images.keys() - self._labels.keys())
        if missing:
            raise InputError(f"{self._folder}: {len(missing)} images have no label map, the first is {missing[0]}")
        self.names = tuple(sorted(self._images))
        self._cache: dict[str, AnnotatedImage] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path, split: str) -> ImageFolder:
        """Opens a split with the classes and the instance rules of its own labels.json."""
        return cls(root, split, read_classes(root), read_instance_rules(root))

    def __getitem__(self, name: str) -> AnnotatedImage:
        """Reads the image of that name. Raises InputError naming the file."""
        if name in self._cache:
            return self._cache[name]
        annotated = self._load(name)
        size = annotated.image.nbytes + annotated.labels.nbytes + annotated.instances.nbytes
        with self._lock:
            if name not in self._cache and self._cached_bytes + size <= CACHE_BYTES:
                self._cached_bytes += size
                self._cache[name] = annotated
        return annotated

    def _load(self, name: str) -> AnnotatedImage:
        image = images.read_photo(self._images[name]).pixels
        labels = images.read_labels(self._labels[name], table=self._table)
        _check_size(self._labels[name], labels, image)
        _check_ids(self._labels[name], labels, self._table)
        if self._new_ids is not None:
            labels = self._new_ids[labels]
        if name in self._instances and self._new_ids is None:
            instances = images.read_instances(self._instances[name])
            _check_size(self._instances[name], instances, image)
            if self._rules.numbered:
                things = labels * np.int32(FIRST_THING_ID) + instances
                instances = np.where(instances > 0, things, labels).astype(np.int32)
        else:
            instances = connected_components(labels, self._rules.thing_ids)
        return AnnotatedImage(image, labels, instances)


def read_classes(root: Path) -> ClassTable:
    """Reads the class table in ROOT/labels.json.

    Raises:
        InputError: The file is missing or no class table.
    """
    path = root / "labels.json"
    if not path.exists():
        raise InputError(f"{root} is no data folder: there is no {path}", "docs/training.md shows its layout")
    return class_table(path)


def read_instance_rules(root: Path) -> InstanceRules:
    """Reads `thing_ids` and `instances` ("numbered") of ROOT/labels.json, both optional.

    Raises:
        InputError: The file is missing, or one of them is wrong.
    """
    path = root / "labels.json"
    try:
        fields = parse_json(regular_file(path).read_bytes())
        things = tuple(int(value) for value in fields.get("thing_ids", ()))
        style = fields.get("instances")
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise InputError(f"{path}: no usable list of thing_ids: {exc}") from exc
    if style not in (None, "numbered"):
        raise InputError(f'{path}: instances is {style!r}, expected "numbered" or nothing')
    return InstanceRules(things, style == "numbered")


def list_images(folder: Path) -> list[Path]:
    """The files of a folder that are images by their suffix, sorted, without hidden ones.

    macOS writes a `._NAME` next to each file on other file systems; tools leave `.thumbnails` and the like.
    """
    return [path for path in list_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def list_files(folder: Path) -> list[Path]:
    """The entries of a folder, sorted, without those whose names start with a dot."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises InputError "NAME is VALUE, expected EXPECTED" unless the condition holds."""
    if not condition:
        raise InputError(f"{name} is {value!r}, expected {expected}")


def _check_size(path: Path, values: NDArray[np.generic], image: Image) -> None:
    if values.shape != image.shape[:2]:
        raise InputError(
            f"{path} is {values.shape[1]}×{values.shape[0]}, its image is {image.shape[1]}×{image.shape[0]}",
            "find all such files with `spmdeploy dataset check`",
        )


def _check_ids(path: Path, labels: NDArray[np.uint8], table: ClassTable) -> None:
    try:
        check_labels(labels, table, str(path))
    except InputError as exc:
        hint = "add the class to labels.json, or set its void_id to the value of pixels without a class"
        raise InputError(exc.problem, f"{hint}; `spmdeploy dataset check` finds all such files") from exc


def _lookup(renumber: Mapping[int, int]) -> NDArray[np.uint8]:
    table = np.full(256, 255, np.uint8)
    for old, new in renumber.items():
        table[old] = new
    return table


def _files_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", "expected ROOT/{train,test}/{images,labels}")
    return {path.stem: path for path in list_images(folder)}


def _instance_files(folder: Path) -> dict[str, Path]:
    for name in INSTANCE_FOLDERS:
        if (folder / name).is_dir():
            return _files_by_stem(folder / name)
    return {}
