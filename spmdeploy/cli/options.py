"""Options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer

import spmdeploy
from spmdeploy.backends.registry import backend_entry, backend_names, backend_precisions, backends
from spmdeploy.cli.console import log, require_extra
from spmdeploy.editing.options import OptionField, option_fields
from spmdeploy.errors import UsageError
from spmdeploy.remote import RemotePath

if TYPE_CHECKING:
    from spmdeploy.editing.editor import Editor
    from spmdeploy.labels import ClassTable

Preset = Literal["paper", "small"]

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


def with_fields_of(*records: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: adds an option for every field of the records; it gets their values as `**values`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        parameters = [_parameter(one) for record in records for one in option_fields(record)]
        arguments = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters += [
            one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name]) for one in arguments
        ]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def record_from(record: Callable[..., T], values: dict[str, Any], **more: Any) -> T:
    """A record from the values of its options on the command line. more: fields without an option."""
    parsed = {}
    for one in option_fields(record):  # type: ignore[arg-type]
        if one.field.name in values:
            value, parse = values[one.field.name], one.option.parse
            parsed[one.field.name] = value if value is None or parse is None else parse(value)
    return record(**parsed, **more)


def _parameter(one: OptionField) -> inspect.Parameter:
    option, name, default = one.option, one.field.name, one.field.default
    annotation: Any = _local(one.type) if option.parse is None else str | None
    if option.is_argument:
        info = typer.Argument(help=option.help, metavar=option.metavar)
    else:
        flag = "--" + name.replace("_", "-")
        if set(get_args(one.type)) == {bool, type(None)}:
            flag = f"{flag}/--no-{flag[2:]}"
        info = typer.Option(*(option.flags or (flag,)), help=option.help, metavar=option.metavar)
    if default is MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def _local(annotation: Any) -> Any:
    """The type without `RemotePath`: single edits read and write files."""
    kinds = [kind for kind in get_args(annotation) if kind is not RemotePath]
    return reduce(or_, kinds) if Path in kinds else annotation


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout, also on failure.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]


Model = Annotated[
    Path | None, typer.Option("--model", help="Bundle (.spm folder or zip); without it the built-in one.")
]


BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="|".join(("auto", *backend_names())),
        help="Inference backend. An explicit choice is never replaced. auto: a compatible engine; on CPUs with bf16, "
        "OpenVINO if its golden edits pass; else ONNX Runtime; "
        + "; ".join(f"{entry.name}: {entry.help}" for entry in backends())
        + ".",
    ),
]


Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda:N", help="Device to run on.")]


Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="HOST:PORT[,...][/MODEL]",
        help="With --backend triton: gRPC address of the server, or of several that share the work; MODEL if it is not "
        "named like the bundle.",
    ),
]


PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision", metavar="|".join(("auto", *backend_precisions())), help="Precision of the computation."
    ),
]


Verbose = Annotated[bool, typer.Option("--verbose", help="Print why this backend, device and precision were chosen.")]


RequireSignature = Annotated[
    str | None,
    typer.Option(
        "--require-signature",
        metavar="PUB",
        help="Use the bundle only if it is signed with this minisign key: a .pub file or its base64 line.",
    ),
]


Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="smNN", help="TensorRT-RTX: build for this GPU generation, without such a GPU. Repeatable."
    ),
]


Classes = Annotated[str, typer.Option("--classes", help="cityscapes, ade20k, street, or a JSON file of your own.")]


def device_from(backend: str, device: str, url: str | None) -> str:
    """Return the device: for a backend on a server its URL. Raises UsageError if the options contradict each other."""
    if url is None:
        return device
    if backend == "auto" or not backend_entry(backend).on_server:
        raise UsageError("--url is for --backend triton", "add it, or leave --url out")
    if device != "auto":
        raise UsageError(f"--device {device} and --url contradict each other", "leave --device out")
    return url


def open_editor_from_options(
    model: Path | None,
    backend: str,
    device: str,
    precision: str,
    require_signature: str | None,
    on_loading: Callable[[ClassTable], None] = lambda classes: None,
    verbose: bool = False,
) -> Editor:
    """Open the editor and log what was chosen for it, in one line.

    Args:
        model: Path of a bundle; None: the built-in model.
        backend: A name of the registry, or auto.
        device: auto, cpu or cuda:N.
        precision: auto or one that the backend offers.
        require_signature: Key by which the bundle must be signed; None: not checked.
        on_loading: Called with the model's classes before the graph is loaded.
        verbose: Log the reasons for each choice.
    """
    with require_extra("export"):
        editor = spmdeploy.open_editor(model, backend, device, precision, require_signature, on_loading)
    if verbose:
        for choice in editor.choices:
            log(choice)
    elif editor.choices:
        session = editor.session
        log(f"{session.backend}, {'CPU' if session.device == 'cpu' else session.device}, {session.precision}")
        for notice in editor.notices:
            log(notice)
    return editor
