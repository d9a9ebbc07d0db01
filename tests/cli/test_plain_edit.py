"""`edit` read without typer: the same options as typer gives, or none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.cli import commands, edits
from spmdeploy.cli.one_edit import EditOptions
from spmdeploy.cli.plain_edit import _FLAGS, _VALUES, plain_edit
from spmdeploy.errors import UsageError


def by_typer(words: list[str]) -> EditOptions | None:
    """What typer hands to the command; None where it refuses the words."""
    seen: list[EditOptions] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edits, "run_edit", seen.append)
        try:
            commands.run_command(words)
        except UsageError:
            return None
    return seen[0] if seen else None


OPTIONS = [*_FLAGS, *_VALUES]
TEXTS = st.sampled_from(
    ["photo.png", "a b.jpg", "é/ü.png", "./x/../y", "0", "7", "007", "crop", "cpu", "fp32", "torch"]
)
ODD = st.sampled_from(
    ["", "-", "--", "-1", "-o", "--help", "--fi", "--json=1", "--mask=m.png", "a\n", "a\udce9", " 7", "٣"]
)
VALUES = {"--backend": "torch", "--precision": "fp16", "--tiling": "cascade", "--grow": "12"}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Mostly sensible: each option at most once and with its value, the photo somewhere, now and then something odd."""
    parts = [["photo.jpg"], ["-o", "out.png"]]
    for name in draw(st.lists(st.sampled_from(OPTIONS), max_size=6, unique=True)):
        value = [] if name in _FLAGS else [draw(TEXTS if draw(st.booleans()) else st.just(VALUES.get(name, "x.png")))]
        parts.append([name, *value])
    parts += [[word] for word in draw(st.lists(ODD | TEXTS, max_size=1))]
    return ["edit", *(word for part in draw(st.permutations(parts)) for word in part)]


@given(command_lines())
@example(["edit", "p.png", "-o", "o.png"])
@example(["edit", "p.png", "-o", "o.png", "--grow", "12", "--tiling", "cascade", "--overwrite", "--json"])
@example(["edit", "p.png", "-o", "o.png", "--fill", "-1"])
@example(["edit", "p.png", "q.png", "-o", "o.png"])
@example(["edit", "p.png"])
def test_what_is_taken_is_what_typer_takes(words: list[str]) -> None:
    taken = plain_edit(words)
    assert taken is None or taken == by_typer(words)


@pytest.mark.parametrize(
    "words",
    [
        ["edit", "p.png", "--labels", "l.png", "--mask", "m.png", "--output", "o.png"],
        ["edit", "--fill", "road", "--mask", "m.png", "-o", "o.png", "p.png", "--json"],
        [
            "edit",
            "p.png",
            "--labels",
            "l.png",
            "--edited-from",
            "k.png",
            "-o",
            "o.png",
            "--model",
            "m.spm",
            "--grow",
            "3",
        ],
    ],
    ids=" ".join,
)
def test_plain_edits_are_taken(words: list[str]) -> None:
    assert plain_edit(words) == by_typer(words) != None  # noqa: E711


def test_every_option_is_known() -> None:
    """One that is added to the command and forgotten here would make its users wait for typer."""
    group: Any = typer.main.get_command(commands.app)
    options = {name for parameter in group.commands["edit"].params for name in parameter.opts if name.startswith("-")}
    assert options - {"--help"} == set(OPTIONS)
    assert {field.name for field in dataclasses.fields(EditOptions)} == {
        "image",
        *_FLAGS.values(),
        *(name for name, _ in _VALUES.values()),
    }


def test_an_edit_imports_what_it_needs(tmp_path: Path) -> None:
    sample, output = SAMPLE_EDITS[0], tmp_path / "o.png"
    driver = (
        "import sys, spmdeploy.cli\n"
        "code = spmdeploy.cli.main(sys.argv[1:])\n"
        "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    words = ["edit", sample.photo, "--labels", sample.labels, "--mask", sample.mask, "-o", output, "--device", "cpu"]
    command = [sys.executable, "-c", driver, *map(str, words), "--model", str(spmdeploy.default_model())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, *modules = done.stderr.splitlines()[-1].split()
    assert code == "0" and output.exists()
    assert {"numpy", "PIL", "onnxruntime"} <= set(modules)
    spared = {"typer", "pydantic", "rich", "torch", "onnx", "asyncio", "secrets", "random"}
    assert sorted(spared & set(modules)) == []
