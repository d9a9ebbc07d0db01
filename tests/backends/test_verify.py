"""Golden edits: deviation, limits, refusals, and the command `verify`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends.registry import open_backend
from spmdeploy.backends.verify import measure_deviation, read_golden, run_golden, verify
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.manifest import ParityLimits
from spmdeploy.errors import BundleError
from spmdeploy.types import ModelInput


def test_measure_deviation_reads_under_mask_only() -> None:
    mask = np.zeros((1, 4, 4), np.uint8)
    mask[0, 0, :2] = 1
    reference = np.full((1, 4, 4, 3), 100, np.uint8)
    image = reference.copy()
    image[0, 0, 0] = (103, 100, 100)
    image[0, 3, 3] = 255  # not under the mask
    deviation = measure_deviation(image, reference, mask)
    assert (deviation.max_grey, deviation.mean_grey) == (3, 0.5)
    assert deviation.psnr_db == pytest.approx(10 * math.log10(255**2 / 1.5))
    same = measure_deviation(reference, reference, mask)
    assert same.to_json() == {"max_grey": 0, "mean_grey": 0.0, "psnr_db": None}


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (ParityLimits(2, 9, 0), "largest difference 3 > 2"),
        (ParityLimits(9, 0.4, 0), "mean difference 0.500 > 0.4"),
        (ParityLimits(9, 9, 60), "PSNR"),
    ],
)
def test_problems_name_each_exceeded_limit(limits: ParityLimits, text: str) -> None:
    reference = np.full((1, 1, 2, 3), 100, np.uint8)
    image = reference.copy()
    image[0, 0, 0, 0] = 103
    deviation = measure_deviation(image, reference, np.ones((1, 1, 2), np.uint8))
    (fault,) = deviation.problems(limits)
    assert text in fault
    assert deviation.problems(ParityLimits(3, 0.5, deviation.psnr_db)) == []


class Touching:
    """A session that gives the expected image, but changes a pixel outside the mask."""

    backend, device, precision, provider, size = "onnxruntime", "cpu", "fp32", "touching", 256
    refines = False

    def __init__(self, expected: NDArray[np.uint8]) -> None:
        self.expected = expected.copy()
        self.expected[0, 0, 0] ^= 1

    def run(self, inputs: ModelInput) -> NDArray[np.uint8]:
        return self.expected

    def close(self) -> None:
        pass


def test_run_golden_changed_known_pixel_fails(street_bundle: Path) -> None:
    bundle = open_bundle(street_bundle)
    sample = read_golden(bundle, bundle.manifest.golden[0])
    assert not sample.inputs.mask[0, 0, 0]
    result = run_golden(Touching(sample.expected), sample, "x", bundle.manifest.limits["fp32"])  # type: ignore[arg-type]
    assert not result.passed and result.problems == ("pixels outside the mask were changed",)


def test_verify_without_golden_edits_is_refused(street_bundle: Path) -> None:
    bundle = open_bundle(street_bundle)
    bare = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, golden=()))
    with pytest.raises(BundleError, match="no golden edits"):
        verify(open_backend(bundle, device="cpu").session, bare)


def run_verify(bundle: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["verify", str(bundle), "--json", *options])
    (line,) = capsys.readouterr().out.splitlines()
    return code, json.loads(line)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_verify_sound_bundle_passes(precision: str, street_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run_verify(street_bundle, capsys, "--precision", precision)
    assert code == 0 and printed["precision"] == precision and printed["provider"].startswith("CPUExecutionProvider")
    names = [sample.name for sample in SAMPLE_EDITS]
    assert [edit["name"] for edit in printed["golden"]] == [*names, *(f"{name} refined" for name in names)]
    assert all(edit["passed"] and edit["known_pixels_intact"] for edit in printed["golden"])


def test_verify_torch_equals_golden_edits(street_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run_verify(street_bundle, capsys, "--backend", "torch")
    assert code == 0 and {edit["max_grey"] for edit in printed["golden"]} <= {0, 1} and printed["backend"] == "torch"


@pytest.fixture
def copied(street_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(street_bundle, tmp_path / "b.spm"))


def reseal(bundle: Path) -> None:
    """Makes SHA256SUMS fit the files as they are now."""
    names = [line[66:] for line in (bundle / "SHA256SUMS").read_text().splitlines()]
    lines = [f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (bundle / "SHA256SUMS").write_text("".join(lines))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def newer(path: Path) -> None:
    path.write_text(path.read_text().replace("spmdeploy.bundle/2", "spmdeploy.bundle/3"))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("graphs/edit.fp32.onnx", flip_a_byte),
        ("graphs/edit.fp16.onnx", flip_a_byte),
        ("graphs/edit.fp32.onnx", halve),
        ("graphs/edit.fp32.onnx", Path.unlink),
        ("graphs/refine_cpu.fp32.onnx", flip_a_byte),
        ("graphs/refine.fp16.onnx", Path.unlink),
        ("golden/car_away/expected.png", flip_a_byte),
        ("golden/car_away/refined.png", Path.unlink),
        ("golden/tree_planted/mask.png", Path.unlink),
        ("card.md", flip_a_byte),
        ("manifest.json", flip_a_byte),
        ("manifest.json", halve),
        ("manifest.json", Path.unlink),
        ("manifest.json", newer),
        ("SHA256SUMS", Path.unlink),
    ],
)
def test_verify_damaged_bundle_is_refused(
    name: str, harm: Callable[[Path], None], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(copied / name)
    code, printed = run_verify(copied, capsys)
    assert code == printed["exit_code"] == 6 and f"b.spm/{name}" in printed["error"]
    assert ("upgrade spmdeploy" in printed["hint"]) == (harm is newer)


def repaint(path: Path, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
    with Image.open(path) as image:
        pixels = np.array(image)
    Image.fromarray(change(pixels)).save(path)


def test_verify_differing_images_fail(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repaint(copied / "golden/tree_planted/expected.png", lambda pixels: pixels ^ 8)
    reseal(copied)
    code, printed = run_verify(copied, capsys)
    assert code == printed["exit_code"] == 5 and printed["schema"] == "spmdeploy.verify/1"
    # The expected image is what the golden refinement starts from.
    assert [edit["passed"] for edit in printed["golden"]] == [True, False, True, True, False, True]
    assert printed["error"].startswith("tree_planted: largest difference ")
    assert cli.main(["verify", str(copied)]) == 5
    printed = capsys.readouterr()
    assert re.search(r"tree_planted +FAILED", printed.out) and "error: tree_planted: " in printed.err


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("mask.png", lambda pixels: pixels * 0, "mask is empty"),
        ("image.png", lambda pixels: pixels[:255], "image is (255, 256), not 256×256"),
        ("labels.png", lambda pixels: np.dstack([pixels, pixels, 255 - pixels]), "labels.png is a color image"),
    ],
)
def test_verify_invalid_golden_edit_is_refused(
    name: str, change: Any, text: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repaint(copied / "golden/car_away" / name, change)
    reseal(copied)
    code, printed = run_verify(copied, capsys)
    assert code == printed["exit_code"] == 6 and text in printed["error"] and "golden/car_away" in printed["error"]
