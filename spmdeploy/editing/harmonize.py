"""Matches colors and noise of an edit to those of the same classes in its surroundings.

What a network paints may be right and still show as a patch: a shade too blue, and without the grain that camera and
asphalt gave to the pixels beside it. Colors are compared where known and painted pixels of one class meet, and the
step is taken out. Grain is measured in the plainest known squares of a class and added where it is missing. numpy only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.threads import available_threads
from spmdeploy.types import Image, LabelMap, Mask

Plane = NDArray[np.floating[Any]]  # float32
Indices = NDArray[np.integer[Any]]

# Colors are compared on a grid of at most this many cells a side, of at least this many pixels a side: steps in color
# are smooth, and this is a sixth of the time of single pixels.
MEASURED_SIDE = 128
CELL_PIXELS = 3
# Cells on either side of the border between known and painted pixels of a class whose mean colors are compared.
BAND = 2
# Minimum cells on either side; fewer are no reliable estimate of a class's color.
MIN_CELLS = 8
# Gray levels; a larger step at the border is more likely another object than another shade.
MAX_SHIFT = 48.0
# Side of the squares in which grain is measured, and the share of them that is taken to be without structure.
SQUARE = 8
PLAIN_SHARE = 0.25
# Gray levels of standard deviation: what is more is structure. Roads and pavements of CamVid have 2 to 3.5, its
# buildings and trees mostly 4 to 10.
MAX_GRAIN = 3.5
# Of white noise of variance 1, what `_fine` leaves: 1 - 2 (6/16)² + (70/256)², from the kernel 1 4 6 4 1.
FINE_VARIANCE = 0.7935
# Pixels on each side that `_blurred` reads.
BLUR_REACH = 2
# Side of the grid on which labels and image are compared, and the distance in its pixels over which colors are.
COMPARED_SIDE = 512
COMPARED_DISTANCE = 2
# Pairs of pixels on both sides of a class border below which the labels do not describe the known pixels reliably.
MIN_BORDER_PAIRS = 200
# Steps in color across class borders over those inside classes. 40 test photos each of CamVid and LabelMeFacade with a
# rectangular mask, 5th to 95th percentile: 2.5 to 5.3 and 1.7 to 3.5 with their own labels; 0.8 to 1.7 with the labels
# of another photo, mirrored ones, and those moved by a twelfth of the width.
MIN_BORDER_CONTRAST = 1.6
LUMA = np.array((0.299, 0.587, 0.114), np.float32)


class MatchingDecision(NamedTuple):
    """Whether an edit is matched to its surroundings, and why."""

    matches: bool
    reason: str


def decide_matching(requested: bool | None, image: Image, labels: LabelMap, mask: Mask) -> MatchingDecision:
    """Return what was requested, or for None whether the labels fit the known pixels, as matching requires.

    They fit if colors change more across the borders of classes than inside them.

    Args:
        requested: None to decide by the known pixels.
        image: uint8 (H, W, 3), RGB; read outside the mask only.
        labels: integer (H, W).
        mask: bool (H, W).
    """
    if requested is not None:
        return MatchingDecision(requested, "asked for")
    contrast, pairs = border_contrast(image, labels, mask)
    if pairs < MIN_BORDER_PAIRS:
        return MatchingDecision(False, "hardly any border between classes outside the mask")
    steps = f"colors change {contrast:.1f} times as much across class borders as inside classes"
    if contrast < MIN_BORDER_CONTRAST:
        return MatchingDecision(False, f"the labels may not describe the known pixels: {steps}")
    return MatchingDecision(True, f"the labels describe the known pixels: {steps}")


def border_contrast(image: Image, labels: LabelMap, mask: Mask) -> tuple[float, int]:
    """Mean color step between known pixels of different classes over that within classes, and the number of the former.

    Steps are between pixels `COMPARED_DISTANCE` apart, on a grid of at most `COMPARED_SIDE` pixels. 0 without steps.
    """
    factor = -(-max(mask.shape) // COMPARED_SIDE)
    image, labels, known = image[::factor, ::factor], labels[::factor, ::factor], ~mask[::factor, ::factor]
    total, count = np.zeros(2), np.zeros(2, np.int64)
    for axis in (0, 1):
        first, second = (
            tuple(part if one == axis else slice(None) for one in (0, 1))
            for part in (slice(None, -COMPARED_DISTANCE), slice(COMPARED_DISTANCE, None))
        )
        step = np.abs(image[first].astype(np.int16) - image[second]).sum(axis=2)
        both, differ = known[first] & known[second], labels[first] != labels[second]
        for kind, chosen in enumerate((both & ~differ, both & differ)):
            total[kind] += step[chosen].sum()
            count[kind] += np.count_nonzero(chosen)
    inside, across = total / np.maximum(count, 1)
    return float(across / max(inside, 1e-6)), int(count[1])


def match_surroundings(image: Image, labels: LabelMap, mask: Mask) -> None:
    """Changes the image under the mask, in place; known pixels are only read. The same inputs give the same bytes.

    Args:
        image: uint8 (H, W, 3), RGB, edited; is changed.
        labels: integer (H, W), true of the known pixels too.
        mask: bool (H, W), True = painted.
    """
    if mask.any():
        match_color_statistics(image, labels, mask)
        match_noise(image, labels, mask)


def match_color_statistics(image: Image, labels: LabelMap, mask: Mask) -> None:
    """Shifts every painted class by its steps at the border, spread over its inside."""
    factor = max(CELL_PIXELS, -(-max(mask.shape) // MEASURED_SIDE))
    around = _surrounding_box(mask, factor)
    image, labels, mask = image[around], labels[around], mask[around]
    pixels = np.bincount(labels[mask])  # np.unique imports numpy.ma: 20 ms
    largest_first = sorted(np.flatnonzero(pixels), key=lambda label: -pixels[label])
    with ThreadPoolExecutor(available_threads()) as pool:  # a class reads and writes its own pixels only
        list(pool.map(lambda label: _match_class(image, labels == label, mask, factor), largest_first))


def _match_class(image: Image, of_class: Mask, mask: Mask, factor: int) -> None:
    """Shifts the painted pixels of one class, of which there are some."""
    around = _surrounding_box(of_class & mask, factor)
    part, of_class, masked = image[around], of_class[around], mask[around]
    shift = _shift(_cell_sums(part, of_class & ~masked, factor), _cell_sums(part, of_class & masked, factor))
    if shift is not None:
        rows, columns = np.nonzero(of_class & masked)
        shifted = part[rows, columns] + _sample_bilinear(shift, factor, rows, columns)
        part[rows, columns] = np.clip(np.rint(shifted), 0, 255)


def _surrounding_box(where: Mask, factor: int) -> tuple[slice, slice]:
    """A box of whole cells that holds the places given and BAND cells around them."""
    box = []
    for axis in (1, 0):
        cells = np.flatnonzero(where.any(axis=axis)) // factor
        first = max(0, int(cells[0]) - BAND)
        box.append(slice(first * factor, (int(cells[-1]) + BAND + 1) * factor))
    return box[0], box[1]


def _cell_sums(image: Image, where: Mask, factor: int) -> Plane:
    """Sums of red, green and blue and the number of the chosen pixels in cells of factor × factor: float32 (h, w, 4).

    The last row and column of cells may be cut.
    """
    height, width = (-(-side // factor) for side in where.shape)
    rows, columns = np.nonzero(where)
    cells = rows // factor * width + columns // factor
    sums = [np.bincount(cells, color, minlength=height * width) for color in (*image[rows, columns].T, None)]
    return np.stack(sums, axis=1).reshape(height, width, 4).astype(np.float32)


def _shift(known: Plane, painted: Plane) -> Plane | None:
    """What to add to the painted pixels, a value per cell: float32 (h, w, 3). None where the two hardly meet.

    known, painted: see `_cell_sums`. The step in color of a cell is that of the means of both within BAND cells.
    """
    around, inside = _band_sums(known), _band_sums(painted)
    meets_painted = (known[..., 3] > 0) & (inside[..., 3] > 0)
    meets_known = (painted[..., 3] > 0) & (around[..., 3] > 0)
    if min(np.count_nonzero(meets_painted), np.count_nonzero(meets_known)) < MIN_CELLS:
        return None
    means = [sums[..., :3] / np.maximum(sums[..., 3:], 1) for sums in (around, inside)]
    return _pull_push(np.clip(means[0] - means[1], -MAX_SHIFT, MAX_SHIFT), meets_known.astype(np.float32))


def _band_sums(sums: Plane) -> Plane:
    """The sums over all cells at most BAND rows and columns away."""
    for axis in (0, 1):
        padded = np.pad(sums, [(BAND, BAND) if a == axis else (0, 0) for a in range(3)])
        sums = np.sum(np.lib.stride_tricks.sliding_window_view(padded, 2 * BAND + 1, axis), axis=-1)
    return sums


def _pull_push(values: Plane, weights: Plane) -> Plane:
    """Weighted values continued smoothly over the whole plane: pull-push (Gortler et al., The Lumigraph, 1996).

    values: float32 (h, w, 3). weights: (h, w), 0 = unknown; from 1 on the value is kept.
    """
    height, width = weights.shape
    kept = np.minimum(weights, 1)[..., None]
    if max(height, width) == 1:
        return values * (kept > 0)
    padding = [(0, height % 2), (0, width % 2), (0, 0)]
    total, weight = _halved(np.pad(values * kept, padding)), _halved(np.pad(kept, padding))
    coarse = _pull_push(total / np.maximum(weight, 1e-6), weight[..., 0])
    return kept * values + (1 - kept) * _doubled(coarse, height, width)


def _halved(values: Plane) -> Plane:
    """Sums over cells of 2 × 2. (h, w, ...) of even sides."""
    values = values[::2] + values[1::2]
    return values[:, ::2] + values[:, 1::2]


def _doubled(values: Plane, height: int, width: int) -> Plane:
    """Bilinear enlargement of (h, w, 3) by two, cut to the given size."""
    for axis, size in enumerate((height, width)):
        first, second, share = _neighbors(np.arange(size), 2, values.shape[axis])
        share = share.reshape([-1 if a == axis else 1 for a in range(3)])
        values = values.take(first, axis) * (1 - share) + values.take(second, axis) * share
    return values


def _sample_bilinear(values: Plane, factor: int, rows: Indices, columns: Indices) -> Plane:
    """The values (h, w, 3) of cells of factor × factor pixels at the n pixels given, bilinear: float32 (n, 3)."""
    if factor == 1:
        return values[rows, columns]
    top, bottom, down = _neighbors(rows, factor, values.shape[0])
    left, right, across = _neighbors(np.arange(columns.max() + 1), factor, values.shape[1])
    wide = values[:, left] * (1 - across[:, None]) + values[:, right] * across[:, None]
    return wide[top, columns] * (1 - down[:, None]) + wide[bottom, columns] * down[:, None]


def _neighbors(pixels: Indices, factor: int, count: int) -> tuple[Indices, Indices, Plane]:
    """The two of `count` cells whose centers each pixel's center lies between, and how near it is to the second."""
    place = (pixels.astype(np.float32) + 0.5) / factor - 0.5
    first = np.clip(np.floor(place).astype(np.intp), 0, count - 1)
    return first, np.minimum(first + 1, count - 1), np.clip(place - first, 0, 1)


def match_noise(image: Image, labels: LabelMap, mask: Mask) -> None:
    """Adds to every painted class the grain of its known squares, where it has less."""
    residual = _fine(image @ LUMA)
    sides = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = tuple(slice(max(0, side[0] - BLUR_REACH), side[-1] + 1 + BLUR_REACH) for side in sides)
    part, masked = image[box], mask[box]
    variance = _blurred(residual[box] ** 2)
    noise = _fine(np.random.default_rng(0).standard_normal(masked.shape, np.float32))
    wanted = np.zeros(masked.shape, np.float32)
    wanted[masked] = _grain_variances(residual, labels, mask)[labels[mask]]
    added = noise * np.sqrt(np.maximum(wanted - variance, 0) / FINE_VARIANCE)  # 0 outside the mask
    part[:] = np.clip(np.rint(part + added[..., None]), 0, 255)


def _grain_variances(residual: Plane, labels: LabelMap, mask: Mask) -> Plane:
    """That of each painted class in its plainest known squares: float32 (C,), 0 for other ids up to the largest.

    0 too for classes with few such squares, and where even they show structure. Ids outside the mask may be any number.
    """
    painted = np.bincount(labels[mask])
    found = np.zeros(len(painted), np.float32)
    ids = _squares(labels)
    known = _all(ids == ids[:, :1, :, :1]) & _all(~_squares(mask))
    of_square = ids[:, 0, :, 0][known]
    variances = _squares(residual).swapaxes(1, 2)[known].var(axis=(1, 2))
    for label in np.flatnonzero(painted):
        ordered = np.sort(variances[of_square == label])
        if len(ordered) >= MIN_CELLS:
            plain = float(np.interp(PLAIN_SHARE * (len(ordered) - 1), np.arange(len(ordered)), ordered))
            found[label] = plain if plain <= MAX_GRAIN**2 else 0.0
    return found


def _squares(plane: NDArray[Any]) -> NDArray[Any]:
    """A view of a plane (H, W) in squares: (H // SQUARE, SQUARE, W // SQUARE, SQUARE)."""
    height, width = (side // SQUARE for side in plane.shape)
    return plane[: height * SQUARE, : width * SQUARE].reshape(height, SQUARE, width, SQUARE)


def _all(squares: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether all of each square holds. Axis by axis, which is several times as fast."""
    of_columns: NDArray[np.bool_] = np.logical_and.reduce(squares, axis=1)
    of_squares: NDArray[np.bool_] = np.logical_and.reduce(of_columns, axis=2)
    return of_squares


def _fine(plane: Plane) -> Plane:
    """What a blur takes away."""
    return plane - _blurred(plane)


def _blurred(plane: Plane) -> Plane:
    """Twice the binomial kernel 1 2 1 in both directions, the border repeated."""
    for axis in (0, 1, 0, 1):
        lines = plane.swapaxes(0, axis)
        total = np.empty_like(lines)
        np.add(lines[:-2], lines[2:], out=total[1:-1])
        total[0], total[-1] = lines[0] + lines[:2][-1], lines[-2:][0] + lines[-1]
        total += lines
        total += lines
        total /= 4
        plane = total.swapaxes(0, axis)
    return plane
