"""The commands, each with its options, as typer knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from spmdeploy.cli.benchmarks import bench_app
from spmdeploy.cli.bundles import bundle_app, doctor, inspect, verify
from spmdeploy.cli.edits import batch, edit
from spmdeploy.cli.exports import build, export, export_triton
from spmdeploy.cli.labels import labels_app
from spmdeploy.cli.training import dataset_app, evaluate, train
from spmdeploy.errors import UsageError
from spmdeploy.version import __version__

app = typer.Typer(
    name="spmdeploy",
    help="Semantic image editing: a photo, a label map and a mask go in, what is under the mask comes back repainted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(edit)
app.command()(batch)
app.command()(export)
app.command()(inspect)
app.command()(build)
app.command()(verify)
app.command("export-triton")(export_triton)
app.command()(doctor)
app.command()(train)
app.command()(evaluate)
app.add_typer(bundle_app, name="bundle")
app.add_typer(labels_app, name="labels")
app.add_typer(bench_app, name="bench")
app.add_typer(dataset_app, name="dataset")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def run_command(words: Sequence[str]) -> int:
    """Runs what the command line says and returns its exit code. Raises UsageError for one that makes no sense."""
    try:
        return int(app(list(words), prog_name="spmdeploy", standalone_mode=False) or 0)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f"see {context.command_path} --help" if context else None
        raise UsageError(error.format_message().replace("Value error, ", ""), hint) from error
