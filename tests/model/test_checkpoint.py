"""Checkpoints of the authors' format in the variants that training scripts write, and our own files."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spmdeploy.errors import InputError
from spmdeploy.export.inspect import inspect_path
from spmdeploy.model import is_checkpoint
from spmdeploy.model.checkpoint import load_checkpoint, save_generator
from spmdeploy.model.generator import Generator, GeneratorConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def _tiny(**switches: Any) -> Generator:
    torch.manual_seed(3)
    return Generator(GeneratorConfig(3, 1, 2, **switches)).eval().requires_grad_(False)


def _reference_state() -> dict[str, Any]:
    return dict(torch.load(GOLDEN / "checkpoint.pth", weights_only=True)["netG"])


def _load(path: Path, content: object) -> Generator:
    torch.save(content, path)
    return load_checkpoint(path).generator


def _same_weights(first: Generator, second: Generator) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def _parametrized(state: dict[str, Any]) -> dict[str, Any]:
    """As torch.nn.utils.parametrizations.spectral_norm stores it."""
    names = {"_orig": "original", "_u": "0._u", "_v": "0._v"}
    return {
        re.sub(r"\.weight(_orig|_u|_v)$", lambda found: f".parametrizations.weight.{names[found[1]]}", key): value
        for key, value in state.items()
    }


def _with_derived_weights(state: dict[str, Any]) -> dict[str, Any]:
    """With the `weight` that the older spectral_norm computes next to `weight_orig`."""
    derived = {key.removesuffix("_orig"): value * 7 for key, value in state.items() if key.endswith(".weight_orig")}
    return state | derived


@pytest.fixture(scope="module")
def golden() -> Generator:
    return load_checkpoint(GOLDEN / "checkpoint.pth").generator


def _prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "arrange",
    [
        lambda s: {"netG": _prefixed("module._orig_mod.", s)},
        lambda s: {"netG": _prefixed("_orig_mod.module._orig_mod.module.", s)},
        lambda s: {"netG": {key.replace("G1.", "G1._orig_mod.", 1): value for key, value in s.items()}},
        lambda s: {"netG": _parametrized(s)},
        lambda s: {"netG": _with_derived_weights(s)},
        lambda s: {"state_dict": _prefixed("netG.", s) | {"netD.conv.weight": torch.ones(2)}, "epoch": 3},
        lambda s: _prefixed("netG.", s) | {"netD_1.conv.weight": torch.ones(2)},
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: {"netG": s, "netG_ema": _prefixed("module.", s)},
        lambda s: {"netG": s, "epoch": np.int64(4), "best": np.float32(0.25), "fid": np.float64(18.5)},
    ],
    ids=[
        "wrapped", "wrapped-twice", "compiled-stage", "parametrized", "derived-weight", "lightning", "flat-netG",
        "model", "ema-beside", "numpy-scalars",
    ],
)  # fmt: skip
def test_load_checkpoint_variants_of_training_scripts_give_the_same_weights(
    arrange: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path, golden: Generator
) -> None:
    assert _same_weights(_load(tmp_path / "c.pth", arrange(_reference_state())), golden)


def test_load_checkpoint_ema_beside_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = _reference_state()
    with caplog.at_level(logging.WARNING, "spmdeploy"):
        _load(tmp_path / "c.pth", {"netG": state, "netG_ema": state})
    assert "holds the generators netG, netG_ema; netG is read" in caplog.text


@pytest.mark.parametrize(
    "arrange",
    [
        lambda s: {"model": s, "ema": s},
        lambda s: {"state_dict": _prefixed("generator.", s) | _prefixed("generator_ema.", s)},
    ],
)
def test_load_checkpoint_ambiguous_generators_are_listed(
    arrange: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"holds 2 generators: .*, ") as caught:
        _load(tmp_path / "c.pth", arrange(_reference_state()))
    assert "torch.save({'netG': generator.state_dict()}, PATH)" in str(caught.value.hint)


def test_load_checkpoint_key_twice_is_refused(tmp_path: Path) -> None:
    state = _reference_state()
    with pytest.raises(InputError, match=r"holds G1\.enc1\.conv2d\.weight twice, once as module\.G1"):
        _load(tmp_path / "c.pth", state | {"module.G1.enc1.conv2d.weight": state["G1.enc1.conv2d.weight"]})


@pytest.mark.parametrize(
    "content",
    [{"netG": {}, "opt": argparse.Namespace(name="\x1b[31mred")}, {"netG": {}, "array": np.ones(3)}, _tiny()],
    ids=["namespace", "array", "module"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_load_checkpoint_refusal_is_without_advice_and_escapes(tmp_path: Path, content: object, legacy: bool) -> None:
    path = tmp_path / "c.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="refused: it holds objects of ") as caught:
        load_checkpoint(path)
    message = f"{caught.value.problem} {caught.value.hint}"
    assert "weights_only" not in message and "safe_globals" not in message and "\x1b" not in message
    assert "torch.save({'netG': generator.state_dict()}, PATH)" in message


@pytest.mark.parametrize(
    ("content", "problem", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>Google Drive</title>", "a web page", "download the file itself"),
    ],
)
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_load_checkpoint_of_a_failed_download_says_so(
    content: bytes, problem: str, hint: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"is {problem}") as caught:
        load_checkpoint(tmp_path / name)
    assert hint in str(caught.value.hint)


def test_inspect_path_checkpoint_of_another_suffix_is_read(tmp_path: Path) -> None:
    path = tmp_path / "epoch_3.pth.tar"
    path.write_bytes((GOLDEN / "checkpoint.pth").read_bytes())
    assert inspect_path(path)["kind"] == "checkpoint"


def test_is_checkpoint_goes_by_content(tmp_path: Path) -> None:
    save_generator(_tiny(), tmp_path / "g.safetensors")
    (tmp_path / "g.safetensors").rename(tmp_path / "weights.bin")
    for name, legacy in (("c.pth.tar", False), ("old.pth.tar", True)):
        torch.save({"netG": {}}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with zipfile.ZipFile(tmp_path / "bundle.spm", "w") as file:
        file.writestr("manifest.json", "{}")
    (tmp_path / "empty.pth").touch()
    found = {path.name for path in tmp_path.iterdir() if is_checkpoint(path)}
    assert found == {"weights.bin", "c.pth.tar", "old.pth.tar", "empty.pth"}
    assert not is_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize("switches", [{}, {"modulation": "spade"}, {"stages": 1}, {"modulation": "spade", "stages": 1}])
def test_save_generator_round_trip_keeps_weights_and_configuration(tmp_path: Path, switches: dict[str, Any]) -> None:
    generator = _tiny(**switches)
    save_generator(generator, tmp_path / "g.safetensors", training={"images": 7})
    loaded = load_checkpoint(tmp_path / "g.safetensors")
    assert loaded.training == {"images": 7}
    assert (loaded.format, loaded.color_order, loaded.generator.config) == ("spmdeploy", "RGB", generator.config)
    for key, tensor in generator.state_dict().items():
        assert torch.equal(tensor, loaded.generator.state_dict()[key])


def test_load_checkpoint_configuration_without_ablation_fields_is_read(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_generator(_tiny(), path)
    fields = json.loads(path.with_suffix(".json").read_text())
    assert (fields.pop("modulation"), fields.pop("stages")) == ("spm", 3)
    path.with_suffix(".json").write_text(json.dumps(fields))
    assert load_checkpoint(path).generator.config == GeneratorConfig(3, 1, 2)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"netG": s, "epoch": 3, "netD_1": {}}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_checkpoint_reference_format_is_read(tmp_path: Path, wrap: Callable[[Any], Any], prefix: str) -> None:
    state = _reference_state()
    torch.save(wrap({prefix + key: value for key, value in state.items()}), tmp_path / "c.pth")
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert (loaded.format, loaded.color_order) == ("reference", "BGR")
    assert loaded.generator.config == GeneratorConfig(5, 1, 4)


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(key)


def _put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__setitem__(key, value)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_drop("G2.enc3.mlp_gamma.weight"), "key G2.enc3.mlp_gamma.weight is missing"),
        (_drop("G1.enc1.conv2d.weight"), "key G1.enc1.conv2d.weight is missing"),
        (_drop("G3.dec4.gated_conv2d.conv2d.weight_u"), "key G3.dec4.gated_conv2d.conv2d.weight_u is missing"),
        (_put("G4.enc1.conv2d.bias", torch.zeros(1)), "surplus key G4.enc1.conv2d.bias"),
        (_put("G2.enc3.mlp_beta.weight", torch.zeros(4, 5, 3, 3)), r"encoder\.2\.context_beta\.weight has shape"),
        (_put("G3.dec4.gated_conv2d.conv2d.weight_v", torch.zeros(7)), "do not belong together"),
        (_put("G1.enc1.mlp_shared_2.0.weight", torch.zeros(4)), "expected four dimensions"),
        (_put("G1.enc2.conv2d.bias", torch.full((2,), float("nan"))), "not finite"),
        (_put("G1.enc2.conv2d.bias", "no tensor"), "is a str, not a tensor"),
    ],
)
def test_load_checkpoint_faulty_state_names_the_key(
    tmp_path: Path, harm: Callable[[dict[str, Any]], None], message: str
) -> None:
    state = _reference_state()
    harm(state)
    torch.save({"netG": state}, tmp_path / "c.pth")
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(tmp_path / "c.pth")
    assert "c.pth" in caught.value.problem


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_load_checkpoint_hostile_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if legacy:
        Path("c.pth").write_bytes(pickle.dumps({"netG": _Hostile()}))
    else:
        torch.save({"netG": _Hostile()}, "c.pth")
    with pytest.raises(InputError, match=r"refused|not a checkpoint"):
        load_checkpoint(Path("c.pth"))
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello world", b"\x80\x02."])
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_load_checkpoint_garbage_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"c\."):
        load_checkpoint(path)


def test_load_checkpoint_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "checkpoint.pth").read_bytes()
    for length in (len(whole) // 2, len(whole) - 10):
        (tmp_path / "c.pth").write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated"):
            load_checkpoint(tmp_path / "c.pth")


def test_load_checkpoint_missing_or_wrong_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_generator(_tiny(), path)
    config = json.loads(path.with_suffix(".json").read_text())
    for wrong, message in (
        (config | {"schema": "spmdeploy.generator/2"}, "schema"),
        (config | {"width": 2}, "has shape"),
        (config | {"modulation": "adain"}, "modulation must be spm or spade"),
        (config | {"modulation": "spade"}, "surplus key"),
        (config | {"stages": 2}, "stages must be 3 or 1"),
        (config | {"stages": 1}, "is missing"),
        (config | {"width": "1"}, "width must be a positive integer"),
        (config | {"training": 3}, "training is 3"),
        ([], "no usable generator configuration"),
    ):
        path.with_suffix(".json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=message):
            load_checkpoint(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"g\.json"):
        load_checkpoint(path)


def test_load_checkpoint_zip_without_tensors_is_refused(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no checkpoint")
    (tmp_path / "c.pth").write_bytes(archive.getvalue())
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "c.pth")
