"""What `evaluate` compares: the models it is given, and the baselines that any of them must beat."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import spmdeploy
from spmdeploy.errors import InputError
from spmdeploy.labels import class_table
from spmdeploy.networks.session import TorchSession
from spmdeploy.networks.weights import load_checkpoint
from spmdeploy.training.baselines import ClassMeanColour, Telea, mean_colours
from spmdeploy.training.dataset import PictureFolder, read_instance_rules
from spmdeploy.training.evaluation import Edits

CHECKPOINTS = (".safetensors", ".pth", ".pt")


def named_models(paths: Iterable[Path], data: Path) -> dict[str, Edits]:
    """Bundles and checkpoints by their names, then the baselines `telea` and `class mean`.

    data: the folder whose training pictures give the mean colours. Raises InputError when two models have one name or
    a model knows another number of classes than the folder.
    """
    folder = PictureFolder(data, "train", read_instance_rules(data))
    classes = len(class_table(data / "labels.json"))
    models: dict[str, Edits] = {}
    for path in paths:
        name = path.stem
        if name in models:
            raise InputError(f"two models are called {name}: {path}", "give them different file names")
        models[name] = _open(path, classes)
    pictures = ((folder[name].image, folder[name].labels) for name in folder.names)
    return models | {"telea": Telea(), "class mean": ClassMeanColour(mean_colours(pictures, classes))}


def _open(path: Path, classes: int) -> Edits:
    if path.suffix in CHECKPOINTS:
        generator = load_checkpoint(path).generator
        known: int = generator.config.classes
        session: Edits = TorchSession(generator)
    else:
        editor = spmdeploy.open_editor(path)
        known, session = len(editor.classes), editor.session
    if known != classes:
        raise InputError(f"{path} knows {known} classes, the data folder {classes}", "evaluate it on data of its own")
    return session
