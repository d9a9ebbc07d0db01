"""Training samples from folders ROOT/{train,test}/{images,labels,inst_map|inst_map_cc} with a labels.json.

Void pixels are the folder's choice: a `void_id` among the ids of labels.json is a class like any other, with a channel
of its own (as in the paper); one outside them, often 255, belongs to no class, and the network sees no label there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from spmdeploy.datasets.config import DataConfig, MaskKind
from spmdeploy.datasets.masks import THING_ID, Mask, connected_components, random_mask
from spmdeploy.errors import InputError
from spmdeploy.imaging import files as images
from spmdeploy.inputs import regular_file
from spmdeploy.labels import ClassTable, class_table
from spmdeploy.serialization import parse_json

INSTANCE_FOLDERS = ("inst_map", "inst_map_cc")
"""Annotated instances, or ones derived from connected components; the first that exists is read."""


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")

KEPT_BYTES = 4 << 30
"""Pictures beyond this many bytes are read anew each time: all of ADE20K would take 14 GB in every process."""


@dataclass(frozen=True)
class AnnotatedImage:
    """One annotated photo, whole."""

    image: npt.NDArray[np.uint8]
    """(H, W, 3) RGB."""
    labels: npt.NDArray[np.uint8]
    """(H, W)."""
    instances: npt.NDArray[np.int32]
    """(H, W)."""


@dataclass(frozen=True)
class Sample:
    """A square cut from a picture, with its hole."""

    image: npt.NDArray[np.uint8]
    """(S, S, 3) RGB."""
    labels: npt.NDArray[np.uint8]
    """(S, S)."""
    instances: npt.NDArray[np.int32]
    """(S, S)."""
    mask: Mask
    """(S, S), True = edit."""


@dataclass(frozen=True)
class Batch:
    """Samples as tensors."""

    image: Tensor
    """float (N, 3, S, S) RGB in [-1, 1]."""
    labels: Tensor
    """uint8 (N, S, S)."""
    instances: Tensor
    """int32 (N, S, S)."""
    mask: Tensor
    """float (N, 1, S, S), 1 = edit."""

    def to(self, device: torch.device) -> Batch:
        return Batch(self.image.to(device), self.labels.to(device), self.instances.to(device), self.mask.to(device))


@dataclass(frozen=True)
class HostBatch:
    """Samples stacked on the host, in bytes: a quarter of the float tensors' size on the way to a GPU."""

    image: Tensor
    """uint8 (N, S, S, 3) RGB."""
    labels: Tensor
    """uint8 (N, S, S)."""
    instances: Tensor
    """int32 (N, S, S)."""
    mask: Tensor
    """bool (N, S, S), True = edit."""

    def pin(self) -> HostBatch:
        """In page-locked memory, from which copies to a GPU run in the background."""
        parts = (self.image, self.labels, self.instances, self.mask)
        return HostBatch(*(part.pin_memory() for part in parts))

    def to(self, device: torch.device) -> Batch:
        """On `device`, normalized there."""
        image, labels, instances, mask = (
            part.to(device, non_blocking=True) for part in (self.image, self.labels, self.instances, self.mask)
        )
        return Batch(
            image.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1, labels, instances, mask.float()[:, None]
        )


class ImageFolder:
    """The pictures of one split, read on demand and kept in memory while there is room (see `KEPT_BYTES`).

    root: the data folder. split: train or test. rules: how to read instances.
    renumber: this folder's class id -> the model's, or None to keep ids.
    """

    def __init__(self, root: Path, split: str, rules: InstanceRules, renumber: Mapping[int, int] | None = None) -> None:
        self._folder = root / split
        self._rules = rules
        self._renumbered = None if renumber is None else _lookup(renumber)
        self._images = _files_by_stem(self._folder / "images")
        self._labels = _files_by_stem(self._folder / "labels")
        self._instances = _instance_files(self._folder)
        missing = sorted(self._images.keys() - self._labels.keys())
        if missing:
            raise InputError(f"{self._folder}: {len(missing)} images have no label map, the first is {missing[0]}")
        self.names = tuple(sorted(self._images))
        self._kept: dict[str, AnnotatedImage] = {}
        self._kept_bytes = 0

    def __getitem__(self, name: str) -> AnnotatedImage:
        if name in self._kept:
            return self._kept[name]
        picture = self._load(name)
        self._kept_bytes += picture.image.nbytes + picture.labels.nbytes + picture.instances.nbytes
        if self._kept_bytes <= KEPT_BYTES:
            self._kept[name] = picture
        return picture

    def _load(self, name: str) -> AnnotatedImage:
        image = images.read_photo(self._images[name]).pixels
        labels = images.read_labels(self._labels[name])
        _check_size(self._labels[name], labels, image)
        if self._renumbered is not None:
            labels = self._renumbered[labels]
        if name in self._instances and self._renumbered is None:
            instances = images.read_instances(self._instances[name])
            _check_size(self._instances[name], instances, image)
            if self._rules.numbered:
                instances = np.where(instances > 0, labels * np.int32(THING_ID) + instances, labels).astype(np.int32)
        else:
            instances = connected_components(labels, self._rules.thing_ids)
        return AnnotatedImage(image, labels, instances)


class TrainingSamples:
    """The endless sequence of training samples, each a pure function of (seed, position)."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        root = Path(config.root)
        self.classes = read_classes(root)
        self._rules = read_instance_rules(root)
        main = ImageFolder(root, "train", self._rules)
        kept, self.validation_names = split_validation(main.names, config.validation, config.validation_blocks)
        self._main = [(main, name) for name in kept]
        self._extra = [self._open_extra(index) for index in range(len(config.extra))]
        self._per_epoch = [
            min(len(pictures), round(len(self._main) * extra.share / (1 - self._extra_share())))
            for extra, pictures in zip(config.extra, self._extra, strict=True)
        ]
        self.epoch_length = len(self._main) + sum(self._per_epoch)
        self._order: tuple[int, list[tuple[ImageFolder, str]]] | None = None
        self._validation = [main[name] for name in self.validation_names]

    def at(self, position: int) -> Sample:
        """Sample number `position` of the run, counted from 0."""
        epoch, index = divmod(position, self.epoch_length)
        folder, name = self._epoch(epoch)[index]
        return self._draw(folder[name], np.random.default_rng((self._seed, 1, epoch, index)))

    def batch(self, positions: range) -> Batch:
        return self.host_batch(positions).to(torch.device("cpu"))

    def host_batch(self, positions: range) -> HostBatch:
        """The samples at these positions. May be called from several threads."""
        return stack_samples([self.at(position) for position in positions])

    def validation_samples(self) -> list[Sample]:
        """One sample for each held-out picture: a fixed crop, the kinds of holes in turn."""
        samples = []
        for index, picture in enumerate(self._validation):
            rng = np.random.default_rng((self._seed, 2, index))
            kind = self._config.holes[index % len(self._config.holes)]
            cut = random_crop(picture, self._config.crop, 1.0, False, rng)
            samples.append(with_random_mask(cut, kind, len(self.classes), rng))
        return samples

    def _draw(self, picture: AnnotatedImage, rng: np.random.Generator) -> Sample:
        scale = float(rng.uniform(self._config.smallest_scale, self._config.largest_scale))
        cut = random_crop(picture, self._config.crop, scale, bool(rng.integers(2)), rng)
        if self._config.relighting:
            cut = replace(cut, image=jitter_color(cut.image, self._config.relighting, rng))
        kind = self._config.holes[int(rng.integers(len(self._config.holes)))]
        return with_random_mask(cut, kind, len(self.classes), rng)

    def _epoch(self, epoch: int) -> list[tuple[ImageFolder, str]]:
        order = self._order  # read once: another thread may replace it
        if order is None or order[0] != epoch:
            rng = np.random.default_rng((self._seed, 0, epoch))
            pictures = list(self._main)
            for count, extra in zip(self._per_epoch, self._extra, strict=True):
                pictures += [extra[index] for index in rng.choice(len(extra), count, replace=False)]
            order = epoch, [pictures[index] for index in rng.permutation(len(pictures))]
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
        renumber = {}
        for label in read_classes(root).classes:
            target = extra.rename.get(label.name, label.name)
            matches = [known.id for known in self.classes.classes if known.name == target]
            if not matches:
                raise InputError(
                    f"{root}/labels.json: class {label.name!r} has no counterpart named {target!r}",
                    "name one for it in the extra folder's `rename`",
                )
            renumber[label.id] = matches[0]
        folder = ImageFolder(root, "train", self._rules, renumber)
        return [(folder, name) for name in folder.names]


def split_validation(names: tuple[str, ...], count: int, blocks: int) -> tuple[list[str], list[str]]:
    """(training names, validation names): `blocks` runs of neighbors held out, spread evenly over the sorted names.

    The pictures next to a run are in neither list: consecutive frames of a film show nearly the same thing.
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
        raise InputError(f"{len(names)} pictures are too few to hold {count} out", "lower data.validation")
    return training, [names[index] for index in chosen]


def random_crop(
    picture: AnnotatedImage, side: int, scale: float, flip: bool, rng: np.random.Generator
) -> AnnotatedImage:
    """A random square of side/scale pixels, at most the picture's shorter side, brought to `side` pixels."""
    height, width = picture.labels.shape
    source = min(round(side / scale), height, width)
    top, left = int(rng.integers(0, height - source + 1)), int(rng.integers(0, width - source + 1))
    rows, columns = slice(top, top + source), slice(left, left + source)
    image, labels, instances = picture.image[rows, columns], picture.labels[rows, columns], picture.instances
    instances = instances[rows, columns]
    if source != side:
        nearest = ((np.arange(side) + 0.5) * source / side).astype(np.intp)
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        labels, instances = (part.take(nearest, axis=0).take(nearest, axis=1) for part in (labels, instances))
    if flip:
        image, labels, instances = image[:, ::-1], labels[:, ::-1], instances[:, ::-1]
    return AnnotatedImage(image, labels, instances)


def jitter_color(image: npt.NDArray[np.uint8], strength: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The photo under another light: one gamma, one gain for all channels, and a tint of a third of their strength.

    image: uint8 (H, W, 3) RGB. strength: the factors are e to the power of up to this, in either direction.
    """
    gamma = np.exp(rng.uniform(-strength, strength))
    gains = np.exp(rng.uniform(-strength, strength) + rng.uniform(-strength / 3, strength / 3, 3))
    curves = np.clip(255 * gains * (np.arange(256)[:, None] / 255) ** gamma, 0, 255).round().astype(np.uint8)
    table = Image.fromarray(image).point(curves.T.ravel().tolist())  # in C, without Python's lock
    return np.asarray(table)


def with_random_mask(cut: AnnotatedImage, kind: MaskKind, classes: int, rng: np.random.Generator) -> Sample:
    """The square with a hole of that kind. classes: how many the data folder has."""
    mask = random_mask(kind, cut.labels, cut.instances, classes, rng)
    return Sample(cut.image, cut.labels, cut.instances, mask)


def collate(samples: Sequence[Sample]) -> Batch:
    return stack_samples(samples).to(torch.device("cpu"))


def stack_samples(samples: Sequence[Sample]) -> HostBatch:
    return HostBatch(
        image=torch.from_numpy(np.stack([sample.image for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        instances=torch.from_numpy(np.stack([sample.instances for sample in samples])),
        mask=torch.from_numpy(np.stack([sample.mask for sample in samples])),
    )


@dataclass(frozen=True)
class InstanceRules:
    """What labels.json says about instances."""

    thing_ids: tuple[int, ...] = ()
    """Classes whose pieces are countable things, for pictures without an instance map."""
    numbered: bool = False
    """Maps hold 0 = none, 1, 2, 3 ... whatever the class (ADE20K), not class * 1000 + number (Cityscapes)."""


def read_classes(root: Path) -> ClassTable:
    """The class table in ROOT/labels.json. Raises InputError."""
    path = root / "labels.json"
    if not path.exists():
        raise InputError(
            f"{root} is no data folder: there is no {path}", "docs/training.md shows what belongs into one"
        )
    return class_table(path)


def read_instance_rules(root: Path) -> InstanceRules:
    """`thing_ids` and `instances` ("numbered") of ROOT/labels.json, both optional. Raises InputError."""
    path = root / "labels.json"
    try:
        fields = parse_json(regular_file(path).read_bytes())
        things = tuple(int(value) for value in fields.get("thing_ids", ()))
        style = fields.get("instances")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no usable list of thing_ids: {error}") from error
    if style not in (None, "numbered"):
        raise InputError(f'{path}: instances is {style!r}, expected "numbered" or nothing')
    return InstanceRules(things, style == "numbered")


def _check_size(path: Path, values: npt.NDArray[np.generic], image: npt.NDArray[np.uint8]) -> None:
    if values.shape != image.shape[:2]:
        raise InputError(
            f"{path} is {values.shape[1]}×{values.shape[0]}, its image is {image.shape[1]}×{image.shape[0]}",
            "find all such files with `spmdeploy dataset check`",
        )


def _lookup(renumber: Mapping[int, int]) -> npt.NDArray[np.uint8]:
    table = np.full(256, 255, np.uint8)
    for old, new in renumber.items():
        table[old] = new
    return table


def _files_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", "expected ROOT/{train,test}/{images,labels}")
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES}


def _instance_files(folder: Path) -> dict[str, Path]:
    for name in INSTANCE_FOLDERS:
        if (folder / name).is_dir():
            return _files_by_stem(folder / name)
    return {}
