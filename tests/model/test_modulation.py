"""Style-preserved modulation and its normalization."""

from __future__ import annotations

import torch

from spmdeploy.model.modulation import StylePreservedModulation, instance_norm


def test_modulation_spade_is_spm_without_context() -> None:
    """An SPM layer whose context branch answers zero has only the layout's shifts left: the block of Park et al."""
    torch.manual_seed(0)
    full = StylePreservedModulation(3, 4, 5, 6, stride=2)
    plain = StylePreservedModulation(3, 4, 5, 6, stride=2, modulation="spade")
    x, layout = torch.randn(2, 3, 16, 16), torch.rand(2, 5, 8, 8)
    plain.load_state_dict({name: full.state_dict()[name] for name in plain.state_dict()})
    assert not torch.allclose(full(x, layout), plain(x, layout), atol=1e-3)
    for head in (full.context_gamma, full.context_beta):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)  # type: ignore[arg-type]
    assert torch.equal(full(x, layout), plain(x, layout))
    normalized = instance_norm(plain.features(x))
    shared = torch.relu(plain.layout_shared(layout))
    literal = normalized * (1 + plain.layout_gamma_shift(shared)) + plain.layout_beta_shift(shared)
    torch.testing.assert_close(plain(x, layout), torch.nn.functional.leaky_relu(literal, 0.2))


def test_instance_norm_training_and_inference_agree() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16) * 5 + 2
    torch.testing.assert_close(instance_norm(x.clone().requires_grad_(True)), instance_norm(x), atol=1e-5, rtol=1e-5)
