"""Golden edits: runs them on a backend and compares the results with those of PyTorch in FP32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spmdeploy.backends.base import Backend, bind_layout
from spmdeploy.bundle.bundle import Bundle
from spmdeploy.bundle.manifest import GoldenEdit, ParityLimits
from spmdeploy.bundle.storage import GOLDEN_INSTANCES, GOLDEN_REFINED
from spmdeploy.errors import BundleError, InputError, UnavailableError
from spmdeploy.imaging import files as images
from spmdeploy.imaging.mask_files import read_mask
from spmdeploy.types import LayoutInput, ModelInput

Decoded = TypeVar("Decoded")

EXPORT_AGAIN = "export the bundle again"

_HALF_LIMITS = ParityLimits(max_grey=48, mean_grey=1.0, min_psnr_db=40)
_DEFAULT_LIMITS = {
    "fp16": _HALF_LIMITS,
    "tf32": _HALF_LIMITS,
    "bf16": ParityLimits(max_grey=80, mean_grey=2.5, min_psnr_db=34),
}
"""For reduced precisions that the bundle states no limits for. bf16 has three bits of mantissa less than FP16. Measured
with the built-in model, avx512_bf16: 59 levels, mean 2.0, 36 dB for the golden edit that paints leaves, mean 0.9 and
45 dB for the others; LPIPS of 300 edits of test images is no higher than in FP32. The limits leave a quarter more to
other processors, which sum in another order."""


@dataclass(frozen=True)
class GoldenSample:
    """One edit at the graph's own size, as a batch of one, and the images that torch in FP32 computes.

    expected: uint8 (1, S, S, 3) RGB. refined: uint8 (1, S, S, 3), the result of refining `coarse`; None if the model
    has no refine graph.
    """

    inputs: ModelInput
    expected: NDArray[np.uint8]
    refined: NDArray[np.uint8] | None = None

    @property
    def coarse(self) -> NDArray[np.float32]:
        """What the golden refinement starts from, the expected image at half size: float32 (1, S/2, S/2, 3)."""
        batch, height, width, channels = self.expected.shape
        fours = self.expected.reshape(batch, height // 2, 2, width // 2, 2, channels)
        coarse: NDArray[np.float32] = fours.mean(axis=(2, 4), dtype=np.float32)
        return coarse


@dataclass(frozen=True)
class Deviation:
    """How far two images of the same edit are apart under the mask, in gray levels (0..255)."""

    max_grey: int
    mean_grey: float
    psnr_db: float
    """Infinite for equal images."""

    def problems(self, limits: ParityLimits) -> list[str]:
        """Each limit that is exceeded, as text; empty when none is."""
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
        """Plain JSON values; the PSNR of equal images is null."""
        psnr = None if math.isinf(self.psnr_db) else round(self.psnr_db, 2)
        return {"max_grey": self.max_grey, "mean_grey": round(self.mean_grey, 4), "psnr_db": psnr}


@dataclass(frozen=True)
class GoldenResult:
    """One golden edit, repeated."""

    name: str
    """That of the edit, or NAME refined."""
    deviation: Deviation
    known_pixels_intact: bool
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `verify --json` prints them."""
        return {
            "name": self.name,
            "passed": self.passed,
            **self.deviation.to_json(),
            "known_pixels_intact": self.known_pixels_intact,
            "faults": list(self.problems),
        }


def read_golden(bundle: Bundle, edit: GoldenEdit) -> GoldenSample:
    """Read the images of one golden edit.

    Args:
        bundle: Holds the files.
        edit: Its entry in the manifest.

    Returns:
        Arrays of a batch of one, (1, size, size[, 3]).

    Raises:
        BundleError: An image is missing, altered or of another size, or the mask is empty.
    """

    def decoded(read: Callable[[str, bytes], Decoded], name: str) -> Decoded:
        file = f"{edit.folder}/{name}"
        try:
            return read(str(bundle.path / file), bundle.read(file))
        except InputError as exc:
            raise BundleError(exc.problem, EXPORT_AGAIN) from exc

    labels = decoded(images.read_labels, "labels.png")
    has_instances = f"{edit.folder}/{GOLDEN_INSTANCES}" in bundle.files()
    instances = decoded(images.read_instances, GOLDEN_INSTANCES) if has_instances else labels.astype(np.int32)
    has_refined = f"{edit.folder}/{GOLDEN_REFINED}" in bundle.files()
    image = decoded(images.read_photo, "image.png").pixels
    mask = decoded(read_mask, "mask.png").astype(np.uint8)
    sample = GoldenSample(
        inputs=ModelInput(image[None], labels[None], instances[None], mask[None]),
        expected=decoded(images.read_photo, "expected.png").pixels[None],
        refined=decoded(images.read_photo, GOLDEN_REFINED).pixels[None] if has_refined else None,
    )
    size = bundle.manifest.native_size
    arrays = {**sample.inputs._asdict(), "expected": sample.expected, "refined": sample.refined}
    shapes = {name: array.shape[1:3] for name, array in arrays.items() if array is not None}
    wrong = next((name for name, shape in shapes.items() if shape != (size, size)), None)
    if wrong or not sample.inputs.mask.any():
        fault = f"its {wrong} is {shapes[wrong]}, not {size}×{size}" if wrong else "its mask is empty"
        raise BundleError(f"{bundle.path / edit.folder}: not a golden edit: {fault}", EXPORT_AGAIN)
    return sample


def measure_deviation(image: NDArray[np.uint8], reference: NDArray[np.uint8], mask: NDArray[np.uint8]) -> Deviation:
    """Measure how far an image is from the reference, under the mask.

    Args:
        image: uint8 (B, S, S, 3), RGB.
        reference: uint8 (B, S, S, 3), RGB.
        mask: (B, S, S), not 0 = compared; not empty.
    """
    difference = image.astype(np.int16)[mask != 0] - reference.astype(np.int16)[mask != 0]
    square = float(np.mean(np.square(difference, dtype=np.float64)))
    psnr = 10 * math.log10(255**2 / square) if square else math.inf
    distance = np.abs(difference)
    return Deviation(int(distance.max()), float(distance.mean()), psnr)


def limits_of(bundle: Bundle, precision: str) -> ParityLimits:
    """The allowed deviation in a precision, that of the bundle where it states one.

    Raises:
        UnavailableError: Neither the bundle nor this package states one.
    """
    for name, limits in bundle.manifest.limits.items():
        if name == precision:
            return limits
    if precision in _DEFAULT_LIMITS:
        return _DEFAULT_LIMITS[precision]
    raise UnavailableError(
        f"the bundle states no limits for {precision}, so its results cannot be checked",
        f"export it with --precision {precision}",
    )


def run_golden(session: Backend, golden: GoldenSample, name: str, limits: ParityLimits) -> GoldenResult:
    """Runs one golden edit and compares the result.

    Args:
        session: The backend to verify.
        golden: Images of the edit.
        name: Of the edit.
        limits: Allowed deviation.
    """
    edited = session.run(golden.inputs)
    return compare_with_golden(edited, golden.expected, golden, name, limits)


def run_golden_refine(session: Backend, golden: GoldenSample, name: str, limits: ParityLimits) -> GoldenResult:
    """Refines the result of one golden edit and compares that.

    Args:
        session: The backend to verify; must refine.
        golden: Images of the edit, with a `refined` one.
        name: Of the edit.
        limits: Allowed deviation.
    """
    assert golden.refined is not None, name
    unrounded = session.refine(golden.inputs, golden.coarse)
    refined = np.clip(np.rint(unrounded), 0, 255).astype(np.uint8)
    return compare_with_golden(refined, golden.refined, golden, f"{name} refined", limits)


def compare_with_golden(
    image: NDArray[np.uint8],
    expected: NDArray[np.uint8],
    golden: GoldenSample,
    name: str,
    limits: ParityLimits,
) -> GoldenResult:
    """Compares an image with the expected one, under the mask and outside it.

    Args:
        image: uint8 (1, S, S, 3), RGB, made from the inputs of the golden edit.
        expected: uint8 (1, S, S, 3), RGB.
        golden: The golden edit.
        name: Of the result.
        limits: Allowed deviation under the mask; outside it none is allowed.
    """
    deviation = measure_deviation(image, expected, golden.inputs.mask)
    keep = golden.inputs.mask == 0
    intact = bool(np.array_equal(image[keep], golden.inputs.image[keep]))
    problems = deviation.problems(limits) + ([] if intact else ["pixels outside the mask were changed"])
    return GoldenResult(name, deviation, intact, tuple(problems))


def verify(session: Backend, bundle: Bundle) -> list[GoldenResult]:
    """Repeats every golden edit of the bundle within the limits that it states for the session's precision.

    Where the session refines, the results of refining these edits follow.

    Raises:
        BundleError: The bundle has no golden edit, so that nothing would be proved.
    """
    return verify_edits(session, bundle) + (verify_refinements(session, bundle) if session.refines else [])


def verify_edits(session: Backend, bundle: Bundle) -> list[GoldenResult]:
    """Repeats the golden edits.

    Raises:
        BundleError: The bundle has none.
    """
    if not bundle.manifest.golden:
        raise BundleError(f"{bundle.path}: holds no golden edits, so nothing can be verified", EXPORT_AGAIN)
    limits = limits_of(bundle, session.precision)
    return [run_golden(session, read_golden(bundle, edit), edit.name, limits) for edit in bundle.manifest.golden]


def verify_cached_layouts(session: Backend, bundle: Bundle) -> list[GoldenResult]:
    """Repeats the golden edits with cached layouts.

    Raises:
        BundleError: The bundle has none.
    """
    if not bundle.manifest.golden:
        raise BundleError(f"{bundle.path}: holds no golden edits, so nothing can be verified", EXPORT_AGAIN)
    limits = limits_of(bundle, session.precision)
    results = []
    for edit in bundle.manifest.golden:
        golden = read_golden(bundle, edit)
        edited = bind_layout(session, LayoutInput(*golden.inputs[1:]))(golden.inputs.image)
        name = f"{edit.name} with a cached layout"
        results.append(compare_with_golden(edited, golden.expected, golden, name, limits))
    return results


def verify_refinements(session: Backend, bundle: Bundle) -> list[GoldenResult]:
    """Refines the results of the golden edits.

    Raises:
        BundleError: The bundle has no golden edit with a refined image.
    """
    limits = limits_of(bundle, session.precision)
    golden = {edit.name: read_golden(bundle, edit) for edit in bundle.manifest.golden}
    refined = {name: sample for name, sample in golden.items() if sample.refined is not None}
    if not refined:
        raise BundleError(f"{bundle.path}: holds no refined golden edits, so nothing can be verified", EXPORT_AGAIN)
    return [run_golden_refine(session, sample, name, limits) for name, sample in refined.items()]
