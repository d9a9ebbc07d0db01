"""Random edit masks of the five kinds that the paper trains on. Pure functions of their generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from spmdeploy.datasets.config import MASK_KINDS, MaskKind

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
Instances = npt.NDArray[np.int32]

THING_ID = 1000
"""Cityscapes: instance ids from here on are countable things (class * 1000 + number)."""
SMALLEST_HOLE = 256
"""Pixels (16 × 16 of a 256 × 256 crop): a hole with fewer teaches nothing, brush strokes take its place."""


def random_mask(
    kind: MaskKind,
    labels: Labels,
    instances: Instances,
    classes: int,
    rng: np.random.Generator,
) -> Mask:
    """A mask of `kind`, True = edit; brush strokes where the picture has nothing for that kind.

    labels: uint8 (H, W), ids from `classes` on are no class. instances: int32 (H, W), ids below 1000 are not things.
    Returns bool (H, W), neither empty nor full.
    """
    mask = _MAKERS[kind](labels, instances, classes, rng)
    if mask is None or np.count_nonzero(mask) < min(SMALLEST_HOLE, mask.size // 4) or mask.all():
        mask = brush_strokes(labels.shape[0], labels.shape[1], rng)
    return mask


def brush_strokes(height: int, width: int, rng: np.random.Generator) -> Mask:
    """A brush stroke of 4-8 vertices, 50-140 pixels wide at 256 pixels, round at the joints."""
    scale = min(height, width) / 256
    count = int(rng.integers(4, 9))
    thickness = max(2, round(int(rng.integers(50, 141)) * scale))
    # The walk of free-form inpainting masks: turns of about 2π/5 to and fro, steps of a quarter of the picture.
    angles = np.cumsum(rng.uniform(np.pi * 4 / 15, np.pi * 8 / 15, count)) * rng.choice((-1, 1))
    angles = np.where(np.arange(count) % 2 == 0, 2 * np.pi - angles, angles)
    lengths = np.clip(rng.normal(height / 4, height / 8, count), 0, height / 2)
    x = [float(rng.uniform(0, width))]
    y = [float(rng.uniform(0, height))]
    for angle, length in zip(angles, lengths, strict=True):
        x.append(float(np.clip(x[-1] + length * np.cos(angle), 0, width)))
        y.append(float(np.clip(y[-1] + length * np.sin(angle), 0, height)))
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    points = list(zip(x, y, strict=True))
    draw.line(points, fill=255, width=thickness)
    for px, py in points:
        draw.circle((px, py), thickness / 2, fill=255)
    mask = np.asarray(canvas) > 0
    if mask.all():
        mask = mask.copy()
        mask[:, : max(1, width // 4)] = False
    return mask


def _strokes(labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask:
    return brush_strokes(labels.shape[0], labels.shape[1], rng)


def _extension(labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask:
    """The right half."""
    mask = np.zeros(labels.shape, bool)
    mask[:, labels.shape[1] // 2 :] = True
    return mask


def _outpainting(labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask:
    """Everything but a box of half the side (128 of 256) at a random place."""
    height, width = labels.shape
    box_height, box_width = height // 2, width // 2
    top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
    mask = np.ones(labels.shape, bool)
    mask[top : top + box_height, left : left + box_width] = False
    return mask


def _class(labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask | None:
    """All pixels of one random class among those that cover enough to be edited."""
    counts = np.bincount(labels.ravel())  # ten times as fast as np.unique, which sorts
    ids = np.flatnonzero(counts)
    counts = counts[ids]
    ids = ids[(ids < classes) & (counts >= min(SMALLEST_HOLE, labels.size // 4)) & (counts < labels.size)]
    return labels == rng.choice(ids) if ids.size else None


def _instance(labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask | None:
    """The bounding box of one random thing."""
    ids, counts = np.unique(instances[instances >= THING_ID], return_counts=True)
    ids = ids[counts >= SMALLEST_HOLE // 4]
    if not ids.size:
        return None
    rows, columns = np.nonzero(instances == rng.choice(ids))
    mask = np.zeros(labels.shape, bool)
    mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return mask


_MAKERS = {
    "strokes": _strokes,
    "extension": _extension,
    "outpainting": _outpainting,
    "class": _class,
    "instance": _instance,
}
assert tuple(_MAKERS) == MASK_KINDS


def connected_components(labels: npt.NDArray[np.uint8], thing_ids: Sequence[int]) -> npt.NDArray[np.int32]:
    """Instances for a picture without any: the 8-connected pieces of the thing classes, numbered class * 1000 + k.

    labels: uint8 (H, W). Returns int32 (H, W), elsewhere the class id.
    """
    instances = labels.astype(np.int32)
    for thing in thing_ids:
        pieces = _pieces(labels == thing)
        instances = np.where(pieces > 0, thing * THING_ID + pieces - 1, instances)
    return instances.astype(np.int32)


def _pieces(region: Mask) -> npt.NDArray[np.int32]:
    """8-connected pieces of `region`, numbered from 1 in reading order; 0 outside. bool (H, W) to int32 (H, W).

    Each pixel starts with its own number and takes the smallest among its neighbors, then jumps to its number's number
    (pointer doubling), until nothing changes: a logarithmic number of rounds for round pieces.
    """
    height, width = region.shape
    own = np.arange(1, height * width + 1, dtype=np.int64).reshape(height, width)
    number = np.where(region, own, 0)
    while True:
        padded = np.pad(np.where(region, number, own.size + 1), 1, constant_values=own.size + 1)
        smallest = np.minimum.reduce([padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)])
        smallest = np.where(region, smallest, 0)
        root = np.concatenate(([0], smallest.ravel()))
        smallest = np.where(region, root[smallest], 0)
        if np.array_equal(smallest, number):
            break
        number = smallest
    found = np.unique(number[region])
    return np.where(region, np.searchsorted(found, number) + 1, 0).astype(np.int32)
