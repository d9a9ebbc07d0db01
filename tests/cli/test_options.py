"""Options of the command line made from the fields of records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from spmdeploy import cli
from spmdeploy.cli.options import record_from, with_fields_of
from spmdeploy.editing.options import EditOptions, EditRequest, Option, option_fields, parse_padding
from spmdeploy.types import Padding


def test_edit_help_has_an_option_for_every_field(capsys: Any) -> None:
    assert cli.main(["edit", "--help"]) == 0
    printed = capsys.readouterr().out
    for record in (EditRequest, EditOptions):
        for one in option_fields(record):
            names = one.option.flags or (f"--{one.field.name.replace('_', '-')}",)
            assert one.option.is_argument or all(name in printed for name in names), one.field.name


def test_with_fields_of_adds_an_option_for_a_new_field() -> None:
    @dataclass(frozen=True)
    class Record:
        strength: Annotated[int, Option("How much.")] = 2
        smooth: Annotated[bool | None, Option("Whether.")] = None
        sides: Annotated[Padding | None, Option("Where.", parse=parse_padding)] = None

    seen: list[Any] = []
    app = typer.Typer()

    @app.command()
    @with_fields_of(Record)
    def command(extra: str = "x", **values: Any) -> None:
        seen.append((extra, record_from(Record, values)))

    for arguments in ([], ["--strength", "5", "--no-smooth", "--sides", "1,2,3,4", "--extra", "y"]):
        app(arguments, standalone_mode=False)
    assert seen == [("x", Record()), ("y", Record(5, False, Padding(1, 2, 3, 4)))]
