"""Fixtures: a bundle with placeholder graphs, and helpers that modify it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from spmdeploy.bundle.bundle import Bundle, open_bundle
from spmdeploy.bundle.manifest import (
    GeneratorFacts,
    GoldenEdit,
    GraphRecord,
    Manifest,
    ParityLimits,
    SourceFacts,
)
from spmdeploy.bundle.signature import SecretKey
from spmdeploy.bundle.storage import GOLDEN_IMAGES, MANIFEST, SUMS
from spmdeploy.bundle.writer import BundleWriter
from spmdeploy.engines.pack import pack
from spmdeploy.errors import BundleError
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


def fill(writer: BundleWriter, graphs: Mapping[str, bytes] = GRAPHS) -> tuple[GraphRecord, ...]:
    for precision, content in graphs.items():
        writer.add_bytes(f"graphs/edit.{precision}.onnx", content)
    for image in GOLDEN_IMAGES:
        writer.add_bytes(f"golden/tree/{image}", image.encode())
    writer.add_bytes("card.md", b"# street\n")
    return tuple(graph_record(key, *writer.measure(f"graphs/edit.{key}.onnx")) for key in GRAPHS)


WEIGHTS = b"weights of both"


def message(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 & 127 | 130, number >> 4]) + length + bytes([size]) + content


def entry(key: bytes, value: bytes) -> bytes:
    """A StringStringEntryProto."""
    return message(1, key) + message(2, value)


def graph_with(*entries: bytes) -> bytes:
    """A ModelProto with an initializer whose external data has these entries."""
    return message(7, message(5, b"".join(message(13, each) for each in entries)))


LOCATION = graph_with(entry(b"location", b"shared.weights"))
"""A graph that keeps weights in graphs/shared.weights."""


def with_weights_beside(target: Path, graph: bytes = LOCATION) -> Bundle:
    """A bundle whose graphs share a file of weights. graph: content of both graphs, except for the producer's name."""
    with BundleWriter(target) as writer:
        writer.add_bytes("graphs/shared.weights", WEIGHTS)
        records = fill(writer, {key: message(2, content) + graph for key, content in GRAPHS.items()})
        records = tuple(dataclasses.replace(record, weights="graphs/shared.weights") for record in records)
        return writer.finish(manifest_of(records))


def write_street(target: Path, overwrite: bool = False, **changes: Any) -> Bundle:
    with BundleWriter(target, overwrite=overwrite) as writer:
        return writer.finish(manifest_of(fill(writer), **changes))


def list_sums(folder: Path) -> None:
    """Rewrite SHA256SUMS for the current files of the folder, as an attacker can do too."""
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


@pytest.fixture(autouse=True, scope="module")
def no_flushing() -> Iterator[None]:
    """Replace fsync, which would take most of the time of these tests; one test checks that it is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def secret_key(key_id: bytes, seed: bytes) -> SecretKey:
    """A key computed from an id of 8 bytes and a seed of 32 bytes, in minisign's format."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519", reason="needs the extra sign")
    public = ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    packed = b"Ed\0\0B2" + bytes(48) + key_id + seed + public + bytes(32)
    return SecretKey(base64.b64encode(packed).decode())
