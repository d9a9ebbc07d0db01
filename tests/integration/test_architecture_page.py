"""docs/architecture.md: the diagram and the tables name what the package holds."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import grimp
import pytest

import spmdeploy

PACKAGE = Path(spmdeploy.__file__).parent
PAGE = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def arrows(page: str) -> set[tuple[str, str]]:
    """The arrows of the diagram as pairs of nodes."""
    found = set()
    for line in re.findall(r"^  (\w.*-->.*)$", page, re.MULTILINE):
        ends = [[re.sub(r"\[.*", "", node).strip() for node in end.split("&")] for end in line.split("-->")]
        for sources, targets in pairwise(ends):
            found |= {(source, target) for source in sources for target in targets}
    return found


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
    """Which folder of the package imports which other one directly."""
    graph = grimp.build_graph("spmdeploy", cache_dir=None)
    pairs = {
        (one.split(".")[1], other.split(".")[1])
        for one in graph.modules - {"spmdeploy"}
        for other in graph.find_modules_directly_imported_by(one) - {"spmdeploy"}
    }
    return {(one, other) for one, other in pairs if one != other}


def test_diagram_arrows_are_imports(imports: set[tuple[str, str]]) -> None:
    base = set(re.search(r'base\["([^"]*)"\]', PAGE)[1].split(", "))  # type: ignore[index]
    missing = {
        (one, other)
        for one, other in arrows(PAGE)
        if not any((one, target) in imports for target in (base if other == "base" else {other}))
    }
    assert missing == set()


def test_folder_table_lists_every_folder() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == FOLDERS


def test_page_paths_exist() -> None:
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", PAGE)
    assert named and [path for path in named if not (PACKAGE / path).exists()] == []
