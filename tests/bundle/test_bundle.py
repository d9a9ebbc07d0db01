"""The bundle: what is written can be read, whole or not at all, and whatever was damaged or swapped is found."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.external_data import external_locations
from spmdeploy.bundle.manifest import GoldenEdit, Manifest
from spmdeploy.bundle.storage import GOLDEN_IMAGES, MANIFEST, SUMS
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines.pack import pack
from spmdeploy.errors import BundleError, InputError, VerificationError
from spmdeploy.files import is_safe_relative_path

from .conftest import (
    GRAPHS,
    LOCATION,
    WEIGHTS,
    entry,
    fill,
    graph_with,
    list_sums,
    manifest_of,
    message,
    names_in,
    refusal,
    with_weights_beside,
    write_street,
)

# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_written_is_read(street: Path, packed: bool) -> None:
    bundle = open_bundle(pack(open_bundle(street), street.with_name("one.zip")) if packed else street)
    assert bundle.manifest == manifest_of(bundle.manifest.graphs)
    assert bundle.is_folder is not packed
    assert bundle.read("graphs/edit.fp32.onnx") == GRAPHS["fp32"]
    assert bundle.read("golden/tree/mask.png") == b"mask.png"
    assert bundle.graph("edit", "fp16").bytes == len(GRAPHS["fp16"]) == bundle.files()["graphs/edit.fp16.onnx"]
    assert list(bundle.files()) == sorted(
        [
            "card.md",
            *(f"golden/tree/{p}" for p in GOLDEN_IMAGES),
            *(f"graphs/edit.{key}.onnx" for key in GRAPHS),
            MANIFEST,
        ]
    )
    assert bundle.check_all() == ()


def test_sha256sum_agrees(street: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=street, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(open_bundle(street).files())


def test_sums_made_by_sha256sum_in_binary_mode_are_read(street: Path) -> None:
    (street / SUMS).write_text((street / SUMS).read_text().replace("  ", " *"))
    assert open_bundle(street).check_all() == ()


def test_nothing_else_is_left_beside_the_target(street: Path) -> None:
    assert names_in(street.parent) == ["street.spm"]
    assert stat.S_IMODE(street.stat().st_mode) == 0o777 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_engines_are_neither_hashed_nor_surplus(street: Path) -> None:
    (street / "engines/key").mkdir(parents=True)
    (street / "engines/key/edit.engine").write_bytes(b"cache")
    bundle = open_bundle(street)
    assert bundle.check_all() == ()
    with pytest.raises(BundleError, match=r"lists no 'engines/key/edit\.engine'"):
        bundle.read("engines/key/edit.engine")


def test_the_writer_does_not_hash_engines(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "street.spm") as writer:
        writer.add_bytes("engines/key/edit.engine", b"cache")
        bundle = writer.finish(manifest_of(fill(writer)))
    assert not any(name.startswith("engines/") for name in bundle.files())
    assert (tmp_path / "street.spm/engines/key/edit.engine").read_bytes() == b"cache"


def test_surplus_files_are_reported_and_never_read(street: Path) -> None:
    (street / "graphs/notes.txt").write_text("mine")
    bundle = open_bundle(street)
    assert bundle.check_all() == bundle.unlisted_files == ("graphs/notes.txt",)
    with pytest.raises(BundleError, match=r"lists no 'graphs/notes\.txt'"):
        bundle.path_of("graphs/notes.txt")


def test_a_graph_that_is_not_there_is_answered_with_what_is(street: Path) -> None:
    with pytest.raises(BundleError, match=r"no graph 'refine' in fp16; there is edit fp32, edit fp16"):
        open_bundle(street).graph("refine", "fp16")


def test_path_of_is_hashed_and_only_for_folders(street: Path, street_zip: Path) -> None:
    assert open_bundle(street).path_of("card.md").read_bytes() == b"# street\n"
    with pytest.raises(BundleError, match="inside a zip"):
        open_bundle(street_zip).path_of("card.md")
    bundle = open_bundle(street)
    (street / "card.md").write_bytes(b"# strEEt\n")
    with pytest.raises(BundleError, match=r"card\.md: tampered"):
        bundle.path_of("card.md")


# --------------------------------------------------------------------------------------------------- damage and mix-ups


@pytest.mark.parametrize("name", ["graphs/edit.fp32.onnx", "golden/tree/expected.png", "card.md"])
def test_one_changed_bit_is_found_when_read(street: Path, name: str) -> None:
    content = bytearray((street / name).read_bytes())
    content[len(content) // 2] ^= 1
    (street / name).write_bytes(content)
    bundle = open_bundle(street)
    with pytest.raises(BundleError) as caught:
        bundle.read(name)
    actual, listed = hashlib.sha256(content).hexdigest()[:12], bundle.digest(name)[:12]
    assert f"{street / name}: tampered with or damaged: SHA-256 is {actual}…, but SHA256SUMS says {listed}…" == str(
        caught.value
    )
    assert name in refusal(street)


def test_check_all_names_every_damaged_file(street: Path) -> None:
    (street / "card.md").write_bytes(b"# Street\n")
    (street / "golden/tree/mask.png").write_bytes(b"Mask.png")
    assert "card.md" in refusal(street) and "golden/tree/mask.png" in refusal(street)


def test_a_changed_manifest_is_found_at_once(street: Path) -> None:
    text = (street / MANIFEST).read_text()
    (street / MANIFEST).write_text(text.replace("for tests only", "free for all!!"))
    with pytest.raises(BundleError, match=r"manifest\.json: tampered"):
        open_bundle(street)
    (street / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(BundleError, match=r"manifest\.json: tampered"):
        open_bundle(street)


def test_a_truncated_graph_is_found_at_once(street: Path) -> None:
    graph = street / "graphs/edit.fp32.onnx"
    graph.write_bytes(GRAPHS["fp32"][:1000])
    with pytest.raises(BundleError, match=r"edit\.fp32\.onnx: truncated: 1000 bytes, but manifest\.json says 1800"):
        open_bundle(street)
    graph.write_bytes(GRAPHS["fp32"] + b"x")
    with pytest.raises(BundleError, match=r"tampered with or damaged: 1801 bytes"):
        open_bundle(street)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "graph",
    [
        LOCATION,
        b"".join(graph_with(entry(b"location", b"shared.weights"), entry(b"offset", b"0")) for _ in range(3)),
        graph_with(message(2, b"shared.weights") + message(1, b"location")),
        LOCATION + message(6, b"docs about the location of things"),
        message(7, message(1, message(5, message(5, message(13, entry(b"location", b"shared.weights")))))),
    ],
)
def test_read_graph_weights_that_the_manifest_names_are_read(tmp_path: Path, packed: bool, graph: bytes) -> None:
    bundle = with_weights_beside(tmp_path / "street.spm", graph)
    bundle = open_bundle(pack(bundle, tmp_path / "one.zip")) if packed else bundle
    for record in bundle.manifest.graphs:
        files = bundle.read_graph(record)
        assert (files.content, files.weights) == (bundle.read(record.file), {"shared.weights": WEIGHTS})
        if not packed:
            assert bundle.path_of_graph(record).with_name("shared.weights").read_bytes() == WEIGHTS


OTHER = message(13, entry(b"location", b"/etc/passwd"))
HOSTILE = {
    "another": message(7, message(5, OTHER)),
    "second": LOCATION + message(7, message(5, OTHER)),
    "given twice": graph_with(entry(b"location", b"shared.weights") + message(2, b"/etc/passwd")),
    "key given twice": graph_with(message(1, b"offset") + entry(b"location", b"/etc/passwd")),
    "before the key": graph_with(message(2, b"/etc/passwd") + message(1, b"location")),
    "looks like an entry": graph_with(
        message(15, b"j\x1a") + entry(b"location", b"shared.weights") + message(2, b"/etc")
    ),
    "attribute": message(7, message(1, message(5, message(5, OTHER)))),
    "attributes": message(7, message(1, message(5, message(10, OTHER)))),
    "inner graph": message(7, message(1, message(5, message(6, message(5, OTHER))))),
    "inner graphs": message(7, message(1, message(5, message(11, message(5, OTHER))))),
    "sparse": message(7, message(15, message(1, OTHER))),
    "sparse indices": message(7, message(15, message(2, OTHER))),
    "sparse attribute": message(7, message(1, message(5, message(22, message(2, OTHER))))),
    "sparse attributes": message(7, message(1, message(5, message(23, message(1, OTHER))))),
    "function": message(25, message(7, message(5, message(5, OTHER)))),
    "default of a function": message(25, message(11, message(5, OTHER))),
    "training": message(20, message(1, message(5, OTHER))),
    "training algorithm": message(20, message(2, message(5, OTHER))),
    "empty": graph_with(message(1, b"location")),
}


@pytest.mark.parametrize("graph", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("packed", [False, True])
def test_read_graph_other_weights_are_refused(tmp_path: Path, graph: bytes, packed: bool) -> None:
    bundle = with_weights_beside(tmp_path / "street.spm", graph)
    bundle = open_bundle(pack(bundle, tmp_path / "one.zip")) if packed else bundle
    for record in bundle.manifest.graphs:
        for way in (bundle.read_graph, *([] if packed else [bundle.path_of_graph])):
            with pytest.raises(BundleError, match=r"asks for weights in '.*', which the manifest does not name"):
                way(record)


def test_read_graph_weights_that_the_record_does_not_name_are_refused(tmp_path: Path) -> None:
    bundle = with_weights_beside(tmp_path / "street.spm")
    with pytest.raises(BundleError, match="asks for weights in 'shared"):
        bundle.read_graph(dataclasses.replace(bundle.manifest.graphs[0], weights=None))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_external_locations_agree_with_onnx_on_changed_graphs(data: st.DataObject) -> None:
    onnx = pytest.importorskip("onnx")
    decode_error = pytest.importorskip("google.protobuf.message").DecodeError
    content = bytearray(data.draw(st.sampled_from(sorted(HOSTILE.values()))))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        model = onnx.ModelProto.FromString(bytes(content))
    except decode_error:
        return  # no library loads it
    tensors = [*model.graph.initializer]
    entries = [(each.key, each.value) for tensor in tensors for each in tensor.external_data]
    values = [value for key, value in entries if key in ("location", b"location")]
    expected = {value if isinstance(value, bytes) else value.encode() for value in values}  # bytes if it is no UTF-8
    try:
        assert expected <= external_locations(bytes(content))
    except ValueError:
        return  # stricter than protobuf is safe


@pytest.mark.parametrize("content", [b"\x0a\x7flocation", b"\x0blocation", b"\xff" * 11 + b"location", b"abcdORTM"])
def test_external_locations_what_is_no_graph_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"ends after|wire type|10 bytes|own format"):
        external_locations(content)


def test_external_locations_deep_nesting_is_refused() -> None:
    content = b"location"
    for _ in range(60):
        content = message(1, message(5, message(6, content)))
    with pytest.raises(ValueError, match="nested too deeply"):
        external_locations(message(7, content))


def test_damaged_weights_are_found(tmp_path: Path) -> None:
    bundle = with_weights_beside(tmp_path / "street.spm")
    (bundle.path / "graphs/shared.weights").write_bytes(WEIGHTS[::-1])
    for way in (bundle.read_graph, bundle.path_of_graph):
        with pytest.raises(BundleError, match=r"shared\.weights: tampered"):
            way(bundle.manifest.graphs[0])
    lines = (bundle.path / SUMS).read_text().splitlines(keepends=True)
    (bundle.path / SUMS).write_text("".join(line for line in lines if "shared.weights" not in line))
    with pytest.raises(BundleError, match=r"shared\.weights: named in manifest\.json, but SHA256SUMS does not list it"):
        open_bundle(bundle.path)


def test_swapped_graphs_are_found_though_the_sums_agree(street: Path) -> None:
    (street / "graphs/edit.fp32.onnx").write_bytes(GRAPHS["fp32"][::-1])
    list_sums(street)
    with pytest.raises(BundleError, match=r"edit\.fp32\.onnx: tampered.*but manifest\.json says"):
        open_bundle(street)


@pytest.mark.parametrize("name", ["graphs/edit.fp16.onnx", "golden/tree/labels.png", "card.md", SUMS, MANIFEST])
def test_a_missing_file_is_named(street: Path, name: str) -> None:
    (street / name).unlink()
    with pytest.raises(BundleError, match="missing") as caught:
        open_bundle(street)
    assert str(street / name) in caught.value.problem


@pytest.mark.parametrize("name", ["graphs/edit.fp16.onnx", "golden/tree/labels.png", MANIFEST])
def test_a_file_that_no_hash_covers_is_not_used(street: Path, name: str) -> None:
    lines = (street / SUMS).read_text().splitlines(keepends=True)
    (street / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    with pytest.raises(BundleError) as caught:
        open_bundle(street)
    assert Path(name).name in caught.value.problem


@pytest.mark.parametrize(
    "line",
    ["0" * 64 + "  ../outside", "0" * 64 + "  /etc/passwd", "\\" + "0" * 64 + "  a\\nb", "0" * 63 + "  card", "", "x",
     "0" * 64 + "  card.md\r", "F" * 64 + "  a", "0" * 64 + "  card.md"],
)  # fmt: skip
def test_a_bad_line_in_the_sums_is_quoted(street: Path, line: str) -> None:
    (street / SUMS).write_bytes((street / SUMS).read_bytes() + line.encode() + b"\n")
    with pytest.raises(BundleError, match=r"SHA256SUMS: line 9 is"):
        open_bundle(street)


def test_a_file_that_changes_after_opening_is_refused(street: Path) -> None:
    bundle = open_bundle(street)
    (street / "card.md").write_bytes(b"# street\n" + b"x" * 1000)
    with pytest.raises(BundleError, match=r"card\.md: 1009 bytes, but 9 when the bundle was opened"):
        bundle.read("card.md")
    (street / "card.md").unlink()
    with pytest.raises(BundleError, match=r"there is no file .*card\.md"):
        bundle.read("card.md")


def test_a_giant_manifest_is_not_read(street: Path) -> None:
    os.truncate(street / MANIFEST, 1 << 40)  # sparse
    with pytest.raises(BundleError, match=r"manifest\.json: 1099511627776 bytes, more than"):
        open_bundle(street)


def test_a_file_beyond_the_limit_of_onnx_is_refused(street: Path) -> None:
    os.truncate(street / "card.md", 1 << 31)  # sparse
    with pytest.raises(BundleError, match=r"card\.md: 2147483648 bytes, more than 2147483647"):
        open_bundle(street)


# -------------------------------------------------------------------------------------------------------------- writing


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with BundleWriter(tmp_path / "street.spm") as writer:
            fill(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == []


def test_without_finish_there_is_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "street.spm") as writer:
        fill(writer)
    assert names_in(tmp_path) == []


def test_nothing_is_at_the_target_before_the_end(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "street.spm") as writer:
        records = fill(writer)
        assert not (tmp_path / "street.spm").exists()
        assert all(name.startswith(".street.spm.") for name in names_in(tmp_path))
        writer.finish(manifest_of(records))
    assert names_in(tmp_path) == ["street.spm"]


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_rejected_graph_is_kept_beside_the_target_and_nothing_else(tmp_path: Path) -> None:
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


def test_files_come_by_copy_and_by_path_too(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# mine\n")
    with BundleWriter(tmp_path / "street.spm") as writer:
        writer.add_file("docs/card.md", tmp_path / "card.md")
        writer.path("docs/deep/er.txt").write_text("x")
        bundle = writer.finish(manifest_of(fill(writer)))
    assert bundle.read("docs/card.md") == b"# mine\n"
    assert bundle.read("docs/deep/er.txt") == b"x"
    assert (tmp_path / "card.md").exists()


@pytest.mark.parametrize("name", ["../outside", "/abs", "a\\b", "C:/x", "", ".", "a/..", MANIFEST, SUMS])
def test_the_writer_takes_no_name_that_leads_outside(tmp_path: Path, name: str) -> None:
    with BundleWriter(tmp_path / "b.spm") as writer, pytest.raises(BundleError, match="no file in it may be named"):
        writer.add_bytes(name, b"")


def test_a_name_is_given_once(tmp_path: Path) -> None:
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


def _no_pictures(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, golden=(GoldenEdit("car", "golden/car", ""),))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_graph, r"street\.spm/graphs/lost\.onnx: named in manifest\.json"),
        (_infinite_parity, r"graphs\[0\]\.parity\.psnr_db is inf"),
        (_no_pictures, r"golden/car/image\.png: missing from the golden edit car"),
    ],
)
def test_a_manifest_that_does_not_fit_is_never_written(
    tmp_path: Path, spoil: Callable[[Manifest], Manifest], words: str
) -> None:
    with pytest.raises(BundleError, match=words), BundleWriter(tmp_path / "street.spm") as writer:
        writer.finish(spoil(manifest_of(fill(writer))))
    assert names_in(tmp_path) == []


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
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
def test_any_names_that_can_be_written_come_back(tmp_path_factory: Any, files: dict[str, bytes]) -> None:
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


# ---------------------------------------------------------------------------------------------------------- overwriting


def test_an_existing_target_is_refused_before_any_work(street: Path) -> None:
    with pytest.raises(InputError, match="exists already") as caught, BundleWriter(street):
        pass
    assert "--overwrite" in (caught.value.hint or "")


def test_overwrite_replaces_a_bundle_whole(street: Path) -> None:
    (street / "engines").mkdir()
    (street / "engines/stale.engine").touch()
    bundle = write_street(street, overwrite=True, licence="second")
    assert bundle.manifest.licence == open_bundle(street).manifest.licence == "second"
    assert not (street / "engines").exists()
    assert names_in(street.parent) == ["street.spm"]


def test_overwrite_replaces_a_zip_and_pack_a_folder(street: Path, street_zip: Path) -> None:
    write_street(street_zip, overwrite=True)
    assert open_bundle(street_zip).is_folder
    pack(open_bundle(street_zip), street, overwrite=True)
    assert not open_bundle(street).is_folder
    assert names_in(street.parent) == ["street.spm", "street.spm.zip"]


def test_overwrite_through_a_link_replaces_what_it_points_to(street: Path) -> None:
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


def _somebodys_manifest(street: Path) -> None:
    (street / MANIFEST).write_text('{"name": "a web app"}')


@pytest.mark.parametrize("make", [_user_folder, _user_file, _notes_in_the_bundle, _somebodys_manifest])
def test_overwrite_never_touches_anything_of_the_users(street: Path, make: Callable[[Path], None]) -> None:
    make(street)
    before = {path: path.stat().st_mtime_ns for path in street.parent.rglob("*")}
    with pytest.raises(InputError, match="not replaced") as caught:
        write_street(street, overwrite=True)
    assert caught.value.hint
    with pytest.raises(InputError, match="not replaced"):
        pack(write_street(street.with_name("other.spm")), street, overwrite=True)
    shutil.rmtree(street.with_name("other.spm"))
    assert {path: path.stat().st_mtime_ns for path in street.parent.rglob("*")} == before


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "street.spm"
    with BundleWriter(target) as writer:
        manifest = manifest_of(fill(writer))
        write_street(target, licence="the other one's")
        with pytest.raises(InputError, match="exists already"):
            writer.finish(manifest)
    assert open_bundle(target).manifest.licence == "the other one's"
    assert names_in(tmp_path) == ["street.spm"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_overwrite_that_fails_halfway_leaves_the_old_one(
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


def test_at_every_rename_one_of_the_two_is_whole(street: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.rename, []

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        seen.append([open_bundle(path).manifest.licence for path in street.parent.iterdir()])

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr("spmdeploy.files._exchange", lambda first, second: False)
    write_street(street, overwrite=True, licence="second")
    assert len(seen) == 2
    assert all(sorted(licences) == ["for tests only", "second"] for licences in seen)


def test_after_a_crash_between_the_renames_the_hint_says_where_the_old_one_is(street: Path) -> None:
    aside = street.with_name(".street.spm.0123456789abcdef.previous")
    street.rename(aside)
    assert f"left the old one at {aside}" in refusal(street)


# -------------------------------------------------------------------------------------------------------------- packing


def test_the_same_bundle_packs_to_the_same_bytes(street: Path, street_zip: Path) -> None:
    for path in street.rglob("*"):
        os.utime(path, (0, 0))
    again = pack(open_bundle(street_zip), street.with_name("again.zip"))
    assert (
        again.read_bytes()
        == street_zip.read_bytes()
        == pack(open_bundle(street), street.with_name("third.zip")).read_bytes()
    )


def test_pack_refuses_a_damaged_bundle_and_leaves_nothing(street: Path) -> None:
    (street / "card.md").write_bytes(b"# Street\n")
    with pytest.raises(BundleError, match=r"card\.md: tampered"):
        pack(open_bundle(street), street.with_name("street.zip"))
    assert names_in(street.parent) == ["street.spm"]


def test_pack_takes_what_is_listed_and_nothing_else(street: Path) -> None:
    (street / "engines").mkdir()
    (street / "engines/a.engine").touch()
    (street / "notes.txt").touch()
    target = pack(open_bundle(street), street.with_name("street.zip"))
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == [SUMS, *open_bundle(street).files()]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_pack_does_not_overwrite_unasked(street: Path, street_zip: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        pack(open_bundle(street), street_zip)
    assert pack(open_bundle(street), street_zip, overwrite=True) == street_zip
