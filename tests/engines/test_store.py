"""Engines in bundles and the cache: searched, checked, written and removed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spmdeploy import default_model
from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.engines import store as engine_store
from spmdeploy.engines.pack import pack
from spmdeploy.engines.record import EngineFile, EngineRecord, SourceFile
from spmdeploy.engines.store import (
    EnginePlace,
    EngineWriter,
    StoredEngine,
    cache_folder,
    choose_place,
    find_engines,
    remove_stale_engines,
)
from spmdeploy.errors import BundleError, InputError, UnavailableError, UsageError
from tests.bundle.conftest import GRAPHS, write_street
from tests.engines.test_record import VERIFIED
from tests.simulators.records import A10, HOST, SAMPLE, for_targets, sample

CONTENT = b"not really an engine"
FP16 = SourceFile("graphs/edit.fp16.onnx", hashlib.sha256(GRAPHS["fp16"]).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_street(tmp_path / "street.spm")


def own(record: EngineRecord) -> EngineRecord:
    """The record of an engine built from the bundle's FP16 graph."""
    file = EngineFile("edit.fp16.engine", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    return replace(record, bundle="street", onnx=FP16, engine=file)


def add(place: EnginePlace, record: EngineRecord = SAMPLE) -> Path:
    with EngineWriter(place, "edit.fp16") as writer:
        writer.log.write_text("[INFO] built\n")
        return writer.finish(own(record), CONTENT)


def in_bundle(bundle: Bundle) -> EnginePlace:
    return choose_place(bundle, "bundle")


def zip_all(bundle: Bundle, path: Path) -> Bundle:
    """The bundle with its engines as a zip."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in bundle.path.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(bundle.path).as_posix())
    return open_bundle(path)


def only(bundle: Bundle) -> StoredEngine:
    (found,) = find_engines(bundle, HOST)
    return found


def test_read_compatible_engine_is_returned(bundle: Bundle) -> None:
    before = bundle.check_all()
    path = add(in_bundle(bundle))
    found = only(bundle)
    assert (found.path, found.place, found.reasons, found.fit) == (path, "bundle", (), True)
    assert found.read() == CONTENT and found.record == own(SAMPLE)
    assert sorted(file.name for file in path.parent.iterdir()) == ["build.log", "edit.fp16.engine", "engine.json"]
    again = open_bundle(bundle.path)
    assert again.check_all() == before == () and again.files() == bundle.files()  # the bundle is unchanged


def test_find_engines_cache_gives_those_of_the_bundle(bundle: Bundle, tmp_path: Path, cache: Path) -> None:
    zipped = open_bundle(pack(bundle, tmp_path / "street.spm.zip"))
    path = add(choose_place(zipped))
    assert path.is_relative_to(cache) and only(zipped).place == only(bundle).place == "cache"
    assert only(zipped).read() == CONTENT
    other = write_street(tmp_path / "other.spm", name="other")
    assert only(other).fit  # the same graph under another name
    with EngineWriter(choose_place(zipped), "x") as writer:
        writer.finish(replace(own(SAMPLE), bundle="third", onnx=SourceFile(FP16.file, "9" * 64)), CONTENT)
    assert [found.path for found in find_engines(other, HOST)] == [path]


def test_find_engines_inside_zip_are_read(bundle: Bundle, tmp_path: Path) -> None:
    path = add(in_bundle(bundle))
    found = only(zip_all(bundle, tmp_path / "z.spm.zip"))
    assert found.path == tmp_path / "z.spm.zip" / path.relative_to(bundle.path)
    assert found.read() == CONTENT


def test_find_engines_without_engine_examines_no_machine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[int] = []
    monkeypatch.setattr(engine_store, "local_host", lambda: lookups.append(1) or HOST)
    assert find_engines(bundle) == [] and not lookups
    add(in_bundle(bundle))
    assert find_engines(bundle)[0].fit and lookups == [1]


def test_read_incompatible_engine_lists_every_reason(bundle: Bundle) -> None:
    add(in_bundle(bundle))
    (found,) = find_engines(bundle, replace(HOST, versions={"tensorrt": "10.3.0"}, gpu=A10))
    assert not found.fit and not found.problems and len(found.reasons) == 2
    with pytest.raises(BundleError, match=r"built with 10\.16\.1, here 10\.3\.0; GPU: .*RTX 3060.*A10") as caught:
        found.read()
    assert caught.value.exit_code == 6


def truncate(engine: Path) -> None:
    engine.write_bytes(CONTENT[:-1])


def tamper(engine: Path) -> None:
    engine.write_bytes(b"N" + CONTENT[1:])


def extend(engine: Path) -> None:
    engine.write_bytes(CONTENT + b"!")


def rename(engine: Path) -> None:
    engine.rename(engine.with_name("mine.engine"))


def take_away(engine: Path) -> None:
    engine.unlink()


def garble_record(engine: Path) -> None:
    engine.with_name("engine.json").write_text("{")


def swell_record(engine: Path) -> None:
    engine.with_name("engine.json").write_bytes(b" " * (2 << 20))


def take_record_away(engine: Path) -> None:
    engine.with_name("engine.json").unlink()


def claim_another_gpu(engine: Path) -> None:
    record = engine.with_name("engine.json")
    record.write_text(record.read_text().replace("NVIDIA GeForce RTX 3060", "NVIDIA A10"))


DAMAGE: dict[Callable[[Path], None], str] = {
    truncate: "truncated: 19 bytes, but engine.json says 20",
    tamper: "tampered with or damaged: SHA-256 is ",
    extend: "tampered with or damaged: 21 bytes",
    rename: "edit.fp16.engine is missing; was it renamed to mine.engine?",
    take_away: "edit.fp16.engine is missing",
    garble_record: "not valid JSON",
    swell_record: "engine.json has 2097152 bytes",
    take_record_away: "no engine.json beside it",
    claim_another_gpu: "engine.json belongs to the folder edit-fp16-b8-tensorrt-10.16.1-nvidia_a10",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_find_engines_corrupt_engine_has_its_problem(bundle: Bundle, damage: Callable[[Path], None]) -> None:
    path = add(in_bundle(bundle))
    damage(path)
    found = find_engines(bundle, replace(HOST, gpu=A10) if damage is claim_another_gpu else HOST)
    assert DAMAGE[damage] in "; ".join(found[0].problems)
    for engine in found:
        with pytest.raises(BundleError, match="does not fit"):
            engine.read()
    assert {engine.path for engine in remove_stale_engines(bundle, HOST)} == {engine.path for engine in found}
    assert find_engines(bundle, HOST) == [] and not path.parent.exists()


def test_read_engine_changed_after_search_is_refused(bundle: Bundle) -> None:
    path = add(in_bundle(bundle))
    for damage in (tamper, truncate, take_away):
        found = find_engines(bundle, HOST, hashing=False)[0]
        assert found.fit
        damage(path)
        with pytest.raises(BundleError):
            found.read()
        path.write_bytes(CONTENT)


def test_find_engines_without_hashing_compares_size(bundle: Bundle) -> None:
    path = add(in_bundle(bundle))
    tamper(path)
    assert find_engines(bundle, HOST, hashing=False)[0].fit
    truncate(path)
    assert not find_engines(bundle, HOST, hashing=False)[0].fit


def test_find_engines_unlisted_engine_is_not_loaded(bundle: Bundle) -> None:
    path = add(in_bundle(bundle))
    other = path.with_name("other.engine")
    other.write_bytes(CONTENT)
    known, unknown = find_engines(bundle, HOST)
    assert known.read() == CONTENT and unknown.path == other
    assert unknown.problems == ("engine.json beside it describes edit.fp16.engine, not this file",)
    assert [engine.path for engine in remove_stale_engines(bundle, HOST)] == [other]
    assert only(bundle).fit


def test_find_engines_after_new_export_are_stale(bundle: Bundle) -> None:
    add(in_bundle(bundle))
    stale = replace(own(SAMPLE), onnx=replace(FP16, sha256="9" * 64))
    gone = replace(own(SAMPLE), onnx=SourceFile("graphs/gone.onnx", "8" * 64))
    weights = replace(own(SAMPLE), weights=SourceFile("graphs/edit.fp32.onnx", "9" * 64))
    for record in (stale, gone, weights):
        with EngineWriter(in_bundle(bundle), "x") as writer:
            writer.finish(record, CONTENT)
    reasons = sorted(reason for engine in find_engines(bundle, HOST) for reason in engine.reasons)
    assert len(reasons) == 3
    assert reasons[0].startswith("stale: built from another graphs/edit.fp16.onnx: SHA-256 999999999999…")
    assert reasons[1].startswith("stale: built from another graphs/edit.fp32.onnx")
    assert reasons[2] == "stale: built from graphs/gone.onnx, which the bundle does not hold"
    assert len(remove_stale_engines(bundle, HOST)) == 3 and only(bundle).fit


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


def test_with_verification_is_added_to_the_record(bundle: Bundle) -> None:
    path = add(in_bundle(bundle))
    noted = only(bundle).with_verification(VERIFIED)
    assert only(bundle).record == noted.record and noted.record is not None
    assert noted.record.verification == VERIFIED and noted.read() == CONTENT
    assert sorted(file.name for file in path.parent.iterdir()) == ["build.log", "edit.fp16.engine", "engine.json"]
    shutil.rmtree(path.parent)
    with pytest.raises(InputError, match=r"the folder of .*engine\.json does not exist"):
        noted.with_verification(VERIFIED)


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


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPMDEPLOY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache/spmdeploy/engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x/spmdeploy/engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UnavailableError, match="no home"):
        cache_folder()


def test_engine_writer_unwritable_place_is_named(bundle: Bundle, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(InputError, match="engines is a file, not a folder"):
        add(choose_place(bundle, "cache"))


def test_find_engines_link_out_of_the_cache_is_not_loaded(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    path = add(choose_place(bundle, "cache"))
    outside = tmp_path / "outside.engine"
    path.rename(outside)
    path.symlink_to(outside)
    found = only(bundle)
    assert not found.fit and "is a link that leads out of" in found.problems[0]


@pytest.mark.parametrize("failing", ["is_dir", "scandir"])
def test_find_engines_cache_that_cannot_be_entered_holds_none(
    bundle: Bundle, cache: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    is_dir, scandir = Path.is_dir, os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == cache:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return (is_dir if failing == "is_dir" else scandir)(path)

    monkeypatch.setattr(*((Path, "is_dir", refuse) if failing == "is_dir" else (os, "scandir", refuse)))
    assert find_engines(bundle, HOST) == []


def test_find_engines_cache_with_a_broken_link_holds_none(bundle: Bundle, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "loose").symlink_to("nowhere")
    assert find_engines(bundle, HOST) == []


def test_find_engines_link_out_of_the_bundle_is_not_loaded(bundle: Bundle, tmp_path: Path) -> None:
    path = add(in_bundle(bundle))
    shutil.move(path, tmp_path / "elsewhere.engine")
    path.symlink_to(tmp_path / "elsewhere.engine")
    found = only(bundle)
    assert not found.fit and "is a link that leads out of" in found.problems[0]


BUILD = """
import sys
from pathlib import Path
from spmdeploy.bundle.bundle import open_bundle
from tests.engines.test_store import HOST, add, choose_place, find_engines
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
