"""Packing, unpacking, extracting subsets and signing give exactly the intended files, or none."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.manifest import GraphRecord
from spmdeploy.bundle.signature import sign
from spmdeploy.bundle.storage import MANIFEST, SIGNATURE, SUMS
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines.pack import extract_subset, pack, unpack
from spmdeploy.errors import BundleError, InputError, UsageError
from tests.bundle.conftest import (
    GRAPHS,
    WEIGHTS,
    fill,
    list_sums,
    manifest_of,
    names_in,
    rewrite_manifest,
    secret_key,
    with_weights_beside,
    write_street,
)

KEY, OTHER = secret_key(b"\1" * 8, b"\2" * 32), secret_key(b"\1" * 8, b"\3" * 32)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted() -> tuple[list[tuple[int, int]], Callable[[int, int], None]]:
    seen: list[tuple[int, int]] = []
    return seen, lambda done, total: seen.append((done, total))


def test_unpack_packed_bundle_is_equal(street: Path) -> None:
    before = listing(street)
    seen, progress = counted()
    packed = pack(open_bundle(street), street.with_name("one.spm"), progress=progress)
    assert seen == [(number, 8) for number in range(1, 9)]
    unpacked = unpack(open_bundle(packed), street.with_name("back.spm"), progress=progress)
    assert seen[8:] == seen[:8]
    assert unpacked.is_folder and listing(unpacked.path) == before
    assert names_in(street.parent) == ["back.spm", "one.spm", "street.spm"]


def test_pack_sums_and_signature_are_unchanged(street: Path) -> None:
    (street / SUMS).write_text((street / SUMS).read_text().replace("  ", " *"))
    (street / SIGNATURE).write_bytes(sign((street / SUMS).read_bytes(), KEY, "by hand"))
    packed = open_bundle(pack(open_bundle(street), street.with_name("one.spm")), KEY.public)
    unpacked = unpack(packed, street.with_name("back.spm"))
    assert listing(unpacked.path) == listing(street)
    signature = open_bundle(unpacked.path, KEY.public).signature
    assert signature is not None and signature.comment == "by hand"
    with zipfile.ZipFile(packed.path) as archive:
        assert archive.namelist()[:2] == [SUMS, SIGNATURE]


def test_pack_unlisted_files_and_engines_are_left_out(street: Path) -> None:
    (street / "notes.txt").write_text("mine")
    (street / "engines/key").mkdir(parents=True)
    (street / "engines/key/edit.engine").write_bytes(b"cache")
    with zipfile.ZipFile(street.with_name("by_hand.spm"), "w") as archive:
        for name, content in listing(street).items():
            archive.writestr(name, content)
    unpacked = unpack(open_bundle(street.with_name("by_hand.spm")), street.with_name("back.spm"))
    assert set(listing(street)) - set(listing(unpacked.path)) == {"notes.txt", "engines/key/edit.engine"}


def test_unpack_corrupt_file_writes_nothing(street_zip: Path) -> None:
    content = bytearray(street_zip.read_bytes())
    content[content.index(GRAPHS["fp32"]) + 7] ^= 1
    street_zip.write_bytes(content)
    made: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda path, **options: made.append(path))
        with pytest.raises(BundleError, match=r"edit\.fp32\.onnx: tampered"):
            unpack(open_bundle(street_zip), street_zip.with_name("back.spm"))
    assert not made and names_in(street_zip.parent) == ["street.spm", "street.spm.zip"]


def test_unpack_zip_changed_meanwhile_leaves_nothing(street_zip: Path) -> None:
    content = bytearray(street_zip.read_bytes())
    content[content.index(GRAPHS["fp16"]) + 7] ^= 1

    def replaced(done: int, total: int) -> None:
        street_zip.write_bytes(content)

    with pytest.raises(BundleError, match=r"edit\.fp16\.onnx: tampered"):
        unpack(open_bundle(street_zip), street_zip.with_name("back.spm"), progress=replaced)
    assert names_in(street_zip.parent) == ["street.spm", "street.spm.zip"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("Card.md", r"two entries are 'card\.md'"), ("card.md/x", r"'card\.md/x' is inside a file")],
)
def test_unpack_names_equal_without_case_are_refused(street: Path, name: str, message: str) -> None:
    with zipfile.ZipFile(street.with_name("odd.spm"), "w") as archive:
        digests = (street / SUMS).read_text()
        archive.writestr(SUMS, digests + f"{digests[:64]}  {name}\n")
        for file, content in listing(street).items():
            if file != SUMS:
                archive.writestr(file, content)
        archive.writestr(name, (street / "card.md").read_bytes())
    with pytest.raises(BundleError, match=message):
        unpack(open_bundle(street.with_name("odd.spm")), street.with_name("back.spm"))
    assert names_in(street.parent) == ["odd.spm", "street.spm"]


def test_unpack_existing_target_is_refused(street: Path, street_zip: Path) -> None:
    for target in (street, street_zip):
        with pytest.raises(InputError, match="exists already"):
            unpack(open_bundle(street_zip), target)
    (street / "engines").mkdir()
    unpack(open_bundle(street_zip), street, overwrite=True)
    assert not (street / "engines").exists()
    (street / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match=r"not replaced, thesis\.tex"):
        unpack(open_bundle(street_zip), street, overwrite=True)


def test_unpack_onto_itself_is_refused(street_zip: Path) -> None:
    unpack(open_bundle(street_zip), street_zip, overwrite=True)
    assert open_bundle(street_zip).is_folder and open_bundle(street_zip).check_all() == ()


def test_unpack_folder_is_refused(street: Path) -> None:
    with pytest.raises(InputError, match="a folder already"):
        unpack(open_bundle(street), street.with_name("back.spm"))


@pytest.mark.parametrize("name", ["street.onnx", "street.JSON", "street.engine"])
def test_pack_suffix_of_another_kind_is_refused(street: Path, name: str) -> None:
    with pytest.raises(InputError, match="no suffix of a bundle"):
        pack(open_bundle(street), street.with_name(name))


def test_pack_missing_folder_is_named(street: Path) -> None:
    with pytest.raises(InputError, match=r"the folder of .*one\.spm does not exist"):
        pack(open_bundle(street), street.with_name("no") / "one.spm")


def test_unpack_files_are_on_disk_before_renaming(street_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    unflushed = []
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        files = [path for path in source.rglob("*") if path.is_file()]
        unflushed.append((len(files), [path for path in files if path.stat().st_ino not in flushed]))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", watched)
    unpack(open_bundle(street_zip), street_zip.with_name("back.spm"))
    assert unflushed == [(9, [])]


def test_open_bundle_signed_opens_with_its_key(street: Path) -> None:
    packed = open_bundle(pack(open_bundle(street), street.with_name("one.spm"), key=KEY), KEY.public)
    assert packed.signature is not None and packed.signature.comment == "spmdeploy bundle street of 2026-11-22"
    assert packed.check_all() == () and packed.unlisted_files == ()
    again = pack(open_bundle(street), street.with_name("again.spm"), key=KEY)
    assert again.read_bytes() == packed.path.read_bytes()
    assert open_bundle(street).signature is None  # the source folder is unchanged
    assert not (street / SIGNATURE).exists()


def _unsigned(folder: Path) -> None:
    (folder / SIGNATURE).unlink()


def _with_anothers(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes(sign((folder / SUMS).read_bytes(), OTHER, ""))


def _with_that_of_another_bundle(folder: Path) -> None:
    other = write_street(folder.with_name("other.spm"), licence="another")
    (folder / SIGNATURE).write_bytes(sign(other.sums, KEY, ""))


def _with_a_changed_file(folder: Path) -> None:
    (folder / "card.md").write_bytes(b"# Street\n")
    list_sums_but_signature(folder)


def _with_a_changed_manifest(folder: Path) -> None:
    signature = (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).unlink()
    rewrite_manifest(folder, lambda manifest: manifest.update(licence="free"))
    (folder / SIGNATURE).write_bytes(signature)


def _with_an_added_file(folder: Path) -> None:
    (folder / "graphs/more.onnx").write_bytes(b"more")
    list_sums_but_signature(folder)


def _with_reordered_sums(folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(reversed(lines)))


def list_sums_but_signature(folder: Path) -> None:
    signature = (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).unlink()
    list_sums(folder)
    (folder / SIGNATURE).write_bytes(signature)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "forge",
    [_unsigned, _with_anothers, _with_that_of_another_bundle, _with_a_changed_file, _with_a_changed_manifest,
     _with_an_added_file, _with_reordered_sums],
)  # fmt: skip
def test_open_bundle_forged_is_refused_unparsed(
    street: Path, forge: Callable[[Path], None], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (street / SIGNATURE).write_bytes(sign((street / SUMS).read_bytes(), KEY, ""))
    assert open_bundle(street, KEY.public).signature is not None
    forge(street)
    subject = pack(open_bundle(street), street.with_name("one.spm")) if packed else street
    open_bundle(subject).check_all()  # without a required signature there is no error
    monkeypatch.setattr("spmdeploy.bundle.bundle.Manifest.from_bytes", None)
    monkeypatch.setattr("spmdeploy.bundle.bundle.check_version", None)
    with pytest.raises(BundleError, match=r"not signed|does not fit|made with the key") as caught:
        open_bundle(subject, KEY.public)
    assert caught.value.exit_code == 6 and caught.value.hint and str(subject) in caught.value.problem


def test_read_file_changed_after_signing_is_refused(street: Path) -> None:
    (street / SIGNATURE).write_bytes(sign((street / SUMS).read_bytes(), KEY, ""))
    content = (street / "graphs/edit.fp16.onnx").read_bytes()
    (street / "graphs/edit.fp16.onnx").write_bytes(content[::-1])
    bundle = open_bundle(street, KEY.public)
    with pytest.raises(BundleError, match="tampered"):
        bundle.read("graphs/edit.fp16.onnx")


def test_open_bundle_sums_changed_meanwhile_are_not_used(street: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked bytes are the bytes that are used."""
    (street / SIGNATURE).write_bytes(sign((street / SUMS).read_bytes(), KEY, ""))

    def swap(*arguments: object) -> None:
        (street / "card.md").write_bytes(b"# Street\n")
        list_sums(street)

    monkeypatch.setattr("spmdeploy.bundle.signature.check_signature", swap)
    bundle = open_bundle(street, KEY.public)
    with pytest.raises(BundleError, match="tampered"):
        bundle.read("card.md")


def test_extract_subset_keeps_one_graph_and_other_files(street: Path) -> None:
    full = open_bundle(street)
    slimmed = extract_subset(full, street.with_name("device.spm"), ["fp16"])
    assert not slimmed.is_folder and slimmed.check_all() == ()
    assert full.files().keys() - slimmed.files().keys() == {"graphs/edit.fp32.onnx"}
    assert [record for record in full.manifest.graphs if record.precision == "fp16"] == list(slimmed.manifest.graphs)
    assert slimmed.manifest.golden == full.manifest.golden and slimmed.manifest.limits.keys() == {"fp16"}
    same = slimmed.files().keys() - {MANIFEST, "card.md"}
    assert {name: slimmed.digest(name) for name in same} == {name: full.digest(name) for name in same}
    assert extract_subset(full, street.with_name("again.spm"), ["fp16"]).path.read_bytes() == slimmed.path.read_bytes()


@pytest.mark.parametrize(
    ("keep", "left"),
    [(["edit"], ["fp32", "fp16"]), (["edit.fp32"], ["fp32"]), (["fp32", "fp16"], ["fp32", "fp16"])],
)
def test_extract_subset_graph_names_are_accepted(street: Path, keep: list[str], left: list[str]) -> None:
    slimmed = extract_subset(open_bundle(street), street.with_name("device.spm"), keep)
    assert [record.precision for record in slimmed.manifest.graphs] == left


@pytest.mark.parametrize("keep", [["int8"], ["fp16", "edit_cpu"], ["fp16.edit"], [""]])
def test_extract_subset_missing_graph_is_refused(street: Path, keep: list[str]) -> None:
    with pytest.raises(UsageError, match=r"holds no graph .*; there is edit\.fp32, edit\.fp16"):
        extract_subset(open_bundle(street), street.with_name("device.spm"), keep)
    assert names_in(street.parent) == ["street.spm"]


def test_extract_subset_cpu_keeps_all_graphs_for_cpus(street: Path) -> None:
    rewrite_manifest(street, lambda manifest: manifest["graphs"][0].update(graph="edit_cpu"))
    slimmed = extract_subset(open_bundle(street), street.with_name("device.spm"), ["cpu"])
    assert [record.graph for record in slimmed.manifest.graphs] == ["edit_cpu"]


def test_extract_subset_needed_weights_are_kept(tmp_path: Path) -> None:
    full = with_weights_beside(tmp_path / "street.spm")
    slimmed = extract_subset(full, tmp_path / "device.spm", ["fp16"])
    assert full.files().keys() - slimmed.files().keys() == {"graphs/edit.fp32.onnx"}
    (record,) = slimmed.manifest.graphs
    assert slimmed.read_graph(record).weights == {"shared.weights": WEIGHTS}


def test_extract_subset_unneeded_weights_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BundleWriter(tmp_path / "street.spm") as writer:
        records = fill(writer)
        for name in ("shared", "fp32", "fp16"):
            writer.add_bytes(f"graphs/{name}.weights", name.encode())
        full = writer.finish(manifest_of(records))

    def files(record: GraphRecord) -> tuple[str, ...]:
        return record.file, "graphs/shared.weights", f"graphs/{record.precision}.weights"

    monkeypatch.setattr(GraphRecord, "files", property(files))
    slimmed = extract_subset(full, tmp_path / "device.spm", ["fp16"])
    assert full.files().keys() - slimmed.files().keys() == {"graphs/edit.fp32.onnx", "graphs/fp32.weights"}


def test_extract_subset_without_edit_graph_is_refused(street: Path) -> None:
    def only_another(manifest: dict[str, object]) -> None:
        graphs = manifest["graphs"]
        assert isinstance(graphs, list)
        graphs[0]["graph"] = "another"

    rewrite_manifest(street, only_another)
    for keep in (["fp32"], ["another"], []):
        with pytest.raises(UsageError, match="leaves no graph to edit with"):
            extract_subset(open_bundle(street), street.with_name("device.spm"), keep)
    assert extract_subset(open_bundle(street), street.with_name("device.spm"), ["another", "fp16"]).manifest.graphs


def test_extract_subset_card_lists_kept_graphs(tmp_path: Path) -> None:
    card = "# street\n| graph |\n|---|\n| a | `graphs/edit.fp32.onnx` |\n| b | `graphs/edit.fp16.onnx` |\n\xe9 tail"
    with BundleWriter(tmp_path / "street.spm") as writer:
        records = fill(writer)
        writer.path("card.md").write_bytes(card.encode("latin-1"))
        full = writer.finish(manifest_of(records))
    slimmed = extract_subset(full, tmp_path / "device.spm", ["fp16"])
    assert slimmed.read("card.md") == card.replace("| a | `graphs/edit.fp32.onnx` |\n", "").encode("latin-1")


def test_extract_subset_drops_or_renews_signature(street: Path) -> None:
    signed = open_bundle(pack(open_bundle(street), street.with_name("one.spm"), key=KEY))
    assert extract_subset(signed, street.with_name("a.spm"), ["fp16"]).read_signature() is None
    extract_subset(signed, street.with_name("b.spm"), ["fp16"], key=KEY)
    assert open_bundle(street.with_name("b.spm"), KEY.public).signature is not None


def test_extract_subset_corrupt_bundle_leaves_nothing(street: Path) -> None:
    (street / "graphs/edit.fp16.onnx").write_bytes(GRAPHS["fp16"][::-1])
    with pytest.raises(BundleError, match="tampered"):
        extract_subset(open_bundle(street), street.with_name("device.spm"), ["fp16"])
    assert names_in(street.parent) == ["street.spm"]
    assert extract_subset(open_bundle(street), street.with_name("device.spm"), ["fp32"]).check_all() == ()


def test_extract_subset_manifest_is_complete(street: Path) -> None:
    slimmed = extract_subset(open_bundle(street), street.with_name("device.spm"), ["fp16"])
    before, after = json.loads((street / MANIFEST).read_text()), json.loads(slimmed.read(MANIFEST))
    assert before.keys() == after.keys()
    assert {key for key in before if before[key] != after[key]} == {"graphs", "limits"}


def test_pack_same_bundle_gives_same_bytes(street: Path, street_zip: Path) -> None:
    for path in street.rglob("*"):
        os.utime(path, (0, 0))
    again = pack(open_bundle(street_zip), street.with_name("again.zip"))
    assert (
        again.read_bytes()
        == street_zip.read_bytes()
        == pack(open_bundle(street), street.with_name("third.zip")).read_bytes()
    )


def test_pack_corrupt_bundle_is_refused_and_leaves_nothing(street: Path) -> None:
    (street / "card.md").write_bytes(b"# Street\n")
    with pytest.raises(BundleError, match=r"card\.md: tampered"):
        pack(open_bundle(street), street.with_name("street.zip"))
    assert names_in(street.parent) == ["street.spm"]


def test_pack_unlisted_files_are_left_out(street: Path) -> None:
    (street / "engines").mkdir()
    (street / "engines/a.engine").touch()
    (street / "notes.txt").touch()
    target = pack(open_bundle(street), street.with_name("street.zip"))
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == [SUMS, *open_bundle(street).files()]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_pack_existing_target_is_refused(street: Path, street_zip: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        pack(open_bundle(street), street_zip)
    assert pack(open_bundle(street), street_zip, overwrite=True) == street_zip
