"""A bundle and a cache for engines, and the fixtures of the bundle tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from spmdeploy.bundle.bundle import Bundle
from tests.bundle.conftest import no_flushing, street, street_zip, write_street  # noqa: F401


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of engines."""
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle without engines, in a folder."""
    return write_street(tmp_path / "street.spm")
