"""Class tables (names and colors of class ids), and checks and conversions of label maps by them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from spmdeploy.errors import InputError
from spmdeploy.files import translated
from spmdeploy.inputs import regular_file
from spmdeploy.serialization import parse_json, shorten

Color: TypeAlias = tuple[int, int, int]

MAX_CLASSES = 256  # label maps have 8 bits
# The built-in tables: NAME.json, of the same form as a table given by path.
BUILT_IN = Path(__file__).parent / "assets" / "classes"
VOID_COLOR: Color = (0, 0, 0)
# For ids without a class. White is no class's color in the built-in tables.
UNKNOWN_COLOR: Color = (255, 255, 255)


@dataclass(frozen=True)
class LabelClass:
    """One class: its id in label maps, its name, and the RGB color it is shown in (0..255 each)."""

    id: int
    name: str
    color: Color


@dataclass(frozen=True)
class ClassTable:
    """The classes of a model or data set: ids 0..K-1 in order, each once.

    `void_id` is the label value that stands for "no class": one of the classes, a value outside them (often 255), or
    None. A label outside 0..K-1 gives the network an all-zero condition.
    """

    name: str
    classes: tuple[LabelClass, ...]
    void_id: int | None = None

    def __len__(self) -> int:
        return len(self.classes)

    def find(self, wanted: str) -> LabelClass:
        """Finds a class by name or id: "car", "Traffic_Light", "26".

        Case, blanks, hyphens and underscores are ignored; a name is preferred to an id.

        Raises:
            InputError: There is none; suggests close matches.
        """
        by_name = {_plain(label.name): label for label in self.classes}
        if (label := by_name.get(_plain(wanted))) is not None:
            return label
        if wanted.strip().isdecimal() and len(wanted) < 10 and int(wanted) < len(self):
            return self.classes[int(wanted)]
        near = [by_name[plain].name for plain in _close_matches(_plain(wanted), by_name)]
        raise InputError(
            f"{self.name} has no class {shorten(wanted)}; its ids run from 0 to {len(self) - 1}",
            f"did you mean {' or '.join(map(repr, near))}?" if near else "give the name or the id of a class",
        )

    @classmethod
    def from_json(cls, content: object, source: str) -> ClassTable:
        """Converts parsed JSON.

        Two forms are accepted: {"name", "void_id", "classes": [{"id", "name", "color"}]} and that of data folders,
        {"dataset", "void_id", "labels": [...]}. Other fields are ignored.

        Args:
            source: Named in errors.

        Raises:
            InputError: It is no class table.
        """
        if not isinstance(content, dict):
            raise InputError(f"{source} is not a class table: it holds no JSON object", _TABLE_HINT)
        name = content.get("name", content.get("dataset"))
        if not isinstance(name, str) or not name:
            raise InputError(f"{source} is not a class table: its name is {name!r}", _TABLE_HINT)
        rows = content.get("classes", content.get("labels"))
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_CLASSES:
            raise InputError(f"{source} lists no classes, or more than {MAX_CLASSES}", _TABLE_HINT)
        void_id = content.get("void_id")
        if void_id is not None and not _is_byte(void_id):
            raise InputError(f"{source} has the void id {void_id!r}; it must be null or 0 to 255", _TABLE_HINT)
        return cls(name, _ordered([_label_class(row, source) for row in rows], source), void_id)

    def to_json(self) -> dict[str, Any]:
        """JSON value that `from_json` reads."""
        rows = [asdict(label) | {"color": list(label.color)} for label in self.classes]
        return {"name": self.name, "void_id": self.void_id, "classes": rows}


_TABLE_HINT = 'a class table is {"name": ..., "void_id": null, "classes": [{"id": 0, "name": ..., "color": [r, g, b]}]}'


def class_table(name_or_path: str | Path) -> ClassTable:
    """The built-in table of that name ("cityscapes", "ade20k"), or the one in that JSON file.

    Raises:
        InputError: There is neither, or the file is no class table.
    """
    if str(name_or_path) in built_in_tables():
        return _table_in(BUILT_IN / f"{name_or_path}.json")
    if Path(name_or_path).suffix.lower() != ".json" and not os.path.exists(name_or_path):
        raise InputError(f"there is no class table called {str(name_or_path)!r}", _names_hint())
    return _table_in(Path(name_or_path))


def built_in_tables() -> tuple[str, ...]:
    """The names that `class_table` knows without a file."""
    return tuple(sorted(path.stem for path in BUILT_IN.glob("*.json")))


def count_labels(labels: NDArray[np.integer[Any]]) -> dict[int, int]:
    """The number of pixels of each id in integers of any shape, by ascending id."""
    if labels.dtype != np.uint8:
        ids, counts = np.unique(labels, return_counts=True)
        return {int(i): int(n) for i, n in zip(ids, counts, strict=True)}
    flat = labels.ravel()
    totals = np.zeros(256, np.int64)
    # In blocks: bincount makes 8 bytes of every label, which for a whole 100-megapixel map would be 800 MB.
    for start in range(0, flat.size, 1 << 20):
        totals += np.bincount(flat[start : start + (1 << 20)], minlength=256)
    return {int(i): int(totals[i]) for i in np.flatnonzero(totals)}


def check_labels(
    labels: NDArray[np.integer[Any]], table: ClassTable, source: str, where: NDArray[np.bool_] | None = None
) -> None:
    """Checks that every label is a class of the table or its void id.

    Args:
        labels: Integers (H, W).
        source: The name of the map in errors.
        where: Bool (H, W), the pixels to check; None for all.

    Raises:
        InputError: Lists other ids and their pixel counts.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{source} holds {labels.dtype} values; class ids are whole numbers")
    counts = count_labels(labels if where is None else labels[where])
    unknown = {i: n for i, n in counts.items() if not 0 <= i < len(table) and i != table.void_id}
    if unknown:
        listed = _format_list(f"{i} ({_pixels(n)})" for i, n in unknown.items())
        last = table.classes[-1]
        place = "" if where is None else ", under the mask"
        raise InputError(
            f"{source} holds ids that {table.name} does not have{place}: {listed}",
            f"ids run from 0 ({table.classes[0].name}) to {last.id} ({last.name}); "
            "`spmdeploy labels convert` shifts ids or turns class colors into ids",
        )


def colorize(labels: NDArray[np.uint8], table: ClassTable) -> NDArray[np.uint8]:
    """Paints a label map in class colors: uint8 (H, W) to uint8 (H, W, 3) RGB.

    A void id that is no class is black, any other id that is no class white.
    """
    colors = np.full((MAX_CLASSES, 3), UNKNOWN_COLOR, np.uint8)
    if table.void_id is not None:
        colors[table.void_id] = VOID_COLOR
    colors[: len(table)] = [label.color for label in table.classes]
    return colors[labels]


def labels_from_colors(rgb: NDArray[np.uint8], table: ClassTable, source: str) -> NDArray[np.uint8]:
    """Converts a map in class colors to ids: uint8 (H, W, 3) RGB to uint8 (H, W).

    A color of several classes (`shared_colors`) becomes the first of them. Black becomes the void id if no class is
    black.

    Raises:
        InputError: Lists colors without a class and their pixel counts.
    """
    ids = _ids_by_color(table)[_packed(rgb)]
    missing = ids < 0
    if missing.any():
        colors, counts = np.unique(rgb[missing], axis=0, return_counts=True)
        common = np.argsort(-counts, kind="stable")
        listed = _format_list(f"({', '.join(map(str, colors[k]))}) ({_pixels(int(counts[k]))})" for k in common)
        raise InputError(
            f"{source} holds {len(colors)} colors that no class of {table.name} has: {listed}",
            "name the table that the map was drawn with, and export the map without smoothing or JPEG compression",
        )
    return ids.astype(np.uint8)


def shared_colors(table: ClassTable) -> dict[Color, tuple[LabelClass, ...]]:
    """The colors of more than one class, which a colored map cannot distinguish.

    Cityscapes shows five void classes in black and pole groups like poles; ADE20K skyscrapers like roads.
    """
    owners: dict[Color, tuple[LabelClass, ...]] = {}
    for label in table.classes:
        owners[label.color] = (*owners.get(label.color, ()), label)
    return {color: labels for color, labels in owners.items() if len(labels) > 1}


def offset_labels(
    labels: NDArray[np.integer[Any]], offset: int, source: str, void_id: int | None = None
) -> NDArray[np.uint8]:
    """Adds a number to every id but one.

    Args:
        labels: integer, of any shape and with any ids.
        offset: The number, of either sign.
        source: How messages name the labels.
        void_id: An id that stays; None: every id is shifted.

    Returns:
        uint8 of the same shape.

    Raises:
        InputError: Lists ids that would leave 0..255 and their pixel counts.
    """
    outside = {i: n for i, n in count_labels(labels).items() if i != void_id and not 0 <= i + offset < MAX_CLASSES}
    if outside:
        listed = _format_list(f"{i} ({_pixels(n)})" for i, n in outside.items())
        raise InputError(
            f"{source} cannot be shifted by {offset:+d}: these ids would leave 0..255: {listed}",
            "name the void id, which is not shifted, or choose another offset",
        )
    # int64: the sum of an 8-bit void id and the offset would wrap
    shifted = labels.astype(np.int64) + offset
    return np.where(labels == void_id, labels, shifted).astype(np.uint8)


def _table_in(path: Path) -> ClassTable:
    try:
        content = parse_json(regular_file(path).read_bytes())
    except FileNotFoundError as exc:
        raise InputError(f"there is no file {path}", _names_hint()) from exc
    except OSError as exc:
        raise translated(exc, path, "read") from exc
    except ValueError as exc:
        raise InputError(f"{path} is not JSON: {exc}", _TABLE_HINT) from exc
    return ClassTable.from_json(content, str(path))


def _names_hint() -> str:
    return f"use {', '.join(built_in_tables())} or a path to a .json"


def _label_class(row: object, source: str) -> LabelClass:
    if not isinstance(row, dict):
        raise InputError(f"{source} lists a class that is {row!r}, not an object", _TABLE_HINT)
    number, name, color = row.get("id"), row.get("name"), row.get("color")
    if not _is_byte(number):
        raise InputError(f"{source} has a class with the id {number!r}; ids are 0 to 255", _TABLE_HINT)
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{source} has no name for class {number}", _TABLE_HINT)
    if not isinstance(color, list) or len(color) != 3 or not all(map(_is_byte, color)):
        raise InputError(f"{source} gives class {number} ({name}) the color {color!r}, not [r, g, b]", _TABLE_HINT)
    return LabelClass(number, name, (color[0], color[1], color[2]))


def _ordered(classes: list[LabelClass], source: str) -> tuple[LabelClass, ...]:
    """The classes sorted by id; checks that ids are 0..K-1 and names distinct."""
    ids = sorted(label.id for label in classes)
    if ids != list(range(len(classes))):
        wrong = sorted({i for i in ids if ids.count(i) > 1 or i >= len(classes)})
        raise InputError(
            f"{source} lists {len(classes)} classes, so their ids must be 0 to {len(classes) - 1}, each once; "
            f"twice or too large: {_format_list(map(str, wrong))}",
            "fill gaps with classes of their own; a value outside the classes can be the void_id",
        )
    seen: dict[str, LabelClass] = {}
    for label in classes:
        other = seen.setdefault(_plain(label.name), label)
        if other is not label:
            raise InputError(f"{source} calls both class {other.id} and class {label.id} {label.name!r}")
    return tuple(sorted(classes, key=lambda label: label.id))


def _ids_by_color(table: ClassTable) -> NDArray[np.int16]:
    """int16 (2**24,): the id of every packed color, -1 for colors without a class."""
    ids = np.full(1 << 24, -1, np.int16)
    if table.void_id is not None:
        ids[_packed(np.array(VOID_COLOR, np.uint8))] = table.void_id
    for label in reversed(table.classes):  # the first of several classes is kept
        ids[_packed(np.array(label.color, np.uint8))] = label.id
    return ids


def _packed(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """uint8 (..., 3) to one int32 0xRRGGBB each."""
    packed = rgb[..., 0].astype(np.int32)
    packed <<= 8
    packed |= rgb[..., 1]
    packed <<= 8
    packed |= rgb[..., 2]
    return packed


def _is_byte(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _plain(name: str) -> str:
    """Normalizes a name for comparison."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _close_matches(wanted: str, names: Iterable[str]) -> list[str]:
    """Up to three names that are similar to the wanted one or contain it."""
    names = list(names)
    containing = [name for name in names if wanted and wanted in name]
    return list(dict.fromkeys(get_close_matches(wanted, names, n=3) + containing))[:3]


def _format_list(items: Iterable[str], limit: int = 8) -> str:
    """Joins the first `limit` items and counts the others."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _pixels(count: int) -> str:
    return "1 pixel" if count == 1 else f"{count} pixels"
