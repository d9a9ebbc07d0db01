"""Reads generators from disk: our own files, and checkpoints in the format of the authors.

Our own format is `NAME.safetensors` with the `GeneratorConfig` in `NAME.json` next to it and, if it is known, how the
weights were trained. It holds the plain weights of `Generator`: spectral normalization folded, RGB order.

Checkpoints of the authors are pickles. They are read with torch's restricted unpickler only, which runs no code; numpy
scalars (a loss, an epoch) may be stored next to the weights. The prefixes that torch.compile, DataParallel, DDP and
Lightning add to keys are removed, and both of torch's forms of spectral normalization are read.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from spmdeploy.errors import InputError, printable
from spmdeploy.files import atomic_write
from spmdeploy.inputs import regular_file
from spmdeploy.model.generator import STAGE_PLANS, Generator, GeneratorConfig
from spmdeploy.model.pickle_scalars import ALLOWED_GLOBALS
from spmdeploy.serialization import parse_json

CONFIG_SCHEMA = "spmdeploy.generator/1"
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
"""Parts of keys that DataParallel and DDP, torch.compile and FSDP add, in any order and number."""
STAGES = tuple(f"G{index}" for index in range(1, len(STAGE_PLANS) + 1))
"""Names of the authors' stages, coarse to fine."""
PARAMETRIZED = {
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}
"""Keys of torch.nn.utils.parametrizations.spectral_norm -> those of the older torch.nn.utils.spectral_norm."""
SAVE_HINT = "save the generator's weights alone: torch.save({'netG': generator.state_dict()}, PATH)"

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
    """How the weights were trained, as recorded when they were saved."""


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a generator in either format.

    Args:
        path: A .safetensors file of ours, or a checkpoint of any other name.

    Raises:
        InputError: Names the file and, where there is one, the key.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", "give a .safetensors file of ours or a .pth checkpoint with netG")
    if path.suffix.lower() == ".safetensors":
        return _load_own(path)
    return _load_reference(path)


def save_generator(generator: Generator, path: Path, training: dict[str, object] | None = None) -> None:
    """Writes `path` (.safetensors) and its configuration (.json) next to it.

    Args:
        generator: The network.
        path: The file for the weights.
        training: JSON values, for the record.

    Raises:
        InputError: A file cannot be written.
    """
    assert path.suffix == ".safetensors", path
    weights = {name: tensor.detach().float().contiguous() for name, tensor in generator.state_dict().items()}
    with atomic_write(path) as stream:  # safetensors' own writer reports a full disk as an error of the format
        stream.write(save(weights))
    config = {"schema": CONFIG_SCHEMA, **asdict(generator.config), "training": training}
    with atomic_write(path.with_suffix(".json")) as stream:
        stream.write((json.dumps(config, indent=1) + "\n").encode())


def _load_own(path: Path) -> Checkpoint:
    check_is_weights_file(path)
    config, training = _read_config(path.with_suffix(".json"))
    try:
        state = load_file(regular_file(path))
    except (safetensors.SafetensorError, OSError) as exc:
        raise InputError(f"{path}: not a readable safetensors file: {exc}", "copy the file again") from exc
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise InputError(
            f"{path}: no usable generator configuration: {exc}", "keep the .json next to its .safetensors file"
        ) from exc


def load_pickle(path: Path, hint: str) -> Any:
    """Reads a file of torch.save with the restricted unpickler, which admits tensors, containers and numpy scalars.

    Args:
        path: The file.
        hint: What to do when it is refused.

    Raises:
        InputError: It is unreadable, truncated, something else under this name, or holds other objects.
    """
    check_is_weights_file(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED_GLOBALS):
            warnings.simplefilter("ignore")  # about pickle protocols; real faults are exceptions
            return torch.load(regular_file(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        # PyTorch's own message advises to turn the restriction off, which would run the file's code.
        if found := re.search(r"GLOBAL ([\w.]+)", str(exc)):
            raise InputError(
                f"{path}: refused: it holds objects of {printable(found[1][:80])}, not only tensors", hint
            ) from exc
        raise InputError(f"{path}: refused: it is not a plain file of tensors", hint) from exc
    except MemoryError:
        raise
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror or type(exc).__name__}") from exc
    except Exception as exc:  # on damaged files the unpickler raises errors of any kind
        problem = f"{path}: truncated or not a checkpoint ({type(exc).__name__})"
        raise InputError(problem, "copy the file again") from exc


def check_is_weights_file(path: Path) -> None:
    """Raises InputError for a web page or a Git LFS pointer under the name of a weights file."""
    try:
        with regular_file(path).open("rb") as stream:
            start = stream.read(512)
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror or type(exc).__name__}") from exc
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself", "fetch it: git lfs pull")
    if re.match(rb"\s*<(?:!doctype html|html|head)", start, re.IGNORECASE):
        raise InputError(
            f"{path} is a web page, not a checkpoint: the download was answered with a page",
            "download the file itself; hosts of large files show a page that asks for confirmation first",
        )


def _load_reference(path: Path) -> Checkpoint:
    stored = _generator_tensors(load_pickle(path, SAVE_HINT), path)
    config = _read_off_config(stored, path)
    state = _renamed(stored, path)
    # BGR weights become RGB ones by reversing the three channels that are colors, of the input and of the output.
    for name, tensor in state.items():
        if re.fullmatch(r"stages\.\d\.encoder\.0\.(features|context_shared)\.weight", name):
            state[name] = tensor.flip(1)
        elif name.endswith("to_rgb.weight"):
            state[name] = tensor.flip(0)
    return Checkpoint(_build(config, state, path), "reference", "BGR")


def _generator_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of the generator in a checkpoint, by the authors' keys (G1.enc1.conv2d.weight ...)."""
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: holds no state dict", f"expected a dict with netG, or a state dict; {SAVE_HINT}")
    found = _StateDicts(path)
    found.collect(content, ())
    prefix = _choose_generator(list(found.generators), path)
    tensors = found.generators[prefix]
    if surplus := found.surplus(prefix):
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise InputError(f"{path}: surplus key {surplus[0]}{more}", "this is not the generator of an SPM checkpoint")
    return {key: value for key, value in tensors.items() if not _is_derived(key, tensors)}


class _StateDicts:
    """The tensors in nested dicts whose keys contain a stage of the generator, grouped by what precedes the stage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.generators: dict[str, dict[str, Tensor]] = defaultdict(dict)
        """Prefix, e.g. "netG" or "state_dict.netG_ema" -> normalized key -> tensor."""
        self._others: list[tuple[tuple[str, ...], str]] = []
        """Dict and key of the other tensors."""

    def collect(self, node: Mapping[Any, Any], parents: tuple[str, ...]) -> None:
        """Sorts the tensors in `node` and in the dicts inside it."""
        for key, value in node.items():
            parts = [part for part in str(key).split(".") if part not in WRAPPERS]
            stage = next((index for index, part in enumerate(parts) if part in STAGES), None)
            if isinstance(value, Mapping) and len(parents) < 4:
                self.collect(value, (*parents, *parts))
            elif stage is not None:
                self._add(".".join((*parents, *parts[:stage])), ".".join(parts[stage:]), value, str(key))
            elif isinstance(value, Tensor):
                self._others.append((parents, ".".join(parts)))

    def surplus(self, prefix: str) -> list[str]:
        """Keys of tensors that belong to the generator's dict but to none of its stages."""
        inside = [(".".join((*parents, key)), not parents) for parents, key in self._others]
        if not prefix:
            return [key for key, top in inside if top]
        return [key.removeprefix(f"{prefix}.") for key, _ in inside if key.startswith(f"{prefix}.")]

    def _add(self, prefix: str, name: str, value: Any, key: str) -> None:
        for theirs, ours in PARAMETRIZED.items():
            if name.endswith(f".{theirs}"):
                name = name.removesuffix(theirs) + ours
        if not isinstance(value, Tensor):
            raise InputError(f"{self._path}: {key!r} is a {type(value).__name__}, not a tensor")
        if name in self.generators[prefix]:
            raise InputError(f"{self._path}: holds {name} twice, once as {key}", SAVE_HINT)
        self.generators[prefix][name] = value


def _choose_generator(prefixes: list[str], path: Path) -> str:
    """The only generator, or the only one named netG. Raises InputError."""
    if not prefixes:
        raise InputError(f"{path}: key G1.enc1.mlp_shared_2.0.weight is missing", f"it holds no generator; {SAVE_HINT}")
    named = [prefix for prefix in prefixes if prefix.rpartition(".")[2] == "netG"]
    chosen = prefixes if len(prefixes) == 1 else named
    names = ", ".join(prefix or "(no prefix)" for prefix in sorted(prefixes))
    if len(chosen) != 1:
        raise InputError(f"{path}: holds {len(prefixes)} generators: {names}", SAVE_HINT)
    if len(prefixes) > 1:
        logging.getLogger("spmdeploy").warning("%s holds the generators %s; %s is read", path, names, chosen[0])
    return chosen[0]


def _is_derived(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a weight was computed from the `weight_orig` next to it, and adds no information."""
    return key.endswith(".weight") and f"{key}_orig" in tensors


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
    except ValueError as exc:
        raise InputError(f"{path}: {exc} (read off G1.enc1)") from exc


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
    for key in (*expected, *(key for key in state if key not in expected)):  # in order: always the same message
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
