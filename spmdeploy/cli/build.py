"""The command `build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import spmdeploy
from spmdeploy.cli.bundle import public_key_from
from spmdeploy.cli.console import log, log_notes, print_result
from spmdeploy.cli.options import BUILTIN_BUNDLE, Json, Overwrite, RequireSignature, Targets

if TYPE_CHECKING:
    from spmdeploy.bundle.bundle import Bundle
    from spmdeploy.engines.plan import EngineOptions, EnginePlan


def build(
    bundle: Annotated[Path | None, typer.Argument(help=f"The bundle to build engines for. {BUILTIN_BUNDLE}")] = None,
    runtime: Annotated[
        Literal["auto", "tensorrt", "tensorrt-rtx"],
        typer.Option(
            "--runtime", metavar="auto|tensorrt|tensorrt-rtx", help="The library that builds and runs the engines."
        ),
    ] = "auto",
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option("--precision", metavar="fp32|fp16", help="Precision of the graphs.")
    ] = "fp16",
    graph: Annotated[
        Literal["edit", "refine", "all", "cached-layout"],
        typer.Option(
            "--graph",
            metavar="edit|refine|all|cached-layout",
            help="Which graphs to build. all: edit and refine. cached-layout: the two parts of edit, for many images "
            "under one layout.",
        ),
    ] = "all",
    max_batch: Annotated[int, typer.Option("--max-batch", help="Largest batch size.")] = 8,
    opt_batch: Annotated[
        int | None,
        typer.Option(
            "--opt-batch",
            help="Optimize for this batch size alone. Default: one optimization profile each for 1, 4 and 8.",
        ),
    ] = None,
    opt_level: Annotated[
        int | None,
        typer.Option("--opt-level", help="0 builds fastest, 5 runs fastest. Default: the library's."),
    ] = None,
    target: Targets = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            help="TensorRT: folder of measurements that shorten later builds. Default: in the cache folder.",
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option("--workspace", min=1, help="Scratch memory of one layer, in MiB. Default: all.")
    ] = None,
    into: Annotated[
        Literal["bundle", "cache"] | None,
        typer.Option(
            "--into",
            metavar="bundle|cache",
            help="Default: the bundle if it can be written to; for the built-in one the cache.",
        ),
    ] = None,
    require_signature: RequireSignature = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="Build nothing; remove stale engines and print the reasons.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build engines from a bundle's graphs.

    Run it on the machine that will use the engines, or ahead of time with TensorRT-RTX and --target. Existing engines
    are kept. The precision is read back from the engine: FP16 that was built as FP32 is an error.
    """
    from spmdeploy.bundle.bundle import open_bundle
    from spmdeploy.engines.writer import remove_stale_engines

    opened = open_bundle(bundle or spmdeploy.default_model(), public_key_from(require_signature))
    if clean:
        removed = [engine.to_json() for engine in remove_stale_engines(opened)]
        lines = [
            f"removed {engine['path']}: {'; '.join(engine['faults'] + engine['differences'])}" for engine in removed
        ]
        print_result("build", {"bundle": str(opened.path), "removed": removed}, lines or ["nothing to remove"], as_json)
        return
    from spmdeploy.engines.plan import EngineOptions

    options = EngineOptions(
        runtime=runtime,
        precision=precision,
        graph=graph,
        max_batch=max_batch,
        opt_batch=opt_batch,
        opt_level=opt_level,
        targets=tuple(target or ()),
        timing_cache=timing_cache,
        workspace_mb=workspace,
        place=into or ("cache" if bundle is None else None),
        overwrite=overwrite,
    )
    engines, lines = build_engines_with_progress(opened, options)
    print_result("build", {"bundle": str(opened.path), "engines": engines}, lines, as_json)


def build_engines_with_progress(
    bundle: Bundle, options: EngineOptions, plan: EnginePlan | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Build engines and log the progress. Returns the engines as JSON values and as lines of text."""
    from spmdeploy.engines.build import build_engines

    def report(status: str, seconds: float) -> None:
        log(f"[{seconds // 60:.0f}:{seconds % 60:02.0f}] {status}" if seconds else status)

    results = build_engines(bundle, options, plan, report)
    log_notes(
        [f"{result.path.with_name('build.log')}: {result.warnings} warnings" for result in results if result.warnings]
    )
    engines = [{"path": str(result.path), "built": result.built, **result.record.to_json()} for result in results]
    lines = []
    for result in results:
        record = result.record
        how = f"built in {record.build_seconds:.1f} s" if result.built else "existed already"
        lines.append(
            f"{result.path}: {record.engine.bytes / 1e6:.1f} MB for {record.target}, batches {record.batch}, "
            f"{record.computes_in}, {how}"
        )
        if record.computes_in.unread:
            lines.append(f"  not read back from the engine itself: {record.computes_in.unread}")
    return engines, lines
