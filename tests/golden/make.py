"""Writes the small golden of this project: a checkpoint in the reference format and what the network makes of it.

    python tests/golden/make.py

The expected pictures come from `reference_outputs` below, a second, literal implementation of the published network in
float64 that shares no code with the package: it reads the reference format's own keys, in BGR, with the spectral
normalization unfolded. `tests/test_networks.py` also holds it against the recorded outputs of the original network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).parent
CLASSES, WIDTH, HIDDEN, SIZE = 5, 1, 4, 128

ENCODERS = {1: (1, 2, 4, 4, 8, 8, 16), 2: (1, 2, 4, 4, 8, 8, 16, 16), 3: (1, 2, 4, 4, 8, 8, 16, 16, 32)}
DECODERS = {
    1: {6: 8, 5: 4, 4: 2, 3: 1, 2: 1},
    2: {7: 16, 6: 8, 5: 4, 4: 2, 3: 1, 2: 1},
    3: {8: 16, 7: 8, 6: 8, 5: 4, 4: 2, 3: 1, 2: 1},
}


def reference_outputs(state: dict[str, Tensor], image: Tensor, condition: Tensor, mask: Tensor) -> list[Tensor]:
    """Raw outputs of the three stages. image: (1, 3, H, W) BGR; condition: (1, K + 1, H, W), mask 0 or 1: float64."""

    def convolve(key: str, x: Tensor, stride: int = 1) -> Tensor:
        if f"{key}.weight_orig" in state:
            weight = state[f"{key}.weight_orig"]
            sigma = state[f"{key}.weight_u"] @ weight.reshape(weight.shape[0], -1) @ state[f"{key}.weight_v"]
            weight = weight / sigma
        else:
            weight = state[f"{key}.weight"]
        return F.conv2d(x, weight, state[f"{key}.bias"], stride=stride, padding=1)

    def block(key: str, x: Tensor, stride: int = 1) -> Tensor:
        h = convolve(f"{key}.conv2d", x, stride)
        variance, mean = torch.var_mean(h, dim=(2, 3), correction=0, keepdim=True)
        h = (h - mean) / torch.sqrt(variance + 1e-5)
        a = F.relu(convolve(f"{key}.mlp_shared.0", x, stride))
        gamma, beta = convolve(f"{key}.mlp_gamma", a), convolve(f"{key}.mlp_beta", a)
        layout = F.interpolate(torch.cat((condition, mask), 1), size=h.shape[2:], mode="nearest")
        c = F.relu(convolve(f"{key}.mlp_shared_2.0", layout))
        gamma = gamma * (1 + convolve(f"{key}.mlp_gamma_ctx_gamma", c)) + convolve(f"{key}.mlp_beta_ctx_gamma", c)
        beta = beta * (1 + convolve(f"{key}.mlp_gamma_ctx_beta", c)) + convolve(f"{key}.mlp_beta_ctx_beta", c)
        return F.leaky_relu(h * (1 + gamma) + beta, 0.2)

    def stage(number: int, x: Tensor) -> Tensor:
        last = len(ENCODERS[number])
        skips = {}
        for i in range(1, last + 1):
            x = skips[i] = block(f"G{number}.enc{i}", x, 1 if i in (1, last) else 2)
        for i in DECODERS[number]:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = x if i == 2 else torch.cat((x, skips[i - 1]), 1)
            x = block(f"G{number}.dec{i}.gated_conv2d", x)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), state[f"G{number}.dec1.conv.weight"])
        return torch.tanh(x)

    def half(x: Tensor, times: int) -> Tensor:
        size = (x.shape[2] // 2**times, x.shape[3] // 2**times)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def double(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    first = stage(1, half(image * (1 - mask), 2))
    m = F.interpolate(mask, scale_factor=0.5, mode="nearest")
    second = stage(2, m * double(first) + (1 - m) * half(image, 1))
    third = stage(3, mask * double(second) + (1 - mask) * image)
    return [first, second, third]


def random_checkpoint(rng: np.random.Generator) -> dict[str, Tensor]:
    """A state dict of the reference format, large enough weights that every branch matters in the result."""
    state: dict[str, Tensor] = {}

    def add(key: str, *shape: int) -> None:
        state[key] = torch.from_numpy(rng.normal(0, 0.5 / np.sqrt(np.prod(shape[1:]) or 1) * 2, shape)).float()

    def add_block(key: str, inputs: int, outputs: int, normalized: bool) -> None:
        add(f"{key}.conv2d.weight_orig" if normalized else f"{key}.conv2d.weight", outputs, inputs, 3, 3)
        if normalized:
            for name, length in (("u", outputs), ("v", inputs * 9)):
                vector = torch.from_numpy(rng.normal(size=length)).float()
                state[f"{key}.conv2d.weight_{name}"] = vector / vector.norm()
            # A stored pair (u, v) belongs to its weight: sigma is near the largest singular value, never near zero.
            matrix = state[f"{key}.conv2d.weight_orig"].flatten(1)
            u, _, v = torch.linalg.svd(matrix, full_matrices=False)
            state[f"{key}.conv2d.weight_u"], state[f"{key}.conv2d.weight_v"] = u[:, 0].clone(), v[0].clone()
        for name, i, o in (
            ("mlp_shared.0", inputs, HIDDEN),
            ("mlp_gamma", HIDDEN, outputs),
            ("mlp_beta", HIDDEN, outputs),
            ("mlp_shared_2.0", CLASSES + 2, HIDDEN),
            ("mlp_gamma_ctx_gamma", HIDDEN, outputs),
            ("mlp_beta_ctx_gamma", HIDDEN, outputs),
            ("mlp_gamma_ctx_beta", HIDDEN, outputs),
            ("mlp_beta_ctx_beta", HIDDEN, outputs),
        ):
            add(f"{key}.{name}.weight", o, i, 3, 3)
            state[f"{key}.{name}.bias"] = torch.from_numpy(rng.normal(0, 0.1, o)).float()
        state[f"{key}.conv2d.bias"] = torch.from_numpy(rng.normal(0, 0.1, outputs)).float()

    for number, multiples in ENCODERS.items():
        inputs = 3
        for i, multiple in enumerate(multiples, start=1):
            add_block(f"G{number}.enc{i}", inputs, multiple * WIDTH, normalized=False)
            inputs = multiple * WIDTH
        for i, multiple in DECODERS[number].items():
            skip = 0 if i == 2 else multiples[i - 2] * WIDTH
            add_block(f"G{number}.dec{i}.gated_conv2d", inputs + skip, multiple * WIDTH, normalized=True)
            inputs = multiple * WIDTH
        add(f"G{number}.dec1.conv.weight", 3, inputs, 3, 3)
    return state


def random_case(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A photo-like picture, a layout of boxes and a mask that touches a border: uint8, the image in RGB."""
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = [np.sin(x / a + c) + np.cos(y / b - c) for a, b, c in ((9, 17, 0.3), (23, 7, 1.1), (13, 29, 2.3))]
    image = np.clip(127 + 50 * np.stack(waves, -1) + rng.normal(0, 6, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for label in range(1, CLASSES):
        top, left = rng.integers(0, SIZE - 40, 2)
        labels[top : top + 60, left : left + 50] = label
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[37:101, 51:] = 1
    return {"image": image, "labels": labels, "mask": mask}


def condition_of(labels: np.ndarray, mask: np.ndarray, classes: int) -> Tensor:
    """One-hot labels and edges, times the mask: float64 (1, classes + 1, H, W)."""
    edges = np.zeros(labels.shape, bool)
    differs = labels[:, 1:] != labels[:, :-1]
    edges[:, 1:] |= differs
    edges[:, :-1] |= differs
    differs = labels[1:] != labels[:-1]
    edges[1:] |= differs
    edges[:-1] |= differs
    one_hot = labels == np.arange(classes)[:, None, None]
    return torch.from_numpy(np.concatenate((one_hot, edges[None])) * mask).double()[None]


def main() -> None:
    rng = np.random.default_rng(5)
    state, case = random_checkpoint(rng), random_case(rng)
    image = torch.from_numpy(case["image"][..., ::-1].copy()).double().permute(2, 0, 1)[None] / 127.5 - 1
    mask = torch.from_numpy(case["mask"]).double()[None, None]
    condition = condition_of(case["labels"], case["mask"], CLASSES)
    outputs = reference_outputs({key: value.double() for key, value in state.items()}, image, condition, mask)
    torch.save({"epoch": 1, "netG": state}, HERE / "checkpoint.pth")
    stages = {f"stage{i}": output.float().numpy() for i, output in enumerate(outputs, start=1)}
    np.savez_compressed(HERE / "case.npz", **case, **stages)


if __name__ == "__main__":
    main()
