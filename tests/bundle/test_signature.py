"""Signatures and keys are exchanged with minisign, and changed ones are refused."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdeploy.bundle.signature import (
    check_signature,
    new_key,
    read_public_key,
    read_secret_key,
    sign,
    write_key_pair,
)
from spmdeploy.errors import BundleError, InputError, UnavailableError
from tests.bundle.conftest import secret_key

pytest.importorskip("minisign", reason="signatures need the extra sign")

# Made with minisign 0.11; they sign b"hello\n".
PUBLIC = """untrusted comment: minisign public key 167237EC7988CBF7
RWT3y4h57DdyFr/xHXN/IWzzn8uDHsC0NcmDg0E2gUtc0acrl1Qk5cCR
"""
SECRET = """untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA98uIeew3chbUysJaGzpO+MfiTSwhMpR6ejFEGnkwYZ0ulybP\
1K6Kp7/xHXN/IWzzn8uDHsC0NcmDg0E2gUtc0acrl1Qk5cCRAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
"""
SIGNATURE = """untrusted comment: signature from minisign secret key
RUT3y4h57DdyFpPp7WlQQrkWzfa95hsMJaXgJqQi5MLOvdcnvKVc+g/JjTAz4bFJ6Jeyn/cAVRESznIQ1Q8JMCfGL+/VFiLj2wo=
trusted comment: trust me
G5IAllhI1UzzXvfauVpjofZMpHvL+qFMnwK7tzc+bRkfaIK0xneslyd/BPXqEN6o0WZHGDaAKTqRNQWkbnZjAg==
"""
UNHASHED = """untrusted comment: signature from minisign secret key
RWT3y4h57DdyFgHbU7MAAQ+O4nfeYYG+2cUNWPVbfaX6S/7O4Yo1ew2B8gvgJYARhIUGyvpCYLV7fOsaKXnE7uJ0vE0AUUNQNQc=
trusted comment: legacy
0pUMIPvftHoxRsOFPP/VP5xjWgV2rx//fcKre6kwpn1yoSe5dVMbDxI1c+ZsCXxnTrkHHeUz7tH/Z2S5s5IVAw==
"""
ENCRYPTED = """untrusted comment: minisign encrypted secret key
RWRTY0IyOHiftFDUXtSVHJd0l3smqOuTClyuEH5oo1JQ37Ya4csAAAACAAAAAAAAAEAAAAAAM4CM1fC7Pp5pW/2tKT9XOXiBcIM4nmMwIuzx3H/eOSYKcUKX\
CxdyHkrl+0qpE47pw77GISA3TC2+9y94HGA5uPTjTJm/9xpgXDnZcTZQBaV5Bruf4Pv8Wbk+gEeQzl4jMAG8s5//Q80=
"""
PUBLIC_OF_ENCRYPTED = "RWSBQzNyZHkXzPSCR++AHRlWWKBIwaQU5jFvbvDJxFU8w/AMIr8kmig5"

SHOWN = Path("SHA256SUMS.minisig")
KEY = secret_key(b"\1" * 8, b"\2" * 32)
LITTLE = 1 << 24  # bytes of scrypt: 16 MiB instead of 1 GiB


def unasked() -> str:
    raise AssertionError("there is no password to ask for")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_check_signature_by_minisign_fits() -> None:
    key = read_public_key(PUBLIC.splitlines()[1])
    assert key.name == "167237EC7988CBF7"
    checked = check_signature(b"hello\n", SIGNATURE.encode(), key, SHOWN)
    assert (checked.key, checked.comment) == (key.name, "trust me")
    with pytest.raises(BundleError, match="does not fit"):
        check_signature(b"hello", SIGNATURE.encode(), key, SHOWN)


def test_sign_with_key_of_minisign_gives_the_same(tmp_path: Path) -> None:
    secret = read_secret_key(written(tmp_path / "a.key", SECRET), unasked)
    assert secret.public == read_public_key(written(tmp_path / "a.pub", PUBLIC))
    ours, theirs = sign(b"hello\n", secret, "trust me").splitlines(), SIGNATURE.encode().splitlines()
    assert ours[1:] == theirs[1:]


@pytest.mark.slow
def test_read_secret_key_encrypted_by_minisign_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "e.key", ENCRYPTED)
    assert read_secret_key(path, lambda: "pass").public == read_public_key(PUBLIC_OF_ENCRYPTED)


def test_check_signature_legacy_is_refused() -> None:
    with pytest.raises(BundleError, match="no signature of a hash"):
        check_signature(b"hello\n", UNHASHED.encode(), read_public_key(PUBLIC.splitlines()[1]), SHOWN)


@pytest.mark.parametrize("password", [None, "pass word"])
def test_sign_keys_and_signatures_are_accepted_by_minisign(tmp_path: Path, password: str | None) -> None:
    if shutil.which("minisign") is None:
        pytest.skip("no minisign on this machine")
    secret, public = write_key_pair(tmp_path / "ours", new_key(), password, LITTLE)
    (tmp_path / "file").write_bytes(b"content")
    key = read_secret_key(secret, lambda: str(password))
    (tmp_path / "file.minisig").write_bytes(sign(b"content", key, "from us"))
    check = ["minisign", "-V", "-H", "-p", public, "-m", tmp_path / "file"]
    assert b"Trusted comment: from us" in subprocess.run(check, capture_output=True, check=True).stdout
    args = [*["-W"] * (password is None), "-s", secret, "-m", tmp_path / "file", "-t", "from them"]
    subprocess.run(["minisign", "-S", *args], input=f"{password}\n".encode(), capture_output=True, check=True)
    checked = check_signature(b"content", (tmp_path / "file.minisig").read_bytes(), key.public, SHOWN)
    assert checked.comment == "from them"


@settings(deadline=None)
@given(st.binary(max_size=200), st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)))
def test_sign_is_repeatable_and_fits(content: bytes, comment: str) -> None:
    signature = sign(content, KEY, comment)
    assert signature == sign(content, KEY, comment)
    assert check_signature(content, signature, KEY.public, SHOWN).comment == comment
    with pytest.raises(BundleError, match="does not fit"):
        check_signature(content + b"\n", signature, KEY.public, SHOWN)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_check_signature_any_changed_byte_is_refused(data: st.DataObject) -> None:
    signature = bytearray(sign(b"content", KEY, "a comment"))
    start = signature.index(b"\n") + 1  # the signature does not cover the first line
    place = data.draw(st.integers(start, len(signature) - 1))
    signature[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BundleError, match=r"does not fit|no signature|made with the key"):
        check_signature(b"content", bytes(signature), KEY.public, SHOWN)


def test_check_signature_other_base64_is_refused() -> None:
    lines = SIGNATURE.splitlines(keepends=True)
    assert lines[1].endswith("2wo=\n")
    lines[1] = lines[1].replace("2wo=", "2wp=")  # the same bytes: the last bits of the o are ignored
    with pytest.raises(BundleError, match="no signature"):
        check_signature(b"hello\n", "".join(lines).encode(), read_public_key(PUBLIC.splitlines()[1]), SHOWN)


def test_check_signature_other_key_is_refused_also_with_same_id() -> None:
    signature = sign(b"content", KEY, "")
    with pytest.raises(BundleError, match="made with the key 0101010101010101, not with"):
        check_signature(b"content", signature, new_key().public, SHOWN)
    namesake = secret_key(b"\1" * 8, b"\3" * 32)
    with pytest.raises(BundleError, match="does not fit") as caught:
        check_signature(b"content", signature, namesake.public, SHOWN)
    assert caught.value.exit_code == 6 and str(SHOWN) in caught.value.problem


def test_check_signature_comment_of_another_is_refused() -> None:
    first, second = (sign(b"content", KEY, comment).splitlines(keepends=True) for comment in ("version 1", "version 2"))
    with pytest.raises(BundleError, match="does not fit"):
        check_signature(b"content", b"".join((*first[:2], second[2], first[3])), KEY.public, SHOWN)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n\n", b"\xff" * 300, SIGNATURE.encode()[:-20], SIGNATURE.encode() * 2, PUBLIC.encode(),
     SIGNATURE.replace("trust me", "trust\x1b[2Jme").encode()],
)  # fmt: skip
def test_check_signature_other_content_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="no signature"):
        check_signature(b"hello\n", content, read_public_key(PUBLIC.splitlines()[1]), SHOWN)


@pytest.mark.parametrize("password", [None, "pässword"])
def test_write_key_pair_is_read_back(tmp_path: Path, password: str | None) -> None:
    key = new_key()
    secret, public = write_key_pair(tmp_path / "street", key, password, LITTLE)
    assert read_secret_key(secret, unasked if password is None else lambda: str(password)) == key
    assert read_public_key(public) == read_public_key(str(public)) == read_public_key(key.public.line) == key.public
    assert stat.S_IMODE(secret.stat().st_mode) & 0o077 == 0 or os.name != "posix"
    assert {path.name for path in tmp_path.iterdir()} == {"street.key", "street.pub"}
    seed = base64.b64decode(key.line)[62:94]
    assert (seed in base64.b64decode(secret.read_text().splitlines()[1])) is (password is None)


def test_new_key_is_different_each_time() -> None:
    first, second = new_key(), new_key()
    assert first.public != second.public and first.public.name != second.public.name
    assert first.line not in repr(first)


def test_sign_comment_outside_ascii_is_escaped() -> None:
    signature = sign(b"content", KEY, "straße")
    assert check_signature(b"content", signature, KEY.public, SHOWN).comment == "stra\\xdfe"


def test_write_key_pair_password_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the password is not valid text"):
        write_key_pair(tmp_path / "street", new_key(), "not \udce9 text", LITTLE)
    assert list(tmp_path.iterdir()) == []


def test_read_secret_key_wrong_password_is_refused(tmp_path: Path) -> None:
    secret, _ = write_key_pair(tmp_path / "street", new_key(), "right", LITTLE)
    with pytest.raises(InputError, match="the password is wrong") as caught:
        read_secret_key(secret, lambda: "wrong")
    assert "wrong" not in str(caught.value.hint)


def test_write_key_pair_existing_file_is_kept(tmp_path: Path) -> None:
    for taken in ("street.pub", "street.key"):
        (tmp_path / taken).write_text("dear")
        with pytest.raises(InputError, match=f"{taken}: exists already"):
            write_key_pair(tmp_path / "street", new_key(), None)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, "dear")]
        (tmp_path / taken).unlink()


@pytest.mark.parametrize("name", ["", ".", "/", "a/.."])
def test_write_key_pair_impossible_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no name for a key"):
        write_key_pair(Path(name), new_key(), None)


def test_write_key_pair_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        write_key_pair(tmp_path / "no/street", new_key(), None)
    with pytest.raises(InputError, match="there is no file"):
        read_public_key(tmp_path / "no.pub")


@pytest.mark.parametrize("text", ["", "RWT3", PUBLIC.replace("RWT3", "RWT"), PUBLIC.replace("RW", "RX"), SIGNATURE])
def test_read_key_other_content_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "key", text)
    with pytest.raises(InputError, match="no public key"):
        read_public_key(path)
    with pytest.raises(InputError, match="no secret key"):
        read_secret_key(path, unasked)


def test_read_key_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no public key"):
        read_public_key(written(tmp_path / "a.key", SECRET))
    with pytest.raises(InputError, match="no secret key"):
        read_secret_key(written(tmp_path / "a.pub", PUBLIC), unasked)


def test_read_secret_key_halves_of_two_are_refused(tmp_path: Path) -> None:
    packed = bytearray(base64.b64decode(SECRET.splitlines()[1]))
    packed[70] ^= 1
    path = written(tmp_path / "a.key", f"{SECRET.splitlines()[0]}\n{base64.b64encode(packed).decode()}\n")
    with pytest.raises(InputError, match="do not belong together"):
        read_secret_key(path, unasked)


@pytest.mark.parametrize(("operations", "memory"), [(1 << 40, 1 << 40), (1 << 25, 1 << 31), (1 << 50, 0)])
def test_read_secret_key_excessive_scrypt_is_refused(tmp_path: Path, operations: int, memory: int) -> None:
    packed = bytearray(base64.b64decode(ENCRYPTED.splitlines()[1]))
    packed[38:54] = operations.to_bytes(8, "little") + memory.to_bytes(8, "little")
    path = written(tmp_path / "a.key", f"{SECRET.splitlines()[0]}\n{base64.b64encode(packed).decode()}\n")
    with pytest.raises(InputError, match=r"asks for \d+ MiB"):
        read_secret_key(path, lambda: "pass")


def test_check_signature_without_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    signature, public = sign(b"content", KEY, ""), KEY.public
    monkeypatch.setitem(sys.modules, "minisign", None)
    with pytest.raises(UnavailableError, match="py-minisign") as caught:
        check_signature(b"content", signature, public, SHOWN)
    assert caught.value.hint == 'pip install "spmdeploy[sign]"'
