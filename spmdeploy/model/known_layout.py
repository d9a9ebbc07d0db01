"""A deploy graph whose layout branches have been computed: for many images under one layout."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from spmdeploy.model.deploy import EditGraph
from spmdeploy.model.modulation import StylePreservedModulation

_HEADS = ("layout_gamma_scale", "layout_gamma_shift", "layout_beta_scale", "layout_beta_shift")


def cache_layout(graph: EditGraph, labels: Tensor, instances: Tensor, mask: Tensor) -> EditGraph:
    """A copy of the graph, sharing its weights, that answers for this layout and computes no layout branch.

    labels, instances, mask: as the graph takes them; the copy must be given the same ones. Its pictures are those of
    the graph bit for bit. Takes the time of one edit, and the memory of every head's answer.
    """
    answers: dict[str, Tensor] = {}
    hooks = [
        head.register_forward_hook(partial(_remember, answers, name))
        for name, head in graph.named_modules()
        if name.rpartition(".")[2] in _HEADS
    ]
    try:
        graph(torch.zeros((*mask.shape, 3), dtype=torch.uint8, device=mask.device), labels, instances, mask)
    finally:
        for hook in hooks:
            hook.remove()
    known = copy.deepcopy(graph, {id(weight): weight for weight in graph.parameters()})
    for path, layer in list(known.named_modules()):
        if isinstance(layer, StylePreservedModulation):
            known_answers = {name: answers[f"{path}.{name}"] for name in _HEADS if f"{path}.{name}" in answers}
            known_answers["layout_shared"] = torch.empty(0)  # only the heads read it
            for name, answer in known_answers.items():
                setattr(layer, name, _Known(answer))
    return known


class _Known(nn.Module):
    """Answers what is known, whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self._answer


def _remember(answers: dict[str, Tensor], name: str, _: nn.Module, __: tuple[Tensor, ...], answer: Tensor) -> None:
    answers[name] = answer
