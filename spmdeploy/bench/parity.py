"""Compares the results of a backend with PyTorch in FP32 before any time is reported."""

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
    """Deviation from PyTorch in FP32 under the mask, in gray levels of 255."""

    against: str
    """`IN_THIS_RUN` where torch is installed, else `GOLDEN`."""
    max_grey: int
    mean_grey: float
    psnr_db: float | None
    """None for equal images."""
    faults: tuple[str, ...]
    """Limits of the bundle that are exceeded, here or on its golden edits."""

    @property
    def passed(self) -> bool:
        """Whether no limit is exceeded."""
        return not self.faults


def check_parity(
    edited: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    photo: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    limits: ParityLimits,
    golden: Sequence[GoldenResult],
) -> Parity:
    """Compares the edits of a backend with PyTorch's, and adds the results of its golden edits.

    Args:
        edited: uint8 (B, S, S, 3), RGB.
        reference: uint8 (B, S, S, 3), RGB, of PyTorch in FP32.
        photo: uint8 (B, S, S, 3), RGB, the inputs.
        mask: (B, S, S), 0 = keep.
        limits: Allowed deviation under the mask; outside it none is allowed.
        golden: Of the same backend.
    """
    deviation = measure_deviation(edited, reference, mask)
    faults = deviation.problems(limits)
    if not np.array_equal(edited[mask == 0], photo[mask == 0]):
        faults.append("pixels outside the mask were changed")
    return _parity(IN_THIS_RUN, deviation, faults + golden_problems(golden))


def check_golden_parity(golden: Sequence[GoldenResult]) -> Parity:
    """The worst of at least one golden edit: where PyTorch is not installed."""
    deviations = [result.deviation for result in golden]
    worst = Deviation(
        max(deviation.max_grey for deviation in deviations),
        max(deviation.mean_grey for deviation in deviations),
        min(deviation.psnr_db for deviation in deviations),
    )
    return _parity(GOLDEN, worst, golden_problems(golden))


def golden_problems(golden: Sequence[GoldenResult]) -> list[str]:
    """The problems of golden edits, one sentence each."""
    return [f"golden edit {result.name}: {fault}" for result in golden for fault in result.problems]


def _parity(against: str, deviation: Deviation, faults: Sequence[str]) -> Parity:
    psnr = None if math.isinf(deviation.psnr_db) else round(deviation.psnr_db, 2)
    return Parity(against, deviation.max_grey, round(deviation.mean_grey, 4), psnr, tuple(faults))
