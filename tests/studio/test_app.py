"""The HTTP service: results, refusals, limits and who may use it."""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spmdeploy.editing.session import Session, read_session, run_session
from spmdeploy.imaging import files as images
from spmdeploy.imaging.mask_files import read_mask
from spmdeploy.studio.app import Served
from spmdeploy.studio.limits import Access, Limits
from spmdeploy.types import Padding
from tests.studio.conftest import Files, Painter, png, running

httpx = pytest.importorskip("httpx", reason="the client of the tests is httpx")


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with running(served, Limits(megapixels=1, request_bytes=1 << 20)) as url, connect(url) as client:
        yield client


def connect(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=20, trust_env=False)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_edit_form_returns_the_bytes_of_the_library(client: httpx.Client, served: Served, files: Files) -> None:
    answer = client.post("/v1/edits", files=files.form())
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    photo, labels = images.read_photo("", files.photo).pixels, images.read_labels("", files.labels)
    expected = served.editor.edit(photo, labels, read_mask("", files.mask)).image
    assert np.array_equal(pixels(answer.content), expected)
    assert answer.content == images.encode_photo(images.Photo(expected))
    assert "run;dur=" in answer.headers["server-timing"]


def test_edit_json_equals_the_form(client: httpx.Client, files: Files) -> None:
    body = {"image": files.photo, "labels": files.labels, "mask": files.mask}
    encoded = {name: base64.b64encode(content).decode() for name, content in body.items()}
    by_form = client.post("/v1/edits", files=files.form(feather="0"))
    by_json = client.post("/v1/edits", json={**encoded, "feather": 0}, headers={"accept": "application/json"}).json()
    assert base64.b64decode(by_json["image"]) == by_form.content
    assert (by_json["width"], by_json["height"], by_json["report"]["feather"]) == (60, 40, 0)


def test_edit_stream_ends_with_the_result(client: httpx.Client, files: Files) -> None:
    answer = client.post("/v1/edits", files=files.form(), headers={"accept": "application/x-ndjson"})
    *steps, last = [json.loads(line) for line in answer.text.splitlines()]
    assert steps == [{"done": 0, "total": 1}, {"done": 1, "total": 1}] and last["width"] == 60


def test_edit_json_names_the_tiles_of_a_large_window(client: httpx.Client, painter: Painter) -> None:
    painter.refines, painter.refine_unsupported = True, None
    mask = np.zeros((900, 900), np.uint8)
    mask[100:800, 100:800] = 255
    form = {"image": ("a.png", png(np.zeros((900, 900, 3), np.uint8))), "mask": ("m.png", png(mask))}
    fields = {"fill": "road", "tiling": "cascade", "match_surroundings": "false"}
    answer = client.post("/v1/edits", files=form, data=fields, headers={"accept": "application/json"}).json()
    covered = np.zeros_like(mask)
    for tile in answer["tiles"]:
        covered[tile["top"] : tile["top"] + tile["size"], tile["left"] : tile["left"] + tile["size"]] = 255
    assert len(answer["tiles"]) >= 9 and {tile["size"] for tile in answer["tiles"]} == {256}
    assert covered[mask > 0].all()


def test_edit_fill_and_extend_make_the_photo_larger(client: httpx.Client, files: Files) -> None:
    answer = client.post("/v1/edits", files=files.form(labels=None, mask=None, fill="road", extend="0,0,20,0"))
    assert answer.status_code == 200, answer.text
    assert pixels(answer.content).shape == (40, 80, 3)


@pytest.mark.parametrize(
    ("changes", "status", "code", "message"),
    [
        ({"labels": None}, 400, "usage", "give either labels or fill"),
        ({"mask": None}, 400, "usage", "give either mask or extend"),
        ({"image": None}, 400, "usage", "image is missing"),
        ({"image": "text"}, 400, "usage", "image is not a file"),
        ({"image": b"no image"}, 400, "invalid_input", "image.png"),
        ({"labels": None, "fill": "sofa"}, 400, "invalid_input", "sofa"),
        ({"feather": "-1"}, 400, "usage", "feather"),
        ({"feather": "9" * 5000}, 400, "usage", "feather"),
        ({"tiling": "tiles"}, 400, "usage", "tiling"),
        ({"match_surroundings": "perhaps"}, 400, "usage", "match_surroundings"),
        ({"extend": "1,2,3"}, 400, "usage", "extend"),
        ({"radius": "3"}, 400, "usage", "unknown field 'radius'"),
        ({"mask": png(np.zeros((40, 60), np.uint8))}, 400, "invalid_input", "empty"),
        ({"mask": png(np.zeros((40, 61), np.uint8))}, 400, "invalid_input", "61×40"),
        ({"labels": png(np.full((40, 60), 77, np.uint8))}, 400, "invalid_input", "77"),
    ],
)
def test_edit_wrong_fields_are_problems(
    client: httpx.Client, files: Files, changes: dict[str, object], status: int, code: str, message: str
) -> None:
    answer = client.post("/v1/edits", files=files.form(**changes))
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert answer.headers["content-type"] == "application/problem+json" and message in problem["detail"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"image": "%%%"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=y", 400),
        (b"", "multipart/form-data", 400),
        (b"x", "text/plain", 415),
    ],
)
def test_edit_wrong_bodies_are_problems(client: httpx.Client, body: bytes, kind: str, status: int) -> None:
    answer = client.post("/v1/edits", content=body, headers={"content-type": kind})
    assert answer.status_code == status and answer.json()["status"] == status


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than are accepted."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("part", ["image", "labels", "mask", "instances"])
def test_edit_too_many_pixels_are_refused_before_decoding(
    client: httpx.Client, files: Files, painter: Painter, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(images, "decode_image", lambda *arguments: pytest.fail("decoded"))
    answer = client.post("/v1/edits", files=files.form(**{part: bomb(2000, 1000)}))
    assert answer.status_code == 400 and "2.0 megapixels; this service accepts 1" in answer.json()["detail"]
    assert painter.calls == 0


def test_edit_too_large_extension_is_refused(client: httpx.Client, files: Files) -> None:
    answer = client.post("/v1/edits", files=files.form(labels=None, mask=None, fill="road", extend="0,0,30000,0"))
    assert answer.status_code == 400 and "the extended photo" in answer.json()["detail"]


def test_request_too_many_bytes_are_refused(client: httpx.Client) -> None:
    answer = client.post("/v1/photos", content=bytes((1 << 20) + 1))
    assert answer.status_code == 413 and answer.headers["content-type"] == "application/problem+json"

    def stream() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(1 << 19)

    assert client.post("/v1/photos", content=stream()).status_code == 413


def test_session_is_replayed_to_the_same_bytes(client: httpx.Client, served: Served, files: Files, tmp_path) -> None:
    edited = client.post("/v1/edits", files=files.form(feather="7"))
    packed = client.post("/v1/sessions", files=files.form(feather="7"))
    assert packed.headers["content-type"] == "application/zip"
    (tmp_path / "session.zip").write_bytes(packed.content)
    session = read_session(tmp_path / "session.zip")
    assert session.options.feather == 7 and run_session(served.editor, session).png == edited.content
    assert set(zipfile.ZipFile(io.BytesIO(packed.content)).namelist()) == {
        "session.json",
        "photo",
        "labels.png",
        "mask.png",
    }


def test_run_session_extension_equals_extend(served: Served, files: Files) -> None:
    result = run_session(served.editor, Session(files.photo, fill="road", extend=Padding(8, 0, 0, 4)))
    photo = images.read_photo("", files.photo).pixels
    expected = served.editor.extend(photo, np.full((44, 68), 3, np.uint8), Padding(8, 0, 0, 4)).image
    assert np.array_equal(pixels(result.png), expected)


def test_photos_and_labels_are_checked(client: httpx.Client, files: Files) -> None:
    assert client.post("/v1/photos", content=files.photo).json() == {"width": 60, "height": 40, "notes": []}
    answer = client.post("/v1/labels", content=files.labels)
    assert answer.headers["x-width"] == "60" and answer.content == bytes([5]) * 2400
    assert client.post("/v1/labels", content=files.photo).status_code == 400
    colored = png(np.full((4, 5, 3), (128, 64, 128), np.uint8))
    assert client.post("/v1/labels?colors=true", content=colored).content == bytes([3]) * 20
    assert client.post("/v1/labels?colors=2", content=files.labels).status_code == 422


def test_model_health_metrics_and_pages_answer(client: httpx.Client, files: Files) -> None:
    model = client.get("/v1/model").json()
    assert model["backend"] == "onnxruntime" and len(model["classes"]["classes"]) == 12
    assert client.get("/v1/health").json() == {"status": "ok", "queue": 0, "capacity": 16}
    client.post("/v1/edits", files=files.form())
    assert 'spmdeploy_requests_total{route="/v1/edits",status="200"} 1.0' in client.get("/metrics").text
    for path in ("/", "/docs", "/static/app.js"):
        answer = client.get(path)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"] and "https://" not in answer.text
    assert "POST /v1/edits" in client.get("/docs").text
    assert client.get("/v1/nothing").json()["status"] == 404


def test_samples_hold_the_packaged_edits(client: httpx.Client) -> None:
    names = [one["name"] for one in client.get("/v1/samples").json()]
    assert len(names) == 3
    for part in ("photo", "labels", "mask"):
        answer = client.get(f"/v1/samples/{names[0]}/{part}")
        assert Image.open(io.BytesIO(answer.content)).size == (480, 360)
    assert client.get("/v1/samples/other/photo").status_code == 404


@pytest.mark.parametrize(
    ("failure", "status", "detail", "code"),
    [
        (RuntimeError("broken"), 500, "RuntimeError: broken", "error"),
        (MemoryError(), 503, "out of memory", "out_of_memory"),
    ],
)
def test_edit_failures_of_the_backend_are_problems(
    client: httpx.Client, files: Files, painter: Painter, failure: BaseException, status: int, detail: str, code: str
) -> None:
    painter.failure = failure
    problem = client.post("/v1/edits", files=files.form()).json()
    assert (problem["status"], problem["detail"], problem["code"]) == (status, detail, code)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8490"}, 200),
        ({"host": "192.168.1.7:8490"}, 200),
        ({"host": "[::1]:8490"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "x@localhost"}, 421),
        ({"host": "localhost", "origin": "http://localhost"}, 200),
        ({"host": "localhost", "origin": "http://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
    ],
)
def test_guard_checks_host_and_origin(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    assert client.get("/v1/health", headers=headers).status_code == status


def test_guard_refuses_cross_site_posts(client: httpx.Client, files: Files) -> None:
    assert client.post("/v1/edits", files=files.form(), headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_guard_token_is_required_and_sets_a_cookie(served: Served) -> None:
    token = "0123456789abcdef"
    access = Access(frozenset({"localhost"}), token)
    with running(served, access=access) as url, connect(url) as client:
        assert client.get("/v1/health").status_code == 401
        assert client.get("/v1/health", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/health", headers={"authorization": f"Bearer {token}é".encode()}).status_code == 401
        assert client.get("/v1/health", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert client.get("/?token=wrong").status_code == 401
        assert client.get(f"/v1/health?token={token}").status_code == 401
        page = client.get(f"/?token={token}")
        assert page.status_code == 200 and "HttpOnly" in page.headers["set-cookie"]
        assert client.get("/v1/health").status_code == 200  # by the cookie
