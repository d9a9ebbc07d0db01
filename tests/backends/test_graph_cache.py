"""Entries that are complete and intact are used; anything else works without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.backends import graph_cache
from spmdeploy.backends.graph_cache import cache_key, graph_cache_folder, open_cached


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(graph_cache, "_reported", set())
    return tmp_path / "cache" / "graphs"


def opened(key: str = "key", content: str = "content") -> str:
    """How an entry was opened."""

    def load(folder: Path) -> str:
        assert (folder / "graph").read_text() == content
        return "loaded"

    def make(folder: Path) -> str:
        (folder / "graph").write_text(content)
        return "made"

    return open_cached(key, load, make, lambda: "plain")


def test_entry_is_made_once_and_then_loaded(cache: Path) -> None:
    assert [opened(), opened(), opened("other")] == ["made", "loaded", "made"]
    assert sorted(path.name for path in cache.iterdir()) == ["key", "other"]


@pytest.mark.parametrize("name", ["graph", "sums.json"])
@pytest.mark.parametrize("damage", [b"", b"altered", b"{}", b'{"graph": 1}', b"[]"])
def test_damaged_entry_is_made_again_and_reported(
    name: str, damage: bytes, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened()
    (cache / "key" / name).write_bytes(damage)
    assert [opened(), opened()] == ["made", "loaded"]
    assert len(caplog.records) == 1 and "damaged" in caplog.text


def test_missing_file_counts_as_damage(cache: Path) -> None:
    opened()
    (cache / "key" / "graph").unlink()
    assert [opened(), opened()] == ["made", "loaded"]


def test_entry_that_does_not_load_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    opened()
    assert opened(content="newer") == "made" and "cannot be used" in caplog.text
    assert opened(content="newer") == "loaded"


def test_cache_that_is_a_file_is_not_used_and_reported_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.write_bytes(b"")
    assert [opened(), opened()] == ["plain", "plain"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "not cached" in caplog.text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not hold for root")
def test_cache_that_may_not_be_entered_is_not_used(cache: Path) -> None:
    cache.parent.mkdir(mode=0o000)
    assert opened() == "plain"


def test_failure_while_writing_opens_the_graph_without_the_cache(cache: Path) -> None:
    def make(folder: Path) -> str:
        raise OSError(28, "No space left on device")

    assert open_cached("key", lambda folder: "loaded", make, lambda: "plain") == "plain"
    assert list(cache.iterdir()) == []


def test_failure_of_the_graph_itself_is_raised() -> None:
    def fail(*_: object) -> str:
        raise ValueError("no graph")

    with pytest.raises(ValueError, match="no graph"):
        open_cached("key", fail, fail, fail)


def test_least_recently_used_entries_are_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "MAX_CACHE_BYTES", 250)
    for number, key in enumerate("abc"):
        opened(key)
        os.utime(cache / key, (number, number))
    opened("a")  # used now
    opened("d")
    assert sorted(path.name for path in cache.iterdir()) == ["a", "d"]


def test_key_depends_on_every_fact_and_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cache_key("a", "b"), cache_key("a", "c"), cache_key("ab"), cache_key("a b")}
    monkeypatch.setattr(graph_cache, "cpu_features", lambda: "another processor")
    assert len(keys | {cache_key("a", "b")}) == 5


def test_edit_writes_nothing_but_its_own_cache(tmp_path: Path) -> None:
    """ONNX Runtime stores a device id and a database for telemetry unless this is disabled before the import."""
    pytest.importorskip("onnxruntime")
    sample, home = SAMPLE_EDITS[0], tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "SPMDEPLOY_"))}
    environment = {**kept, "HOME": str(home)}
    files = ["--labels", sample.labels, "--mask", sample.mask, "--output", tmp_path / "edited.png"]
    command = [sys.executable, "-m", "spmdeploy", "edit", sample.photo, *files, "--device", "cpu"]
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    written = {path.relative_to(home) for path in home.rglob("*") if path.is_file()}
    assert written and all(path.parts[:3] == (".cache", "spmdeploy", "graphs") for path in written), written
    assert graph_cache_folder().name == "graphs"
