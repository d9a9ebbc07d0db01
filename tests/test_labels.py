"""Class tables and conversions of label maps: official entries, errors with their figures, round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spmdeploy.errors import InputError
from spmdeploy.labels import (
    ClassTable,
    LabelClass,
    built_in_tables,
    check_labels,
    class_table,
    colorize,
    count_labels,
    labels_from_colors,
    offset_labels,
    shared_colors,
)

CITYSCAPES = class_table("cityscapes")
ADE20K = class_table("ade20k")
TWO = ClassTable("two", (LabelClass(0, "left", (255, 0, 0)), LabelClass(1, "right side", (0, 0, 255))), void_id=255)
MAPS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


def json_with(**changes: Any) -> dict[str, Any]:
    return TWO.to_json() | changes


@pytest.mark.parametrize(
    ("table", "entry"),
    [
        (CITYSCAPES, LabelClass(0, "unlabeled", (0, 0, 0))),
        (CITYSCAPES, LabelClass(7, "road", (128, 64, 128))),
        (CITYSCAPES, LabelClass(23, "sky", (70, 130, 180))),
        (CITYSCAPES, LabelClass(26, "car", (0, 0, 142))),
        (CITYSCAPES, LabelClass(33, "bicycle", (119, 11, 32))),
        (ADE20K, LabelClass(0, "other", (0, 0, 0))),
        (ADE20K, LabelClass(1, "wall", (120, 120, 120))),
        (ADE20K, LabelClass(3, "sky", (6, 230, 230))),
        (ADE20K, LabelClass(8, "bed", (204, 5, 255))),
        (ADE20K, LabelClass(21, "car", (0, 102, 200))),
        (ADE20K, LabelClass(137, "traffic light", (41, 0, 255))),
        (ADE20K, LabelClass(150, "flag", (92, 0, 255))),
    ],
)
def test_built_in_tables_have_official_entries(table: ClassTable, entry: LabelClass) -> None:
    assert table.classes[entry.id] == entry


def test_built_in_tables_are_complete() -> None:
    assert {"ade20k", "cityscapes"} <= set(built_in_tables())
    assert (len(CITYSCAPES), len(ADE20K)) == (34, 151)
    for table in (CITYSCAPES, ADE20K):
        assert table.void_id is None
        assert [label.id for label in table.classes] == list(range(len(table)))
        assert len({label.name for label in table.classes}) == len(table)


def test_shared_colors_of_built_in_tables_are_known() -> None:
    ids = {color: [label.id for label in labels] for color, labels in shared_colors(CITYSCAPES).items()}
    assert ids == {(0, 0, 0): [0, 1, 2, 3, 4], (153, 153, 153): [17, 18]}
    assert [[label.id for label in labels] for labels in shared_colors(ADE20K).values()] == [[7, 49]]


@pytest.mark.parametrize("wanted", ["traffic light", "Traffic_Light", " traffic-light ", "19"])
def test_find_name_or_id_gives_the_class(wanted: str) -> None:
    assert CITYSCAPES.find(wanted).id == 19


def test_find_name_is_preferred_to_id() -> None:
    table = ClassTable("odd", (LabelClass(0, "1", (0, 0, 0)), LabelClass(1, "0", (1, 1, 1))))
    assert table.find("1").id == 0


@pytest.mark.parametrize(
    ("wanted", "hint"), [("cra", "'car'"), ("traffic", "'traffic light'"), ("34", "name or the id"), ("", "the id")]
)
def test_find_unknown_name_suggests_similar_ones(wanted: str, hint: str) -> None:
    with pytest.raises(InputError, match="0 to 33") as caught:
        CITYSCAPES.find(wanted)
    assert caught.value.hint is not None and hint in caught.value.hint


def test_find_id_of_thousands_of_digits_is_refused_shortly() -> None:
    with pytest.raises(InputError, match="no class '999") as caught:
        CITYSCAPES.find("9" * 5000)
    assert len(caught.value.problem) < 200


@pytest.mark.parametrize("table", [CITYSCAPES, ADE20K, TWO])
def test_from_json_written_table_is_equal(table: ClassTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_json()))
    assert class_table(path) == class_table(str(path)) == table


def test_from_json_any_order_is_sorted() -> None:
    assert ClassTable.from_json(json_with(classes=TWO.to_json()["classes"][::-1]), "x") == TWO


def test_from_json_form_of_data_folders_is_read() -> None:
    content = {
        "dataset": "facades",
        "void_id": 0,
        "num_classes_including_void": 2,
        "thing_ids": [1],
        "labels": [{"id": 0, "name": "void", "color": [0, 0, 0]}, {"id": 1, "name": "car", "color": [64, 0, 128]}],
    }
    table = ClassTable.from_json(content, "labels.json")
    assert (table.name, table.void_id, len(table)) == ("facades", 0, 2)
    assert table.find("car") == LabelClass(1, "car", (64, 0, 128))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "no JSON object"),
        (json_with(name=""), "name is ''"),
        (json_with(classes=[]), "lists no classes"),
        (json_with(classes=[{"id": i % 256, "name": str(i), "color": [0, 0, 0]} for i in range(257)]), "more than 256"),
        (json_with(void_id=256), "void id 256"),
        (json_with(void_id=True), "void id True"),
        (json_with(classes=[7]), "is 7, not an object"),
        (json_with(classes=[{"id": -1, "name": "a", "color": [0, 0, 0]}]), "the id -1"),
        (json_with(classes=[{"id": 1, "name": "a", "color": [0, 0, 0]}]), "0 to 0, each once; twice or too large: 1"),
        (json_with(classes=TWO.to_json()["classes"] * 2), "twice or too large: 0, 1"),
        (json_with(classes=[{"id": 0, "name": " ", "color": [0, 0, 0]}]), "no name for class 0"),
        (json_with(classes=[{"id": 0, "name": "a", "color": [0, 0]}]), r"color \[0, 0\]"),
        (json_with(classes=[{"id": 0, "name": "a", "color": [0, 0, 256]}]), r"color \[0, 0, 256\]"),
        (
            json_with(classes=[{"id": i, "name": n, "color": [0, 0, 0]} for i, n in enumerate(("a b", "A_b"))]),
            "both class 0 and class 1",
        ),
    ],
)
def test_from_json_invalid_table_is_refused(content: object, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        ClassTable.from_json(content, "mine.json")
    assert "mine.json" in caught.value.problem


def test_class_table_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    (tmp_path / "folder.json").mkdir()
    problems = {"text": "not JSON", "latin": "not JSON", "folder": "is a folder", "none": "no file"}
    for name, problem in problems.items():
        with pytest.raises(InputError, match=problem):
            class_table(tmp_path / f"{name}.json")
    with pytest.raises(InputError, match="'citscapes'") as caught:
        class_table("citscapes")
    assert caught.value.hint is not None and "cityscapes" in caught.value.hint


@given(MAPS)
def test_count_labels_agrees_with_numpy(labels: np.ndarray) -> None:
    counts = count_labels(labels)
    assert counts == count_labels(labels.astype(np.int32))
    assert sum(counts.values()) == labels.size
    assert all((labels == i).sum() == n for i, n in counts.items())


def test_count_labels_beyond_one_block_agrees() -> None:
    assert count_labels(np.full((1025, 1025), 3, np.uint8)) == {3: 1025 * 1025}


def test_check_labels_unknown_ids_are_listed() -> None:
    labels = np.array([[0, 1, 2], [2, 255, 9]], np.uint8)
    with pytest.raises(InputError, match=r"^l\.png holds ids that two does not have: 2 \(2 pixels\), 9 \(1 pixel\)$"):
        check_labels(labels, TWO, "l.png")
    with pytest.raises(InputError, match=r"under the mask: 9 \(1 pixel\)$"):
        check_labels(labels, TWO, "l.png", labels == 9)
    check_labels(labels, TWO, "l.png", labels != labels)
    check_labels(labels, TWO, "l.png", np.isin(labels, (0, 1, 255)))


def test_check_labels_255_is_void_only_in_such_tables() -> None:
    labels = np.full((2, 2), 255, np.uint8)
    check_labels(labels, TWO, "l.png")
    with pytest.raises(InputError, match=r"255 \(4 pixels\)"):
        check_labels(labels, CITYSCAPES, "l.png")


def test_check_labels_other_arrays_are_checked() -> None:
    with pytest.raises(InputError, match="float64"):
        check_labels(np.zeros((2, 2)), TWO, "array")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"-1 \(4 pixels\)"):
        check_labels(np.full((2, 2), -1), TWO, "array")
    with pytest.raises(InputError, match=r"7 \(1 pixel\), 8 .*and 2 more"):
        check_labels(np.arange(12), ClassTable("two", TWO.classes), "array")


@given(hnp.arrays(np.uint8, (5, 4), elements=st.sampled_from([0, 1, 255])))
def test_labels_from_colors_painted_map_is_equal(labels: np.ndarray) -> None:
    image = colorize(labels, TWO)
    assert image.shape == (5, 4, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(labels_from_colors(image, TWO, "x"), labels)


def test_labels_from_colors_distinct_colors_are_exact() -> None:
    for table in (CITYSCAPES, ADE20K):
        ids = np.arange(len(table), dtype=np.uint8)[None]
        back = labels_from_colors(colorize(ids, table), table, "x")
        first = {label.id: owners[0].id for owners in shared_colors(table).values() for label in owners}
        assert back.tolist() == [[first.get(i, i) for i in range(len(table))]]


def test_colorize_ids_without_class_are_black_or_white() -> None:
    image = colorize(np.array([[255, 9]], np.uint8), TWO)
    assert image.tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_labels_from_colors_unknown_ones_are_listed() -> None:
    rgb = np.zeros((2, 2, 3), np.uint8)
    rgb[0, 0] = 1, 2, 3
    rgb[1] = 9, 9, 9
    with pytest.raises(InputError, match=r"2 colors .*: \(9, 9, 9\) \(2 pixels\), \(1, 2, 3\) \(1 pixel\)"):
        labels_from_colors(rgb, TWO, "map.png")


@given(MAPS, st.integers(-300, 300), st.none() | st.integers(0, 255))
def test_offset_labels_is_exact_or_refused(labels: np.ndarray, offset: int, void_id: int | None) -> None:
    expected = [i if i == void_id else i + offset for i in labels.ravel().tolist()]
    if all(0 <= i <= 255 for i in expected):
        shifted = offset_labels(labels, offset, "x", void_id)
        assert shifted.dtype == np.uint8 and shifted.ravel().tolist() == expected
    else:
        with pytest.raises(InputError, match=r"leave 0\.\.255"):
            offset_labels(labels, offset, "x", void_id)
