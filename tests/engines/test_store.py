"""Engines in bundles and the cache: searched, checked, written and removed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.engines import store as engine_store
from spmdeploy.engines.pack import pack
from spmdeploy.engines.record import EngineFile, EngineRecord, SourceFile
from spmdeploy.engines.store import StoredEngine, cache_folder, find_engines
from spmdeploy.engines.writer import EnginePlace, EngineWriter, choose_place, remove_stale_engines
from spmdeploy.errors import BundleError, InputError, UnavailableError
from tests.bundle.conftest import GRAPHS, write_street
from tests.engines.test_record import VERIFIED
from tests.simulators.records import A10, HOST, SAMPLE

pytestmark = pytest.mark.usefixtures("cache")

CONTENT = b"not really an engine"
FP16 = SourceFile("graphs/edit.fp16.onnx", hashlib.sha256(GRAPHS["fp16"]).hexdigest())


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


def test_with_verification_is_added_to_the_record(bundle: Bundle) -> None:
    path = add(in_bundle(bundle))
    noted = only(bundle).with_verification(VERIFIED)
    assert only(bundle).record == noted.record and noted.record is not None
    assert noted.record.verification == VERIFIED and noted.read() == CONTENT
    assert sorted(file.name for file in path.parent.iterdir()) == ["build.log", "edit.fp16.engine", "engine.json"]
    shutil.rmtree(path.parent)
    with pytest.raises(InputError, match=r"the folder of .*engine\.json does not exist"):
        noted.with_verification(VERIFIED)


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
