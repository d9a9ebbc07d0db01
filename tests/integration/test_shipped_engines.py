"""Engines shipped inside a bundle: covered by its hashes and signature, and never changed."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.bundle.signature import SecretKey
from spmdeploy.bundle.storage import SIGNATURE, SUMS
from spmdeploy.engines.pack import extract_subset, unpack
from spmdeploy.engines.record import EngineFile, EngineRecord, SourceFile
from spmdeploy.engines.store import Place, StoredEngine, find_engines, named_engines
from spmdeploy.engines.writer import EngineWriter, choose_place, remove_stale_engines
from spmdeploy.errors import BundleError, InputError, UsageError
from tests.bundle.conftest import GRAPHS, secret_key, write_street
from tests.engines.test_record import VERIFIED
from tests.simulators.records import HOST, SAMPLE, for_targets

KEY = secret_key(b"\1" * 8, b"\2" * 32)
CONTENT, HOSTILE = b"not really an engine", b"something hostile!!!"
FP16 = SourceFile("graphs/edit.fp16.onnx", hashlib.sha256(GRAPHS["fp16"]).hexdigest())
SM86, SM89 = for_targets("sm86"), for_targets("sm89", "sm120")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPMDEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_street(tmp_path / "street.spm")


def own(record: EngineRecord, content: bytes = CONTENT) -> EngineRecord:
    file = EngineFile("edit.fp16.engine", len(content), hashlib.sha256(content).hexdigest())
    return replace(record, bundle="street", onnx=FP16, engine=file)


def add(bundle: Bundle, record: EngineRecord, place: Place | None = None) -> Path:
    with EngineWriter(choose_place(bundle, place), "edit.fp16") as writer:
        return writer.finish(own(record), CONTENT)


def shipped(bundle: Bundle, name: str = "device.spm", key: SecretKey | None = None) -> Bundle:
    """The bundle with its FP16 graph and its engine for sm86, as one file."""
    add(bundle, SM86)
    return extract_subset(bundle, bundle.path.with_name(name), ["fp16"], ["sm86"], key=key)


def only(bundle: Bundle) -> StoredEngine:
    (found,) = find_engines(bundle, HOST)
    return found


def test_shipped_engine_unpacked_is_usable(bundle: Bundle, tmp_path: Path) -> None:
    packed = shipped(bundle)
    name = f"engines/{own(SM86).key}/edit.fp16.engine"
    assert packed.read(name) == CONTENT and packed.check_all() == () == packed.unlisted_files
    for arrived in (packed, unpack(packed, tmp_path / "back.spm")):
        found = only(arrived)
        assert (found.place, found.shipped, found.reasons, found.record) == ("bundle", True, (), own(SM86))
        assert found.read() == CONTENT
    assert not only(bundle).shipped


def test_named_engines_accepts_parts_of_keys(bundle: Bundle) -> None:
    for record, place in ((SM86, "bundle"), (SM89, "cache"), (SAMPLE, "bundle")):
        add(bundle, record, place)

    def named(*names: str) -> list[str]:
        return [engine.record.key for engine in named_engines(bundle, names) if engine.record]

    keys = {record: own(record).key for record in (SM86, SM89, SAMPLE)}
    assert named("sm86") == named(keys[SM86]) == [keys[SM86]]
    assert named("sm120") == named("sm89") == [keys[SM89]]
    assert named("tensorrt_rtx") == named("sm86", "sm120") == sorted([keys[SM86], keys[SM89]])
    assert named("fp16") == sorted(keys.values()) and named() == []
    for unknown in ("sm8", "sm90", "", keys[SM86][:-1]):
        with pytest.raises(UsageError, match=r"no engine is .*; there is .*sm89-sm120"):
            named(unknown)


def test_named_engines_in_bundle_and_cache_gives_one(bundle: Bundle) -> None:
    add(bundle, SM86, "cache")
    add(bundle, SM86)
    (found,) = named_engines(bundle, ["sm86"])
    assert found.place == "bundle"
    found.path.write_bytes(CONTENT[:-1])
    (found,) = named_engines(bundle, ["sm86"])
    assert found.place == "cache" and found.content() == CONTENT


def test_extract_subset_engine_of_dropped_graph_or_damaged_is_refused(bundle: Bundle) -> None:
    path = add(bundle, SM86)
    target = bundle.path.with_name("device.spm")
    with pytest.raises(UsageError, match=r"was built from graphs/edit\.fp16\.onnx, which is left out"):
        extract_subset(bundle, target, ["fp32"], ["sm86"])
    path.write_bytes(HOSTILE)
    with pytest.raises(BundleError, match="tampered"):
        extract_subset(bundle, target, ["fp16"], ["sm86"])
    assert not target.exists()
    assert find_engines(extract_subset(bundle, target, ["fp16"]), HOST) == []  # not requested


def test_shipped_engine_replaced_with_its_record_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    arrived = unpack(shipped(bundle), tmp_path / "back.spm")
    folder = only(arrived).path.parent
    (folder / "edit.fp16.engine").write_bytes(HOSTILE)
    assert "engine.json says" in str(only(arrived).problems)
    (folder / "engine.json").write_bytes(own(SM86, HOSTILE).to_bytes())
    found = only(arrived)
    assert found.shipped and len([problem for problem in found.problems if "SHA256SUMS lists another" in problem]) == 2
    with pytest.raises(BundleError, match="SHA256SUMS lists another"):
        found.read()
    with pytest.raises(BundleError, match="tampered"):
        open_bundle(arrived.path).check_all()


def test_shipped_engine_with_unlisted_record_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    arrived = unpack(shipped(bundle), tmp_path / "back.spm")
    lines = (arrived.path / SUMS).read_text().splitlines(keepends=True)
    (arrived.path / SUMS).write_text("".join(line for line in lines if not line.endswith("engine.json\n")))
    assert "SHA256SUMS lists another engine.json" in str(only(open_bundle(arrived.path)).problems)


def test_required_signature_excludes_added_engines(bundle: Bundle, tmp_path: Path) -> None:
    packed = shipped(bundle, key=KEY)
    arrived = unpack(packed, tmp_path / "back.spm")
    hidden = tmp_path / "hidden.spm"
    hidden.write_bytes(packed.path.read_bytes())
    extra = {"engine.json": own(SM89).to_bytes(), "edit.fp16.engine": CONTENT}
    folder = arrived.path / f"engines/{own(SM89).key}"
    folder.mkdir()
    with zipfile.ZipFile(hidden, "a") as archive:
        for name, content in extra.items():
            archive.writestr(f"engines/{own(SM89).key}/{name}", content)
            (folder / name).write_bytes(content)
    for path in (arrived.path, hidden):
        problems = [len(engine.problems) for engine in find_engines(open_bundle(path), HOST)]
        assert problems == [0, 0]
        by_key = {e.record.key: e for e in find_engines(open_bundle(path, KEY.public), HOST) if e.record}
        assert by_key[own(SM86).key].fit and not by_key[own(SM89).key].fit
        assert "the signature that is required does not cover it" in str(by_key[own(SM89).key].problems)


def test_cached_engine_of_signed_bundle_is_used(bundle: Bundle) -> None:
    packed = open_bundle(shipped(bundle, key=KEY).path, KEY.public)
    add(packed, SAMPLE)
    (built,) = [found for found in find_engines(packed, HOST) if found.place == "cache"]
    assert built.fit and not built.shipped and built.read() == CONTENT


def test_shipped_engines_are_never_changed(bundle: Bundle, tmp_path: Path, cache: Path) -> None:
    arrived = unpack(shipped(bundle), tmp_path / "back.spm")
    assert choose_place(arrived).folder == cache and "shipped with engines" in choose_place(arrived).why
    with pytest.raises(UsageError, match="shipped with engines"):
        choose_place(arrived, "bundle")
    other = replace(HOST, versions={"tensorrt-rtx": "1.8"})
    assert (
        only(arrived).fit and find_engines(arrived, other)[0].permanent and remove_stale_engines(arrived, other) == []
    )
    with pytest.raises(InputError, match="shipped with the bundle"):
        only(arrived).with_verification(VERIFIED)
    assert open_bundle(arrived.path).check_all() == () and only(arrived).fit


def test_choose_place_signed_bundle_gives_the_cache(bundle: Bundle, cache: Path) -> None:
    (bundle.path / SIGNATURE).write_bytes(b"whatever")
    place = choose_place(open_bundle(bundle.path))
    assert place.folder == cache and "signed" in place.why


def test_extract_subset_of_subset_includes_engines_by_name(bundle: Bundle, tmp_path: Path) -> None:
    first = shipped(bundle)
    assert find_engines(extract_subset(first, tmp_path / "a.spm", ["fp16"]), HOST) == []
    again = extract_subset(first, tmp_path / "b.spm", ["fp16"], ["sm86"])
    assert again.path.read_bytes() == first.path.read_bytes()
