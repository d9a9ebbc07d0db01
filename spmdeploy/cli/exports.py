"""export, build and export-triton: weights become bundles, engines and Triton repositories."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spmdeploy.cli.bundles import _format_db, _public_key
from spmdeploy.cli.choices import PrecisionChoice
from spmdeploy.cli.options import Classes, Json, Overwrite, PrecisionOption, RequireSignature, Targets
from spmdeploy.cli.talk import format_table, log, log_notes, print_result, require_extra
from spmdeploy.errors import UsageError

if TYPE_CHECKING:
    from spmdeploy.bundle.bundle import Bundle
    from spmdeploy.engines.build import EngineOptions, EnginePlan
    from spmdeploy.export.pipeline import ExportOptions
    from spmdeploy.types import Precision


class GraphPrecision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"


class TritonDevice(StrEnum):
    gpu = "gpu"
    cpu = "cpu"


class TritonGraph(StrEnum):
    edit = "edit"
    refine = "refine"


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
    with require_extra("export"):
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
    result = export_bundle(checkpoint, output, options, lambda step: log(f"{step} ..."))
    graphs = [{**graph.record.to_json(), "seconds": round(graph.seconds, 2)} for graph in result.graphs]
    rows = [
        (
            f"{graph['graph']} {graph['precision']}",
            f"{graph['bytes'] / 1e6:.1f} MB",
            f"{graph['parity']['max_grey']:g}",
            f"{graph['parity']['mean_grey']:.3f}",
            _format_db(graph["parity"]["psnr_db"]),
            f"{graph['seconds']:.1f} s",
        )
        for graph in graphs
    ]
    heading = ("graph", "size", "largest drift", "mean drift", "PSNR in mask", "time")
    lines = [f"{output}: {result.bundle.manifest.generator.parameters / 1e6:.1f} M parameters, {result.seconds:.1f} s"]
    lines += format_table(heading, rows)
    payload = {"output": str(output), "seconds": round(result.seconds, 2), "graphs": graphs}
    if engine_options is not None:
        payload["engines"], engine_words = _build_engines(result.bundle, engine_options, engine_plan)
        lines += engine_words
    print_result("export", payload, lines, as_json)


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
    opt_batch: Annotated[int, typer.Option("--opt-batch", help="Edits at once to optimize for.")] = 1,
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
    from spmdeploy.bundle.bundle import open_bundle
    from spmdeploy.engines.store import remove_stale_engines

    opened = open_bundle(bundle, _public_key(require_signature))
    if clean:
        removed = [engine.to_json() for engine in remove_stale_engines(opened)]
        lines = [
            f"removed {engine['path']}: {'; '.join(engine['faults'] + engine['differences'])}" for engine in removed
        ]
        print_result("build", {"bundle": str(opened.path), "removed": removed}, lines or ["nothing to remove"], as_json)
        return
    from spmdeploy.engines.build import EngineOptions

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
    print_result("build", {"bundle": str(opened.path), "engines": engines}, lines, as_json)


def export_triton(
    bundle: Annotated[Path, typer.Argument(help="A bundle, folder or file.")],
    repository: Annotated[Path, typer.Argument(help="The model repository; other models in it are left alone.")],
    name: Annotated[str | None, typer.Option("--name", help="Of the model; default: the bundle's.")] = None,
    graph: Annotated[
        TritonGraph, typer.Option("--graph", metavar="edit|refine", help="Which graph, by what it computes.")
    ] = TritonGraph.edit,
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
    with require_extra("export"):
        from spmdeploy.bundle.bundle import open_bundle
        from spmdeploy.export.triton import TritonOptions
        from spmdeploy.export.triton import export_triton as write_model

    options = TritonOptions(name, graph.value, precision.value, device.value, engine, max_batch, instances, overwrite)
    model = write_model(open_bundle(bundle), repository, options)
    lines = [f"{model.folder}: {model.source}, batches up to {model.max_batch}; the server needs {model.needs}"]
    rows = [(name, f"{size / 1e6:.1f} MB") for name, size in model.files.items()]
    print_result("export-triton", model.to_json(), lines + format_table(("", ""), rows)[1:], as_json)


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
    from spmdeploy.engines.build import EngineOptions, plan_engines

    precision: Precision = "fp16" if "fp16" in export.precisions else "fp32"
    options = EngineOptions(precision=precision, targets=tuple(targets))
    return options, plan_engines(options)


def _build_engines(
    bundle: Bundle, options: EngineOptions, plan: EnginePlan | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Builds and talks meanwhile; the engines as JSON and in words."""
    from spmdeploy.engines.build import build_engines

    def tell(words: str, seconds: float) -> None:
        log(f"[{seconds // 60:.0f}:{seconds % 60:02.0f}] {words}" if seconds else words)

    results = build_engines(bundle, options, plan, tell)
    log_notes(
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
