"""The commands of `labels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spmdeploy.assets.samples import SAMPLE_EDITS
from tests.cli.harness import pixels, save


def test_labels_check_counts_pixels_of_each_class(run: Any) -> None:
    result = run("labels", "check", SAMPLE_EDITS[0].labels, "--json")
    assert result.code == 0 and sum(entry["pixels"] for entry in result.json["labels"]) == 360 * 480
    assert result.json["labels"][0]["name"] == "sky"
    assert run("labels", "check", SAMPLE_EDITS[0].labels).out.splitlines()[1].split()[:2] == ["0", "sky"]


def test_labels_check_refuses_and_show_paints_unknown_ids_white(run: Any, tmp_path: Path) -> None:
    ids = save(tmp_path / "ids.png", np.array([[3, 40], [40, 200]], np.uint8))
    result = run("labels", "check", ids, "--json")
    assert result.code == 7 and "40 (2 pixels), 200 (1 pixel)" in result.json["error"]
    result = run("labels", "show", ids, "-o", tmp_path / "shown.png", "--json")
    assert result.code == 0 and result.json["notes"] == ["street has no class 40, 200: painted white"]
    assert pixels(tmp_path / "shown.png")[0, 1].tolist() == [255, 255, 255]


def test_labels_show_then_convert_restores_ids(run: Any, tmp_path: Path) -> None:
    source, colored, back = SAMPLE_EDITS[0].labels, tmp_path / "colored.png", tmp_path / "ids.png"
    assert run("labels", "show", source, "-o", colored).code == 0
    result = run("labels", "convert", colored, "-o", back, "--json")
    assert result.code == 0 and result.json["notes"] == []
    assert np.array_equal(pixels(back), pixels(source))
    assert run("labels", "convert", colored, "-o", back).code == 7  # it exists
    assert run("labels", "convert", colored, "-o", tmp_path / "x.png", "--classes", "cityscapes").code == 7


def test_labels_convert_shared_color_is_noted(run: Any, tmp_path: Path) -> None:
    black = save(tmp_path / "black.png", np.zeros((4, 4, 3), np.uint8))
    result = run("labels", "convert", black, "-o", tmp_path / "ids.png", "--classes", "cityscapes", "--json")
    assert result.code == 0 and "share the color (0, 0, 0): taken for unlabeled" in result.json["notes"][0]


def test_labels_convert_offset_shifts_all_ids_but_void(run: Any, tmp_path: Path) -> None:
    ids = save(tmp_path / "ids.png", np.array([[1, 7], [12, 255]], np.uint8))
    shifted, back = tmp_path / "shifted.png", tmp_path / "back.png"
    assert run("labels", "convert", ids, "-o", shifted, "--offset", "-1", "--void", "255").code == 0
    assert pixels(shifted).tolist() == [[0, 6], [11, 255]]
    assert run("labels", "convert", shifted, "-o", back, "--offset", "1", "--void", "255").code == 0
    assert np.array_equal(pixels(back), pixels(ids))
    result = run("labels", "convert", ids, "-o", tmp_path / "x.png", "--offset", "1", "--json")
    assert result.code == 7 and "255" in result.json["error"] and not (tmp_path / "x.png").exists()
