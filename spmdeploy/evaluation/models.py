"""Opens the models and baselines that `evaluate` compares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.backends.registry import open_backend
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.datasets.folder import ImageFolder, read_classes, read_instance_rules
from spmdeploy.errors import InputError
from spmdeploy.evaluation.baselines import ClassMeanColor, Telea, mean_colors
from spmdeploy.evaluation.evaluate import EditModel
from spmdeploy.model import CHECKPOINT_SUFFIXES
from spmdeploy.model.checkpoint import load_checkpoint


def named_models(paths: Iterable[Path], data: Path) -> dict[str, EditModel]:
    """The models in `paths` by their names, then the baselines `telea` and `class mean`.

    data: the folder whose training pictures give the mean colors. Raises InputError when two models have one name or
    a model knows another number of classes than the folder, and what `open_model` raises.
    """
    folder = ImageFolder(data, "train", read_instance_rules(data))
    classes = len(read_classes(data))
    models: dict[str, EditModel] = {}
    for path in paths:
        if path.stem in models:
            raise InputError(f"two models are called {path.stem}: {path}", "give them different file names")
        models[path.stem] = open_model(path, classes)
    pictures = ((folder[name].image, folder[name].labels) for name in folder.names)
    return models | {"telea": Telea(), "class mean": ClassMeanColor(mean_colors(pictures, classes))}


def open_model(path: Path, classes: int) -> EditModel:
    """What a path holds, ready to be judged: a checkpoint, a run directory (its exported weights) or a bundle.

    Raises InputError or BundleError naming the file, InputError when it does not know `classes` classes.
    """
    exported = path / "export" / "generator.safetensors"
    if exported.is_file():
        path = exported
    elif (path / "config.json").is_file():
        raise InputError(f"{path}: this run has not saved any weights yet", "they come with its first checkpoint")
    session: EditModel
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        generator = load_checkpoint(path).generator
        known, session = generator.config.classes, TorchSession(generator)
    else:
        bundle = open_bundle(path)
        known, session = len(bundle.manifest.classes), open_backend(bundle).session
    if known != classes:
        raise InputError(f"{path} knows {known} classes, the data folder {classes}", "evaluate it on data of its own")
    return session
