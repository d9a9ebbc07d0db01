"""The commands of `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from typer.core import TyperGroup

from spmdeploy.backends.registry import bench_names
from spmdeploy.cli.console import format_table, log, print_result, status_line
from spmdeploy.cli.options import Device, Json, Overwrite, Preset, Url, one_of, unique
from spmdeploy.errors import UsageError

if TYPE_CHECKING:
    from spmdeploy.bench.results import Record


class _BenchGroup(TyperGroup):
    """Runs `bench run` unless another subcommand is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


bench_app = typer.Typer(
    cls=_BenchGroup, help="Measure what an edit costs here, or compare two records.", rich_markup_mode=None
)


Scope = Literal["engine", "cached-layout", "edit", "cold-start"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PRECISIONS = ("auto", "fp32", "tf32", "fp16", "bf16")
MASK_SIZES: tuple[str, ...] = ("small", "medium", "large")


@bench_app.command("run")
def bench_run(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; without it the built-in one.")] = None,
    preset: Annotated[
        Preset | None, typer.Option("--preset", help="Random weights of this size instead of a bundle.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="|".join(bench_names()),
            help="Repeat for several; default: all that make sense here.",
            callback=one_of(bench_names),
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            metavar="auto|fp32|tf32|fp16|bf16",
            help="Repeat for several; default: those that make sense for each backend.",
            callback=one_of(lambda: PRECISIONS),
        ),
    ] = None,
    device: Device = "auto",
    url: Url = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            metavar="engine|cached-layout|edit|cold-start|all",
            help="The network; the network under a cached layout; files to file; a whole process. Repeat for "
            "several; default: engine.",
            callback=one_of(lambda: (*SCOPES, "frame", "all")),
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Edits in one call of the network; repeat for several.")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option("--streams", min=1, help="Concurrent calls; repeat for several.")
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option("--size", min=64, max=8192, help="Side of the photo that is edited; repeat for several."),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            "--mask",
            metavar="small|medium|large",
            help="Part that is edited; repeat for several; default: all.",
            callback=one_of(lambda: MASK_SIZES),
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option("--duration", help="Seconds for each row; default: 10 and at least 200 iterations."),
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", metavar="|".join(bench_names()), help="What ratios refer to.")
    ] = "torch",
    profile: Annotated[bool, typer.Option("--profile", help="Also report time by part of the network.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The record, .json, with every sample.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="A chart, .png.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="A report, .md.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure what an edit costs here.

    Backends are warmed up and measured in turns. Each is first compared with PyTorch; one whose results differ gets no
    time. Figures and record: docs/benchmarks.md. `spmdeploy bench compare` compares two records.
    """
    from spmdeploy.bench import run

    if bundle is not None and preset is not None:
        raise UsageError("give a bundle or --preset, not both", "leave one of them out")
    if duration is not None and not 0 < duration < float("inf"):
        raise UsageError(f"--duration {duration:g} is not a duration", "give seconds, more than 0")
    run.check_outputs(output, plot, markdown, overwrite)
    named = ["cached-layout" if name == "frame" else name for name in scope or ["engine"]]
    scopes = SCOPES if "all" in named else [name for name in SCOPES if name in named]
    options = run.Options(
        bundle=bundle,
        preset=preset,
        backends=unique(backend or ()),
        precisions=unique(precision or ()),
        device=device,
        url=url,
        scopes=unique(scopes),
        batches=unique(batch_size or [1]),
        streams=unique(streams or [1]),
        sizes=unique(size or [512]),
        masks=unique(mask or MASK_SIZES),
        seconds=duration,
        baseline=baseline,
        profile=profile,
    )
    with status_line() as show:
        record = run.run_bench(options, show)
    run.write_outputs(record, output, plot, markdown)
    for warning in record.warnings:
        log(f"warning: {warning}")
    print_result("bench", record.to_json(), _record_lines(record), as_json, run.exit_error(record))


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
    from spmdeploy.bench.compare import compare
    from spmdeploy.bench.format import format_duration, format_ratio
    from spmdeploy.bench.results import read_record

    names = (str(before), str(after))
    comparison = compare(read_record(before), read_record(after), names, force)
    rows = [
        (
            it.case,
            it.backend,
            format_duration(it.before),
            format_duration(it.after),
            format_ratio(it.speedup),
            it.verdict,
        )
        for it in comparison.changes
    ]
    lines = (
        format_table(("", "backend", "before", "after", "times as fast", ""), rows) if rows else ["nothing in common"]
    )
    lines += [f"differs: {text}" for text in comparison.circumstances]
    lines += [f"no comparison: {text}" for text in comparison.unmatched]
    for warning in comparison.warnings:
        log(f"warning: {warning}")
    print_result("bench-compare", comparison.to_json(), lines, as_json)


def _record_lines(record: Record) -> list[str]:
    from spmdeploy.bench import tables
    from spmdeploy.bench.format import backend_name, groups

    lines = tables.heading(record)
    for title, rows in groups(record.rows):
        lines += ["", title]
        if any(row.status == "measured" for row in rows):
            lines += format_table(*tables.group_table(rows))
        lines += tables.phase_lines(rows) + tables.failure_lines(rows)
        for row in rows:
            if row.parts:
                lines += ["", f"{backend_name(row)}, by part:", *format_table(*tables.parts_table(row))]
    return lines
