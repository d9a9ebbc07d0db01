"""Opening, reading and verifying bundles: corrupt, swapped, missing and unlisted files are found."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.bundle.external_data import external_locations
from spmdeploy.bundle.manifest import GraphRecord
from spmdeploy.bundle.storage import GOLDEN_IMAGES, MANIFEST, SUMS
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines.pack import pack
from spmdeploy.errors import BundleError

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
)


@pytest.mark.parametrize("packed", [False, True])
def test_open_bundle_written_bundle_is_read(street: Path, packed: bool) -> None:
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


def test_open_bundle_sums_agree_with_sha256sum(street: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=street, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(open_bundle(street).files())


def test_open_bundle_sums_in_binary_mode_are_read(street: Path) -> None:
    (street / SUMS).write_text((street / SUMS).read_text().replace("  ", " *"))
    assert open_bundle(street).check_all() == ()


def test_writer_finished_leaves_nothing_beside(street: Path) -> None:
    assert names_in(street.parent) == ["street.spm"]
    assert stat.S_IMODE(street.stat().st_mode) == 0o777 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_unlisted_files_engines_are_left_out(street: Path) -> None:
    (street / "engines/key").mkdir(parents=True)
    (street / "engines/key/edit.engine").write_bytes(b"cache")
    bundle = open_bundle(street)
    assert bundle.check_all() == ()
    with pytest.raises(BundleError, match=r"lists no 'engines/key/edit\.engine'"):
        bundle.read("engines/key/edit.engine")


def test_writer_engines_are_not_hashed(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "street.spm") as writer:
        writer.add_bytes("engines/key/edit.engine", b"cache")
        bundle = writer.finish(manifest_of(fill(writer)))
    assert not any(name.startswith("engines/") for name in bundle.files())
    assert (tmp_path / "street.spm/engines/key/edit.engine").read_bytes() == b"cache"


def test_unlisted_files_are_reported_and_never_read(street: Path) -> None:
    (street / "graphs/notes.txt").write_text("mine")
    bundle = open_bundle(street)
    assert bundle.check_all() == bundle.unlisted_files == ("graphs/notes.txt",)
    with pytest.raises(BundleError, match=r"lists no 'graphs/notes\.txt'"):
        bundle.path_of("graphs/notes.txt")


def test_graph_missing_one_lists_those_available(street: Path) -> None:
    with pytest.raises(BundleError, match=r"no graph 'refine' in fp16; there is edit fp32, edit fp16"):
        open_bundle(street).graph("refine", "fp16")


def test_graph_missing_one_names_the_command_that_adds_it(street: Path, tmp_path: Path) -> None:
    bundle = open_bundle(street)
    with pytest.raises(BundleError) as caught:
        bundle.graph("refine", "fp16")
    assert str(caught.value.hint).endswith(f"or add it: spmdeploy export {street} --output NEW.spm --half-weights")

    def hint(path: Path, *graphs: GraphRecord) -> str:
        return dataclasses.replace(
            bundle, path=path, manifest=dataclasses.replace(bundle.manifest, graphs=graphs)
        ).add_graphs

    fp32, fp16 = bundle.manifest.graphs
    full = dataclasses.replace(fp32, graph="edit_cpu", weights_dtype="float32")
    assert hint(Path("my files/a.spm"), full) == 'add it: spmdeploy export "my files/a.spm" --output NEW.spm'
    assert hint(street, fp16).endswith("bundle: spmdeploy export WEIGHTS --classes CLASSES --output NEW.spm")


def test_path_of_is_hashed_and_only_for_folders(street: Path, street_zip: Path) -> None:
    assert open_bundle(street).path_of("card.md").read_bytes() == b"# street\n"
    with pytest.raises(BundleError, match="inside a zip"):
        open_bundle(street_zip).path_of("card.md")
    bundle = open_bundle(street)
    (street / "card.md").write_bytes(b"# strEEt\n")
    with pytest.raises(BundleError, match=r"card\.md: tampered"):
        bundle.path_of("card.md")


@pytest.mark.parametrize("name", ["graphs/edit.fp32.onnx", "golden/tree/expected.png", "card.md"])
def test_read_one_changed_bit_is_found(street: Path, name: str) -> None:
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


def test_check_all_names_every_corrupt_file(street: Path) -> None:
    (street / "card.md").write_bytes(b"# Street\n")
    (street / "golden/tree/mask.png").write_bytes(b"Mask.png")
    assert "card.md" in refusal(street) and "golden/tree/mask.png" in refusal(street)


def test_open_bundle_changed_manifest_is_refused(street: Path) -> None:
    text = (street / MANIFEST).read_text()
    (street / MANIFEST).write_text(text.replace("for tests only", "free for all!!"))
    with pytest.raises(BundleError, match=r"manifest\.json: tampered"):
        open_bundle(street)
    (street / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(BundleError, match=r"manifest\.json: tampered"):
        open_bundle(street)


def test_open_bundle_truncated_graph_is_refused(street: Path) -> None:
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
        return  # libraries refuse it too
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


def test_read_graph_corrupt_weights_are_refused(tmp_path: Path) -> None:
    bundle = with_weights_beside(tmp_path / "street.spm")
    (bundle.path / "graphs/shared.weights").write_bytes(WEIGHTS[::-1])
    for way in (bundle.read_graph, bundle.path_of_graph):
        with pytest.raises(BundleError, match=r"shared\.weights: tampered"):
            way(bundle.manifest.graphs[0])
    lines = (bundle.path / SUMS).read_text().splitlines(keepends=True)
    (bundle.path / SUMS).write_text("".join(line for line in lines if "shared.weights" not in line))
    with pytest.raises(BundleError, match=r"shared\.weights: named in manifest\.json, but SHA256SUMS does not list it"):
        open_bundle(bundle.path)


def test_open_bundle_swapped_graphs_with_new_sums_are_refused(street: Path) -> None:
    (street / "graphs/edit.fp32.onnx").write_bytes(GRAPHS["fp32"][::-1])
    list_sums(street)
    with pytest.raises(BundleError, match=r"edit\.fp32\.onnx: tampered.*but manifest\.json says"):
        open_bundle(street)


@pytest.mark.parametrize("name", ["graphs/edit.fp16.onnx", "golden/tree/labels.png", "card.md", SUMS, MANIFEST])
def test_open_bundle_missing_file_is_named(street: Path, name: str) -> None:
    (street / name).unlink()
    with pytest.raises(BundleError, match="missing") as caught:
        open_bundle(street)
    assert str(street / name) in caught.value.problem


@pytest.mark.parametrize("name", ["graphs/edit.fp16.onnx", "golden/tree/labels.png", MANIFEST])
def test_open_bundle_unlisted_file_is_not_used(street: Path, name: str) -> None:
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
def test_open_bundle_bad_line_in_sums_is_quoted(street: Path, line: str) -> None:
    (street / SUMS).write_bytes((street / SUMS).read_bytes() + line.encode() + b"\n")
    with pytest.raises(BundleError, match=r"SHA256SUMS: line 9 is"):
        open_bundle(street)


def test_read_file_changed_after_opening_is_refused(street: Path) -> None:
    bundle = open_bundle(street)
    (street / "card.md").write_bytes(b"# street\n" + b"x" * 1000)
    with pytest.raises(BundleError, match=r"card\.md: 1009 bytes, but 9 when the bundle was opened"):
        bundle.read("card.md")
    (street / "card.md").unlink()
    with pytest.raises(BundleError, match=r"there is no file .*card\.md"):
        bundle.read("card.md")


def test_open_bundle_giant_manifest_is_refused(street: Path) -> None:
    os.truncate(street / MANIFEST, 1 << 40)  # sparse
    with pytest.raises(BundleError, match=r"manifest\.json: 1099511627776 bytes, more than"):
        open_bundle(street)


def test_open_bundle_file_beyond_limit_of_onnx_is_refused(street: Path) -> None:
    os.truncate(street / "card.md", 1 << 31)  # sparse
    with pytest.raises(BundleError, match=r"card\.md: 2147483648 bytes, more than 2147483647"):
        open_bundle(street)
