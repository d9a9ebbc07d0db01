from __future__ import annotations

import threading
import time

import pytest

from spmdeploy.training.loader import BackgroundLoader


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_background_loader_slow_batches_come_in_order(workers: int) -> None:
    def load(position: int) -> int:
        time.sleep(0.002 * (position % 3))
        return position

    loader = BackgroundLoader(load, start=6, step=2, workers=workers, end=20)
    assert list(loader) == [6, 8, 10, 12, 14, 16, 18]
    loader.close()


def test_background_loader_prepares_batches_ahead() -> None:
    loaded = threading.Event()

    def load(position: int) -> int:
        if position == 1:
            loaded.set()
        return position

    loader = BackgroundLoader(load, start=0, step=1, workers=1)
    assert next(loader) == 0
    assert loaded.wait(5)
    loader.close()


def test_background_loader_error_is_raised_at_its_batch() -> None:
    def load(position: int) -> int:
        if position == 1:
            raise ValueError("bad file")
        return position

    loader = BackgroundLoader(load, start=0, step=1, workers=2, end=3)
    assert next(loader) == 0
    with pytest.raises(ValueError, match="bad file"):
        next(loader)
    loader.close()
