"""The command `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import spmdeploy
from spmdeploy.cli.console import format_table, print_result
from spmdeploy.cli.options import Json, Url


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle whose engines are checked; without it the built-in one.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show which backends this machine can run.

    For the others, show the reason and what to do.
    """
    from spmdeploy.backends import doctor as checks
    from spmdeploy.bundle.bundle import open_bundle

    opened = open_bundle(bundle or spmdeploy.default_model())
    findings, machine = checks.run_checks(opened, url), checks.machine()
    rows = [(finding.name, "usable" if finding.usable else "not usable", finding.reason) for finding in findings]
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    lines += format_table(("", "", ""), rows)[1:]
    remedies: dict[str, str] = {}  # each is printed once
    for finding in findings:
        if finding.remedy:
            remedies.setdefault(finding.remedy, finding.name)
    lines += [f"{name}: {remedy}" for remedy, name in remedies.items()]
    payload = {"machine": machine, "findings": [finding.to_json() for finding in findings]}
    print_result("doctor", payload, lines, as_json)
