"""Folders and zips: other files, unsafe names, links and zip tricks are refused by name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.bundle import storage as bundle_files
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.storage import MANIFEST, SUMS
from spmdeploy.engines.pack import pack
from spmdeploy.errors import BundleError
from spmdeploy.files import is_safe_relative_path

from .conftest import (
    GRAPHS,
    refusal,
    write_street,
)


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("edit.onnx", b"\x08\x0a", "one graph, not a bundle", r"\.spm folder"),
        ("latest_net_G.pth", b"PK\3\4 and so on", "a checkpoint, not a bundle", "spmdeploy export"),
        ("w.safetensors", b"{}", "a checkpoint, not a bundle", "spmdeploy export"),
        ("edit.engine", b"ftrt", "one engine, not a bundle", r"\.spm folder"),
        ("manifest.json", b"{}", "a JSON file, not a bundle", r"\.spm folder"),
        ("photo", b"\x89PNG", "neither a folder nor a zip", "spmdeploy export"),
        ("nothing", b"", "neither a folder nor a zip", "spmdeploy export"),
    ],
)
def test_open_storage_other_file_is_named(tmp_path: Path, name: str, content: bytes, message: str, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(tmp_path / name)
    assert caught.value.problem.startswith(str(tmp_path / name))
    assert re.search(hint, caught.value.hint or "")


def test_open_storage_other_folder_or_zip_is_named(tmp_path: Path) -> None:
    empty, photos, zipped, nested = tmp_path / "empty", tmp_path / "photos", tmp_path / "a.zip", tmp_path / "nested.zip"
    empty.mkdir()
    photos.mkdir()
    (photos / "a.png").touch()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "x" * 1000)
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("street.spm/manifest.json", "{}")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    assert "it is empty" in refusal(empty)
    assert "without a manifest.json" in refusal(photos)
    assert "without a manifest.json" in refusal(zipped)
    assert "one folder too deep" in refusal(nested)
    assert "it is empty" in refusal(tmp_path / "empty.zip")
    assert "no such bundle" in refusal(tmp_path / "nowhere")


def test_open_storage_large_folder_is_refused_early(street: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_files, "MAX_ENTRIES", 12)
    for i in range(8):
        (street / f"{i}.txt").touch()
    assert "more than 12 files" in refusal(street)


def test_open_links_to_listed_content_outside_are_read(street: Path) -> None:
    store = street.parent / "store"
    store.mkdir()
    for number, path in enumerate(sorted(path for path in street.rglob("*") if path.is_file())):
        shutil.move(path, store / str(number))
        path.symlink_to(store / str(number))
    (street / "README.md").symlink_to(store / "0")
    bundle = open_bundle(street)
    assert bundle.check_all() == ("README.md",)
    record = bundle.graph("edit", "fp16")
    assert bundle.read(record.file) == GRAPHS["fp16"]
    assert not bundle.is_on_disk(record)  # libraries refuse external data behind such links


def test_open_link_outside_with_other_content_is_refused(street: Path) -> None:
    (street.parent / "secret.png").write_bytes(b"other.png")
    image = street / "golden/tree/image.png"
    image.unlink()
    image.symlink_to(street.parent / "secret.png")
    assert "golden/tree/image.png: tampered with or damaged" in refusal(street)


def test_open_hugging_face_cache_is_read(street: Path) -> None:
    snapshot = street.parent / "models--a--b/snapshots/0123"
    blobs = street.parent / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in street.rglob("*") if path.is_file()]:
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, blob)
        link = snapshot / path.relative_to(street)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert open_bundle(snapshot).check_all() == ()
    assert open_bundle(pack(open_bundle(snapshot), street.parent / "copy.spm")).check_all() == ()


def test_open_folder_that_is_a_link_is_read(street: Path) -> None:
    shutil.move(street / "golden", street.parent / "golden")
    (street / "golden").symlink_to(street.parent / "golden")
    assert open_bundle(street).check_all() == ()


def test_open_links_inside_are_followed_and_broken_or_circular_ones_are_refused(street: Path) -> None:
    (street / "graphs/edit.fp16.onnx").rename(street / "graphs/half.onnx")
    (street / "graphs/edit.fp16.onnx").symlink_to("half.onnx")
    bundle = open_bundle(street)
    assert bundle.read("graphs/edit.fp16.onnx") == GRAPHS["fp16"] and bundle.is_on_disk(bundle.graph("edit", "fp16"))
    (street / "loose").symlink_to("nowhere")
    assert "loose: no regular file" in refusal(street)
    (street / "loose").unlink()
    (street / "loop").symlink_to(".")
    assert "loop: a link to a folder that is in the bundle already" in refusal(street)
    (street / "loop").unlink()
    (street / "loop").symlink_to("loop")
    assert "loop: too many symbolic links" in refusal(street)


def test_gitattributes_no_hashed_file_is_converted_by_git() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("no clone")
    bundle = root / "spmdeploy/assets/models/street.spm"
    names = [str(bundle / name) for name in (*open_bundle(bundle).files(), SUMS)]
    done = subprocess.run(["git", "check-attr", "text", "--", *names], cwd=root, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == len(names)
    assert all(line.endswith("text: unset") for line in done.stdout.splitlines()), done.stdout


def test_open_pointer_of_git_lfs_and_web_page_are_named(street: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
    (street / "graphs/edit.fp16.onnx").write_bytes(pointer)
    assert "edit.fp16.onnx: a pointer of Git LFS" in refusal(street) and "git lfs pull" in refusal(street)
    for content, message in ((pointer, "a pointer of Git LFS"), (b"\n<!DOCTYPE html><html>", "a web page")):
        (street.parent / "page.spm").write_bytes(content)
        assert message in refusal(street.parent / "page.spm")


def test_open_pipe_is_refused(street: Path) -> None:
    (street / "card.md").unlink()
    os.mkfifo(street / "card.md")
    assert "card.md: no regular file" in refusal(street)


def test_open_bundle_behind_link_is_read(street: Path) -> None:
    link = street.parent / "current.spm"
    link.symlink_to(street)
    assert open_bundle(link).check_all() == ()


def rezip(source: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> Path:
    """A copy of the zip, with each entry written by `change`."""
    target = source.with_name("hostile.zip")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            change(new, info.filename, old.read(info))
    return target


def with_entry(source: Path, info: zipfile.ZipInfo, content: bytes = b"") -> Path:
    shutil.copyfile(source, target := source.with_name("hostile.zip"))
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(info, content)
    return target


def patched(source: Path, entry: str, offset: int, value: bytes, central: bool = True, local: bool = True) -> Path:
    """The zip with bytes of one entry's headers replaced; `offset` counts in the central header."""
    content = bytearray(source.read_bytes())
    name = entry.encode()
    starts = [i for i in range(len(content)) if content.startswith(name, i)]
    for start in starts:
        if central and content[start - 46 : start - 42] == b"PK\1\2":
            content[start - 46 + offset : start - 46 + offset + len(value)] = value
        if local and content[start - 30 : start - 26] == b"PK\3\4":
            content[start - 32 + offset : start - 32 + offset + len(value)] = value
    assert bytes(content) != source.read_bytes()
    (target := source.with_name("hostile.zip")).write_bytes(content)
    return target


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a/../../b", "C:/windows", "c:x", "..\\outside", "a//b", "./a", "a/.", "line\nbreak",
     "\u202egnp.exe", "x" * 241],
)  # fmt: skip
def test_zip_unsafe_name_is_refused(street_zip: Path, name: str) -> None:
    text = refusal(with_entry(street_zip, zipfile.ZipInfo(name)))
    assert f"entry {name!r} has a name" in text


def test_zip_name_with_nul_is_refused(street_zip: Path) -> None:
    hostile = with_entry(street_zip, zipfile.ZipInfo("cardXmdXexe"))
    content = hostile.read_bytes().replace(b"cardXmdXexe", b"card.md\0exe")
    hostile.write_bytes(content)
    assert r"entry 'card.md\x00exe' has a name" in refusal(hostile)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_repeated_name_is_refused(street_zip: Path) -> None:
    assert "entry 'card.md' is there twice" in refusal(with_entry(street_zip, zipfile.ZipInfo("card.md"), b"other"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_zip_link_or_device_is_refused(street_zip: Path, kind: int) -> None:
    info = zipfile.ZipInfo("golden/link.png")
    info.external_attr = (kind | 0o777) << 16
    assert "entry 'golden/link.png' is a link or a device" in refusal(with_entry(street_zip, info, b"/etc/passwd"))


def test_zip_compressed_is_refused_with_hint(street_zip: Path) -> None:
    def deflate(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)

    text = refusal(rezip(street_zip, deflate))
    assert "is compressed; a bundle's zip is not" in text and "zip -0" in text


def test_zip_encrypted_entry_is_refused(street_zip: Path) -> None:
    assert "entry 'card.md' is encrypted" in refusal(patched(street_zip, "card.md", 8, b"\1"))


def test_zip_too_many_entries_are_refused(street_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_files, "MAX_ENTRIES", 5)
    assert "more than 5 entries" in refusal(street_zip)


def test_zip_giant_directory_is_refused_unread(street_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_files, "MAX_ENTRIES", 1)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert "more than 1 entries" in refusal(street_zip)


def test_zip_size_beyond_limit_is_refused(street_zip: Path) -> None:
    huge = struct.pack("<2L", 0xFFFFFFF0, 0xFFFFFFF0)
    assert "entry 'card.md' claims 4294967280 bytes, more than" in refusal(patched(street_zip, "card.md", 20, huge))


def test_zip_size_into_next_entry_is_refused(street_zip: Path) -> None:
    longer = struct.pack("<2L", 100, 100)
    assert "entry 'card.md' runs into" in refusal(patched(street_zip, "card.md", 20, longer))
    assert "entry 'manifest.json' runs into" in refusal(
        patched(street_zip, MANIFEST, 20, struct.pack("<2L", 1 << 20, 1 << 20))
    )


def test_zip_contradicting_headers_are_refused(street_zip: Path) -> None:
    shorter = struct.pack("<2L", 3, 3)
    assert "entry 'card.md' has a header that differs" in refusal(
        patched(street_zip, "card.md", 20, shorter, local=False)
    )
    assert "entry 'card.md' has a header that differs" in refusal(
        patched(street_zip, "card.md", 20, shorter, central=False)
    )
    unequal = struct.pack("<2L", 3, 9)
    assert "entry 'card.md' has 3 bytes for 9" in refusal(patched(street_zip, "card.md", 20, unequal))
    renamed = patched(street_zip, "card.md", 46, b"cord.md", local=False)
    assert "entry 'cord.md' has a header that differs" in refusal(renamed)


def test_zip_two_entries_over_same_bytes_are_refused(street_zip: Path) -> None:
    """An overlapping zip bomb: many names in the directory for the same bytes."""
    with zipfile.ZipFile(street_zip) as archive:
        offset = archive.getinfo("card.md").header_offset
    hostile = patched(street_zip, "golden/tree/mask.png", 42, struct.pack("<L", offset), local=False)
    assert "'golden/tree/mask.png' has a header that differs" in refusal(hostile)
    same = street_zip.read_bytes()
    first, end = same.index(b"PK\1\2"), len(same) - 22
    at = same.index(b"card.md", first) - 46
    copy = same[at : at + 46 + 7].replace(b"card.md", b"CARD.md")
    count = struct.unpack("<H", same[-12:-10])[0] + 1
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, end - first + len(copy), first, 0)
    hostile.write_bytes(same[:end] + copy + tail)
    assert "'CARD.md' has a header that differs" in refusal(hostile)


def test_zip_overlap_with_equal_headers_is_refused(street: Path) -> None:
    """An entry whose content is the whole next entry, including its header."""
    inner = b"PK\3\4" + struct.pack("<5H3L2H", 20, 0, 0, 0, 33, 0, 1, 1, 1, 0) + b"b" + b"!"
    outer = b"PK\3\4" + struct.pack("<5H3L2H", 20, 0, 0, 0, 33, 0, len(inner), len(inner), 13, 0) + MANIFEST.encode()

    def central(name: bytes, size: int, offset: int) -> bytes:
        return (
            b"PK\1\2"
            + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 33, 0, size, size, len(name), 0, 0, 0, 0, 0, offset)
            + name
        )

    directory = central(MANIFEST.encode(), len(inner), 0) + central(b"b", 1, len(outer))
    body = outer + inner
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(directory), len(body), 0)
    hostile = street.with_name("overlap.zip")
    hostile.write_bytes(body + directory + end)
    assert f"entry {MANIFEST!r} runs into" in refusal(hostile)


def test_zip_content_around_it_is_refused(street_zip: Path) -> None:
    content, hostile = street_zip.read_bytes(), street_zip.with_name("hostile.zip")
    hostile.write_bytes(content + b"x")
    assert "something follows the zip" in refusal(hostile)
    hostile.write_bytes(content[:4] + content)
    assert "something precedes the zip" in refusal(hostile)
    hostile.write_bytes(content[:-2] + b"\x05\0")
    assert "more than 4 GiB, or something precedes" in refusal(hostile)


def test_zip_second_zip64_directory_is_refused(street_zip: Path) -> None:
    """A zip64 record overrides the plain one, so that two readers could see two different archives."""
    content = street_zip.read_bytes()
    count, length, start = struct.unpack("<H2L", content[-12:-2])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + length, 1)
    length += len(record) + len(locator)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, length, start, 0)
    street_zip.write_bytes(content[:-22] + record + locator + end)
    with zipfile.ZipFile(street_zip) as archive:
        assert archive.namelist()
    assert "more than 4 GiB" in refusal(street_zip)


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.7, 0.99])
def test_zip_truncated_is_refused(street_zip: Path, kept: float) -> None:
    content = street_zip.read_bytes()
    street_zip.write_bytes(content[: int(len(content) * kept)])
    assert "truncated" in refusal(street_zip)


def test_zip_corrupt_directory_is_refused(street_zip: Path) -> None:
    content = bytearray(street_zip.read_bytes())
    content[content.index(b"PK\1\2") + 1] ^= 0xFF
    street_zip.write_bytes(content)
    assert "the directory of the zip cannot be read" in refusal(street_zip)


@settings(deadline=None)  # writes files, whose duration varies
@given(st.data())
def test_zip_any_changed_byte_gives_no_other_content(tmp_path_factory: Any, data: st.DataObject) -> None:
    """With any byte changed, the zip is refused or (in unused fields such as dates) has the same content."""
    content = bytearray(_zip_once(tmp_path_factory))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.zip"
    path.write_bytes(content)
    try:
        bundle = open_bundle(path)
        bundle.check_all()
    except BundleError:
        return
    assert bundle.read("graphs/edit.fp16.onnx") == GRAPHS["fp16"]
    assert bundle.read("card.md") == b"# street\n"


_zip_cache: dict[str, bytes] = {}


def _zip_once(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if "zip" not in _zip_cache:
        folder = tmp_path_factory.mktemp("once")
        _zip_cache["zip"] = pack(write_street(folder / "street.spm"), folder / "street.zip").read_bytes()
    return _zip_cache["zip"]


def test_zip_folder_entries_are_ignored(street_zip: Path) -> None:
    info = zipfile.ZipInfo("golden/")
    info.external_attr = (stat.S_IFDIR | 0o755) << 16
    assert open_bundle(with_entry(street_zip, info)).check_all() == ()
    assert "is a folder with content" in refusal(with_entry(street_zip, zipfile.ZipInfo("golden/"), b"x"))


def test_zip_by_info_zip_is_read(street: Path) -> None:
    if shutil.which("zip") is None:
        pytest.skip("no zip program on this machine")
    target = street.with_name("by-hand.zip")
    subprocess.run(["zip", "-q", "-0", "-X", "-r", str(target), "."], cwd=street, check=True)
    assert open_bundle(target).check_all() == ()


segments = st.text(st.sampled_from("ab./\\: \0\nC\u202eé-_"), max_size=8)


@given(st.one_of(st.text(max_size=40), st.lists(segments, max_size=4).map("/".join)))
def test_is_safe_relative_path_accepted_name_stays_inside(name: str) -> None:
    if is_safe_relative_path(name):
        root = Path("/bundle")
        assert root in Path(os.path.normpath(root / name)).parents
        assert Path(name).as_posix() == name
        name.encode("utf-8")


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9), min_size=1, max_size=4))
def test_is_safe_relative_path_plain_name_is_accepted(parts: list[str]) -> None:
    assert is_safe_relative_path("/".join(parts)) is all(part.isprintable() for part in parts)
