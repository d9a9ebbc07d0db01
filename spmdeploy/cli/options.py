"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

import spmdeploy
from spmdeploy.backends.registry import backend_names, backend_precisions, backends
from spmdeploy.cli.console import log, require_extra

if TYPE_CHECKING:
    from spmdeploy.editing.editor import Editor
    from spmdeploy.labels import ClassTable

Preset = Literal["paper", "small"]
TilingName = Literal["auto", "off", "crop", "cascade"]

T = TypeVar("T")


BUILTIN_BUNDLE = "A bundle, folder or file; without it the built-in one."


def source_and_target(first: Path, second: Path | None) -> tuple[Path, Path]:
    """Read the arguments `[BUNDLE] TARGET`: one path alone is the target, and the bundle the built-in one."""
    return (spmdeploy.default_model(), first) if second is None else (first, second)


def one_of(list_choices: Callable[[], Sequence[str]]) -> Callable[[list[str] | None], list[str] | None]:
    """Callback of a repeatable option: refuses values that are not among the choices."""

    def check(values: list[str] | None) -> list[str] | None:
        choices = list_choices()
        for value in values or ():
            if value not in choices:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, choices))}.")
        return values

    return check


def unique(values: Sequence[T]) -> tuple[T, ...]:
    """The values without repetitions, in their order."""
    return tuple(dict.fromkeys(values))


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout, also on failure.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


Model = Annotated[
    Path | None, typer.Option("--model", help="Bundle (.spm folder or zip); without it the built-in one.")
]


BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="|".join(("auto", *backend_names())),
        help="Inference backend. An explicit choice is never replaced. auto: a compatible engine, else ONNX Runtime; "
        + "; ".join(f"{entry.name}: {entry.help}" for entry in backends())
        + ".",
    ),
]


Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda:N", help="Where to run.")]


PrecisionOption = Annotated[
    str,
    typer.Option("--precision", metavar="|".join(("auto", *backend_precisions())), help="Arithmetic to compute in."),
]


Tiling = Annotated[
    TilingName,
    typer.Option(
        "--tiling",
        metavar="auto|off|crop|cascade",
        help="off: whole photo at once; crop: windows around the mask, shrunk; cascade: in tiles at their own size.",
    ),
]


MatchSurroundings = Annotated[
    bool,
    typer.Option(
        "--match-surroundings",
        help="Bring what was painted to the colors and grain of the same classes beside it; needs --labels.",
    ),
]


RequireSignature = Annotated[
    str | None,
    typer.Option(
        "--require-signature",
        metavar="PUB",
        help="Use the bundle only if it is signed with this minisign key: a .pub file, or the line in it.",
    ),
]


Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="smNN", help="TensorRT-RTX: build for this GPU generation without having one. Repeatable."
    ),
]


Classes = Annotated[str, typer.Option("--classes", help="cityscapes, ade20k, street, or a JSON file of your own.")]


def open_editor_from_options(
    model: Path | None,
    backend: str,
    device: str,
    precision: str,
    require_signature: str | None,
    on_loading: Callable[[ClassTable], None] = lambda classes: None,
) -> Editor:
    """Open the editor and log what was chosen for it."""
    with require_extra("export"):
        editor = spmdeploy.open_editor(model, backend, device, precision, require_signature, on_loading)
    for choice in editor.choices:
        log(choice)
    return editor
