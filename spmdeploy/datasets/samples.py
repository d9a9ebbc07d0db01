"""Draws training samples from labeled folders: random crops with color jitter and masks, stacked to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor

from spmdeploy.datasets.folder import AnnotatedImage, ImageFolder, read_classes, read_instance_rules, require
from spmdeploy.datasets.masks import MASK_KINDS, random_mask
from spmdeploy.errors import InputError
from spmdeploy.types import Image, Mask

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
    """Cuts a random square of side/scale pixels, at most the image's shorter side, and resizes it to `side` pixels.

    Args:
        annotated: The image to cut from.
        side: Height and width of the result, in pixels.
        scale: Above 1 the image is enlarged, below 1 the crop covers more of it.
        flip: Mirror the crop.
        rng: Chooses the position.
    """
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
    """Adds a mask to a square.

    Args:
        cut: A square crop.
        kind: A key of `MASK_KINDS`.
        classes: Number of classes of the data folder.
        rng: Draws the mask.
    """
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
