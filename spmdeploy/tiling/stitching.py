"""Puts edited pixels back into the photo, under the mask only, with a soft border."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spmdeploy.types import Image, Indices, LabelMap, Mask

# Pixels handled at once where an index array would otherwise grow with the length of the mask's rim.
_CHUNK = 1 << 19


@dataclass(frozen=True, slots=True)
class BorderRing:
    """The masked pixels that are `depth` steps (8 neighbors) away from the nearest known one."""

    depth: int
    rows: Indices
    columns: Indices


def extrapolate_border(image: Image, mask: Mask, depth: int, labels: LabelMap | None = None) -> list[BorderRing]:
    """Continue the known pixels `depth` steps into the mask, in place; returns the rings, the outermost first.

    Each ring gets the mean of its known neighbors and of those already filled in (3x3), so nothing that was hidden
    under the mask contributes. Deeper pixels stay as they are; where no pixel is known there are no rings.

    Args:
        image: uint8 (H, W, 3), RGB; is changed.
        mask: bool (H, W), True = hidden.
        depth: Number of rings.
        labels: integer (H, W), true of the known pixels too: only pixels of the same class count as neighbors. None:
            all do.
    """
    hidden, known = _pad_false(mask), _pad_false(~mask)
    rings = []
    line = hidden.shape[1]
    around = np.array([-line - 1, -line, -line + 1, -1, 1, line - 1, line, line + 1])
    at = np.flatnonzero(_dilate8(known) & hidden)
    for step in range(1, depth + 1):
        if labels is not None:
            at = at[_beside_own_class(known, labels, at, around)]
        if len(at) == 0:
            break
        rows, columns = np.divmod(at, line)
        rings.append(BorderRing(step, rows - 1, columns - 1))
        for some in _chunks(len(at)):
            image[rows[some] - 1, columns[some] - 1] = _known_mean(image, known, labels, at[some], around)
        known.ravel()[at] = True
        hidden.ravel()[at] = False
        at = _next_ring(hidden, at, around)
    return rings


def _pad_false(flags: Mask) -> Mask:
    """The flags with a border of False: beyond the image there is neither a known pixel nor one to fill.

    In C order whatever the order of the flags (np.pad would keep theirs), since pixels are addressed by flat index.
    """
    framed = np.zeros((flags.shape[0] + 2, flags.shape[1] + 2), np.bool_)
    framed[1:-1, 1:-1] = flags
    return framed


def _dilate8(flags: Mask) -> Mask:
    """The flags and their 8 neighbors."""
    dilated = flags.copy()
    dilated[1:] |= flags[:-1]
    dilated[:-1] |= flags[1:]
    upright = dilated.copy()
    dilated[:, 1:] |= upright[:, :-1]
    dilated[:, :-1] |= upright[:, 1:]
    return dilated


def _beside_own_class(known: Mask, labels: LabelMap, at: Indices, around: Indices) -> Mask:
    """bool (n,): whether the places `at` of the padded image have a known neighbor of their class."""
    found = np.zeros(len(at), np.bool_)
    for some in _chunks(len(at)):
        for offset in around:
            found[some][_with_known_neighbor(known, labels, at[some], offset)] = True
    return found


def _with_known_neighbor(known: Mask, labels: LabelMap | None, at: Indices, offset: int) -> Indices:
    """Positions in `at` of the places whose neighbor at the offset is known and, with labels, of the same class."""
    use = np.flatnonzero(known.ravel()[at + offset])
    if labels is None:
        return use
    rows, columns = np.divmod(at[use], known.shape[1])
    near_rows, near_columns = np.divmod(at[use] + offset, known.shape[1])
    same = np.flatnonzero(labels[rows - 1, columns - 1] == labels[near_rows - 1, near_columns - 1])
    return use[same]


def _known_mean(image: Image, known: Mask, labels: LabelMap | None, at: Indices, around: Indices) -> Image:
    """uint8 (n, 3): the rounded mean over the known neighbors, with labels those of the same class."""
    total = np.zeros((len(at), image.shape[2]), np.int32)
    count = np.zeros(len(at), np.int32)
    for offset in around:
        use = _with_known_neighbor(known, labels, at, offset)
        rows, columns = np.divmod(at[use] + offset, known.shape[1])
        total[use] += image[rows - 1, columns - 1]
        count[use] += 1
    return ((2 * total + count[:, None]) // (2 * count[:, None])).astype(np.uint8)


def _next_ring(hidden: Mask, at: Indices, around: Indices) -> Indices:
    beyond = [at + offset for offset in around]
    places = np.sort(np.concatenate([there[hidden.ravel()[there]] for there in beyond]))
    return places[np.diff(places, prepend=-1) > 0]  # np.unique imports numpy.ma, which a cold start would wait for


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, length, _CHUNK))


def stitch(image: Image, edited: Image, mask: Mask, feather: int, labels: LabelMap | None = None) -> None:
    """Put the edited pixels under the mask into the image, in place; known pixels are never written.

    In the outermost pixels under the mask the result passes over from the continued known pixels
    (`extrapolate_border`) to the edited ones in equal steps, with labels inside each class only: a border between
    classes stays sharp.

    Args:
        image: uint8 (H, W, 3), RGB; is changed.
        edited: uint8 (H, W, 3), RGB.
        mask: bool (H, W), True = edit.
        feather: Width of the transition in pixels; 0 puts the edit side by side with the photo.
        labels: integer (H, W), true of the known pixels too; None: the transition is the same everywhere.
    """
    rings = extrapolate_border(image, mask, feather, labels)
    continued = [image[ring.rows, ring.columns] for ring in rings]  # uint8 (n, 3) each
    np.copyto(image, edited, where=mask[:, :, None])
    for ring, outer in zip(rings, continued, strict=True):
        for some in _chunks(len(ring.rows)):
            inner = edited[ring.rows[some], ring.columns[some]].astype(np.int32)
            blend = outer[some].astype(np.int32) * (feather + 1 - ring.depth) + inner * ring.depth
            image[ring.rows[some], ring.columns[some]] = (2 * blend + feather + 1) // (2 * (feather + 1))
