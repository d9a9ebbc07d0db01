from __future__ import annotations

import torch

from spmdeploy.model.modulation import instance_norm


def test_instance_norm_training_and_inference_agree() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16) * 5 + 2
    torch.testing.assert_close(instance_norm(x.clone().requires_grad_(True)), instance_norm(x), atol=1e-5, rtol=1e-5)
