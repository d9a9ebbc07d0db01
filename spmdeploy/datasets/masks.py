"""Random edit masks of the kinds that the paper trains on, and the registry `MASK_KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from spmdeploy.types import Mask

Labels = NDArray[np.uint8]
Instances = NDArray[np.int32]
MaskFunction: TypeAlias = "Callable[[Labels, Instances, int, np.random.Generator], Mask | None]"
"""Takes labels uint8 (H, W), instances int32 (H, W), the number of classes and a generator, which alone may make the
result random. Returns bool (H, W), True = edit, or None where the image has no region of the kind."""

FIRST_THING_ID = 1000
"""Cityscapes: instance ids from here on are countable things (class * 1000 + number)."""
MIN_MASK_PIXELS = 256
"""A smaller mask (16 x 16 of a 256 x 256 crop) is replaced by brush strokes."""


def random_mask(kind: str, labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask:
    """Draws a mask of a kind; brush strokes where the image has no region of that kind.

    Args:
        kind: A key of `MASK_KINDS`.
        labels: uint8 (H, W); ids from `classes` on belong to no class.
        instances: int32 (H, W); ids below 1000 are not things.
        classes: Number of classes.
        rng: Fixes the result.

    Returns:
        bool (H, W), True = edit, neither empty nor full.
    """
    mask = MASK_KINDS[kind](labels, instances, classes, rng)
    if mask is None or np.count_nonzero(mask) < min(MIN_MASK_PIXELS, mask.size // 4) or mask.all():
        mask = brush_strokes(labels.shape[0], labels.shape[1], rng)
    return mask


def brush_strokes(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Draws a brush stroke of 4 to 8 vertices, 50 to 140 pixels wide in a 256 x 256 image, round at the joints.

    The random walk of free-form inpainting masks (Yu et al., ICCV 2019): turns of about 2π/5 in alternating directions,
    segments of a quarter of the height.
    """
    scale = min(height, width) / 256
    count = int(rng.integers(4, 9))
    thickness = max(2, round(int(rng.integers(50, 141)) * scale))
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
    """Everything but a box of half the side (128 of 256) at a random position."""
    height, width = labels.shape
    box_height, box_width = height // 2, width // 2
    top, left = rng.integers(0, height - box_height + 1), rng.integers(0, width - box_width + 1)
    mask = np.ones(labels.shape, bool)
    mask[top : top + box_height, left : left + box_width] = False
    return mask


def _class(labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask | None:
    """All pixels of a random class among those with at least `MIN_MASK_PIXELS`."""
    counts = np.bincount(labels.ravel())  # ten times as fast as np.unique, which sorts
    ids = np.flatnonzero(counts)
    counts = counts[ids]
    ids = ids[(ids < classes) & (counts >= min(MIN_MASK_PIXELS, labels.size // 4)) & (counts < labels.size)]
    return labels == rng.choice(ids) if ids.size else None


def _instance(labels: Labels, instances: Instances, classes: int, rng: np.random.Generator) -> Mask | None:
    """The bounding box of a random thing."""
    ids, counts = np.unique(instances[instances >= FIRST_THING_ID], return_counts=True)
    ids = ids[counts >= MIN_MASK_PIXELS // 4]
    if not ids.size:
        return None
    rows, columns = np.nonzero(instances == rng.choice(ids))
    mask = np.zeros(labels.shape, bool)
    mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return mask


MASK_KINDS: Mapping[str, MaskFunction] = {
    "strokes": _strokes,
    "extension": _extension,
    "outpainting": _outpainting,
    "class": _class,
    "instance": _instance,
}
"""The kinds of masks by name (paper, section 4.1). Training, evaluation and `dataset check --sheet` read this registry.
Append new kinds: the position of a kind is part of the seed of its masks in evaluations."""


def connected_components(labels: Labels, thing_ids: Sequence[int]) -> Instances:
    """Derives instances from labels: the 8-connected components of the thing classes, numbered class * 1000 + k.

    Args:
        labels: uint8 (H, W).
        thing_ids: The classes whose components are instances.

    Returns:
        int32 (H, W); the class id where there is no thing.
    """
    instances = labels.astype(np.int32)
    for thing in thing_ids:
        components = _components(labels == thing)
        instances = np.where(components > 0, thing * FIRST_THING_ID + components - 1, instances)
    return instances.astype(np.int32)


def _components(region: Mask) -> Instances:
    """8-connected components of `region`, numbered from 1 in reading order; 0 outside. bool (H, W) to int32 (H, W).

    Each pixel starts with its own number and takes the smallest among its neighbors, then jumps to its number's number
    (pointer doubling), until nothing changes: a logarithmic number of rounds for round components.
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
