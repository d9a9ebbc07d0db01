"""Commands that ship a bundle to a device: pack, sign, slim, unpack, verify and edit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spmdeploy import cli
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.cli.bundle import PASSWORD

SAMPLE = SAMPLE_EDITS[0]


class Result(NamedTuple):
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        (line,) = self.out.splitlines()
        return dict(json.loads(line))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PASSWORD, raising=False)

    def run(*args: object) -> Result:
        capfd.readouterr()
        code = cli.main([str(arg) for arg in args])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def signed(run: Any, street_bundle: Path, tmp_path: Path) -> Path:
    """The bundle in one file, signed with ours.key; theirs.pub is another key."""
    for name in ("ours", "theirs"):
        assert run("bundle", "keygen", name, "--no-password").code == 0
    assert run("bundle", "pack", street_bundle, "tiny.spm", "--sign", "ours.key").code == 0
    return tmp_path / "tiny.spm"


def edit(model: Path | str, *args: str) -> list[str]:
    sample = ["--labels", str(SAMPLE.labels), "--mask", str(SAMPLE.mask), "--output", "edited.png"]
    return ["edit", str(SAMPLE.photo), *sample, "--model", str(model), "--overwrite", *args]


def test_pack_json_describes_the_file(run: Any, street_bundle: Path, tmp_path: Path) -> None:
    result = run("bundle", "pack", street_bundle, "tiny.spm", "--json")
    content = (tmp_path / "tiny.spm").read_bytes()
    assert result.code == 0 and result.json["schema"] == "spmdeploy.bundle-pack/1" and result.json["signed"] is False
    assert (result.json["bytes"], result.json["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert result.json["files"] == len(open_bundle(street_bundle).files())
    assert run("bundle", "pack", street_bundle, "tiny.spm").code == 7
    assert "not signed" in run("bundle", "pack", street_bundle, "tiny.spm", "--overwrite").out


def test_unpack_signed_file_restores_the_folder(run: Any, signed: Path, street_bundle: Path, tmp_path: Path) -> None:
    result = run("bundle", "unpack", signed, "back.spm", "--require-signature", "ours.pub", "--json")
    assert result.code == 0 and result.json["signature"]["comment"].startswith("spmdeploy bundle tiny of ")
    assert open_bundle(tmp_path / "back.spm").sums == open_bundle(street_bundle).sums
    for args in (["--require-signature", "theirs.pub"], ["--require-signature", "nonsense"]):
        assert run("bundle", "unpack", signed, "other.spm", *args).code in (6, 7)
        assert not (tmp_path / "other.spm").exists()


def test_signed_bundle_with_its_key_is_accepted_by_commands(run: Any, signed: Path, tmp_path: Path) -> None:
    result = run(*edit(signed, "--require-signature", "ours.pub", "--json"))
    assert result.code == 0 and result.json["choices"][0].startswith("signature by the key ")
    assert result.json["choices"][0] in result.err
    line = (tmp_path / "ours.pub").read_text().splitlines()[1]
    assert run("verify", signed, "--require-signature", line).code == 0
    (tmp_path / "edits.csv").write_text(f"image,mask,fill\n{SAMPLE.photo},{SAMPLE.mask},road\n")
    batch = ["batch", "edits.csv", "--output-dir", "results", "--model", signed, "--require-signature"]
    assert run(*batch, "ours.pub").code == 0
    shutil.rmtree(tmp_path / "results")
    assert run(*batch, "theirs.pub").code == 6 and not (tmp_path / "results").exists()
    assert "present; --require-signature" in run("inspect", signed).out


def test_bundle_without_required_signature_is_not_loaded(
    run: Any, signed: Path, street_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spmdeploy.backends.registry.open_backend", None)
    tampered = tmp_path / "tampered.spm"
    content = signed.read_bytes()
    digest = open_bundle(signed).digest("card.md").encode()
    tampered.write_bytes(content.replace(digest, digest[::-1]))
    for model, key, message in (
        (street_bundle, "ours.pub", "not signed"),
        (signed, "theirs.pub", "made with the key"),
        (tampered, "ours.pub", "does not fit"),
    ):
        for command in (edit(model, "--require-signature", key), ["verify", model, "--require-signature", key]):
            result = run(*command, "--json")
            assert result.code == result.json["exit_code"] == 6 and message in result.json["error"], command
    assert run("edit", *edit("x")[1:-3], "--require-signature", "ours.pub").code == 6  # the built-in one is not signed
    assert not (tmp_path / "edited.png").exists()


def test_slim_keeps_files_that_the_device_needs(run: Any, street_bundle: Path, tmp_path: Path) -> None:
    result = run("bundle", "slim", street_bundle, "device.spm", "--keep", "cpu", "--json")
    assert result.code == 0
    graphs = [
        f"graphs/{name}.{kind}.onnx" for name in ("edit", "layout", "picture", "refine") for kind in ("fp16", "fp32")
    ]
    assert result.json["dropped"] == sorted([*graphs, "graphs/float16.weights"])
    assert result.json["bytes"] < result.json["bytes_before"] and result.json["added"] == []
    result = run("bundle", "slim", street_bundle, "none.spm", "--keep", "fp16", "--engine", "sm86", "--json")
    assert result.code == 2 and "no engine is 'sm86'" in result.json["error"]
    assert run("verify", "device.spm").code == 0
    assert run(*edit("device.spm")).code == 0 and (tmp_path / "edited.png").exists()
    assert run("verify", "device.spm", "--precision", "fp16").code == 6
    result = run("bundle", "slim", street_bundle, "none.spm", "--keep", "int8", "--json")
    assert result.code == 2 and "edit_cpu.fp32" in result.json["error"] and not (tmp_path / "none.spm").exists()


def test_key_password_is_required_and_never_printed(
    run: Any, street_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spmdeploy.bundle.signature.write_key_pair.__defaults__", (1 << 24,))
    pack = ["bundle", "pack", street_bundle, "tiny.spm", "--sign", "street.key"]
    for result in (run("bundle", "keygen", "street"), run("bundle", "keygen", "street", "--json")):
        assert result.code == 2 and "--no-password" in result.out + result.err
    monkeypatch.setenv(PASSWORD, "correct horse")
    made = run("bundle", "keygen", "street", "--json")
    assert made.code == 0 and made.json["public_key"] == "street.pub"
    assert run(*pack).code == 0
    monkeypatch.setenv(PASSWORD, "battery staple")
    wrong = run(*pack, "--overwrite", "--json")
    assert wrong.code == 7 and "the password is wrong" in wrong.json["error"]
    monkeypatch.delenv(PASSWORD)
    missing = run(*pack, "--overwrite", "--json")
    assert missing.code == 2 and PASSWORD in missing.json["hint"]
    for result in (made, wrong, missing):
        assert "horse" not in result.out + result.err and "staple" not in result.out + result.err


def test_pack_and_keygen_unusable_key_file_exits_7(run: Any, street_bundle: Path, signed: Path, tmp_path: Path) -> None:
    for key in ("absent.key", "ours.pub", "tiny.spm"):
        assert run("bundle", "pack", street_bundle, "other.spm", "--sign", key).code == 7
    assert not (tmp_path / "other.spm").exists()
    result = run("bundle", "keygen", "ours", "--no-password", "--json")
    assert result.code == 7 and "never replaced" in result.json["error"]
