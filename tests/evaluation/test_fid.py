"""The network is FID's: parameter names, shapes and outputs of pytorch-fid 0.3.0 (on torchvision 0.28's blocks) say so.

They were recorded in inception.json with weights that a formula gives, since the published file is 95 MB.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spmdeploy.errors import InputError
from spmdeploy.evaluation import fid as inception
from spmdeploy.evaluation.fid import FidInception

RECORDED = json.loads(Path(__file__).with_name("inception.json").read_text())


def _values(name: str, count: int) -> Tensor:
    """Numbers in -1..1 that are the same on every machine and in every version of torch: float64 (count,)."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return torch.frac(torch.arange(count, dtype=torch.float64) * 0.6180339887498949 + start) * 2 - 1


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    found = {}
    for layer, shape in RECORDED["convolutions"].items():
        name = f"{layer}.conv.weight"
        found[name] = (_values(name, prod(shape)) * (6 / prod(shape[1:])) ** 0.5).float().view(shape)
        for part, base, spread in (
            ("weight", 1, 0.2),
            ("bias", 0, 0.1),
            ("running_mean", 0, 0.1),
            ("running_var", 1, 0.5),
        ):
            name = f"{layer}.bn.{part}"
            found[name] = (base + spread * _values(name, shape[0])).float()
    return found


def _images() -> Tensor:
    ramp = torch.linspace(-1, 1, 3 * 140 * 180, dtype=torch.float64)
    return torch.stack((_values("picture", len(ramp)), torch.frac(ramp * 7))).float().view(2, 3, 140, 180)


def test_pooled_features_are_those_of_pytorch_fid(state: dict[str, Tensor]) -> None:
    features = FidInception(state).pooled(_images())
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features[:, ::128], torch.tensor(RECORDED["features"]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "old", "new"), [("Mixed_7c", "maximum", "average"), ("Mixed_7b", "average", "maximum")]
)
def test_pooled_with_swapped_pooling_differs(
    state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, block: str, old: str, new: str
) -> None:
    swapped = tuple(tuple(new if step == old else step for step in branch) for branch in inception.BLOCKS[block])
    monkeypatch.setitem(inception.BLOCKS, block, swapped)
    features = FidInception(state).pooled(_images())
    assert not torch.allclose(features[:, ::128], torch.tensor(RECORDED["features"]), rtol=1e-2, atol=1e-4)


def test_blocks_use_every_convolution(state: dict[str, Tensor]) -> None:
    steps = [
        f"{name}." + step
        for name, branches in inception.BLOCKS.items()
        for branch in branches
        for step in _flat(branch)
    ]
    used = {step.partition("/")[0] for step in (*_flat(inception.STEM), *steps)}
    poolings = {name for name in used if name.rpartition(".")[2] in ("average", "maximum", "pool")}
    assert used - poolings == set(RECORDED["convolutions"])


def _flat(branch: inception.Branch) -> list[str]:
    return [name for step in branch for name in ((step,) if isinstance(step, str) else step)]


def test_from_file_other_than_published_is_refused(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "inception.pth"
    torch.save(state, path)
    with pytest.raises(InputError, match=r"inception\.pth: its SHA-256 is \w{16}…, that of FID's Inception 6726825d"):
        FidInception.from_file(path)
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(FidInception.from_file(path)._convolutions) == 94
    with pytest.raises(InputError, match="nothing: cannot be read"):
        FidInception.from_file(tmp_path / "nothing")
