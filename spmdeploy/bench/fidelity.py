"""Is it the same picture? Every figure of speed stands beside how far its picture is from PyTorch's in FP32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.verify import Deviation, GoldenResult, measure_deviation
from spmdeploy.bundle.manifest import ParityLimits

IN_THIS_RUN = "eager PyTorch in FP32, in this run"
GOLDEN = "the bundle's golden edits, made by PyTorch in FP32 at export"


@dataclass(frozen=True)
class Parity:
    """The distance from PyTorch in FP32 under the mask, in gray levels of 255."""

    against: str
    """`IN_THIS_RUN` where torch is installed, else `GOLDEN`."""
    max_grey: int
    mean_grey: float
    psnr_db: float | None
    """None for equal pictures."""
    faults: tuple[str, ...]
    """What exceeds the bundle's limits, here or on its golden edits."""

    @property
    def passed(self) -> bool:
        return not self.faults


def judge(
    picture: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    photo: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    limits: ParityLimits,
    golden: Sequence[GoldenResult],
) -> Parity:
    """picture, reference, photo: uint8 (B, S, S, 3) RGB. mask: (B, S, S), 0 = keep. golden: this backend's."""
    drift = measure_deviation(picture, reference, mask)
    faults = drift.faults(limits)
    if not np.array_equal(picture[mask == 0], photo[mask == 0]):
        faults.append("pixels outside the mask were changed")
    return _parity(IN_THIS_RUN, drift, faults + golden_faults(golden))


def check_golden_parity(golden: Sequence[GoldenResult]) -> Parity:
    """The worst of the golden edits, of which there is at least one: where PyTorch is not installed."""
    drifts = [result.drift for result in golden]
    worst = Deviation(
        max(drift.max_grey for drift in drifts),
        max(drift.mean_grey for drift in drifts),
        min(drift.psnr_db for drift in drifts),
    )
    return _parity(GOLDEN, worst, golden_faults(golden))


def golden_faults(golden: Sequence[GoldenResult]) -> list[str]:
    return [f"golden edit {result.name}: {fault}" for result in golden for fault in result.faults]


def _parity(against: str, drift: Deviation, faults: Sequence[str]) -> Parity:
    psnr = None if math.isinf(drift.psnr_db) else round(drift.psnr_db, 2)
    return Parity(against, drift.max_grey, round(drift.mean_grey, 4), psnr, tuple(faults))
