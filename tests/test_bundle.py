"""The bundle: what is written can be read, and whatever was damaged, swapped or made to harm is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy import bundle as bundle_module
from spmdeploy.bundle import (
    GOLDEN_PICTURES,
    MANIFEST,
    SUMS,
    Bundle,
    BundleWriter,
    GeneratorFacts,
    GoldenEdit,
    GraphRecord,
    Manifest,
    ParityLimits,
    SourceFacts,
    is_inside,
    open_bundle,
    pack,
)
from spmdeploy.errors import BundleError, InputError, VerificationError
from spmdeploy.labels import ClassTable

GRAPHS = {"fp32": b"not really a graph" * 100, "fp16": b"half of one" * 90}
CLASSES = [{"id": 0, "name": "road", "color": [128, 64, 128]}, {"id": 1, "name": "sky", "color": [70, 130, 180]}]


def manifest_of(graphs: tuple[GraphRecord, ...], **changes: Any) -> Manifest:
    manifest = Manifest(
        name="street",
        created=date(2026, 11, 22),
        tools={"spmdeploy": "0.1.0", "torch": "2.13.0"},
        classes=ClassTable.from_json({"name": "two", "void_id": 255, "classes": CLASSES}, "test"),
        channel_order="BGR",
        native_size=256,
        generator=GeneratorFacts(classes=2, width=8, hidden=4, parameters=12345, gflop=1.5),
        graphs=graphs,
        golden=(GoldenEdit("tree", "golden/tree", "photo by N. N., CC0"),),
        limits={"fp32": ParityLimits(1, 0.1, 50.0), "fp16": ParityLimits(16, 1.0, 35.0)},
        source=SourceFacts("latest_net_G.pth", "0" * 64, "reference"),
        licence="for tests only",
        training={"steps": 3, "data": ["a", "b"]},
    )
    return dataclasses.replace(manifest, **changes)


def graph_record(precision: Any, size: int, digest: str) -> GraphRecord:
    return GraphRecord(
        graph="edit",
        precision=precision,
        file=f"graphs/edit.{precision}.onnx",
        bytes=size,
        sha256=digest,
        opset=20,
        weights_dtype="float16",
        fp16_share=0.75 if precision == "fp16" else 0.0,
        fp32_operations={"InstanceNormalization": 12},
        parity={"max_grey": 1.0, "psnr_db": None},
    )


def fill(writer: BundleWriter) -> tuple[GraphRecord, ...]:
    for precision, content in GRAPHS.items():
        writer.add_bytes(f"graphs/edit.{precision}.onnx", content)
    for picture in GOLDEN_PICTURES:
        writer.add_bytes(f"golden/tree/{picture}", picture.encode())
    writer.add_bytes("card.md", b"# street\n")
    return tuple(graph_record(key, *writer.measure(f"graphs/edit.{key}.onnx")) for key in GRAPHS)


def write_street(target: Path, overwrite: bool = False, **changes: Any) -> Bundle:
    with BundleWriter(target, overwrite=overwrite) as writer:
        return writer.finish(manifest_of(fill(writer), **changes))


def list_sums(folder: Path) -> None:
    """SHA256SUMS as it should be for what is in the folder now: an attacker can compute it too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files]
    (folder / SUMS).write_text("".join(lines))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    list_sums(folder)


def refusal(path: Path) -> str:
    """The problem and hint of opening and checking everything."""
    with pytest.raises(BundleError) as caught:
        open_bundle(path).check_all()
    assert caught.value.exit_code == 6
    assert caught.value.hint
    return f"{caught.value.problem} / {caught.value.hint}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def street(tmp_path: Path) -> Path:
    target = tmp_path / "street.spm"
    write_street(target)
    return target


@pytest.fixture
def street_zip(street: Path) -> Path:
    return pack(open_bundle(street), street.with_name("street.spm.zip"))


# -------------------------------------------------------------------------------------------------- what is written


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
            *(f"golden/tree/{p}" for p in GOLDEN_PICTURES),
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
    assert bundle.check_all() == bundle.surplus == ("graphs/notes.txt",)
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


# --------------------------------------------------------------------------------------------------------- manifest


def test_manifest_survives_json() -> None:
    manifest = manifest_of((graph_record("fp32", 5, "a" * 64),))
    text = json.dumps(manifest.to_json(), allow_nan=False)
    assert Manifest.from_json(json.loads(text), "m") == manifest
    assert json.loads(text)["schema"] == "spmdeploy.bundle/1"
    assert json.loads(text)["created"] == "2026-11-22"


def test_further_fields_are_passed_over_and_training_may_be_missing() -> None:
    content = manifest_of(()).to_json()
    del content["training"]
    content["mood"] = content["generator"]["mood"] = "good"
    manifest = Manifest.from_json(content, "m")
    assert manifest.training is None
    assert manifest.to_json().keys() == content.keys() - {"mood"} | {"training"}


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for part in above:
            content = content[part]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


WRONG_FIELDS = [
    ("licence", ..., "licence is missing"),
    ("graphs/0/opset", ..., r"graphs\[0\]\.opset is missing"),
    ("licence", 5, "licence is 5, not text"),
    ("name", "a/b", "name is 'a/b', not a plain name"),
    ("native_size", True, "native_size is True, not a whole number"),
    ("native_size", 256.0, r"native_size is 256\.0, not a whole number"),
    ("graphs/0/bytes", -1, r"graphs\[0\]\.bytes is -1, not a whole number from 0"),
    ("graphs/0/precision", "int8", r"graphs\[0\]\.precision is 'int8', not fp32 or fp16"),
    ("graphs/0/precision", ["fp32"], r"graphs\[0\]\.precision is \['fp32'\], not fp32 or fp16"),
    ("graphs/0/sha256", "A" * 64, r"graphs\[0\]\.sha256 is '"),
    ("graphs/0/file", "../../etc/passwd", r"graphs\[0\]\.file is '\.\./\.\./etc/passwd', not a relative path inside"),
    ("graphs/0/file", "/etc/passwd", r"graphs\[0\]\.file is"),
    ("graphs/0/fp16_share", "half", r"graphs\[0\]\.fp16_share is 'half', not a finite number"),
    ("graphs/0/parity/max_grey", math.inf, r"parity\.max_grey is inf, not a finite number"),
    ("graphs/0/parity/max_grey", math.nan, r"parity\.max_grey is nan, not a finite number"),
    ("graphs/0/parity/max_grey", 10**400, r"parity\.max_grey is 1000.*\.\.\., not a finite number"),
    ("graphs/0/fp32_operations", [], r"fp32_operations is \[\], not an object"),
    ("graphs", {}, r"graphs is \{\}, not a list"),
    ("graphs/0", "edit.onnx", r"graphs\[0\] is 'edit\.onnx', not an object"),
    ("golden/0/folder", "golden/..", r"golden\[0\]\.folder is"),
    ("generator/gflop", None, r"generator\.gflop is None, not a finite number"),
    ("generator/classes", 3, "generator.classes is 3, but classes lists 2"),
    ("limits/fp8", {}, "a key of limits is 'fp8', not fp32 or fp16"),
    ("limits/fp16/mean_grey", ..., r"limits\.fp16\.mean_grey is missing"),
    ("limits/fp16", ..., "limits has none for fp16"),
    ("created", "yesterday", "created is 'yesterday', not a date"),
    ("created", "2026-W47-7", "created is '2026-W47-7', not a date"),
    ("channel_order", "rgb", "channel_order is 'rgb', not RGB or BGR"),
    ("training", 3, "training is 3, not an object"),
    ("classes", None, "classes is None, not an object"),
    ("classes/classes/0/color", "red", "classes.*red"),
    ("source/sha256", "", r"source\.sha256 is ''"),
]


@pytest.mark.parametrize(("field", "value", "words"), WRONG_FIELDS)
def test_a_wrong_field_is_named_with_its_value(field: str, value: object, words: str) -> None:
    content = manifest_of(tuple(graph_record(key, 5, "a" * 64) for key in GRAPHS)).to_json()
    _set(field, value)(content)
    with pytest.raises(BundleError, match=words) as caught:
        Manifest.from_json(content, "street.spm/manifest.json")
    assert caught.value.problem.startswith("street.spm/manifest.json: ")


@pytest.mark.parametrize(
    ("graphs", "golden", "words"),
    [(2, 1, "the graph edit fp32 is there twice"), (1, 2, "the golden edit tree is there twice")],
)
def test_nothing_may_be_there_twice(graphs: int, golden: int, words: str) -> None:
    manifest = manifest_of((graph_record("fp32", 5, "a" * 64),) * graphs)
    manifest = dataclasses.replace(manifest, golden=manifest.golden * golden)
    with pytest.raises(BundleError, match=words):
        Manifest.from_json(manifest.to_json(), "m")


def test_a_newer_schema_is_said_to_be_newer_even_with_other_hashes(street: Path) -> None:
    (street / MANIFEST).write_text('{"schema": "spmdeploy.bundle/2", "all": "different"}')
    (street / SUMS).unlink()
    assert "spmdeploy.bundle/2 is newer than spmdeploy.bundle/1, which this version reads" in refusal(street)
    assert "upgrade" in refusal(street)


@pytest.mark.parametrize("schema", [None, 1, "spmdeploy.bundle/", "spmdeploy.bundle/0", "spmdeploy.generator/1"])
def test_another_schema_is_no_bundle(street: Path, schema: object) -> None:
    rewrite_manifest(street, lambda content: content.update(schema=schema))
    assert f"its schema is {schema!r}" in refusal(street)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": "spmdeploy.bundle/1", "name": ', "not valid JSON"),
        ('{"schema": "spmdeploy.bundle/1", "schema": "spmdeploy.bundle/1"}', "the key 'schema' is there twice"),
        ('{"schema": "spmdeploy.bundle/1", "gflop": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "not valid JSON"),
        ("[]", "its schema is None"),
    ],
)
def test_json_that_is_no_manifest(street: Path, text: str, words: str) -> None:
    (street / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    list_sums(street)
    assert words in refusal(street)


# ------------------------------------------------------------------------------------------------ damage and mix-ups


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
    with pytest.raises(BundleError, match=r"card\.md: cannot be read"):
        bundle.read("card.md")


def test_a_giant_manifest_is_not_read(street: Path) -> None:
    os.truncate(street / MANIFEST, 1 << 40)  # sparse
    with pytest.raises(BundleError, match=r"manifest\.json: 1099511627776 bytes, more than"):
        open_bundle(street)


def test_a_file_beyond_the_limit_of_onnx_is_refused(street: Path) -> None:
    os.truncate(street / "card.md", 1 << 31)  # sparse
    with pytest.raises(BundleError, match=r"card\.md: 2147483648 bytes, more than 2147483647"):
        open_bundle(street)


# ----------------------------------------------------------------------------------------------------- not a bundle


@pytest.mark.parametrize(
    ("name", "content", "words", "hint"),
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
def test_files_that_are_no_bundle(tmp_path: Path, name: str, content: bytes, words: str, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=words) as caught:
        open_bundle(tmp_path / name)
    assert caught.value.problem.startswith(str(tmp_path / name))
    assert re.search(hint, caught.value.hint or "")


def test_folders_and_zips_that_are_no_bundle(tmp_path: Path) -> None:
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


def test_a_large_folder_with_a_manifest_is_not_walked_to_the_end(street: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_ENTRIES", 12)
    for i in range(8):
        (street / f"{i}.txt").touch()
    assert "more than 12 files" in refusal(street)


# ------------------------------------------------------------------------------------------------------------- links


def _outside(street: Path) -> Path:
    secret = street.parent / "secret.png"
    secret.write_bytes(b"image.png")  # the very bytes that are listed: it is the link that is refused
    return secret


def test_a_link_that_leads_outside_is_refused(street: Path) -> None:
    picture = street / "golden/tree/image.png"
    picture.unlink()
    picture.symlink_to(_outside(street))
    assert f"{picture}: a link to {street.parent / 'secret.png'}, outside the bundle" in refusal(street)


def test_a_folder_that_is_a_link_is_refused(street: Path) -> None:
    shutil.move(street / "golden", street.parent / "golden")
    (street / "golden").symlink_to(street.parent / "golden")
    assert "golden: a link to" in refusal(street)


def test_links_inside_the_bundle_are_followed_and_broken_or_circular_ones_are_not(street: Path) -> None:
    (street / "graphs/edit.fp16.onnx").rename(street / "graphs/half.onnx")
    (street / "graphs/edit.fp16.onnx").symlink_to("half.onnx")
    assert open_bundle(street).read("graphs/edit.fp16.onnx") == GRAPHS["fp16"]
    (street / "loose").symlink_to("nowhere")
    assert "loose: no regular file" in refusal(street)
    (street / "loose").unlink()
    (street / "loop").symlink_to(".")
    assert "loop: a link to" in refusal(street)
    (street / "loop").unlink()
    (street / "loop").symlink_to("loop")
    assert "loop: no regular file" in refusal(street)


def test_a_pipe_is_refused_instead_of_waited_for(street: Path) -> None:
    (street / "card.md").unlink()
    os.mkfifo(street / "card.md")
    assert "card.md: no regular file" in refusal(street)


def test_a_bundle_behind_a_link_opens(street: Path) -> None:
    link = street.parent / "current.spm"
    link.symlink_to(street)
    assert open_bundle(link).check_all() == ()


# ------------------------------------------------------------------------------------------------------ hostile zips


def rezip(source: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> Path:
    """The zip again, each entry written by `change`."""
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
def test_zip_names_that_lead_outside_are_refused(street_zip: Path, name: str) -> None:
    said = refusal(with_entry(street_zip, zipfile.ZipInfo(name)))
    assert f"entry {name!r} has a name" in said


def test_a_name_that_is_cut_at_nul_is_refused(street_zip: Path) -> None:
    hostile = with_entry(street_zip, zipfile.ZipInfo("cardXmdXexe"))
    content = hostile.read_bytes().replace(b"cardXmdXexe", b"card.md\0exe")
    hostile.write_bytes(content)
    assert r"entry 'card.md\x00exe' has a name" in refusal(hostile)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(street_zip: Path) -> None:
    assert "entry 'card.md' is there twice" in refusal(with_entry(street_zip, zipfile.ZipInfo("card.md"), b"other"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_a_zip_are_refused(street_zip: Path, kind: int) -> None:
    info = zipfile.ZipInfo("golden/link.png")
    info.external_attr = (kind | 0o777) << 16
    assert "entry 'golden/link.png' is a link or a device" in refusal(with_entry(street_zip, info, b"/etc/passwd"))


def test_a_compressed_zip_is_refused_with_the_remedy(street_zip: Path) -> None:
    def deflate(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)

    said = refusal(rezip(street_zip, deflate))
    assert "is compressed; a bundle's zip is not" in said and "zip -0" in said


def test_an_encrypted_entry_is_refused(street_zip: Path) -> None:
    assert "entry 'card.md' is encrypted" in refusal(patched(street_zip, "card.md", 8, b"\1"))


def test_too_many_entries_are_refused(street_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_ENTRIES", 5)
    assert "more than 5 entries" in refusal(street_zip)


def test_a_giant_directory_is_refused_before_it_is_loaded(street_zip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_ENTRIES", 1)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert "more than 1 entries" in refusal(street_zip)


def test_a_size_beyond_the_limit_is_refused(street_zip: Path) -> None:
    huge = struct.pack("<2L", 0xFFFFFFF0, 0xFFFFFFF0)
    assert "entry 'card.md' claims 4294967280 bytes, more than" in refusal(patched(street_zip, "card.md", 20, huge))


def test_a_size_that_runs_into_the_next_entry_is_refused(street_zip: Path) -> None:
    longer = struct.pack("<2L", 100, 100)
    assert "entry 'card.md' runs into" in refusal(patched(street_zip, "card.md", 20, longer))
    assert "entry 'manifest.json' runs into" in refusal(
        patched(street_zip, MANIFEST, 20, struct.pack("<2L", 1 << 20, 1 << 20))
    )


def test_headers_that_disagree_are_refused(street_zip: Path) -> None:
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


def test_two_entries_over_the_same_bytes_are_refused(street_zip: Path) -> None:
    """The overlapping zip bomb: many names in the directory for one stretch of the file."""
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


def test_overlap_with_agreeing_headers_is_refused(street: Path) -> None:
    """An entry whose content is the whole of the entry behind it, headers and all."""
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


def test_anything_around_the_zip_is_refused(street_zip: Path) -> None:
    content, hostile = street_zip.read_bytes(), street_zip.with_name("hostile.zip")
    hostile.write_bytes(content + b"x")
    assert "something follows the zip" in refusal(hostile)
    hostile.write_bytes(content[:4] + content)
    assert "something precedes the zip" in refusal(hostile)
    hostile.write_bytes(content[:-2] + b"\x05\0")
    assert "more than 4 GiB, or something precedes" in refusal(hostile)


def test_a_second_zip64_directory_is_refused(street_zip: Path) -> None:
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
def test_a_truncated_zip_is_refused(street_zip: Path, kept: float) -> None:
    content = street_zip.read_bytes()
    street_zip.write_bytes(content[: int(len(content) * kept)])
    assert "truncated" in refusal(street_zip)


def test_a_directory_of_rubbish_is_refused(street_zip: Path) -> None:
    content = bytearray(street_zip.read_bytes())
    content[content.index(b"PK\1\2") + 1] ^= 0xFF
    street_zip.write_bytes(content)
    assert "the directory of the zip cannot be read" in refusal(street_zip)


@settings(deadline=None)  # files are written: no time to promise
@given(st.data())
def test_a_zip_with_any_byte_changed_never_gives_other_content(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Whichever byte is changed to whatever: refused, or (in what no reader looks at, like dates) the same content."""
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


def test_folder_entries_of_other_zip_programs_are_passed_over(street_zip: Path) -> None:
    info = zipfile.ZipInfo("golden/")
    info.external_attr = (stat.S_IFDIR | 0o755) << 16
    assert open_bundle(with_entry(street_zip, info)).check_all() == ()
    assert "is a folder with content" in refusal(with_entry(street_zip, zipfile.ZipInfo("golden/"), b"x"))


def test_the_zip_program_makes_a_readable_bundle(street: Path) -> None:
    if shutil.which("zip") is None:
        pytest.skip("no zip program on this machine")
    target = street.with_name("by-hand.zip")
    subprocess.run(["zip", "-q", "-0", "-X", "-r", str(target), "."], cwd=street, check=True)
    assert open_bundle(target).check_all() == ()


# ---------------------------------------------------------------------------------------------------------- names

segments = st.text(st.sampled_from("ab./\\: \0\nC\u202eé-_"), max_size=8)


@given(st.one_of(st.text(max_size=40), st.lists(segments, max_size=4).map("/".join)))
def test_a_name_that_is_accepted_stays_inside(name: str) -> None:
    if is_inside(name):
        root = Path("/bundle")
        assert root in Path(os.path.normpath(root / name)).parents
        assert Path(name).as_posix() == name
        name.encode("utf-8")


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9), min_size=1, max_size=4))
def test_plain_names_are_accepted(parts: list[str]) -> None:
    assert is_inside("/".join(parts)) is all(part.isprintable() for part in parts)


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
            if is_inside(f"extra/{name}"):
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


# ---------------------------------------------------------------------------------------------------------- writing


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


def test_a_rejected_graph_is_kept_beside_the_target_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "street.spm.edit.fp16.onnx.rejected").write_text("from an earlier try")
    kept = tmp_path / "street.spm.edit.fp16.onnx.rejected"

    def export() -> None:
        with BundleWriter(tmp_path / "street.spm") as writer:
            fill(writer)
            raise VerificationError(f"look at {writer.keep_rejected('graphs/edit.fp16.onnx')}")

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
        pytest.raises(InputError, match=r"no/street\.spm: cannot be written"),
        BundleWriter(tmp_path / "no/street.spm"),
    ):
        pass
    with BundleWriter(tmp_path / "b.spm") as writer, pytest.raises(InputError, match=r"missing\.onnx"):
        writer.add_file("a", tmp_path / "missing.onnx")


# ------------------------------------------------------------------------------------------------------ overwriting


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
    with pytest.raises(InputError, match="No space left"):
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
    write_street(street, overwrite=True, licence="second")
    assert len(seen) == 2
    assert all(sorted(licences) == ["for tests only", "second"] for licences in seen)


def test_after_a_crash_between_the_renames_the_hint_says_where_the_old_one_is(street: Path) -> None:
    aside = street.with_name(".street.spm.0123abcd.previous")
    street.rename(aside)
    assert f"left the old one at {aside}" in refusal(street)


# ---------------------------------------------------------------------------------------------------------- packing


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
