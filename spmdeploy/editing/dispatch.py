"""Decides which items of a batch each worker of a fleet gets, and what happens to items whose worker was lost."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace

from spmdeploy.editing.batch import PreparedItem
from spmdeploy.editing.status import ItemStatus

CHUNK_SECONDS = 0.5
"""Work sent to a worker at once, at least: long against the time that a call takes, short against a batch."""
CALL_SECONDS = 0.004
"""Of the driver for a call, with a margin. Workers get chunks so long that it can serve all of them in turn."""
MAX_CHUNK = 64
MAX_ATTEMPTS = 3
_WEIGHT = 0.1
"""Of a new chunk in the running average of the time per item."""


class Dispatcher:
    """Hands out each item once, and again only if its worker was lost or gave it back. Has no clock and no threads."""

    def __init__(self, items: Iterator[PreparedItem], total: int) -> None:
        """total: of rows, so that chunks get smaller towards the end; `items` may be fewer."""
        self._waiting = items
        self._remaining = total
        self._again: deque[PreparedItem] = deque()
        self._attempts: Counter[int] = Counter()
        self._seconds: float | None = None

    @property
    def seconds_per_item(self) -> float | None:
        """Running average; None before the first result."""
        return self._seconds

    def take(self, workers: int) -> list[PreparedItem]:
        """The next items for one of so many workers; none if all are handed out."""
        if self._again:
            return [self._again.popleft()]
        chunk = []
        for item in self._waiting:
            chunk.append(item)
            if len(chunk) >= self._chunk_size(workers):
                break
        self._remaining = self._remaining - len(chunk) if chunk else 0
        return chunk

    def record(self, items: int, seconds: float) -> None:
        """Note how long a worker took for that many items."""
        if items:
            latest = seconds / items
            self._seconds = latest if self._seconds is None else self._seconds + _WEIGHT * (latest - self._seconds)

    def give_back(self, items: list[PreparedItem]) -> None:
        """Hand out items again that a worker has not begun."""
        self._again.extend(items)

    def lose(self, items: list[PreparedItem], reason: str, counts: bool = True) -> list[ItemStatus]:
        """Hand out the items of a lost worker again, each alone, and return the statuses of those that are given up.

        Args:
            items: what the worker had not returned.
            reason: why it was lost.
            counts: whether an item may be the reason; not if the whole node was lost.
        """
        given_up = []
        for item in items:
            self._attempts[item.row] += counts
            if self._attempts[item.row] >= MAX_ATTEMPTS:
                problem = f"{MAX_ATTEMPTS} workers were lost while they had this item: {reason}"
                given_up.append(ItemStatus(item.row, item.output, "failed", problem, "edit it alone to see why"))
            else:
                # The worker may have written the output, completely as always.
                self._again.append(replace(item, request=replace(item.request, overwrite=True)))
        return given_up

    def _chunk_size(self, workers: int) -> int:
        if self._seconds is None:
            return 1
        even = math.ceil(self._remaining / (2 * max(workers, 1)))
        return max(1, min(MAX_CHUNK, even, int(self._chunk_seconds(workers) / max(self._seconds, 1e-9))))

    def _chunk_seconds(self, workers: int) -> float:
        return max(CHUNK_SECONDS, CALL_SECONDS * workers)
