"""Session files: written, read, replayed by the command, refused when damaged."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.editing.options import EditOptions
from spmdeploy.editing.session import Session, read_session, write_session
from spmdeploy.errors import InputError, UsageError
from spmdeploy.types import Padding

SAMPLE = SAMPLE_EDITS[0]


@pytest.fixture
def session() -> Session:
    options = EditOptions(feather=2, match_surroundings=False)
    return Session(SAMPLE.photo.read_bytes(), "a.jpg", fill="tree", mask=SAMPLE.mask.read_bytes(), options=options)


def repacked(session: Session, **changes: Any) -> bytes:
    """The session file with fields of session.json changed, or removed where they are None."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(write_session(session))) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "session.json":
                record = json.loads(content) | changes
                content = json.dumps({key: value for key, value in record.items() if key not in changes or value})
            new.writestr(name, content)
    return stream.getvalue()


def test_read_session_returns_what_was_written(tmp_path: Path, session: Session) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(write_session(session))
    read = read_session(path)
    assert vars(read) == vars(session)
    assert write_session(read) == path.read_bytes()
    extended = Session(b"photo", fill="3", extend=Padding(1, 2, 3, 4))
    path.write_bytes(write_session(extended))
    assert vars(read_session(path)) == vars(extended)


def test_edit_of_a_session_equals_edit_of_its_files(tmp_path: Path, session: Session) -> None:
    (tmp_path / "a.zip").write_bytes(write_session(session))
    assert cli.main(["edit", str(tmp_path / "a.zip"), "-o", str(tmp_path / "a.png"), "--json"]) == 0
    options = ["--mask", str(SAMPLE.mask), "--fill", "tree", "--feather", "2", "--no-match-surroundings"]
    assert cli.main(["edit", str(SAMPLE.photo), *options, "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fill", "road"], 2, "a session file has its own fill"),
        (["--grow", "3"], 2, "a session file has its own grow"),
        (["--feather", "9"], 2, "a session file has its own feather"),
        (["-o", "OUT.jpg"], 7, "replayed to the bytes of a PNG file"),
    ],
)
def test_edit_of_a_session_refuses_other_options(
    tmp_path: Path, session: Session, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    (tmp_path / "a.zip").write_bytes(write_session(session))
    options = [str(tmp_path / one) if one.startswith("OUT") else one for one in options]
    assert cli.main(["edit", str(tmp_path / "a.zip"), "-o", str(tmp_path / "a.png"), *options]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "spmdeploy.session/2"}, "newer"),
        ({"schema": "other/1"}, "its schema is"),
        ({"options": None}, "options is missing"),
        ({"options": {"feather": "3"}}, "feather"),
        ({"options": {"tiling": "tiles"}}, "tiling"),
        ({"extend": [1, 2, 3]}, "extend"),
        ({"extend": [1, 2, 3, 0.5]}, r"extend\[3\] is 0.5"),
        ({"fill": None}, "fill is missing"),
        ({"extend": [0, 0, 9, 0]}, "mask or extend"),
    ],
)
def test_read_session_names_what_is_wrong(
    tmp_path: Path, session: Session, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(repacked(session, **changes))
    with pytest.raises(InputError, match=message):
        read_session(path)


def test_read_session_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(InputError, match="not a session file"):
        read_session(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(InputError, match=r"session\.json"):
        read_session(path)


def test_session_fields_that_contradict_are_refused() -> None:
    for fields in (
        {},
        {"labels": b"", "fill": "1", "mask": b""},
        {"fill": "1"},
        {"fill": "1", "mask": b"", "extend": 1},
    ):
        with pytest.raises(UsageError, match="give either"):
            Session(b"", **fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="match_surroundings"):
        Session(b"", fill="1", mask=b"", options=EditOptions(match_surroundings=True))
