"""What learns: the generator with its training-time normalization, its first weights, and its running average."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from spmdeploy.model.generator import Generator, GeneratorConfig

_DECODER_FEATURES = re.compile(r"stages\.\d+\.decoder\.\d+\.features")


def training_generator(config: GeneratorConfig) -> Generator:
    """A generator with the paper's first weights and spectral normalization on its decoders' main convolutions."""
    generator = Generator(config)
    initialize(generator)
    for name, module in list(generator.named_modules()):
        if _DECODER_FEATURES.fullmatch(name):
            spectral_norm(module)
    return generator


@torch.no_grad()
def initialize(network: nn.Module) -> None:
    """Convolution weights from normal(0, 0.02), biases zero (the paper's)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            _assign(module, "weight", torch.empty_like(module.weight).normal_(0, 0.02))
            if module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def update_ema(averaged: Generator, generator: Generator, stages: Iterable[int], decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * generator for these stages, spectral normalization folded."""
    generator.eval()  # reading a normalized weight in training mode would take a step of the power iteration
    for index in stages:
        source = generator.stages[index]
        for name, target in averaged.stages[index].named_parameters():
            module, _, attribute = name.rpartition(".")
            target.lerp_(getattr(source.get_submodule(module), attribute).detach(), 1 - decay)
    generator.train()


@torch.no_grad()
def grow_stage(generator: Generator, averaged: Generator, stage: int) -> list[str]:
    """Copies the averaged weights of the stage before into `stage` wherever the shapes agree; returns the names copied.

    Encoder layers correspond from the outside in. So do decoder layers, which are listed from the inside out: the finer
    stage has its additional layer at the bottom of the U.
    """
    deeper = len(generator.config.plans[stage].decoder) - len(generator.config.plans[stage - 1].decoder)
    copied = []
    for name, value in averaged.stages[stage - 1].named_parameters():
        part, _, rest = name.partition(".")
        if part == "decoder":
            layer, _, rest = rest.partition(".")
            rest = f"{int(layer) + deeper}.{rest}"
        place, _, attribute = f"{part}.{rest}".rpartition(".")
        module = generator.stages[stage].get_submodule(place)
        if getattr(module, attribute).shape == value.shape:
            _assign(module, attribute, value.clone())
            copied.append(f"{place}.{attribute}")
    return copied


def inherit_discriminator(discriminator: nn.Module, coarser: nn.Module) -> None:
    """The same for discriminators, whose layers correspond by number, from the picture on."""
    own = discriminator.state_dict()
    for key, value in coarser.state_dict().items():
        if key in own and own[key].shape == value.shape:
            own[key] = value
    discriminator.load_state_dict(own)


def _assign(module: nn.Module, attribute: str, value: Tensor) -> None:
    """A normalized weight takes a tensor, every other a parameter."""
    normalized = is_parametrized(module, attribute)
    setattr(module, attribute, value if normalized else nn.Parameter(value))
