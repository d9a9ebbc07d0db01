"""Writing bundles: atomically, replacing only bundles, and flushed to disk before they are renamed."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.manifest import GoldenEdit, Manifest
from spmdeploy.bundle.storage import MANIFEST, SUMS
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines.pack import pack
from spmdeploy.errors import BundleError, InputError, VerificationError
from spmdeploy.files import is_safe_relative_path

from .conftest import (
    GRAPHS,
    fill,
    manifest_of,
    names_in,
    refusal,
    write_street,
)


def test_writer_exception_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with BundleWriter(tmp_path / "street.spm") as writer:
            fill(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == []


def test_writer_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "street.spm") as writer:
        fill(writer)
    assert names_in(tmp_path) == []


def test_writer_target_is_missing_until_finished(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "street.spm") as writer:
        records = fill(writer)
        assert not (tmp_path / "street.spm").exists()
        assert all(name.startswith(".street.spm.") for name in names_in(tmp_path))
        writer.finish(manifest_of(records))
    assert names_in(tmp_path) == ["street.spm"]


def test_writer_files_are_on_disk_before_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    unflushed = []
    rename, link = os.rename, os.link

    def watch(source: Path) -> None:
        files = [path for path in (source, *source.rglob("*")) if path.is_file()]
        unflushed.append([path for path in files if path.stat().st_ino not in flushed])

    def watched(source: Path, target: Path) -> None:
        watch(source)
        rename(source, target)

    def watched_link(source: Path, target: Path) -> None:
        watch(source)
        link(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", watched)
    monkeypatch.setattr(os, "link", watched_link)
    pack(write_street(tmp_path / "street.spm"), tmp_path / "street.zip")
    assert unflushed == [[], []]
    assert tmp_path.stat().st_ino in flushed


def test_save_rejected_graph_is_kept_alone(tmp_path: Path) -> None:
    (tmp_path / "street.spm.edit.fp16.onnx.rejected").write_text("from an earlier try")
    kept = tmp_path / "street.spm.edit.fp16.onnx.rejected"

    def export() -> None:
        with BundleWriter(tmp_path / "street.spm") as writer:
            fill(writer)
            raise VerificationError(f"look at {writer.save_rejected('graphs/edit.fp16.onnx')}")

    with pytest.raises(VerificationError, match=re.escape(str(kept))):
        export()
    assert kept.read_bytes() == GRAPHS["fp16"]
    assert names_in(tmp_path) == [kept.name]


def test_writer_files_by_copy_and_path_are_read(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# mine\n")
    with BundleWriter(tmp_path / "street.spm") as writer:
        writer.add_file("docs/card.md", tmp_path / "card.md")
        writer.path("docs/deep/er.txt").write_text("x")
        bundle = writer.finish(manifest_of(fill(writer)))
    assert bundle.read("docs/card.md") == b"# mine\n"
    assert bundle.read("docs/deep/er.txt") == b"x"
    assert (tmp_path / "card.md").exists()


@pytest.mark.parametrize("name", ["../outside", "/abs", "a\\b", "C:/x", "", ".", "a/..", MANIFEST, SUMS])
def test_writer_unsafe_name_is_refused(tmp_path: Path, name: str) -> None:
    with BundleWriter(tmp_path / "b.spm") as writer, pytest.raises(BundleError, match="no file in it may be named"):
        writer.add_bytes(name, b"")


def test_writer_repeated_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with BundleWriter(tmp_path / "b.spm") as writer:
        writer.add_bytes("a", b"")
        with pytest.raises(BundleError, match="a is in it already"):
            writer.add_bytes("a", b"")
        with pytest.raises(BundleError, match="a is in it already"):
            writer.add_file("a", tmp_path / "a")


def _no_graph(manifest: Manifest) -> Manifest:
    lost = dataclasses.replace(manifest.graphs[0], file="graphs/lost.onnx")
    return dataclasses.replace(manifest, graphs=(lost,))


def _infinite_parity(manifest: Manifest) -> Manifest:
    return dataclasses.replace(
        manifest, graphs=(dataclasses.replace(manifest.graphs[0], parity={"psnr_db": math.inf}), *manifest.graphs[1:])
    )


def _no_golden_images(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, golden=(GoldenEdit("car", "golden/car", ""),))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_graph, r"street\.spm/graphs/lost\.onnx: named in manifest\.json"),
        (_infinite_parity, r"graphs\[0\]\.parity\.psnr_db is inf"),
        (_no_golden_images, r"golden/car/image\.png: missing from the golden edit car"),
    ],
)
def test_finish_contradicting_manifest_is_not_written(
    tmp_path: Path, spoil: Callable[[Manifest], Manifest], message: str
) -> None:
    with pytest.raises(BundleError, match=message), BundleWriter(tmp_path / "street.spm") as writer:
        writer.finish(spoil(manifest_of(fill(writer))))
    assert names_in(tmp_path) == []


def test_writer_unwritable_target_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"the folder of .*no/street\.spm does not exist"),
        BundleWriter(tmp_path / "no/street.spm"),
    ):
        pass
    with BundleWriter(tmp_path / "b.spm") as writer, pytest.raises(InputError, match=r"missing\.onnx"):
        writer.add_file("a", tmp_path / "missing.onnx")


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), st.binary(max_size=9), max_size=4
    )
)
def test_writer_any_accepted_name_is_read_back(tmp_path_factory: Any, files: dict[str, bytes]) -> None:
    folder = tmp_path_factory.mktemp("names")
    files = {name: content for name, content in files.items() if "/" not in name}
    taken = {}
    with BundleWriter(folder / "b.spm") as writer:
        records = fill(writer)
        for name, content in files.items():
            if is_safe_relative_path(f"extra/{name}"):
                writer.add_bytes(f"extra/{name}", content)
                taken[f"extra/{name}"] = content
            else:
                with pytest.raises(BundleError, match="no file in it may be named"):
                    writer.add_bytes(f"extra/{name}", content)
        bundle = writer.finish(manifest_of(records))
    packed = open_bundle(pack(bundle, folder / "b.zip"))
    for name, content in taken.items():
        assert bundle.read(name) == packed.read(name) == content
    assert bundle.check_all() == packed.check_all() == ()


def test_writer_existing_target_is_refused_at_once(street: Path) -> None:
    with pytest.raises(InputError, match="exists already") as caught, BundleWriter(street):
        pass
    assert "--overwrite" in (caught.value.hint or "")


def test_overwrite_bundle_is_replaced_whole(street: Path) -> None:
    (street / "engines").mkdir()
    (street / "engines/stale.engine").touch()
    bundle = write_street(street, overwrite=True, licence="second")
    assert bundle.manifest.licence == open_bundle(street).manifest.licence == "second"
    assert not (street / "engines").exists()
    assert names_in(street.parent) == ["street.spm"]


def test_overwrite_zip_and_folder_replace_each_other(street: Path, street_zip: Path) -> None:
    write_street(street_zip, overwrite=True)
    assert open_bundle(street_zip).is_folder
    pack(open_bundle(street_zip), street, overwrite=True)
    assert not open_bundle(street).is_folder
    assert names_in(street.parent) == ["street.spm", "street.spm.zip"]


def test_overwrite_link_replaces_its_target(street: Path) -> None:
    link = street.parent / "current.spm"
    link.symlink_to(street)
    write_street(link, overwrite=True, licence="second")
    assert link.is_symlink() and open_bundle(street).manifest.licence == "second"


def _user_folder(street: Path) -> None:
    shutil.rmtree(street)
    street.mkdir()
    (street / "thesis.tex").touch()


def _user_file(street: Path) -> None:
    shutil.rmtree(street)
    street.write_text("my notes")


def _notes_in_the_bundle(street: Path) -> None:
    (street / "notes.txt").touch()


def _manifest_of_another_program(street: Path) -> None:
    (street / MANIFEST).write_text('{"name": "a web app"}')


@pytest.mark.parametrize("make", [_user_folder, _user_file, _notes_in_the_bundle, _manifest_of_another_program])
def test_overwrite_other_files_are_left_alone(street: Path, make: Callable[[Path], None]) -> None:
    make(street)
    before = {path: path.stat().st_mtime_ns for path in street.parent.rglob("*")}
    with pytest.raises(InputError, match="not replaced") as caught:
        write_street(street, overwrite=True)
    assert caught.value.hint
    with pytest.raises(InputError, match="not replaced"):
        pack(write_street(street.with_name("other.spm")), street, overwrite=True)
    shutil.rmtree(street.with_name("other.spm"))
    assert {path: path.stat().st_mtime_ns for path in street.parent.rglob("*")} == before


def test_finish_target_written_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "street.spm"
    with BundleWriter(target) as writer:
        manifest = manifest_of(fill(writer))
        write_street(target, licence="another")
        with pytest.raises(InputError, match="exists already"):
            writer.finish(manifest)
    assert open_bundle(target).manifest.licence == "another"
    assert names_in(tmp_path) == ["street.spm"]


@pytest.mark.parametrize("failing", [1, 2])
def test_overwrite_failing_halfway_keeps_the_old_bundle(
    street: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr("spmdeploy.files._exchange", lambda first, second: False)
    with pytest.raises(InputError, match="the disk is full"):
        write_street(street, overwrite=True, licence="second")
    assert len(calls) >= failing
    assert open_bundle(street).manifest.licence == "for tests only"
    assert names_in(street.parent) == ["street.spm"]


def test_overwrite_at_every_rename_one_bundle_is_whole(street: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.rename, []

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        seen.append([open_bundle(path).manifest.licence for path in street.parent.iterdir()])

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr("spmdeploy.files._exchange", lambda first, second: False)
    write_street(street, overwrite=True, licence="second")
    assert len(seen) == 2
    assert all(sorted(licences) == ["for tests only", "second"] for licences in seen)


def test_open_bundle_after_crash_hint_names_the_old_one(street: Path) -> None:
    aside = street.with_name(".street.spm.0123456789abcdef.previous")
    street.rename(aside)
    assert f"left the old one at {aside}" in refusal(street)
