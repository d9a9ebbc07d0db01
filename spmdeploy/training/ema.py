"""The trained generator: spectral normalization, initial weights and their exponential moving average."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from spmdeploy.backends.pytorch import bundled_generator
from spmdeploy.bundle.bundle import is_bundle, open_bundle
from spmdeploy.errors import InputError
from spmdeploy.model.checkpoint import load_checkpoint
from spmdeploy.model.generator import Generator, GeneratorConfig

_DECODER_FEATURES = re.compile(r"stages\.\d+\.decoder\.\d+\.features")


def training_generator(config: GeneratorConfig, start: Path | None = None) -> Generator:
    """A generator with spectral normalization on its decoders' main convolutions.

    Args:
        config: its shape.
        start: weights or a bundle to start from; None: the paper's random weights.

    Raises:
        InputError, BundleError: `start` is not readable, or is a generator of another shape.
    """
    generator = Generator(config)
    if start is None:
        initialize(generator)
    else:
        generator.load_state_dict(_start_state(config, start))
    for name, module in list(generator.named_modules()):
        if _DECODER_FEATURES.fullmatch(name):
            spectral_norm(module)  # after the weights: it estimates their norm here
    return generator


def _start_state(config: GeneratorConfig, path: Path) -> dict[str, Tensor]:
    stored = bundled_generator(open_bundle(path)) if is_bundle(path) else load_checkpoint(path).generator
    if stored.config != config:
        raise InputError(
            f"{path}: is a generator of {stored.config}, the run trains {config}",
            "match width, hidden, stages and the classes of the data folder, or leave start_weights out",
        )
    return stored.state_dict()


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
    """Moves an average towards the trained weights: averaged = decay * averaged + (1 - decay) * generator.

    Args:
        averaged: Is changed; without spectral normalization, which is folded into the weights.
        generator: The generator in training.
        stages: Numbers of the stages to update.
        decay: Weight of the previous average, 0..1.
    """
    generator.eval()  # reading a normalized weight in training mode would take a step of the power iteration
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for index in stages:
        source = generator.stages[index]
        for name, target in averaged.stages[index].named_parameters():
            module, _, attribute = name.rpartition(".")
            targets.append(target)
            values.append(getattr(source.get_submodule(module), attribute).detach())
    torch._foreach_lerp_(targets, values, 1 - decay)  # one kernel for many parameters
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
    """The same for discriminators, whose layers correspond by number, from the image on."""
    own = discriminator.state_dict()
    for key, value in coarser.state_dict().items():
        if key in own and own[key].shape == value.shape:
            own[key] = value
    discriminator.load_state_dict(own)


def _assign(module: nn.Module, attribute: str, value: Tensor) -> None:
    """Sets a weight: a tensor where it is parametrized, else a parameter."""
    normalized = is_parametrized(module, attribute)
    setattr(module, attribute, value if normalized else nn.Parameter(value))
