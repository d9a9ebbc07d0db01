"""Does this session give the pictures that torch in FP32 gave? The golden edits of a bundle answer it anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spmdeploy import images
from spmdeploy.bundle import Bundle
from spmdeploy.bundle_files import GOLDEN_INSTANCES
from spmdeploy.errors import BundleError, InputError
from spmdeploy.manifest import GoldenEdit, ParityLimits
from spmdeploy.runtime.session import Session

Picture = TypeVar("Picture")

EXPORT_AGAIN = "export the bundle again"


@dataclass(frozen=True)
class GoldenPictures:
    """One edit at the graph's own size, as a batch of one, and the picture that torch in FP32 makes of it.

    image, expected: uint8 (1, S, S, 3) RGB. labels: uint8 (1, S, S). instances: int32 (1, S, S). mask: uint8 (1, S, S),
    0 = keep.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    instances: NDArray[np.int32]
    mask: NDArray[np.uint8]
    expected: NDArray[np.uint8]


@dataclass(frozen=True)
class Drift:
    """How far two pictures of the same edit are apart under the mask, in grey levels (0..255)."""

    max_grey: int
    mean_grey: float
    psnr_db: float
    """Infinite for equal pictures."""

    def faults(self, limits: ParityLimits) -> list[str]:
        """What exceeds the limits, in words; empty when nothing does."""
        return [
            text
            for exceeded, text in (
                (self.max_grey > limits.max_grey, f"largest difference {self.max_grey} > {limits.max_grey:g}"),
                (self.mean_grey > limits.mean_grey, f"mean difference {self.mean_grey:.3f} > {limits.mean_grey:g}"),
                (self.psnr_db < limits.min_psnr_db, f"PSNR {self.psnr_db:.1f} dB < {limits.min_psnr_db:g} dB"),
            )
            if exceeded
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the PSNR of equal pictures is null."""
        psnr = None if math.isinf(self.psnr_db) else round(self.psnr_db, 2)
        return {"max_grey": self.max_grey, "mean_grey": round(self.mean_grey, 4), "psnr_db": psnr}


@dataclass(frozen=True)
class GoldenResult:
    """One golden edit, repeated."""

    name: str
    drift: Drift
    known_pixels_intact: bool
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            **self.drift.to_json(),
            "known_pixels_intact": self.known_pixels_intact,
            "faults": list(self.faults),
        }


def read_golden(bundle: Bundle, edit: GoldenEdit) -> GoldenPictures:
    """The pictures of one golden edit. Raises BundleError when one is missing, altered or no picture of the edit."""

    def picture(read: Callable[[str, bytes], Picture], name: str) -> Picture:
        file = f"{edit.folder}/{name}"
        try:
            return read(str(bundle.path / file), bundle.read(file))
        except InputError as error:
            raise BundleError(error.problem, EXPORT_AGAIN) from error

    labels = picture(images.read_labels, "labels.png")
    has_instances = f"{edit.folder}/{GOLDEN_INSTANCES}" in bundle.files()
    instances = picture(images.read_instances, GOLDEN_INSTANCES) if has_instances else labels.astype(np.int32)
    pictures = GoldenPictures(
        image=picture(images.read_photo, "image.png").pixels[None],
        labels=labels[None],
        instances=instances[None],
        mask=picture(images.read_mask, "mask.png").astype(np.uint8)[None],
        expected=picture(images.read_photo, "expected.png").pixels[None],
    )
    size = bundle.manifest.native_size
    shapes = {name: array.shape[1:3] for name, array in vars(pictures).items()}
    wrong = next((name for name, shape in shapes.items() if shape != (size, size)), None)
    if wrong or not pictures.mask.any():
        fault = f"its {wrong} is {shapes[wrong]}, not {size}×{size}" if wrong else "its mask is empty"
        raise BundleError(f"{bundle.path / edit.folder}: not a golden edit: {fault}", EXPORT_AGAIN)
    return pictures


def measure_drift(picture: NDArray[np.uint8], reference: NDArray[np.uint8], mask: NDArray[np.uint8]) -> Drift:
    """picture, reference: uint8 (B, S, S, 3). mask: (B, S, S), not 0 = compared."""
    difference = picture.astype(np.int16)[mask != 0] - reference.astype(np.int16)[mask != 0]
    square = float(np.mean(np.square(difference, dtype=np.float64)))
    psnr = 10 * math.log10(255**2 / square) if square else math.inf
    distance = np.abs(difference)
    return Drift(int(distance.max()), float(distance.mean()), psnr)


def repeat_golden(session: Session, golden: GoldenPictures, name: str, limits: ParityLimits) -> GoldenResult:
    """Runs one golden edit and judges the result."""
    edited = session.run(golden.image, golden.labels, golden.instances, golden.mask)
    drift = measure_drift(edited, golden.expected, golden.mask)
    keep = golden.mask == 0
    intact = bool(np.array_equal(edited[keep], golden.image[keep]))
    faults = drift.faults(limits) + ([] if intact else ["pixels outside the mask were changed"])
    return GoldenResult(name, drift, intact, tuple(faults))


def verify(session: Session, bundle: Bundle) -> list[GoldenResult]:
    """Repeats every golden edit of the bundle within the limits that it states for the session's precision.

    Raises BundleError when there is none: nothing would be proved.
    """
    if not bundle.manifest.golden:
        raise BundleError(f"{bundle.path}: holds no golden edits, so nothing can be verified", EXPORT_AGAIN)
    limits = bundle.manifest.limits[session.precision]
    return [repeat_golden(session, read_golden(bundle, edit), edit.name, limits) for edit in bundle.manifest.golden]
