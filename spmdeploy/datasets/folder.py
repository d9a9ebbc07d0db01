"""Reads labeled image folders and draws training samples from them.

A folder is ROOT/{train,test}/{images,labels,inst_map|inst_map_cc} with a labels.json. Hidden files are ignored. A
`void_id` among the ids of labels.json is a class like any other, with a channel of its own (as in the paper); one
outside them, often 255, belongs to no class, and the network sees no label there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor

from spmdeploy.datasets.masks import FIRST_THING_ID, MASK_KINDS, connected_components, random_mask
from spmdeploy.errors import InputError
from spmdeploy.imaging import files as images
from spmdeploy.inputs import regular_file
from spmdeploy.labels import ClassTable, check_labels, class_table
from spmdeploy.serialization import parse_json
from spmdeploy.types import Image, Mask

INSTANCE_FOLDERS = ("inst_map", "inst_map_cc")
"""Annotated instances, or ones derived from connected components; the first that exists is read."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
CACHE_BYTES = 4 << 30
"""Images beyond this are read again each time: all of ADE20K would take 14 GB in every process."""
MAX_SCALE = 8
"""A crop enlarged further is a few pixels wide."""


@dataclass(frozen=True)
class ExtraData:
    """A second data folder whose classes are mapped onto those of the first."""

    root: str
    """Folder in the same layout as the main one."""
    share: float
    """Part of all training samples that come from this folder, 0 to 1."""
    rename: dict[str, str] = field(default_factory=dict)
    """Its class name -> the main folder's class name, for those that differ."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are cut."""

    root: str
    """Folder with train/{images,labels,inst_map|inst_map_cc} and labels.json."""
    extra: tuple[ExtraData, ...] = ()
    """Further folders to mix in."""
    crop: int = 256
    """Side of the square that the network sees; a multiple of 128."""
    min_scale: float = 1.0
    """Crops come from squares of crop/scale pixels, scale drawn from here to `max_scale`; 1 in the paper."""
    max_scale: float = 1.0
    """Above 1 the network also sees enlarged images, as its last stage does where it refines large ones."""
    color_jitter: float = 0.0
    """Brightness, tint and contrast of training photos change by factors up to e to this power, so that colors must be
    inferred from the known pixels instead of being memorized for each class; 0 in the paper."""
    mask_kinds: tuple[str, ...] = tuple(MASK_KINDS)
    """Keys of `MASK_KINDS`, one drawn for each sample."""
    validation: int = 32
    """Training images held out for validation, in blocks of neighbors (frames of a film are near duplicates)."""
    validation_blocks: int = 8
    """Number of such blocks, spread evenly over the sorted names; the neighbors of a block are not used at all."""

    def __post_init__(self) -> None:
        require(self.crop > 0 and self.crop % 128 == 0, "data.crop", self.crop, "a multiple of 128")
        require(self.min_scale > 0, "data.min_scale", self.min_scale, "more than 0")
        require(
            self.min_scale <= self.max_scale <= MAX_SCALE,
            "data.max_scale",
            self.max_scale,
            f"from data.min_scale, {self.min_scale}, to {MAX_SCALE}",
        )
        require(0 <= self.color_jitter <= 1, "data.color_jitter", self.color_jitter, "in [0, 1]")
        require(bool(self.mask_kinds), "data.mask_kinds", self.mask_kinds, "at least one kind")
        for kind in self.mask_kinds:
            require(kind in MASK_KINDS, "data.mask_kinds", kind, f"kinds among {', '.join(MASK_KINDS)}")
        require(self.validation >= 0, "data.validation", self.validation, "zero or more images")
        require(self.validation_blocks >= 1, "data.validation_blocks", self.validation_blocks, "at least one block")


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
class Sample:
    """A square cut from an image, with its mask."""

    image: Image
    """uint8 (S, S, 3), RGB."""
    labels: NDArray[np.uint8]
    """uint8 (S, S), class ids."""
    instances: NDArray[np.int32]
    """int32 (S, S), instance ids."""
    mask: Mask
    """bool (S, S), True = edit."""


@dataclass(frozen=True)
class Batch:
    """Samples as tensors for the networks."""

    image: Tensor
    """float32 (N, 3, S, S), RGB in [-1, 1]."""
    labels: Tensor
    """uint8 (N, S, S)."""
    instances: Tensor
    """int32 (N, S, S)."""
    mask: Tensor
    """float32 (N, 1, S, S), 1 = edit."""

    def to(self, device: torch.device) -> Batch:
        """Copies the batch to a device."""
        return Batch(self.image.to(device), self.labels.to(device), self.instances.to(device), self.mask.to(device))


@dataclass(frozen=True)
class HostBatch:
    """Samples stacked on the host, in bytes: a quarter of the float tensors' size on the way to a GPU."""

    image: Tensor
    """uint8 (N, S, S, 3), RGB."""
    labels: Tensor
    """uint8 (N, S, S)."""
    instances: Tensor
    """int32 (N, S, S)."""
    mask: Tensor
    """bool (N, S, S), True = edit."""

    def pin(self) -> HostBatch:
        """Moves the batch to page-locked memory, from which copies to a GPU run in the background."""
        parts = (self.image, self.labels, self.instances, self.mask)
        return HostBatch(*(part.pin_memory() for part in parts))

    def to(self, device: torch.device) -> Batch:
        """Copies the bytes to `device` and normalizes them there."""
        image, labels, instances, mask = (
            part.to(device, non_blocking=True) for part in (self.image, self.labels, self.instances, self.mask)
        )
        normalized = image.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        return Batch(normalized, labels, instances, mask.float()[:, None])


@dataclass(frozen=True)
class InstanceRules:
    """What labels.json says about instances."""

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


class TrainingSamples:
    """The endless sequence of training samples, each a pure function of (seed, position).

    Args:
        config: The folders, crops and mask kinds.
        seed: Fixes order, crops and masks.

    Raises:
        InputError: A folder cannot be used, or its classes have no counterpart in the main one.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        root = Path(config.root)
        self.classes = read_classes(root)
        self._rules = read_instance_rules(root)
        main = ImageFolder(root, "train", self.classes, self._rules)
        training, self.validation_names = split_validation(main.names, config.validation, config.validation_blocks)
        self._main = [(main, name) for name in training]
        self._extra = [self._open_extra(index) for index in range(len(config.extra))]
        self._per_epoch = [
            min(len(available), round(len(self._main) * extra.share / (1 - self._extra_share())))
            for extra, available in zip(config.extra, self._extra, strict=True)
        ]
        self.epoch_length = len(self._main) + sum(self._per_epoch)
        self._order: tuple[int, list[tuple[ImageFolder, str]]] | None = None
        self._validation = [main[name] for name in self.validation_names]

    def at(self, position: int) -> Sample:
        """Draws sample number `position` of the run, counted from 0."""
        epoch, index = divmod(position, self.epoch_length)
        folder, name = self._epoch(epoch)[index]
        return self._draw(folder[name], np.random.default_rng((self._seed, 1, epoch, index)))

    def batch(self, positions: range) -> Batch:
        """The samples at these positions, on the CPU."""
        return self.host_batch(positions).to(torch.device("cpu"))

    def host_batch(self, positions: range) -> HostBatch:
        """The samples at these positions, in bytes. May be called from several threads."""
        return stack_samples([self.at(position) for position in positions])

    def validation_samples(self) -> list[Sample]:
        """One sample for each held-out image: a fixed crop, the mask kinds in turn."""
        samples = []
        kinds = self._config.mask_kinds
        for index, annotated in enumerate(self._validation):
            rng = np.random.default_rng((self._seed, 2, index))
            cut = random_crop(annotated, self._config.crop, 1.0, False, rng)
            samples.append(with_random_mask(cut, kinds[index % len(kinds)], len(self.classes), rng))
        return samples

    def _draw(self, annotated: AnnotatedImage, rng: np.random.Generator) -> Sample:
        scale = float(rng.uniform(self._config.min_scale, self._config.max_scale))
        cut = random_crop(annotated, self._config.crop, scale, bool(rng.integers(2)), rng)
        if self._config.color_jitter:
            cut = replace(cut, image=jitter_color(cut.image, self._config.color_jitter, rng))
        kind = self._config.mask_kinds[int(rng.integers(len(self._config.mask_kinds)))]
        return with_random_mask(cut, kind, len(self.classes), rng)

    def _epoch(self, epoch: int) -> list[tuple[ImageFolder, str]]:
        order = self._order  # read once: another thread may replace it
        if order is None or order[0] != epoch:
            rng = np.random.default_rng((self._seed, 0, epoch))
            chosen = list(self._main)
            for count, extra in zip(self._per_epoch, self._extra, strict=True):
                chosen += [extra[index] for index in rng.choice(len(extra), count, replace=False)]
            order = epoch, [chosen[index] for index in rng.permutation(len(chosen))]
            self._order = order
        return order[1]

    def _extra_share(self) -> float:
        share = sum(extra.share for extra in self._config.extra)
        if not 0 <= share < 1:
            raise InputError(f"the shares of the extra data folders add up to {share}, expected less than 1")
        return share

    def _open_extra(self, index: int) -> list[tuple[ImageFolder, str]]:
        extra = self._config.extra[index]
        root = Path(extra.root)
        table = read_classes(root)
        renumber = {}
        for label in table.classes:
            target = extra.rename.get(label.name, label.name)
            matches = [known.id for known in self.classes.classes if known.name == target]
            if not matches:
                raise InputError(
                    f"{root}/labels.json: class {label.name!r} has no counterpart named {target!r}",
                    "name one for it in the extra folder's `rename`",
                )
            renumber[label.id] = matches[0]
        folder = ImageFolder(root, "train", table, self._rules, renumber)
        return [(folder, name) for name in folder.names]


def split_validation(names: tuple[str, ...], count: int, blocks: int) -> tuple[list[str], list[str]]:
    """Holds out `count` images in `blocks` runs of neighbors, spread evenly over the sorted names.

    Returns:
        Training names and validation names. The images next to a run are in neither: consecutive frames of a film show
        nearly the same.

    Raises:
        InputError: No image is left for training.
    """
    if not count:
        return list(names), []
    length = -(-count // blocks)
    held: set[int] = set()
    for block in range(blocks):
        start = round((block + 0.5) * len(names) / blocks - length / 2)
        held.update(range(max(0, start), min(len(names), start + length)))
    chosen = sorted(held)[:count]
    near = {index + step for index in chosen for step in (-1, 0, 1)}
    training = [name for index, name in enumerate(names) if index not in near]
    if not training:
        raise InputError(f"{len(names)} images are too few to hold {count} out", "lower data.validation")
    return training, [names[index] for index in chosen]


def random_crop(
    annotated: AnnotatedImage, side: int, scale: float, flip: bool, rng: np.random.Generator
) -> AnnotatedImage:
    """Cuts a random square of side/scale pixels, at most the image's shorter side, and resizes it to `side` pixels."""
    height, width = annotated.labels.shape
    source = min(round(side / scale), height, width)
    top, left = int(rng.integers(0, height - source + 1)), int(rng.integers(0, width - source + 1))
    rows, columns = slice(top, top + source), slice(left, left + source)
    image, labels, instances = annotated.image[rows, columns], annotated.labels[rows, columns], annotated.instances
    instances = instances[rows, columns]
    if source != side:
        nearest = ((np.arange(side) + 0.5) * source / side).astype(np.intp)
        image = np.asarray(PilImage.fromarray(image).resize((side, side), PilImage.Resampling.BILINEAR))
        labels, instances = (part.take(nearest, axis=0).take(nearest, axis=1) for part in (labels, instances))
    if flip:
        image, labels, instances = image[:, ::-1], labels[:, ::-1], instances[:, ::-1]
    return AnnotatedImage(image, labels, instances)


def jitter_color(image: Image, strength: float, rng: np.random.Generator) -> Image:
    """Changes the light of a photo: one gamma, one gain for all channels, and a tint of a third of their strength.

    Args:
        image: uint8 (H, W, 3), RGB.
        strength: The factors are e to the power of up to this, in either direction.
        rng: Fixes the result.
    """
    gamma = np.exp(rng.uniform(-strength, strength))
    gains = np.exp(rng.uniform(-strength, strength) + rng.uniform(-strength / 3, strength / 3, 3))
    curves = np.clip(255 * gains * (np.arange(256)[:, None] / 255) ** gamma, 0, 255).round().astype(np.uint8)
    mapped = PilImage.fromarray(image).point(curves.T.ravel().tolist())  # in C, without the interpreter lock
    return np.asarray(mapped)


def with_random_mask(cut: AnnotatedImage, kind: str, classes: int, rng: np.random.Generator) -> Sample:
    """Adds a mask of a kind of `MASK_KINDS` to a square. classes: number of classes of the data folder."""
    mask = random_mask(kind, cut.labels, cut.instances, classes, rng)
    return Sample(cut.image, cut.labels, cut.instances, mask)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples to a batch on the CPU."""
    return stack_samples(samples).to(torch.device("cpu"))


def stack_samples(samples: Sequence[Sample]) -> HostBatch:
    """Stacks samples in bytes."""
    return HostBatch(
        image=torch.from_numpy(np.stack([sample.image for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        instances=torch.from_numpy(np.stack([sample.instances for sample in samples])),
        mask=torch.from_numpy(np.stack([sample.mask for sample in samples])),
    )


def read_classes(root: Path) -> ClassTable:
    """Reads the class table in ROOT/labels.json. Raises InputError."""
    path = root / "labels.json"
    if not path.exists():
        raise InputError(f"{root} is no data folder: there is no {path}", "docs/training.md shows its layout")
    return class_table(path)


def read_instance_rules(root: Path) -> InstanceRules:
    """Reads `thing_ids` and `instances` ("numbered") of ROOT/labels.json, both optional. Raises InputError."""
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
