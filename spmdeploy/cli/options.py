"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from spmdeploy.cli.choices import Backend, PrecisionChoice, TilingChoice


class Preset(StrEnum):
    paper = "paper"
    small = "small"


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout, also on failure.")]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


Model = Annotated[
    Path | None, typer.Option("--model", help="Bundle (.spm folder or zip); without it the built-in one.")
]


BackendOption = Annotated[
    Backend,
    typer.Option(
        "--backend",
        metavar="auto|onnxruntime|tensorrt|tensorrt-rtx|torch",
        help="Who computes; asked for by name, never replaced. auto: an engine that fits, else ONNX Runtime.",
    ),
]


Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda:N", help="Where to run.")]


PrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option("--precision", metavar="auto|fp32|fp16", help="Which of the bundle's graphs to run."),
]


Tiling = Annotated[
    TilingChoice,
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
