"""How much each of several overlapping tiles counts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=64)
def blend_windows(starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """float32 (tiles, size): the weights along one axis of tiles that begin at `starts`, ascending.

    A tile counts fully where it is alone and passes over to the next in half a sine over all that the two share. At
    each place the weights sum to one, also where three tiles meet.
    """
    linear = linear_ramps(starts, size)
    risen = np.sin(linear * (np.pi / 2)) ** 2
    return tile_by_tile(risen / risen.sum(axis=0), starts, size)


def linear_ramps(starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """float32 (tiles, length from the first tile's begin to the last one's end): weights by the distance to the tile's
    own end, which sum to one at each place."""
    place = np.arange(starts[0], starts[-1] + size, dtype=np.float32) + 0.5
    middle = np.array(starts, np.float32)[:, None] + size / 2
    reach = np.clip(size / 2 - np.abs(place - middle), 0, None).astype(np.float32)
    ramp: NDArray[np.float32] = reach / reach.sum(axis=0)
    return ramp


def tile_by_tile(weights: NDArray[np.float32], starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """(tiles, length) to (tiles, size): of each tile's weights those that lie on it."""
    return np.stack([row[start - starts[0] :][:size] for row, start in zip(weights, starts, strict=True)])
