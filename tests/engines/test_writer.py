"""Engines are written whole or not at all, and only useless ones are removed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spmdeploy import default_model
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.engines.pack import pack
from spmdeploy.engines.writer import EngineWriter, choose_place, remove_stale_engines
from spmdeploy.errors import InputError, UsageError
from tests.engines.test_store import CONTENT, add, in_bundle, only, truncate, zip_all
from tests.simulators.records import A10, HOST, for_targets, sample

pytestmark = pytest.mark.usefixtures("cache")


def test_remove_stale_engines_useful_ones_are_kept(bundle: Bundle) -> None:
    here, for_fleet = add(in_bundle(bundle)), add(in_bundle(bundle), for_targets("sm75"))
    outdated = add(in_bundle(bundle), sample(version="10.3.0"))
    elsewhere = add(in_bundle(bundle), sample(gpu=A10))
    no_driver = replace(HOST, versions={}, gpu=None)
    assert remove_stale_engines(bundle, no_driver) == []
    removed = remove_stale_engines(bundle, HOST)
    assert {engine.path for engine in removed} == {outdated, elsewhere}
    assert all(engine.permanent for engine in removed)
    assert here.exists() and for_fleet.exists() and not outdated.parent.exists()


def test_remove_stale_engines_other_files_are_kept(bundle: Bundle) -> None:
    path = add(in_bundle(bundle), sample(gpu=A10))
    path.with_name("notes.txt").write_text("mine")
    remove_stale_engines(bundle, HOST)
    assert [file.name for file in path.parent.iterdir()] == ["notes.txt"]


def test_remove_stale_engines_zip_is_unchanged(bundle: Bundle, tmp_path: Path) -> None:
    truncate(add(in_bundle(bundle)))
    zipped = zip_all(bundle, tmp_path / "z.spm.zip")
    assert only(zipped).problems and remove_stale_engines(zipped, HOST) == []


def test_engine_writer_failed_build_keeps_only_the_log(bundle: Bundle) -> None:
    place = in_bundle(bundle)
    writer = EngineWriter(place, "edit.fp16")

    def build() -> None:
        with writer:
            writer.log.write_text("[ERROR] no such layer\n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()
    assert [file.name for file in place.folder.iterdir()] == ["edit.fp16.failed.log"] == [writer.failed_log.name]
    add(place)
    assert not writer.failed_log.exists() and only(bundle).fit


def test_engine_writer_same_key_is_replaced(bundle: Bundle) -> None:
    assert add(in_bundle(bundle)) == add(in_bundle(bundle))
    assert only(bundle).fit
    assert len(list((bundle.path / "engines").iterdir())) == 1


def test_choose_place_bundle_or_cache(bundle: Bundle, tmp_path: Path, cache: Path) -> None:
    assert choose_place(bundle).folder == bundle.path / "engines"
    assert choose_place(bundle, "cache").folder == cache
    assert "as requested" in choose_place(bundle, "cache").summary
    for other, why in (
        (pack(bundle, tmp_path / "street.spm.zip"), "is a zip"),
        (default_model(), "part of the installed package"),
    ):
        place = choose_place(open_bundle(other))
        assert (place.folder, place.place) == (cache, "cache") and why in place.why
        with pytest.raises(UsageError, match=why):
            choose_place(open_bundle(other), "bundle")
    assert not cache.exists()  # no empty folder is created


def test_choose_place_unwritable_bundle_gives_the_cache(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, and tests may run as root
    assert choose_place(bundle).folder == cache and "cannot be written to" in choose_place(bundle).why


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_engine_writer_cache_is_private(bundle: Bundle, cache: Path) -> None:
    add(choose_place(bundle, "cache"))
    assert stat.S_IMODE(cache.stat().st_mode) & 0o077 == 0


def test_engine_writer_unwritable_place_is_named(bundle: Bundle, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(InputError, match="engines is a file, not a folder"):
        add(choose_place(bundle, "cache"))


BUILD = """
import sys
from pathlib import Path
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.engines.store import find_engines
from spmdeploy.engines.writer import choose_place
from tests.engines.test_store import HOST, add
bundle = open_bundle(sys.argv[1])
for _ in range(25):
    add(choose_place(bundle, "cache"))
    # A listing of the folder may miss an entry that is exchanged at that very moment; the next one has it.
    found = next(filter(None, (find_engines(bundle, HOST) for _ in range(20))))
    assert len(found) == 1
    found[0].read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an engine is replaced in two steps")
def test_engine_writer_two_processes_in_one_cache_leave_one_whole_engine(bundle: Bundle, cache: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(bundle.path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0), ("", 0)]
    assert only(bundle).read() == CONTENT
    assert [path.name for path in cache.iterdir()] == [only(bundle).path.parent.name]
