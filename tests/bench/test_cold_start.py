"""ColdStart with a tiny bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmdeploy.bench.cold_start import ColdStart, import_times
from spmdeploy.bench.workloads import edit_case, write_case
from spmdeploy.errors import SpmDeployError
from spmdeploy.labels import class_table

STREET = class_table("street")


def test_turn_one_start_sums_to_its_phases(street_bundle: Path, tmp_path: Path) -> None:
    case = edit_case(STREET, 256, "small")
    files = write_case(case, tmp_path)
    start = ColdStart(files, ["--model", str(street_bundle), "--backend", "onnxruntime", "--device", "cpu"])
    first = start.first()
    assert first.edited.shape == first.photo.shape == (1, 256, 256, 3)
    assert (first.edited[0][~case.mask] == first.photo[0][~case.mask]).all()
    assert (first.edited != first.photo).any() and files.output.exists()
    start.reset()

    turn = start.turn(0.01, 1)
    (total,) = turn.samples
    phases = start.phase_medians()
    assert turn.seconds * 1000 >= total > 0
    assert sum(phases[name] for name in ("start", "open", "edit", "end")) == pytest.approx(total)
    assert all(phases[name] > 0 for name in ("start", "open", "edit"))
    assert {"import python", "import numpy", "import PIL"} <= set(phases)
    memory = start.memory()
    assert memory.peak is not None and memory.peak > 20e6


def test_first_failing_command_gives_reason(tmp_path: Path) -> None:
    case = edit_case(STREET, 256, "small")
    start = ColdStart(write_case(case, tmp_path), ["--model", str(tmp_path / "missing.spm")])
    with pytest.raises(SpmDeployError, match=r"ended with 6: .*missing\.spm"):
        start.first()


def test_process_environment_allows_bytecode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("SPMDEPLOY_CACHE", "elsewhere")
    monkeypatch.setattr("subprocess.Popen", lambda command, **options: started.update(options))
    ColdStart(write_case(edit_case(STREET, 256, "small"), tmp_path), [])._process()
    assert started["env"]["SPMDEPLOY_CACHE"] == "elsewhere" and "PYTHONDONTWRITEBYTECODE" not in started["env"]


def test_import_times_sums_by_package() -> None:
    text = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       200 |        300 |   numpy.core\n"
        "import time:      1800 |       3300 | numpy\n"
        "import time:       500 |        500 | json\n"
        "import time:       250 |        250 |       json.decoder\n"
        "note: something else\n"
    )
    assert import_times(text) == {"numpy": 2.0, "python": 0.75}
    assert import_times("") == {}


def test_write_case_keeps_mask_share(tmp_path: Path) -> None:
    case = edit_case(STREET, 256, "large")
    assert np.asarray(case.mask).mean() == pytest.approx(0.25, abs=0.01)
    assert write_case(case, tmp_path).image.suffix == ".jpg"
