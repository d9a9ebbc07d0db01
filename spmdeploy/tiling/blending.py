"""How much each of several overlapping tiles counts."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=64)
def ramps(starts: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """float32 (tiles, size): the weights along one axis of tiles that begin at `starts`, ascending.

    A tile counts fully where it is alone, rises in half a sine over all that it shares with the one before and falls
    in the same way towards the next; where three meet, all are scaled so that the weights at each place sum to one.
    """
    position = np.arange(size) + 0.5
    raw = np.ones((len(starts), size))
    for tile, (start, after) in enumerate(itertools.pairwise(starts)):
        shared = size - (after - start)
        rising = np.sin(np.clip(position / shared, 0, 1) * np.pi / 2) ** 2
        raw[tile + 1] *= rising
        raw[tile] *= rising[::-1]
    total = np.zeros(starts[-1] - starts[0] + size)
    for start, weights in zip(starts, raw, strict=True):
        total[start - starts[0] :][:size] += weights
    scaled = [weights / total[start - starts[0] :][:size] for start, weights in zip(starts, raw, strict=True)]
    return np.stack(scaled).astype(np.float32)
