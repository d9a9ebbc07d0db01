"""Weights from disk: our own files, and checkpoints in the format the authors released.

Our own format is `NAME.safetensors` with the `GeneratorConfig` in `NAME.json` beside it, and there, if it is known, how
the weights were trained. It holds the plain weights of `Generator`: spectral normalization folded, RGB order.
Checkpoints of the authors' format are pickles and are read with
torch's restricted unpickler only; whatever that refuses is refused here.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmdeploy.errors import InputError
from spmdeploy.inputs import regular_file
from spmdeploy.model.generator import Generator, GeneratorConfig
from spmdeploy.model.stage import STAGE_PLANS
from spmdeploy.serialization import parse_json

CONFIG_SCHEMA = "spmdeploy.generator/1"

# Names of a layer's parts in the authors' checkpoints and here. conv2d of a decoder layer is spectrally normalized.
REFERENCE_NAMES = {
    "conv2d": "features",
    "mlp_shared.0": "context_shared",
    "mlp_gamma": "context_gamma",
    "mlp_beta": "context_beta",
    "mlp_shared_2.0": "layout_shared",
    "mlp_gamma_ctx_gamma": "layout_gamma_scale",
    "mlp_beta_ctx_gamma": "layout_gamma_shift",
    "mlp_gamma_ctx_beta": "layout_beta_scale",
    "mlp_beta_ctx_beta": "layout_beta_shift",
}


@dataclass(frozen=True)
class Checkpoint:
    """A generator read from disk, ready for use in RGB order, in float32 on the CPU."""

    generator: Generator
    format: Literal["spmdeploy", "reference"]
    color_order: Literal["RGB", "BGR"]
    """The order that the stored weights were trained in; the loaded generator is RGB in any case."""
    training: dict[str, object] | None = None
    """How the weights came about, as whoever saved them recorded it."""


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a generator of either format. Raises InputError naming the file and, where there is one, the key."""
    if not path.is_file():
        raise InputError(f"{path}: no such file", "give a .safetensors file of ours or a .pth checkpoint with netG")
    if path.suffix == ".safetensors":
        return _load_own(path)
    return _load_reference(path)


def save_generator(generator: Generator, path: Path, training: dict[str, object] | None = None) -> None:
    """Writes `path` (.safetensors) and its configuration (.json) beside it. training: JSON values, for the record."""
    assert path.suffix == ".safetensors", path
    save_file({name: tensor.detach().float().contiguous() for name, tensor in generator.state_dict().items()}, path)
    config = {"schema": CONFIG_SCHEMA, **asdict(generator.config), "training": training}
    path.with_suffix(".json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _load_own(path: Path) -> Checkpoint:
    config, training = _read_config(path.with_suffix(".json"))
    try:
        state = load_file(regular_file(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}", "copy the file again") from error
    return Checkpoint(_build(config, state, path), "spmdeploy", "RGB", training)


def _read_config(path: Path) -> tuple[GeneratorConfig, dict[str, object] | None]:
    try:
        fields = parse_json(regular_file(path).read_bytes())
        schema = fields.pop("schema")
        if schema != CONFIG_SCHEMA:
            raise ValueError(f"schema is {schema!r}, expected {CONFIG_SCHEMA!r}")
        training = fields.pop("training", None)
        if not isinstance(training, dict | None):
            raise ValueError(f"training is {training!r}, expected an object")
        return GeneratorConfig(**fields), training
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: no usable generator configuration: {error}", "keep the .json beside its .safetensors file"
        ) from error


def _load_reference(path: Path) -> Checkpoint:
    stored = _reference_tensors(_unpickle_safely(path), path)
    config = _read_off_config(stored, path)
    state = _renamed(stored, path)
    # BGR weights become RGB ones by turning round the three channels that are colors, on the way in and out.
    for name, tensor in state.items():
        if re.fullmatch(r"stages\.\d\.encoder\.0\.(features|context_shared)\.weight", name):
            state[name] = tensor.flip(1)
        elif name.endswith("to_rgb.weight"):
            state[name] = tensor.flip(0)
    return Checkpoint(_build(config, state, path), "reference", "BGR")


def _unpickle_safely(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters comes as an exception
            return torch.load(regular_file(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path}: refused, it is not a plain checkpoint of tensors: {reason}",
            "a checkpoint needs no code to load; do not load this file with anything else unless you trust its maker",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # on garbage the restricted unpickler raises whatever it trips over
        raise InputError(f"{path}: truncated or not a checkpoint: {error}", "copy the file again") from error


def _reference_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and "netG" in content:
        content = content["netG"]
    if not isinstance(content, Mapping) or not content:
        raise InputError(
            f"{path}: holds no state dict", "expected a dict with netG, or the state dict of the generator"
        )
    tensors = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
        tensors[str(key).removeprefix("module.")] = value
    return tensors


def _read_off_config(stored: Mapping[str, Tensor], path: Path) -> GeneratorConfig:
    def shape(key: str) -> torch.Size:
        if key not in stored:
            raise InputError(f"{path}: key {key} is missing", "this is not the generator of an SPM checkpoint")
        if stored[key].ndim != 4:
            raise InputError(f"{path}: {key} has shape {tuple(stored[key].shape)}, expected four dimensions")
        return stored[key].shape

    hidden, layout_channels = shape("G1.enc1.mlp_shared_2.0.weight")[:2]
    try:
        return GeneratorConfig(layout_channels - 2, shape("G1.enc1.conv2d.weight")[0], hidden)
    except ValueError as error:
        raise InputError(f"{path}: {error} (read off G1.enc1)") from error


def _renamed(stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The stored tensors under our names, spectral normalization folded. Raises InputError for wrong keys."""
    left = dict(stored)

    def take(key: str) -> Tensor:
        if key not in left:
            raise InputError(f"{path}: key {key} is missing")
        return left.pop(key)

    def take_normalized(key: str) -> Tensor:
        weight, u, v = (take(f"{key}.weight_{part}").float() for part in ("orig", "u", "v"))
        matrix = weight.flatten(1)
        if weight.ndim != 4 or u.shape != matrix.shape[:1] or v.shape != matrix.shape[1:]:
            raise InputError(
                f"{path}: {key}.weight_orig {tuple(weight.shape)}, weight_u {tuple(u.shape)} and "
                f"weight_v {tuple(v.shape)} do not belong together"
            )
        return weight / torch.dot(u, matrix @ v)

    state = {}
    for stage, plan in enumerate(STAGE_PLANS):
        layers = len(plan.encoder)
        places = [(f"enc{i}", f"encoder.{i - 1}") for i in range(1, layers + 1)]
        places += [(f"dec{i}.gated_conv2d", f"decoder.{layers - 1 - i}") for i in range(layers - 1, 1, -1)]
        for theirs, ours in places:
            for part, name in REFERENCE_NAMES.items():
                key, target = f"G{stage + 1}.{theirs}.{part}", f"stages.{stage}.{ours}.{name}"
                normalized = part == "conv2d" and theirs.startswith("dec")
                state[f"{target}.weight"] = take_normalized(key) if normalized else take(f"{key}.weight")
                state[f"{target}.bias"] = take(f"{key}.bias")
        state[f"stages.{stage}.to_rgb.weight"] = take(f"G{stage + 1}.dec1.conv.weight")
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(
            f"{path}: surplus key {next(iter(left))}{more}", "this is not the generator of an SPM checkpoint"
        )
    return state


def _build(config: GeneratorConfig, state: Mapping[str, Tensor], path: Path) -> Generator:
    """A generator with these weights, every tensor checked. Raises InputError naming the key."""
    with torch.device("meta"):
        generator = Generator(config)
    expected = generator.state_dict()
    for key in (*expected, *(key for key in state if key not in expected)):  # in order: always the same complaint
        if key not in state:
            raise InputError(f"{path}: key {key} is missing")
        if key not in expected:
            raise InputError(f"{path}: surplus key {key}")
        if state[key].shape != expected[key].shape:
            raise InputError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)} for {config}"
            )
        if not state[key].is_floating_point() or not state[key].isfinite().all():
            raise InputError(f"{path}: {key} holds values that are not finite numbers", "the training run had diverged")
    generator.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    return generator.eval().requires_grad_(False)
