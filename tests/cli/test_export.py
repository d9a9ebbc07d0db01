"""The command `export`: its JSON, and inputs and outputs that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.harness import Result


def test_export_json_is_one_object_listing_graphs(street_bundle: Path) -> None:
    result = Result(0, (street_bundle.with_name("export.stdout")).read_text(), "")
    assert result.json["schema"] == "spmdeploy.export/1"
    assert [graph["precision"] for graph in result.json["graphs"]] == ["fp32"] * 6 + ["fp16"] * 3 + [
        "fp32",
        "fp32",
        "fp16",
    ]


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "absent"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_of_invalid_checkpoint_exits_7(suffix: str, content: bytes | None, run: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / f"weights{suffix}"
    if content is not None:
        checkpoint.write_bytes(content)
    result = run("export", checkpoint, "-o", tmp_path / "b.spm", "--classes", "street", "--json")
    assert result.code == result.json["exit_code"] == 7 and checkpoint.stem in result.json["error"]
    assert not [path for path in tmp_path.iterdir() if path != checkpoint]


def test_export_with_wrong_class_table_exits_7(street_bundle: Path, run: Any, tmp_path: Path) -> None:
    args = ["export", street_bundle.with_name("tiny.safetensors"), "-o", tmp_path / "b.spm", "--json", "--classes"]
    result = run(*args, "cityscapes")
    assert result.code == 7 and "12 classes" in result.json["error"] and "34" in result.json["error"]
    assert run(*args, "cityscape").code == 7
    assert not list(tmp_path.iterdir())


def test_export_onto_folder_with_other_files_is_refused(street_bundle: Path, run: Any, tmp_path: Path) -> None:
    (tmp_path / "b.spm").mkdir()
    (tmp_path / "b.spm/thesis.txt").write_text("dear")
    args = ["export", street_bundle.with_name("tiny.safetensors"), "-o", tmp_path / "b.spm", "--classes", "street"]
    assert run(*args).code == run(*args, "--overwrite").code == 7
    assert (tmp_path / "b.spm/thesis.txt").read_text() == "dear"
