"""Edit requests and options: contradictions, paths, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spmdeploy.editing.options import DEFAULT_DILATION, EditRequest, parse_padding
from spmdeploy.errors import UsageError
from spmdeploy.types import Padding
from tests.editing.small_edit import changed, small_edit


@pytest.fixture
def files(tmp_path: Path) -> EditRequest:
    return small_edit(tmp_path)


def test_edit_request_dilation_depends_on_the_source_of_the_mask(files: EditRequest) -> None:
    from_changes = {"mask": None, "edited_from": files.image}
    assert files.dilation == 0 and changed(files, dilate=3).dilation == 3
    assert changed(files, **from_changes).dilation == DEFAULT_DILATION
    assert changed(files, dilate=0, **from_changes).dilation == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "either labels or fill"),
        ({"fill": "road"}, "either labels or fill"),
        ({"labels": None, "fill": "road", "match_surroundings": True}, "match_surroundings needs the labels"),
        ({"mask": None}, "one of mask, edited_from and extend"),
        ({"edited_from": Path("l.png")}, "one of mask, edited_from and extend"),
        ({"extend": Padding(1, 0, 0, 0)}, "one of mask, edited_from and extend"),
        ({"mask": None, "extend": Padding(1, 0, 0, 0), "dilate": 2}, "grow enlarges a mask"),
        ({"mask": None, "edited_from": Path("l.png"), "labels": None, "fill": "road"}, "edited_from needs labels"),
        ({"dilate": -1}, "grow is -1"),
        ({"dilate": 1025}, "grow is 1025"),
    ],
)
def test_edit_request_contradictions_are_refused(changes: dict[str, Any], message: str, files: EditRequest) -> None:
    with pytest.raises(UsageError, match=message):
        changed(files, **changes)


def test_edit_request_outputs_over_inputs_are_refused(files: EditRequest, tmp_path: Path) -> None:
    link = tmp_path / "link.png"
    link.symlink_to(files.mask)  # type: ignore[arg-type]
    for changes in (
        {"output": link},
        {"output": files.labels},
        {"sheet": files.image},
        {"sheet": files.output},
        {"explain": files.mask},
        {"explain": files.output},
        {"explain": tmp_path / "sheet.png", "sheet": tmp_path / "sheet.png"},
    ):
        with pytest.raises(UsageError, match="would be written over"):
            changed(files, **changes)
    assert changed(files, output=files.image).output == files.image


@pytest.mark.parametrize("text", ["0,0,256,0", "0 0 256 0", " 0, 0, 256, 0 "])
def test_parse_padding_separators_are_accepted(text: str) -> None:
    assert parse_padding(text) == Padding(0, 0, 256, 0)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1.5,0,0,0", "1,2,3,1" + "0" * 5000, "٣,0,0,0"])
def test_parse_padding_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not four whole numbers"):
        parse_padding(text)


@pytest.mark.parametrize("option", [{"mask_threshold": 100}, {"mask_alpha": "transparent"}])
def test_edit_request_mask_options_without_mask_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="are about a mask file"):
        EditRequest(Path("a.png"), Path("b.png"), fill="road", extend=Padding(0, 0, 8, 0), **option)
