"""Builds the data layout from the official downloads of Cityscapes and ADE20K, at the paper's sizes.

Several pictures at a time, and resumable: what is complete already is not made again, and every file appears whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from spmdeploy import images
from spmdeploy.errors import InputError
from spmdeploy.labels import class_table

Source = Literal["cityscapes", "ade20k"]

CITYSCAPES_SIZE = (256, 512)
"""(height, width) of every prepared Cityscapes picture (paper, section 4)."""
ADE20K_LONGER, ADE20K_SHORTER = 384, 256
"""ADE20K: the longer side at most, the shorter at least; the shorter wins for a picture too narrow for both."""

# Cityscapes classes with instances: person, rider, car, truck, bus, caravan, trailer, train, motorcycle, bicycle.
CITYSCAPES_THINGS = tuple(range(24, 34))


@dataclass(frozen=True)
class Job:
    """One picture to prepare."""

    source: Source
    image: Path
    labels: Path
    instances: Path | None
    stem: str
    destination: Path
    """The split's folder."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did."""

    made: int
    kept: int
    """Complete from an earlier run."""


def prepare(source: Source, root: Path, destination: Path, processes: int | None = None) -> Prepared:
    """Writes DESTINATION/{train,test}/{images,labels,inst_map} and labels.json.

    root: for cityscapes the folder of leftImg8bit and gtFine (train and val, with _labelIds and _instanceIds); for
    ade20k that of images and annotations (training and validation), with annotations_instance if there is one.
    The official validation split becomes test. Raises InputError naming what is missing or damaged.
    """
    jobs = _FINDERS[source](root, destination)
    if not jobs:
        raise InputError(f"{root} holds no pictures of {source}", _HINTS[source])
    for split in ("train", "test"):
        for kind in ("images", "labels", "inst_map"):
            (destination / split / kind).mkdir(parents=True, exist_ok=True)
    _write_class_table(source, destination)
    left = [job for job in jobs if not _complete(job)]
    with ProcessPoolExecutor(processes) as pool:
        for _ in pool.map(_prepare_one, left, chunksize=4):
            pass
    return Prepared(made=len(left), kept=len(jobs) - len(left))


def ade20k_size(height: int, width: int) -> tuple[int, int]:
    """The size that an ADE20K picture of this size is brought to."""
    scale = min(1.0, ADE20K_LONGER / max(height, width))
    scale = max(scale, ADE20K_SHORTER / min(height, width))
    return round(height * scale), round(width * scale)


def _find_cityscapes(root: Path, destination: Path) -> list[Job]:
    jobs = []
    for split, target in (("train", "train"), ("val", "test")):
        for image in sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
            stem = image.name.removesuffix("_leftImg8bit.png")
            truth = root / "gtFine" / split / image.parent.name
            labels, instances = (truth / f"{stem}_gtFine_{kind}.png" for kind in ("labelIds", "instanceIds"))
            jobs.append(Job("cityscapes", image, labels, instances, stem, destination / target))
    return jobs


def _find_ade20k(root: Path, destination: Path) -> list[Job]:
    jobs = []
    with_instances = (root / "annotations_instance").is_dir()
    for split, target in (("training", "train"), ("validation", "test")):
        for image in sorted((root / "images" / split).glob("*.jpg")):
            labels = root / "annotations" / split / f"{image.stem}.png"
            instances = root / "annotations_instance" / split / f"{image.stem}.png" if with_instances else None
            jobs.append(Job("ade20k", image, labels, instances, image.stem, destination / target))
    return jobs


_FINDERS: dict[Source, Callable[[Path, Path], list[Job]]] = {"cityscapes": _find_cityscapes, "ade20k": _find_ade20k}
_HINTS: dict[Source, str] = {
    "cityscapes": "expected leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine beside it",
    "ade20k": "expected images/{training,validation}/*.jpg and annotations beside it (SceneParsing)",
}


def _outputs(job: Job) -> dict[str, Path]:
    kinds = ("images", "labels") if job.instances is None else ("images", "labels", "inst_map")
    return {kind: job.destination / kind / f"{job.stem}.png" for kind in kinds}


def _complete(job: Job) -> bool:
    return all(path.exists() for path in _outputs(job).values())


def _prepare_one(job: Job) -> None:
    outputs = _outputs(job)
    photo, labels = images.read_photo(job.image).pixels, images.read_labels(job.labels)
    _same_size(job.labels, labels, photo)
    height, width = CITYSCAPES_SIZE if job.source == "cityscapes" else ade20k_size(*labels.shape)
    images.write_picture(outputs["images"], images.resize_photo(photo, height, width), overwrite=True)
    images.write_picture(outputs["labels"], images.resize_labels(labels, height, width), overwrite=True)
    if job.instances is not None:
        instances = images.read_instances(job.instances)
        _same_size(job.instances, instances, photo)
        _write_instances(outputs["inst_map"], images.resize_labels(instances, height, width))


def _same_size(path: Path, values: npt.NDArray[np.generic], photo: npt.NDArray[np.uint8]) -> None:
    if values.shape != photo.shape[:2]:
        raise InputError(
            f"{path} is {values.shape[1]}×{values.shape[0]}, its image is {photo.shape[1]}×{photo.shape[0]}",
            "download it again",
        )


def _write_instances(path: Path, instances: npt.NDArray[np.int32]) -> None:
    """A 16-bit PNG, atomically."""
    staging = path.with_name(f".{path.name}.incoming")
    Image.fromarray(instances.astype(np.uint16)).save(staging, format="PNG")
    os.replace(staging, path)


def _write_class_table(source: Source, destination: Path) -> None:
    """labels.json: every id a class like any other, void included, as in the paper."""
    table = class_table(source)
    fields: dict[str, object] = {
        "dataset": source,
        "void_id": table.void_id,
        "thing_ids": CITYSCAPES_THINGS if source == "cityscapes" else (),
        "labels": table.to_json()["classes"],
    }
    # ADE20K numbers instances 1, 2, 3 within a picture whatever their class; Cityscapes has class * 1000 + number.
    if source == "ade20k":
        fields["instances"] = "numbered"
    staging = destination / ".labels.json.incoming"
    staging.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, destination / "labels.json")
