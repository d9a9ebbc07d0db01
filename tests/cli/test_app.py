"""The command-line application: help, errors, exit codes, Ctrl-C and standard streams of every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import spmdeploy
from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.cli import app as commands
from spmdeploy.editing.options import DEFAULT_DILATION
from tests.cli.harness import EditFiles, Result, process

COMMANDS = {
    "edit": ["edit"],
    "batch": ["batch"],
    "export": ["export"],
    "inspect": ["inspect"],
    "build": ["build"],
    "verify": ["verify"],
    "doctor": ["doctor"],
    "export-triton": ["export-triton"],
    "bench": ["bench"],
    "bench run": ["bench", "run"],
    "bench compare": ["bench", "compare"],
    "bundle": ["bundle"],
    "bundle pack": ["bundle", "pack"],
    "bundle unpack": ["bundle", "unpack"],
    "bundle slim": ["bundle", "slim"],
    "bundle keygen": ["bundle", "keygen"],
    "labels": ["labels"],
    "labels check": ["labels", "check"],
    "labels show": ["labels", "show"],
    "labels convert": ["labels", "convert"],
    "train": ["train"],
    "evaluate": ["evaluate"],
    "dataset": ["dataset"],
    "dataset check": ["dataset", "check"],
    "dataset prepare": ["dataset", "prepare"],
    "studio": ["studio"],
}
GROUPS = ("bundle", "labels", "dataset")
HEAVY = {
    "cryptography",
    "minisign",
    "torch",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "safetensors",
    "numpy",
    "PIL",
}


def commands_of(group: Any, prefix: str = "") -> set[str]:
    names = set()
    for name, command in group.commands.items():
        names |= {prefix + name} | (commands_of(command, f"{name} ") if hasattr(command, "commands") else set())
    return names


def test_commands_equal_the_listed_ones() -> None:
    assert commands_of(typer.main.get_command(commands.build_app())) == set(COMMANDS)


@pytest.mark.parametrize("args", [[], *COMMANDS.values()], ids=["spmdeploy", *COMMANDS])
def test_help_of_every_command_imports_no_heavy_library(args: list[str]) -> None:
    driver = (
        "import sys, spmdeploy.cli\n"
        "code = spmdeploy.cli.main(sys.argv[1:])\n"
        "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    result = process(*args, "--help", driver=driver)
    code, *modules = result.err.split()
    assert code == "0" and result.out.startswith("Usage: spmdeploy")
    assert HEAVY.isdisjoint(modules)
    assert "typer" in modules  # the list of modules is not empty


def test_edit_imports_no_other_command_and_no_pydantic() -> None:
    driver = (
        "import sys, spmdeploy.cli\n"
        "spmdeploy.cli.main(sys.argv[1:])\n"
        "print(*(name for name in sys.modules if name.startswith(('spmdeploy.cli.', 'pydantic'))), file=sys.stderr)"
    )
    imported = set(process("edit", "--help", driver=driver).err.split())
    assert imported == {f"spmdeploy.cli.{name}" for name in ("app", "console", "options", "edit")}


def test_command_missing_package_is_named_with_the_command_that_installs_it() -> None:
    driver = "import sys; sys.modules['msgspec'] = None\nfrom spmdeploy.__main__ import entry; entry()"
    result = process("inspect", driver=driver)
    assert result.code == 4
    assert result.err == 'error: this needs the package msgspec\nhint: pip install "spmdeploy[cpu]"\n'


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in (*GROUPS, "studio")])  # studio is a server
def test_help_of_every_command_lists_json(name: str, run: Any) -> None:
    assert "--json" in run(*COMMANDS[name], "--help").out


def test_help_of_edit_states_the_default_dilation(run: Any) -> None:
    assert f"Default: {DEFAULT_DILATION} with --edited-from" in " ".join(run("edit", "--help").out.split())


def test_no_command_prints_the_help(run: Any) -> None:
    result = run()
    assert (result.code, result.err) == (0, "")
    assert "Commands:" in result.out and "..." not in result.out.partition("Commands:")[2]  # no summary is cut off


def test_version_option_prints_the_version(run: Any) -> None:
    assert run("--version") == Result(0, f"{spmdeploy.__version__}\n", "")


WITHOUT_ARGUMENTS = ("inspect", "build", "verify", "doctor", "studio", "bench", "bench run", *GROUPS)
"""Commands that run without arguments."""
NEEDS_ARGUMENTS = [name for name in COMMANDS if name not in WITHOUT_ARGUMENTS]


@pytest.mark.parametrize("name", NEEDS_ARGUMENTS)
def test_command_without_arguments_exits_2_and_names_help(name: str, run: Any) -> None:
    result = run(*COMMANDS[name], "--json")
    assert result.code == result.json["exit_code"] == 2
    assert "Missing" in result.json["error"] and result.json["hint"] == f"see spmdeploy {name} --help"
    assert result.err == ""


@pytest.mark.parametrize(
    "args",
    [
        ["edit", "a.png", "-o", "b.png", "--backend", "cuda"],
        ["edit", "a.png", "-o", "b.png", "--precision", "int8"],
        ["edit", "a.png", "-o", "b.png", "--grow", "many"],
        ["edit", "a.png", "b.png", "-o", "c.png"],
        ["edit", "a.png", "-o", "b.png", "--mask", "m.png"],
        ["edit", "a.png", "-o", "b.png", "--mask", "m.png", "--labels", "l.png", "--fill", "road"],
        ["edit", "a.png", "-o", "b.png", "--mask", "m.png", "--edited-from", "l.png", "--labels", "k.png"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road", "--edited-from", "l.png"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road", "--mask", "m.png", "--grow", "-1"],
        ["edit", "a.png", "-o", "b.png", "--fill", "road", "--mask", "m.png", "--sheet", "./b.png"],
        ["batch", "m.csv", "--output-dir", "d", "--jobs", "0"],
        ["labels", "convert", "a.png", "-o", "b.png", "--void", "255"],
        ["nonsense"],
        ["--nonsense"],
        ["labels"],
        ["labels", "nonsense"],
    ],
    ids=" ".join,
)
def test_invalid_arguments_exit_2_and_write_nothing(
    args: list[str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_text = run(*args)
    assert (as_text.code, as_text.out) == (2, "")
    assert as_text.err.startswith("error: ") and "Traceback" not in as_text.err and "Value error" not in as_text.err
    as_json = run(*args, "--json")
    assert as_json.code == as_json.json["exit_code"] == 2
    assert as_json.json["error"] in as_text.err or "--json" in as_json.json["error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("raised", [KeyboardInterrupt, MemoryError, ZeroDivisionError("by 0")])
@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize("json_args", [[], ["--json"]], ids=["text", "json"])
def test_unexpected_exception_becomes_error_with_exit_code(
    raised: Any, debug: str, json_args: list[str], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("spmdeploy.backends.doctor.run_checks", fail)
    monkeypatch.setenv("SPMDEPLOY_DEBUG", debug)
    code = {KeyboardInterrupt: 130, MemoryError: 8}.get(raised, 1)
    result = run("doctor", *json_args)
    assert result.code == code
    if json_args:
        assert result.json["exit_code"] == code and result.json["schema"] == "spmdeploy.error/1"
    else:
        assert result.out == "" and "error: " in result.err
    if code != 130:
        assert ("Traceback" in result.err) == (debug == "1")


def test_ctrl_c_while_parsing_exits_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "build_app", interrupted)
    assert run("doctor") == Result(130, "", "error: interrupted\n")


@pytest.mark.parametrize("args", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("module", ["typer", "spmdeploy.cli"])
def test_ctrl_c_during_imports_exits_130(module: str, args: tuple[str, ...]) -> None:
    driver = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('spmdeploy', run_name='__main__')"
    )
    result = process("doctor", *args, driver=driver)
    assert result.code == 130 and "Traceback" not in result.err
    if args:
        assert (result.json["schema"], result.json["exit_code"], result.err) == ("spmdeploy.error/1", 130, "")
    else:
        assert (result.out, result.err) == ("", "error: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])  # stdout fails when it is flushed, or when it is printed to
@pytest.mark.parametrize("command", ["labels check", "edit"])
def test_stdout_closed_by_reader_exits_1_silently(command: str, unbuffered: str, files: EditFiles) -> None:
    args = files.args(backend="onnxruntime", device="cpu", precision="fp32", json=True)
    reading, writing = os.pipe()
    os.close(reading)
    args = args if command == "edit" else [*command.split(), str(SAMPLE_EDITS[0].labels)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-m", "spmdeploy", *args],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
    assert files.output.exists() == (command == "edit")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not text")
@pytest.mark.parametrize("args", [[], ["--json"]], ids=["text", "json"])
def test_file_name_that_is_not_unicode_is_read_and_printed(args: list[str], tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    Path(os.fsdecode(odd)).write_bytes(SAMPLE_EDITS[0].labels.read_bytes())
    shown = tmp_path / "\N{GRINNING FACE}.png"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = process("labels", "check", os.fsdecode(odd), *args, env=environment)
    assert result.code == 0 and result.err == "" and (not args or result.json["labels"])
    result = process("labels", "show", os.fsdecode(odd), "-o", shown, *args, env=environment)
    assert result.code == 0 and shown.exists() and (not args or result.json["output"] == str(shown))
