"""How much work an edit is."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from spmdeploy.networks.deploy_graph import NATIVE_SIZE, EditGraph
from spmdeploy.networks.generator import Generator, GeneratorConfig


def edit_gflop(config: GeneratorConfig) -> float:
    """Operations of one edit at the native size, 2 per multiply-add, in units of 1e9. Counted without computing."""
    size = NATIVE_SIZE
    with torch.device("meta"):
        graph = EditGraph(Generator(config))
        maps = torch.zeros(1, size, size, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            graph(torch.zeros(1, size, size, 3, dtype=torch.uint8), maps, maps.to(torch.int32), maps)
    return float(counter.get_total_flops()) / 1e9
