"""Commands with closed or full standard streams, or a deleted current directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spmdeploy.assets.samples import SAMPLE_EDITS
from spmdeploy.imaging import files as images

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the redirections are those of a POSIX shell")

LABELS_CHECK = f"labels check '{SAMPLE_EDITS[0].labels}'"


def edit(output: Path) -> str:
    sample = SAMPLE_EDITS[0]
    return f"edit '{sample.photo}' --labels '{sample.labels}' --mask '{sample.mask}' --output '{output}'"


def shell(command: str, redirection: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `spmdeploy COMMAND` with its streams redirected; what is left of stdout and stderr is captured."""
    line = f"'{sys.executable}' -m spmdeploy {command} {redirection}"
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_edit_with_closed_streams_writes_a_sound_output(redirection: str, tmp_path: Path) -> None:
    output = tmp_path / "edited.png"
    done = shell(edit(output), redirection)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "defect" not in done.stderr
    assert images.read_photo(output).pixels.shape == (360, 480, 3)


def test_json_with_closed_stderr_is_one_object(tmp_path: Path) -> None:
    done = shell(edit(tmp_path / "edited.png") + " --json", "2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == "spmdeploy.edit/1"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", [LABELS_CHECK, f"{LABELS_CHECK} --json", "--help"])
def test_full_disk_behind_stdout_is_named(command: str) -> None:
    done = shell(command, ">/dev/full")
    assert done.returncode == 7
    assert "standard output" in done.stderr and "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_removed_current_directory_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f"cd '{gone}' && rmdir '{gone}' && '{sys.executable}' -m spmdeploy {edit(Path('o.png'))}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "error: the current directory no longer exists" in done.stderr
