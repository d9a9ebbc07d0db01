"""Valid files of every kind that the package reads, and the changes that turn them into hostile ones."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from spmdeploy.labels import class_table
from tests.bundle.conftest import GRAPHS, graph_record, manifest_of, with_weights_beside
from tests.simulators.records import SAMPLE

NUMBERS = (0, 1, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 0.5, 1e308, -1e-308),
    *("", " ", "x" * 3000, "\0", "\x1b[2J\x07", "\u202e", "../../etc/passwd", "/dev/zero", "C:\\x", "spmdeploy.x/1"),
    *([], {}, [[]], [0] * 300, {"": None}, [["x"]] * 3),
)
RAW = (b"NaN", b"1e999", b"-Infinity", b"1" * 5000, b"[" * 3000, b'{"a":' * 300, b'"\\ud800"', b'{"a":1,"a":2}', b"0x1")
TEXT = (
    b"\n",
    b",",
    b'"',
    b"\r\n",
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b",,,,,",
    b"'",
    b"9" * 400,
    b"\x1b]0;x\x07",
    b"=1+1",
)


def mutated(content: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    """Apply random changes: bits, numbers, lengths; parts missing, doubled or from other files."""
    data = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 3, 8))):
        size = len(data)
        place = source.randrange(size + 1)
        length = min(source.choice((1, 2, 4, 8, 16, 64, 300)), size - place)
        kind = source.randrange(9)
        if kind == 0 and size:
            data[place % size] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[place : place + length] = source.randbytes(length)
        elif kind == 2:
            number = source.choice(NUMBERS)
            order, width = source.choice("<>"), source.choice((("B", 0xFF), ("H", 0xFFFF), ("I", 0xFFFFFFFF)))
            data[place : place + struct.calcsize(width[0])] = struct.pack(order + width[0], number & width[1])
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + length]
        elif kind == 5:
            data[place:place] = data[place : place + length] * source.choice((1, 2, 50))
        elif kind == 6:
            other = source.choice(others)
            start = source.randrange(len(other) + 1)
            data[place : place + length] = other[start : start + source.choice((4, 64, 1000))]
        elif kind == 7:
            data[place:place] = source.choice(TEXT)
        else:
            data += source.randbytes(length)
    return bytes(data)


def mutated_json(value: Any, source: random.Random) -> bytes:
    """A JSON value with fields replaced, removed, added or invalid."""
    value, raw = json.loads(json.dumps(value)), None
    for _ in range(source.choice((1, 1, 2, 4))):
        containers = list(_containers(value))
        if not containers:
            break
        target = source.choice(containers)
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = source.choice(keys) if keys else None
        kind = source.randrange(6)
        if kind == 0 and keys:
            del target[key]
        elif kind == 1 and isinstance(target, dict):
            target[source.choice(("extra", "schema", "", "weights", "classes"))] = deepcopy(source.choice(VALUES))
        elif kind == 2 and keys:
            raw = source.choice(RAW)
            target[key] = "@raw@"
        elif kind == 3 and isinstance(target, list) and target:
            target.extend(deepcopy(target[:3]) * 10)
        elif keys:
            target[key] = deepcopy(source.choice(VALUES))
    text = json.dumps(value).encode()
    return text if raw is None else text.replace(b'"@raw@"', raw)


def _containers(value: Any) -> Any:
    if isinstance(value, dict | list) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def images() -> dict[str, bytes]:
    """Small photos, masks and label maps in every format and mode that is read, by file name."""
    source = np.random.default_rng(0)
    rgb = Image.fromarray(source.integers(0, 256, (24, 32, 3), np.uint8))
    gray = Image.fromarray(source.integers(0, 12, (24, 32), np.uint8))
    mask = Image.fromarray(np.where(np.arange(32) > 12, 255, 0).astype(np.uint8)[None].repeat(24, 0))
    palette = gray.copy()
    palette.putpalette([*range(36)])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 400, zip=True)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(mask)
    return {
        "rgb.png": _encoded(rgb, "PNG", pnginfo=text, icc_profile=bytes(16) + b"RGB " + bytes(108)),
        "exif.jpg": _encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": _encoded(rgb, "JPEG", progressive=True, quality=95),
        "exact.webp": _encoded(rgb, "WEBP", lossless=True, exif=exif),
        "rgb.bmp": _encoded(rgb, "BMP"),
        "alpha.png": _encoded(alpha, "PNG", exif=exif),
        "alpha.bmp": _encoded(alpha, "BMP"),
        "gray.png": _encoded(gray, "PNG"),
        "wide.png": _encoded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 100), "PNG"),
        "palette.png": _encoded(palette, "PNG", bits=4),
        "mask.png": _encoded(mask, "PNG"),
        "bits.png": _encoded(mask.convert("1"), "PNG"),
        "mask.jpg": _encoded(mask, "JPEG"),
        "photo.tif": _encoded(rgb, "TIFF"),
        "animation.gif": _encoded(palette, "GIF", save_all=True, append_images=[gray]),
    }


def records() -> dict[str, Any]:
    """One JSON value of each kind of record."""
    manifest = manifest_of(tuple(graph_record(key, 5, "a" * 64) for key in GRAPHS)).to_json()
    return {
        "manifest.json": json.loads(json.dumps(manifest)),
        "engine.json": json.loads(SAMPLE.to_bytes()),
        "classes.json": class_table("street").to_json(),
        "generator.json": {"schema": "spmdeploy.generator/1", "classes": 2, "width": 1, "hidden": 1, "training": None},
    }


BATCHES = {
    "rows.csv": b"image,labels,mask,grow,output\nexif.jpg,gray.png,mask.png,2,a.png\nrgb.png,gray.png,mask.png,,b\n",
    "extend.csv": b'image,fill,extend\nrgb.png,road,"0,0,64,0"\n',
    "rows.jsonl": b'{"image": "rgb.png", "labels": "gray.png", "mask": "mask.png", "grow": 3}\n'
    b'{"image": "rgb.png", "fill": "sky", "extend": [0, 0, 8, 8], "output": "sub/b.png"}\n',
}


def bundle_files(folder: Path) -> dict[str, bytes]:
    """The files of a small bundle with made-up graphs, by name; written to `folder` too."""
    bundle = with_weights_beside(folder)
    return {name: (bundle.path / name).read_bytes() for name in (*bundle.files(), "SHA256SUMS")}
