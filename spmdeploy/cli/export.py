"""The commands `export` and `export-triton`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spmdeploy.cli.build import build_engines_with_progress
from spmdeploy.cli.console import format_db, format_table, log, print_result, require_extra
from spmdeploy.cli.options import BUILTIN_BUNDLE, Json, Overwrite, PrecisionOption, Targets, one_of, source_and_target
from spmdeploy.errors import UsageError

if TYPE_CHECKING:
    from spmdeploy.engines.plan import EngineOptions, EnginePlan
    from spmdeploy.export.pipeline import ExportOptions
    from spmdeploy.types import Precision

GRAPH_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Weights: .safetensors of this project, a .pth checkpoint with netG, or a bundle.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write, NAME.spm.")],
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="cityscapes, ade20k, street, or a JSON file; default: those of the bundle."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            metavar="fp32|fp16",
            help="Repeat for several; default: both.",
            callback=one_of(lambda: GRAPH_PRECISIONS),
        ),
    ] = None,
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Store the FP32 graph's weights as FP16: half the file.")
    ] = False,
    cpu_only: Annotated[
        bool, typer.Option("--cpu-only", help="Write only the graphs for CPUs: half the size.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", help="Terms of the weights, for manifest and card.")
    ] = None,
    engine: Annotated[bool, typer.Option("--engine", help="Build engines too, as `build` does.")] = False,
    target: Targets = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export weights as a bundle.

    Every graph is run and compared with PyTorch before the bundle is written.
    """
    with require_extra("export"):
        from spmdeploy.export.pipeline import ExportOptions, export_bundle
    from spmdeploy.labels import class_table

    options = ExportOptions(
        table=None if classes is None else class_table(classes),
        precisions=[name for name in GRAPH_PRECISIONS if name in precision] if precision else list(GRAPH_PRECISIONS),
        half_weights=half_weights,
        cpu_only=cpu_only,
        licence=licence,
        overwrite=overwrite,
    )
    engine_options, engine_plan = _engines_of_export(options, engine, target or [])
    result = export_bundle(checkpoint, output, options, lambda step: log(f"{step} ..."))
    graphs = [{**graph.record.to_json(), "seconds": round(graph.seconds, 2)} for graph in result.graphs]
    rows = [
        (
            f"{graph['graph']} {graph['precision']}",
            f"{graph['bytes'] / 1e6:.1f} MB",
            f"{graph['parity']['max_grey']:g}",
            f"{graph['parity']['mean_grey']:.3f}",
            format_db(graph["parity"]["psnr_db"]),
            f"{graph['seconds']:.1f} s",
        )
        for graph in graphs
    ]
    heading = ("graph", "size", "largest deviation", "mean deviation", "PSNR in mask", "time")
    lines = [f"{output}: {result.bundle.manifest.generator.parameters / 1e6:.1f} M parameters, {result.seconds:.1f} s"]
    lines += format_table(heading, rows)
    payload = {"output": str(output), "seconds": round(result.seconds, 2), "graphs": graphs}
    if engine_options is not None:
        payload["engines"], engine_lines = build_engines_with_progress(result.bundle, engine_options, engine_plan)
        lines += engine_lines
    print_result("export", payload, lines, as_json)


def export_triton(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help=BUILTIN_BUNDLE)],
    repository: Annotated[
        Path | None,
        typer.Argument(metavar="REPOSITORY", help="The model repository; other models in it are left alone."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the model; default: that of the bundle.")] = None,
    graph: Annotated[
        Literal["edit", "refine"],
        typer.Option("--graph", metavar="edit|refine", help="Which graph to serve."),
    ] = "edit",
    precision: PrecisionOption = "auto",
    device: Annotated[
        Literal["gpu", "cpu"], typer.Option("--device", metavar="gpu|cpu", help="Device that the server runs it on.")
    ] = "gpu",
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="KEY", help="Serve this TensorRT engine, not the graph."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", min=1, help="Largest batch. Default: 8, or that of the engine."),
    ] = None,
    instances: Annotated[int, typer.Option("--instances", min=1, help="Copies of the model on each device.")] = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model repository for the Triton Inference Server.

    The configuration enables dynamic batching and several instances; every instance computes a golden edit before it
    serves. Inputs and outputs are those of the graph: bytes in, bytes out.
    """
    with require_extra("export"):
        from spmdeploy.bundle.bundle import open_bundle
        from spmdeploy.export.triton import TritonOptions
        from spmdeploy.export.triton import export_triton as write_model

    bundle, repository = source_and_target(bundle, repository)
    options = TritonOptions(name, graph, precision, device, engine, max_batch, instances, overwrite)
    model = write_model(open_bundle(bundle), repository, options)
    lines = [f"{model.folder}: {model.source}, batches up to {model.max_batch}; the server needs {model.needs}"]
    rows = [(name, f"{size / 1e6:.1f} MB") for name, size in model.files.items()]
    print_result("export-triton", model.to_json(), lines + format_table(("", ""), rows)[1:], as_json)


def _engines_of_export(
    export: ExportOptions, wanted: bool, targets: Sequence[str]
) -> tuple[EngineOptions | None, EnginePlan | None]:
    """Options and plan of the build after an export, checked first because an export takes minutes."""
    if not wanted:
        if targets:
            raise UsageError("--target is for engines", "add --engine")
        return None, None
    if export.cpu_only:
        raise UsageError("no engine can be built from the graph for CPUs", "leave out --cpu-only or --engine")
    from spmdeploy.engines.plan import EngineOptions, plan_engines

    precision: Precision = "fp16" if "fp16" in export.precisions else "fp32"
    options = EngineOptions(precision=precision, targets=tuple(targets))
    return options, plan_engines(options)
