"""Opens the models and baselines that `evaluate` compares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spmdeploy.backends.pytorch import TorchSession
from spmdeploy.backends.registry import open_backend
from spmdeploy.bundle.bundle import open_bundle
from spmdeploy.datasets.folder import ImageFolder, read_classes
from spmdeploy.errors import InputError
from spmdeploy.evaluation.baselines import ClassMeanColor, Telea, mean_colors
from spmdeploy.evaluation.evaluate import EditModel
from spmdeploy.model import is_checkpoint
from spmdeploy.model.checkpoint import load_checkpoint


def named_models(paths: Iterable[Path], data: Path) -> dict[str, EditModel]:
    """The models in `paths` by their names, then the baselines `telea` and `class mean`.

    Args:
        paths: Bundles, checkpoints and run directories.
        data: The folder whose training images give the mean colors.

    Raises:
        InputError: Two models have one name, or a model has another number of classes than the folder.
    """
    folder = ImageFolder.open(data, "train")
    classes = len(read_classes(data))
    models: dict[str, EditModel] = {}
    for path in paths:
        if path.stem in models:
            raise InputError(f"two models are called {path.stem}: {path}", "give them different file names")
        models[path.stem] = open_model(path, classes)
    annotated = ((folder[name].image, folder[name].labels) for name in folder.names)
    return models | {"telea": Telea(), "class mean": ClassMeanColor(mean_colors(annotated, classes))}


def open_model(path: Path, classes: int) -> EditModel:
    """Opens a model for evaluation: a checkpoint, a run directory (its exported weights) or a bundle.

    Args:
        path: Of the model.
        classes: Number of classes of the data folder.

    Raises:
        InputError, BundleError: The model cannot be read, or has another number of classes; names the file.
    """
    exported = path / "export" / "generator.safetensors"
    if exported.is_file():
        path = exported
    elif (path / "config.json").is_file():
        raise InputError(f"{path}: this run has not saved any weights yet", "they come with its first checkpoint")
    session: EditModel
    if path.is_file() and is_checkpoint(path):
        generator = load_checkpoint(path).generator
        known, session = generator.config.classes, TorchSession(generator)
    else:
        bundle = open_bundle(path)
        known, session = len(bundle.manifest.classes), open_backend(bundle).session
    if known != classes:
        raise InputError(f"{path} has {known} classes, the data folder {classes}", "evaluate it on data of its own")
    return session
